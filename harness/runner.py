# SPDX-License-Identifier: Apache-2.0
"""The one generator behind every door: which checks are asked of a port, and what becomes of each."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import json
import logging
import os
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from harness.advice import advised
from harness.backends import BACKENDS, NO_FLOAT64, unavailable
from harness.cases import Case, cases
from harness.checks import CATALOGUE, MAIN, Check, check_ids, function_of
from harness.errors import DescriptionError, Mismatch, NotHere, OutOfTime, ParityError, Skip, says_out_of_memory
from harness.families import Family, nearest
from harness.ports import (
    Port,
    check_patterns,
    family_of,
    first_line,
    lacks,
    require_fields,
    require_named,
)
from harness.programs import starts_quickly
from harness.results import BAD, Result, checks_run
from harness.routes import main_route

if TYPE_CHECKING:
    from harness.guards import Complaint
    from harness.report import Header
    from harness.sandbox import Sandbox
    from harness.trial import Trial

PROFILES = {"gate": 1, "thorough": 6, "nightly": 30}
"""How many times the catalogue's number of examples a profile draws."""

ROUTE_CHECKS = {
    "pretrained": ("roundtrip.pretrained",),
    "remote_code": ("remote_code.outputs",),
    "hub": ("hub.outputs", "remote_code.outputs"),
}
"""A port that lacks a check of a route has no such route; nor does it come from the Hub without remote code."""

FRESH_SECONDS = 20.0
"""How long one job of a fresh process may take: less than a check, which then says so itself."""

OF_THE_CLIENT = (
    "huggingface_hub.hf_api",
    "huggingface_hub.repocard",
    "transformers.modelcard",
    "transformers.models.auto.tokenization_auto",
)
"""What a process that talks to the Hub needs imported besides."""

HUB_EXAMPLES = 2
"""Cases a check tries at most in profile `gate` on a port that is pushed to the Hub for each."""

COMMAND_EXAMPLES = 2
"""Cases a check tries in profile `gate` on a port whose weights a program converts, at seconds a start."""

PROGRAM_EXAMPLES = 6
"""The same, where the program is forked from a process that has the frameworks: a fraction of a second a start."""

OF_TRANSFORMERS = frozenset({"remote_code"})
"""Routes by which only models of transformers travel."""

HARNESS = Path(__file__).parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to run. Empty `backends`, `dtypes` and `checks` mean all; `seed` None means the profile's own.

    checks are shell patterns on check ids. require names backends that must be here. report is where bundles of
    failures and the reports go; without it there are none. shrink_seconds bounds how long a failing case shrinks,
    time_limit how many seconds a check takes in profile `gate`; the other profiles give it as much more as they draw.
    """

    backends: Sequence[str] = ()
    dtypes: Sequence[str] = ()
    checks: Sequence[str] = ()
    profile: str = "gate"
    seed: int | None = None
    report: Path | None = None
    min_checks: int = 0
    require: Sequence[str] = ()
    shrink_seconds: float = 10.0
    time_limit: float = 30.0

    def __post_init__(self) -> None:
        from harness.backends.names import DTYPES

        for what, values, known in (
            ("backend", self.backends, BACKENDS),
            ("dtype", self.dtypes, DTYPES),
            ("profile", [self.profile], list(PROFILES)),
            ("backend", [name for name in self.require if name != "mlx"], BACKENDS),
        ):
            for value in values:
                if value not in known:
                    raise DescriptionError(f"there is no {what} '{value}'{nearest(value, known)}")
        for pattern in self.checks:
            if not fnmatch.filter(check_ids(), pattern):
                raise DescriptionError(f"no check matches '{pattern}'{nearest(pattern, check_ids())}")
        if not self.time_limit > 0:
            raise DescriptionError(f"the time limit of a check must be some seconds, not {self.time_limit}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """One check of one port on one route, backend and dtype."""

    port: Port
    family: Family
    check: Check
    route: str
    backend: str
    dtype: str

    @property
    def variant(self) -> str:
        """Route, backend and dtype as they stand in an item's id."""
        return f"{self.route}-{self.backend}-{self.dtype}"

    @property
    def id(self) -> str:
        """The item's id below its port."""
        return f"{self.check.id}[{self.variant}]"


