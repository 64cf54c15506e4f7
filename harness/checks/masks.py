# SPDX-License-Identifier: Apache-2.0
"""Checks of the attention mask: padding is not there, wherever it stands and whatever it holds."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from harness.cases import Case
from harness.cases.batches import Padded, Side, pad
from harness.errors import Mismatch, Skip
from harness.families import has_relative_positions, longest_of, padding_of
from harness.numerics import FLOAT32_INSIDE_BOUND, relative_error
from harness.ports import first_line
from harness.trial import (
    Pair,
    Trial,
    each_attention,
    is_asked,
    original_model,
    port_logits,
    prepare,
    require_semantics,
    run_original,
    takes,
    worst,
)


def none_is_ones(trial: Trial, case: Case) -> dict[str, float]:
    """No mask, ones of integers and ones of booleans are the same mask.

    Would have caught: a boolean mask read as additive, an integer mask added to the scores.
    """
    pair = prepare(trial, case)
    tokens = pair.batch.tokens
    expected = port_logits(trial, pair.port, tokens)
    ones = torch.ones_like(tokens)
    numbers = [
        require_semantics(
            trial,
            f"logits with a mask of {name} ones",
            port_logits(trial, pair.port, tokens, attention_mask=mask),
            expected,
        )
        for name, mask in (("int64", ones), ("bool", ones.bool()))
    ]
    return worst(*numbers)


def additive(trial: Trial, case: Case) -> dict[str, float]:
    """A mask that is added to the scores is used as it is: zeros where attention may go.

    It has four axes, or two where the family says so. For a causal model the mask carries causality, as transformers
    has it. A number added to all the scores of a query changes nothing, whichever it is. Would have caught: an additive
    mask read as boolean, one cut to two values, a mask that is inverted for one attention implementation.
    """
    if trial.family.mask_axes == 2:
        return _additive_of_two_axes(trial, case)
    pair = prepare(trial, case)
    tokens = pair.batch.tokens
    rows, count = tokens.shape
    dtype = next(pair.port.parameters()).dtype
    mask = torch.zeros(rows, 1, count, count, dtype=dtype)
    if "causal" in trial.family.features:
        mask = mask.masked_fill(torch.ones(count, count, dtype=torch.bool).triu(1), torch.finfo(dtype).min)
    expected = port_logits(trial, pair.port, tokens)
    generator = torch.Generator().manual_seed(case.seed + 4)
    constants = torch.randn(rows, 1, count, 1, generator=generator).to(dtype)
    numbers = []
    for attention in each_attention(pair.port):
        masks = {"zeros": mask, "a constant for each query": mask + constants}
        if "causal" in trial.family.features:  # there is always one position to look at
            masks["minus infinity"] = mask.masked_fill(mask < 0, float("-inf"))
        for what, given in masks.items():
            try:
                actual = port_logits(trial, pair.port, tokens, attention_mask=given)
            except (TypeError, ValueError, IndexError, RuntimeError) as error:
                raise Mismatch(f"does not take an additive mask of four axes: {first_line(error)}") from None
            what = f"logits with an additive mask of {what} (attention: {attention})"
            numbers.append(require_semantics(trial, what, actual, expected))
    return worst(*numbers)


def _additive_of_two_axes(trial: Trial, case: Case) -> dict[str, float]:
    pair = prepare(trial, dataclasses.replace(case, tokens=max(case.tokens, 2)))
    dtype = next(pair.port.parameters()).dtype
    plain = port_logits(trial, pair.port, pair.batch.tokens)
    zeros = torch.zeros(pair.batch.tokens.shape, dtype=dtype)
    numbers = []
    for attention in each_attention(pair.port):
        named = f"(attention: {attention})"
        actual = port_logits(trial, pair.port, pair.batch.tokens, attention_mask=zeros)
        numbers.append(require_semantics(trial, f"logits with an additive mask of zeros {named}", actual, plain))
        for side in _SIDES:
            padded = padded_batch(trial, case, pair, side)
            if bool(padded.mask.all()):
                continue
            expected = port_logits(trial, pair.port, padded.tokens, attention_mask=padded.mask)[padded.mask]
            for value in (float("-inf"), torch.finfo(dtype).min, -1e4):
                mask = torch.zeros(padded.mask.shape, dtype=dtype).masked_fill(~padded.mask, value)
                actual = port_logits(trial, pair.port, padded.tokens, attention_mask=mask)[padded.mask]
                what = f"logits with an additive mask of 0 and {value:.3g}, {side} padding {named}"
                numbers.append(require_semantics(trial, what, actual, expected))
    return worst(*numbers)


def original(trial: Trial, case: Case) -> dict[str, float]:
    """With a mask that leaves tokens out anywhere, real tokens get the logits that the original gives them with it.

    Unlike the checks of padding this one leaves the original's own way to find padding and positions to it. Would have
    caught: positions counted by the mask where the original counts token ids, a mask that takes the place of another
    key, scores multiplied by the mask.
    """
    masked = trial.family.run_masked
    if masked is None:
        raise Skip(f"the original of family '{trial.family.name}' takes no mask")
    pair = prepare(trial, dataclasses.replace(case, rows=3))
    tokens = pair.batch.tokens
    generator = torch.Generator().manual_seed(case.seed + 5)
    mask = torch.rand(tokens.shape, generator=generator) < 0.6
    mask[torch.arange(3), torch.randint(tokens.shape[1], (3,), generator=generator)] = True
    with torch.no_grad():
        expected = masked(pair.original, tokens, mask)["logits"][mask]
        baseline = lambda: masked(original_model(trial, case, dtype=trial.dtype), tokens, mask)["logits"][mask]  # noqa: E731
    numbers = []
    for attention in each_attention(pair.port):
        for given in (mask, mask.long()):
            actual = port_logits(trial, pair.port, tokens, attention_mask=given)[mask]
            kind = str(given.dtype).removeprefix("torch.")
            what = f"logits with a {kind} mask with holes, against the original's (attention: {attention})"
            numbers.append(require_semantics(trial, what, actual, expected, baseline=baseline))
    return worst(*numbers)


def packed(trial: Trial, case: Case) -> dict[str, float]:
    """Texts behind each other in one row, each with positions from zero, get the logits that they get alone.

    A port may read position_ids as places in the table and nothing else: then texts see what came before them, with
    every attention. Would have caught: texts that are kept apart by one attention implementation only, or whose mask
    is a position off.
    """
    pair = prepare(trial, dataclasses.replace(case, rows=1, tokens=max(case.tokens, 4)))
    if not takes(pair.port, "position_ids"):
        raise Skip("forward takes no position_ids")
    tokens = pair.batch.tokens
    count = tokens.shape[1]
    first = 2 + case.seed % (count - 3)
    ids = torch.cat([torch.arange(first), torch.arange(count - first)])[None]
    options: dict[str, Any] = {"position_ids": ids}
    if takes(pair.port, "use_cache"):
        options["use_cache"] = False  # one cache is one text
    parts = [tokens[:, :first], tokens[:, first:]]
    expected = torch.cat(
        [run_original(trial, pair.original, part, torch.zeros_like(part))["logits"] for part in parts], dim=1
    )
    other = tokens.clone()
    other[:, 0] = (other[:, 0] + 1) % case.fields[trial.family.vocabulary]
    apart: dict[str, bool] = {}
    numbers = []
    for attention in each_attention(pair.port):
        actual, changed = (port_logits(trial, pair.port, each, **options) for each in (tokens, other))
        # Not the same bits: experts multiply in other groups when a token of the other text goes elsewhere.
        apart[attention] = relative_error(actual[:, first:], changed[:, first:]) < FLOAT32_INSIDE_BOUND
        if apart[attention]:
            what = f"logits of texts of {first} and {count - first} tokens in one row (attention: {attention})"
            numbers.append(require_semantics(trial, what, actual, expected))
    if not any(apart.values()):
        raise Skip("position_ids are places in the position table alone; texts in one row see those before them")
    if not all(apart.values()):
        yes, no = (next(name for name, value in apart.items() if value == wanted) for wanted in (True, False))
        raise Mismatch(f"texts with positions of their own in one row are kept apart with {yes} and not with {no}")
    return worst(*numbers)


def right_padding(trial: Trial, case: Case) -> dict[str, float]:
    """Rows padded on the right get the original's logits of the unpadded row.

    Would have caught: a mask that is accepted and ignored, and one that is inverted.
    """
    return _padding(trial, case, "right")


def left_padding(trial: Trial, case: Case) -> dict[str, float]:
    """Rows padded on the left get the original's logits of the unpadded row, positions taken from the mask.

    Would have caught: positions counted over padding (5.4 in the logits of an existing port).
    """
    return _padding(trial, case, "left")


def interior_padding(trial: Trial, case: Case) -> dict[str, float]:
    """Rows with padding between their tokens get the original's logits of the unpadded row.

    Where only distances of positions matter holes move tokens apart: then those of the same row with the mask.
    Would have caught: masks reduced to a length, or to the place of the first pad.
    """
    return _padding(trial, case, "interior")


def pad_content(trial: Trial, case: Case) -> dict[str, float]:
    """Which ids stand at padded positions does not matter to real ones.

    Would have caught: padding found by the pad id instead of the mask, masks scaled instead of cut off.
    """
    if padding_of(trial.family, case.fields) is not None:
        raise Skip("the original tells padding by its id too in this configuration")
    pair = prepare(trial, case)
    numbers = []
    for side in _SIDES:
        padded = padded_batch(trial, case, pair, side)
        other = torch.where(padded.mask, padded.tokens, (padded.tokens + 1) % case.fields[trial.family.vocabulary])
        first, second = (
            port_logits(trial, pair.port, tokens, attention_mask=padded.mask.long())[padded.mask]
            for tokens in (padded.tokens, other)
        )
        numbers.append(require_semantics(trial, f"logits with other ids at {side} pads", second, first))
    return worst(*numbers)


def all_masked_row(trial: Trial, case: Case) -> dict[str, float]:
    """A row that is masked as a whole stays finite and leaves the other rows alone.

    Would have caught: softmax over nothing (NaN), which then poisons the loss of the whole batch.
    """
    pair = prepare(trial, dataclasses.replace(case, rows=2))
    tokens = pair.batch.tokens
    mask = torch.ones_like(tokens)
    mask[1] = 0
    masks = [mask]
    if trial.family.mask_axes == 2 and is_asked(trial, "masks", "masks.additive"):
        dtype = next(pair.port.parameters()).dtype
        masks.append(torch.zeros(mask.shape, dtype=dtype).masked_fill(mask == 0, float("-inf")))
    numbers = []
    for attention in each_attention(pair.port):
        alone = port_logits(trial, pair.port, tokens[:1])
        for given in masks:
            logits = port_logits(trial, pair.port, tokens, attention_mask=given)
            if not bool(logits.isfinite().all()):
                raise Mismatch(
                    f"a row that is masked as a whole gives logits that are not finite (attention: {attention})",
                    metrics={"error": float("inf")},
                )
            what = "logits of a row beside one that is masked as a whole"
            numbers.append(require_semantics(trial, what, logits[:1], alone))
    return worst(*numbers)


_SIDES: tuple[Side, ...] = ("right", "left", "interior")


def padded_batch(trial: Trial, case: Case, pair: Pair, side: Side) -> Padded:
    """The pair's batch with padding on a side, no wider than the model's maximum."""
    maximum, vocabulary = longest_of(trial.family, case.fields), case.fields[trial.family.vocabulary]
    width = min(maximum, case.tokens + 1 + case.seed % 3)
    pad_id = padding_of(trial.family, case.fields)
    return pad(pair.batch.tokens, side=side, seed=case.seed, vocabulary=vocabulary, width=width, pad_id=pad_id)


def _padding(trial: Trial, case: Case, side: Side) -> dict[str, float]:
    pair = prepare(trial, case)
    padded = padded_batch(trial, case, pair, side)
    expected = rows_as_original(trial, case, pair.original, padded, side)
    numbers = []
    for mask in (padded.mask.long(), padded.mask, padded.mask.to(next(pair.port.parameters()).dtype)):
        kind = str(mask.dtype).removeprefix("torch.")
        try:
            actual = port_logits(trial, pair.port, padded.tokens, attention_mask=mask)[padded.mask]
        except (TypeError, ValueError):
            if mask.is_floating_point():  # ones and zeros of a dtype that may also be added to scores
                continue
            raise
        numbers.append(
            require_semantics(
                trial,
                f"logits of {side}-padded rows ({kind} mask) against the rows alone",
                actual,
                expected,
                baseline=lambda: rows_as_original(
                    trial, case, original_model(trial, case, dtype=trial.dtype), padded, side
                ),
            )
        )
    return worst(*numbers)


def rows_as_original(trial: Trial, case: Case, original: torch.nn.Module, padded: Padded, side: Side) -> torch.Tensor:
    """The original's logits (real tokens, vocabulary) of what padded rows hold."""
    masked, alone = trial.family.run_masked, trial.family.positions_by_mask or side == "right"
    if side == "interior" and has_relative_positions(trial.family, case.fields):
        alone = False
    if masked is None or alone:
        return unpadded_logits(trial, original, padded)
    with torch.no_grad():
        return masked(original, padded.tokens, padded.mask)["logits"][padded.mask]


def unpadded_logits(trial: Trial, original: torch.nn.Module, padded: Padded) -> torch.Tensor:
    """The original's logits (real tokens, vocabulary) of every row without its padding, in row order."""
    pieces = []
    for tokens, mask in zip(padded.tokens, padded.mask, strict=True):
        row = tokens[mask][None]
        pieces.append(run_original(trial, original, row, torch.zeros_like(row))["logits"][0])
    return torch.cat(pieces)
