# SPDX-License-Identifier: Apache-2.0
"""nanoMoE as a Hugging Face causal language model, for transformers 4.57 and 5.x from the same file.

It computes what askerlee/nanoMoE computes (`model.py` at commit 84a1de8f9ae06f7c36d5c2b4b78f3a0e81efcab7, MIT) or,
with `architecture="ancestor"`, what wolfecameron/nanoMoE computes (`model.py` at commit
661fbcfade3e3081b3ed1150bc07e49082f46b48, MIT), and has their tensor names, so weights travel both ways without a
change. What it adds is the library's: padding masks, a key-value cache, generation, other attention kernels.
"""

import contextlib
import functools
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

# Upstream's scripts import these files by their bare names, from the directory that holds them.
try:
    from .configuration_nanomoe_gpt import GPTConfig
    from .manager import AUXILIARY_LOSSES, MOEManager, manager_of_this_call
except ImportError:
    if __package__:
        raise
    from configuration_nanomoe_gpt import GPTConfig  # type: ignore[import-not-found,no-redef]
    from manager import (  # type: ignore[import-not-found,no-redef]
        AUXILIARY_LOSSES,
        MOEManager,
        manager_of_this_call,
    )

TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5
LAYER_NORM_EPSILON = 1e-5
RMS_NORM_EPSILON = 1e-6
INITIAL_STD = 0.02
IGNORED_LABEL = -100
IGNORED_TARGET = -1
GRADIENT_SCALE = 0.10000000149011612  # 0.1 in float32, in which the original keeps it
# Padding has no place in the queue of an expert.
NO_RANK = torch.iinfo(torch.int64).max


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attend in plain torch; heads come as (batch, heads, length, size) and leave as (batch, length, heads, size)."""
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    # In half precision a score plus the mask's lowest number is minus infinity, and a row of those is not a number.
    scores = scores.to(accumulation_dtype(scores.dtype))
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1).to(value.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


def next_token_loss(logits: Tensor, targets: Tensor, num_items_in_batch: int | Tensor | None = None) -> Tensor:
    """Cross-entropy of the next token, in float32 or in the float64 it is given.

    Args:
        logits: (batch, length, vocab_size).
        targets: int64 (batch, length), already shifted; -100 and -1 are ignored.
        num_items_in_batch: what to divide the sum by; the mean over what is not ignored by default.

    Returns:
        A scalar; not a number when every position is ignored and no count is given, as in nanoMoE.
    """
    loss = F.cross_entropy(
        logits.flatten(0, 1).to(accumulation_dtype(logits.dtype)),
        targets.to(logits.device).flatten().masked_fill(targets.flatten() == IGNORED_TARGET, IGNORED_LABEL),
        ignore_index=IGNORED_LABEL,
        reduction="mean" if num_items_in_batch is None else "sum",
    )
    if num_items_in_batch is not None:
        loss = loss / torch.as_tensor(num_items_in_batch, device=loss.device)
    return loss


class ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is `GRADIENT_SCALE` times as large."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * GRADIENT_SCALE


def scaled_gradient(tensor: Tensor) -> Tensor:
    """Return the tensor itself, whose gradient is scaled."""
    scaled: Tensor = ScaledGradient.apply(tensor)  # type: ignore[no-untyped-call]
    return scaled


# Attention and dense layers


class Attention(nn.Module):
    """Causal multi-head attention, scale 1/sqrt(head size); but in the ancestor, queries and keys are normalised."""

    def __init__(self, config: GPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.n_embd // config.n_head
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.c_proj.ends_residual_branch = True  # type: ignore[assignment]
        self.attn_dropout = nn.Dropout(config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)

    def _norm(self, heads: Tensor) -> Tensor:
        # The epsilon of the type that torch sums in, which is float32 for half precision as well.
        return F.rms_norm(heads, (self.head_dim,), eps=torch.finfo(accumulation_dtype(heads.dtype)).eps)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        query, key, value = (
            part.view(*input_shape, -1, self.head_dim).transpose(1, 2)
            for part in self.c_attn(hidden_states).split(self.config.n_embd, dim=-1)
        )
        if self.config.architecture == "nanomoe":
            query, key = self._norm(query), self._norm(key)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx, {"cache_position": cache_position})

        # set_attn_implementation works where the library finds the call of its own line in the text of this file.
        attention: Callable[..., Any] = eager_attention_forward
        if TRANSFORMERS_5:
            attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, attention)
        elif self.config._attn_implementation != "eager":
            attention = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.attn_dropout.p if self.training else 0.0,
            **kwargs,
        )
        output = self.c_proj(output.reshape(*input_shape, -1))
        return self.resid_dropout(output), weights


class RMSNorm(nn.LayerNorm):
    """Root mean square normalisation with a gain; to the Trainer a LayerNorm, whose gain does not decay."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.rms_norm(hidden_states, self.normalized_shape, self.weight, self.eps)


def norm(config: GPTConfig) -> nn.Module:
    """Return a norm over the width: RMSNorm, in the ancestor LayerNorm."""
    if config.architecture == "ancestor":
        return nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPSILON, bias=config.bias)
    return RMSNorm(config.n_embd, eps=RMS_NORM_EPSILON, bias=False)


class SquaredReLU(nn.Module):
    """ReLU(x)^2."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.relu(hidden_states).square()


def activation(config: GPTConfig) -> nn.Module:
    """Return what stands between the matrices of a plain MLP or expert: squared ReLU, in the ancestor GELU."""
    return nn.GELU(approximate=config.gelu_approximate) if config.architecture == "ancestor" else SquaredReLU()


class MLP(nn.Module):
    """Two linear layers around an activation; a dense layer stays plain where experts are SwiGLU."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.act = activation(config)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.c_proj.ends_residual_branch = True  # type: ignore[assignment]
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: Tensor) -> Tensor:
        output: Tensor = self.dropout(self.c_proj(self.act(self.c_fc(hidden_states))))
        return output


