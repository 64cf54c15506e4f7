# SPDX-License-Identifier: Apache-2.0
"""That a live model is left as it was: by saving it, by exporting it, by generating with it."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch

from harness.errors import Mismatch

WRITTEN_BY_SAVING = {"_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"}
"""Fields of a configuration that the library itself sets when it saves."""


@contextlib.contextmanager
def untouched(model: torch.nn.Module, by: str, *, besides: Collection[str] = ()) -> Iterator[None]:
    """Raises Mismatch, which names `by`, when a model is another one after what is done inside.

    That is: values or dtypes of its tensors, training or evaluation mode of a module, fields of its configuration or
    generation settings but those of `besides`.
    """
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = _modes(model)
    settings = _settings(model, besides)
    yield
    for name, tensor in model.state_dict().items():
        if tensor.dtype != tensors[name].dtype:
            raise Mismatch(f"{by} turns the live model's {name} from {tensors[name].dtype} to {tensor.dtype}")
        if not torch.equal(tensor, tensors[name]):
            raise Mismatch(f"{by} changes the live model's {name}")
    for name, training in _modes(model).items():
        if training != modes[name]:
            now = "training" if training else "evaluation"
            raise Mismatch(f"{by} switches the live {name or 'model'} to {now} mode for good")
    for place, value in _settings(model, besides).items():
        if place in settings and settings[place] != value:
            raise Mismatch(f"{by} changes the live model's {place} from {settings[place]!r} to {value!r}")


def _modes(model: torch.nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def _settings(model: Any, besides: Collection[str]) -> dict[str, Any]:
    return {
        f"{holder}.{name}": value
        for holder in ("config", "generation_config")
        if hasattr(getattr(model, holder, None), "to_dict")
        for name, value in getattr(model, holder).to_dict().items()
        if name not in besides
    }
