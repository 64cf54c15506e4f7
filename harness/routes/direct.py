# SPDX-License-Identifier: Apache-2.0
"""Route `direct`: the port is built from its configuration and given the original's tensors by name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from harness.errors import Mismatch, Skip
from harness.trial import Trial, port_class, port_config

if TYPE_CHECKING:
    from harness.cases import Case


def carry(trial: Trial, case: Case, original: torch.nn.Module) -> torch.nn.Module:
    """The port with the original's tensors, in the original's dtype."""
    model: torch.nn.Module = port_class(trial)(port_config(trial, case.fields))
    dtype = next(original.parameters()).dtype
    model = model.to(dtype)
    load_tensors(trial, model, original)
    return model.eval()


def load_tensors(trial: Trial, model: torch.nn.Module, original: torch.nn.Module) -> None:
    """Loads every source tensor into its target. Raises Mismatch for one left over, one missing, or another shape.

    A buffer of the original, such as a table of ones that masks, needs no place. A port whose `load` is not state_dict
    may have names of its own: then the route is skipped.
    """
    if getattr(model, "_load_state_dict_pre_hooks", None):
        with contextlib.suppress(RuntimeError, KeyError):  # then by name, to say what has no place
            model.load_state_dict(original.state_dict())  # a port may translate names itself
            return
    problem = fill(model, original, trial.family.port_key)
    if problem and trial.port.loader != "state_dict":
        raise Skip(f"the port's tensors have other names or shapes; its own loader brings them ({trial.port.load})")
    if problem:
        raise Mismatch(problem)


def fill(model: torch.nn.Module, original: torch.nn.Module, port_key: Callable[[str], str]) -> str | None:
    """Loads every tensor of the original into the model's of that name, or says which has no place or shape."""
    trained = {name for name, _ in original.named_parameters(remove_duplicate=False)}
    named = {port_key(key): (key, tensor) for key, tensor in original.state_dict().items()}
    places = set(model.state_dict())
    renamed = {name: tensor for name, (key, tensor) in named.items() if key in trained or name in places}
    target = model.state_dict()
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if left := sorted(set(renamed) - set(target)):
        return f"the port has no tensor named {left[0]} ({len(left)} of the original's tensors have no place)"
    if missing := sorted((set(target) & parameters) - set(renamed)):
        return f"nothing of the original fills the port's {missing[0]} ({len(missing)} tensors stay as they were)"
    if wrong := [name for name in renamed if renamed[name].shape != target[name].shape]:
        name = wrong[0]
        return f"{name} has shape {tuple(target[name].shape)} in the port, {tuple(renamed[name].shape)} in the original"
    model.load_state_dict(renamed, strict=False)
    return None
