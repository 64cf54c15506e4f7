# SPDX-License-Identifier: Apache-2.0
"""The results as GitHub Markdown, for a job summary or a comment on a pull request."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from harness.report.summary import (
    Header,
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

LARGEST = 900_000  # bytes; GitHub refuses a job summary above 1 MiB
_LONGEST_CELL = 1_000


def render(results: Iterable[Result], *, header: Header) -> str:
    """The document: count, failures, what ran, what was skipped. Cut where GitHub would refuse it."""
    kept = list(results)
    lines = [f"**{_text(count_line(kept))}**", "", _text(header_line(header))]
    lines += _failures(kept)
    lines += _table(kept)
    lines += _excused(kept)
    return _fit(lines)


def _failures(results: Sequence[Result]) -> list[str]:
    lines: list[list[str]] = []
    several = several_ran(results, "port")
    for group in (group for groups in failures(results) for group in groups):
        first, shown = group[0], dict(facts(group[0]))
        replay = [replay_command(first.bundle)] if first.bundle else []
        names = who(group)
        more = [f"and {len(names) - 8} more"] if len(names) > 9 else []
        lines.append(
            [
                *([_text(first.port)] if several else []),
                "<br>".join([_code(name) for name in (names[:8] if more else names)] + more),
                _text(f"{first.status}: {reason(first)}"),
                *(_code(shown.get(label, "")) for label in ("config", "numbers", "first at")),
                *(_code(command) for command in replay or [""]),
            ]
        )
    columns = ["check", "reason", "configuration", "numbers", "first at", "replay"]
    return _section("Failures", (["port"] if several else []) + columns, lines)


def _table(results: Sequence[Result]) -> list[str]:
    table = rows(results)
    ports, backends = several_ran(results, "port"), several_ran(results, "backend")
    lines = [
        [
            *([_text(row.port)] if ports else []),
            _code(row.check),
            _text(row.routes),
            *([_text(row.backends)] if backends else []),
            _text(row.dtypes),
            f"**{row.status}**" if row.status in BAD else row.status,
            _text(row.number),
            f"{row.seconds:.2f}",
        ]
        for row in table
    ]
    optional = (["port"] if ports else [], ["backend"] if backends else [])
    columns = [*optional[0], "check", "route", *optional[1], "dtype", "status", "error", "seconds"]
    return _section("Checks", columns, lines)


def _excused(results: Sequence[Result]) -> list[str]:
    lines = [
        [str(len(group)), status, _text(why), _code(" ".join(distinct_checks(group)))]
        for status, why, group in excused(results)
    ]
    return _section("Skipped and expected to fail", ["count", "status", "reason", "checks"], lines)


def _section(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    if not lines:
        return []
    rule = ["---"] * len(columns)
    return ["", f"### {title}", "", *(f"| {' | '.join(cells)} |" for cells in (columns, rule, *lines))]


def _text(text: str) -> str:
    """Text that Markdown and HTML leave alone, in one line; a bar must not end a table's cell."""
    escaped = _short(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", escaped)


def _code(text: str) -> str:
    """Text as code. A code span needs no escapes but for the bar, and cannot hold a backtick."""
    short = _short(text)
    if not short:
        return ""
    return f"<code>{_text(short)}</code>" if "`" in short else "`" + short.replace("|", r"\|") + "`"


def _short(text: str) -> str:
    line = one_line(text)
    return line if len(line) <= _LONGEST_CELL else line[:_LONGEST_CELL] + "..."


def _fit(lines: Sequence[str]) -> str:
    """The lines as text; what comes after LARGEST bytes is left out, and the last line says so."""
    size = 0
    for position, line in enumerate(lines):
        size += len(line.encode()) + 1
        if size > LARGEST:
            note = f"Cut here, {len(lines) - position} more lines: report.json has everything."
            return "\n".join([*lines[:position], "", note, ""])
    return "\n".join([*lines, ""])
