# SPDX-License-Identifier: Apache-2.0
"""Keeps benchmarks out of a plain run of the tests, and gives them what they share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from harness.runner import Item, Session

ROOT = Path(__file__).parents[2]
PORT = "nanogpt"

Against = Callable[..., None]
AgainstEach = Callable[..., dict[str, dict[str, float]]]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips the benchmarks unless they are asked for."""
    if config.getoption("benchmark_only", False) or config.getoption("benchmark_enable", False):
        return
    unasked = pytest.mark.skip(reason="a benchmark: give --benchmark-only (and no -n) to run it")
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(unasked)


@pytest.fixture
def repository() -> Path:
    """Where the reference ports are described."""
    return ROOT


@pytest.fixture(scope="session")
def planned() -> list[Item]:
    """The gate of one family on the CPU, item by item."""
    from harness.ports import read_ports, select_ports
    from harness.runner import Options, plan

    ports = select_ports(read_ports(ROOT), [PORT], directory=ROOT)
    return plan(ports, Options(backends=["torch-cpu"]))


@pytest.fixture(scope="session")
def shared() -> Iterator[Session]:
    """One server of fresh processes for all benchmarks."""
    from harness.runner import session

    with session() as opened:
        yield opened


@pytest.fixture
def against_each(benchmark: Any) -> AgainstEach:
    """`against_each(run, {name: other}, rounds=N)`: benchmarks `run`, taking turns with all others; their ratios.

    Of each other, by its name, the "seconds", a median, and the "ratio" of `run` to it. The ratio is the median over
    the rounds, of two runs of one round, so that a change of the machine's load meets both.
    """

    def compare(
        run: Callable[[], Any], others: Mapping[str, Callable[[], Any]], *, rounds: int
    ) -> dict[str, dict[str, float]]:
        seconds: dict[str, list[float]] = {name: [] for name in others}

        def first() -> None:
            for name, other in others.items():
                started = time.perf_counter()
                other()
                seconds[name].append(time.perf_counter() - started)

        benchmark.pedantic(run, setup=first, rounds=rounds)
        ours = benchmark.stats.stats.data
        return {
            name: {
                "seconds": statistics.median(theirs),
                "ratio": statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True)),
            }
            for name, theirs in seconds.items()
        }

    return compare


@pytest.fixture
def against(benchmark: Any, against_each: AgainstEach) -> Against:
    """`against(run, baseline, rounds=N)`: benchmarks `run`, taking turns with `baseline`, and notes their ratio."""

    def compare(run: Callable[[], Any], baseline: Callable[[], Any], *, rounds: int, warmup: int = 1) -> None:
        for _ in range(warmup):
            baseline()
            run()
        (measured,) = against_each(run, {"original": baseline}, rounds=rounds).values()
        benchmark.extra_info.update(original_seconds=measured["seconds"], ratio=measured["ratio"])

    return compare


@pytest.fixture
def peak_mib() -> Callable[[int], float]:
    """`peak_mib(pid)`: the most MiB that a process has held so far."""

    def read(pid: int) -> float:
        (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) / 1024

    return read
