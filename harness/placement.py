# SPDX-License-Identifier: Apache-2.0
"""Tensors that a model makes without saying where: they are on the CPU, and fail beside what is on another device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

_SHAPES = ("size", "dim", "numel", "expand_as", "view_as", "reshape_as", "__get__", "__len__")
"""Functions that only look at the shape of a second tensor."""


def misplaced(run: Callable[[], object]) -> str | None:
    """The first operation in `run` on a tensor that was made without a device and one that was given; None if there is
    none.

    A number alone may be anywhere. Seen are operations that Python calls, on any device.
    """
    placement = _Placement()
    with placement:
        run()
    return placement.found


class _Placement(TorchFunctionMode):
    """Follows tensors that were made without a device until they are moved or meet others."""

    def __init__(self) -> None:
        super().__init__()
        self.found: str | None = None
        self.astray: dict[int, torch.Tensor] = {}  # kept alive, so that no other takes its number

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if func in _device_constructors():
            if kwargs.get("device") is None and not any(True for _ in _tensors((args, kwargs))):
                self._mark(result)
            return result
        given = list(_tensors((args, kwargs)))
        astray = [tensor for tensor in given if id(tensor) in self.astray]
        if not astray:
            return result
        if _moves(name, args[1:], kwargs):
            for tensor in _tensors(result):
                self.astray.pop(id(tensor), None)
            return result
        others = [tensor for tensor in given if id(tensor) not in self.astray and tensor.ndim]
        if not others:
            self._mark(result)
        elif name not in _SHAPES and self.found is None:
            self.found = f"{name} of {_described(astray[0])} and {_described(others[0])}"
        return result

    def _mark(self, result: Any) -> None:
        for tensor in _tensors(result):
            if tensor.ndim:
                self.astray[id(tensor)] = tensor


def _moves(name: str, args: Any, kwargs: Any) -> bool:
    """Whether a call puts its first tensor where the caller wants it; `to` may change the dtype alone."""
    if name == "to":
        return "device" in kwargs or any(isinstance(each, str | int | torch.device | torch.Tensor) for each in args)
    return name in ("cpu", "cuda", "type_as")


def _described(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
