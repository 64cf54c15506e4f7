# SPDX-License-Identifier: Apache-2.0
"""What the two originals have in common: routing tokens to experts, and the language model around the blocks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INITIAL_STD = 0.02
IGNORED_TARGET = -1

Losses = dict[str, Tensor]
"""Auxiliary losses by name, unweighted scalars."""


class Config(Protocol):
    """The fields that this module reads of either original's configuration."""

    block_size: int
    vocab_size: int
    n_layer: int
    n_embd: int
    n_head: int
    n_exp: int
    top_k: int
    use_aux_loss: bool
    use_router_z_loss: bool
    use_noisy_top_k: bool
    train_capacity: float
    eval_capacity: float
    min_capacity: int
    stride: int
    use_switch_tfm_init: bool
    switch_tfm_init_scale: float
    router_use_full_prec: bool


def check_config(config: Config) -> None:
    """Refuse a configuration that has no meaning. Raises ValueError, one line that names the field."""
    if config.vocab_size is None or config.block_size is None:
        raise ValueError("vocab_size and block_size must both be given")
    for name in ("n_exp", "stride", "min_capacity"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)}, expected at least 1")
    for name in ("train_capacity", "eval_capacity"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name}={getattr(config, name)}, expected a finite number above 0")
    if config.n_exp > 1 and not 1 <= config.top_k <= config.n_exp:
        raise ValueError(f"top_k={config.top_k}, expected 1 to n_exp={config.n_exp}")
    if config.n_embd % config.n_head != 0:
        raise ValueError(f"n_embd={config.n_embd} is not a multiple of n_head={config.n_head}")


class Routing(NamedTuple):
    """Where a router sends N tokens (batch-major), each to k of E experts.

    logits: (N, E), noise included where there is any. indices: int64 (N, k), the best expert first.
    weights: (N, k), softmax over the k selected logits, before anything is dropped.
    ranks: int64 (N, k), place in the queue of that expert. keep: bool (N, k), rank < capacity.
    capacity: slots of each expert.
    """

    logits: Tensor
    indices: Tensor
    weights: Tensor
    ranks: Tensor
    keep: Tensor
    capacity: int


def expert_capacity(config: Config, tokens: int, *, training: bool) -> int:
    """How many slots each expert has for so many tokens: an even number, unless `min_capacity` is a larger odd one."""
    factor = config.train_capacity if training else config.eval_capacity
    capacity = math.floor(config.top_k * factor * tokens / config.n_exp)
    return max(config.min_capacity, capacity + capacity % 2)


def queue_ranks(indices: Tensor, n_exp: int) -> Tensor:
    """The place of every slot in the queue of its expert.

    All first choices of the batch stand before all second choices, and among equal choices the earlier token first.

    Args:
        indices: int64 (N, k), the chosen experts, best first.
        n_exp: number of experts.

    Returns:
        int64 (N, k), counted from 0; slots that find no place later are counted too.
    """
    experts = indices.t().flatten()
    order = experts.argsort(stable=True)
    lengths = experts.bincount(minlength=n_exp)
    starts = lengths.cumsum(0) - lengths
    ranks = torch.empty_like(experts)
    ranks[order] = torch.arange(len(experts), device=experts.device) - starts[experts[order]]
    return ranks.view(indices.shape[1], indices.shape[0]).t().contiguous()


class Router(nn.Module):
    """Picks the k best experts of each token and gives every pick a place in its expert's queue.

    noisy_evaluation: whether the noise of `use_noisy_top_k` acts outside training too.
    """

    def __init__(self, config: Config, *, noisy_evaluation: bool) -> None:
        super().__init__()
        self.config = config
        self.noisy_evaluation = noisy_evaluation
        self.w_g = nn.Linear(config.n_embd, config.n_exp, bias=False)
        self.w_noise = nn.Linear(config.n_embd, config.n_exp, bias=False) if config.use_noisy_top_k else None

    def forward(self, x: Tensor) -> Routing:
        """Route the tokens of one call, (N, width), which share every expert's capacity."""
        full_precision = torch.autocast(device_type=x.device.type, enabled=False)
        with full_precision if self.config.router_use_full_prec else contextlib.nullcontext():
            logits: Tensor = self.w_g(x)
            if self.w_noise is not None and (self.training or self.noisy_evaluation):
                logits = logits + F.softplus(self.w_noise(x)) * torch.randn_like(logits)
            best, indices = logits.topk(self.config.top_k, dim=-1)
            weights = best.softmax(dim=-1)
        ranks = queue_ranks(indices, self.config.n_exp)
        capacity = expert_capacity(self.config, x.shape[0], training=self.training)
        return Routing(logits, indices, weights, ranks, ranks < capacity, capacity)


