# SPDX-License-Identifier: Apache-2.0
"""Keeps benchmarks out of a plain run of the tests, and gives them what they share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from harness.runner import Item, Session

ROOT = Path(__file__).parents[2]
PORT = "nanogpt"

Against = Callable[..., None]


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
def against(benchmark: Any) -> Against:
    """`against(run, baseline, rounds=N)`: benchmarks `run`, taking turns with `baseline`, and notes their ratio.

    The ratio is the median over the rounds, of two runs next to each other, so that a change of the machine's load
    meets both.
    """

    def compare(run: Callable[[], Any], baseline: Callable[[], Any], *, rounds: int, warmup: int = 1) -> None:
        for _ in range(warmup):
            baseline()
            run()
        seconds: list[float] = []

        def first() -> None:
            started = time.perf_counter()
            baseline()
            seconds.append(time.perf_counter() - started)

        benchmark.pedantic(run, setup=first, rounds=rounds)
        ratios = [ours / theirs for ours, theirs in zip(benchmark.stats.stats.data, seconds, strict=True)]
        benchmark.extra_info["original_seconds"] = statistics.median(seconds)
        benchmark.extra_info["ratio"] = statistics.median(ratios)

    return compare
