# SPDX-License-Identifier: Apache-2.0
"""A module whose input agrees and whose output does not: the original's own, run with one mistake after the other."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from harness.capture import watch
from harness.localise import operations, tensors
from harness.localise.alignment import Spot
from harness.localise.elsewhere import named_by_sizes
from harness.localise.finding import Search, distance, explains, while_there_is_time
from harness.localise.relations import number, relation_of_outputs
from harness.trial import port_logits, run_original, takes

Run = Callable[[operations.Rule | None, Mapping[str, torch.Tensor]], torch.Tensor | None]
"""(rule or None, parameters to change) -> what the original gives then, or None where it cannot run."""

CAUSALITY = {
    "every position sees all others, later ones too: the causal mask is missing": None,
    "every position sees one that comes later: the causal mask is shifted by one": 1,
    "no position sees itself: the causal mask is shifted by one": -1,
}


def of_cache(search: Search, spot: Spot) -> Iterator[str]:
    """A module that is right as soon as nothing is cached."""
    if spot.port is None or not takes(search.pair.port, "use_cache"):
        return
    tokens = search.pair.batch.tokens
    _, calls = watch(search.pair.port, lambda: port_logits(search.trial, search.pair.port, tokens, use_cache=False))
    call = next((call for call in calls if call.path == spot.port.path), None)
    if call is not None and call.output is not None and distance(call.output.cpu(), spot.output[1]) <= search.bound:
        yield "with use_cache=False it agrees, so that what the cache gives back is at fault"


def of_module(search: Search, spot: Spot) -> Iterator[str]:
    """Mistakes with which the original's module gives what the port's gives, on what the original's was given."""
    call = spot.original
    if call is None:
        return
    actual, expected = spot.output
    module = search.pair.original.get_submodule(call.path)
    given = spot.given[0] if spot.given is not None else None
    vectors = {f"{call.path}.{name}": tensor.detach() for name, tensor in module.named_parameters() if tensor.ndim == 1}
    words = relation_of_outputs(actual, expected, given, error=spot.error_out, bound=search.bound, vectors=vectors)
    if words is None or actual.shape == expected.shape:
        # Of two true sentences the plainer one: a bias that is missing rather than a vector.
        yield from _what_ifs(search, spot, module, functools.partial(run_module, search, spot))
    if words is not None:
        yield f"its output {words}"


def of_whole(search: Search, spot: Spot) -> Iterator[str]:
    """The same with the whole original, where no module of the port can be told."""
    yield from _what_ifs(search, spot, search.pair.original, functools.partial(_run_whole, search))


def run_module(
    search: Search, spot: Spot, rule: operations.Rule | None, changed: Mapping[str, torch.Tensor]
) -> torch.Tensor | None:
    """The original's module at a place, on what it was given, with a mistake; None where that fails."""
    assert spot.original is not None
    module = search.pair.original.get_submodule(spot.original.path)
    with torch.no_grad(), operations.Rewritten(rule) if rule is not None else contextlib.nullcontext():
        try:
            output = torch.func.functional_call(module, dict(changed), spot.original.args, spot.original.kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError):
            return None
    output = output[0] if isinstance(output, tuple) else output
    return output.cpu() if isinstance(output, torch.Tensor) else None


def _run_whole(
    search: Search, rule: operations.Rule | None, changed: Mapping[str, torch.Tensor]
) -> torch.Tensor | None:
    original, tokens = search.pair.original, search.pair.batch.tokens
    own = {name: parameter.detach().clone() for name, parameter in original.named_parameters() if name in changed}
    try:
        _put(original, changed)
        with operations.Rewritten(rule) if rule is not None else contextlib.nullcontext():
            return run_original(search.trial, original, tokens, torch.zeros_like(tokens))["logits"]
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    finally:
        _put(original, own)


def _put(model: torch.nn.Module, tensors_by_name: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in tensors_by_name:
                parameter.copy_(tensors_by_name[name])


def _what_ifs(search: Search, spot: Spot, module: torch.nn.Module, run: Run) -> Iterator[str]:
    actual, expected = spot.output
    fits = functools.partial(explains, actual=actual, error=spot.error_out, bound=search.bound)
    used = operations.used_by(lambda: run(None, {}))
    attends = bool(used.names & {"softmax", "scaled_dot_product_attention"})
    for words, rule in _rules(used, attends):
        if fits(run(rule, {})):
            yield words
    others = {name: parameter.detach() for name, parameter in search.pair.original.named_parameters()}
    for words, changed in while_there_is_time(tensors.edits(module, others=others), search.until):
        if fits(run(None, changed)):
            yield words
    if attends:
        width = expected.shape[-1] if spot.original is not None else None
        factor = _solve(run, operations.scores_scaled, fits, actual, _scales(used.head_size, width))
        if factor is not None:
            named = named_by_sizes(search, spot, factor, used.head_size, width)
            yield f"its scores are {number(factor)}x the original's before the softmax{named}"
    if used.epsilon is not None:
        epsilon = _solve(run, operations.epsilon_replaced, fits, actual, operations.EPSILONS)
        if epsilon is not None:
            yield f"its epsilon is {epsilon:.3g}, the original's is {used.epsilon:.3g}"


def _rules(used: operations.Used, attends: bool) -> Iterator[tuple[str, operations.Rule]]:
    """Sentences, and the operation done the other way that they are about."""
    if attends:
        for words, by in CAUSALITY.items():
            yield words, operations.causality_shifted(by)
        yield "its softmax runs over the queries instead of the keys", operations.softmax_over_queries()
    if used.names & {"gelu", "relu", "silu", "tanh"}:
        for words, function in operations.ACTIVATIONS.items():
            yield f"its activation is {words}", operations.activation_replaced(function)
    if "layer_norm" in used.names:
        for words, compute in operations.NORMS.items():
            yield words, operations.norm_rewritten(compute)
    if used.names & {"var", "std"}:
        yield "its variance has the other divisor, n - 1 for n or n for n - 1", operations.statistics_other_way()


def _solve(
    run: Run,
    rule: Callable[[float], operations.Rule],
    fits: Callable[[torch.Tensor | None], bool],
    actual: torch.Tensor,
    starts: Sequence[float],
) -> float | None:
    def with_value(value: float) -> torch.Tensor | None:
        return run(rule(value), {})

    values = operations.solved(with_value, actual, starts=starts)
    return next((value for value in values if fits(with_value(value))), None)


def _scales(head_size: int | None, width: int | None) -> list[float]:
    """Factors to begin with: those that people forget or put in, then every half power of two."""
    named = [value for size in (head_size, width) if size for value in (size**0.5, size**-0.5, float(size), 1 / size)]
    grid = [2 ** (half / 2) for half in range(-12, 13) if half]
    return list(dict.fromkeys([*named, *grid]))