def load_balancing_loss(routing: Routing) -> Tensor:
    """E * sum over experts of (mean weight) * (mean number of slots); k when balanced; no gradient through the latter.

    At least float32, whatever the model's dtype.
    """
    tokens, n_exp = routing.logits.shape
    weights = widened(routing.weights).flatten()
    experts = routing.indices.flatten()
    weight = weights.new_zeros(n_exp).index_add(0, experts, weights) / tokens
    slots = experts.bincount(minlength=n_exp).to(weights.dtype) / tokens
    return n_exp * (weight * slots).sum()


def z_loss(routing: Routing) -> Tensor:
    """The mean over tokens of the squared log-sum-exp of all E logits."""
    return routing.logits.logsumexp(dim=-1).square().mean()


def routing_losses(config: Config, routing: Routing) -> Losses:
    """Those of the two losses of a router that the configuration asks for."""
    losses: Losses = {}
    if config.use_aux_loss:
        losses["aux_loss"] = load_balancing_loss(routing)
    if config.use_router_z_loss:
        losses["router_z_loss"] = z_loss(routing)
    return losses


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 where it is that already."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def dispatch(x: Tensor, routing: Routing) -> Tensor:
    """Lay the tokens (N, width) of the kept slots into the experts' buffers (E, capacity, width), zero elsewhere."""
    tokens, choices = routing.keep.nonzero(as_tuple=True)
    n_exp = routing.logits.shape[1]
    buffer = x.new_zeros(n_exp, routing.capacity, x.shape[1])
    place = (routing.indices[tokens, choices], routing.ranks[tokens, choices])
    return buffer.index_put(place, x[tokens])


def combine(outputs: Tensor, routing: Routing) -> Tensor:
    """Sum what the experts gave, (E, capacity, width), over the kept slots of each token, weighted: (N, width).

    Weights are not made to sum to one again; a token that was dropped by all of its experts gets zeros.
    """
    tokens, choices = routing.keep.nonzero(as_tuple=True)
    taken = outputs[routing.indices[tokens, choices], routing.ranks[tokens, choices]]
    weighted = taken * routing.weights[tokens, choices, None]
    return weighted.new_zeros(routing.logits.shape[0], outputs.shape[2]).index_add(0, tokens, weighted)