# Routing


class Routing(NamedTuple):
    """Where N tokens go, each to k of E experts.

    A slot is a token's choice of an expert. All first choices of a call queue before all second choices, and in the
    order of the tokens. Padding that takes no capacity is in no queue.
    """

    logits: Tensor
    """(N, E), with noise where there is any."""
    indices: Tensor
    """int64 (N, k), experts of each token, best first."""
    weights: Tensor
    """(N, k), softmax over the logits of the chosen experts, whatever is dropped."""
    ranks: Tensor
    """int64 (N, k), place in the queue of the expert; the largest int64 for padding."""
    keep: Tensor
    """bool (N, k), whether the rank is below the capacity."""
    capacity: int | Tensor
    """Slots of an expert; a 0-d int64 tensor where the number of tokens depends on a mask."""


class Router(nn.Module):
    """Chooses the experts of each token and numbers their queues."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.w_g = nn.Linear(config.n_embd, config.n_exp, bias=False)
        if config.use_noisy_top_k:
            self.w_noise = nn.Linear(config.n_embd, config.n_exp, bias=False)

    @property
    def is_active(self) -> bool:
        """Whether there is noise and are losses: in training, in the ancestor always."""
        return self.training or self.config.architecture == "ancestor"

    def _logits(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.w_g(tokens)
        if self.config.use_noisy_top_k and self.is_active:
            logits = logits + F.softplus(self.w_noise(tokens)) * torch.randn_like(logits)
        return logits

    def _capacity(self, count: int | Tensor) -> Any:
        config = self.config
        factor: float = config.train_capacity if self.training else config.eval_capacity
        # In the order of the original, whose rounding decides where the share is a whole number.
        if isinstance(count, Tensor):
            share = (config.moe_top_k * factor * count.double() / config.n_exp).floor().long()
            return (share + share % 2).clamp(min=config.min_capacity)
        whole = math.floor(config.moe_top_k * factor * count / config.n_exp)
        return max(config.min_capacity, whole + whole % 2)

    def forward(self, tokens: Tensor, is_token: Tensor | None = None) -> Routing:
        """Route one call's tokens.

        Args:
            tokens: (N, width), row by row of the batch.
            is_token: bool (N,), false for padding that takes no capacity.
        """
        full_precision = self.config.router_use_full_prec
        # The original picks the device by whether there is a GPU; what counts is where the tokens are.
        with torch.autocast(tokens.device.type, enabled=False) if full_precision else contextlib.nullcontext():
            logits = self._logits(tokens.to(self.w_g.weight.dtype) if full_precision else tokens)
            best, indices = logits.topk(self.config.moe_top_k, dim=-1)
            weights = F.softmax(best, dim=-1)

        # Sorted by expert, stable, the place within the group is the rank: no (N, E, capacity) table is needed.
        experts = indices.T.flatten()
        if is_token is not None:
            experts = experts.masked_fill(~is_token.repeat(indices.shape[1]), self.config.n_exp)
        order = experts.argsort(stable=True)
        in_order = experts[order]
        lengths = torch.zeros(self.config.n_exp + 1, dtype=torch.int64, device=experts.device)
        lengths = lengths.scatter_add(0, experts, torch.ones_like(experts))
        places = torch.arange(len(order), device=experts.device) - (lengths.cumsum(0) - lengths)[in_order]
        places = places.masked_fill(in_order == self.config.n_exp, NO_RANK)
        ranks = torch.empty_like(places).scatter(0, order, places).view(indices.T.shape).T
        capacity = self._capacity(len(tokens) if is_token is None else is_token.sum())
        return Routing(logits, indices, weights, ranks, ranks < capacity, capacity)


def load_balancing_loss(routing: Routing, is_token: Tensor | None = None) -> Tensor:
    """Return E times the sum over experts of mean weight times mean number of slots, dropped ones included.

    The balanced value is k. There is no gradient through the number of slots. At least float32, as in the original.
    """
    weights = routing.weights.to(accumulation_dtype(routing.weights.dtype))
    experts = routing.logits.shape[1]
    weight = weights.new_zeros(len(weights), experts).scatter(1, routing.indices, weights)
    slots = weights.new_zeros(len(weights), experts).scatter(1, routing.indices, 1.0)
    return experts * (_mean(weight, is_token) * _mean(slots, is_token)).sum()


def router_z_loss(routing: Routing, is_token: Tensor | None = None) -> Tensor:
    """Return the mean over tokens of the squared log of the summed exponentials of all logits."""
    return _mean(routing.logits.logsumexp(dim=-1).square(), is_token)


def _mean(values: Tensor, is_token: Tensor | None) -> Tensor:
    """Return the mean over the first axis, without padding."""
    if is_token is None:
        return values.mean(0)
    weight = is_token.view(-1, *(1,) * (values.ndim - 1)).to(values.dtype)
    return (values * weight).sum(0) / weight.sum().clamp(min=1)


# Experts


Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""What multiplies rows by the matrices (E, in, out) of their groups and adds offsets (E, 1, out)."""


