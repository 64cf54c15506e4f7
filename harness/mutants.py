# SPDX-License-Identifier: Apache-2.0
"""Planted bugs: each one put into a copy of a port, the gate run on the copy, and who noticed."""

from __future__ import annotations

import dataclasses
import fnmatch
import multiprocessing
import queue
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from harness.errors import DescriptionError
from harness.families import Family, read_conftest
from harness.ports import Port, converter_spec, family_of, load_object
from harness.programs import command_of, python_program
from harness.results import BAD, Result

if TYPE_CHECKING:
    from harness.isolation import Gate
    from harness.runner import Options

Verdict = Literal["killed", "survived", "green", "red"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mutant:
    """One planted bug, or a harmless rewrite, as an exact edit of the source.

    id: short, unique in its family. file: the edited file, relative to the port's root. find: text that occurs in it
    exactly `times` times. replace: what stands there instead. bug: what a person would call it. killers: patterns of
    checks that are expected to notice; none for a harmless rewrite, on which the gate must stay green. load: how the
    weights get in instead of the port's own way, where that would refuse the bug before any check can look at it.
    """

    id: str
    file: str
    find: str
    replace: str
    bug: str
    killers: Sequence[str] = ()
    times: int = 1
    load: str = ""

    @property
    def harmless(self) -> bool:
        """Whether the edit changes nothing that anyone could notice."""
        return not self.killers


def planted(
    file: str, name: str, bug: str, killers: str, find: str, replace: str, times: int = 1, *, load: str = ""
) -> Mutant:
    """A mutant in one line of a list: its id is `name`, its killers are words."""
    words = tuple(killers.split())
    return Mutant(id=name, file=file, find=find, replace=replace, times=times, bug=bug, killers=words, load=load)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trapped:
    """What became of a mutant: killed or survived (green or red for a harmless one), by which checks, how fast.

    missed names the checks that were expected to notice and did not.
    """

    mutant: str
    bug: str
    harmless: bool
    verdict: Verdict
    killers: Sequence[str]
    missed: Sequence[str]
    reason: str
    seconds: float

    @property
    def good(self) -> bool:
        """Whether the gate did what it should."""
        return self.verdict in ("killed", "green")


def table(verdicts: Sequence[Trapped]) -> str:
    """One line for each verdict: what became of it, how fast, by which checks."""
    return "\n".join(
        f"{v.verdict:<9} {v.seconds:6.1f} s  {v.mutant:<28} {', '.join(v.killers) or v.bug}"
        + (f" (not by {', '.join(v.missed)})" if v.killers and v.missed else "")
        for v in verdicts
    )


def score(verdicts: Sequence[Trapped]) -> str:
    """The closing line: how many bugs were killed, how many harmless rewrites stayed green."""
    bugs = [verdict for verdict in verdicts if not verdict.harmless]
    others = [verdict for verdict in verdicts if verdict.harmless]
    seconds = sorted(verdict.seconds for verdict in bugs) or [0.0]
    return (
        f"{sum(verdict.good for verdict in bugs)} of {len(bugs)} planted bugs killed, in a median of"
        f" {seconds[len(seconds) // 2]:.1f} s; {sum(v.good for v in others)} of {len(others)} harmless rewrites green"
    )


def groups(verdicts: Sequence[Trapped]) -> str:
    """One line for each group of checks: how many planted bugs one of it noticed first, and in how many seconds."""
    noticed: dict[str, list[float]] = {}
    for verdict in verdicts:
        if verdict.killers and not verdict.harmless:
            noticed.setdefault(verdict.killers[0].partition(".")[0], []).append(verdict.seconds)
    return "\n".join(
        f"{group:<12} {len(seconds):>4}   median {sorted(seconds)[len(seconds) // 2]:.1f} s"
        for group, seconds in sorted(noticed.items(), key=lambda entry: -len(entry[1]))
    )


def mutants_of(family: Family) -> tuple[Mutant, ...]:
    """The mutants beside a family. Raises DescriptionError when it has none, or two of one id."""
    if family.mutants is None:
        raise DescriptionError(f"family '{family.name}' has no mutants")
    found: tuple[Mutant, ...] = tuple(load_object(family.mutants, root=Path.cwd()))
    ids = [mutant.id for mutant in found]
    if twice := [name for name in ids if ids.count(name) > 1]:
        raise DescriptionError(f"family '{family.name}' has two mutants '{twice[0]}'")
    return found


def mutated_source(mutant: Mutant, root: Path) -> str:
    """The file with the bug in it. Raises DescriptionError when the edit does not match as often as it says."""
    path = root / mutant.file
    if not path.is_file():
        raise DescriptionError(f"mutant '{mutant.id}': there is no file {path}")
    source = path.read_text(encoding="utf-8")
    count = source.count(mutant.find)
    if count != mutant.times:
        raise DescriptionError(
            f"mutant '{mutant.id}': its text occurs {count} times in {mutant.file}, expected {mutant.times}"
        )
    return source.replace(mutant.find, mutant.replace)


def plant(mutant: Mutant, port: Port, directory: Path) -> Port:
    """A copy of the port below `directory` with the bug in it: the files of `code`, its converter, nothing else.

    Of a converter that is a Python program all the files of its package, or beside its file.
    """
    if not port.code:
        raise DescriptionError(f"port '{port.name}': selftest needs `code`, the files the port consists of")
    named = [(spec or "").rpartition(":")[0] for spec in (port.model, port.config, converter_spec(port))]
    files = {*port.code, mutant.file, *(file for file in named if file.endswith(".py"))}
    program = python_program(command_of(port, checkpoint="", out="")) if port.loader == "command" else None
    for file in files.union(map(str, program.sources(port.root) if program else ())):
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(port.root / file, directory / file)
    (directory / mutant.file).write_text(mutated_source(mutant, port.root), encoding="utf-8")
    return dataclasses.replace(port, root=directory, load=mutant.load or port.load)


def selftest(
    port: Port, mutants: Sequence[Mutant], *, jobs: int = 2, everything: bool = False, time_limit: float = 20.0
) -> Iterator[Trapped]:
    """What becomes of each mutant, as verdicts come in.

    Checks expected to kill run first, in their order, up to the first that does and on to those that no mutant before
    this one has tried: each is tried at least once. With `everything` all checks run, so that every killer is known.
    Each mutant runs in a process of its own, in one of `jobs` gates side by side.
    time_limit: seconds of one check. Raises DescriptionError before anything runs when an edit does not match.
    """
    for mutant in mutants:
        mutated_source(mutant, port.root)
    context = multiprocessing.get_context("spawn")
    todo, done = context.Queue(), context.Queue()
    tried: set[str] = set()
    for mutant in mutants:
        todo.put((mutant, tuple(pattern for pattern in mutant.killers if pattern not in tried)))
        tried.update(mutant.killers)
    workers = [
        context.Process(target=_work, args=(port, todo, done, everything, time_limit), daemon=False)
        for _ in range(max(1, min(jobs, len(mutants))))
    ]
    for worker in workers:
        worker.start()
    finished = False
    try:
        for _ in mutants:
            yield _next(done, workers)
        finished = True
    finally:
        for worker in workers:
            if not finished:
                worker.terminate()
            worker.join()


def _next(done: Any, workers: Sequence[Any]) -> Trapped:
    while True:
        try:
            trapped: Trapped = done.get(timeout=1)
            return trapped
        except queue.Empty:
            if not any(worker.is_alive() for worker in workers):
                raise DescriptionError("the selftest's workers ended early; run `parity check` to see why") from None


def _work(port: Port, todo: Any, done: Any, everything: bool, time_limit: float) -> None:
    from harness.isolation import gate
    from harness.runner import Options, plan

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    read_conftest(port.root, [port.family])
    options = Options(backends=family_of(port).backends[:1], shrink_seconds=0.0, time_limit=time_limit)
    with gate(plan([port], options)) as opened:
        while True:
            try:
                mutant, wanted = todo.get(timeout=0.5)
            except queue.Empty:
                return
            done.put(_verdict(mutant, port, opened, options, ("*",) if everything else wanted))


def _verdict(mutant: Mutant, port: Port, opened: Gate, options: Options, wanted: Sequence[str]) -> Trapped:
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        results = list(_results(mutant, plant(mutant, port, Path(directory)), opened, options, wanted))
    run = [result.check for result in results]
    bad = [(result.check, result.reason) for result in results if result.status in BAD]
    if port.min_checks:
        # A check that falls silent is one too few, for which the gate is red as well.
        silent = [result for result in results if result.status == "skipped" and _is_expected(mutant, result.check)]
        bad += [(result.check, f"fell silent: {result.reason}") for result in silent]
    killers = list(dict.fromkeys(check for check, _ in bad))
    verdict: Verdict = ("red" if bad else "green") if mutant.harmless else ("killed" if bad else "survived")
    return Trapped(
        mutant=mutant.id,
        bug=mutant.bug,
        harmless=mutant.harmless,
        verdict=verdict,
        killers=killers,
        missed=[name for name in mutant.killers if fnmatch.filter(run, name) and not fnmatch.filter(killers, name)],
        reason=bad[0][1] if bad else "",
        seconds=time.monotonic() - started,
    )


def _results(mutant: Mutant, planted: Port, opened: Gate, options: Options, wanted: Sequence[str]) -> Iterator[Result]:
    """What becomes of the checks, those expected to notice first; once one has, only of those that are wanted."""
    from harness.runner import plan

    def place(check: str) -> int:
        found = (place for place, name in enumerate(mutant.killers) if fnmatch.fnmatch(check, name))
        return next(found, len(mutant.killers))

    noticed = False
    for item in sorted(plan([planted], options), key=lambda item: place(item.check.id)):
        check = item.check.id
        if noticed and not any(fnmatch.fnmatch(check, name) for name in wanted):
            continue
        yield (result := opened.run(item, options))
        silent = planted.min_checks and result.status == "skipped" and _is_expected(mutant, check)
        noticed = noticed or bool(silent) or result.status in BAD


def _is_expected(mutant: Mutant, check: str) -> bool:
    return any(fnmatch.fnmatch(check, pattern) for pattern in mutant.killers)
