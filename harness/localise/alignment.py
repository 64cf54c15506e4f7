# SPDX-License-Identifier: Apache-2.0
"""Which call in the port is which in the original, also in ports whose modules have names of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import torch

from harness.capture import Call, like, watch
from harness.families import Tap, taps_of
from harness.localise.finding import Search, distance
from harness.narrowing import WORTH_A_LOOK, narrows
from harness.numerics import FLOAT32_INSIDE_BOUND
from harness.trial import Pair, Trial, port_logits, run_original


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spot:
    """One place of both models: what each was given there and what each gave.

    original is the original's call; port the port's, None where the output was read elsewhere. given: (port's,
    original's) first input of one shape, or None. output: (port's, original's).
    """

    name: str
    original: Call | None
    port: Call | None
    given: tuple[torch.Tensor, torch.Tensor] | None
    output: tuple[torch.Tensor, torch.Tensor]

    @property
    def error_in(self) -> float | None:
        """The relative error of what it is given; None where that cannot be told."""
        return None if self.given is None else distance(*self.given)

    @property
    def error_out(self) -> float:
        """The relative error of its output, infinite when the shapes differ."""
        return distance(*self.output)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """One run of both models on one batch.

    spots: in the order data passes the original, `logits` last. silent: taps whose module the port has and does not
    run, nor any part of it. original, port: every call in each.
    """

    spots: Sequence[Spot]
    silent: Sequence[str]
    original: Sequence[Call]
    port: Sequence[Call]


def compare(trial: Trial, pair: Pair, fields: Mapping[str, object], tokens: torch.Tensor) -> Comparison:
    """Runs both models on token ids (rows, tokens) and pairs their calls."""
    targets = torch.zeros_like(tokens)
    theirs, expected = watch(pair.original, lambda: run_original(trial, pair.original, tokens, targets)["logits"])
    ours, actual = watch(pair.port, lambda: port_logits(trial, pair.port, tokens))
    taps = taps_of(trial.family, fields)
    first = {call.path: call for call in reversed(expected)}
    ran = {call.path: call for call in reversed(actual)}
    have = {path for path, _ in pair.port.named_modules()}
    partners = _by_size(pair, expected, actual)
    spots: list[Spot] = []
    silent: list[str] = []
    unseen: list[tuple[str, Call]] = []
    for tap in taps:
        call = first.get(tap.original)
        if call is None or call.output is None:
            continue
        if tap.port in have:
            partner = ran.get(tap.port)
            has_parameters = any(True for _ in pair.port.get_submodule(tap.port).parameters())
            if partner is None and has_parameters and not any(path.startswith(tap.port + ".") for path in ran):
                silent.append(tap.name)
        else:
            partner = ran.get(partners.get(tap.original, ""))
            if partner is not None and not _plausible(tap, call, partner, spots, partners):
                partner = None
        if partner is None or partner.output is None:
            unseen.append((tap.name, call))
            continue
        given = _given(partner, call)
        if given is not None:
            # What an earlier place gave, where the port has no module for that place.
            spots.extend(
                Spot(name=name, original=earlier, port=None, given=None, output=given)
                for name, earlier in unseen
                if earlier.output is not None and _same_bits(earlier.output, given[1])
            )
        unseen = []
        output = (like(partner.output.cpu(), call.output), call.output.cpu())
        spots.append(Spot(name=tap.name, original=call, port=partner, given=given, output=output))
    last = next((spot.output for spot in reversed(spots)), None)
    spots.append(Spot(name="logits", original=None, port=None, given=last, output=(ours.cpu(), theirs.cpu())))
    return Comparison(spots=spots, silent=silent, original=expected, port=actual)


def _plausible(tap: Tap, theirs: Call, ours: Call, spots: Iterable[Spot], partners: Mapping[str, str]) -> bool:
    """Whether a partner of the right size is given what the original's is given, and stands in the partner's block."""
    if theirs.inputs and _given(ours, theirs) is None:
        return False
    for outer, its in partners.items():
        if tap.original.startswith(outer + ".") and not ours.path.startswith(its + "."):
            return False
    return not any(spot.port is not None and spot.port.path == ours.path for spot in spots)


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left, right)


def _given(ours: Call, theirs: Call) -> tuple[torch.Tensor, torch.Tensor] | None:
    for expected in theirs.inputs[:1]:
        for actual in ours.inputs:
            if actual.shape == expected.shape:
                return actual.cpu(), expected.cpu()
    return None


def _by_size(pair: Pair, theirs: Iterable[Call], ours: Iterable[Call]) -> dict[str, str]:
    """Path in the original -> path in the port, where as many modules of one size run in both, in the same order."""
    left, right = _sizes(pair.original, theirs), _sizes(pair.port, ours)
    paired: dict[str, str] = {}
    for size, paths in left.items():
        if len(right.get(size, ())) == len(paths):
            paired.update(zip(paths, right[size], strict=True))
    return paired


def _sizes(model: torch.nn.Module, calls: Iterable[Call]) -> dict[tuple[object, ...], list[str]]:
    """Paths of the modules that ran, by the number of their parameters and the shape of what they returned.

    Of one module wrapped in another of the same size, the outer one alone.
    """
    modules = dict(model.named_modules())
    found: dict[tuple[object, ...], list[str]] = {}
    for call in calls:
        count = sum(parameter.numel() for parameter in modules[call.path].parameters())
        if not count or call.output is None:
            continue
        paths = found.setdefault((count, tuple(call.output.shape)), [])
        if call.path not in paths and not any(call.path.startswith(path + ".") for path in paths):
            paths.append(call.path)
    return found


def first_difference(search: Search, comparison: Comparison) -> Spot | None:
    """The first spot whose output differs by more than the bound."""
    return next((spot for spot in comparison.spots if not spot.error_out <= search.bound), None)


def judged(search: Search, comparison: Comparison) -> Search:
    """The search with the bound of a port that computes a part in float32, where the first difference is so small."""
    spot = first_difference(search, comparison)
    if spot is None or spot.error_out > WORTH_A_LOOK or not narrows(search.trial, search.case):
        return search
    return dataclasses.replace(search, bound=FLOAT32_INSIDE_BOUND)
