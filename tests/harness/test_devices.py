# SPDX-License-Identifier: Apache-2.0
"""Frameworks and devices that may not be here: what runs on them, skipped with the reason where they are absent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness import check_parity
from harness.backends import BACKENDS, unavailable
from harness.ports import read_ports

REPOSITORY = Path(__file__).parents[2]


def needs(backend: str) -> None:
    reason = unavailable(backend)
    if reason:
        pytest.skip(reason)


def test_every_backend_is_here_or_says_why_not() -> None:
    reasons = {name: unavailable(name) for name in BACKENDS}
    assert reasons["torch-cpu"] is None
    assert all(reason is None or reason for reason in reasons.values())


@pytest.mark.mlx
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool]
)
def test_tensors_reach_mlx_and_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    needs("mlx-cpu")
    from harness.backends import mlx

    values = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    tensor = (values > 0) if dtype == torch.bool else values.to(dtype)
    again = mlx.to_tensor(mlx.to_array(tensor.T))
    assert again.dtype == dtype
    assert torch.equal(again, tensor.T)


@pytest.mark.mlx
def test_mlx_names_its_device() -> None:
    needs("mlx-cpu")
    from harness.backends import mlx

    assert mlx.device_name() in ("Metal", "CUDA", "CPU")


@pytest.mark.cuda
def test_the_gate_holds_on_a_cuda_device() -> None:
    needs("torch-cuda")
    results = check_parity(read_ports(REPOSITORY)[0], backends=["torch-cuda"])
    assert [result.reason for result in results if result.status not in ("passed", "skipped")] == []
    assert sum(result.status == "passed" for result in results) > 30
