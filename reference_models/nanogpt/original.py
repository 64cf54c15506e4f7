# SPDX-License-Identifier: Apache-2.0
"""The model the weights were trained with: nanoGPT, in plain torch, as the truth every port is held to.

Written from a description of karpathy/nanoGPT (``model.py`` at commit
3adf61e154c3fe3fca428ad6bc3818b27a3b8291, MIT). Class names, module names and call signatures are those of that
file, so that either can stand in for the other. Where upstream asserts, this file raises `ValueError`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LAYER_NORM_EPSILON = 1e-5
INITIAL_STD = 0.02
IGNORED_TARGET = -1

# GPT-2 keeps these four matrices as (in, out), nanoGPT as (out, in).
_TRANSPOSED_IN_GPT2 = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_GPT2_MASK_BUFFERS = (".attn.bias", ".attn.masked_bias")


@dataclass
class GPTConfig:
    """The hyperparameters, in nanoGPT's order and with its defaults."""

    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis with a gain and an optional offset, epsilon 1e-5."""

    def __init__(self, ndim: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.weight.shape, self.weight, self.bias, LAYER_NORM_EPSILON)


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a position sees itself and what came before it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if config.n_embd % config.n_head != 0:
            raise ValueError(f"n_embd={config.n_embd} is not a multiple of n_head={config.n_head}")
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.attn_dropout = nn.Dropout(config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.n_embd = config.n_embd
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = (batch, length, self.n_head, width // self.n_head)
        query, key, value = (part.view(heads).transpose(1, 2) for part in self.c_attn(x).split(width, dim=2))
        # The default scale of this function is 1/sqrt(head size).
        mixed = F.scaled_dot_product_attention(
            query, key, value, dropout_p=self.dropout if self.training else 0.0, is_causal=True
        )
        output: Tensor = self.resid_dropout(self.c_proj(mixed.transpose(1, 2).reshape(batch, length, width)))
        return output


class MLP(nn.Module):
    """Two linear layers around the exact (erf) GELU, four times as wide inside."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.dropout(self.c_proj(self.gelu(self.c_fc(x))))
        return output


class Block(nn.Module):
    """One pre-norm residual layer: attention, then the MLP."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        output: Tensor = x + self.mlp(self.ln_2(x))
        return output


class GPT(nn.Module):
    """nanoGPT's language model; the output matrix is the token embedding."""

    transformer: Any  # a ModuleDict, whose entries are attributes at run time only

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if config.vocab_size is None or config.block_size is None:
            raise ValueError("vocab_size and block_size must both be given")
        self.config = config
        # The order of construction and of initialisation decides which random numbers each tensor gets.
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

        self.apply(self._init_weights)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, mean=0.0, std=INITIAL_STD / math.sqrt(2 * config.n_layer))

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=INITIAL_STD)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Count the parameters, the tied matrix once; without the position table unless asked otherwise."""
        total = sum(parameter.numel() for parameter in self.parameters())
        return total - self.transformer.wpe.weight.numel() if non_embedding else total

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Compute next-token logits and, given targets, their mean cross-entropy.

        Args:
            idx: int64 (batch, length), length at most `block_size`.
            targets: int64 (batch, length), *already shifted*: `targets[:, t]` follows `idx[:, t]`. -1 is ignored.

        Returns:
            `(logits, loss)`: (batch, length, vocab_size) and a scalar with targets, else the logits of the last
            position only, (batch, 1, vocab_size), and None.

        Raises:
            ValueError: the sequence is longer than the block size.
        """
        length = idx.shape[1]
        if length > self.config.block_size:
            raise ValueError(f"a sequence of {length} tokens does not fit into block_size={self.config.block_size}")
        positions = torch.arange(length, dtype=torch.long, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(positions))
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)

        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED_TARGET)
        return logits, loss

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

    @classmethod
    def from_pretrained(cls, model_type: str | os.PathLike[str], override_args: dict[str, Any] | None = None) -> GPT:
        """Import a GPT-2 by its name on the Hub (`gpt2`, `gpt2-medium`, ...) or from a local directory.

        GPT-2 was trained with the tanh approximation of GELU and nanoGPT computes the exact one, so the two models
        differ by about 1e-3 in the logits; upstream accepts that.

        Raises:
            ValueError: something other than `dropout` is overridden.
        """
        from transformers import GPT2LMHeadModel

        return cls.from_gpt2(GPT2LMHeadModel.from_pretrained(model_type), override_args)

    @classmethod
    def from_gpt2(cls, gpt2: Any, override_args: dict[str, Any] | None = None) -> GPT:
        """Copy a `transformers.GPT2LMHeadModel` that is already in memory.

        Raises:
            ValueError: something other than `dropout` is overridden, or the tensors of the two do not pair up.
        """
        overrides = dict(override_args or {})
        if unknown := sorted(set(overrides) - {"dropout"}):
            raise ValueError(f"only dropout can be overridden on import, not {', '.join(unknown)}")
        theirs = gpt2.config
        model = cls(
            GPTConfig(
                block_size=theirs.n_positions,
                vocab_size=theirs.vocab_size,
                n_layer=theirs.n_layer,
                n_head=theirs.n_head,
                n_embd=theirs.n_embd,
                bias=True,
                **overrides,
            )
        )
        ours = model.state_dict()
        source: dict[str, Tensor] = gpt2.state_dict()
        source = {name: tensor for name, tensor in source.items() if not name.endswith(_GPT2_MASK_BUFFERS)}
        if unpaired := sorted(set(ours) ^ set(source)):
            raise ValueError(f"these tensors have no counterpart in the other model: {', '.join(unpaired)}")
        with torch.no_grad():
            for name, tensor in source.items():
                tensor = tensor.t() if name.endswith(_TRANSPOSED_IN_GPT2) else tensor
                if tensor.shape != ours[name].shape:
                    raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(ours[name].shape)}")
                ours[name].copy_(tensor)
        return model

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str
    ) -> torch.optim.AdamW:
        """Make nanoGPT's AdamW: matrices and embeddings decay, gains and offsets do not; fused on CUDA."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups: Iterable[dict[str, Any]] = [
            {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ]
        fused = {"fused": True} if device_type == "cuda" else {}
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, **fused)

    @torch.no_grad()
    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
        """Continue each row of `idx` by sampling; the mode (train or eval) is left as it is.

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
            logits, _loss = self(idx[:, -self.config.block_size :])
            logits = logits[:, -1, :] / temperature
            if top_k is not None:
                best, _ = torch.topk(logits, min(top_k, logits.shape[-1]))
                logits = logits.masked_fill(logits < best[:, [-1]], float("-inf"))
            drawn = torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)
            idx = torch.cat((idx, drawn), dim=1)
        return idx
