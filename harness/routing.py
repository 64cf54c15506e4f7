# SPDX-License-Identifier: Apache-2.0
"""What routed layers did in a call: read from what they were given and gave, or decided as another run decided."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch

from harness.cases import Case
from harness.errors import Mismatch, Skip
from harness.families import Decision, Observed, RoutedLayer, Routing
from harness.trial import Trial

Output = TypeVar("Output")

SOLVABLE = 1e-8
"""Smallest over largest singular value of a token's expert outputs, below which its weights cannot be told."""

NEAR = 32.0
"""Units in the last place, of a token's router logits, within which two experts are a near tie."""


@dataclasses.dataclass(kw_only=True)
class Seen:
    """One routed layer in a call: what it was given and gave, (tokens, width), its router logits and router's output.

    Each is None where the port has no such module, or does not run it.
    """

    inputs: torch.Tensor | None = None
    outputs: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    router: Any = None


def routing_of(trial: Trial) -> Routing:
    """The family's routing; the checks that call this need the feature."""
    if trial.family.routing is None:
        raise Mismatch(f"family '{trial.family.name}' has the feature routing and declares no routing")
    return trial.family.routing


def all_terms(routing: Routing) -> dict[str, Any]:
    """Overrides of a configuration that switch every auxiliary loss on."""
    return {name: value for term in routing.auxiliary for name, value in term.on.items()}


def routed_layers(trial: Trial, case: Case) -> Sequence[RoutedLayer]:
    """The routed layers of a case's model. Raises Skip where it has none."""
    layers = routing_of(trial).layers(case.fields)
    if not layers:
        raise Skip("no layer of this configuration has experts")
    return layers


def watch_layers(
    module: torch.nn.Module, layers: Sequence[RoutedLayer], side: str, call: Callable[[], Output]
) -> tuple[Output, dict[str, Seen]]:
    """Runs `call`: what it returns, and by layer what happened there. side: `original` or `port`, whose paths count.

    Of several calls in one, the last counts.
    """
    seen = {layer.layer.name: Seen() for layer in layers}
    with contextlib.ExitStack() as hooks:

        def watch(path: str, see: Callable[[Any, Any], None]) -> None:
            with contextlib.suppress(AttributeError):  # a port may have no such module
                place = module.get_submodule(path)
                hook = lambda _, args, kwargs, value: see((*args, *kwargs.values()), value)  # noqa: E731
                hooks.callback(place.register_forward_hook(hook, with_kwargs=True).remove)

        for layer in layers:
            there = seen[layer.layer.name]
            watch(getattr(layer.layer, side), functools.partial(_see_layer, there))
            watch(getattr(layer.logits, side), functools.partial(_see_logits, there))
            watch(getattr(layer.router, side), functools.partial(_see_router, there))
        output = call()
    return output, seen


def _see_layer(seen: Seen, given: Any, value: Any) -> None:
    floats = (value for value in given if isinstance(value, torch.Tensor) and value.is_floating_point())
    seen.inputs, seen.outputs = _by_token(next(floats, None)), _by_token(_first(value))


def _see_logits(seen: Seen, given: Any, value: Any) -> None:
    seen.logits = _by_token(_first(value))


def _see_router(seen: Seen, given: Any, value: Any) -> None:
    seen.router = value


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) and value else value


def _by_token(value: Any) -> torch.Tensor | None:
    return value.reshape(-1, value.shape[-1]) if isinstance(value, torch.Tensor) and value.ndim > 1 else None


def observed(module: torch.nn.Module, layers: Sequence[RoutedLayer], seen: Mapping[str, Seen]) -> list[Observed]:
    """The original's routed layers of a call, for closed forms. Raises Mismatch where it has no such modules."""
    found = []
    for layer in layers:
        there = seen[layer.layer.name]
        if there.inputs is None or there.logits is None:
            raise Mismatch(f"the original did not run {layer.layer.original} and {layer.logits.original}")
        place = module.get_submodule(layer.layer.original)
        found.append(Observed(module=place, inputs=there.inputs, logits=there.logits))
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """By how much each expert's output is in what a layer gave, read from the sum alone.

    weights: (tokens, experts). told: (tokens,) bool, where they can be told. rest: (tokens,) share of the output that
    is no mixture of the experts' outputs.
    """

    weights: torch.Tensor
    told: torch.Tensor
    rest: torch.Tensor


def mixture(outputs: torch.Tensor, of_experts: torch.Tensor) -> Mixture:
    """Reads the weights of a sum. outputs: (tokens, width); of_experts: (tokens, experts, width); float64, no graph."""
    columns = of_experts.detach().double().transpose(1, 2)
    target = outputs.detach().double()
    values = torch.linalg.svdvals(columns)
    told = values[:, -1] > SOLVABLE * values[:, 0].clamp(min=1e-300)
    told &= torch.tensor(columns.shape[1] >= columns.shape[2])
    weights = torch.linalg.lstsq(columns, target[..., None], driver="gelsd").solution[..., 0]
    rest = (target - (columns @ weights[..., None])[..., 0]).norm(dim=-1)
    scale = columns.norm(dim=1).amax(dim=-1).clamp(min=1e-300)
    return Mixture(weights=weights, told=told, rest=rest / scale)


def combined(decision: Decision, experts: int) -> torch.Tensor:
    """A decision as the weight of every expert for every token, (tokens, experts)."""
    weights = decision.weights * decision.keep
    empty = torch.zeros(len(weights), experts, dtype=weights.dtype)
    return empty.scatter_add(1, decision.indices, weights)


@contextlib.contextmanager
def deciding_as(
    module: torch.nn.Module,
    layers: Sequence[RoutedLayer],
    logits: Mapping[str, torch.Tensor],
    *,
    epsilon: float,
    k: int,
) -> Iterator[list[int]]:
    """While it is open, the original `module` decides near ties as router logits of another run do; yields their count.

    A near tie is a token of which two neighbours among the best k + 1 experts are closer than `NEAR` units in the last
    place of `epsilon`. One that the other run orders otherwise is set aside: it gets that run's logits. Every other
    token, and what follows from its choice, is judged.
    """
    aside: list[int] = []

    def follow(_module: Any, _given: Any, value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        ours, theirs = value.reshape(-1, value.shape[-1]), other.to(value).reshape(-1, value.shape[-1])
        best = ours.topk(min(k + 1, ours.shape[-1]), dim=-1)
        gaps = (best.values[:, :-1] - best.values[:, 1:]).amin(dim=-1)
        near = gaps < NEAR * epsilon * ours.square().mean(dim=-1).sqrt()
        chosen = min(k, ours.shape[-1])
        otherwise = (theirs.topk(chosen, dim=-1).indices != best.indices[:, :chosen]).any(dim=-1)
        aside.append(int((near & otherwise).sum()))
        return torch.where((near & otherwise)[:, None], theirs, ours).reshape(value.shape)

    with contextlib.ExitStack() as hooks:
        for layer in layers:
            place = module.get_submodule(layer.logits.original)
            hook = functools.partial(follow, other=logits[layer.layer.name])
            hooks.callback(place.register_forward_hook(hook).remove)
        yield aside
