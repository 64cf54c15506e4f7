# SPDX-License-Identifier: Apache-2.0
"""The first module whose inputs agree and whose output does not, and the simple mistake that makes it so."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch.nn import functional

from harness.localise import operations, weights
from harness.localise.alignment import Comparison, Spot, first_difference, judged
from harness.localise.elsewhere import named_by_width
from harness.localise.finding import Divergence, Search, explains, while_there_is_time
from harness.localise.inside import of_cache, of_module, of_whole
from harness.localise.relations import factor_between, number, relation_of_outputs
from harness.localise.stream import of_embeddings, of_order, of_sum, of_turns, parts_of, taps_before, vectors_of
from harness.trial import port_logits

PLURAL = {"is ": "they are ", "has ": "they have ", "lacks ": "they lack ", "differs ": "they differ "}
"""How a sentence about an output begins when it is about logits."""

CAPS = (30.0, 50.0, 10.0, 20.0, 15.0, 5.0, 100.0)


def find(search: Search, comparison: Comparison) -> Divergence | None:
    """The first place that differs, with a sentence about it; None when all agree."""
    search = judged(search, comparison)
    spot = first_difference(search, comparison)
    if spot is None:
        return None
    said = None
    with contextlib.suppress(Exception):  # the place is known already; a cause is a courtesy
        said = next(while_there_is_time(_explanations(search, comparison, spot), search.until), None)
    actual, expected = spot.output
    errors = f"out {spot.error_out:.1e}"
    if actual.shape != expected.shape:
        errors = f"out of shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    if spot.error_in is not None:
        errors = f"in {spot.error_in:.1e}, {errors}"
    diverges = "diverge" if spot.name == "logits" else "diverges"
    place = spot.name
    if spot.original is not None and spot.port is not None and spot.port.path != spot.original.path:
        place += f" ({spot.port.path} in the port)"
    sentence = f"{place} {diverges} ({errors})" + (f": {said}" if said else "")
    return Divergence(module=spot.name, sentence=sentence, error_in=spot.error_in, error_out=spot.error_out)


def _explanations(search: Search, comparison: Comparison, spot: Spot) -> Iterator[str]:
    """Sentences that are true, the most telling first; each was seen to give what the port gives."""
    if _changes_from_call_to_call(search):
        yield "it gives something else at every call, as with dropout that is active in evaluation"
        return
    actual, expected = spot.output
    if bool(expected.isfinite().all()) and not bool(actual.isfinite().all()):
        yield f"{int((~actual.isfinite()).sum())} of {actual.numel()} values of its output are not finite"
        return
    agreed = spot.error_in is not None and spot.error_in <= search.bound
    if spot.name == "logits":
        yield from _of_logits(search, comparison, spot)
    elif agreed and not parts_of(comparison, spot):
        yield from of_cache(search, spot)
        yield from of_module(search, spot)
    elif agreed:
        yield from of_sum(search, comparison, spot)
        yield from of_module(search, spot)
    elif spot.given is not None:
        yield from of_order(search, comparison, spot, comparison.silent)
        yield from of_sum(search, comparison, spot)
        yield from of_order(search, comparison, spot, taps_before(search, spot))
    else:
        yield from of_order(search, comparison, spot, [*comparison.silent, spot.name])
        yield from of_module(search, spot)
        yield from of_sum(search, comparison, spot)
        yield from of_order(search, comparison, spot, taps_before(search, spot))
    if not agreed:
        yield from of_embeddings(search, spot)
        yield from _of_whatever_holds_it(search, comparison, spot)
        yield from of_turns(comparison)
    yield from weights.repairs(search, comparison)


def _of_whatever_holds_it(search: Search, comparison: Comparison, spot: Spot) -> Iterator[str]:
    """The same for the block that a place stands in, or the whole model, where the port has no module in between."""
    path = spot.original.path if spot.original is not None else ""
    for other in comparison.spots:
        holds_it = other.original is not None and path.startswith(other.original.path + ".")
        if holds_it and other.error_in is not None and other.error_in <= search.bound:
            yield from (f"in {other.name}, {said}" for said in of_module(search, other))
    last = comparison.spots[-1]
    if last is not spot and not last.error_out <= search.bound:
        yield from (f"in the whole model, {said}" for said in of_whole(search, last))


def _changes_from_call_to_call(search: Search) -> bool:
    tokens = search.pair.batch.tokens
    first, second = (port_logits(search.trial, search.pair.port, tokens) for _ in range(2))
    return not bool(torch.isclose(first, second, rtol=search.bound, atol=search.bound, equal_nan=True).all())


def _of_logits(search: Search, comparison: Comparison, spot: Spot) -> Iterator[str]:
    actual, expected = spot.output
    error = spot.error_out
    words = relation_of_outputs(actual, expected, error=error, bound=search.bound, vectors=vectors_of(search))
    if words is not None:
        factor = factor_between(actual, expected) if "x the" in words else None
        begin = next(singular for singular in PLURAL if words.startswith(singular))
        named = named_by_width(search, comparison, spot, factor) if factor else ""
        yield PLURAL[begin] + words.removeprefix(begin) + named
    fits = functools.partial(explains, actual=actual, error=error, bound=search.bound)
    if fits(functional.log_softmax(expected, dim=-1)):
        yield "they are log-probabilities"
    if fits(functional.softmax(expected, dim=-1)):
        yield "they are probabilities"

    def capped(cap: float) -> torch.Tensor:
        return cap * torch.tanh(expected / cap)

    if expected.shape == actual.shape:
        caps = operations.solved(capped, actual, starts=CAPS)
        for cap in caps:
            if fits(capped(cap)):
                yield f"they are capped softly at {number(cap)}"
    if len(comparison.spots) == 1:
        # No module of the port could be paired: the same what-ifs with the whole original.
        yield from of_whole(search, spot)
