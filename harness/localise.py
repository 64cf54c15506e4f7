# SPDX-License-Identifier: Apache-2.0
"""Where a difference begins: original and port run side by side, compared at the family's taps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from harness.cases import Case
from harness.numerics import SEMANTICS_BOUND, relative_error
from harness.routes import main_route
from harness.trial import Pair, Trial, port_logits, prepare, run_original


def compare_taps(trial: Trial, case: Case, pair: Pair) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """(tap, port's output, original's output) at every tap both models have, in the order data passes them."""
    if trial.family.taps is None:
        return []
    taps = trial.family.taps(case.fields)
    names = {name for name, _ in pair.port.named_modules()}
    present = [tap for tap in taps if tap.port in names]
    with Recorder(pair.original, {tap.name: tap.original for tap in present}) as theirs:
        run_original(trial, pair.original, pair.batch.tokens, pair.batch.targets)
    with Recorder(pair.port, {tap.name: tap.port for tap in present}) as ours:
        port_logits(trial, pair.port, pair.batch.tokens)
    seen = [tap.name for tap in present if tap.name in ours.outputs and tap.name in theirs.outputs]
    return [(name, ours.outputs[name], theirs.outputs[name]) for name in seen]


def first_divergence(trial: Trial, case: Case) -> str | None:
    """The first tap whose output differs, for the case without padding; None when all agree or it cannot be told."""
    if trial.dtype != "float64":
        return None  # rounding differs everywhere; only in float64 does a difference have a first place
    here = dataclasses.replace(trial, route=main_route(trial.port))  # modules can be watched in this process alone
    try:
        found = compare_taps(here, case, prepare(here, case))
    except Exception:  # the failure is reported already; where it begins is a courtesy
        return None
    for tap, ours, theirs in found:
        if ours.shape != theirs.shape or not relative_error(ours, theirs) <= SEMANTICS_BOUND:
            return tap
    return None


class Recorder:
    """Keeps, while entered, the output of submodules by name: a tensor, or the first one of a tuple, on the CPU."""

    def __init__(self, module: torch.nn.Module, places: Mapping[str, str]) -> None:
        self.outputs: dict[str, torch.Tensor] = {}
        self._hooks: list[Any] = []
        self._module = module
        self._places = places

    def __enter__(self) -> Recorder:
        for name, path in self._places.items():
            self._hooks.append(self._module.get_submodule(path).register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, name: str) -> Any:
        def keep(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if isinstance(tensor, torch.Tensor):
                self.outputs[name] = tensor.detach().cpu()

        return keep
