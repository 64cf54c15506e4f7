# SPDX-License-Identifier: Apache-2.0
"""The first module whose inputs agree and whose output does not, and the simple mistake that makes it so."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch

from harness.capture import Call, watch
from harness.families import Tap
from harness.localise import operations, tensors, weights
from harness.localise.alignment import Comparison, Spot, compare, first_difference, judged
from harness.localise.finding import Divergence, Search, distance, explains, while_there_is_time
from harness.localise.relations import factor_between, number, relation_of_outputs
from harness.trial import field_known_by, port_logits, prepare, run_original, takes


def find(search: Search, comparison: Comparison) -> Divergence | None:
    """The first place that differs, with a sentence about it; None when all agree."""
    search = judged(search, comparison)
    spot = first_difference(search, comparison)
    if spot is None:
        return None
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
    inner = _inner(comparison, spot)
    agreed = spot.error_in is not None and spot.error_in <= search.bound
    if spot.name == "logits":
        yield from _of_logits(search, comparison, spot)
    elif agreed and not inner:
        yield from _of_cache(search, comparison, spot)
        yield from _of_module(search, comparison, spot)
    elif agreed:
        yield from _of_sum(search, comparison, spot, *spot.output, "its output")
        yield from _of_module(search, comparison, spot)
    elif spot.given is not None:
        yield from _of_order(search, comparison, spot, comparison.silent)
        yield from _of_sum(search, comparison, spot, *spot.given, "what it is given")
        yield from _of_order(search, comparison, spot, _before(search, spot))
        yield from _of_turns(comparison)
    else:
        yield from _of_order(search, comparison, spot, comparison.silent)
        yield from _of_sum(search, comparison, spot, *spot.output, "its output")
        yield from _of_order(search, comparison, spot, [*_before(search, spot), spot.name])
    if not agreed:
        yield from _of_embeddings(search, spot)
    yield from weights.repairs(search, comparison)


def _changes_from_call_to_call(search: Search) -> bool:
    tokens = comparison_tokens(search)
    first, second = (port_logits(search.trial, search.pair.port, tokens) for _ in range(2))
    return not bool(torch.isclose(first, second, rtol=search.bound, atol=search.bound, equal_nan=True).all())


def comparison_tokens(search: Search) -> torch.Tensor:
    """The token ids both models run on."""
    return search.pair.batch.tokens


def _inner(comparison: Comparison, spot: Spot) -> list[Spot]:
    """The spots inside a spot's module."""
    if spot.original is None:
        return []
    prefix = spot.original.path + "."
    return [
        other for other in comparison.spots if other.original is not None and other.original.path.startswith(prefix)
    ]


# --- a module whose input agrees ---


def _of_cache(search: Search, comparison: Comparison, spot: Spot) -> Iterator[str]:
    """A module that is right as soon as nothing is cached."""
    if spot.port is None or not takes(search.pair.port, "use_cache"):
        return
    tokens = comparison_tokens(search)
    _, calls = watch(search.pair.port, lambda: port_logits(search.trial, search.pair.port, tokens, use_cache=False))
    call = next((call for call in calls if call.path == spot.port.path), None)
    if call is not None and call.output is not None and distance(call.output.cpu(), spot.output[1]) <= search.bound:
        yield "with use_cache=False it agrees, so that what the cache gives back is at fault"


def _of_module(search: Search, comparison: Comparison, spot: Spot) -> Iterator[str]:
    call = spot.original
    if call is None:
        return
    actual, expected = spot.output
    module = search.pair.original.get_submodule(call.path)
    given = spot.given[0] if spot.given is not None else None
    vectors = {f"{call.path}.{name}": tensor.detach() for name, tensor in module.named_parameters() if tensor.ndim == 1}
    fits = functools.partial(explains, actual=actual, error=spot.error_out, bound=search.bound)
    words = relation_of_outputs(actual, expected, given, error=spot.error_out, bound=search.bound, vectors=vectors)
    if words is not None and actual.shape != expected.shape:
        yield f"its output {words}"
        return

    def run(rule: operations.Rule | None = None, **changed: torch.Tensor) -> torch.Tensor | None:
        return _run(module, call, rule=rule, changed=changed)

    # Of two true sentences the plainer one: a missing bias rather than a vector.
    yield from _what_ifs(search, spot.name, module, run, fits, actual, expected)
    if words is not None:
        yield f"its output {words}"


