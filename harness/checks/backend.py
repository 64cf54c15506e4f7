# SPDX-License-Identifier: Apache-2.0
"""Checks across implementations of one computation: attention kernels and compiled graphs agree with the plain one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from harness.backends import frameworks
from harness.cases import Case
from harness.checks.loss import at_least_two_tokens, port_labels
from harness.checks.masks import padded_batch
from harness.checks.training import port_gradients
from harness.errors import Mismatch, Skip
from harness.numerics import require_close
from harness.placement import misplaced
from harness.ports import first_line
from harness.trial import (
    Pair,
    Trial,
    call_port,
    each_attention,
    is_asked,
    port_logits,
    prepare,
    require_semantics,
    worst,
)

ATTENTION = ("sdpa",)
"""What is compared with eager attention; flash kernels need a GPU and half precision, where SDPA picks them."""


def attention(trial: Trial, case: Case) -> dict[str, float]:
    """Logits with SDPA equal those with eager attention.

    Would have caught: a scale that one of the two applies twice, causality that only one of them has.
    """
    pair = prepare(trial, case)
    return _for_each(trial, pair, "logits", lambda: port_logits(trial, pair.port, pair.batch.tokens))


def attention_masked(trial: Trial, case: Case) -> dict[str, float]:
    """Logits of padded rows with SDPA equal those with eager attention, at every real position.

    Would have caught: the mask that was inverted for SDPA alone, for eleven days, under a green test suite.
    """
    pair = prepare(trial, case)
    numbers = []
    for side in ("left", "right", "interior"):
        padded = padded_batch(trial, case, pair, side)
        mask = padded.mask.long()
        what = f"logits of {side}-padded rows"
        run = lambda: port_logits(trial, pair.port, padded.tokens, attention_mask=mask)[padded.mask]  # noqa: B023, E731
        numbers.append(_for_each(trial, pair, what, run))
    return worst(*numbers)


def attention_gradients(trial: Trial, case: Case) -> dict[str, float]:
    """Gradients with SDPA equal those with eager attention.

    Would have caught: an eager path that detaches, or upcasts only forward.
    """
    pair = prepare(trial, at_least_two_tokens(case))
    labels = port_labels(trial, pair.batch.tokens, pair.batch.targets)

    def gradients() -> torch.Tensor:
        return torch.cat([tensor.flatten() for tensor in port_gradients(trial, pair, labels).values()])

    return _for_each(trial, pair, "gradients", gradients)


def compiled(trial: Trial, case: Case) -> dict[str, float]:
    """torch.compile takes the port as one graph, or with padding as several, and they compute the same logits.

    A port of MLX is compiled by MLX. Experts have too little room for all. Would have caught: graph breaks on values of
    tensors, shapes or values burnt into the graph, a mask that compiling leaves out, buffers of experts that are
    compiled only and give what was dropped.
    """
    if trial.family.routing is not None:
        case = dataclasses.replace(case, fields=trial.family.routing.crowded(case.fields))
    pair = prepare(trial, dataclasses.replace(case, rows=2, tokens=max(case.tokens, 2)))
    batches = {"": pair.batch.tokens, " of the next batch": pair.batch.tokens.flip(0)}
    expected = {what: port_logits(trial, pair.port, tokens) for what, tokens in batches.items()}
    with frameworks.compiled(pair.port, whole=True) as graph:
        actual = {what: port_logits(trial, graph, tokens) for what, tokens in batches.items()}
    numbers = [require_semantics(trial, f"compiled logits{what}", actual[what], expected[what]) for what in batches]
    return worst(*numbers, _compiled_masked(trial, case, pair))


def placement(trial: Trial, case: Case) -> dict[str, float]:
    """Tensors that forward and its loss make are made where their inputs are, so that the port runs on any device.

    Asked on the CPU, where such a fault does not show. Would have caught: torch.arange(length) without a device.
    """
    pair = prepare(trial, at_least_two_tokens(case))
    tokens = pair.batch.tokens
    calls: dict[str, dict[str, Any]] = {"forward": {}}
    if is_asked(trial, "loss", "loss.value"):
        calls["forward with labels"] = {"labels": port_labels(trial, tokens, pair.batch.targets)}
    if is_asked(trial, "masks", "masks.none_is_ones"):
        calls["forward with a mask"] = {"attention_mask": torch.ones_like(tokens)}
    for attention in each_attention(pair.port):
        for what, options in calls.items():
            found = misplaced(lambda: call_port(trial, pair.port, tokens, **options))  # noqa: B023
            if found is not None:
                raise Mismatch(
                    f"{what} makes a tensor without saying on which device, which fails on a GPU: {found}"
                    f" (attention: {attention}); make it with device= of its inputs"
                )
    return {"calls": float(len(calls))}


def _compiled_masked(trial: Trial, case: Case, pair: Pair) -> dict[str, float]:
    if not is_asked(trial, "masks", "masks.left_padding"):
        return {}
    padded = padded_batch(trial, case, pair, "left")
    mask = padded.mask.long()
    expected = port_logits(trial, pair.port, padded.tokens, attention_mask=mask)[padded.mask]
    with frameworks.compiled(pair.port, whole=False) as traced:
        actual = port_logits(trial, traced, padded.tokens, attention_mask=mask)[padded.mask]
    return require_semantics(trial, "compiled logits of left-padded rows", actual, expected)


def _for_each(trial: Trial, pair: Pair, what: str, run: Callable[[], torch.Tensor]) -> dict[str, float]:
    model: Any = pair.port
    if not hasattr(model, "set_attn_implementation"):
        raise Skip("the port has one attention implementation (no set_attn_implementation)")
    model.set_attn_implementation("eager")
    expected = run()
    numbers = []
    for name in ATTENTION:
        try:
            model.set_attn_implementation(name)
        except ValueError as error:
            if getattr(model, f"_supports_{name}", None) is False:
                raise Skip(f"the port says that it has no attention '{name}'") from None
            raise Mismatch(f"the port does not take attention '{name}': {first_line(error)}") from None
        if trial.dtype == "float64":
            numbers.append(require_semantics(trial, f"{what} with {name} against eager", run(), expected))
        else:
            numbers.append({"error": require_close(f"{what} with {name} against eager", run(), expected, bound=1e-3)})
    return worst(*numbers)
