# SPDX-License-Identifier: Apache-2.0
"""NeoBERT as Hugging Face encoder, masked language model and classifier, for transformers 4.57 and 5.x alike.

It computes what the training model of pszemraj/NeoBERT computes (commit 3c73efd88ceaf2ed726f25eb2877a754fa867891, MIT)
and has its tensor names, so weights travel both ways without a change. What it adds is the library's: masks of every
form, embeddings as inputs, other attention kernels. Packed sequences exist in the training model only.
"""

import math
import os
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput, SequenceClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_neobert import NeoBERTConfig
from .rotary import rotary_angles, rotate

TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5
IGNORED_LABEL = -100
# What callers of packed sequences pass, under the names of the training model and of flash attention.
PACKING = ("cu_seq", "max_length_", "max_seqlen", "packed_seqlens")


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
    dropped = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(dropped, value).transpose(1, 2), weights


def masked_lm_loss(logits: Tensor, labels: Tensor, num_items_in_batch: int | Tensor | None = None) -> Tensor:
    """Cross-entropy over the labels that are not -100, in float32 or, unlike the library's own, the float64 it gets.

    Args:
        logits: (..., vocab_size).
        labels: int64 (...), not shifted.
        num_items_in_batch: what to divide the sum by; the number of labels that count by default.

    Returns:
        A scalar; not a number when every label is ignored and no count is given, as in training.
    """
    loss = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).to(accumulation_dtype(logits.dtype)),
        labels.reshape(-1).to(logits.device, torch.long),
        ignore_index=IGNORED_LABEL,
        reduction="mean" if num_items_in_batch is None else "sum",
    )
    return _divided(loss, num_items_in_batch)


def _divided(loss: Tensor, count: int | Tensor | None) -> Tensor:
    return loss if count is None else loss / torch.as_tensor(count, device=loss.device)


def _refuse_unknown(arguments: dict[str, Any]) -> None:
    """Raise TypeError for arguments that forward does not have."""
    for name in arguments:
        if name.startswith(PACKING):
            raise TypeError(
                f"{name} is not supported: packed sequences exist in the training model only; give one text a row,"
                " and an attention_mask (batch, length)"
            )
        raise TypeError(f"forward has no argument {name!r}; it would change nothing")


# Masks


