# SPDX-License-Identifier: Apache-2.0
"""A place that is given something else: what is missing, doubled, scaled or taken instead, on the way to it."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

from harness.capture import watch
from harness.families import taps_of
from harness.localise import operations
from harness.localise.alignment import Comparison, Spot
from harness.localise.elsewhere import name_of_factor
from harness.localise.finding import Search, distance, explains, while_there_is_time
from harness.localise.relations import factor_between, number, relation_of_outputs
from harness.trial import run_original

SUMMANDS = 24
"""Of so many tensors every pair is tried as one in the place of the other."""


def of_sum(search: Search, comparison: Comparison, spot: Spot) -> Iterator[str]:
    """Sums of what passed in the original before a place: something is missing, doubled, scaled, or instead."""
    subject, actual, expected = _subject(search, spot)
    error = distance(actual, expected)
    parts = _passed(comparison, spot, expected)
    fits = functools.partial(explains, actual=actual, error=error, bound=search.bound)
    for name, part in parts.items():
        if fits(expected - part):
            yield f"{subject} lacks {name}"
    whole = next((name for name, part in parts.items() if torch.equal(part, expected)), None)
    for name, part in parts.items():
        if fits(part):
            yield f"{subject} is {name}" + (f" instead of {whole}" if whole else "")
    for name, part in parts.items():
        factor = factor_between(actual - expected, part)
        if factor is None or not fits(expected + part * factor):
            continue
        if _is_summand(expected, part, parts):
            named = _named(search, spot, name, 1 + factor, expected.shape[-1])
            yield f"{subject} has {number(1 + factor)}x {name}{named}"
        else:
            yield f"{subject} has {number(factor)}x {name} added"
    vectors = vectors_of(search)
    words = relation_of_outputs(actual, expected, error=error, bound=search.bound, vectors=vectors)
    if words is not None:
        yield f"{subject} {words}"
    few = dict(itertools.islice(parts.items(), SUMMANDS))
    for left_out, put_in in while_there_is_time(itertools.permutations(few, 2), search.until):
        if fits(expected - few[left_out] + few[put_in]):
            yield f"{subject} has {put_in} in the place of {left_out}"


def _subject(search: Search, spot: Spot) -> tuple[str, torch.Tensor, torch.Tensor]:
    """What is to be explained at a place, in words, as the port has it and as the original has it."""
    if spot.given is not None and not distance(*spot.given) <= search.bound:
        return "what it is given", *spot.given
    return "its output", *spot.output


def vectors_of(search: Search) -> dict[str, torch.Tensor]:
    """The original's parameters with one axis, by name."""
    return {name: tensor.detach() for name, tensor in search.pair.original.named_parameters() if tensor.ndim == 1}


def _named(search: Search, spot: Spot, part: str, factor: float, width: int) -> str:
    def factor_of(twin: Spot, comparison: Comparison) -> float | None:
        _, actual, expected = _subject(search, twin)
        parts = _passed(comparison, twin, expected)
        added = factor_between(actual - expected, parts[part]) if part in parts else None
        return None if added is None else 1 + added

    return name_of_factor(search, spot, factor, width=width, factor_of=factor_of)


