# SPDX-License-Identifier: Apache-2.0
"""The module in which a gradient is lost or changed on its way back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from harness.families import Tap
from harness.localise.finding import Divergence, Search, distance
from harness.localise.relations import factor_between, number
from harness.trial import call_port, copied, each_attention, outputs_of

CHECKS = ("training.gradients", "training.optimiser_steps", "backend.attention_gradients")


class _Passed:
    """What one module was given and gave, with their gradients once there are some."""

    def __init__(self) -> None:
        self.given: torch.Tensor | None = None
        self.gave: torch.Tensor | None = None


def find(search: Search) -> Divergence | None:
    """The last module whose output has the right gradient and whose input has not; None where there is none.

    The gradient is that of a fixed mixture of logits, so that the loss has no part in it.
    """
    if not search.check.startswith(CHECKS) or search.trial.family.taps is None:
        return None
    taps = search.trial.family.taps(search.case.fields)
    tokens = search.pair.batch.tokens
    original = copied(search.pair.original)
    places = [(tap.name, tap.original) for tap in taps]
    expected = _backward(
        original, places, lambda: search.trial.family.run_original(original, tokens, torch.zeros_like(tokens))["logits"]
    )
    port = copied(search.pair.port).train()
    places = [(tap.name, tap.port) for tap in taps]
    for attention in each_attention(port):
        actual = _backward(
            port, places, lambda: outputs_of(search.trial, call_port(search.trial, port, tokens))["logits"]
        )
        found = _first(search, taps, actual, expected)
        if found is not None:
            said = f"with {attention} attention, {found.sentence}" if attention == "eager" else found.sentence
            return Divergence(module=found.module, sentence=said)
    return None


def _backward(
    model: torch.nn.Module, places: Sequence[tuple[str, str]], logits_of: Callable[[], torch.Tensor]
) -> dict[str, _Passed]:
    """What passed the modules at `places` (name, path) in one run, after a backward pass."""
    modules = dict(model.named_modules())
    seen: dict[str, _Passed] = {}
    handles = []

    def keep(passed: _Passed, args: tuple[object, ...], kwargs: dict[str, object], value: object) -> None:
        floats = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.is_floating_point()]
        output = value[0] if isinstance(value, tuple) else value
        if not floats or not isinstance(output, torch.Tensor) or passed.gave is not None:
            return
        passed.given, passed.gave = floats[0], output
        for tensor in (floats[0], output):
            if tensor.requires_grad:
                tensor.retain_grad()

    for name, path in places:
        if path in modules:
            passed = seen.setdefault(name, _Passed())
            handles.append(
                modules[path].register_forward_hook(
                    lambda _module, args, kwargs, value, passed=passed: keep(passed, args, kwargs, value),
                    with_kwargs=True,
                )
            )
    try:
        with torch.enable_grad():
            logits = logits_of()
            generator = torch.Generator().manual_seed(0)
            weights = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
            (logits.cpu() * weights).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _first(
    search: Search, taps: Sequence[Tap], actual: dict[str, _Passed], expected: dict[str, _Passed]
) -> Divergence | None:
    for name, ours, theirs in _backwards(taps, actual, expected):
        after = distance(_gradient(ours.gave), _gradient(theirs.gave))
        before = distance(_gradient(ours.given), _gradient(theirs.given))
        if after <= search.bound and not before <= search.bound:
            said = f"{name} passes back another gradient (that of its output {after:.1e}, of its input {before:.1e})"
            return Divergence(module=name, sentence=said + _why(search, ours, theirs))
    return None


def _backwards(
    taps: Sequence[Tap], actual: dict[str, _Passed], expected: dict[str, _Passed]
) -> Iterator[tuple[str, _Passed, _Passed]]:
    """The taps, the last one first, a block behind its parts."""
    containers = [tap for tap in taps if any(other.original.startswith(tap.original + ".") for other in taps)]
    inner = [tap for tap in reversed(taps) if tap not in containers]
    for tap in (*inner, *reversed(containers)):
        if tap.name in actual and tap.name in expected and actual[tap.name].gave is not None:
            yield tap.name, actual[tap.name], expected[tap.name]


def _gradient(tensor: torch.Tensor | None) -> torch.Tensor | None:
    if tensor is None:
        return None
    return torch.zeros_like(tensor).cpu() if tensor.grad is None else tensor.grad.cpu()


def _why(search: Search, ours: _Passed, theirs: _Passed) -> str:
    given, right = _gradient(ours.given), _gradient(theirs.given)
    if given is None or right is None or given.shape != right.shape:
        return ""
    if not bool(given.any()):
        return ": none reaches its input"
    if not bool(given.isfinite().all()):
        return ": it is not finite"
    factor = factor_between(given, right)
    if factor is not None and distance(given, right * factor) <= search.bound:
        return f": it is {number(factor)}x the original's"
    return ""
