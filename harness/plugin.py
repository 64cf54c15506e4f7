# SPDX-License-Identifier: Apache-2.0
"""The door for pytest: collects one item for every check of the ports that the root directory describes.

Imports neither torch nor transformers nor mlx until an item runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from harness.errors import DescriptionError, ParityError
from harness.results import BAD, Result, as_json

if TYPE_CHECKING:
    from harness.hub import HubServer
    from harness.isolation import Gate
    from harness.ports import Port
    from harness.runner import Item, Options

MARKERS = {
    "parity": "checks that a port still computes what its original computes",
    "cuda": "needs a CUDA device",
    "metal": "needs a Metal device",
    "mlx": "needs MLX",
    "hub": "talks to the loopback Hub",
    "slow": "takes more than a few seconds",
}

_results = pytest.StashKey[list[Result]]()
_item_results = pytest.StashKey[list[Result]]()
_exit_stack = pytest.StashKey[contextlib.ExitStack]()
_gate = pytest.StashKey["Gate"]()
_selected = pytest.StashKey[list[str]]()
_complaints = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of the design; each is `parity check`'s option of the same name."""
    group = parser.getgroup("parity", "parity of ports with their originals")
    add = group.addoption
    add("--parity", action="store_true", help="collect parity checks also without -m parity")
    add("--parity-port", action="append", default=[], metavar="NAME", help="only this port (repeatable)")
    add("--parity-backend", action="append", default=[], metavar="NAME", help="only this backend (repeatable)")
    add("--parity-dtype", action="append", default=[], metavar="NAME", help="only this dtype (repeatable)")
    add("--parity-checks", action="append", default=[], metavar="GLOB", help="only checks that match (repeatable)")
    add("--parity-profile", default="gate", metavar="NAME", help="gate (default), thorough or nightly")
    add("--parity-seed", type=int, default=None, metavar="N", help="draw other cases than the profile's own")
    add("--parity-report", type=Path, default=None, metavar="DIR", help="write reports and bundles of failures there")
    add("--parity-min-checks", type=int, default=0, metavar="N", help="fail when fewer checks ran for a port")
    add("--parity-time-limit", type=float, default=30.0, metavar="SECONDS", help="of one check (default 30)")
    add("--parity-require", action="append", default=[], metavar="BACKEND", help="exit 3 when it is not here")


def pytest_configure(config: pytest.Config) -> None:
    """Registers the markers, and takes node ids of checks out of the arguments, which name no file."""
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    config.stash[_results] = []
    config.stash[_exit_stack] = contextlib.ExitStack()
    config.stash[_selected] = [argument for argument in config.args if argument.startswith("parity::")]
    if config.stash[_selected]:
        config.args = [argument for argument in config.args if not argument.startswith("parity::")]


def pytest_unconfigure(config: pytest.Config) -> None:
    """Ends the processes of the run and removes its temporary directory."""
    if _exit_stack in config.stash:
        config.stash[_exit_stack].close()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    """A Hub of this test alone, on a free port of 127.0.0.1, with a user `alice` whose token is `hf_alice`.

    A client finds it by `hub.env()` in the environment of its process, before it imports huggingface_hub.
    """
    from harness.hub import HubServer

    with HubServer(tmp_path / "hub") as server:
        yield server


def wants_parity(config: pytest.Config) -> bool:
    """Whether this run asks for parity checks: by marker expression, option or node id."""
    expression = config.getoption("markexpr", "") or ""
    return bool(config.getoption("parity") or re.search(r"\bparity\b", expression) or config.stash[_selected])


def options_of(config: pytest.Config) -> Options:
    """The run's options. Raises DescriptionError for names that do not exist."""
    from harness.runner import Options

    names = ("backend", "dtype", "checks", "profile", "seed", "report", "min_checks", "require", "time_limit")
    given = {name: config.getoption(f"parity_{name}") for name in names}
    given["backends"], given["dtypes"] = given.pop("backend"), given.pop("dtype")
    if given["report"] is not None:
        given["report"] = given["report"].resolve()
    return Options(**given)