def plan(ports: Sequence[Port], options: Options) -> list[Item]:
    """Every item of the ports, in the catalogue's order; imports families, but no framework.

    Raises DescriptionError for an unknown family, a file or class that does not exist, a `config_map` of fields that
    the original does not have, and `lacks` or `xfail` patterns that match no check.
    """
    check_patterns(ports, check_ids())
    for port in ports:
        require_named(port)
        require_fields(port)
    return [item for port in ports for item in _plan_port(port, family_of(port), options)]


def _plan_port(port: Port, family: Family, options: Options) -> Iterator[Item]:
    for check in CATALOGUE:
        if options.checks and not any(fnmatch.fnmatch(check.id, pattern) for pattern in options.checks):
            continue
        backends = family.backends if check.devices else family.backends[:1]
        routes = dict.fromkeys(main_route(port) if route == MAIN else route for route in check.routes)
        for backend in backends:
            if options.backends and backend not in options.backends:
                continue
            dtypes = dict.fromkeys(_on(backend, dtype) for dtype in check.dtypes if _is_known(backend, dtype))
            for route in list(routes)[: None if backend == family.backends[0] else 1]:
                for dtype in dtypes:
                    if not options.dtypes or dtype in options.dtypes:
                        yield Item(port=port, family=family, check=check, route=route, backend=backend, dtype=dtype)


def _is_known(backend: str, dtype: str) -> bool:
    return dtype != "autocast" or not backend.startswith("mlx-")  # MLX knows no autocast


def _on(backend: str, dtype: str) -> str:
    return "float32" if dtype == "float64" and backend in NO_FLOAT64 else dtype


def require_backends(options: Options) -> None:
    """Raises NotHere for the first backend that `require` names and this machine does not have."""
    for name in options.require:
        reason = unavailable("mlx-cpu" if name == "mlx" else name)
        if reason:
            raise NotHere(f"{reason} (required: {name})")


@contextlib.contextmanager
def session() -> Iterator[Session]:
    """What the items answered in one process share: a temporary directory and servers of fresh processes."""
    from harness.hub.wire import reserved_port
    from harness.sandbox import Sandbox

    with tempfile.TemporaryDirectory(prefix="parity-") as directory:
        root = Path(directory).resolve()
        # Clients know their Hub's address before it starts: it comes and goes on a port that is kept for it.
        with Sandbox(root, time_limit_seconds=FRESH_SECONDS) as sandbox, reserved_port() as keeper:
            endpoint = f"http://127.0.0.1:{keeper.getsockname()[1]}"
            with Sandbox(root, time_limit_seconds=FRESH_SECONDS, preload=OF_THE_CLIENT, endpoint=endpoint) as hub:
                yield Session(root=root, sandbox=sandbox, hub=hub)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Session:
    """See `session`. complaints: what is looked out for besides; case_file: where the case at work is written down.

    sandbox: fresh processes without a network. hub: those that talk to the Hub of a check, see `harness.routes.hub`.
    alone: the process runs one item and ends, and is no foreground process: an interrupt comes from the port.
    """

    root: Path
    sandbox: Sandbox
    hub: Sandbox
    complaints: Sequence[Complaint] = ()
    case_file: Path | None = None
    alone: bool = False


def run_item(item: Item, options: Options, shared: Session) -> Result:
    """What becomes of an item that is not `skipped`, in this process. Never raises for what a port or a check does."""
    started = time.perf_counter()
    with contained(), tempfile.TemporaryDirectory(dir=shared.root) as directory:
        try:
            outcome = _explore(item, options, shared, Path(directory))
        except DescriptionError as error:
            return _result(item, started, status="error", reason=str(error))
    return _with_expectation(item, dataclasses.replace(outcome, seconds=time.perf_counter() - started))


