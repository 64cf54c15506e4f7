# SPDX-License-Identifier: Apache-2.0
"""Where a difference begins: original and port run side by side, compared at the family's taps."""

from __future__ import annotations

import dataclasses

import torch

from harness.capture import capture
from harness.cases import Case
from harness.narrowing import narrows
from harness.numerics import FLOAT32_INSIDE_BOUND, SEMANTICS_BOUND, relative_error
from harness.routes import main_route
from harness.trial import Pair, Trial, port_logits, prepare, run_original

Compared = list[tuple[str, torch.Tensor, torch.Tensor]]


def compare_taps(trial: Trial, case: Case, pair: Pair) -> Compared:
    """(tap, port's output, original's output) at every tap both models have, in the order data passes them."""
    return _run_both(trial, case, pair)[:-1]


def _run_both(trial: Trial, case: Case, pair: Pair) -> Compared:
    """What `compare_taps` gives, and the logits after it."""
    taps = trial.family.taps(case.fields) if trial.family.taps is not None else []
    names = {name for name, _ in pair.port.named_modules()}
    present = [tap for tap in taps if tap.port in names]
    tokens, targets = pair.batch.tokens, pair.batch.targets
    places = {tap.name: tap.original for tap in present}
    expected, theirs = capture(pair.original, places, lambda: run_original(trial, pair.original, tokens, targets))
    places = {tap.name: tap.port for tap in present}
    logits, ours = capture(pair.port, places, lambda: port_logits(trial, pair.port, tokens), in_parts=True)
    pairs = [(tap.name, ours[tap.name].cpu(), theirs[tap.name].cpu()) for tap in present if tap.name in ours]
    return [*pairs, ("logits", logits.cpu(), expected["logits"].cpu())]


def first_divergence(trial: Trial, case: Case) -> str | None:
    """The first tap whose output differs, else `logits`, without padding; None when all agree or it cannot be told."""
    if trial.dtype != "float64":
        return None  # rounding differs everywhere; only in float64 does a difference have a first place
    here = dataclasses.replace(trial, route=main_route(trial.port))  # modules can be watched in this process alone
    try:
        found = _run_both(here, case, prepare(here, case))
    except KeyboardInterrupt:
        raise
    except BaseException:  # the failure is reported already; where it begins is a courtesy
        return None
    bound = FLOAT32_INSIDE_BOUND if narrows(here, case) else SEMANTICS_BOUND
    for tap, ours, theirs in found:
        if ours.shape != theirs.shape or not relative_error(ours, theirs) <= bound:
            return tap
    return None
