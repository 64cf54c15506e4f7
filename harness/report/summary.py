# SPDX-License-Identifier: Apache-2.0
"""What every report says about results, whatever it is written in: groups, counts, numbers, harmless text."""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from harness.results import BAD, Result, checks_run

K = TypeVar("K", bound=Hashable)

# Characters that steer a terminal, reorder a line, or may not occur in XML; newline and tab are kept.
_STEERING = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]",
)
_PLAIN_WORD = re.compile(r"[\w.+-]+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """What a run was: `versions` by package name, `seed` None where cases were drawn at random.

    settings: what changes numbers besides versions, by name, as it was while checks ran.
    """

    profile: str
    seed: int | None = None
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table: every variant of one check of one port that ended the same way."""

    port: str
    check: str
    routes: str
    backends: str
    dtypes: str
    status: str
    number: str
    seconds: float


def rows(results: Iterable[Result]) -> list[Row]:
    """The table: what ran, failures first, else in the order of the results."""
    groups = grouped(
        (result for result in results if result.status != "skipped"),
        lambda result: (result.port, result.check, result.status),
    )
    table = [
        Row(
            port=one_line(port),
            check=one_line(check),
            routes=_words(result.route for result in group),
            backends=_words(result.backend for result in group),
            dtypes=_words(result.dtype for result in group),
            status=status,
            number=telling_number(group),
            seconds=math.fsum(result.seconds for result in group),
        )
        for (port, check, status), group in groups.items()
    ]
    return sorted(table, key=lambda row: row.status not in BAD)


def failures(results: Iterable[Result]) -> list[list[list[Result]]]:
    """What went bad: by port, status and reason, and inside that by shrunk configuration and place."""
    reasons = grouped(
        (result for result in results if result.status in BAD),
        lambda result: (result.port, result.status, reason(result)),
    )
    return [
        list(grouped(group, lambda result: (compact_config(result.config), result.first_divergence)).values())
        for group in reasons.values()
    ]


def excused(results: Iterable[Result]) -> list[tuple[str, str, list[Result]]]:
    """Status, reason and results of what is known not to hold or was skipped, by reason; xfailed first."""
    groups = grouped(
        (result for result in results if result.status in ("xfailed", "skipped")),
        lambda result: (result.status, one_line(result.reason) or "no reason given"),
    )
    lines = [(status, why, group) for (status, why), group in groups.items()]
    return sorted(lines, key=lambda line: line[0] == "skipped")


def grouped(results: Iterable[Result], key: Callable[[Result], K]) -> dict[K, list[Result]]:
    """Results by key, keys in the order they first occur."""
    groups: dict[K, list[Result]] = {}
    for result in results:
        groups.setdefault(key(result), []).append(result)
    return groups


def several_ran(results: Iterable[Result], what: Literal["port", "backend"]) -> bool:
    """Whether more than one port or backend ran, so that a table needs a column for it."""
    return len({getattr(result, what) for result in results if result.status != "skipped"}) > 1


def count_line(results: Iterable[Result]) -> str:
    """The last line of every report: `72 checks run: 70 passed, 2 failed; 31 skipped`."""
    kept = list(results)
    counts = Counter(str(result.status) for result in kept)
    ran = checks_run(kept)
    kinds = [
        f"{counts[status]} {'errors' if status == 'error' and counts[status] > 1 else status}"
        for status in ("passed", "failed", "error", "xfailed", "xpassed")
        if counts[status]
    ]
    line = f"{ran} check{'' if ran == 1 else 's'} run"
    if kinds:
        line += ": " + ", ".join(kinds)
    return line + (f"; {counts['skipped']} skipped" if counts["skipped"] else "")


def header_line(header: Header) -> str:
    """Profile, seed and versions in one line."""
    seed = "cases drawn at random" if header.seed is None else f"seed {header.seed}"
    versions = [f"{name} {version}" for name, version in header.versions.items()]
    return one_line(", ".join([f"profile {header.profile}", seed, *versions]))


def variant(result: Result) -> str:
    """The id of a result: `forward.logits[direct-torch-cpu-float64]`, as pytest shows it after the port."""
    return one_line(f"{result.check}[{result.route}-{result.backend}-{result.dtype}]")


def who(group: Sequence[Result]) -> list[str]:
    """Names of what failed together: ids of the variants of one check, or the names of several checks."""
    if len({result.check for result in group}) == 1:
        return [variant(result) for result in group]
    return distinct_checks(group)


def distinct_checks(group: Iterable[Result]) -> list[str]:
    """Names of checks, each once, in order."""
    return list(dict.fromkeys(one_line(result.check) for result in group))


def reason(result: Result) -> str:
    """Why a result is what it is, harmless to print; newlines stay."""
    return clean(result.reason).strip()


def facts(result: Result) -> list[tuple[str, str]]:
    """What a failure shows besides its reason, as label and text; only what there is."""
    numbers = " ".join(f"{one_line(name)}={number(value)}" for name, value in result.metrics.items())
    found = [
        ("config", compact_config(result.config)),
        ("numbers", numbers),
        ("first at", one_line(result.first_divergence or "")),
    ]
    return [(label, text) for label, text in found if text]


def replay_command(bundle: str) -> str:
    """The shell command that replays a bundle."""
    return f"parity repro {shlex.quote(clean(bundle))}"


def compact_config(config: Mapping[str, Any] | None) -> str:
    """A configuration in one line: `n_layer=1 n_head=1`; empty when there is none."""
    return one_line(" ".join(f"{name}={_value(value)}" for name, value in (config or {}).items()))


def telling_number(results: Sequence[Result]) -> str:
    """The one number of a table row: the worst `error`, else the largest ratio, else the first metric."""
    metrics = [result.metrics for result in results]
    errors = [found["error"] for found in metrics if "error" in found]
    if errors:
        return scientific(max(errors, key=_badness))
    # Whole words only: "iterations" has a ratio in it too.
    ratios = [pair for found in metrics for pair in found.items() if "ratio" in re.split(r"[^a-z]+", pair[0])]
    first = next((name for found in metrics for name in found), None)
    pairs = ratios or [(first, found[first]) for found in metrics if first in found and first is not None]
    if not pairs:
        return ""
    name, worst = max(pairs, key=lambda pair: _badness(pair[1]))
    return f"{one_line(name)[:24]} {number(worst)}"


def scientific(value: float) -> str:
    """Two digits and an exponent: `3.1e-14`; an exact zero is `0`."""
    return "0" if value == 0 else f"{value:.1e}"


def number(value: float) -> str:
    """A metric as short as it can be read: counts as counts, the rest plain or scientific."""
    if math.isfinite(value) and abs(value) < 1e6 and value == int(value):
        return str(int(value))
    return f"{value:.3g}" if 0.01 <= abs(value) < 1e4 else scientific(value)


def clean(text: str) -> str:
    """Text that cannot steer a terminal or break XML: such characters become escapes but newline and tab."""
    return _STEERING.sub(lambda found: ascii(found[0])[1:-1], text.replace("\r\n", "\n"))


def one_line(text: str) -> str:
    """Clean text without line breaks."""
    return " ".join(clean(text).split())


def _badness(value: float) -> tuple[bool, float]:
    return math.isnan(value), abs(value)


def _words(words: Iterable[str]) -> str:
    return " ".join(dict.fromkeys(one_line(word) for word in words))


def _value(value: Any) -> str:
    if isinstance(value, str):
        return value if _PLAIN_WORD.fullmatch(value) else repr(value)
    return repr(value)