def _run(
    module: torch.nn.Module, call: Call, *, rule: operations.Rule | None, changed: Mapping[str, torch.Tensor]
) -> torch.Tensor | None:
    """A module's output on what it was given, with an operation or parameters changed; None where that fails."""
    with torch.no_grad(), operations.Rewritten(rule) if rule is not None else contextlib.nullcontext():
        try:
            output = torch.func.functional_call(module, dict(changed), call.args, call.kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError):
            return None
    output = output[0] if isinstance(output, tuple) else output
    return output.cpu() if isinstance(output, torch.Tensor) else None


Run = Callable[..., torch.Tensor | None]


CAUSALITY = {
    "every position sees all others, later ones too: the causal mask is missing": None,
    "every position sees one that comes later: the causal mask is shifted by one": 1,
    "no position sees itself: the causal mask is shifted by one": -1,
}


def _what_ifs(
    search: Search,
    name: str,
    module: torch.nn.Module,
    run: Run,
    fits: Callable[[torch.Tensor | None], bool],
    actual: torch.Tensor,
    expected: torch.Tensor,
) -> Iterator[str]:
    used = operations.used_by(run)
    attends = bool(used.names & {"softmax", "scaled_dot_product_attention"})
    if attends:
        for words, by in (
            ("every position sees all others, later ones too", None),
            ("every position sees one more", 1),
        ):
            if fits(run(operations.causality_shifted(by))):
                yield f"{words}: the causal mask is {'missing' if by is None else 'shifted by one'}"
        if fits(run(operations.causality_shifted(-1))):
            yield "no position sees itself: the causal mask is shifted by one"
        if fits(run(operations.softmax_over_queries())):
            yield "its softmax runs over the queries instead of the keys"
    if used.names & {"gelu", "relu", "silu", "tanh"}:
        for words, function in operations.ACTIVATIONS.items():
            if fits(run(operations.activation_replaced(function))):
                yield f"its activation is {words}"
    if "layer_norm" in used.names:
        for words, compute in operations.NORMS.items():
            if fits(run(operations.norm_rewritten(compute))):
                yield words
    if used.names & {"var", "std"} and fits(run(operations.statistics_other_way())):
        yield "its variance has the other divisor, n - 1 for n or n for n - 1"
    for words, changed in while_there_is_time(
        tensors.edits(module, others=_parameters(search.pair.original)), search.until
    ):
        if fits(run(None, **changed)):
            yield words
    if attends:
        factor = _solve(run, operations.scores_scaled, fits, actual, _scales(used.head_size, expected.shape[-1]))
        if factor is not None:
            named = _named_scale(search, name, factor, used.head_size, expected.shape[-1])
            yield f"its scores are {number(factor)}x the original's before the softmax{named}"
    if used.epsilon is not None:
        epsilon = _solve(run, operations.epsilon_replaced, fits, actual, operations.EPSILONS)
        if epsilon is not None:
            yield f"its epsilon is {epsilon:.3g}, the original's is {used.epsilon:.3g}"


def _parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _solve(
    run: Run,
    rule: Callable[[float], operations.Rule],
    fits: Callable[[torch.Tensor | None], bool],
    actual: torch.Tensor,
    starts: Sequence[float],
) -> float | None:
    def with_value(value: float) -> torch.Tensor | None:
        return run(rule(value))

    return next(
        (value for value in operations.solved(with_value, actual, starts=starts) if fits(with_value(value))), None
    )


def _scales(head_size: int | None, width: int) -> list[float]:
    sizes = [size for size in (head_size, width) if size]
    named = [value for size in sizes for value in (size**0.5, size**-0.5, size, 1 / size)]
    return list(
        dict.fromkeys(float(f"{value:.15g}") for value in (*named, 2.0, 0.5, *(2 ** (i / 2) for i in range(-12, 13))))
    )


