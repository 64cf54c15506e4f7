# SPDX-License-Identifier: Apache-2.0
"""The model the weights were trained with: NeoBERT's training model, in plain torch, as the truth ports are held to.

Written from a description of pszemraj/NeoBERT (commit 3c73efd88ceaf2ed726f25eb2877a754fa867891, MIT) and measurements
of what it computes. Names of modules, fields and arguments are those of that code. It differs where that code leaves a
choice to its surroundings: tying takes effect under every version of every library, tables of angles are computed at
each call instead of cached, and masks that nobody can mean are refused instead of added to the scores.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROPE_THETA = 10000.0
IGNORED_LABEL = -100
ACTIVATIONS = ("swiglu", "gelu")
ATTENTION_BACKENDS = ("sdpa", "flash_attn_varlen")
KERNEL_BACKENDS = ("auto", "liger", "torch")

PackedLengths = Sequence[Sequence[int]] | Tensor


@dataclass(frozen=True, kw_only=True)
class NeoBERTConfig:
    """The hyperparameters, with the defaults of upstream's class (its training files have others).

    `attn_backend` and `kernel_backend` name kernels, of which this file has one; they change no value. `base_scale`
    belongs to nGPT, which is refused. `hidden_act` is lower-cased.

    Raises ValueError when no model has these hyperparameters.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 28
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    dropout: float = 0.0
    embedding_init_range: float = 0.02
    decoder_init_range: float = 0.02
    classifier_init_range: float = 0.02
    rms_norm: bool = True
    rope: bool = True
    norm_eps: float = 1e-6
    hidden_act: str = "swiglu"
    vocab_size: int = 32064
    pad_token_id: int = 0
    max_length: int = 1024
    attn_backend: str = "sdpa"
    kernel_backend: str = "auto"
    tie_word_embeddings: bool = True
    ngpt: bool = False
    base_scale: float = 1.0 / math.sqrt(960.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden_act", str(self.hidden_act).lower())
        if self.ngpt:
            raise ValueError(
                "ngpt=True is another architecture (nGPT, NormNeoBERT), which is not supported; expected False"
            )
        for name in (
            "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size", "max_length",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 1")
        if self.hidden_size % self.num_attention_heads != 0:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}"
            )
        if self.rope and self.dim_head % 2 != 0:
            raise ValueError(
                f"RoPE requires an even head dimension, and hidden_size={self.hidden_size} over"
                f" num_attention_heads={self.num_attention_heads} gives {self.dim_head}"
            )
        for name, known in {
            "hidden_act": ACTIVATIONS,
            "attn_backend": ATTENTION_BACKENDS,
            "kernel_backend": KERNEL_BACKENDS,
        }.items():
            if getattr(self, name) not in known:
                raise ValueError(f"Unsupported {name} '{getattr(self, name)}', expected one of {', '.join(known)}")
        if not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id={self.pad_token_id}, expected 0 to vocab_size-1={self.vocab_size - 1}")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"dropout={self.dropout}, expected a probability")
        if not self.norm_eps >= 0:
            raise ValueError(f"norm_eps={self.norm_eps}, expected 0 or more")

    @property
    def dim_head(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads


def swiglu_size(intermediate_size: int) -> int:
    """Channels inside a SwiGLU: two thirds of the nominal width, rounded down, then up to a multiple of 8."""
    return 8 * -(-(2 * intermediate_size // 3) // 8)


def masked_lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over the labels that are not -100, divided by how many those are; NaN where there are none.

    logits (rows, tokens, vocabulary), labels int64 (rows, tokens), not shifted. A scalar, in float32 at least.
    """
    return masked_lm_loss_sum(logits, labels) / (labels != IGNORED_LABEL).sum()


def masked_lm_loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """The numerator of `masked_lm_loss`: 0 where every label is -100."""
    wide = logits.to(_inside(logits.dtype, float32_inside=False))
    return F.cross_entropy(wide.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")


def _inside(dtype: torch.dtype, *, float32_inside: bool) -> torch.dtype:
    """The type that norms and rotations compute in: float32, or the model's own where that is wider."""
    return torch.float32 if float32_inside else torch.promote_types(dtype, torch.float32)


class RMSNorm(nn.Module):
    """Division by the root mean square over the last axis, then a gain."""

    def __init__(self, size: int, eps: float, *, float32_inside: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.float32_inside = float32_inside

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(_inside(x.dtype, float32_inside=self.float32_inside))
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        # Rounded to the model's type before the gain, as upstream trains; torch's own rms_norm rounds after it.
        return normed.to(x.dtype) * self.weight


class SwiGLU(nn.Module):
    """w3(silu(w1 x) * (w2 x)), without biases."""

    def __init__(self, config: NeoBERTConfig) -> None:
        super().__init__()
        inside = swiglu_size(config.intermediate_size)
        self.w1 = nn.Linear(config.hidden_size, inside, bias=False)
        self.w2 = nn.Linear(config.hidden_size, inside, bias=False)
        self.w3 = nn.Linear(inside, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.w3(F.silu(self.w1(x)) * self.w2(x))
        return output


class EncoderBlock(nn.Module):
    """One pre-norm residual layer: attention to both sides, then the feed-forward network."""

    def __init__(self, config: NeoBERTConfig, *, float32_inside: bool = False) -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.float32_inside = float32_inside
        self.attention_norm = _norm(config, float32_inside=float32_inside)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.ffn_norm = _norm(config, float32_inside=float32_inside)
        self.ffn: nn.Module
        if config.hidden_act == "swiglu":
            self.ffn = SwiGLU(config)
        else:
            self.ffn = nn.Sequential(
                nn.Linear(width, config.intermediate_size, bias=False),
                nn.GELU(),
                nn.Linear(config.intermediate_size, width, bias=False),
            )
        self.ffn_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, attn_mask: Tensor | None, rotation: Tensor | None) -> Tensor:
        """x (rows, tokens, width), attn_mask broadcast to (rows, heads, queries, keys), rotation (tokens, pairs)."""
        x = x + self.resid_dropout(self._attention(self.attention_norm(x), attn_mask, rotation))
        output: Tensor = x + self.ffn_dropout(self.ffn(self.ffn_norm(x)))
        return output

    def _attention(self, x: Tensor, attn_mask: Tensor | None, rotation: Tensor | None) -> Tensor:
        rows, length, width = x.shape
        heads, channels = self.config.num_attention_heads, self.config.dim_head
        # Query, key and value of the first head, then those of the second, and so on.
        query, key, value = self.qkv(x).view(rows, length, heads, 3 * channels).chunk(3, dim=-1)
        if rotation is not None:
            query, key = (rotated(part, rotation, float32_inside=self.float32_inside) for part in (query, key))
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            attn_mask = attn_mask.to(query.dtype)
        # The default scale of this function is 1/sqrt(head size); a query with no key to attend to gives 0.
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=attn_mask,
            dropout_p=self.config.dropout if self.training else 0.0,
        )
        output: Tensor = self.wo(mixed.transpose(1, 2).reshape(rows, length, width))
        return output


def _norm(config: NeoBERTConfig, *, float32_inside: bool) -> nn.Module:
    if config.rms_norm:
        return RMSNorm(config.hidden_size, config.norm_eps, float32_inside=float32_inside)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)


def rotary_table(length: int, dim_head: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """exp(i * position * theta^(-2j/d)) for positions 0..length-1: complex (length, dim_head / 2).

    dtype: float32 or float64, which the angles are computed in.
    """
    exponents = torch.arange(0, dim_head, 2, device=device).to(dtype) / dim_head
    angles = torch.outer(torch.arange(length, device=device).to(dtype), 1.0 / ROPE_THETA**exponents)
    return torch.polar(torch.ones_like(angles), angles)


def rotated(x: Tensor, rotation: Tensor, *, float32_inside: bool = False) -> Tensor:
    """Queries or keys (rows, tokens, heads, d) with channels 2j and 2j+1 turned as one complex number."""
    wide = x.to(_inside(x.dtype, float32_inside=float32_inside)).contiguous()
    pairs = torch.view_as_complex(wide.unflatten(-1, (x.shape[-1] // 2, 2)))
    return torch.view_as_real(pairs * rotation[:, None, :]).flatten(-2).to(x.dtype)


class NeoBERT(nn.Module):
    """The encoder: embeddings, pre-norm layers, final norm.

    float32_inside: norms and rotations go through float32 in a float64 model too, as upstream's do; without it a
    float64 model is float64 throughout. Types up to float32 are the same either way.
    """

    def __init__(self, config: NeoBERTConfig, *, float32_inside: bool = False) -> None:
        super().__init__()
        self.config = config
        self.float32_inside = float32_inside
        self.encoder = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        if not config.rope:
            # Row 0 is that of padding; content counts from 1.
            self.positional_embedding = nn.Embedding(config.max_length + 1, config.hidden_size, padding_idx=0)
        self.transformer_encoder = nn.ModuleList(
            EncoderBlock(config, float32_inside=float32_inside) for _ in range(config.num_hidden_layers)
        )
        self.layer_norm = _norm(config, float32_inside=float32_inside)
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        initialise(module, self.config)

    def forward(
        self, src: Tensor, pad_mask: Tensor | None = None, packed_seqlens: PackedLengths | None = None
    ) -> Tensor:
        """Compute the hidden representation, (rows, tokens, hidden_size), after the final norm.

        Args:
            src: int64 (rows, tokens). With rope any number of tokens, else at most `max_length` that are not padding.
            pad_mask: floating, added to the attention scores: (rows, tokens) for keys, or (rows, tokens, tokens) for
                queries and keys; 0 keeps, -inf drops. Or bool of those shapes, True keeps.
            packed_seqlens: per row the lengths of consecutive segments that attend only within themselves: lists, or
                a CPU integer tensor, (rows, most segments) filled up with 0, or (rows,) for one segment a row, or
                (segments,) for a batch of one row. A segment of 0 is none; tokens after the last segment attend to
                nothing. Positions run on over segments. `pad_mask` is ignored beside it, with a warning.

        Raises:
            ValueError: a mask has another shape, or floating values that cannot be meant to be added; segments do not
                fit the rows; a position is beyond the table of learned ones.
            TypeError: a mask or packed_seqlens is of another type.
            RuntimeError: packed_seqlens is a tensor that is not on the CPU.
        """
        rows, length = src.shape
        if packed_seqlens is not None:
            if pad_mask is not None:
                warnings.warn("pad_mask is ignored, because packed_seqlens is given", UserWarning, stacklevel=2)
            attn_mask: Tensor | None = _block_diagonal(packed_seqlens, rows, length, src.device)
        else:
            attn_mask = _attention_mask(pad_mask, rows, length)

        x = self.encoder(src)
        rotation = None
        if self.config.rope:
            inside = _inside(x.dtype, float32_inside=self.float32_inside)
            # Made at each call: a table that is kept can be cast, left uninitialised or grow stale.
            rotation = rotary_table(length, self.config.dim_head, dtype=inside, device=x.device)
        else:
            x = x + self.positional_embedding(self._positions(src))
        for block in self.transformer_encoder:
            x = block(x, attn_mask, rotation)
        output: Tensor = self.layer_norm(x)
        return output

    def _positions(self, src: Tensor) -> Tensor:
        """1, 2, 3, ... over the tokens that are not padding, whatever the mask says; 0 for padding."""
        content = src != self.config.pad_token_id
        positions = content.cumsum(dim=1) * content
        # Looked at only where it can fail, because looking waits for an accelerator.
        if src.shape[1] > self.config.max_length and int(positions.max()) > self.config.max_length:
            raise ValueError(
                f"a row has {int(positions.max())} tokens that are not padding, and learned positions end at"
                f" max_length={self.config.max_length}; shorten it, or train with rope"
            )
        return positions


class NeoBERTLMHead(nn.Module):
    """The masked language model that is trained: the encoder and a decoder with a bias, by default a tied one."""

    def __init__(self, config: NeoBERTConfig, *, float32_inside: bool = False) -> None:
        super().__init__()
        self.config = config
        self.model = NeoBERT(config, float32_inside=float32_inside)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        initialise(self.decoder, config)
        if config.tie_word_embeddings:
            self.decoder.weight = self.model.encoder.weight

    def forward(
        self, src: Tensor, pad_mask: Tensor | None = None, packed_seqlens: PackedLengths | None = None
    ) -> dict[str, Tensor]:
        """`hidden_representation` (rows, tokens, hidden_size) and `logits` (rows, tokens, vocab_size).

        Arguments and errors are those of `NeoBERT.forward`.
        """
        hidden = self.model(src, pad_mask, packed_seqlens)
        return {"hidden_representation": hidden, "logits": self.decoder(hidden)}


class NeoBERTForSequenceClassification(nn.Module):
    """The encoder and a head on its first token: dropout, dense, tanh, dropout, classifier."""

    def __init__(
        self,
        config: NeoBERTConfig,
        num_labels: int = 2,
        classifier_dropout: float = 0.1,
        *,
        float32_inside: bool = False,
    ) -> None:
        super().__init__()
        if num_labels < 1:
            raise ValueError(f"num_labels={num_labels}, expected at least 1")
        self.config = config
        self.num_labels = num_labels
        self.model = NeoBERT(config, float32_inside=float32_inside)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, num_labels)
        for layer in (self.dense, self.classifier):
            nn.init.normal_(layer.weight, std=config.classifier_init_range)
            nn.init.zeros_(layer.bias)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """`logits` (rows, num_labels), `hidden_representation` (rows, tokens, hidden_size) and, with labels, `loss`.

        Args:
            input_ids: int64 (rows, tokens).
            attention_mask: (rows, tokens); see `additive_mask`.
            labels: with one label a regression, mean squared error; integers (rows,), cross-entropy; else
                (rows, num_labels), binary cross-entropy.

        Raises:
            ValueError: the mask has another shape or values without meaning.
        """
        pad_mask = None if attention_mask is None else additive_mask(attention_mask)
        hidden = self.model(input_ids, pad_mask)
        pooled = torch.tanh(self.dense(self.dropout(hidden[:, 0])))
        logits = self.classifier(self.dropout(pooled))
        outputs = {"hidden_representation": hidden, "logits": logits}
        if labels is not None:
            outputs["loss"] = self._loss(logits, labels)
        return outputs

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.num_labels == 1:
            return F.mse_loss(logits.flatten(), labels.flatten().to(logits.dtype))
        if not labels.is_floating_point():
            return F.cross_entropy(logits, labels.flatten())
        return F.binary_cross_entropy_with_logits(logits, labels)


def initialise(module: nn.Module, config: NeoBERTConfig) -> None:
    """Draws one embedding or linear layer: uniform, biases and the row of padding 0. Norms stay at 1 and 0."""
    if isinstance(module, nn.Linear):
        nn.init.uniform_(module.weight, -config.decoder_init_range, config.decoder_init_range)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.uniform_(module.weight, -config.embedding_init_range, config.embedding_init_range)
        if module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()


def additive_mask(attention_mask: Tensor) -> Tensor:
    """A mask as Hugging Face's tokenizers and models have it, (rows, tokens), as one that is added to scores.

    bool: True keeps. Integers: all but 0 keep. Floating with a value below 0, or all 0: added as it is. Other floating
    values: all but 0 keep. float32 unless it was added already. Raises ValueError on NaN and +inf.
    """
    if attention_mask.is_floating_point():
        _refuse_not_a_score(attention_mask)
        # Upstream reads a floating mask of zeros as "attend to nothing"; an additive mask of a batch without padding
        # is just that, and drops nothing.
        if bool((attention_mask < 0).any()) or not bool(attention_mask.any()):
            return attention_mask
    dropped = attention_mask == 0
    return torch.zeros_like(attention_mask, dtype=torch.float32).masked_fill(dropped, -math.inf)


def _attention_mask(pad_mask: Tensor | None, rows: int, length: int) -> Tensor | None:
    """The training mask as attention takes it: (rows, 1, 1 or queries, keys)."""
    if pad_mask is None:
        return None
    if tuple(pad_mask.shape) not in ((rows, length), (rows, length, length)):
        raise ValueError(
            f"pad_mask has shape {tuple(pad_mask.shape)}, expected {(rows, length)} or {(rows, length, length)}"
        )
    if pad_mask.is_floating_point():
        _refuse_not_a_score(pad_mask)
        # Upstream adds ones and zeros to the scores, which masks nothing and shifts everything: a Hugging Face mask
        # that was passed by mistake is refused here. A meta tensor has no values to look at.
        if not pad_mask.is_meta and bool((pad_mask > 0).any()) and not bool((pad_mask < 0).any()):
            raise ValueError(
                "pad_mask is floating and has values above 0 and none below, as a mask of ones and zeros does, which"
                " would be added to the scores; expected 0 to keep and -inf to drop, or bool with True to keep"
            )
    elif pad_mask.dtype != torch.bool:
        raise TypeError(
            f"pad_mask is {pad_mask.dtype}, expected a floating mask that is added to the scores (0 keeps, -inf"
            " drops) or bool (True keeps)"
        )
    return pad_mask[:, None, None, :] if pad_mask.dim() == 2 else pad_mask[:, None]


def _refuse_not_a_score(mask: Tensor) -> None:
    if not mask.is_meta and bool((mask.isnan() | (mask == math.inf)).any()):
        raise ValueError("a floating mask holds NaN or +inf, expected 0 to keep and -inf to drop")


def _block_diagonal(packed_seqlens: PackedLengths, rows: int, length: int, device: torch.device) -> Tensor:
    """Which queries see which keys, bool (rows, 1, length, length): those of the same segment."""
    segments = torch.zeros(rows, length, dtype=torch.long)
    for row, lengths in enumerate(_segment_lengths(packed_seqlens, rows, length)):
        start = 0
        for number, count in enumerate(lengths, start=1):
            segments[row, start : start + count] = number
            start += count
    segments = segments.to(device)[:, None]
    # 0 is what lies in no segment.
    return (segments[..., :, None] == segments[..., None, :]) & (segments != 0)[..., :, None]


def _segment_lengths(packed_seqlens: PackedLengths, rows: int, length: int) -> list[list[int]]:
    if isinstance(packed_seqlens, Tensor):
        if packed_seqlens.device.type != "cpu":
            raise RuntimeError(
                f"packed_seqlens is on {packed_seqlens.device}, expected a CPU tensor or lists; move it with .cpu()"
            )
        if packed_seqlens.is_floating_point() or packed_seqlens.is_complex() or packed_seqlens.dtype == torch.bool:
            raise TypeError(f"packed_seqlens is {packed_seqlens.dtype}, expected an integer tensor")
        if packed_seqlens.dim() not in (1, 2):
            raise ValueError(f"packed_seqlens has shape {tuple(packed_seqlens.shape)}, expected one or two axes")
        if packed_seqlens.dim() == 1:
            # One segment of each row; a batch of one row may have several.
            packed_seqlens = packed_seqlens[None] if rows == 1 else packed_seqlens[:, None]
    given: list[Any] = packed_seqlens.tolist() if isinstance(packed_seqlens, Tensor) else list(packed_seqlens)
    if len(given) != rows:
        raise ValueError(f"packed_seqlens has {len(given)} rows, and the batch has {rows}")
    lengths: list[list[int]] = []
    for row, counts in enumerate(given):
        if isinstance(counts, str) or not isinstance(counts, Sequence):
            raise TypeError(f"packed_seqlens[{row}] is {type(counts).__name__}, expected the lengths of its segments")
        if wrong := [count for count in counts if not isinstance(count, int) or isinstance(count, bool) or count < 0]:
            raise ValueError(f"packed_seqlens[{row}] holds {wrong[0]!r}, expected whole numbers of 0 or more")
        if sum(counts) > length:
            raise ValueError(f"packed_seqlens[{row}] adds up to {sum(counts)}, more than the {length} tokens of a row")
        lengths.append(list(counts))
    return lengths
