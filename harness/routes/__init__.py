# SPDX-License-Identifier: Apache-2.0
"""How weights travel from the original to the port: one module for each route."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from harness.cases import Case
    from harness.ports import Port
    from harness.trial import Trial

ROUTES = ("direct", "checkpoint", "pretrained", "remote_code", "hub")

_MAIN = {"state_dict": "direct", "checkpoint": "checkpoint", "pretrained": "pretrained", "command": "checkpoint"}


def main_route(port: Port) -> str:
    """The route of a port's own `load`: how weights travel where a check does not ask for another way."""
    return _MAIN[port.loader]


def carry(trial: Trial, case: Case, original: torch.nn.Module) -> torch.nn.Module:
    """The port with the original's weights, brought by the trial's route into this process; dtype as the route gives.

    Raises Mismatch where weights have no place, and Skip where the route cannot be for this port.
    """
    module = importlib.import_module(f"harness.routes.{trial.route}")
    model: torch.nn.Module = module.carry(trial, case, original)
    return model


def logits_by(trial: Trial, case: Case, original: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """The port's logits for token ids (rows, tokens), computed where the route ends: here, or in a fresh process."""
    from harness.trial import place, port_logits

    module = importlib.import_module(f"harness.routes.{trial.route}")
    if hasattr(module, "carry"):
        return port_logits(trial, place(trial, module.carry(trial, case, original)), tokens)
    logits: torch.Tensor = module.logits(trial, case, original, tokens)
    return logits