def ports_of(config: pytest.Config) -> list[Port]:
    """The described ports, those named by --parity-port only. Raises DescriptionError where there is none."""
    from harness.ports import read_ports, select_ports

    return select_ports(read_ports(config.rootpath), config.getoption("parity_port"), directory=config.rootpath)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Adds the checks' items, before marker and keyword expressions select."""
    if not wants_parity(config):
        return
    planned, options = planned_for(config)
    root: Collected = Collected.from_parent(session, name="parity", nodeid="parity", planned=planned, options=options)
    items.extend(item for item in session.genitems(root) if _is_selected(item.nodeid, config.stash[_selected]))


def planned_for(config: pytest.Config) -> tuple[list[Item], Options]:
    """What the run asks for; a request that cannot be met ends it with one line and the design's exit code."""
    from harness.families import nearest
    from harness.runner import plan, require_backends

    try:
        options = options_of(config)
        require_backends(options)
        planned = plan(ports_of(config), options)
        ids = [f"parity::{item.port.name}::{item.id}" for item in planned]
        for chosen in config.stash[_selected]:
            if not any(_is_selected(nodeid, [chosen]) for nodeid in ids):
                raise DescriptionError(f"'{chosen}' is no check of a described port{nearest(chosen, ids)}")
        return planned, options
    except ParityError as error:
        pytest.exit(f"parity: {error}", returncode=error.exit_code)


def _is_selected(nodeid: str, chosen: list[str]) -> bool:
    return not chosen or any(nodeid == each or nodeid.startswith((each + "::", each + "[")) for each in chosen)


