# SPDX-License-Identifier: Apache-2.0
"""Where a difference begins, and why: what a red gate tells its author to look at."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable

import torch

from harness.backends import NO_FLOAT64
from harness.capture import capture_both
from harness.cases import Case
from harness.checks import Check
from harness.families import longest_of, taps_of, with_dropout
from harness.localise.finding import Divergence, Search
from harness.numerics import SEMANTICS_BOUND
from harness.routes import main_route
from harness.trial import Pair, Trial, copied, draw, each_attention, port_logits, prepare, run_original

__all__ = ["Compared", "Divergence", "compare_taps", "locate"]

SECONDS = 3.0
"""How long one failure may be looked into."""

ROOMY_ROWS, ROOMY_TOKENS = 2, 6
"""A batch of which a relation cannot hold by chance."""

OF_ATTENTION = ("backend.", "api.attentions", "masks.")
"""Checks that run every attention implementation of a port."""

WITH_DROPOUT = ("forward.deterministic",)
"""Checks that look at a model with dropout in its configuration."""

Compared = list[tuple[str, torch.Tensor, torch.Tensor]]


def compare_taps(trial: Trial, case: Case, pair: Pair) -> Compared:
    """(tap, port's output, original's output) at every tap both models have, in the order data passes them."""
    tokens, targets = pair.batch.tokens, pair.batch.targets
    ours, theirs = capture_both(
        taps_of(trial.family, case.fields),
        (pair.original, lambda: run_original(trial, pair.original, tokens, targets)),
        (pair.port, lambda: port_logits(trial, pair.port, tokens)),
    )
    return [(name, ours[name].cpu(), expected.cpu()) for name, expected in theirs.items() if name in ours]


def locate(trial: Trial, case: Case, check: Check, *, seconds: float = SECONDS) -> Divergence | None:
    """The place a failure comes from, with a sentence about it; None where nothing fits.

    The weights are looked at first, then the modules, then the mask or the cache where the check is about them; all in
    float64, on the port's own route, in this process. What is said was seen to hold. After `seconds` nothing more is
    tried, so that 0 gives the first module that differs, and no cause. Never raises.
    """
    backend = "torch-cpu" if trial.backend in NO_FLOAT64 else trial.backend
    here = dataclasses.replace(trial, route=main_route(trial.port), backend=backend, dtype="float64")
    until = time.monotonic() + seconds
    return _contained(lambda: _look(here, case, check, trial.dtype, until))


def _roomy(trial: Trial, case: Case, check: Check) -> Case:
    """The same weights with a batch that leaves less to chance, and dropout where the check has it."""
    longest = longest_of(trial.family, case.fields) if trial.family.maximum_length in case.fields else case.tokens
    tokens = max(case.tokens, min(longest, ROOMY_TOKENS))
    fields = with_dropout(trial.family, case.fields, 0.5) if check.id in WITH_DROPOUT else case.fields
    return dataclasses.replace(case, fields=fields, rows=max(case.rows, ROOMY_ROWS), tokens=tokens)


def _look(trial: Trial, case: Case, check: Check, dtype: str, until: float) -> Divergence | None:
    roomy = _roomy(trial, case, check)
    pair = prepare(trial, roomy)
    found = _look_at(trial, roomy, pair, check, dtype, until)
    if found is not None or roomy == case:
        return found
    # A fault may show with this very batch alone.
    return _look_at(trial, case, dataclasses.replace(pair, batch=draw(trial, case)), check, dtype, until)


def _look_at(trial: Trial, case: Case, pair: Pair, check: Check, dtype: str, until: float) -> Divergence | None:
    from harness.localise import cache, forward, gradients, masks, ways, weights
    from harness.localise.alignment import compare

    search = Search(trial=trial, case=case, pair=pair, check=check.id, dtype=dtype, until=until, bound=SEMANTICS_BOUND)

    def side_by_side(search: Search, *looks: Callable[..., Divergence | None]) -> Divergence | None:
        comparison = compare(trial, search.pair, case.fields, pair.batch.tokens)
        return next(filter(None, (_contained(functools.partial(look, search, comparison)) for look in looks)), None)

    def in_eager() -> Divergence | None:
        if not check.id.startswith(OF_ATTENTION):
            return None
        for attention in each_attention(port := copied(pair.port)):
            eager = dataclasses.replace(search, pair=dataclasses.replace(pair, port=port))
            found = side_by_side(eager, forward.find) if attention == "eager" else None
            if found is not None:
                return dataclasses.replace(found, sentence=f"with eager attention, {found.sentence}")
        return None

    looks: list[Callable[[], Divergence | None]] = [
        lambda: side_by_side(search, weights.find, forward.find),
        in_eager,
        lambda: ways.find(search),
        lambda: gradients.find(search),
        lambda: masks.find(search),
        lambda: cache.find(search),
    ]
    return next(filter(None, map(_contained, looks)), None)


def _contained(look: Callable[[], Divergence | None]) -> Divergence | None:
    try:
        return look()
    except KeyboardInterrupt:
        raise
    except BaseException:  # the failure is reported already; where it begins is a courtesy
        return None