def additive_mask(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask of any form as one to be added to scores: 0 where attention may go, minus infinity elsewhere.

    Booleans keep where they are true, integers where they are not 0. Floating values are added as they are if one is
    below 0 or all are 0; else they keep where they are not 0.

    Args:
        attention_mask: (batch, length).
        dtype: floating type of the result.

    Raises:
        ValueError: a value is not a number or plus infinity.
    """
    nothing = torch.zeros((), dtype=dtype, device=attention_mask.device)
    by_choice = torch.where(attention_mask == 0, -math.inf, nothing)
    if not attention_mask.is_floating_point():
        return by_choice
    # Reading values would break the graph of torch.compile, and a tensor without memory has none.
    readable = not torch.compiler.is_compiling() and not attention_mask.is_meta
    if readable and bool((attention_mask.isnan() | (attention_mask == math.inf)).any()):
        raise ValueError("attention_mask holds NaN or plus infinity; 0 keeps, minus infinity drops")
    is_additive = (attention_mask < 0).any() | (attention_mask == 0).all()
    return torch.where(is_additive, attention_mask.to(dtype), by_choice)


def _check_shape(attention_mask: Tensor, rows: int, length: int) -> None:
    if attention_mask.ndim in (3, 4):
        raise ValueError(
            f"attention_mask has {attention_mask.ndim} axes: block-diagonal and packed masks are not supported;"
            f" expected (batch, length) = {(rows, length)}"
        )
    if tuple(attention_mask.shape) != (rows, length):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected (batch, length) = {(rows, length)}"
        )


# Layers


class NeoBERTRMSNorm(nn.Module):
    """Root mean square normalisation with a gain."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.to(accumulation_dtype(hidden_states.dtype))
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        # Rounded before the gain, as in training; torch's own rms_norm rounds after it.
        return normed.to(hidden_states.dtype) * self.weight

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def norm(config: NeoBERTConfig) -> nn.Module:
    """Return a norm over the width: RMSNorm or LayerNorm."""
    if config.rms_norm:
        return NeoBERTRMSNorm(config.hidden_size, config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)


class NeoBERTSwiGLU(nn.Module):
    """w3(silu(w1 x) * (w2 x)), without offsets; two thirds of the nominal width, up to a multiple of 8."""

    def __init__(self, config: NeoBERTConfig) -> None:
        super().__init__()
        inside = 8 * -(-(2 * config.intermediate_size // 3) // 8)
        self.w1 = nn.Linear(config.hidden_size, inside, bias=False)
        self.w2 = nn.Linear(config.hidden_size, inside, bias=False)
        self.w3 = nn.Linear(inside, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        output: Tensor = self.w3(F.silu(self.w1(hidden_states)) * self.w2(hidden_states))
        return output


def feed_forward(config: NeoBERTConfig) -> nn.Module:
    """Return the second half of a block: SwiGLU, or two linear layers around the exact (erf) GELU."""
    if config.hidden_act == "swiglu":
        return NeoBERTSwiGLU(config)
    return nn.Sequential(
        nn.Linear(config.hidden_size, config.intermediate_size, bias=False),
        nn.GELU(),
        nn.Linear(config.intermediate_size, config.hidden_size, bias=False),
    )


class NeoBERTBlock(GradientCheckpointingLayer):
    """One pre-norm residual layer, attention to both sides and feed-forward network, without offsets."""

    def __init__(self, config: NeoBERTConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.dim_head
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.attention_norm = norm(config)
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.wo = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.ffn_norm = norm(config)
        self.ffn = feed_forward(config)
        self.ffn_dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        attended, weights = self._attend(self.attention_norm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.resid_dropout(self.wo(attended))
        return hidden_states + self.ffn_dropout(self.ffn(self.ffn_norm(hidden_states))), weights

    def _attend(
        self,
        hidden_states: Tensor,
        angles: tuple[Tensor, Tensor] | None,
        attention_mask: Tensor | None,
        has_keys: Tensor | None,
        output_attentions: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what heads mix, (batch, length, width), and their weights where the implementation gives them.

        Args:
            hidden_states: (batch, length, width).
            angles: what `rotary_angles` gives.
            attention_mask: (batch, 1, 1, length), added to the scores; at least one finite value a row.
            has_keys: bool (batch, 1, 1, 1), false where a row has nothing to attend to and gets zeros.
            output_attentions: whether weights are wanted.
        """
        rows, length, width = hidden_states.shape
        # Query, key and value of the first head, then those of the second, and so on.
        heads = self.qkv(hidden_states).view(rows, length, self.config.num_attention_heads, 3 * self.head_dim)
        query, key, value = heads.chunk(3, dim=-1)
        if angles is not None:
            query, key = rotate(query, *angles), rotate(key, *angles)

        # set_attn_implementation works where the library finds the call of its own line in the text of this file.
        attention: Callable[..., Any] = eager_attention_forward
        if output_attentions or hidden_states.numel() == 0:
            pass  # only eager attention has weights to return, and takes no tokens at all
        elif TRANSFORMERS_5:
            attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, attention)
        elif self.config._attn_implementation != "eager":
            attention = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        output, weights = attention(
            self,
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attention_mask,
            scaling=self.scaling,
            dropout=self.config.dropout if self.training else 0.0,
        )
        if has_keys is not None:
            output = output.masked_fill(~has_keys, 0.0)
            weights = weights if weights is None else weights.masked_fill(~has_keys, 0.0)
        return output.reshape(rows, length, width), weights if output_attentions else None


# Models


class NeoBERTPreTrainedModel(PreTrainedModel):
    """What all models share: how weights start, what the library may do with them."""

    config_class = NeoBERTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["NeoBERTBlock"]
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        config = self.config
        # Only a module's own parameters: 5.x skips modules of remote code that have none, with what is in them.
        for name, parameter in module.named_parameters(recurse=False):
            if getattr(parameter, "_is_hf_initialized", False):
                continue  # came from a file; only its neighbours are missing
            if name == "bias":
                nn.init.zeros_(parameter)
            elif isinstance(module, nn.Embedding):
                nn.init.uniform_(parameter, -config.embedding_init_range, config.embedding_init_range)
                if module.padding_idx is not None:
                    with torch.no_grad():
                        parameter[module.padding_idx].zero_()
            elif not isinstance(module, nn.Linear):
                nn.init.ones_(parameter)
            elif getattr(module, "is_classifier", False):
                nn.init.normal_(parameter, std=config.classifier_init_range)
            else:
                nn.init.uniform_(parameter, -config.decoder_init_range, config.decoder_init_range)

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        embedding: nn.Module = self.base_model.encoder
        return embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.base_model.encoder = value

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Save the model with its code, so that every Auto class that NeoBERT has a model for loads the directory."""
        # The library names only the class being saved, and needs the other ones to be found as well.
        module = __name__.rpartition(".")[2]
        self.config.auto_map = {
            **(getattr(self.config, "auto_map", None) or {}),
            "AutoModel": f"{module}.NeoBERT",
            "AutoModelForMaskedLM": f"{module}.NeoBERTLMHead",
            "AutoModelForSequenceClassification": f"{module}.NeoBERTForSequenceClassification",
        }
        return super().save_pretrained(save_directory, *args, **kwargs)


class NeoBERT(NeoBERTPreTrainedModel):
    """NeoBERT without a head: token ids in, normalised hidden states out."""

    # A checkpoint of the masked language model has its head besides, which this model has no place for.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"^decoder\."]

    def __init__(self, config: NeoBERTConfig) -> None:
        config.validate_architecture()
        super().__init__(config)
        self.encoder = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        if not config.rope:
            # Row 0 is that of padding; content counts from 1.
            self.positional_embedding = nn.Embedding(config.max_length + 1, config.hidden_size, padding_idx=0)
        self.transformer_encoder = nn.ModuleList(NeoBERTBlock(config) for _ in range(config.num_hidden_layers))
        self.layer_norm = norm(config)
        self.post_init()

    def _learned_positions(
        self, input_ids: Tensor | None, mask: Tensor | None, position_ids: Tensor | None, inputs_embeds: Tensor
    ) -> Tensor:
        """Return the rows of the position table, (1 or batch, length): 1, 2, 3, ... for content, 0 for padding."""
        longest = self.config.max_length
        # Reading values would break the graph of torch.compile, and on a GPU wait for it.
        readable = not torch.compiler.is_compiling() and not inputs_embeds.is_meta
        if position_ids is not None:
            if readable and position_ids.numel() and not 0 <= position_ids.min() <= position_ids.max() <= longest:
                raise ValueError(
                    f"position_ids go from {position_ids.min()} to {position_ids.max()}, but the learned positions of"
                    f" max_length={longest} are 1 to {longest}, and 0 for padding"
                )
            return position_ids
        if input_ids is not None:
            content = input_ids != self.config.pad_token_id
        elif mask is not None:
            content = mask >= 0
        else:
            content = torch.ones(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
        positions: Tensor = content.cumsum(dim=1) * content
        if readable and positions.shape[1] > longest and int(positions.max()) > longest:
            raise ValueError(
                f"a row has {int(positions.max())} tokens that are not padding, but learned positions end at"
                f" max_length={longest}; shorten it"
            )
        return positions

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Compute the hidden states after the last norm.

        Args:
            input_ids: int64 (batch, length). Either these or `inputs_embeds`.
            attention_mask: (batch, length), see `additive_mask`. A row with nothing to attend to gets zeros from its
                attention.
            position_ids: integers (batch or 1, length). With rotary embeddings any numbers, from 0 by default. Else
                rows of the learned table; by default tokens other than `pad_token_id` count from 1 and those are at
                0, whatever the mask says. Among `inputs_embeds` the mask tells what is padding: less than 0, once it
                is additive.
            token_type_ids: accepted because tokenizers give it, and ignored: NeoBERT has no token types.
            inputs_embeds: (batch, length, hidden_size), token embeddings without positions.
            output_attentions: return attention weights (batch, heads, length, length) of each block. For these the
                call uses eager attention.
            output_hidden_states: return the input of every block and the output of the last norm.
            return_dict: false for a tuple without what is None; `config.return_dict` by default.
            kwargs: none; see TypeError.

        Returns:
            `last_hidden_state` (batch, length, hidden_size), `hidden_states` and `attentions`.

        Raises:
            TypeError: an argument is unknown, those of packed sequences among them.
            ValueError: a mask has another shape or values without meaning, a learned position does not exist, or not
                exactly one of `input_ids` and `inputs_embeds` is given.
        """
        _refuse_unknown(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        config = self.config
        if output_attentions is None:
            output_attentions = config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if return_dict is None:
            return_dict = config.return_dict

        if inputs_embeds is None:
            inputs_embeds = self.encoder(input_ids)
        rows, length = inputs_embeds.shape[:2]
        mask, scores_mask, has_keys = None, None, None
        if attention_mask is not None:
            _check_shape(attention_mask, rows, length)
            mask = additive_mask(attention_mask, inputs_embeds.dtype)
            has_keys = (mask > -math.inf).any(dim=1)[:, None]
            # Softmax over nothing is not a number on some devices: such a row attends to all, and what it gets is
            # cleared.
            scores_mask = mask.masked_fill(~has_keys, 0.0)[:, None, None, :]
            has_keys = has_keys[:, :, None, None]

        angles, hidden_states = None, inputs_embeds
        if config.rope:
            if position_ids is None:
                position_ids = torch.arange(length, device=inputs_embeds.device)[None]
            angles = rotary_angles(position_ids, config.dim_head, dtype=inputs_embeds.dtype)
        else:
            positions = self._learned_positions(input_ids, mask, position_ids, inputs_embeds)
            hidden_states = inputs_embeds + self.positional_embedding(positions)

        all_hidden_states: tuple[Tensor, ...] = ()
        all_attentions: tuple[Tensor, ...] = ()
        for block in self.transformer_encoder:
            if output_hidden_states:
                all_hidden_states += (hidden_states,)
            hidden_states, weights = block(
                hidden_states,
                angles=angles,
                attention_mask=scores_mask,
                has_keys=has_keys,
                output_attentions=output_attentions,
            )
            if weights is not None:
                all_attentions += (weights,)
        hidden_states = self.layer_norm(hidden_states)

        output = BaseModelOutput(
            last_hidden_state=hidden_states,
            hidden_states=(*all_hidden_states, hidden_states) if output_hidden_states else None,
            attentions=all_attentions or None,
        )
        return output if return_dict else output.to_tuple()


class NeoBERTLMHead(NeoBERTPreTrainedModel):
    """NeoBERT that predicts masked tokens: a linear layer with an offset, whose matrix may be the token embedding."""

    _tied_weights_keys: ClassVar[Any] = (
        {"decoder.weight": "model.encoder.weight"} if TRANSFORMERS_5 else ["decoder.weight"]
    )

    def __init__(self, config: NeoBERTConfig) -> None:
        super().__init__(config)
        self.model = NeoBERT(config)
        self.decoder: nn.Module = nn.Linear(config.hidden_size, config.vocab_size)
        self.loss_type = "ForMaskedLM"
        self.loss_function = masked_lm_loss
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """Return the decoder."""
        return self.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the decoder."""
        self.decoder = new_embeddings

    @classmethod
    def _load_pretrained_model(cls, model: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = super()._load_pretrained_model(model, *args, **kwargs)
        model._settle_tie()
        return loaded

    def _settle_tie(self) -> None:
        """Untie a model whose file has two matrices that differ; 4.57 would overwrite one with the other in silence."""
        embedding: Any = self.get_input_embeddings()
        decoder: Any = self.get_output_embeddings()
        one, other = embedding.weight, decoder.weight
        if not self.config.tie_word_embeddings or one is other:
            return
        # What no file has is without memory at this point.
        if one.is_meta or other.is_meta:
            if one.is_meta and not TRANSFORMERS_5:
                embedding.weight = other  # 5.x goes either way itself
            return
        if torch.equal(one, other):
            return
        self.config.tie_word_embeddings = False
        warnings.warn(
            "decoder.weight and model.encoder.weight of this checkpoint differ, so they stay two tensors, and"
            " tie_word_embeddings is false from now on; write that into config.json, or leave decoder.weight out of"
            " the file",
            stacklevel=2,
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Compute logits and, given labels, the mean cross-entropy.

        Args not described here, and errors, are those of [`NeoBERT.forward`].

        Args:
            labels: int64 (batch, length), not shifted; -100 is ignored.
            num_items_in_batch: divide the summed loss by this instead of by the number of labels that count.

        Returns:
            `loss` (scalar), `logits` (batch, length, vocab_size), `hidden_states` and `attentions`; with
            `return_dict=False` a tuple in this order without those that are None.
        """
        if return_dict is None:
            return_dict = self.config.return_dict
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        logits = self.decoder(outputs.last_hidden_state)
        output = MaskedLMOutput(
            loss=None if labels is None else self.loss_function(logits, labels, num_items_in_batch=num_items_in_batch),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if return_dict else output.to_tuple()


class NeoBERTForSequenceClassification(NeoBERTPreTrainedModel):
    """NeoBERT that classifies a text by its first token: dropout, dense, tanh, dropout, classifier."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"^decoder\."]

    def __init__(self, config: NeoBERTConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = NeoBERT(config)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout if config.classifier_dropout is None else config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        for layer in (self.dense, self.classifier):
            layer.is_classifier = True  # type: ignore[assignment]
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Compute one row of logits for each text and, given labels, the loss.

        Args not described here, and errors, are those of [`NeoBERT.forward`].

        Args:
            labels: by `config.problem_type`: "regression", (batch,) or (batch, num_labels) of numbers, mean squared
                error; "single_label_classification", integers (batch,), cross-entropy; "multi_label_classification",
                (batch, num_labels) from 0 to 1, binary cross-entropy. Without a problem type, each call goes by its
                labels: regression if there is one label, else single for integers, else multi.
            num_items_in_batch: divide the summed loss by this instead of by the number of labels.

        Returns:
            `loss` (scalar), `logits` (batch, num_labels), `hidden_states` and `attentions`; with `return_dict=False`
            a tuple in this order without those that are None.
        """
        if return_dict is None:
            return_dict = self.config.return_dict
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        pooled = torch.tanh(self.dense(self.dropout(outputs.last_hidden_state[:, 0])))
        logits = self.classifier(self.dropout(pooled))
        output = SequenceClassifierOutput(
            loss=None if labels is None else self._loss(logits, labels, num_items_in_batch),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if return_dict else output.to_tuple()

    def _loss(self, logits: Tensor, labels: Tensor, num_items_in_batch: int | Tensor | None) -> Tensor:
        problem = self.config.problem_type
        # Not kept: the labels of another call may be of another kind.
        if problem is None:
            is_class = not labels.is_floating_point() and labels.dtype != torch.bool
            kind = "single_label_classification" if is_class else "multi_label_classification"
            problem = "regression" if self.num_labels == 1 else kind
        labels = labels.to(logits.device)
        if problem == "single_label_classification":
            return masked_lm_loss(logits, labels, num_items_in_batch)
        wide = logits.to(accumulation_dtype(logits.dtype))
        if labels.numel() != logits.numel() or labels.shape[0] != logits.shape[0]:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}; expected {tuple(logits.shape)} for problem_type={problem!r}"
            )
        measure = F.mse_loss if problem == "regression" else F.binary_cross_entropy_with_logits
        reduction = "mean" if num_items_in_batch is None else "sum"
        loss = measure(wide, labels.view(logits.shape).to(wide.dtype), reduction=reduction)
        return _divided(loss, num_items_in_batch)


NeoBERT.register_for_auto_class("AutoModel")
NeoBERTLMHead.register_for_auto_class("AutoModelForMaskedLM")
NeoBERTForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
# As remote code this file must not register: the next checkpoint of this type would then silently run this code.
if not __name__.startswith("transformers_modules"):
    AutoConfig.register(NeoBERTConfig.model_type, NeoBERTConfig, exist_ok=True)
    AutoModel.register(NeoBERTConfig, NeoBERT, exist_ok=True)
    AutoModelForMaskedLM.register(NeoBERTConfig, NeoBERTLMHead, exist_ok=True)
    AutoModelForSequenceClassification.register(NeoBERTConfig, NeoBERTForSequenceClassification, exist_ok=True)
