# SPDX-License-Identifier: Apache-2.0
"""Pairs of a transformers model in float64 and a BertCore with the same sensitising weights."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import torch
import transformers
from mlx.utils import tree_flatten

from harness.cases.weights import sensitising_state
from reference_models.mlx_bert.config import BertConfig
from reference_models.mlx_bert.core import BertCore

MODEL_TYPES = ("bert", "distilbert", "roberta")
VOCABULARY, MAXIMUM = 64, 16
_CLASSES = {
    "bert": (transformers.BertConfig, transformers.BertModel),
    "distilbert": (transformers.DistilBertConfig, transformers.DistilBertModel),
    "roberta": (transformers.RobertaConfig, transformers.RobertaModel),
}
_DISTILBERT = {
    "transformer.layer": "encoder.layer",
    "attention.q_lin": "attention.self.query",
    "attention.k_lin": "attention.self.key",
    "attention.v_lin": "attention.self.value",
    "attention.out_lin": "attention.output.dense",
    "sa_layer_norm": "attention.output.LayerNorm",
    "ffn.lin1": "intermediate.dense",
    "ffn.lin2": "output.dense",
    "output_layer_norm": "output.LayerNorm",
}


def torch_model(model_type: str, **fields: Any) -> Any:
    """A small transformers model in float64 and evaluation mode, with eager attention."""
    config_class, model_class = _CLASSES[model_type]
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "max_position_embeddings": MAXIMUM, "hidden_size": 32}
    sizes |= {"num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"hidden_dim" if model_type == "distilbert" else "intermediate_size": 40}
    model = model_class(config_class(**(sizes | fields), attn_implementation="eager")).double().eval()
    model.load_state_dict(sensitising_state(model, gains={}, seed=7))
    return model


def core_name(name: str) -> str:
    """The parameter of BertCore that a key of any of the three models is."""
    for theirs, ours in _DISTILBERT.items():
        name = name.replace(theirs, ours)
    return name


def core_of(model: Any, dtype: mx.Dtype = mx.float32) -> BertCore:
    """The BertCore with the weights of a transformers model."""
    core = BertCore(BertConfig.from_hf_config(model.config.to_dict()))
    state = [(core_name(name), to_mlx(tensor, dtype)) for name, tensor in model.named_parameters()]
    core.load_weights(state, strict=True)
    return core


def to_mlx(tensor: torch.Tensor, dtype: mx.Dtype | None = None) -> mx.array:
    values = tensor.detach().numpy()
    return mx.array(values, dtype=mx.float64).astype(dtype) if dtype is not None else mx.array(values)


def to_torch(array: mx.array) -> torch.Tensor:
    wide = array.astype(mx.float32) if array.dtype in (mx.float16, mx.bfloat16) else array
    return torch.from_numpy(np.array(wide)).double()


def relative(ours: mx.array, theirs: torch.Tensor) -> float:
    """The largest difference, relative to the largest value of the truth; NaN where ours is not finite."""
    assert tuple(ours.shape) == tuple(theirs.shape)
    return float((to_torch(ours) - theirs).abs().max() / theirs.abs().max())


def parameter_names(core: BertCore) -> set[str]:
    return {name for name, _ in tree_flatten(core.parameters())}
