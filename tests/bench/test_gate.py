# SPDX-License-Identifier: Apache-2.0
"""What a run costs: the whole gate, collection, the harness beside the models, and memory over many cases."""

from __future__ import annotations

import contextlib
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

if TYPE_CHECKING:
    from harness.runner import Item, Session

PORT = "nanogpt"
COLLECT = """
import sys, pytest
status = pytest.main(["-q", "-m", "parity", "--collect-only", "-p", "no:cacheprovider"])
heavy = sorted({"torch", "transformers", "mlx"} & set(sys.modules))
print("imported:", " ".join(heavy))
sys.exit(status)
"""
CASES = 2000
READINGS = (100, 500, 1000, 2000)


def run(command: list[str], directory: Path) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=directory, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.benchmark(group="gate")
@pytest.mark.parametrize("workers", [0, 2])
def test_gate(benchmark: Any, repository: Path, workers: int) -> None:
    """The gate of one family from a shell, imports included."""
    command = ["-m", "harness.cli", "check", "--port", PORT]
    what = "the gate, parity check"
    if workers:
        command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "parity", "--parity-port", PORT]
        command += ["-n", str(workers)]
        what = f"the gate, pytest -m parity -n {workers}"
    benchmark.extra_info["what"] = what
    benchmark.pedantic(run, args=(command, repository), rounds=1)


@pytest.mark.benchmark(group="gate")
def test_collection(benchmark: Any, repository: Path) -> None:
    """Listing the checks, which must not import a framework."""
    benchmark.extra_info["what"] = "collection, pytest -m parity --collect-only"
    output = benchmark.pedantic(run, args=(["-c", COLLECT], repository), rounds=5, warmup_rounds=1)
    assert output.splitlines()[-1].split() == ["imported:"]


class Account:
    """Wall-clock time by purpose: what is outermost counts, whatever it calls."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open = False

    def wrapped(self, function: Callable[..., Any], purpose: str) -> Callable[..., Any]:
        """`function`, whose time is counted."""

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self._open:
                return function(*args, **kwargs)
            self._open = True
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._open = False
                self.seconds[purpose] = self.seconds.get(purpose, 0.0) + time.perf_counter() - started

        return counted


@contextlib.contextmanager
def accounted(item: Item) -> Iterator[Account]:
    """Counts what original and port do: running, and being built, loaded and saved. The rest is the harness."""
    import torch
    from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel

    from harness.ports import load_object

    port = load_object(item.port.model, root=item.port.root)
    original = load_object(item.family.original, root=item.port.root)
    config = load_object(item.port.config, root=item.port.root)
    account = Account()
    purposes: dict[str, list[tuple[Any, str]]] = {
        "running": [
            (torch.nn.Module, "__call__"),
            (GenerationMixin, "generate"),
            (original, "generate"),
            (torch.Tensor, "backward"),
            (torch.autograd, "grad"),
            (torch.optim.AdamW, "step"),
        ],
        "building": [
            (port, "__init__"),
            (original, "__init__"),
            (config, "__init__"),
            (PretrainedConfig, "save_pretrained"),
            (PreTrainedModel, "save_pretrained"),
            (PreTrainedModel, "from_pretrained"),
            (port, "from_nanogpt_ckpt"),
            (port, "to_nanogpt_ckpt"),
            (torch.nn.Module, "load_state_dict"),
            (torch.nn.Module, "state_dict"),
            (torch.nn.Module, "to"),
            (torch, "save"),
            (torch, "load"),
        ],
    }
    with contextlib.ExitStack() as patches:
        for purpose, places in purposes.items():
            for owner, name in places:
                declared = vars(owner).get(name, getattr(owner, name))
                if isinstance(declared, classmethod):
                    counted: Any = classmethod(account.wrapped(declared.__func__, purpose))
                else:
                    counted = account.wrapped(declared, purpose)
                patches.enter_context(mock.patch.object(owner, name, counted))
        yield account


@pytest.mark.benchmark(group="harness")
def test_harness_share(benchmark: Any, planned: list[Item], shared: Session) -> None:
    """The harness's own time in all checks that stay in one process, beside the time inside the models."""
    from harness.runner import Options, run_item

    elsewhere = ("remote_code", "hub", "backend.compiled")  # Other processes, and the compiler.
    items = [item for item in planned if item.route not in elsewhere and not item.check.id.startswith(elsewhere)]
    options = Options()

    def everything() -> None:
        for item in items:
            result = run_item(item, options, shared)
            assert result.status == "passed", result

    everything()  # imports
    with accounted(items[0]) as account:
        benchmark.pedantic(everything, rounds=1)
    total = benchmark.stats.stats.median
    running, building = account.seconds["running"], account.seconds["building"]
    harness = total - running - building
    benchmark.extra_info.update(
        what=f"{len(items)} checks within one process",
        running_seconds=running,
        building_seconds=building,
        harness_seconds=harness,
        harness_over_models=harness / (running + building),
    )


@pytest.mark.benchmark(group="harness")
def test_memory(benchmark: Any, repository: Path) -> None:
    """Resident memory of one process over many cases, with as many items, each with draws of its own."""
    script = [str(Path(__file__).with_name("many_cases.py")), PORT, *map(str, READINGS)]
    output = benchmark.pedantic(run, args=(script, repository), rounds=1)
    readings = {int(cases): size for cases, size in json.loads(output).items()}
    growth = (readings[READINGS[-1]] - readings[READINGS[0]]) / (READINGS[-1] - READINGS[0])
    benchmark.extra_info.update(
        what=f"{CASES} cases of forward.logits in one process",
        **{f"mib_after_{cases}": round(size / 2**20, 1) for cases, size in readings.items()},
        kib_per_case=growth / 2**10,
    )
