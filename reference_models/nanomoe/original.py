# SPDX-License-Identifier: Apache-2.0
"""The model the weights were trained with: nanoMoE, in plain torch, as the truth every port is held to.

Written from a description of askerlee/nanoMoE (``model.py`` at commit 84a1de8f9ae06f7c36d5c2b4b78f3a0e81efcab7, the
last revision before its Hugging Face classes, MIT). Class names, module names and call signatures are those of that
file, so that either can stand in for the other. Where upstream asserts, this file raises `ValueError`; where upstream
collects auxiliary losses in a module global, here each layer returns them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reference_models.nanomoe import shared
from reference_models.nanomoe.shared import Losses, MLPExperts, Router, Routing

RMS_NORM_EPSILON = 1e-6
GRADIENT_SCALE = float(torch.tensor(0.1, dtype=torch.float32))
LOSS_TERMS = (
    "ntp_loss",
    "aux_loss",
    "router_z_loss",
    "router_ortho_loss",
    "experts_ortho_loss",
    "gate_output_loss",
)

__all__ = [
    "GPT",
    "LOSS_TERMS",
    "MLP",
    "Block",
    "CausalSelfAttention",
    "GPTConfig",
    "MLPExperts",
    "MOELayer",
    "Qwen3MLPExperts",
    "RMSNorm",
    "Router",
    "Routing",
    "is_moe_layer",
]

Block = shared.Block


@dataclass
class GPTConfig:
    """The hyperparameters, in upstream's order and with its defaults."""

    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    bias: bool = True
    n_exp: int = 1
    top_k: int = 2
    use_aux_loss: bool = False
    use_router_z_loss: bool = False
    use_router_ortho_loss: bool = False
    use_experts_ortho_loss: bool = True
    use_gate_output_loss: bool = True
    use_noisy_top_k: bool = False
    aux_loss_weight: float = 0.01
    router_z_loss_weight: float = 0.001
    router_ortho_loss_weight: float = 0.01
    router_ortho_neg_corr_weight: float = 1
    experts_ortho_loss_weight: float = 0.01
    gate_output_loss_weight: float = 0.01
    train_capacity: float = 1.25
    eval_capacity: float = 2.0
    min_capacity: int = 4
    stride: int = 1
    moe_start_layer: int = 0
    use_switch_tfm_init: bool = False
    switch_tfm_init_scale: float = 1.0
    router_use_full_prec: bool = False
    use_qwen3_moe_mlp: bool = False


def is_moe_layer(config: GPTConfig, layer: int) -> bool:
    """Whether a layer has experts: from `moe_start_layer` on, the last layer of every `stride`."""
    return config.n_exp > 1 and layer >= config.moe_start_layer and (layer + 1) % config.stride == 0


class RMSNorm(nn.Module):
    """Division by the root mean square over the last axis, epsilon 1e-6, then a gain."""

    def __init__(self, ndim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))

    def forward(self, input: Tensor) -> Tensor:
        return F.rms_norm(input, self.weight.shape, self.weight, RMS_NORM_EPSILON)


class CausalSelfAttention(nn.Module):
    """Multi-head attention whose queries and keys are normalised per head; a position sees what is not after it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head = config.n_head

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = (batch, length, self.n_head, width // self.n_head)
        query, key, value = (part.view(heads).transpose(1, 2) for part in self.c_attn(x).split(width, dim=2))
        # No gain, and torch's own epsilon: that of the type it accumulates in, 2.2e-16 for float64, else 1.2e-7.
        query, key = F.rms_norm(query, heads[-1:]), F.rms_norm(key, heads[-1:])
        # The default scale of this function is 1/sqrt(head size).
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        output: Tensor = self.c_proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return output


class SquaredReLU(nn.Module):
    """max(x, 0)^2."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