def skipped(item: Item) -> Result | None:
    """The result of an item that is not for this port, family or machine; runs no foreign code."""
    reason = _why_not(item)
    return _result(item, time.perf_counter(), status="skipped", reason=reason) if reason else None


def ended(item: Item, options: Options, case: Case | None, reason: str, shared: Session | None) -> Result:
    """The result of an item whose process ended without one, at work on a case; its bundle where there is a session."""
    from harness import bundles

    config = case.as_dict() if case else None
    result = _result(item, time.perf_counter(), status="failed", reason=reason, config=config, examples=1)
    if case and shared and options.report:
        trial = trial_of(item, shared, shared.root)
        path = bundles.write(result, trial, case, Mismatch(reason), directory=options.report / "bundles")
        result = dataclasses.replace(result, bundle=str(path))
    return _with_expectation(item, result)


def _why_not(item: Item) -> str | None:
    ways = [item.route, *(["remote_code"] if item.check.id.startswith("hub.") else [])]
    for check in (item.check.id, *(check for way in ways for check in ROUTE_CHECKS.get(way, ()))):
        if reason := lacks(item.port, check):
            return f"the port lacks it: {reason}"
    absent = [need for need in item.check.needs if need not in {*item.family.features, item.family.framework}]
    if "transformers" in absent or (item.route in OF_TRANSFORMERS and item.family.framework != "transformers"):
        return f"ports of family '{item.family.name}' are models of {item.family.framework}, not of transformers"
    if absent:
        return f"family '{item.family.name}' has no {absent[0].replace('_', ' ')}"
    return unavailable(item.backend)


def _result(item: Item, started: float, **values: Any) -> Result:
    return Result(
        port=item.port.name,
        family=item.family.name,
        check=item.check.id,
        route=item.route,
        backend=item.backend,
        dtype=item.dtype,
        seconds=time.perf_counter() - started,
        **values,
    )


def _with_expectation(item: Item, result: Result) -> Result:
    for pattern, reason in item.port.xfail.items():
        if fnmatch.fnmatch(item.check.id, pattern):
            if result.status in ("failed", "error"):
                return dataclasses.replace(result, status="xfailed", reason=f"expected: {reason} ({result.reason})")
            if result.status == "passed":
                return dataclasses.replace(
                    result, status="xpassed", reason=f"holds, so remove its xfail entry, which says: {reason}"
                )
    return result


def trial_of(item: Item, shared: Session, directory: Path) -> Trial:
    """What a check of the item is given, with an empty directory of its own below `directory`."""
    from harness.trial import Trial

    return Trial(
        port=item.port,
        family=item.family,
        route=item.route,
        backend=item.backend,
        dtype=item.dtype,
        workdir=Path(tempfile.mkdtemp(dir=directory)),
        sandbox=shared.sandbox,
        hub=shared.hub,
    )


def _explore(item: Item, options: Options, shared: Session, directory: Path) -> Result:
    """Draws cases until one fails, and shrinks that one."""
    from harness.exploration import explore
    from harness.trial import worst

    started = time.perf_counter()
    function = function_of(item.check)
    passed: list[dict[str, float]] = []
    skipped: list[str] = []

    def trial() -> Trial:
        return trial_of(item, shared, directory)

    def attempt(case: Case) -> None:
        if shared.case_file is not None:
            shared.case_file.write_text(json.dumps(case.as_dict()), encoding="utf-8")
        try:
            passed.append(_run_check(function, trial(), case, shared))
        except Skip as skip:
            skipped.append(str(skip))

    failure = explore(
        attempt,
        cases(item.family, item.check.cases),
        examples=_examples(item) * PROFILES[options.profile],
        seed=seed_of(item, options),
        database=f"{item.port.name}::{item.id}" if options.profile == "nightly" else None,
        shrink_seconds=options.shrink_seconds,
    )
    examples = len(passed) + (failure.attempts if failure else 0)
    if failure is not None:
        return _failed(item, options, failure.case, failure.error, trial(), shared, examples=examples, started=started)
    if not passed:
        return _result(item, started, status="skipped", reason=skipped[0] if skipped else "no case was drawn")
    return _result(item, started, status="passed", metrics=worst(*passed), examples=examples)


