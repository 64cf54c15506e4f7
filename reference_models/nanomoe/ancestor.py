# SPDX-License-Identifier: Apache-2.0
"""The ancestor of nanoMoE: nanoGPT with experts, in plain torch, as the truth of checkpoints of that line.

Written from a description of wolfecameron/nanoMoE (``model.py`` at commit
661fbcfade3e3081b3ed1150bc07e49082f46b48, MIT). Its names and signatures are kept. Noise and router losses act in
evaluation as they do in training, as there; they are returned by the layers, not collected in a module global.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from reference_models.nanogpt import original as nanogpt
from reference_models.nanogpt.original import MLP, CausalSelfAttention, LayerNorm
from reference_models.nanomoe import shared
from reference_models.nanomoe.shared import Losses, MLPExperts, Router, Routing

__all__ = [
    "GPT",
    "MLP",
    "Block",
    "CausalSelfAttention",
    "GPTConfig",
    "LayerNorm",
    "MLPExperts",
    "MOELayer",
    "Router",
    "Routing",
    "is_moe_layer",
]

Block = shared.Block


@dataclass
class GPTConfig(nanogpt.GPTConfig):
    """The hyperparameters, nanoGPT's first, in upstream's order and with its defaults."""

    n_exp: int = 1
    top_k: int = 2
    use_aux_loss: bool = False
    use_router_z_loss: bool = False
    use_noisy_top_k: bool = False
    aux_loss_weight: float = 0.01
    router_z_loss_weight: float = 0.001
    train_capacity: float = 1.25
    eval_capacity: float = 2.0
    min_capacity: int = 4
    stride: int = 2
    use_switch_tfm_init: bool = False
    switch_tfm_init_scale: float = 1.0
    router_use_full_prec: bool = False


def is_moe_layer(config: GPTConfig, layer: int) -> bool:
    """Whether a layer has experts: the first layer of every `stride`."""
    return config.n_exp > 1 and layer % config.stride == 0


class MOELayer(nn.Module):
    """Experts in the place of an MLP; the losses of the router in evaluation too."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.router = Router(config, noisy_evaluation=True)
        self.experts = MLPExperts(config, activation=nn.GELU(), bias=config.bias, dropout=config.dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, Losses]:
        """Give hidden states of the shape of `x`, (batch, length, width), and the losses that are on, unweighted."""
        tokens = x.flatten(0, 1)
        routing: Routing = self.router(tokens)
        output = shared.combine(self.experts(shared.dispatch(tokens, routing)), routing)
        return output.view(x.shape), shared.routing_losses(self.config, routing)


class GPT(shared.LanguageModel):
    """The language model; the output matrix is the token embedding."""

    def __init__(self, config: GPTConfig) -> None:
        shared.check_config(config)

        def block(layer: int) -> Block:
            return Block(
                ln_1=LayerNorm(config.n_embd, bias=config.bias),
                attn=CausalSelfAttention(config),
                ln_2=LayerNorm(config.n_embd, bias=config.bias),
                mlp=MOELayer(config) if is_moe_layer(config, layer) else MLP(config),
            )

        super().__init__(
            config,
            drop=nn.Dropout(config.dropout),
            block=block,
            norm=lambda: LayerNorm(config.n_embd, bias=config.bias),
        )

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Compute next-token logits and, given targets, their mean cross-entropy plus the weighted router losses.

        Args:
            idx: int64 (batch, length), length at most `block_size`.
            targets: int64 (batch, length), *already shifted*: `targets[:, t]` follows `idx[:, t]`. -1 is ignored.

        Returns:
            `(logits, loss)`: (batch, length, vocab_size) and a scalar with targets, else the logits of the last
            position only, (batch, 1, vocab_size), and None.

        Raises:
            ValueError: the sequence is longer than the block size.
        """
        x, losses = self.hidden_states(idx)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        loss = shared.cross_entropy(logits, targets)
        for name, term in losses.items():
            loss = loss + getattr(self.config, f"{name}_weight") * term
        return logits, loss

    @classmethod
    def from_pretrained(cls, model_type: str | os.PathLike[str], override_args: dict[str, Any] | None = None) -> GPT:
        """Import a GPT-2 by its name on the Hub (`gpt2`, `gpt2-medium`, ...) or from a local directory.

        GPT-2 was trained with the tanh approximation of GELU and this model computes the exact one, so the two differ
        by about 1e-3 in the logits; upstream accepts that.

        Raises:
            ValueError: something other than `dropout` is overridden.
        """
        return cls._dense(nanogpt.GPT.from_pretrained(model_type, override_args))

    @classmethod
    def from_gpt2(cls, gpt2: Any, override_args: dict[str, Any] | None = None) -> GPT:
        """Copy a `transformers.GPT2LMHeadModel` that is already in memory, into a model without experts.

        Raises:
            ValueError: something other than `dropout` is overridden, or the tensors of the two do not pair up.
        """
        return cls._dense(nanogpt.GPT.from_gpt2(gpt2, override_args))

    @classmethod
    def _dense(cls, model: nanogpt.GPT) -> GPT:
        dense = cls(GPTConfig(**vars(model.config)))
        dense.load_state_dict(model.state_dict())
        return dense
