# SPDX-License-Identifier: Apache-2.0
"""Prints the README's tables from what `pytest tests/bench --benchmark-only --benchmark-json FILE` measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

CHECKS = "check, one case"
PLANTED = "planted bugs"
GROUPS = ("gate", "fresh process", "harness", "nanoGPT", "nanoMoE", "NeoBERT", "MLX BERT", "Hub", "Hub store")


def main(file: str) -> None:
    measured = json.loads(Path(file).read_text())["benchmarks"]
    print("\n".join([*overview(measured), "", *checks(measured), "", *planted(measured)]))


def overview(measured: Sequence[dict[str, Any]]) -> Iterator[str]:
    """One row for each benchmark that is not of a single check."""
    yield from row(["measured", "median", "beside"], heading=True)
    for group in GROUPS:
        for one in measured:
            if one["group"] == group:
                yield from row([one["extra_info"]["what"], seconds(one["stats"]["median"]), beside(one["extra_info"])])


def beside(extra: dict[str, Any]) -> str:
    """The numbers that a benchmark noted beside its time."""
    process = ""
    if "process_mib" in extra:
        process = f"{extra['process_mib']:.0f} MiB at most, {extra['process_over_file']:.2f} of the file"
    if "others" in extra:
        parts = [compared(one["ratio"], name, one["seconds"]) for name, one in extra["others"].items()]
        return "; ".join([f"{extra['sentences_per_second']:.3g} sentences a second", *parts])
    if "ratio" in extra:
        memory = f"; server {extra['server_mib']:.0f} MiB" if "server_mib" in extra else ""
        memory += f"; {process}" if process else ""
        memory += f"; {extra['encoded_per_second']:.0f} tokens a second" if "encoded_per_second" in extra else ""
        if "peak_mib" in extra:
            memory = f"; {extra['tokens_per_second']:.0f} tokens a second"
            memory += f"; {extra['peak_mib']:.0f} MiB against {extra['baseline_peak_mib']:.0f} MiB"
        if "baseline_process_mib" in extra:
            memory += f", against {extra['baseline_process_mib']:.0f} MiB"
        return compared(extra["ratio"], extra.get("baseline", "the original"), extra["original_seconds"]) + memory
    if "per_second" in extra:
        return f"{extra['per_second']:.0f} a second"
    if "harness_over_models" in extra:
        parts = ", ".join(f"{name} {seconds(extra[f'{name}_seconds'])}" for name in ("running", "building", "harness"))
        return f"{parts}: the harness takes {extra['harness_over_models']:.2f} of the models' time"
    if "kib_per_case" in extra:
        sizes = ", ".join(f"{extra[key]:.0f}" for key in extra if key.startswith("mib_after_"))
        return f"MiB after {', '.join(key[10:] for key in extra if key.startswith('mib_after_'))}: {sizes}"
    return process


def compared(ratio: float, name: str, other: float) -> str:
    """How the time of what was measured relates to the time of another."""
    times = f"{1 / ratio:.1f} times as fast as" if ratio < 0.5 else f"{ratio:.2f} of the time of"
    return f"{times} {name}, {seconds(other)}"


def checks(measured: Sequence[dict[str, Any]]) -> Iterator[str]:
    """One row for each group of checks."""
    own = [one for one in measured if one["group"] == CHECKS]
    times = {one["extra_info"]["what"]: one["stats"]["median"] for one in own}
    yield from row(["checks, one case each", "number", "together", "slowest"], heading=True)
    for group in dict.fromkeys(check.partition(".")[0] for check in times):
        mine = {check: value for check, value in times.items() if check.startswith(f"{group}.")}
        slowest = max(mine, key=mine.__getitem__)
        yield from row([group, str(len(mine)), seconds(sum(mine.values())), f"{slowest}, {seconds(mine[slowest])}"])


def planted(measured: Sequence[dict[str, Any]]) -> Iterator[str]:
    """One row for each way of looking for planted bugs."""
    yield from row(["planted bugs", "killed", "of the 14", "together", "killed per minute"], heading=True)
    for one in measured:
        for way in one["extra_info"]["planted_bugs"] if one["group"] == PLANTED else ():
            killed = [f"{way['killed']} of {way['planted']}", f"{way['killed_of_known']} of {way['known']}"]
            yield from row([way["what"], *killed, seconds(way["seconds"]), f"{way['killed_per_minute']:.1f}"])


def row(cells: Iterable[str], *, heading: bool = False) -> Iterator[str]:
    """A row of a Markdown table, with the rule below a heading."""
    cells = list(cells)
    yield f"| {' | '.join(cells)} |"
    if heading:
        yield "|" + "---|" * len(cells)


def seconds(value: float) -> str:
    """A duration with two or three digits."""
    return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/bench/table.py BENCHMARK.json")
    main(sys.argv[1])