def _examples(item: Item) -> int:
    """The catalogue's count; less where a program is started, or a Hub, for every set of weights."""
    bounds = [HUB_EXAMPLES] if item.route == "hub" else []
    if _converts(item):
        # Checks of files convert many for each case.
        is_quick = starts_quickly(item.port) and "checkpoint" not in item.check.needs
        # Every check tries the same few models; the one that tries most, half of its own.
        bounds.append(max(PROGRAM_EXAMPLES, item.check.examples // 2) if is_quick else COMMAND_EXAMPLES)
    return min([item.check.examples, *bounds])


def _converts(item: Item) -> bool:
    """Whether a program is started for the weights of each case."""
    return item.port.loader == "command" and item.route != "direct"


def replay(port: Port, case: Case, recorded: Mapping[str, Any], bundle: Path, shared: Session) -> Result:
    """What becomes of a recorded failure's one case now, with the weights and the batch of its bundle.

    Raises DescriptionError for a check that does not exist and for files that are not as they were written.
    """
    from harness.bundles import tensors

    check = next((check for check in CATALOGUE if check.id == recorded["check"]), None)
    if check is None:
        raise DescriptionError(f"there is no check '{recorded['check']}'{nearest(recorded['check'], check_ids())}")
    where = {name: recorded[name] for name in ("route", "backend", "dtype")}
    item = Item(port=port, family=family_of(port), check=check, **where)
    started = time.perf_counter()
    if reason := unavailable(item.backend):
        raise NotHere(f"{reason}; the failure was recorded on {item.backend}")
    with contained():
        trial = dataclasses.replace(trial_of(item, shared, shared.root), recorded=tensors(bundle, case))
        try:
            metrics = _run_check(function_of(check), trial, case, shared)
        except Skip as skip:
            return _result(item, started, status="skipped", reason=str(skip))
        except Exception as error:
            return _failed(item, Options(), case, error, trial, shared, examples=1, started=started)
    return _result(item, started, status="passed", metrics=metrics, examples=1)


def seed_of(item: Item, options: Options) -> int | None:
    """The seed of an item's draws, the same on every run: one of its own for each check; None in profile nightly.

    Where a program converts the weights, all checks draw the same cases, so that it is started for each but once.
    """
    if options.profile == "nightly" and options.seed is None:
        return None
    if _converts(item):
        return options.seed or 0
    return zlib.crc32(item.check.id.encode()) + 1_000_003 * (options.seed or 0)


def _run_check(
    function: Callable[[Trial, Case], dict[str, float]], trial: Trial, case: Case, shared: Session
) -> dict[str, float]:
    from harness.backends.pytorch import numeric_settings

    with numeric_settings():
        try:
            return _run_judged(function, trial, case)
        except SystemExit as error:
            raise Mismatch(f"the port ended the process: SystemExit: {error.code}") from error
        except Exception as error:
            if isinstance(error, ParityError) or not says_out_of_memory(type(error).__name__, first_line(error)):
                raise
            raise Mismatch(f"the port ran out of memory: {first_line(error)}") from error
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and not shared.alone:
                raise
            raise Mismatch(f"the port raised {type(error).__name__}: {first_line(error)}") from error
        finally:
            if said := next(filter(None, (complaint() for complaint in shared.complaints)), None):
                raise Mismatch(said)


def _run_judged(function: Callable[[Trial, Case], dict[str, float]], trial: Trial, case: Case) -> dict[str, float]:
    """Runs a check; again where a part in float32 explains its failure, judged by what float32 allows."""
    from harness.narrowing import judged_at

    try:
        return function(trial, case)
    except Mismatch as error:
        softer = judged_at(trial, case, error)
        if softer is None:
            raise
    softer = dataclasses.replace(softer, workdir=Path(tempfile.mkdtemp(dir=trial.workdir)))
    return {**function(softer, case), "float32_inside": 1.0}


@contextlib.contextmanager
def _no_sudden_end() -> Iterator[None]:
    """Turns `os._exit` of this process into an exception, inside: it would end the gate, and with status 0 as green."""
    own, leave = os.getpid(), os._exit

    def refuse(status: int) -> NoReturn:
        if os.getpid() != own:
            leave(status)  # a child that the port forked
        raise SystemExit(f"os._exit({status})")

    os._exit = refuse
    try:
        yield
    finally:
        os._exit = leave


def _failed(
    item: Item,
    options: Options,
    case: Case,
    error: Exception,
    trial: Trial,
    shared: Session,
    *,
    examples: int,
    started: float,
) -> Result:
    from harness import bundles, localise

    if isinstance(error, DescriptionError):
        raise error
    status, reason = ("failed", str(error)) if isinstance(error, Mismatch) else explain(error)
    found = None
    if not isinstance(error, OutOfTime):  # what hangs would hang again
        try:
            found = localise.locate(trial, case, item.check, seconds=min(localise.SECONDS, options.shrink_seconds))
        except KeyboardInterrupt:
            if not shared.alone:
                raise
    divergence = found.module if found else getattr(error, "first_divergence", None)
    result = _result(
        item,
        started,
        status=status,
        reason=f"{advised(reason)}; {found.sentence}" if found else advised(reason),
        config=case.as_dict(),
        metrics=getattr(error, "metrics", {}),
        first_divergence=divergence,
        examples=examples,
    )
    if options.report is None:
        return result
    path = bundles.write(result, trial, case, error, directory=options.report / "bundles")
    return dataclasses.replace(result, bundle=str(path))


def explain(error: Exception) -> tuple[Any, str]:
    """Status and one line for an exception that is no Mismatch: the port's fault, unless only our code was running."""
    frames = traceback.extract_tb(error.__traceback__)
    text = f"{type(error).__name__}: {first_line(error)}" if not isinstance(error, ParityError) else str(error)
    inner = frames[-1] if frames else None
    last = next((i for i in reversed(range(len(frames))) if HARNESS in Path(frames[i].filename).parents), -1)
    if lacking := _what_is_lacking(error, frames[last + 1 :]):
        return "failed", lacking
    if inner is None or last == len(frames) - 1:
        where = f" at {Path(inner.filename).name}:{inner.lineno}" if inner else ""
        return "error", f"the harness itself raised {text}{where}"
    called = (frames[last].line or "a call").partition("  #")[0]
    return "failed", f"raised {text} ({Path(inner.filename).name}:{inner.lineno}, from `{called}`)"


def _what_is_lacking(error: Exception, inner: Sequence[traceback.FrameSummary]) -> str | None:
    """One line where a check asked a port's own object for something that it does not have."""
    if not isinstance(error, AttributeError) or error.obj is None or not error.name:
        return None
    cls = error.obj if isinstance(error.obj, type) else type(error.obj)
    asked_here = all(Path(frame.filename).parts[-2:] == ("modules", "module.py") for frame in inner)
    is_model_or_configuration = any(hasattr(cls, name) for name in ("state_dict", "to_dict", "__dataclass_fields__"))
    if not asked_here or not is_model_or_configuration or cls.__module__.partition(".")[0] in ("harness", "torch"):
        return None
    return (
        f"{cls.__name__} has no {error.name}; a port has what models of its library have, or says in lacks what it does"
        " without"
    )


@contextlib.contextmanager
def contained() -> Iterator[None]:
    """Where foreign code runs: nothing it prints, sets for the whole of torch, or ends reaches the run."""
    from harness.backends.pytorch import numeric_settings

    with quiet(), numeric_settings(), _no_sudden_end():
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what libraries and ports print, warn and log inside away from the terminal."""
    level = logging.root.manager.disable
    hub_bars = _progress_bars()
    logging.disable(logging.CRITICAL)
    try:
        with (
            open(os.devnull, "w") as sink,  # kept in memory, megabytes would add up
            warnings.catch_warnings(),
            contextlib.redirect_stdout(sink),
            contextlib.redirect_stderr(sink),
            _silent_descriptor(1),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        for restore in hub_bars:
            restore()


@contextlib.contextmanager
def _silent_descriptor(number: int) -> Iterator[None]:
    # What C code and programs print goes past sys.stdout; standard error stays open for the last words of a crash.
    if sys.__stdout__ is not None:
        sys.__stdout__.flush()
    saved = os.dup(number)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)
    try:
        yield
    finally:
        if sys.__stdout__ is not None:
            sys.__stdout__.flush()
        os.dup2(saved, number)
        os.close(saved)


def _progress_bars() -> list[Callable[[], None]]:
    if "transformers" not in sys.modules:
        return []
    from transformers.utils import logging as transformers_logging

    if not transformers_logging.is_progress_bar_enabled():
        return []
    transformers_logging.disable_progress_bar()
    return [transformers_logging.enable_progress_bar]


def too_few(ports: Sequence[Port], results: Sequence[Result], options: Options, *, filtered: bool = False) -> list[str]:
    """One line for every port of which fewer checks ran than it, or the options, ask for.

    A port's own `min_checks` counts only when nothing was filtered out, by the options or otherwise, and where one of
    its family's backends is here: `--require` is what asks for those.
    """
    filtered = filtered or bool(options.checks or options.backends or options.dtypes)
    lines = []
    for port in ports:
        least = max(options.min_checks, 0 if filtered or nowhere(family_of(port)) else port.min_checks)
        run = checks_run(result for result in results if result.port == port.name)
        if run < least:
            lines.append(f"port '{port.name}': {run} checks ran, {least} were asked for")
    return lines


def nowhere(family: Family) -> str | None:
    """Why ports of a family cannot run on this machine at all; None when they can, on one backend at least."""
    first: str | None = None
    for backend in family.backends:
        reason = unavailable(backend)
        if reason is None:
            return None
        first = first or reason
    return first


def run_ports(
    ports: Sequence[Port], options: Options, *, on_result: Callable[[Result], None] | None = None
) -> list[Result]:
    """Runs every item of the ports, calling `on_result` after each. Raises NotHere and DescriptionError only."""
    from harness.isolation import gate

    require_backends(options)
    items = plan(ports, options)
    results = []
    with gate(items) as opened:
        for port in ports:
            opened.require_classes(port)
        for item in items:
            results.append(opened.run(item, options))
            if on_result is not None:
                on_result(results[-1])
    return results


def header_of(options: Options) -> Header:
    """What a report says above its results."""
    from harness.backends.names import TORCH_SETTINGS
    from harness.bundles import versions
    from harness.report import Header

    seed = options.seed if options.seed is not None or options.profile == "nightly" else 0
    return Header(profile=options.profile, seed=seed, versions=versions(), settings=TORCH_SETTINGS)


def check_parity(port: Port, **options: Any) -> list[Result]:
    """Runs the checks of one port; keyword options are the fields of `Options`. Never raises for a failed check."""
    return run_ports([port], Options(**options))


def exit_code(results: Sequence[Result], complaints: Sequence[str]) -> int:
    """0 when everything holds, 1 when a check failed or too few ran."""
    return int(bool(complaints) or any(result.status in BAD for result in results))
