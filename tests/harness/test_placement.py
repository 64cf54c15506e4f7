# SPDX-License-Identifier: Apache-2.0
"""A tensor made without a device fails on a GPU; it has to be seen where there is none, and nothing else with it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from harness.placement import misplaced

X = torch.zeros(2, 6)
TABLE = torch.nn.Embedding(8, 4)


@pytest.mark.parametrize(
    "run",
    [
        lambda: X + 1,
        lambda: X + torch.arange(6, device=X.device),
        lambda: X + torch.arange(6).to(X.device),
        lambda: X + torch.arange(6).to(X),
        lambda: X + torch.tensor(3.0),
        lambda: X + torch.ones_like(X),
        lambda: X.masked_fill(X == 0, float("-inf")),
        lambda: torch.arange(6) + torch.ones(6),
        lambda: X.expand_as(torch.ones(2, 6)),
        lambda: TABLE(torch.arange(3, device=TABLE.weight.device)),
    ],
)
def test_what_runs_on_every_device_is_not_found(run: Callable[[], object]) -> None:
    assert misplaced(run) is None


@pytest.mark.parametrize(
    ("run", "found"),
    [
        (lambda: X + torch.arange(6), "add of int64[6] and float32[2, 6]"),
        (lambda: X + torch.arange(6).float()[None], "add of float32[1, 6] and float32[2, 6]"),
        (lambda: X + torch.arange(6).to(torch.float64), "add of float64[6] and float32[2, 6]"),
        (lambda: TABLE(torch.arange(3)), "embedding of int64[3] and float32[8, 4]"),
        (lambda: X.masked_fill(torch.ones(6).bool(), 0), "masked_fill of bool[6] and float32[2, 6]"),
        (lambda: torch.cat([X, torch.zeros(1, 6)]), "cat of float32[1, 6] and float32[2, 6]"),
    ],
)
def test_a_tensor_without_a_device_is_followed_to_where_it_meets_another(run: Callable[[], object], found: str) -> None:
    assert misplaced(run) == found
