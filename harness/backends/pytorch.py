# SPDX-License-Identifier: Apache-2.0
"""PyTorch on a CPU, a CUDA device or Metal: dtypes, devices, settings, and what a forward pass computes in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from harness.backends.names import TORCH_SETTINGS
from harness.errors import Mismatch
from harness.ports import first_line

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "autocast": torch.float32,
}


def unavailable(device: str) -> str | None:
    """Why a torch device type cannot be used here; None when it can."""
    if device == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA device"
    if device == "mps" and not torch.backends.mps.is_available():
        return "there is no Metal device (torch.backends.mps)"
    return None


def device_of(backend: str) -> torch.device:
    """The torch device of a backend name such as `torch-cuda`; what goes to MLX is on the CPU before."""
    framework, _, device = backend.partition("-")
    return torch.device("cpu" if framework == "mlx" else device)


def settings() -> dict[str, Any]:
    """The settings that change numbers, as they are now; names as in `TORCH_SETTINGS`."""
    matmul = torch.backends.cuda.matmul
    return {
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        "allow_bf16_reduced_precision_reduction": matmul.allow_bf16_reduced_precision_reduction,
        "allow_fp16_reduced_precision_reduction": matmul.allow_fp16_reduced_precision_reduction,
        "threads": torch.get_num_threads(),
        "deterministic_algorithms": torch.get_deterministic_debug_mode(),
        "default_dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "default_device": str(torch.get_default_device()),
        "gradients": torch.is_grad_enabled(),
    }


def set_settings(values: Mapping[str, Any]) -> None:
    """Sets what `settings` gives."""
    matmul = torch.backends.cuda.matmul
    torch.set_float32_matmul_precision(values["float32_matmul_precision"])
    torch.backends.cudnn.allow_tf32 = values["cudnn_allow_tf32"]
    matmul.allow_bf16_reduced_precision_reduction = values["allow_bf16_reduced_precision_reduction"]
    matmul.allow_fp16_reduced_precision_reduction = values["allow_fp16_reduced_precision_reduction"]
    torch.set_num_threads(values["threads"])
    torch.set_deterministic_debug_mode(values["deterministic_algorithms"])
    torch.set_default_dtype(getattr(torch, values["default_dtype"]))
    if str(torch.get_default_device()) != values["default_device"]:
        torch.set_default_device(None if values["default_device"] == "cpu" else values["default_device"])
    torch.set_grad_enabled(values["gradients"])


@contextlib.contextmanager
def numeric_settings() -> Iterator[None]:
    """`TORCH_SETTINGS` inside; what was set before afterwards."""
    before = settings()
    set_settings(TORCH_SETTINGS)
    try:
        yield
    finally:
        set_settings(before)


@contextlib.contextmanager
def autocast(backend: str, dtype: str) -> Iterator[None]:
    """bfloat16 autocast when the dtype is `autocast`, nothing otherwise."""
    if dtype != "autocast":
        yield
        return
    with torch.autocast(device_type=device_of(backend).type, dtype=torch.bfloat16):
        yield


def epsilon(dtype: str) -> float:
    """Distance from 1 to the next number of a dtype; autocast computes in bfloat16."""
    return torch.finfo(torch.bfloat16 if dtype == "autocast" else DTYPES[dtype]).eps


@contextlib.contextmanager
def compiled(model: torch.nn.Module, *, whole: bool) -> Iterator[Any]:
    """A model as torch.compile traces it: in one graph where it is `whole`, with a backward pass, or in several.

    Raises Mismatch where torch cannot.
    """
    torch._dynamo.reset()
    try:
        # Of several graphs what is traced is the question, and tracing alone takes a third of the time.
        yield torch.compile(model, fullgraph=whole, backend="aot_eager" if whole else "eager")
    except torch._dynamo.exc.TorchDynamoException as error:
        call = "torch.compile(fullgraph=True)" if whole else "torch.compile"
        raise Mismatch(f"{call} fails: {first_line(error)}") from None
    finally:
        torch._dynamo.reset()


class _NarrowOperations(TorchDispatchMode):
    """Collects the operations that make narrower floats than float64 out of float64."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype in (torch.float32, torch.bfloat16, torch.float16):
            sources = [value for value in args if isinstance(value, torch.Tensor)]
            if result.numel() > 1 and any(source.dtype == torch.float64 for source in sources):
                self.seen.append(str(func))
        return result


def float32_inside(run: Callable[[], Any]) -> str | None:
    """The first operation of a float64 computation that narrows to float32 or less; None when there is none."""
    with _NarrowOperations() as operations:
        run()
    return operations.seen[0] if operations.seen else None
