# SPDX-License-Identifier: Apache-2.0
"""Batches of token ids and targets, and the paddings that are put around them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Side = Literal["left", "right", "interior"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Token ids and targets: int64, both (rows, tokens). `targets[t]` is the token after `tokens[t]`."""

    tokens: torch.Tensor
    targets: torch.Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Padded:
    """A batch with padding. `tokens` (rows, width) int64; `mask` (rows, width) bool, True where a token is real."""

    tokens: torch.Tensor
    mask: torch.Tensor


def draw_batch(*, rows: int, tokens: int, vocabulary: int, seed: int) -> Batch:
    """Uniform token ids: one stream of `tokens + 1` ids a row, so that targets are the tokens shifted by one."""
    import torch

    generator = torch.Generator().manual_seed(seed + 1)
    stream = torch.randint(0, vocabulary, (rows, tokens + 1), generator=generator)
    return Batch(tokens=stream[:, :-1].contiguous(), targets=stream[:, 1:].contiguous())


def pad(
    tokens: torch.Tensor, *, side: Side, seed: int, vocabulary: int, width: int, pad_id: int | None = None
) -> Padded:
    """Puts a different number of pad positions (random ids) into every row of `tokens`, up to `width` in all.

    pad_id: what stands at pad positions instead of random ids.

    tokens: (rows, n) int64 with n <= width. Every row keeps at least one real token, its first ones; a row may keep
    all. `interior` leaves the first and the last real token at the ends of the row.
    """
    import torch

    generator = torch.Generator().manual_seed(seed + 2)
    rows, count = tokens.shape
    padded = torch.randint(0, vocabulary, (rows, width), generator=generator)
    if pad_id is not None:
        padded.fill_(pad_id)
    mask = torch.zeros(rows, width, dtype=torch.bool)
    for row in range(rows):
        most = min(count, width - 1) if row == 0 and width > 1 else min(count, width)
        real = int(torch.randint(1, most + 1, (1,), generator=generator)) if row else most
        places = _places(side, real, width, generator)
        padded[row, places] = tokens[row, :real]
        mask[row, places] = True
    return Padded(tokens=padded, mask=mask)


def _places(side: Side, real: int, width: int, generator: torch.Generator) -> torch.Tensor:
    import torch

    if side == "right":
        return torch.arange(real)
    if side == "left":
        return torch.arange(width - real, width)
    if real < 3:
        return torch.tensor([0, width - 1][:real])
    inner = torch.randperm(width - 2, generator=generator)[: real - 2].sort().values + 1
    return torch.cat([torch.tensor([0]), inner, torch.tensor([width - 1])])