def _is_summand(expected: torch.Tensor, part: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> bool:
    """Whether the original's tensor is this part, or this part and another."""
    rest = expected - part
    return not bool((rest != 0).any()) or any(distance(other, rest) <= 1e-12 for other in parts.values())


def parts_of(comparison: Comparison, spot: Spot) -> list[Spot]:
    """The places inside a place's module."""
    if spot.original is None:
        return []
    prefix = spot.original.path + "."
    return [
        other for other in comparison.spots if other.original is not None and other.original.path.startswith(prefix)
    ]


def _passed(comparison: Comparison, spot: Spot, like: torch.Tensor) -> dict[str, torch.Tensor]:
    """What modules of the original were given and gave before a place was done, of its shape, by name."""
    names = {other.original.path: other.name for other in comparison.spots if other.original is not None}
    found: dict[str, torch.Tensor] = {}
    calls = []
    for call in comparison.original:
        if spot.original is not None and call is spot.original and not parts_of(comparison, spot):
            break
        calls.append(call)
    # Of equal tensors the one that the family has a name for.
    for call in sorted(calls, key=lambda call: call.path not in names):
        name = names.get(call.path, call.path)
        given = [("the input of", tensor) for tensor in call.inputs[:1]]
        own = spot.original is not None and call.path == spot.original.path
        gave = [("the output of", call.output)] if call.output is not None and not own else []
        for words, tensor in (*gave, *given):
            if tensor.ndim < 2 or tensor.shape[-1] != like.shape[-1] or tensor.ndim > like.ndim:
                continue
            try:
                wide = tensor.cpu().expand(like.shape)
            except RuntimeError:
                continue
            if not any(torch.equal(wide, seen) for seen in found.values()):
                found[f"{words} {name}"] = wide
    return found


def taps_before(search: Search, spot: Spot) -> list[str]:
    """Names of the taps that data passes before a place."""
    names = [tap.name for tap in taps_of(search.trial.family, search.case.fields)]
    return names[: names.index(spot.name)] if spot.name in names else names


def of_order(search: Search, comparison: Comparison, spot: Spot, suspects: Iterable[str]) -> Iterator[str]:
    """Modules that the port skips or exchanges, tried in the original."""
    original = search.pair.original
    whole = {call.path: call for call in reversed(comparison.original)}
    paths = {
        tap.name: tap.original for tap in taps_of(search.trial.family, search.case.fields) if tap.original in whole
    }
    actual = spot.given[0] if spot.given is not None else spot.output[0]
    error = spot.error_in if spot.given is not None and spot.error_in is not None else spot.error_out
    for name in suspects:
        if name not in paths or not whole[paths[name]].inputs:
            continue
        module = original.get_submodule(paths[name])
        size = sum(parameter.numel() for parameter in module.parameters())
        stand_ins: dict[str, Callable[..., object]] = {f"{name} were skipped": lambda x, *_: x}
        for other in paths:
            rival = original.get_submodule(paths[other])
            same = size and size == sum(parameter.numel() for parameter in rival.parameters())
            if other != name and same:
                stand_ins[f"{other} ran in the place of {name}"] = rival.forward
        for words, stand_in in while_there_is_time(stand_ins.items(), search.until):
            with operations.module_replaced(module, stand_in):
                seen = _at(search, spot)[0 if spot.given is not None else 1]
            if explains(seen, actual, error=error, bound=search.bound):
                yield f"as if {words}"


def of_turns(comparison: Comparison) -> Iterator[str]:
    """Modules that run more often, or in another order, than in the original."""
    often = Counter(call.path for call in comparison.port)
    theirs = Counter(call.path for call in comparison.original)
    known = [spot for spot in comparison.spots if spot.port is not None and spot.original is not None]
    # Of a block and its parts the block.
    for spot in sorted(known, key=lambda spot: spot.port.path.count(".") if spot.port else 0):
        assert spot.port is not None
        assert spot.original is not None
        if often[spot.port.path] > theirs[spot.original.path]:
            yield f"the port runs {spot.name} {often[spot.port.path]} times, the original {theirs[spot.original.path]}"
    first = [call.path for call in comparison.port]
    for earlier, later in itertools.pairwise(known):
        assert earlier.port is not None
        assert later.port is not None
        path, after = earlier.port.path, later.port.path
        if not path.startswith(after + ".") and first.index(after) < first.index(path):
            yield f"the port runs {later.name} before {earlier.name}"


def _at(search: Search, spot: Spot) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What the original gives a place, and what the place returns, in a run of the whole original."""
    tokens = search.pair.batch.tokens
    original = search.pair.original
    logits, calls = watch(
        original, lambda: run_original(search.trial, original, tokens, torch.zeros_like(tokens))["logits"]
    )
    if spot.original is None:
        return None, logits
    call = next((call for call in calls if call.path == spot.original.path), None)
    if call is None or call.output is None:
        return None, None
    return (call.inputs[0].cpu() if call.inputs else None), call.output.cpu()


def of_embeddings(search: Search, spot: Spot) -> Iterator[str]:
    """Embeddings looked up in other rows, tried in the original."""
    tokens = search.pair.batch.tokens
    original = search.pair.original
    used = operations.used_by(lambda: run_original(search.trial, original, tokens, torch.zeros_like(tokens)))
    names = {id(parameter): name for name, parameter in original.named_parameters()}
    for place, table in enumerate(used.embeddings):
        for words, change in while_there_is_time(operations.EMBEDDINGS.items(), search.until):
            with operations.Rewritten(operations.embedding_rewritten(place, change)):
                given, gave = _at(search, spot)
            here = spot.given is not None and explains(
                given, spot.given[0], error=spot.error_in or 0.0, bound=search.bound
            )
            if here or explains(gave, spot.output[0], error=spot.error_out, bound=search.bound):
                yield f"{names.get(id(table), 'an embedding')} {words}"