class MLPExperts(nn.Module):
    """E two-layer MLPs as stacked (E, in, out) matrices, four times as wide inside."""

    def __init__(self, config: Config, *, activation: nn.Module, bias: bool, dropout: float = 0.0) -> None:
        super().__init__()
        inside = 4 * config.n_embd
        self.c_fc = nn.Parameter(torch.empty(config.n_exp, config.n_embd, inside))
        self.c_proj = nn.Parameter(torch.empty(config.n_exp, inside, config.n_embd))
        self.fc_bias = nn.Parameter(torch.zeros(config.n_exp, 1, inside)) if bias else None
        self.proj_bias = nn.Parameter(torch.zeros(config.n_exp, 1, config.n_embd)) if bias else None
        self.activation = activation
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Let every expert compute its buffer, (E, capacity, width); what it gives for unused rows is never read."""
        x = torch.bmm(x, self.c_fc)
        x = x if self.fc_bias is None else x + self.fc_bias
        x = torch.bmm(self.activation(x), self.c_proj)
        x = x if self.proj_bias is None else x + self.proj_bias
        output: Tensor = self.dropout(x)
        return output


class Block(nn.Module):
    """One pre-norm residual layer: attention, then an MLP or experts; gives hidden states and auxiliary losses."""

    def __init__(self, *, ln_1: nn.Module, attn: nn.Module, ln_2: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.ln_1 = ln_1
        self.attn = attn
        self.ln_2 = ln_2
        self.mlp = mlp

    def forward(self, x: Tensor) -> tuple[Tensor, Losses]:
        x = x + self.attn(self.ln_1(x))
        output = self.mlp(self.ln_2(x))
        # Experts give their losses beside the hidden states, a dense MLP has none.
        output, losses = output if isinstance(output, tuple) else (output, {})
        return x + output, losses


class LanguageModel(nn.Module):
    """Embeddings, blocks, a last norm and an output matrix, which is the token embedding; what is around experts."""

    transformer: Any  # a ModuleDict, whose entries are attributes at run time only
    config: Any

    def __init__(
        self,
        config: Config,
        *,
        drop: nn.Module,
        block: Callable[[int], Block],
        norm: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        self.config = config
        # The order of construction and of initialisation decides which random numbers each tensor gets.
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": drop,
                "h": nn.ModuleList(block(layer) for layer in range(config.n_layer)),
                "ln_f": norm(),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

        self.apply(self._init_weights)
        for name, parameter in self.named_parameters():
            if name.endswith(("c_proj.weight", "experts.c_proj")):
                nn.init.normal_(parameter, mean=0.0, std=INITIAL_STD / math.sqrt(2 * config.n_layer))

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=INITIAL_STD)
        if isinstance(module, nn.Linear):
            self._draw(module.weight, fan_in=module.weight.shape[-1])
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3:  # only experts have such
                if name.endswith("bias"):
                    nn.init.zeros_(parameter)
                else:
                    self._draw(parameter, fan_in=parameter.shape[-2])

    def _draw(self, weight: Tensor, *, fan_in: int) -> None:
        if self.config.use_switch_tfm_init:
            std = math.sqrt(self.config.switch_tfm_init_scale / fan_in)
            nn.init.trunc_normal_(weight, mean=0.0, std=std, a=-2 * std, b=2 * std)
        else:
            nn.init.normal_(weight, mean=0.0, std=INITIAL_STD)

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Count the parameters, the tied matrix once; without the position table unless asked otherwise."""
        total = sum(parameter.numel() for parameter in self.parameters())
        return total - self.transformer.wpe.weight.numel() if non_embedding else total

    def hidden_states(self, idx: Tensor) -> tuple[Tensor, Losses]:
        """Hidden states after the last norm (batch, length, width), and auxiliary losses summed over the layers.

        Raises ValueError when the sequence is longer than the block size.
        """
        length = idx.shape[1]
        if length > self.config.block_size:
            raise ValueError(f"a sequence of {length} tokens does not fit into block_size={self.config.block_size}")
        positions = torch.arange(length, dtype=torch.long, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(positions))
        sums: Losses = {}
        for block in self.transformer.h:
            x, losses = block(x)
            sums |= {name: sums[name] + loss if name in sums else loss for name, loss in losses.items()}
        return self.transformer.ln_f(x), sums

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
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size])
        self.transformer.wpe.num_embeddings = block_size

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str
    ) -> torch.optim.AdamW:
        """Make the originals' AdamW: tensors with two axes or more decay, but for biases; fused on CUDA."""
        groups: dict[bool, list[Tensor]] = {True: [], False: []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups[parameter.dim() >= 2 and not name.endswith("bias")].append(parameter)
        options: list[dict[str, Any]] = [
            {"params": groups[True], "weight_decay": weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ]
        fused = {"fused": True} if device_type == "cuda" else {}
        return torch.optim.AdamW(options, lr=learning_rate, betas=betas, **fused)

    @torch.no_grad()
    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
        """Continue each row of `idx` by sampling; the mode (train or eval) is left as it is.

        Every step is a call of its own with the whole context, whose tokens alone share the experts' capacity. A
        context longer than the block size is cut to its last `block_size` tokens, whose positions start at 0 again.
        With `top_k`, every token tied with the k-th best stays in the draw.

        Args:
            idx: int64 (batch, length), length at least 1.
            max_new_tokens: how many tokens to append; there is no end-of-text token.
            temperature: divides the logits, above 0.
            top_k: draw from the best k tokens only.

        Returns:
            int64 (batch, length + max_new_tokens), prompt included.
        """
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.config.block_size :])[0][:, -1, :] / temperature
            if top_k is not None:
                best, _ = torch.topk(logits, min(top_k, logits.shape[-1]))
                logits = logits.masked_fill(logits < best[:, [-1]], float("-inf"))
            drawn = torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)
            idx = torch.cat((idx, drawn), dim=1)
        return idx


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean over targets that are not -1; targets are already shifted."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED_TARGET)
