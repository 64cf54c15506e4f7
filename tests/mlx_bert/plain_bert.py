# SPDX-License-Identifier: Apache-2.0
"""A BERT as people write one in MLX: plain modules under names of their own, a function that loads, nothing beside."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

ACTIVATIONS = {"gelu": nn.gelu, "relu": nn.relu, "gelu_new": nn.gelu_approx, "silu": nn.silu}

NAMES = (
    ("embeddings.word_embeddings", "words"),
    ("embeddings.position_embeddings", "positions"),
    ("embeddings.token_type_embeddings", "types"),
    ("embeddings.LayerNorm", "norm"),
    ("encoder.layer", "layers"),
    ("attention.self.query", "attention.query"),
    ("attention.self.key", "attention.key"),
    ("attention.self.value", "attention.value"),
    ("attention.output.dense", "attention.out"),
    ("attention.output.LayerNorm", "norm1"),
    ("intermediate.dense", "up"),
    ("output.dense", "down"),
    ("output.LayerNorm", "norm2"),
    ("pooler.dense", "pooler"),
)


@dataclass
class Config:
    """What config.json says, without the rest of it."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    initializer_range: float = 0.02
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1


@dataclass
class Output:
    """What a call gives."""

    last_hidden_state: mx.array
    pooler_output: mx.array


class Attention(nn.Module):
    """Scores, a mask that is added, a softmax."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        for name in ("query", "key", "value", "out"):
            setattr(self, name, nn.Linear(config.hidden_size, config.hidden_size))

    def __call__(self, hidden: mx.array, mask: mx.array | None) -> mx.array:
        rows, tokens, width = hidden.shape
        split = (rows, tokens, self.heads, width // self.heads)
        parts = (self.query, self.key, self.value)
        query, key, value = (part(hidden).reshape(split).transpose(0, 2, 1, 3) for part in parts)
        scores = query @ key.transpose(0, 1, 3, 2) / math.sqrt(split[-1])
        scores = scores if mask is None else scores + mask
        mixed = mx.softmax(scores, axis=-1, precise=True) @ value
        return self.out(mixed.transpose(0, 2, 1, 3).reshape(rows, tokens, width))


class Layer(nn.Module):
    """Attention and a feed-forward network."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.activation = ACTIVATIONS[config.hidden_act]

    def __call__(self, hidden: mx.array, mask: mx.array | None) -> mx.array:
        hidden = self.norm1(hidden + self.attention(hidden, mask))
        return self.norm2(hidden + self.down(self.activation(self.up(hidden))))


class Bert(nn.Module):
    """The whole model."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.types = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = [Layer(config) for _ in range(config.num_hidden_layers)]
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)

    def __call__(
        self, input_ids: mx.array, attention_mask: mx.array | None = None, token_type_ids: mx.array | None = None
    ) -> Output:
        types = mx.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        hidden = self.words(input_ids) + self.positions(mx.arange(input_ids.shape[1])) + self.types(types)
        hidden, mask = self.norm(hidden), None
        if attention_mask is not None:
            dropped = attention_mask[:, None, None, :] == 0
            mask = mx.where(dropped, mx.array(-1e4, dtype=hidden.dtype), mx.array(0, dtype=hidden.dtype))
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return Output(hidden, mx.tanh(self.pooler(hidden[:, 0])))


def load(directory: str) -> Bert:
    """The model of a directory of transformers."""
    said = json.loads((Path(directory) / "config.json").read_text())
    known: dict[str, Any] = {field.name: said[field.name] for field in fields(Config) if field.name in said}
    model = Bert(Config(**known))
    named = []
    for key, tensor in mx.load(str(Path(directory) / "model.safetensors")).items():
        for theirs, own in NAMES:
            key = key.replace(theirs, own)
        named.append((key, tensor))
    model.load_weights(named, strict=True)
    return model.eval()
