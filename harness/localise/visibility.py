# SPDX-License-Identifier: Apache-2.0
"""Which positions the logits of a position depend on, found by changing one token after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch

SEEN = 1e-9
"""A relative change of logits from which on a position is seen; below a thousandth of it, it is not."""

Run = Callable[[torch.Tensor], torch.Tensor]
"""Token ids (rows, tokens) -> logits (rows, tokens, vocabulary)."""


def visible(run: Run, tokens: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """(rows, tokens, tokens) float64: how much the logits at [row, i] change, over their size, with the token at j."""
    before = run(tokens).double()
    size = before.square().mean().sqrt().clamp(min=1e-300)
    rows, count = tokens.shape
    changes = torch.zeros(rows, count, count, dtype=torch.float64)
    for place in range(count):
        for step in (1, 2):
            changed = tokens.clone()
            changed[:, place] = (changed[:, place] + step) % vocabulary
            change = ((run(changed).double() - before).abs() / size).amax(dim=-1)
            changes[:, :, place] = torch.maximum(changes[:, :, place], change)
    return changes


def is_seen(changes: torch.Tensor) -> torch.Tensor:
    """Bool, of the same shape: what certainly has an influence."""
    return changes > SEEN


def is_unseen(changes: torch.Tensor) -> torch.Tensor:
    """Bool, of the same shape: what certainly has none."""
    return changes < SEEN * 1e-3


def listed(positions: list[int]) -> str:
    """Positions as a person says them: `position 3`, `positions 1, 4`, `positions 2 to 5`."""
    if len(positions) == 1:
        return f"position {positions[0]}"
    if positions == list(range(positions[0], positions[-1] + 1)) and len(positions) > 2:
        return f"positions {positions[0]} to {positions[-1]}"
    return f"positions {', '.join(map(str, positions[:-1]))} and {positions[-1]}"
