# SPDX-License-Identifier: Apache-2.0
"""A quantised model has MLX's own numbers, says that it is one, and its weights go into another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="needs MLX: pip install 'parity-harness[mlx]'")

import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from reference_models.mlx_bert.quantisation import Quantisation, make_places, quantize, settings  # noqa: E402

pytestmark = pytest.mark.mlx


@dataclass(frozen=True)
class Config:
    name: str = "kept"
    quantization: Any = None


class Model(nn.Module):
    """Each kind of layer that BERT has, and one whose rows are no multiple of 32."""

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(11, 64)
        self.layers = [nn.Linear(64, 96), nn.Linear(96, 40), nn.Linear(40, 3, bias=False)]
        self.norm = nn.LayerNorm(64)
        self.config = config

    def __call__(self, ids: Any) -> Any:
        hidden = self.norm(self.embeddings(ids))
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def model_of(seed: int, dtype: Any = mx.float32) -> Model:
    mx.random.seed(seed)
    model = Model(Config())
    model.set_dtype(dtype)
    return model


def parameters(model: Any) -> dict[str, Any]:
    return dict(tree_flatten(model.parameters()))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 32), (4, 64), (5, 32), (6, 32), (8, 32)])
def test_the_weights_are_mlxs_and_the_output_is_that_of_the_weights_they_stand_for(
    bits: int, group_size: int, dtype: Any
) -> None:
    plain = parameters(model_of(0, dtype))
    model = model_of(0, dtype)
    assert quantize(model, bits=bits, group_size=group_size) is model
    found = parameters(model)
    wide = {"embeddings": 64, "layers.0": 64, "layers.1": 96}
    quantised = {path for path, width in wide.items() if width % group_size == 0}
    assert {name.removesuffix(".scales") for name in found if name.endswith(".scales")} == quantised
    stands_for = dict(plain)
    for path in quantised:
        parts = mx.quantize(plain[f"{path}.weight"], bits=bits, group_size=group_size)
        for part, tail in zip(parts, ("weight", "scales", "biases"), strict=True):
            assert mx.array_equal(found.pop(f"{path}.{tail}"), part), path
        stands_for[f"{path}.weight"] = mx.dequantize(*parts, bits=bits, group_size=group_size)
    assert all(mx.array_equal(array, plain[name]) for name, array in found.items())
    if dtype == mx.float32:
        reference = model_of(1)
        reference.load_weights(list(stands_for.items()))
        ids = mx.array([[1, 2, 10]])
        np.testing.assert_allclose(np.asarray(model(ids)), np.asarray(reference(ids)), atol=2e-5)


def test_the_configuration_says_it_and_keeps_the_rest() -> None:
    model = quantize(model_of(0), bits=8, group_size=32)
    assert model.config == Config(quantization={"bits": 8, "group_size": 32})
    assert settings(model.config.quantization) == Quantisation(bits=8, group_size=32)
    assert quantize(Model()).config is None


def test_the_weights_go_into_another_model_that_was_made_ready() -> None:
    model = quantize(model_of(0), bits=4, group_size=32)
    found = parameters(model)
    other = model_of(1)
    assert make_places(other, found, model.config.quantization) is other
    other.load_weights(list(found.items()))
    ids = mx.array([[3, 4]])
    assert mx.array_equal(other(ids), model(ids))
    assert sorted(parameters(other)) == sorted(found)


def test_a_model_has_no_random_layers_made_ready_where_nothing_is_quantised() -> None:
    model = model_of(0)
    make_places(model, parameters(model), {"bits": 4, "group_size": 32})
    assert sorted(parameters(model)) == sorted(parameters(model_of(0)))


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"bits": 7}, "quantization has bits 7; expected one of"),
        ({"bits": 4.0}, "quantization has bits 4.0; expected one of"),
        ({"bits": True}, "quantization has bits True; expected one of"),
        ({"group_size": 16}, "quantization has group_size 16; expected one of"),
    ],
)
def test_what_mlx_cannot_do_is_refused(options: dict[str, Any], fault: str) -> None:
    model = model_of(0)
    with pytest.raises(ValueError, match=fault):
        quantize(model, **options)
    assert sorted(parameters(model)) == sorted(parameters(model_of(0))) and model.config == Config()


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({}, "has bits None"),
        ({"bits": 4}, "has group_size None"),
        ({"bits": 4, "group_size": 32, "mode": "mxfp4"}, "is of mode 'mxfp4'; expected 'affine'"),
        ({"bits": 4, "group_size": 32, "encoder.layer.0": False}, r"has \['encoder.layer.0'\]; expected"),
    ],
)
def test_a_quantization_that_is_not_supported_is_refused(given: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        settings(given)


def test_a_model_that_cannot_be_quantised_is_refused() -> None:
    with pytest.raises(ValueError, match="quantised already"):
        quantize(quantize(model_of(0)))
    with pytest.raises(ValueError, match="no layer has rows of a multiple of group_size 128"):
        quantize(model_of(0), group_size=128)
    for other in (None, "model", Config()):
        with pytest.raises(TypeError, match=f"model is of type {type(other).__name__}; expected an mlx.nn.Module"):
            quantize(other)
    with mx.stream(mx.cpu), pytest.raises(ValueError, match="the weights are float64, which MLX"):
        quantize(model_of(0, mx.float64))
