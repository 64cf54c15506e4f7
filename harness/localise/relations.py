# SPDX-License-Identifier: Apache-2.0
"""Simple relations between two tensors that ought to be equal: a factor, a shift, another order of channels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from harness.localise.finding import explains

AXES = ("row", "position", "channel")
"""What the axes of a module's output stand for."""

COUNTED = 4096
"""Axes longer than this are not searched for another order."""


def relation_of_outputs(
    actual: torch.Tensor,
    expected: torch.Tensor,
    given: torch.Tensor | None = None,
    *,
    error: float,
    bound: float,
    vectors: Mapping[str, torch.Tensor] | None = None,
) -> str | None:
    """How a module's output comes out of the one that was expected, in words that follow "its output"; or None.

    actual, expected: (rows, tokens, channels), any floats. given: what the module was given. vectors: parameters by
    name, (channels,), one of which may be missing or added twice.
    """
    for words, candidate in _candidates(actual, expected, given, vectors or {}):
        if explains(candidate, actual, error=error, bound=bound):
            return words
    return None


def _candidates(
    actual: torch.Tensor, expected: torch.Tensor, given: torch.Tensor | None, vectors: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    if actual.shape != expected.shape:
        if actual.ndim == expected.ndim:
            for axis, name in enumerate(AXES[: expected.ndim]):
                if actual.shape[axis] == 1:
                    yield f"has the last {name} alone", expected.narrow(axis, -1, 1)
                    yield f"has the first {name} alone", expected.narrow(axis, 0, 1)
        for first in range(expected.ndim):
            for second in range(first + 1, expected.ndim):
                yield f"is the original's with axes {first} and {second} exchanged", expected.transpose(first, second)
        return
    yield "is zero", torch.zeros_like(expected)
    if given is not None and given.shape == expected.shape:
        yield "is its input, as if it were not there", given
        yield "has its input added", expected + given
        yield "lacks its input, which the original adds", expected - given
    if (factor := factor_between(actual, expected)) is not None:
        words = "is the original's with the opposite sign" if factor == -1 else f"is {number(factor)}x the original's"
        yield words, expected * factor
    yield from _constants(actual, expected, vectors)
    if expected.ndim == 3 and expected.shape[1] > 2:
        # One end has no partner; it may be anything.
        for shift, words in ((1, "late"), (-1, "early")):
            rolled = expected.roll(shift, dims=1).clone()
            edge = 0 if shift == 1 else -1
            rolled[:, edge] = actual[:, edge]
            yield f"is the original's, one position too {words}", rolled
    if expected.ndim >= 2 and (order := order_between(actual, expected)) is not None:
        yield f"has {describe_order(order, 'channels')}", expected[..., order]
    for axis, name in enumerate(AXES[: expected.ndim]):
        if expected.shape[axis] > 1:
            yield f"has the mean over the {name}s taken out", expected - expected.mean(dim=axis, keepdim=True)
    for first in range(expected.ndim):
        for second in range(first + 1, expected.ndim):
            if expected.shape[first] == expected.shape[second] > 1:
                yield f"is the original's with axes {first} and {second} exchanged", expected.transpose(first, second)


def _constants(
    actual: torch.Tensor, expected: torch.Tensor, vectors: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    if expected.ndim < 2 or expected[..., 0].numel() < 2:
        return
    channels = expected.shape[-1]
    added = (actual - expected).flatten(0, -2).mean(dim=0)
    for name, vector in vectors.items():
        if vector.shape == (channels,):
            yield f"is the original's without {name}", expected - vector
            yield f"is the original's with {name} once too often", expected + vector
    if channels > 1:
        yield f"is the original's plus {number(float(added.mean()))}", expected + added.mean()
    yield "differs from the original's by the same vector at every position", expected + added


def factor_between(actual: torch.Tensor, expected: torch.Tensor) -> float | None:
    """The number c with actual = c expected, as least squares have it; None where there is nothing to compare."""
    if actual.shape != expected.shape or actual.numel() < 2 or not bool((expected != 0).any()):
        return None
    left, right = actual.flatten().double(), expected.flatten().double()
    factor = float(left @ right / (right @ right))
    return factor if factor == factor and abs(factor) < float("inf") else None


def order_between(actual: torch.Tensor, expected: torch.Tensor, *, axis: int = -1) -> torch.Tensor | None:
    """The permutation of an axis with actual = expected[..., order], where every column has one partner; else None."""
    left = actual.detach().double().movedim(axis, 0).flatten(1)
    right = expected.detach().double().movedim(axis, 0).flatten(1)
    if left.shape != right.shape or not 1 < left.shape[0] <= COUNTED or left.shape[1] < 2:
        return None
    order = torch.cdist(left, right).argmin(dim=1)
    identity = torch.arange(len(order))
    if torch.equal(order, identity) or not torch.equal(order.sort().values, identity):
        return None
    return order


def describe_order(order: torch.Tensor, what: str) -> str:
    """A permutation (n,) in words: thirds, heads, a shift, interleaving; `what` names the things that are ordered."""
    count = len(order)
    identity = torch.arange(count)
    for shift in (1, -1):
        if torch.equal(order, identity.roll(shift)):
            return f"{what} shifted by one"
    if torch.equal(order, identity.flip(0)):
        return f"{what} in reverse"
    for words, candidate in (*orders_of_thirds(count), *orders_of_heads(count)):
        if torch.equal(order, candidate):
            return words
    for parts in range(2, count):
        if count % parts == 0 and torch.equal(order.view(parts, -1).diff(dim=1), torch.ones(parts, count // parts - 1)):
            places = ", ".join(str(int(block) * parts // count) for block in order.view(parts, -1)[:, 0])
            return f"{what} in another order, in {parts} blocks ({places})"
    return f"{what} in another order"


THIRDS = {
    "q and k exchanged": (1, 0, 2),
    "k and v exchanged": (0, 2, 1),
    "q and v exchanged": (2, 1, 0),
    "q, k, v taken as k, v, q": (1, 2, 0),
    "q, k, v taken as v, q, k": (2, 0, 1),
}


def orders_of_thirds(count: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The other orders of three parts of an axis, (count,) int64, in words."""
    if count % 3 == 0 and count > 3:
        thirds = torch.arange(count).view(3, -1)
        for words, places in THIRDS.items():
            yield words, thirds[list(places)].flatten()


def orders_of_heads(count: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Orders in which heads of any number are interleaved, in reverse or moved by one, (count,) int64, in words."""
    every = torch.arange(count)
    for heads in range(2, count):
        if count % heads:
            continue
        size = count // heads
        yield f"channels dealt to {heads} heads in turn instead of in blocks", every.view(size, heads).T.flatten()
        if heads < count:
            yield f"its {heads} heads in reverse", every.view(heads, size).flip(0).flatten()
            yield f"its {heads} heads moved by one", every.view(heads, size).roll(1, 0).flatten()
    if count % 3 == 0:
        third = count // 3
        for heads in range(2, third + 1):
            if third % heads:
                continue
            size = third // heads
            inner = every.view(3, heads, size)
            if size > 1:
                dealt = every.view(3, size, heads).transpose(1, 2).flatten()
                yield f"channels of q, k and v dealt to {heads} heads in turn instead of in blocks", dealt
            yield f"q, k and v taken head by head ({heads} heads)", inner.transpose(0, 1).flatten()
            outer = every.view(heads, 3, size).transpose(0, 1).flatten()
            yield f"q, k and v taken as if they stood head by head ({heads} heads)", outer


def number(value: float) -> str:
    """A factor as a person writes it: four digits, no trailing zeros."""
    text = f"{value:.4g}"
    return text if text not in ("-0", "1", "-1") else f"{value:.6g}"