class MLP(nn.Module):
    """Two linear layers around the squared ReLU, four times as wide inside; also beside SwiGLU experts."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.activation = SquaredReLU()
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.c_proj(self.activation(self.c_fc(x)))
        return output


class Qwen3MLPExperts(nn.Module):
    """E SwiGLU MLPs as stacked (E, in, out) matrices, four times as wide inside, without biases."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        inside = 4 * config.n_embd
        self.gate_proj = nn.Parameter(torch.empty(config.n_exp, config.n_embd, inside))
        self.c_fc = nn.Parameter(torch.empty(config.n_exp, config.n_embd, inside))
        self.c_proj = nn.Parameter(torch.empty(config.n_exp, inside, config.n_embd))

    def forward(self, x: Tensor) -> Tensor:
        """Let every expert compute its buffer, (E, capacity, width)."""
        inside = F.silu(torch.bmm(x, self.gate_proj)) * torch.bmm(x, self.c_fc)
        return torch.bmm(inside, self.c_proj)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(_context: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(_context: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * GRADIENT_SCALE


def scale_gradient(x: Tensor) -> Tensor:
    """The tensor itself, whose gradient is multiplied by float32(0.1)."""
    scaled: Tensor = _ScaleGradient.apply(x)  # type: ignore[no-untyped-call]
    return scaled


def router_ortho_loss(w_g: Tensor, gate_proj: Tensor, negative_weight: float) -> Tensor:
    """The sum over experts and gate columns of their squared product with the expert's row of the router.

    Negative products count `negative_weight` times. The gates' gradient is scaled.

    Args:
        w_g: (E, width).
        gate_proj: (E, width, inside).
        negative_weight: 1 makes no difference between signs.
    """
    products = torch.einsum("ed,edm->em", w_g, scale_gradient(gate_proj))
    return torch.where(products >= 0, 1.0, negative_weight).to(products.dtype).mul(products.square()).sum()


def experts_ortho_loss(c_fc: Tensor) -> Tensor:
    """The mean over all E * E pairs of the squared cosine between experts' `c_fc`, each pair counted once.

    At least float32, whatever the dtype of (E, width, inside).
    """
    # Without this autocast would take the product in half precision.
    with torch.autocast(device_type=c_fc.device.type, enabled=False):
        directions = F.normalize(shared.widened(c_fc).flatten(1), dim=1)
        return (directions @ directions.t()).triu(diagonal=1).square().mean()


def gate_output_loss(buffer: Tensor, gate_proj: Tensor) -> Tensor:
    """The mean square of what the gates give, over the rows of the buffers where that is not zero.

    The gradient of the buffers, (E, capacity, width), is scaled.
    """
    rows = torch.bmm(scale_gradient(buffer), gate_proj).square().mean(dim=-1)
    return rows.sum() / (rows != 0).sum().clamp(min=1)


class MOELayer(nn.Module):
    """Experts in the place of an MLP; auxiliary losses in training only."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.router = Router(config, noisy_evaluation=False)
        self.experts: MLPExperts | Qwen3MLPExperts
        if config.use_qwen3_moe_mlp:
            self.experts = Qwen3MLPExperts(config)
        else:
            self.experts = MLPExperts(config, activation=SquaredReLU(), bias=config.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Losses]:
        """Give hidden states of the shape of `x`, (batch, length, width), and the losses that are on, unweighted."""
        tokens = x.flatten(0, 1)
        routing: Routing = self.router(tokens)
        buffer = shared.dispatch(tokens, routing)
        output = shared.combine(self.experts(buffer), routing).view(x.shape)
        return output, self._losses(routing, buffer) if self.training else {}

    def _losses(self, routing: Routing, buffer: Tensor) -> Losses:
        config, experts = self.config, self.experts
        losses = shared.routing_losses(config, routing)
        if isinstance(experts, Qwen3MLPExperts):
            if config.use_router_ortho_loss:
                w_g, negative_weight = self.router.w_g.weight, config.router_ortho_neg_corr_weight
                losses["router_ortho_loss"] = router_ortho_loss(w_g, experts.gate_proj, negative_weight)
            if config.use_experts_ortho_loss:
                losses["experts_ortho_loss"] = experts_ortho_loss(experts.c_fc)
            if config.use_gate_output_loss:
                losses["gate_output_loss"] = gate_output_loss(buffer, experts.gate_proj)
        return losses


class GPT(shared.LanguageModel):
    """nanoMoE's language model; the output matrix is the token embedding."""

    def __init__(self, config: GPTConfig) -> None:
        shared.check_config(config)
        if config.moe_start_layer < 0:
            raise ValueError(f"moe_start_layer={config.moe_start_layer}, expected at least 0")

        def block(layer: int) -> Block:
            return Block(
                ln_1=RMSNorm(config.n_embd),
                attn=CausalSelfAttention(config),
                ln_2=RMSNorm(config.n_embd),
                mlp=MOELayer(config) if is_moe_layer(config, layer) else MLP(config),
            )

        # Upstream has no dropout; the name marks the sum of the embeddings.
        super().__init__(config, drop=nn.Identity(), block=block, norm=lambda: RMSNorm(config.n_embd))

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None, Losses]:
        """Compute next-token logits and, given targets, their mean cross-entropy and the auxiliary losses.

        Args:
            idx: int64 (batch, length), length at most `block_size`.
            targets: int64 (batch, length), *already shifted*: `targets[:, t]` follows `idx[:, t]`. -1 is ignored.

        Returns:
            `(logits, loss, losses)`: (batch, length, vocab_size), a scalar, and the six `LOSS_TERMS` as unweighted
            sums over the layers, without gradient, zero where off. Without targets the logits of the last position
            only, (batch, 1, vocab_size), None, and zeros.

        Raises:
            ValueError: the sequence is longer than the block size.
        """
        x, losses = self.hidden_states(idx)
        if targets is None:
            logits = self.lm_head(x[:, [-1], :])
            return logits, None, {name: logits.new_zeros(()) for name in LOSS_TERMS}
        logits = self.lm_head(x)
        loss = shared.cross_entropy(logits, targets)
        terms = {name: logits.new_zeros(()) for name in LOSS_TERMS} | {"ntp_loss": loss} | losses
        for name in LOSS_TERMS[1:]:
            if name in losses:
                loss = loss + getattr(self.config, f"{name}_weight") * losses[name]
        return logits, loss, {name: term.detach() for name, term in terms.items()}
