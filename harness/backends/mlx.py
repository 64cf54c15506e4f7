# SPDX-License-Identifier: Apache-2.0
"""MLX on its CPU or GPU (Metal or CUDA): availability, and arrays to and from torch tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx

if TYPE_CHECKING:
    import torch


def unavailable(device: str) -> str | None:
    """Why an MLX device cannot be used here; None when it can."""
    if device == "gpu" and not mx.is_available(mx.Device(mx.gpu)):
        return "there is no MLX GPU (Metal or CUDA)"
    return None


def device_name() -> str:
    """The device MLX runs on by default: Metal, CUDA or CPU."""
    if mx.default_device() == mx.Device(mx.cpu):
        return "CPU"
    return "Metal" if mx.metal.is_available() else "CUDA"


def to_array(tensor: torch.Tensor) -> Any:
    """An MLX array with a CPU tensor's values and dtype; bfloat16 travels through float32, which holds it exactly.

    A copy: MLX may write its results where its inputs lie.
    """
    import torch

    host = tensor.detach().cpu().contiguous()
    if host.dtype == torch.bfloat16:
        return mx.array(host.float().numpy()).astype(mx.bfloat16)
    if host.dtype == torch.float64:
        with mx.stream(mx.cpu):
            return mx.array(host.numpy(), dtype=mx.float64)
    return mx.array(host.numpy())


def to_tensor(array: Any) -> torch.Tensor:
    """A CPU tensor with an MLX array's values and dtype; it shares the array's memory where NumPy knows the dtype."""
    import numpy
    import torch

    if array.dtype == mx.bfloat16:
        return torch.from_numpy(numpy.array(array.astype(mx.float32))).bfloat16()
    return torch.from_numpy(numpy.asarray(array, order="C"))
