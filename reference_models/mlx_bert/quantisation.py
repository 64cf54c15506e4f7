# SPDX-License-Identifier: Apache-2.0
"""Stores a model's weights in a few bits each, and gives a model the places that such weights are loaded into."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class Quantisation:
    """How MLX stores a weight: `group_size` neighbours of a row share a scale and a bias."""

    bits: int
    group_size: int


def settings(quantization: Mapping[str, Any]) -> Quantisation:
    """Return what `quantization` of a config.json says.

    Raises ValueError for bits, a group size or a mode that is not supported, and for entries that are not known.
    """
    given = dict(quantization)
    mode, bits, group_size = given.pop("mode", "affine"), given.pop("bits", None), given.pop("group_size", None)
    if given:
        raise ValueError(f"quantization has {sorted(map(str, given))}; expected bits, group_size and mode alone")
    if mode != "affine":
        raise ValueError(f"quantization is of mode {mode!r}; expected 'affine'")
    if type(bits) is not int or bits not in BITS:
        raise ValueError(f"quantization has bits {bits!r}; expected one of {BITS}")
    if type(group_size) is not int or group_size not in GROUP_SIZES:
        raise ValueError(f"quantization has group_size {group_size!r}; expected one of {GROUP_SIZES}")
    return Quantisation(bits, group_size)


def quantize(model: Any, *, bits: int = 4, group_size: int = 64) -> Any:
    """Quantise the embeddings and dense layers of a model in place, and return it.

    Layers whose rows are no multiple of `group_size` stay as they are, and so do biases and LayerNorms. `config` of
    the model, where it has one, is replaced by one that says so.

    model: an mlx.nn.Module with float32, float16 or bfloat16 weights.

    Raises ValueError for bits or a group size that is not supported, a model that is quantised already, weights in
    float64, and a model no layer of which can be quantised; TypeError for what is no model.
    """
    import mlx.core as mx
    import mlx.nn as nn

    chosen = settings({"bits": bits, "group_size": group_size})
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is of type {type(model).__name__}; expected an mlx.nn.Module")
    layers = dict(model.named_modules())
    if any("scales" in layer for layer in layers.values()):
        raise ValueError("the model is quantised already; quantise the one that it was made from")
    paths = {
        path
        for path, layer in layers.items()
        if hasattr(layer, "to_quantized") and layer.weight.shape[-1] % group_size == 0
    }
    if not paths:
        raise ValueError(f"no layer has rows of a multiple of group_size {group_size}; expected one of {GROUP_SIZES}")
    if any(layers[path].weight.dtype == mx.float64 for path in paths):
        raise ValueError("the weights are float64, which MLX does not quantise; cast them to float32 first")
    nn.quantize(model, bits=bits, group_size=group_size, class_predicate=lambda path, _: path in paths)
    if getattr(model, "config", None) is not None:
        model.config = dataclasses.replace(model.config, quantization=dataclasses.asdict(chosen))
    return model


def make_places(model: Any, parameters: Iterable[str], quantization: Mapping[str, Any]) -> Any:
    """Make those layers quantised, in place, whose scales are among `parameters`, and return the model.

    What they hold afterwards is of no use until the tensors are loaded.

    Raises ValueError for a quantization that is not supported.
    """
    import mlx.nn as nn

    chosen = settings(quantization)
    paths = {name.removesuffix(".scales") for name in parameters if name.endswith(".scales")}
    nn.quantize(model, bits=chosen.bits, group_size=chosen.group_size, class_predicate=lambda path, _: path in paths)
    return model
