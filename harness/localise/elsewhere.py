# SPDX-License-Identifier: Apache-2.0
"""What a factor is in terms of head size and width: a name holds at other sizes too, a coincidence does not."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping

from harness.localise import operations
from harness.localise.alignment import Comparison, Spot, compare
from harness.localise.finding import Search, explains
from harness.localise.relations import factor_between, number
from harness.trial import field_known_by, prepare

HEADS, HEAD_SIZE = 3, 5

OF_SIZES: Mapping[str, Callable[[int, int], float]] = {
    "the root of the head size": lambda size, width: size**0.5,
    "one over the root of the head size": lambda size, width: size**-0.5,
    "the head size": lambda size, width: float(size),
    "one over the head size": lambda size, width: 1 / size,
    "the root of the head size over that of the width": lambda size, width: (size / width) ** 0.5,
    "the root of the head size over the width": lambda size, width: size**0.5 / width,
}
"""What a factor on attention scores may be, from head size and width."""

OF_WIDTH: Mapping[str, Callable[[int], float]] = {
    "the root of the width": lambda width: width**0.5,
    "one over the root of the width": lambda width: width**-0.5,
    "the width": float,
    "one over the width": lambda width: 1 / width,
}
"""What a factor on a hidden state or on logits may be."""


def named_by_sizes(search: Search, spot: Spot, factor: float, head_size: int | None, width: int | None) -> str:
    """What a factor on attention scores is, for the end of a sentence; nothing unless one name alone fits."""
    from harness.localise.inside import run_module

    if head_size is None or width is None:
        return ""
    here = [name for name, value in OF_SIZES.items() if math.isclose(factor, value(head_size, width), rel_tol=1e-6)]
    there = elsewhere(search) if here else None
    if there is None:
        return ""
    other, comparison = there
    twin = _twin(comparison, spot)
    if twin is None or twin.original is None:
        return ""
    fits = functools.partial(explains, actual=twin.output[0], error=twin.error_out, bound=search.bound)
    wide = HEADS * HEAD_SIZE
    holding = [
        name
        for name in here
        if fits(run_module(other, twin, operations.scores_scaled(OF_SIZES[name](HEAD_SIZE, wide)), {}))
    ]
    return f", which is {holding[0]}" if len(holding) == 1 else ""


def named_by_width(search: Search, comparison: Comparison, spot: Spot, factor: float) -> str:
    """What a factor on the logits is, for the end of a sentence."""
    return name_of_factor(
        search,
        spot,
        factor,
        width=width_of(comparison),
        factor_of=lambda twin, _: factor_between(*twin.output),
    )


def name_of_factor(
    search: Search,
    spot: Spot,
    factor: float,
    *,
    width: int,
    factor_of: Callable[[Spot, Comparison], float | None],
) -> str:
    """What a factor is in terms of the width; `factor_of` gives the same factor at other sizes."""
    here = [name for name, value in OF_WIDTH.items() if math.isclose(factor, value(width), rel_tol=1e-6)]
    there = elsewhere(search) if here and width > 1 else None
    twin = _twin(there[1], spot) if there is not None else None
    if there is None or twin is None:
        return ""
    other = factor_of(twin, there[1])
    wide = HEADS * HEAD_SIZE
    holding = [name for name in here if other is not None and math.isclose(other, OF_WIDTH[name](wide), rel_tol=1e-6)]
    return f" ({number(factor)} is {holding[0]}, {width})" if len(holding) == 1 else ""


def width_of(comparison: Comparison) -> int:
    """The number of channels that the original's last module was given; 1 where that cannot be told."""
    given = [call.inputs[0].shape[-1] for call in comparison.original if call.inputs]
    return int(given[-1]) if given else 1


def elsewhere(search: Search) -> tuple[Search, Comparison] | None:
    """The same port with three heads of size five; None where the configuration has no such fields, or time is out."""
    trial, fields = search.trial, dict(search.case.fields)
    heads, wide = (field_known_by(trial, fields, name) for name in ("num_attention_heads", "hidden_size"))
    if heads is None or wide is None or time.monotonic() > search.until:
        return None
    case = dataclasses.replace(search.case, fields={**fields, heads: HEADS, wide: HEADS * HEAD_SIZE})
    pair = prepare(trial, case)
    attention = getattr(getattr(search.pair.port, "config", None), "_attn_implementation", None)
    if attention is not None and hasattr(pair.port, "set_attn_implementation"):
        pair.port.set_attn_implementation(attention)  # type: ignore[operator]
    other = dataclasses.replace(search, case=case, pair=pair)
    return other, compare(trial, pair, case.fields, pair.batch.tokens)


def _twin(comparison: Comparison, spot: Spot) -> Spot | None:
    return next((other for other in comparison.spots if other.name == spot.name), None)
