# SPDX-License-Identifier: Apache-2.0
"""Whether a port computes a part in float32 where float64 is asked of it, and how it is judged then."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from harness.backends import frameworks, pytorch
from harness.errors import Mismatch
from harness.routes import main_route
from harness.trial import Trial, each_attention, port_logits, prepare

if TYPE_CHECKING:
    from harness.cases import Case

WORTH_A_LOOK = 1e-3
"""An error in float64 that a part in float32 may explain."""


def judged_at(trial: Trial, case: Case, error: Mismatch) -> Trial | None:
    """How to judge a failure in float64 that a part in float32 explains; None for every other.

    A norm, a softmax or a loss that is computed in float32 leaves errors near 1e-7: then the wider bound counts. The
    lowest number of float64 is minus infinity there, so that masks end in NaN: then float32 is what can be judged.
    """
    size = error.metrics.get("error")
    if trial.dtype != "float64" or trial.float32_inside or size is None or not narrows(trial, case):
        return None
    if size == float("inf"):
        return dataclasses.replace(trial, dtype="float32")
    return dataclasses.replace(trial, float32_inside=True) if size <= WORTH_A_LOOK else None


def narrows(trial: Trial, case: Case) -> bool:
    """Whether a forward or backward pass, the port's or the original's, makes float32 out of float64.

    In any of the port's attentions, and in training, where a loss may have terms of its own.
    """
    from harness.checks.loss import at_least_two_tokens, original_targets, port_labels, training_loss

    here = dataclasses.replace(trial, route=main_route(trial.port))  # operations can be watched in this process alone
    try:
        pair = prepare(here, at_least_two_tokens(case))
        tokens = pair.batch.tokens
        for _ in each_attention(pair.port):
            if frameworks.float32_inside(pair.port, lambda: port_logits(here, pair.port, tokens)):
                return True
        if "loss" not in trial.family.features:
            return False
        labels = port_labels(here, tokens, pair.batch.targets)
        targets = original_targets(here, labels)
        pair.port.train()
        pair.original.train()

        def train() -> None:
            training_loss(here, pair.port, tokens, labels).backward()

        def train_original() -> None:
            trial.family.run_original(pair.original, tokens, targets)["loss"].backward()

        return bool(pytorch.float32_inside(train) or pytorch.float32_inside(train_original))
    except (Exception, SystemExit):  # a port that cannot run does not narrow
        return False
