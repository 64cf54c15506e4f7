# SPDX-License-Identifier: Apache-2.0
"""What a person sees of a run: a progress bar while it lasts, then one table, the failures, and the count."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from harness.report.summary import (
    Header,
    Row,
    count_line,
    distinct_checks,
    excused,
    facts,
    failures,
    header_line,
    one_line,
    reason,
    replay_command,
    rows,
    several_ran,
    who,
)
from harness.results import BAD, Result

if TYPE_CHECKING:  # rich takes longer to import than most commands take to run
    from rich.console import Console
    from rich.text import Text

_STYLES = {
    "passed": "green",
    "xfailed": "yellow",
    "failed": "bold red",
    "xpassed": "bold red",
    "error": "bold red",
}
_LABEL_WIDTH = 13
_MOST_REPLAYS = 3
_LOG_WIDTH = 120  # of a pipe or a CI log, where nobody can ask for the width


def make_console(*, stderr: bool = False) -> Console:
    """The console of a run: colours on a terminal only and not with NO_COLOR; COLUMNS sets the width."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    wide = None if stream.isatty() or os.environ.get("COLUMNS", "").isdigit() else _LOG_WIDTH
    return Console(file=stream, width=wide, highlight=False, markup=False, emoji=False)


@contextlib.contextmanager
def progress(total: int | None, console: Console | None = None) -> Iterator[Callable[[str], None]]:
    """A bar on standard error that is gone at the end; yields a function that counts one and shows a name.

    Silent where nobody watches: a pipe, a CI log (even one with FORCE_COLOR), a dumb terminal.
    """
    console = console or make_console(stderr=True)
    if not (console.is_interactive and console.file.isatty()):
        yield lambda text: None
        return

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    # Standard output is left alone: it may be a file, and rich would carry its text over to the console.
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, refresh_per_second=4) as bar:
        task = bar.add_task("", total=total)

        def advance(text: str) -> None:
            bar.update(task, advance=1, description=_encodable(one_line(text), console))

        yield advance


def print_table(results: Iterable[Result], *, header: Header, console: Console | None = None) -> None:
    """Prints what a run found: one table, failures first; each failure; what was skipped; the count."""
    kept = list(results)
    console = console or make_console()
    _print(console, header_line(header), style="dim")
    _print_rows(console, kept)
    for groups in failures(kept):
        _print_failure(console, groups, several_ports=several_ran(kept, "port"))
    lines = excused(kept)
    if lines:
        console.print()
    for status, why, group in lines:
        names = distinct_checks(group)
        which = f" ({', '.join(names)})" if len(names) <= 3 else ""
        style = "yellow" if status == "xfailed" else "dim"
        _print_fact(console, f"{len(group)} {status}", f"{why}{which}", style=style)
    console.print()
    _print(console, count_line(kept), style=_count_style(kept))


def _print_rows(console: Console, results: Sequence[Result]) -> None:
    from rich.box import Box
    from rich.table import Table

    table = rows(results)
    if not table:
        return
    ports, backends = several_ran(results, "port"), several_ran(results, "backend")
    wide = _wide_enough(console, table, ports=ports, backends=backends)
    # One rule under the head, in ASCII: readable in any log.
    plain = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
    grid = Table(box=plain, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    if wide:
        for name in _where_columns(ports=ports, backends=backends):
            grid.add_column(name, overflow="fold", no_wrap=name == "check")
    else:
        grid.add_column("check", overflow="fold")
    grid.add_column("status", no_wrap=True, overflow="crop")
    grid.add_column("error", no_wrap=True, overflow="crop", justify="right")
    grid.add_column("seconds", no_wrap=True, overflow="crop", justify="right")
    for row in table:
        where = [_text(console, cell) for cell in _where(row, ports=ports, backends=backends)]
        if not wide:  # what ran goes under the name of the check
            port = f"{row.port}: " if ports else ""
            below = _text(console, f"\n{row.routes} {row.backends} {row.dtypes}", style="dim")
            where = [_text(console, f"{port}{row.check}").append_text(below)]
        status = _text(console, row.status, style=_STYLES[row.status])
        error = _text(console, row.number if wide else row.number.replace(" ", "\n"))
        grid.add_row(*where, status, error, f"{row.seconds:.2f}")
    console.print()
    console.print(grid)


def _where_columns(*, ports: bool, backends: bool) -> list[str]:
    return [*(["port"] if ports else []), "check", "route", *(["backend"] if backends else []), "dtype"]


def _where(row: Row, *, ports: bool, backends: bool) -> list[str]:
    front = [row.port] if ports else []
    return [*front, row.check, row.routes, *([row.backends] if backends else []), row.dtypes]


def _wide_enough(console: Console, table: Sequence[Row], *, ports: bool, backends: bool) -> bool:
    """Whether every column fits beside the others without breaking a word."""
    lines = [_where_columns(ports=ports, backends=backends)]
    lines += [_where(row, ports=ports, backends=backends) for row in table]
    words = [max(len(word) for cell in cells for word in cell.split() or [""]) for cells in zip(*lines, strict=True)]
    number = max(len("error"), *(len(row.number) for row in table))
    return sum(words) + 2 * len(words) + len("xfailed") + 2 + number + 2 + len("seconds") <= console.width


def _print_failure(console: Console, groups: Sequence[Sequence[Result]], *, several_ports: bool) -> None:
    """One reason, once; then who failed for it, with configuration, numbers and replay of each."""
    first = groups[0][0]
    port = f"{one_line(first.port)}: " if several_ports else ""
    console.print()
    _print(console, f"{first.status}: {port}{reason(first)}", style=_STYLES[first.status])
    for group in groups:
        _print_fact(console, "in", " ".join(who(group)))
        for label, text in facts(group[0]):
            _print_fact(console, label, text)
        bundles = [result.bundle for result in group if result.bundle]
        for bundle in bundles[:_MOST_REPLAYS]:
            line = f"  {'replay':<{_LABEL_WIDTH}}{replay_command(bundle)}"
            # Left for the terminal to wrap, so that the command can be copied.
            console.print(_text(console, line), soft_wrap=True)
        if len(bundles) > _MOST_REPLAYS:
            _print_fact(console, "", f"and {len(bundles) - _MOST_REPLAYS} more bundles beside it")


def _print_fact(console: Console, label: str, text: str, *, style: str = "") -> None:
    from rich.table import Table

    grid = Table.grid()
    grid.add_column(width=_LABEL_WIDTH + 2, no_wrap=True, overflow="crop")
    grid.add_column(overflow="fold")
    grid.add_row(_text(console, f"  {label}", style=style), _text(console, text, style=style))
    console.print(grid)


def _print(console: Console, text: str, *, style: str) -> None:
    console.print(_text(console, text, style=style), overflow="fold")


def _text(console: Console, text: str, *, style: str = "") -> Text:
    """Text that rich takes as it is: no markup, no emoji codes, nothing the stream cannot encode."""
    from rich.text import Text

    return Text(_encodable(text, console), style=style)


def _encodable(text: str, console: Console) -> str:
    return text.encode(console.encoding, "backslashreplace").decode(console.encoding)


def _count_style(results: Sequence[Result]) -> str:
    bad = any(result.status in BAD for result in results)
    return "bold red" if bad else "bold green" if results else "bold"
