# SPDX-License-Identifier: Apache-2.0
"""Sensitising weights: random values under which every tensor of a model shows in its output."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

GAIN_SPREAD = 0.2
BIAS_SPREAD = 0.25


def sensitising_state(module: torch.nn.Module, *, gains: Mapping[str, float], seed: int) -> dict[str, torch.Tensor]:
    """A state dict for `module`: float64 tensors of its keys and shapes, every value exact in float32.

    Vectors named `*bias` are 0.25 N(0, 1), other vectors 1 + 0.2 N(0, 1), matrices and higher N(0, 1) / sqrt(fan in)
    with the last axis as fan in, all times the first factor of `gains` (regular expression -> factor) that matches
    the key. Keys that share storage get one tensor. Buffers (masks, tables) keep their values.

    With the default initialisation instead (standard deviation 0.02, zero biases, unit gains) attention is uniform
    and a missing bias, an exchanged norm or a wrong activation hides below 1e-5.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    drawn: dict[int, torch.Tensor] = {}
    state: dict[str, torch.Tensor] = {}
    for key, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.nn.Parameter):
            state[key] = tensor.detach().clone()
            continue
        if id(tensor) not in drawn:
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
            factor = next((gain for pattern, gain in gains.items() if re.search(pattern, key)), 1.0)
            drawn[id(tensor)] = (_scaled(key, noise) * factor).double()
        state[key] = drawn[id(tensor)]
    return state


def _scaled(key: str, noise: torch.Tensor) -> torch.Tensor:
    if noise.ndim >= 2:
        return noise / math.sqrt(noise.shape[-1])
    return noise * BIAS_SPREAD if key.endswith("bias") else noise * GAIN_SPREAD + 1.0