SCALES: Mapping[str, Callable[[int, int], float]] = {
    "the root of the head size": lambda size, width: size**0.5,
    "one over the root of the head size": lambda size, width: size**-0.5,
    "the head size": lambda size, width: float(size),
    "one over the head size": lambda size, width: 1 / size,
    "the root of the head size over that of the width": lambda size, width: (size / width) ** 0.5,
    "the root of the head size over the width": lambda size, width: size**0.5 / width,
}
"""What a factor on attention scores may be, from head size and width."""


def _named_scale(search: Search, spot_name: str, factor: float, size: int | None, width: int) -> str:
    """What a factor is in terms of the sizes, for the end of a sentence; nothing where two names fit."""
    fitting = [
        name for name, value in SCALES.items() if size and math.isclose(factor, value(size, width), rel_tol=1e-6)
    ]
    if len(fitting) > 1:
        fitting = _fitting_elsewhere(search, spot_name, fitting)
    return f", which is {fitting[0]}" if len(fitting) == 1 else ""


def _fitting_elsewhere(search: Search, spot_name: str, names: Sequence[str]) -> list[str]:
    """Of several names of a factor, those that hold with 3 heads of size 5 too."""
    trial, fields = search.trial, dict(search.case.fields)
    heads = field_known_by(trial, fields, "num_attention_heads")
    wide = field_known_by(trial, fields, "hidden_size")
    if heads is None or wide is None or time.monotonic() > search.until:
        return []
    case = dataclasses.replace(search.case, fields={**fields, heads: 3, wide: 15})
    pair = prepare(trial, case)
    spots = compare(trial, pair, case.fields, pair.batch.tokens).spots
    spot = next((spot for spot in spots if spot.name == spot_name and spot.original is not None), None)
    if spot is None or spot.original is None:
        return []
    module = pair.original.get_submodule(spot.original.path)
    fits = functools.partial(explains, actual=spot.output[0], error=spot.error_out, bound=search.bound)
    return [
        name
        for name in names
        if fits(_run(module, spot.original, rule=operations.scores_scaled(SCALES[name](5, 15)), changed={}))
    ]


# --- a place that is given something else, or whose parts agree ---


def _of_sum(
    search: Search, comparison: Comparison, spot: Spot, actual: torch.Tensor, expected: torch.Tensor, subject: str
) -> Iterator[str]:
    """Sums of what passed in the original before this place: something is missing, doubled, scaled, or instead."""
    error = distance(actual, expected)
    parts = _passed(comparison, spot, expected)
    fits = functools.partial(explains, actual=actual, error=error, bound=search.bound)
    for name, part in parts.items():
        if fits(expected - part):
            yield f"{subject} lacks {name}"
    for name, part in parts.items():
        if fits(expected + part):
            yield f"{subject} has {name} once too often{_of_width(2.0, expected.shape[-1])}"
    whole = next((name for name, part in parts.items() if torch.equal(part, expected)), None)
    instead = f" instead of {whole}" if whole else ""
    for name, part in parts.items():
        if fits(part):
            yield f"{subject} is {name}{instead}"
    for name, part in parts.items():
        factor = factor_between(actual - expected, part)
        if factor is not None and fits(expected + part * factor):
            # The original's own share of this part, which is what the port's is measured by.
            if _is_summand(expected, part, parts):
                yield f"{subject} has {number(1 + factor)}x {name}{_of_width(1 + factor, expected.shape[-1])}"
            else:
                yield f"{subject} has {number(factor)}x {name} added"
    words = relation_of_outputs(actual, expected, error=error, bound=search.bound)
    if words is not None:
        yield f"{subject} {words}"


def _of_width(factor: float, width: int) -> str:
    """What a factor is in terms of the width, for the end of a sentence."""
    names = {"the root of the width": width**0.5, "one over the root of the width": width**-0.5}
    fitting = [name for name, value in names.items() if math.isclose(factor, value, rel_tol=1e-9)]
    return f" ({number(factor)} is {fitting[0]} {width})" if fitting and width > 1 else ""


