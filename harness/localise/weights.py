# SPDX-License-Identifier: Apache-2.0
"""Which tensor of a port does not hold what the original's holds, and what it holds instead."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping

import torch

from harness.families import tied_of
from harness.localise.alignment import Comparison, compare, judged
from harness.localise.finding import Divergence, Search, distance, while_there_is_time
from harness.localise.relations import (
    describe_order,
    factor_between,
    number,
    order_between,
    orders_of_heads,
    orders_of_thirds,
)
from harness.routes import carry
from harness.trial import copied, original_model, place

NARROWER = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)

Tensors = Mapping[str, torch.Tensor]


def find(search: Search, comparison: Comparison) -> Divergence | None:
    """The first tensor that is at fault, where putting it right puts the port right; None where none is.

    comparison: both models as they are. A port that already agrees holds its tensors as it wants to.
    """
    search = judged(search, comparison)
    if _first(search, comparison) is None:
        return _untied(search)
    theirs, ours = _parameters(search.pair.original), _parameters(search.pair.port)
    by_name = {search.trial.family.port_key(name): name for name in theirs}
    by_name = {name: source for name, source in by_name.items() if name in ours}
    found = _of_names(search, comparison, theirs, ours, by_name)
    if found is None and len(by_name) < len(theirs):
        found = _of_contents(theirs, ours)
    return found


def _parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in model.named_parameters(remove_duplicate=False)}


def _first(search: Search, comparison: Comparison) -> int | None:
    errors = (spot.error_out for spot in comparison.spots)
    return next((place for place, error in enumerate(errors) if not error <= search.bound), None)


def _mended(search: Search, comparison: Comparison, tensors: Tensors) -> bool:
    """Whether the port with these tensors agrees with the original, or at least differs only later."""
    before = _first(search, comparison)
    return before is not None and _first_with(search, tensors) > before


def _first_with(search: Search, tensors: Tensors) -> float:
    """The number of the first spot that differs in the port with these tensors; infinite where none does."""
    port = copied(search.pair.port)
    parameters = dict(port.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
    pair = dataclasses.replace(search.pair, port=port)
    found = _first(search, compare(search.trial, pair, search.case.fields, pair.batch.tokens))
    return float("inf") if found is None else found


def _said(name: str, words: str, others: int = 0) -> Divergence:
    if words.endswith("changed places"):
        others -= 1
    more = f" (and {others} more tensor{'s' if others > 1 else ''})" if others else ""
    return Divergence(module=name, sentence=f"tensor {name} {words}{more}")


# --- by name ---


def _of_names(
    search: Search, comparison: Comparison, theirs: Tensors, ours: Tensors, by_name: Mapping[str, str]
) -> Divergence | None:
    wrong = {
        name: source
        for name, source in by_name.items()
        if ours[name].shape != theirs[source].shape or not torch.equal(ours[name].double(), theirs[source].double())
    }
    # Tied tensors have several names; one is enough.
    one_name = {ours[name].data_ptr(): name for name in reversed(wrong)}.values()
    wrong = {name: source for name, source in wrong.items() if name in one_name}
    right = {name: theirs[source] for name, source in wrong.items() if ours[name].shape == theirs[source].shape}
    if not right or not _mended(search, comparison, right):
        return None
    wanted = _needed(search, right)
    right = {name: right[name] for name in wanted}
    names = list(right)
    for name in names:
        words = relation_of_tensors(name, by_name[name], theirs, ours, by_name)
        if words is not None:
            return _said(name, words, len(names) - 1)
    name = names[0]
    source = by_name[name]
    if _never_loaded(search, name):
        words = f"was never loaded: it is the same whatever the original's {source} is"
    else:
        words = f"is not the original's {source}, and with that in its place the port agrees"
    return _said(name, words, len(names) - 1)


def _needed(search: Search, tensors: Tensors) -> Tensors:
    """The tensors without those that the port holds in an order of its own, and is right to."""
    reached = _first_with(search, tensors)
    for pattern in dict.fromkeys(map(_pattern, tensors)):
        fewer = {name: tensor for name, tensor in tensors.items() if _pattern(name) != pattern}
        if fewer and _first_with(search, fewer) >= reached:
            tensors = fewer
    return tensors


def _pattern(name: str) -> str:
    """A tensor's name with a star for the number of its layer."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def relation_of_tensors(
    name: str, source: str, theirs: Tensors, ours: Tensors, by_name: Mapping[str, str]
) -> str | None:
    """How a port's tensor comes out of the original's, in words that follow its name; None where it does not simply.

    theirs, ours: all tensors of original and port, any floats. by_name: the port's name -> the original's.
    """
    actual, expected = ours[name].double(), theirs[source].double()
    for other, tensor in theirs.items():
        if other != source and tensor.shape == actual.shape and torch.equal(tensor.double(), actual):
            place = next((mine for mine, its in by_name.items() if its == other), None)
            if place is not None and _equal(ours[place], theirs[source]):
                return f"holds the original's {other}, and {place} holds {source}: they have changed places"
            return f"holds the original's {other}"
    if not bool((actual != 0).any()):
        return f"is zero, and not the original's {source}"
    if actual.ndim == 1 and bool((actual == 1).all()):
        return f"is one throughout, and not the original's {source}"
    if actual.ndim == 2 and _equal(actual, expected.T):
        return f"is the original's {source} transposed"
    if actual.shape != expected.shape:
        return None
    factor = factor_between(actual, expected)
    if factor is not None and distance(actual, expected * factor) < 1e-6:
        return f"is {number(factor)}x the original's {source}"
    for dtype in NARROWER:
        if torch.equal(expected.to(dtype).double(), actual):
            return f"is the original's {source} rounded to {str(dtype).removeprefix('torch.')}"
    for axis, what in enumerate(("rows", "columns")[: actual.ndim]):
        order = order_between(actual, expected, axis=axis) if actual.ndim > 1 else _order_of_numbers(actual, expected)
        if order is not None:
            return f"is the original's {source} with {describe_order(order, what if actual.ndim > 1 else 'numbers')}"
        for shift in (1, -1):
            kept = slice(1, None) if shift == 1 else slice(None, -1)
            moved = expected.roll(shift, axis).movedim(axis, 0)[kept]
            if actual.shape[axis] > 2 and torch.equal(actual.movedim(axis, 0)[kept], moved):
                return f"is the original's {source} with {what} shifted by one"
    same = (actual == expected).double()
    if actual.ndim == 2 and 0 < float(same.mean()) < 1:
        rows = same.min(dim=1).values
        if 0 < float(rows.mean()) < 1:
            bad = int((rows == 0).nonzero()[0, 0])
            return f"is the original's {source} but for {int((rows == 0).sum())} of {len(rows)} rows, from row {bad} on"
    return None


