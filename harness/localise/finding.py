# SPDX-License-Identifier: Apache-2.0
"""What the searches for a fault share: what they are given, what they find, and when two tensors count as one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

from harness.cases import Case
from harness.families import taps_of
from harness.numerics import relative_error
from harness.trial import Pair, Trial

EXPLAINED = 1e-3
"""The share of a difference that an explanation may leave unexplained, beside the bound."""

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Divergence:
    """Where original and port part, and why.

    module: the tap, tensor or position, in few words. sentence: what a colleague would say. error_in, error_out: the
    relative errors of what that place is given and of what it returns, where it is a module.
    """

    module: str
    sentence: str
    error_in: float | None = None
    error_out: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """One search: a failing case in float64 on the port's own route, until a moment of `time.monotonic`.

    check: id of the check that failed. dtype: what it failed in. bound: the relative error up to which two tensors are
    the same.
    """

    trial: Trial
    case: Case
    pair: Pair
    check: str
    dtype: str
    until: float
    bound: float


def tap_names(search: Search) -> dict[str, str]:
    """The family's names of places, by the port's paths."""
    return {tap.port: tap.name for tap in taps_of(search.trial.family, search.case.fields)}


def while_there_is_time(items: Iterable[Item], until: float) -> Iterator[Item]:
    """The items, as long as the moment has not come."""
    for item in items:
        if time.monotonic() > until:
            return
        yield item


def require_time(search: Search) -> None:
    """Raises TimeoutError when the moment has come; asked before every run of a model."""
    if time.monotonic() > search.until:
        raise TimeoutError("no time is left to look into this failure")


def distance(actual: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    """The relative error; infinite where there is no tensor, or one of another shape."""
    if actual is None or expected is None or actual.shape != expected.shape:
        return float("inf")
    return relative_error(actual, expected)


def explains(candidate: torch.Tensor | None, actual: torch.Tensor, *, error: float, bound: float) -> bool:
    """Whether a candidate is what the port computed: within the bound, and nothing of the old error is left."""
    left = distance(candidate, actual)
    return left <= bound and left <= EXPLAINED * error
