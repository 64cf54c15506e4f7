# SPDX-License-Identifier: Apache-2.0
"""A family of one's own, whole: the original, which configurations it has, and what a port of it calls things.

The original predicts a token from the mean of the embeddings so far. It stands here to have everything in one file; in
a file of its own it would leave torch out of collecting, as the model you already have does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from harness import Family, LossConvention, Tap


class Bag(nn.Module):
    """The original: the model that the weights were trained with, left as it is."""

    def __init__(self, vocab_size: int, width: int, depth: int, context: int) -> None:
        super().__init__()
        self.context = context
        self.embed = nn.Embedding(vocab_size, width)
        self.mlps = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.out = nn.Linear(width, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (rows, tokens, vocabulary) of tokens, int64 (rows, tokens)."""
        counts = torch.arange(1, tokens.shape[1] + 1, dtype=self.out.weight.dtype, device=tokens.device)
        x = self.embed(tokens).cumsum(1) / counts[:, None]
        for mlp in self.mlps:
            x = x + torch.tanh(mlp(x))
        return self.out(x)


def configurations() -> st.SearchStrategy[dict[str, Any]]:
    """The strategy: small configurations in the original's own fields; failures shrink to the smallest numbers."""
    sizes = {"vocab_size": (7, 40), "width": (4, 12), "depth": (1, 3), "context": (4, 16)}
    return st.fixed_dictionaries({field: st.integers(*bounds) for field, bounds in sizes.items()})


def run_original(model: nn.Module, tokens: Tensor, targets: Tensor | None) -> dict[str, Tensor]:
    """Logits, and the loss where there are targets; this family trains on targets that are shifted already."""
    logits = model(tokens)
    if targets is None:
        return {"logits": logits}
    return {"logits": logits, "loss": F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)}


def port_key(name: str) -> str:
    """The name map: where a tensor of the original is found in a port."""
    return name.replace("embed.", "model.embed_tokens.").replace("mlps.", "model.layers.").replace("out.", "lm_head.")


def taps(fields: dict[str, Any]) -> Sequence[Tap]:
    """Places to compare, in the order data passes: a failure names the first that differs."""
    return [Tap(name=f"mlp.{i}", original=f"mlps.{i}", port=f"model.layers.{i}") for i in range(fields["depth"])]


FAMILY = Family(
    name="bag",
    features=frozenset({"logits", "loss", "causal", "taps"}),
    configurations=configurations,
    original="bag_family:Bag",
    build_original=lambda cls, fields: cls(**fields).eval(),
    run_original=run_original,
    fields={"width": ["hidden_size"], "depth": ["num_hidden_layers"], "context": ["max_position_embeddings"]},
    port_key=port_key,
    maximum_length="context",
    loss=LossConvention(labels="preshifted", ignore_index=-1),
    taps=taps,
)