def _equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left.double(), right.double())


def _order_of_numbers(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor | None:
    """The permutation with actual = expected[order] of two (n,) tensors without doubles; else None."""
    if actual.unique().numel() != len(actual) or not torch.equal(actual.sort().values, expected.sort().values):
        return None
    order = torch.empty(len(actual), dtype=torch.long)
    order[actual.argsort()] = expected.argsort()
    return None if torch.equal(order, torch.arange(len(order))) else order


def _never_loaded(search: Search, name: str) -> bool:
    """Whether a tensor is the same after loading two different originals, with equal random numbers."""
    held = []
    for seed in (search.case.seed, search.case.seed + 1):
        case = dataclasses.replace(search.case, seed=seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            port = place(search.trial, carry(search.trial, case, original_model(search.trial, case)))
        held.append(_parameters(port)[name])
    return torch.equal(*held)


def _untied(search: Search) -> Divergence | None:
    """Tensors that are one in the original and two of equal numbers in the port, for a check that may fail of it."""
    if not search.check.startswith(("weights.tied", "training.")):
        return None
    parameters = dict(search.pair.port.named_parameters(remove_duplicate=False))
    for group in tied_of(search.trial.family, search.case.fields):
        names = [search.trial.family.port_key(key) for key in group]
        if all(name in parameters for name in names) and len({id(parameters[name]) for name in names}) > 1:
            listed = " and ".join(names)
            return Divergence(module=names[-1], sentence=f"{listed} are two tensors in the port, one in the original")
    return None


# --- by content, whatever the names ---


def _of_contents(theirs: Tensors, ours: Tensors) -> Divergence | None:
    """Tensors of the original of which no number is in the port, and what stands where they ought to."""
    mine, its = _numbers(ours.values()), _numbers(theirs.values())
    lost = {name: tensor for name, tensor in theirs.items() if not bool(torch.isin(tensor.double(), mine).any())}
    if not lost:
        return None
    strange = {name: tensor for name, tensor in ours.items() if not bool(torch.isin(tensor.double(), its).any())}
    for source, tensor in lost.items():
        for name, held in strange.items():
            for part, piece in _pieces(tensor, held.shape):
                words = relation_of_tensors("it", "them", {"them": piece}, {"it": held}, {"it": "them"})
                if words is not None and ("x the" in words or "rounded" in words):
                    words = words.replace("original's them", f"original's {source}{part}")
                    return _said(name, words, len(strange) - 1)
    doubled = _doubled(theirs, ours)
    source = next(iter(lost))
    others = len(lost) - 1
    more = f" (nor of {others} more tensor{'s' if others > 1 else ''})" if others else ""
    for name, (other, first) in doubled.items():
        if theirs[other].shape == theirs[source].shape:
            said = (
                f"tensor {name} holds the original's {other}, as {first} does, and no number of {source} is in the port"
            )
            return Divergence(module=name, sentence=said + more)
    zero = [name for name, held in strange.items() if held.shape == theirs[source].shape and not bool(held.any())]
    rest = f" and {len(zero) - 1} more of its shape are" if len(zero) > 1 else ", of its shape, is"
    said = f"no number of the original's {source} is in the port{more}" + (f"; {zero[0]}{rest} zero" if zero else "")
    return Divergence(module=zero[0] if len(zero) == 1 else source, sentence=said)


def _pieces(tensor: torch.Tensor, shape: torch.Size) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor, its transpose, and its runs of rows, as far as they have a shape; with words that say which."""
    for turned, whole in (("", tensor), (" transposed", tensor.T if tensor.ndim == 2 else tensor)):
        if whole.shape == shape:
            yield turned, whole
        elif whole.ndim == len(shape) and whole.shape[1:] == shape[1:] and len(whole) % shape[0] == 0:
            for start in range(0, len(whole), shape[0]):
                yield f"{turned}, rows {start} to {start + shape[0] - 1},", whole[start : start + shape[0]]


def _numbers(tensors: object) -> torch.Tensor:
    return torch.cat([tensor.double().flatten() for tensor in tensors])  # type: ignore[attr-defined]


def _doubled(theirs: Tensors, ours: Tensors) -> dict[str, tuple[str, str]]:
    """Port's tensor -> (the original's that it holds, the port's other tensor that holds it too)."""
    found: dict[str, tuple[str, str]] = {}
    for source, tensor in theirs.items():
        holders = [
            name for name, held in ours.items() if _equal(held, tensor) or (tensor.ndim == 2 and _equal(held, tensor.T))
        ]
        distinct = list({ours[name].data_ptr(): name for name in reversed(holders)}.values())[::-1]
        for name in distinct[1:]:
            found.setdefault(name, (source, distinct[0]))
    return found


# --- by trying, whatever the names ---


def repairs(search: Search, comparison: Comparison) -> Iterator[str]:
    """Changes of the port's tensors, the same in every layer, with which it agrees, where its names are its own."""
    ours, theirs = _parameters(search.pair.port), _parameters(search.pair.original)
    if all(_holds(ours, search.trial.family.port_key(name), tensor) for name, tensor in theirs.items()):
        return
    for words, changed in while_there_is_time(_repairs(ours), search.until):
        if _mended(search, comparison, changed):
            yield f"with {words} the port agrees with the original"


def _holds(ours: Tensors, name: str, tensor: torch.Tensor) -> bool:
    return name in ours and _equal(ours[name], tensor)


def _repairs(ours: Tensors) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Words that follow "with", and tensors to put in the place of those of these names."""
    fellows: dict[str, list[str]] = {}
    for name in ours:
        fellows.setdefault(_pattern(name), []).append(name)
    for pattern, names in fellows.items():
        if all(ours[name].ndim == 2 and len(set(ours[name].shape)) == 1 and len(ours[name]) > 1 for name in names):
            yield f"{pattern} transposed", {name: ours[name].T for name in names}
    stems: dict[str, list[str]] = {}
    for pattern in fellows:
        stems.setdefault(pattern.rpartition(".")[0], []).append(pattern)
    listed = list(stems)
    for index, first in enumerate(listed):
        for second in listed[index + 1 :]:
            yield from _exchanges(ours, fellows, first, second, stems[first])
    for stem, patterns in stems.items():
        rows = {pattern: len(ours[fellows[pattern][0]]) for pattern in patterns if ours[fellows[pattern][0]].ndim}
        for count in dict.fromkeys(rows.values()):
            names = [name for pattern in patterns if rows.get(pattern) == count for name in fellows[pattern]]
            for words, order in (*orders_of_thirds(count), *orders_of_heads(count)):
                back = order.argsort()
                yield f"{stem} given {words}", {name: ours[name][back] for name in names}
            for shift, words in ((-1, "early"), (1, "late")):
                changed = {name: ours[name].roll(shift, 0) for name in names}
                yield f"the rows of {stem} moved one place ({words})", changed


def _exchanges(
    ours: Tensors, fellows: Mapping[str, list[str]], first: str, second: str, patterns: list[str]
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    pairs = []
    for pattern in patterns:
        other = second + pattern.removeprefix(first)
        left, right = fellows[pattern], fellows.get(other, [])
        if len(left) != len(right) or any(
            ours[mine].shape != ours[its].shape for mine, its in zip(left, right, strict=True)
        ):
            return
        pairs.append(list(zip(left, right, strict=True)))
    choices: list[tuple[str, list[tuple[str, str]]]] = [
        (f"{first} and {second} exchanged", [one for pair in pairs for one in pair])
    ]
    if len(pairs) > 1:
        for pattern, pair in zip(patterns, pairs, strict=True):
            choices.append((f"{pattern} and {second + pattern.removeprefix(first)} exchanged", pair))
    for words, pair in choices:
        changed: dict[str, torch.Tensor] = {}
        for mine, its in pair:
            changed |= {mine: ours[its], its: ours[mine]}
        yield words, changed