@dataclass(frozen=True)
class GroupedRows:
    """Rows in groups, one for each expert, and how to multiply each group with a matrix of its own.

    `experts` is int64 (M,), ascending; `counts` is int64 (E,), rows of each group.
    """

    experts: Tensor
    counts: Tensor

    @functools.cached_property
    def sizes(self) -> list[int]:
        return [int(count) for count in self.counts.tolist()]

    def linear(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply rows (M, in) by the matrices (E, in, out) of their groups and add offsets (E, 1, out)."""
        device = rows.device.type
        if torch.is_autocast_enabled(device) and rows.dtype != torch.float64:
            # As autocast does for a matmul, but it knows no grouped one, and would convert expert by expert.
            dtype = torch.get_autocast_dtype(device)
            rows, weight = rows.to(dtype), weight.to(dtype)
        if _takes_grouped_mm(rows, weight):
            product = F.grouped_mm(rows, weight, offs=self.counts.cumsum(0).to(torch.int32))
            return product if bias is None else product + bias.squeeze(1)[self.experts]
        # As fast on a CPU, and for every type. Indexing the weights instead would add a full gradient per expert.
        groups = zip(self.sizes, rows.split(self.sizes), weight.unbind(), strict=True)
        products = [group @ matrix for size, group, matrix in groups if size]
        product = torch.cat(products) if products else rows.new_zeros(0, weight.shape[2])
        return product if bias is None else product + bias.squeeze(1)[self.experts]


def _takes_grouped_mm(rows: Tensor, weight: Tensor) -> bool:
    """Whether torch has a kernel for the product of groups: on a GPU, in bfloat16, rows of a multiple of 16 bytes."""
    return (
        rows.device.type == "cuda"
        and rows.dtype == weight.dtype == torch.bfloat16
        and rows.shape[1] % 8 == weight.shape[2] % 8 == 0
        and hasattr(F, "grouped_mm")
        and torch.cuda.get_device_capability(rows.device) >= (8, 0)
    )


def padded_linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply rows (E, capacity, in) by matrices (E, in, out) and add offsets (E, 1, out)."""
    product = torch.bmm(rows, weight)
    return product if bias is None else product + bias


class MLPExperts(nn.Module):
    """Plain experts: two matrices each, (in, out), around an activation."""

    fc_bias: Tensor | None
    proj_bias: Tensor | None

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        experts, width = config.n_exp, config.n_embd
        self.c_fc = nn.Parameter(torch.empty(experts, width, 4 * width))
        self.c_proj = nn.Parameter(torch.empty(experts, 4 * width, width))
        self.register_parameter("fc_bias", nn.Parameter(torch.empty(experts, 1, 4 * width)) if config.bias else None)
        self.register_parameter("proj_bias", nn.Parameter(torch.empty(experts, 1, width)) if config.bias else None)
        self.act = activation(config)

    def forward(self, rows: Tensor, linear: Linear) -> Tensor:
        """Compute each row by the expert of its group; `linear` multiplies rows in their groups."""
        return linear(self.act(linear(rows, self.c_fc, self.fc_bias)), self.c_proj, self.proj_bias)


class Qwen3MLPExperts(nn.Module):
    """SwiGLU experts: three matrices each, (in, out), without offsets."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        experts, width = config.n_exp, config.n_embd
        self.gate_proj = nn.Parameter(torch.empty(experts, width, 4 * width))
        self.c_fc = nn.Parameter(torch.empty(experts, width, 4 * width))
        self.c_proj = nn.Parameter(torch.empty(experts, 4 * width, width))

    def forward(self, rows: Tensor, linear: Linear) -> Tensor:
        """Compute each row by the expert of its group; `linear` multiplies rows in their groups."""
        gate = F.silu(linear(rows, self.gate_proj, None))
        return linear(gate * linear(rows, self.c_fc, None), self.c_proj, None)

    def orthogonality(self) -> Tensor:
        """Return the mean over all E^2 pairs of the squared cosine, each pair counted once; at least float32."""
        flat = self.c_fc.flatten(1)
        with torch.autocast(flat.device.type, enabled=False):
            directions = F.normalize(flat.to(accumulation_dtype(flat.dtype)), dim=-1)
            return (directions @ directions.T).triu(1).square().mean()

    def gate_output(self, rows: Tensor, linear: Linear) -> Tensor:
        """Return the mean over rows of the mean squared output of the gate; rows where that is 0 do not count."""
        squares = linear(scaled_gradient(rows), self.gate_proj, None).square().mean(-1).flatten()
        return squares.sum() / squares.count_nonzero().clamp(min=1)


def router_orthogonality(router: Tensor, gate: Tensor, negative_weight: float) -> Tensor:
    """Return the weighted sum of squared products of each expert's router row (E, D) and gate columns (E, D, M)."""
    products = torch.einsum("ed,edm->em", router, scaled_gradient(gate))
    return (products.square() * torch.where(products >= 0, 1.0, negative_weight)).sum()


class MOELayer(nn.Module):
    """Experts, each for the tokens that the router sends it and it has slots for."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.router = Router(config)
        self.experts: Any = Qwen3MLPExperts(config) if config.use_qwen3_moe_mlp else MLPExperts(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: Tensor, is_token: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """Return the output, the router logits (N, E) and the losses of `AUXILIARY_LOSSES`, None for what is off.

        Args:
            hidden_states: (batch, length, width).
            is_token: bool (batch, length), false for padding that takes no capacity; its output is 0.
        """
        tokens = hidden_states.flatten(0, 1)
        is_token = is_token.flatten() if is_token is not None else None
        routing: Routing = self.router(tokens, is_token)
        compute = self._in_buffers if torch.compiler.is_compiling() else self._in_groups
        slots, gate_output = compute(tokens, routing)
        # A slot that was dropped gives 0, and the others are not renormalised.
        output = (slots.view(*routing.weights.T.shape, -1) * routing.weights.T.unsqueeze(-1)).sum(0)
        return (
            output.view(hidden_states.shape),
            routing.logits,
            *self._losses(routing, is_token, gate_output),
        )

    def _wants_gate_output(self) -> bool:
        config = self.config
        return self.router.is_active and config.use_qwen3_moe_mlp and config.use_gate_output_loss

    def _in_groups(self, tokens: Tensor, routing: Routing) -> tuple[Tensor, Tensor | None]:
        """Compute the kept slots, sorted by expert. Returns (k * N, width), 0 for dropped ones, and the gate loss."""
        experts = routing.indices.T.flatten()
        order = experts.argsort(stable=True)
        if isinstance(routing.capacity, Tensor) or routing.capacity < len(tokens):
            order = order[routing.keep.T.flatten()[order]]
        experts = experts[order]
        groups = GroupedRows(experts, torch.bincount(experts, minlength=self.config.n_exp))
        rows = tokens[order % len(tokens)]
        gate_output = self.experts.gate_output(rows, groups.linear) if self._wants_gate_output() else None
        output = self._drop(self.experts(rows, groups.linear), routing, order)
        return output.new_zeros(routing.keep.numel(), output.shape[1]).index_copy(0, order, output), gate_output

    def _in_buffers(self, tokens: Tensor, routing: Routing) -> tuple[Tensor, Tensor | None]:
        """Compute the same with as many rows for every expert: more work, but shapes that a compiler knows."""
        count, experts = len(tokens), self.config.n_exp
        capacity = count if isinstance(routing.capacity, Tensor) else min(routing.capacity, count)
        keep = routing.keep.T.flatten()
        # Dropped slots share a last row, which nobody reads.
        in_buffer = routing.indices.T.flatten() * capacity + routing.ranks.T.flatten()
        place = torch.where(keep, in_buffer, experts * capacity)
        rows = tokens.new_zeros(experts * capacity + 1, tokens.shape[1])
        rows = rows.index_copy(0, place, tokens.repeat(routing.keep.shape[1], 1))
        rows = rows[:-1].view(experts, capacity, -1)
        gate_output = self.experts.gate_output(rows, padded_linear) if self._wants_gate_output() else None
        output = self.dropout(self.experts(rows, padded_linear)).flatten(0, 1)
        return output[place.clamp(max=experts * capacity - 1)].masked_fill(~keep.unsqueeze(-1), 0), gate_output

    def _drop(self, output: Tensor, routing: Routing, order: Tensor) -> Tensor:
        """Apply dropout to rows (M, width) of these slots, with the draws of the original, made in its buffer."""
        if self.dropout.p == 0 or not self.training:
            return output
        buffer = output.new_ones(self.config.n_exp, int(routing.capacity), output.shape[1])
        kept: Tensor = self.dropout(buffer)[routing.indices.T.flatten()[order], routing.ranks.T.flatten()[order]]
        return output * kept

    def _losses(
        self, routing: Routing, is_token: Tensor | None, gate_output: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Return the losses in the order of `AUXILIARY_LOSSES`."""
        config = self.config
        if not self.router.is_active:
            return (None,) * len(AUXILIARY_LOSSES)
        swiglu = self.experts if config.use_qwen3_moe_mlp else None
        negative = config.router_ortho_neg_corr_weight
        return (
            load_balancing_loss(routing, is_token) if config.use_aux_loss else None,
            router_z_loss(routing, is_token) if config.use_router_z_loss else None,
            router_orthogonality(self.router.w_g.weight, swiglu.gate_proj, negative)
            if swiglu is not None and config.use_router_ortho_loss
            else None,
            swiglu.orthogonality() if swiglu is not None and config.use_experts_ortho_loss else None,
            gate_output,
        )


class Block(GradientCheckpointingLayer):
    """One pre-norm residual layer."""

    def __init__(self, config: GPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = norm(config)
        self.attn = Attention(config, layer_idx)
        self.ln_2 = norm(config)
        self.has_experts = config.has_experts(layer_idx)
        self.mlp = MOELayer(config) if self.has_experts else MLP(config)

    def forward(
        self, hidden_states: Tensor, is_token: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor | None, ...]:
        """Return hidden states, attention weights and, with experts, router logits and losses.

        They are returned one beside the other, because gradient checkpointing follows no tensor inside a container,
        and runs a block twice.
        """
        attended, weights = self.attn(self.ln_1(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        # Not by its class: 4.57 runs this file again for a second checkpoint, and the first model's classes are others.
        if not self.has_experts:
            return hidden_states + self.mlp(self.ln_2(hidden_states)), weights
        output, *others = self.mlp(self.ln_2(hidden_states), is_token)
        return hidden_states + output, weights, *others


# Models


@dataclass
class GPTModelOutput(BaseModelOutputWithPast):
    """What [`GPTModel`] returns, `auxiliary_losses` by name, each summed over layers, and `router_logits` by layer."""

    auxiliary_losses: dict[str, Tensor] | None = None
    router_logits: tuple[Tensor, ...] | None = None


@dataclass
class GPTOutput(CausalLMOutputWithPast):
    """What [`GPT`] returns.

    `losses` are detached 0-d tensors by name: `ntp_loss`, then `aux_loss`, `router_z_loss`, `router_ortho_loss`,
    `experts_ortho_loss` and `gate_output_loss`, each summed over layers and without its weight; None without labels.
    `router_logits` are those of each MoE layer, (batch * length, n_exp).
    """

    losses: dict[str, Tensor] | None = None
    router_logits: tuple[Tensor, ...] | None = None


class GPTPreTrainedModel(PreTrainedModel):
    """What both models share: how weights start, what the library may do with them."""

    config_class = GPTConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _input_embed_layer = "wte"
    _no_split_modules: ClassVar[list[str]] = ["Block"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def _init_weights(self, module: nn.Module) -> None:
        # Only a module's own parameters: 5.x skips modules of remote code that have none, with what is in them.
        for name, parameter in module.named_parameters(recurse=False):
            if getattr(parameter, "_is_hf_initialized", False):
                continue  # came from a file; only its neighbours are missing
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(parameter)
            elif name == "c_proj" or getattr(module, "ends_residual_branch", False):
                # The sum of all residual branches starts at one scale, whatever the depth; so do experts, by name.
                nn.init.normal_(parameter, std=INITIAL_STD / (2 * self.config.n_layer) ** 0.5)
            elif self.config.use_switch_tfm_init and (
                not isinstance(module, nn.Embedding) or getattr(module, "is_output_matrix", False)
            ):
                # Experts are (E, in, out), linear layers (out, in).
                fan_in = parameter.shape[-2 if parameter.ndim == 3 else -1]
                std = (self.config.switch_tfm_init_scale / fan_in) ** 0.5
                nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)
            else:
                nn.init.normal_(parameter, std=INITIAL_STD)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model; as a keyword here too, `top_k` is `moe_top_k`, and nothing of the generation's."""
        if "top_k" in kwargs and kwargs.setdefault("moe_top_k", kwargs["top_k"]) == kwargs["top_k"]:
            del kwargs["top_k"]
        return super().from_pretrained(*args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Save the model with its code, so that `AutoModel` and `AutoModelForCausalLM` both load the directory."""
        # The library names only the class being saved, and needs the other one to be found as well.
        module = __name__.rpartition(".")[2]
        self.config.auto_map = {
            **(getattr(self.config, "auto_map", None) or {}),
            "AutoModel": f"{module}.GPTModel",
            "AutoModelForCausalLM": f"{module}.GPT",
        }
        return super().save_pretrained(save_directory, *args, **kwargs)


class GPTModel(GPTPreTrainedModel):
    """nanoMoE without its head: token ids in, normalised hidden states out."""

    def __init__(self, config: GPTConfig) -> None:
        config.validate_architecture()
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wte.is_output_matrix = True  # type: ignore[assignment]
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer_idx) for layer_idx in range(config.n_layer))
        self.ln_f = norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    def _positions(
        self,
        inputs_embeds: Tensor,
        past: int | Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
    ) -> Tensor:
        """Return the row of the position table for each new token, (1 or batch, length)."""
        length, block_size = inputs_embeds.shape[1], self.config.block_size
        compiling = torch.compiler.is_compiling()
        # The length of a static cache is a tensor, and reading it would break the graph of torch.compile.
        if (isinstance(past, int) or not compiling) and past + length > block_size:
            raise ValueError(
                f"a sequence of {int(past + length)} tokens does not fit into block_size={block_size}; "
                f"shorten it, or let generate(use_cache=False) move a window of {block_size} tokens over it"
            )
        if position_ids is not None:
            # Reading values would break the graph here as well, and on a GPU wait for it at every step.
            readable = position_ids.device.type == "cpu" and position_ids.numel() > 0 and not compiling
            if readable and not 0 <= position_ids.min() <= position_ids.max() < block_size:
                raise ValueError(
                    f"position_ids go from {position_ids.min()} to {position_ids.max()}, but "
                    f"block_size={block_size} has positions 0 to {block_size - 1}"
                )
            return position_ids
        if attention_mask is not None and attention_mask.ndim == 2:
            # Wherever the padding is, a token stands where it would stand without it.
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        return (torch.arange(length, device=inputs_embeds.device) + past).unsqueeze(0)

    def _causal_mask(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        cache_position: Tensor,
        past_key_values: Cache | None,
        position_ids: Tensor | None,
    ) -> Any:
        """Return the mask in the form the attention implementation wants."""
        dtype = inputs_embeds.dtype
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 4:
            lowest = torch.finfo(dtype).min
            if attention_mask.dtype == torch.bool:
                return torch.zeros_like(attention_mask, dtype=dtype).masked_fill(~attention_mask, lowest)
            return attention_mask.to(dtype).clamp(min=lowest)
        arguments = {
            "config": self.config,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "position_ids": position_ids,
        }
        if TRANSFORMERS_5:
            return create_causal_mask(inputs_embeds=inputs_embeds, **arguments)
        return create_causal_mask(input_embeds=inputs_embeds, cache_position=cache_position, **arguments)

    def _is_token(self, attention_mask: Tensor | None, length: int) -> Tensor | None:
        """Return which of the new tokens are not padding, bool (batch, length), where that changes the routing."""
        if self.config.n_exp == 1 or self.config.pad_tokens_take_capacity:
            return None
        if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
            return None
        return attention_mask[:, -length:].bool()

    def _use_cache(self, use_cache: bool | None, past_key_values: Cache | None) -> bool:
        """Decide whether to return a cache, and say so where the cache is not the same as none."""
        if self.gradient_checkpointing and self.training:
            return False
        drops = self.config.capacity_can_drop
        if use_cache is None:
            by_default = self.config.use_cache if self.config.use_cache is not None else not drops
            use_cache = by_default or past_key_values is not None
        if not (use_cache and drops) or self.training or torch.compiler.is_compiling():
            return use_cache
        if past_key_values is None or past_key_values.get_seq_length() == 0:  # once for all steps of a generation
            config = self.config
            enough = math.ceil(100 * config.n_exp / config.moe_top_k) / 100  # a rounded quotient may be too little
            warnings.warn(
                f"a cache changes the result where experts can be full: n_exp={config.n_exp}, "
                f"moe_top_k={config.moe_top_k} and eval_capacity={config.eval_capacity} share out the slots of each "
                f"call, and a step with a cache sees its new tokens only; give use_cache=False for the original's "
                f"tokens, or raise eval_capacity to {enough:g}, where nothing is dropped",
                stacklevel=2,
            )
        return True

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> GPTModelOutput:
        """Compute the hidden states after the last norm.

        Args:
            input_ids: int64 (batch, length). Either these or `inputs_embeds`.
            attention_mask: (batch, past + length) of ints or bools, true where there is a token; or additive,
                (batch or 1, heads or 1, length, past + length), which tells experts nothing about padding.
            position_ids: int64 (batch or 1, length). By default positions count the tokens of a 2-D mask, so that
                padding on either side or in between changes nothing.
            past_key_values: the cache of the tokens that came before; only the new ones are routed.
            inputs_embeds: (batch, length, n_embd), token embeddings without positions.
            use_cache: return a cache; never while gradient checkpointing is training. By default where a cache is
                given, else see `GPTConfig.use_cache`.
            output_attentions: return attention weights, which only `eager` attention has.
            output_hidden_states: return the input of every block and the output of the last norm.
            output_router_logits: return the router logits of every MoE layer, (batch * length, n_exp).

        Returns:
            A `GPTModelOutput`; its `auxiliary_losses` are there where the architecture computes them: in training, in
            the ancestor always.

        Raises:
            ValueError: past and new tokens exceed `block_size`, a position is outside of it, or not exactly one of
                `input_ids` and `inputs_embeds` is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        config = self.config
        if output_attentions is None:
            output_attentions = config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        use_cache = self._use_cache(use_cache, past_key_values)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()  # given a configuration, 5.x copies it first

        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        positions = self._positions(inputs_embeds, past, attention_mask, position_ids)
        cache_position = kwargs.pop("cache_position", None)
        if cache_position is None:
            cache_position = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past
        mask = self._causal_mask(inputs_embeds, attention_mask, cache_position, past_key_values, position_ids)
        is_token = self._is_token(attention_mask, inputs_embeds.shape[1])

        hidden_states = self.drop(inputs_embeds + self.wpe(positions))
        all_hidden_states: tuple[Tensor, ...] = ()
        all_attentions: tuple[Tensor, ...] = ()
        all_router_logits: tuple[Tensor, ...] = ()
        # A compiled graph cannot set a context variable, and holds no code that could ask for it.
        scope = contextlib.nullcontext(MOEManager()) if torch.compiler.is_compiling() else manager_of_this_call()
        with scope as manager:
            for block in self.h:
                if output_hidden_states:
                    all_hidden_states += (hidden_states,)
                hidden_states, weights, *of_experts = block(
                    hidden_states,
                    is_token=is_token,
                    attention_mask=mask,
                    position_ids=position_ids,
                    past_key_values=past_key_values,
                    cache_position=cache_position,
                    output_attentions=output_attentions,
                    **kwargs,
                )
                if output_attentions and weights is not None:
                    all_attentions += (weights,)
                if of_experts:
                    all_router_logits += (of_experts[0],)
                    for name, loss in zip(AUXILIARY_LOSSES, of_experts[1:], strict=True):
                        if loss is not None:
                            manager.add(name, loss)
            hidden_states = self.ln_f(hidden_states)
            sums = {name: manager.aggregate(name) for name in AUXILIARY_LOSSES}
            auxiliary_losses = {name: loss for name, loss in sums.items() if isinstance(loss, Tensor)}

        return GPTModelOutput(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*all_hidden_states, hidden_states) if output_hidden_states else None,
            attentions=all_attentions or None,
            auxiliary_losses=auxiliary_losses,
            router_logits=all_router_logits if output_router_logits else None,
        )


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point() and value.dtype != torch.bool


def _legacy_calls(forward: Callable[..., GPTOutput]) -> Callable[..., Any]:
    """Let `model(X, Y)` and `return_dict=False` give what upstream's scripts unpack: (logits, loss, losses)."""

    @functools.wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return_dict = kwargs.pop("return_dict", None)
        # A mask has the shape of the first as well, but nobody gives an integer mask without its name.
        if len(args) > 1 and _is_token_ids(args[1]) and args[1].shape == args[0].shape:
            if len(args) > 2 or kwargs.get("targets") is not None:
                raise ValueError("model(X, Y) takes token ids and targets; give everything else by its name, once")
            args, kwargs["targets"], return_dict = args[:1], args[1], False
        output = forward(self, *args, **kwargs)
        if return_dict is False:
            return output.logits, output.loss, output.losses
        if return_dict is None and not self.config.return_dict:
            return output.to_tuple()
        return output

    return call


class GPT(GPTPreTrainedModel, GenerationMixin):
    """nanoMoE with its head, the token embedding itself."""

    _tied_weights_keys: ClassVar[Any] = (
        {"lm_head.weight": "transformer.wte.weight"} if TRANSFORMERS_5 else ["lm_head.weight"]
    )

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.transformer = GPTModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.label_convention == "hf":
            self.loss_type = "ForCausalLM"  # by this the Trainer of 5.x knows that the first label is not predicted
        self.post_init()

    @_legacy_calls
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        idx: Tensor | None = None,
        targets: Tensor | None = None,
        **kwargs: Any,
    ) -> GPTOutput:
        """Compute logits and, given labels or targets, the loss: mean cross-entropy and weighted auxiliary losses.

        Upstream's two ways of calling give `(logits, loss, losses)`: `model(X, Y)`, a second *positional* argument of
        integers in the shape of the first being the targets; and `return_dict=False`, whatever the other arguments.
        Any other second positional argument is the attention mask; give an integer mask by its name.
        With `return_dict=False` in the configuration only, the tuple has the library's order, (loss, logits, ...).

        Args not described here are those of [`GPTModel.forward`].

        Args:
            labels: int64 (batch, length). By default the library's convention: the input itself, shifted here; with
                `label_convention="preshifted"` in the configuration not shifted. -100 and -1 are ignored.
            targets: int64 (batch, length), upstream's convention: already shifted; -1 and -100 are ignored.
            idx: upstream's name of `input_ids`.
            logits_to_keep: compute logits for the last so many positions only, 0 for all, or for the positions in a
                1-D index tensor. `num_logits_to_keep` is its older name.
            num_items_in_batch: divide the summed loss by this instead of by the number of labels that count. An
                auxiliary loss has then the share of this call's labels in it, so that micro-batches add up.
            shift_labels: int64 (batch, length), already shifted, instead of `labels`.

        Returns:
            A `GPTOutput` with `loss` (scalar) and `logits` (batch, kept, vocab_size).

        Raises:
            ValueError: more than one of labels, targets and shift_labels is given, or one with `logits_to_keep`; both
                of idx and input_ids are; or see `GPTModel`.
        """
        logits_to_keep = kwargs.pop("num_logits_to_keep", logits_to_keep)
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        if idx is not None and input_ids is not None:
            raise ValueError("idx and input_ids are names of one argument; give one of them")
        targets = self._targets(labels, targets, kwargs.pop("shift_labels", None))
        keeps_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if not keeps_all and targets is not None:
            raise ValueError("a loss needs the logits of all positions; leave logits_to_keep out")

        outputs = self.transformer(
            input_ids=input_ids if idx is None else idx,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_router_logits=output_router_logits,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])

        loss, losses = None, None
        if targets is not None:
            loss, losses = self._loss(logits, targets, outputs.auxiliary_losses, num_items_in_batch)
        return GPTOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            losses=losses,
            router_logits=outputs.router_logits,
        )

    def _targets(self, labels: Tensor | None, targets: Tensor | None, shift_labels: Tensor | None) -> Tensor | None:
        """Return the token that follows each position, whichever way it was given."""
        given = [value for value in (labels, targets, shift_labels) if value is not None]
        if len(given) > 1:
            raise ValueError("give one of labels (see label_convention), targets and shift_labels (already shifted)")
        if labels is not None and self.config.label_convention == "hf":
            return F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
        return given[0] if given else None

    def _loss(
        self,
        logits: Tensor,
        targets: Tensor,
        auxiliary: dict[str, Tensor],
        num_items_in_batch: int | Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the total loss and its parts by name, detached."""
        loss = next_token_loss(logits, targets, num_items_in_batch)
        losses = {"ntp_loss": loss.detach()}
        share: float | Tensor = 1.0
        if num_items_in_batch is not None:
            count = ((targets != IGNORED_LABEL) & (targets != IGNORED_TARGET)).sum().to(loss)
            share = count / torch.as_tensor(num_items_in_batch, device=loss.device)
        for name in AUXILIARY_LOSSES:
            part = auxiliary.get(name)
            losses[name] = loss.new_zeros(()) if part is None else part.detach()
            if part is not None:
                loss = loss + share * getattr(self.config, f"{name}_weight") * part.to(loss.device)
        return loss, losses

    # Generation

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Continue sequences as every model of the library does.

        Raises:
            TypeError: upstream's own call, `generate(x, 500)`, which is `generate_legacy` here.
        """
        if isinstance(generation_config, int):
            raise TypeError(
                f"generate(x, {generation_config}) is a call of nanoMoE before its Hugging Face classes; call "
                f"generate_legacy(x, {generation_config}), or generate(x, max_new_tokens={generation_config})"
            )
        return super().generate(inputs, generation_config, *args, **kwargs)

    def _prepare_generation_config(
        self, generation_config: Any, *args: Any, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        # Whoever names a cache wants one. 4.57 has true where nothing was said, so there only false says something.
        asked = kwargs.get("use_cache")
        for source in (generation_config, self.generation_config, self.config):
            value = getattr(source, "use_cache", None)
            if asked is None and (value is False or (value and (TRANSFORMERS_5 or source is self.config))):
                asked = value
        named = ("past_key_values", "cache_implementation", "inputs_embeds")
        if asked is None and any(kwargs.get(name) is not None for name in named):
            asked = True
        prepared, model_kwargs = super()._prepare_generation_config(generation_config, *args, **kwargs)
        prepared.use_cache = asked if asked is not None else not self.config.capacity_can_drop
        prepared.cache_was_asked_for = asked is not None
        return prepared, model_kwargs

    def _validate_generated_length(
        self, generation_config: Any, input_ids_length: int, has_default_max_length: bool
    ) -> None:
        # The last token is never fed back. Without this, a cached generation would fail half-way, or not at all.
        needed, block_size = generation_config.max_length - 1, self.config.block_size
        if generation_config.use_cache and needed > block_size:
            if generation_config.cache_was_asked_for:
                raise ValueError(
                    f"generating up to {needed + 1} tokens needs {needed} positions, but block_size={block_size}; a "
                    f"cache cannot move beyond that: generate fewer tokens, or from input_ids with use_cache=False"
                )
            generation_config.use_cache = False
        super()._validate_generated_length(generation_config, input_ids_length, has_default_max_length)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Select the model inputs of one generation step; without a cache, the original's moving window."""
        if past_key_values is not None:
            if not TRANSFORMERS_5 and past_key_values.get_seq_length() > 0:
                inputs_embeds = None  # 4.57 feeds a prompt of one embedding again at every step
            inputs: dict[str, Any] = super().prepare_inputs_for_generation(
                input_ids,
                past_key_values=past_key_values,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                **kwargs,
            )
            return inputs
        # Every step sees the whole sequence again, cut to its last block_size tokens, whose positions start anew.
        # There are no embeddings here: given those, the library always uses a cache.
        window = self.config.block_size
        unused = {"cache_position", "next_sequence_length", "is_first_iteration", "labels"}
        if input_ids.shape[1] > window:
            unused.add("position_ids")
        if attention_mask is not None:
            attention_mask = attention_mask[:, -window:]
        return {
            "input_ids": input_ids[:, -window:],
            "attention_mask": attention_mask,
            **{name: value for name, value in kwargs.items() if name not in unused},
        }

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        position_ids = model_kwargs.get("position_ids")
        if position_ids is not None and not TRANSFORMERS_5:
            # 4.57 lets the caller's mask grow with the sequence, but not the caller's positions.
            model_kwargs["position_ids"] = torch.cat((position_ids, position_ids[:, -1:] + 1), dim=-1)
        return model_kwargs

    @torch.no_grad()
    def generate_legacy(
        self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None
    ) -> Tensor:
        """Continue each row of `idx` by sampling, as upstream does; the mode (train or eval) is left as it is.

        A context longer than the block size is cut to its last `block_size` tokens, whose positions start at 0
        again. With `top_k`, every token tied with the k-th best stays in the draw.

        Args:
            idx: int64 (batch, length), length at least 1.
            max_new_tokens: how many tokens to append; there is no end-of-text token.
            temperature: divides the logits, above 0.
            top_k: draw from the best k tokens only.

        Returns:
            int64 (batch, length + max_new_tokens), prompt included.
        """
        for _ in range(max_new_tokens):
            window = idx[:, -self.config.block_size :]
            logits = self(input_ids=window, use_cache=False, logits_to_keep=1, return_dict=True).logits[:, -1]
            logits = logits / temperature
            if top_k is not None:
                best, _ = torch.topk(logits, min(top_k, logits.shape[-1]))
                logits = logits.masked_fill(logits < best[:, [-1]], float("-inf"))
            drawn = torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)
            idx = torch.cat((idx, drawn), dim=1)
        return idx

    # Upstream's other methods

    @classmethod
    def from_pretrained_gpt2(
        cls, name_or_directory: str | os.PathLike[str], override_args: dict[str, Any] | None = None
    ) -> Any:
        """Import a GPT-2 by its name on the Hub (`gpt2`, `gpt2-medium`, ...) or from a local directory.

        The result is the ancestor's architecture without experts and with the GELU that GPT-2 was trained with: the
        same function, in eval mode and in the dtype of the file.

        Args:
            name_or_directory: what `GPT2LMHeadModel.from_pretrained` takes.
            override_args: fields of the configuration that change nothing in evaluation: `dropout`, and
                `label_convention`.

        Raises:
            ValueError: something else is overridden, or this GPT-2 has a part that no nanoMoE has.
        """
        from transformers import GPT2LMHeadModel

        return _from_gpt2(cls, GPT2LMHeadModel.from_pretrained(name_or_directory, dtype="auto"), override_args or {})

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Count the parameters, the tied matrix once; without the position table unless asked otherwise."""
        total: int = sum(parameter.numel() for parameter in self.parameters())
        return total - self.transformer.wpe.weight.numel() if non_embedding else total

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str
    ) -> torch.optim.AdamW:
        """Make nanoMoE's AdamW: what has two axes or more decays, but for offsets, even of experts; fused on CUDA."""
        trained = [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]
        decays = [parameter.dim() >= 2 and not name.endswith("bias") for name, parameter in trained]
        groups = [
            {"params": [p for (_, p), d in zip(trained, decays, strict=True) if d is wanted], "weight_decay": decay}
            for wanted, decay in ((True, weight_decay), (False, 0.0))
        ]
        fused = {"fused": True} if device_type == "cuda" else {}
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, **fused)

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the longest sequence by dropping the last rows of the position table.

        The table becomes a new parameter, so an optimiser made before this call no longer updates it.

        Raises:
            ValueError: the new size is not between 1 and the present one.
        """
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(
                f"cannot crop block_size={self.config.block_size} to {block_size}: it can only get smaller"
            )
        self.config.block_size = block_size
        table = self.transformer.wpe
        table.weight = nn.Parameter(table.weight.detach()[:block_size].clone())
        table.num_embeddings = block_size


# The parts of a GPT-2 that decide what it computes, and the values at which it is the ancestor without experts.
_GPT2_FIELDS = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu"),
    "add_cross_attention": (False,),
    "layer_norm_epsilon": (LAYER_NORM_EPSILON,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "scale_attn_weights": (True,),
    "tie_word_embeddings": (True,),
}
# GPT-2 keeps these four matrices as (in, out), nanoMoE as (out, in).
_TRANSPOSED_IN_GPT2 = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_GPT2_MASK_BUFFERS = (".attn.bias", ".attn.masked_bias")


def _from_gpt2(cls: Any, gpt2: Any, overrides: dict[str, Any]) -> Any:
    """Copy a `transformers.GPT2LMHeadModel` into a new model that computes the same."""
    if refused := sorted(set(overrides) - {"dropout", "label_convention"}):
        values = ", ".join(f"{name}={overrides[name]!r}" for name in refused)
        raise ValueError(
            f"a GPT-2 cannot be imported with {values}: its weights mean the same only under what it was trained with, "
            f"architecture='ancestor' without experts (LayerNorm, GELU; not RMSNorm, QK norm, squared ReLU or "
            f"routing); only dropout and label_convention can be overridden"
        )
    theirs = gpt2.config
    for name, exact in _GPT2_FIELDS.items():
        if (value := getattr(theirs, name, exact[0])) not in exact:
            raise ValueError(f"this GPT-2 has {name}={value!r}, which nanoMoE cannot compute; expected {exact[0]!r}")
    if theirs.n_inner not in (None, 4 * theirs.n_embd):
        raise ValueError(f"this GPT-2 has n_inner={theirs.n_inner}, expected 4 * n_embd = {4 * theirs.n_embd}")
    config = GPTConfig(
        block_size=theirs.n_positions,
        vocab_size=theirs.vocab_size,
        n_layer=theirs.n_layer,
        n_head=theirs.n_head,
        n_embd=theirs.n_embd,
        bias=True,
        n_exp=1,
        architecture="ancestor",
        gelu_approximate="none" if theirs.activation_function == "gelu" else "tanh",
        **overrides,
    )
    state = {
        name: tensor.t().contiguous() if name.endswith(_TRANSPOSED_IN_GPT2) else tensor
        for name, tensor in gpt2.state_dict().items()
        if not name.endswith(_GPT2_MASK_BUFFERS)
    }
    with torch.device("meta"):
        model = cls(config)
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    return model.eval()


GPTModel.register_for_auto_class("AutoModel")
GPT.register_for_auto_class("AutoModelForCausalLM")
# As remote code this file must not register: the next checkpoint of this type would then silently run this code.
if not __name__.startswith("transformers_modules"):
    AutoConfig.register(GPTConfig.model_type, GPTConfig, exist_ok=True)
    AutoModel.register(GPTConfig, GPTModel, exist_ok=True)
    AutoModelForCausalLM.register(GPTConfig, GPT, exist_ok=True)