def _is_summand(expected: torch.Tensor, part: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> bool:
    """Whether the original's tensor is this part, or this part and another."""
    rest = expected - part
    return not bool((rest != 0).any()) or any(distance(other, rest) <= 1e-12 for other in parts.values())


def _passed(comparison: Comparison, spot: Spot, like: torch.Tensor) -> dict[str, torch.Tensor]:
    """What modules of the original were given and gave before a place was done, of its shape, by name."""
    names = {other.original.path: other.name for other in comparison.spots if other.original is not None}
    found: dict[str, torch.Tensor] = {}
    calls = []
    for call in comparison.original:
        if spot.original is not None and call is spot.original and not _inner(comparison, spot):
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


def _before(search: Search, spot: Spot) -> list[str]:
    """Names of the taps that data passes before a place."""
    names = [tap.name for tap in _taps(search)]
    return names[: names.index(spot.name)] if spot.name in names else names


def _taps(search: Search) -> Sequence[Tap]:
    return search.trial.family.taps(search.case.fields) if search.trial.family.taps is not None else ()


def _of_order(search: Search, comparison: Comparison, spot: Spot, suspects: Iterable[str]) -> Iterator[str]:
    """Modules that the port skips or exchanges, tried in the original."""
    original = search.pair.original
    whole = {call.path: call for call in reversed(comparison.original)}
    paths = {tap.name: tap.original for tap in _taps(search) if tap.original in whole}
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


def _of_turns(comparison: Comparison) -> Iterator[str]:
    """Modules that run in another order than in the original."""
    order_in_port = [call.path for call in comparison.port]
    known = [(other.name, other.port.path) for other in comparison.spots if other.port is not None]
    for (earlier, path), (later, after) in itertools.pairwise(known):
        nested = path.startswith(after + ".")
        if not nested and order_in_port.index(after) < order_in_port.index(path):
            yield f"the port runs {later} before {earlier}"


def _at(search: Search, spot: Spot) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What the original gives a place, and what the place returns, in a run of the whole original."""
    tokens = comparison_tokens(search)
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


def _of_embeddings(search: Search, spot: Spot) -> Iterator[str]:
    tokens = comparison_tokens(search)
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


def _of_logits(search: Search, comparison: Comparison, spot: Spot) -> Iterator[str]:
    actual, expected = spot.output
    words = relation_of_outputs(actual, expected, error=spot.error_out, bound=search.bound)
    if words is not None:
        factor = factor_between(actual, expected) if "x the" in words else None
        yield f"the port's tensor {words}" + (_of_width(factor, _width(comparison)) if factor else "")
    if len(comparison.spots) > 1:
        return
    # No module of the port could be paired: the same what-ifs with the whole original.
    original = search.pair.original
    tokens = comparison_tokens(search)
    call = Call(path="", args=(tokens, torch.zeros_like(tokens)), kwargs={}, inputs=[])
    fits = functools.partial(explains, actual=spot.output[0], error=spot.error_out, bound=search.bound)

    def run(rule: operations.Rule | None = None, **changed: torch.Tensor) -> torch.Tensor | None:
        return _run_whole(search, call.args[0], rule=rule, changed=changed)

    yield from _what_ifs(search, spot.name, original, run, fits, *spot.output)


def _width(comparison: Comparison) -> int:
    """The number of channels that the last module was given; 1 where that cannot be told."""
    given = [call.inputs[0].shape[-1] for call in comparison.original if call.inputs]
    return int(given[-1]) if given else 1


def _run_whole(
    search: Search, tokens: torch.Tensor, *, rule: operations.Rule | None, changed: Mapping[str, torch.Tensor]
) -> torch.Tensor | None:
    original = search.pair.original
    with operations.Rewritten(rule) if rule is not None else contextlib.nullcontext():
        try:
            with torch.nn.utils.stateless._reparametrize_module(original, dict(changed)):
                return run_original(search.trial, original, tokens, torch.zeros_like(tokens))["logits"]
        except (RuntimeError, TypeError, ValueError, IndexError):
            return None
