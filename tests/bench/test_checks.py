# SPDX-License-Identifier: Apache-2.0
"""Seconds per case of each check, and of starting the fresh processes that some of them need."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from harness.cases import Case
from harness.checks import CATALOGUE, Check, function_of

if TYPE_CHECKING:
    from harness.runner import Item, Session
    from harness.trial import Trial

FIELDS = {"block_size": 12, "vocab_size": 37, "n_layer": 2, "n_head": 2, "n_embd": 8, "dropout": 0.0, "bias": True}
CASE = Case(fields=FIELDS, rows=2, tokens=9, seed=1)


@pytest.mark.benchmark(group="check, one case")
@pytest.mark.parametrize("check", CATALOGUE, ids=lambda check: check.id)
def test_case(benchmark: Any, check: Check, planned: list[Item], shared: Session) -> None:
    from harness.backends.pytorch import numeric_settings
    from harness.errors import Skip
    from harness.runner import quiet, trial_of

    asked = [item for item in planned if item.check == check]
    if not asked:
        pytest.skip("not asked of this family on the CPU")
    if missing := [need for need in check.needs if need not in asked[0].family.features]:
        pytest.skip(f"the family has no {missing[0]}")
    function = function_of(check)
    benchmark.extra_info["what"] = check.id
    rounds = 3 if check.examples > 1 else 1  # What is asked once is what takes seconds.

    def once() -> tuple[tuple[Trial, Case], dict[str, Any]]:
        return (trial_of(asked[0], shared, shared.root), CASE), {}

    with quiet(), numeric_settings():
        try:
            shared.sandbox.warm_up()
            function(*once()[0])  # The first case of a run also pays for imports.
            benchmark.pedantic(function, setup=once, rounds=rounds)
        except Skip as skip:
            pytest.skip(str(skip))


@pytest.mark.benchmark(group="fresh process")
@pytest.mark.parametrize("way", ["cold", "warm"])
def test_fresh_process(benchmark: Any, way: str, planned: list[Item], shared: Session) -> None:
    """Loading and running a saved model where its code was never imported, in a new interpreter or a forked child."""
    from harness.routes import pretrained, remote_code
    from harness.runner import quiet, trial_of
    from harness.trial import draw, original_model

    cold = way == "cold"
    trial = trial_of(planned[0], shared, shared.root)
    with quiet():
        saved = pretrained.save(trial, CASE, original_model(trial, CASE))
        tokens = {"input_ids": draw(trial, CASE).tokens}
        shared.sandbox.warm_up()
        benchmark.extra_info["what"] = f"a case in a fresh process, {way}"
        benchmark.pedantic(
            lambda: remote_code.load(trial, saved, tokens, cold=cold),
            rounds=3 if cold else 20,
            warmup_rounds=1,
        )


@pytest.mark.benchmark(group="fresh process")
def test_server_start(benchmark: Any, tmp_path: Path) -> None:
    """What the first case in a fresh process waits for: the server imports torch and transformers once."""
    from harness.sandbox import Sandbox

    def start() -> None:
        with Sandbox(tmp_path) as sandbox:
            sandbox.warm_up()

    benchmark.extra_info["what"] = "starting the server of fresh processes, once in a run"
    benchmark.pedantic(start, rounds=3)