class Collected(pytest.Collector):
    """The node above all ports, and the one above the checks of each."""

    def __init__(self, *, planned: list[Item], options: Options, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.planned, self.options = planned, options

    def collect(self) -> Iterator[pytest.Item | pytest.Collector]:
        """A node for each port below the first, an item for each check below a port."""
        if self.name == "parity" and isinstance(self.parent, pytest.Session):
            for name in dict.fromkeys(item.port.name for item in self.planned):
                own = [item for item in self.planned if item.port.name == name]
                yield Collected.from_parent(self, name=name, planned=own, options=self.options)
            return
        for item in self.planned:
            yield CheckItem.from_parent(self, name=item.id, item=item, options=self.options)


class CheckItem(pytest.Item):
    """One check of one port on one route, backend and dtype."""

    def __init__(self, *, item: Item, options: Options, **arguments: Any) -> None:
        super().__init__(**arguments)
        from harness.backends import mark_of
        from harness.checks import fresh_processes

        self.item, self.options = item, options
        talks = "hub" in fresh_processes(item.check.id, item.route, item.port.load)
        for mark in filter(None, ("parity", mark_of(item.backend), "hub" if talks else None)):
            self.add_marker(mark)

    def runtest(self) -> None:
        """Runs the check; the test's outcome is the result's."""
        self.stash[_item_results] = []
        opened = gate_of(self.session)
        try:
            opened.require_classes(self.item.port)
        except DescriptionError as error:
            if hasattr(self.config, "workerinput"):  # a worker that exits takes its message with it
                raise CheckFailed(f"error: {error}") from None
            pytest.exit(f"parity: {error}", returncode=error.exit_code)
        settle(note(self, opened.run(self.item, self.options)))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """What the result says; a traceback only for what is no result."""
        if isinstance(excinfo.value, CheckFailed):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        """Where the port is described, and a heading."""
        return self.path, None, f"{self.item.port.name}: {self.name}"


class CheckFailed(Exception):
    """A result that makes a test fail."""


def note(item: pytest.Item, result: Result) -> Result:
    """Keeps the result of a running test for the reports: pytest's own and ours."""
    item.stash[_item_results].append(result)
    properties = {"check": result.check, "reason": result.reason}
    if result.config is not None:
        properties["config"] = json.dumps(result.config)
    item.user_properties.extend((name, value) for name, value in properties.items() if value)
    return result


def settle(result: Result) -> None:
    """Turns a result into the outcome of the running test."""
    __tracebackhide__ = True
    if result.status == "skipped":
        pytest.skip(result.reason)
    if result.status == "xfailed":
        pytest.xfail(result.reason)
    if result.status in BAD:
        raise CheckFailed(failure_text(result))


def failure_text(result: Result) -> str:
    """A failed result in a few lines: the reason, the smallest configuration, the numbers, where to go on."""
    from harness.report.summary import compact_config

    lines = [f"{result.status}: {result.reason}"]
    if result.config:
        lines.append(f"  config    {compact_config(result.config)}")
    if result.metrics:
        lines.append("  numbers   " + " ".join(f"{name}={value:.3g}" for name, value in result.metrics.items()))
    if result.first_divergence:
        lines.append(f"  first at  {result.first_divergence}")
    if result.bundle:
        lines.append(f"  replay    parity repro {result.bundle}")
    return "\n".join(lines)


def gate_of(run: pytest.Session) -> Gate:
    """Where the run's checks are run, made when the first one is."""
    from harness.isolation import gate

    stash = run.config.stash
    if _gate not in stash:
        # A worker knows all items, not which it will get.
        is_worker = hasattr(run.config, "workerinput")
        checks = [item.item for item in run.items if isinstance(item, CheckItem) and not is_worker]
        stash[_gate] = stash[_exit_stack].enter_context(gate(checks))
    return stash[_gate]


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> None:
    """Makes the checks that `parametrize_with_checks` gave a test callable."""
    from harness.door import BoundCheck

    pyfuncitem.stash[_item_results] = []
    for name, value in list(pyfuncitem.funcargs.items()):
        if isinstance(value, BoundCheck):

            def check(_port: Any = None, *, bound: BoundCheck = value) -> Result:
                __tracebackhide__ = True
                report = bound.options.report or options_of(pyfuncitem.config).report
                options = dataclasses.replace(bound.options, report=report)
                result = gate_of(pyfuncitem.session).run(bound.item, options)
                settle(note(pyfuncitem, result))
                return result

            pyfuncitem.funcargs[name] = check


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Puts the results on the report, which travels from a worker process to the one that reports."""
    report = yield
    if call.when == "call":
        report.parity_results = [as_json(result) for result in item.stash.get(_item_results, [])]
    return report


class ResultCollector:
    """Keeps the results that arrive, in this process and from workers."""

    def __init__(self, config: pytest.Config) -> None:
        self.results = config.stash[_results]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Notes the results of a test's report."""
        self.results.extend(Result(**values) for values in getattr(report, "parity_results", []))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Starts keeping results, in the process that reports, and refuses wrong requests before workers start."""
    if not hasattr(session.config, "workerinput"):
        if wants_parity(session.config):
            planned_for(session.config)
        session.config.pluginmanager.register(ResultCollector(session.config), "parity-results")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Writes the reports, and fails a run in which fewer checks ran than were asked for."""
    config = session.config
    if hasattr(config, "workerinput") or config.getoption("collectonly") or not config.stash[_results]:
        return
    from harness.report import write_reports
    from harness.runner import header_of, too_few

    options, results = options_of(config), config.stash[_results]
    filtered = bool(
        config.stash[_selected] or config.getoption("keyword") or config.getoption("markexpr") not in ("", "parity")
    )
    described = ports_of(config) if wants_parity(config) else []
    config.stash[_complaints] = too_few(described, results, options, filtered=filtered)
    if config.stash[_complaints] and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if options.report is not None:
        write_reports(options.report, results, header=header_of(options))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table of the run, failures first, and what was asked for and did not run."""
    results = config.stash[_results]
    if not results:
        return
    from harness.report import print_table
    from harness.runner import header_of

    terminalreporter.section("parity")
    print_table(results, header=header_of(options_of(config)))
    for line in config.stash.get(_complaints, []):
        terminalreporter.write_line(f"parity: {line}", red=True)
