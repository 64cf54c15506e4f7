# SPDX-License-Identifier: Apache-2.0
"""nanoGPT as a Hugging Face causal language model, for transformers 4.57 and 5.x from the same file.

It computes what karpathy/nanoGPT computes (`model.py` at commit 3adf61e154c3fe3fca428ad6bc3818b27a3b8291) and has
its tensor names, so weights travel both ways without a change. What it adds is the library's: padding masks, a
key-value cache, generation, other attention kernels.
"""

import os
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
import transformers
from torch import Tensor, nn
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

from .checkpoint import load_checkpoint, save_checkpoint
from .configuration_nanogpt import NanoGPTConfig

TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5
LAYER_NORM_EPSILON = 1e-5
INITIAL_STD = 0.02
IGNORED_LABEL = -100
IGNORED_TARGET = -1


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
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1).to(value.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


def next_token_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = IGNORED_LABEL,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Cross-entropy of the next token, in float32 or, unlike the library's own, in the float64 it is given.

    Args:
        logits: (batch, length, vocab_size).
        labels: int64 (batch, length), the input itself; shifted here.
        vocab_size: number of tokens.
        num_items_in_batch: what to divide the sum by; the mean over what is not ignored by default.
        ignore_index: label of positions that do not count.
        shift_labels: int64 (batch, length), already shifted, instead of `labels`.

    Returns:
        A scalar; not a number when every position is ignored and no count is given, as in nanoGPT.
    """
    if shift_labels is None:
        if labels is None:
            raise ValueError("give labels or shift_labels")
        shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=ignore_index)
    loss = nn.functional.cross_entropy(
        logits.reshape(-1, vocab_size).to(torch.promote_types(logits.dtype, torch.float32)),
        shift_labels.reshape(-1).to(logits.device),
        ignore_index=ignore_index,
        reduction="mean" if num_items_in_batch is None else "sum",
    )
    if num_items_in_batch is not None:
        loss = loss / torch.as_tensor(num_items_in_batch, device=loss.device)
    return loss


class NanoGPTAttention(nn.Module):
    """Causal multi-head attention, with the scale 1/sqrt(head size)."""

    def __init__(self, config: NanoGPTConfig, layer_idx: int) -> None:
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


class NanoGPTMLP(nn.Module):
    """Two linear layers around the exact (erf) GELU."""

    def __init__(self, config: NanoGPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.c_proj.ends_residual_branch = True  # type: ignore[assignment]
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: Tensor) -> Tensor:
        output: Tensor = self.dropout(self.c_proj(self.gelu(self.c_fc(hidden_states))))
        return output


class NanoGPTBlock(GradientCheckpointingLayer):
    """One pre-norm residual layer."""

    def __init__(self, config: NanoGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPSILON, bias=config.bias)
        self.attn = NanoGPTAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPSILON, bias=config.bias)
        self.mlp = NanoGPTMLP(config)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        attended, weights = self.attn(self.ln_1(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.ln_2(hidden_states)), weights


class NanoGPTPreTrainedModel(PreTrainedModel):
    """What both models share: how weights start, what the library may do with them."""

    config_class = NanoGPTConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _input_embed_layer = "wte"
    _no_split_modules: ClassVar[list[str]] = ["NanoGPTBlock"]
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
            if name == "bias":
                nn.init.zeros_(parameter)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(parameter)
            else:
                # The sum of all residual branches starts at one scale, whatever the depth.
                branches = 2 * self.config.n_layer if getattr(module, "ends_residual_branch", False) else 1
                nn.init.normal_(parameter, std=INITIAL_STD / branches**0.5)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Save the model with its code, so that `AutoModel` and `AutoModelForCausalLM` both load the directory."""
        # The library names only the class being saved, and needs the other one to be found as well.
        module = __name__.rpartition(".")[2]
        self.config.auto_map = {
            **(getattr(self.config, "auto_map", None) or {}),
            "AutoModel": f"{module}.NanoGPTModel",
            "AutoModelForCausalLM": f"{module}.NanoGPTLMHeadModel",
        }
        return super().save_pretrained(save_directory, *args, **kwargs)


class NanoGPTModel(NanoGPTPreTrainedModel):
    """nanoGPT without its head: token ids in, normalised hidden states out."""

    def __init__(self, config: NanoGPTConfig) -> None:
        config.validate_architecture()
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(NanoGPTBlock(config, layer_idx) for layer_idx in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPSILON, bias=config.bias)
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
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Compute the hidden states after the last norm.

        Args:
            input_ids: int64 (batch, length). Either these or `inputs_embeds`.
            attention_mask: (batch, past + length) of ints or bools, true where there is a token; or additive,
                (batch or 1, heads or 1, length, past + length).
            position_ids: int64 (batch or 1, length). By default positions count the tokens of a 2-D mask, so that
                padding on either side or in between changes nothing.
            past_key_values: the cache of the tokens that came before.
            inputs_embeds: (batch, length, n_embd), token embeddings without positions.
            use_cache: return a cache; never while gradient checkpointing is training.
            output_attentions: return attention weights, which only `eager` attention has.
            output_hidden_states: return the input of every block and the output of the last norm.

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
        if use_cache is None:
            use_cache = config.use_cache
        if self.gradient_checkpointing and self.training:
            use_cache = False
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

        hidden_states = self.drop(inputs_embeds + self.wpe(positions))
        all_hidden_states: tuple[Tensor, ...] = ()
        all_attentions: tuple[Tensor, ...] = ()
        for block in self.h:
            if output_hidden_states:
                all_hidden_states += (hidden_states,)
            hidden_states, weights = block(
                hidden_states,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                cache_position=cache_position,
                output_attentions=output_attentions,
                **kwargs,
            )
            if output_attentions and weights is not None:
                all_attentions += (weights,)
        hidden_states = self.ln_f(hidden_states)

        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*all_hidden_states, hidden_states) if output_hidden_states else None,
            attentions=all_attentions or None,
        )


class NanoGPTLMHeadModel(NanoGPTPreTrainedModel, GenerationMixin):
    """nanoGPT with its head, the token embedding itself."""

    _tied_weights_keys: ClassVar[Any] = (
        {"lm_head.weight": "transformer.wte.weight"} if TRANSFORMERS_5 else ["lm_head.weight"]
    )

    def __init__(self, config: NanoGPTConfig) -> None:
        super().__init__(config)
        self.transformer = NanoGPTModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.loss_function = next_token_loss
        self.post_init()

    @can_return_tuple
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
        logits_to_keep: int | Tensor = 0,
        targets: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits and, given labels or targets, the mean cross-entropy.

        Args not described here are those of [`NanoGPTModel.forward`].

        Args:
            labels: int64 (batch, length), the library's convention: the input itself, shifted here; -100 is ignored.
            targets: int64 (batch, length), nanoGPT's convention: already shifted; -1 is ignored.
            logits_to_keep: compute logits for the last so many positions only, 0 for all, or for the positions in a
                1-D index tensor. `num_logits_to_keep` is its older name.
            num_items_in_batch: divide the summed loss by this instead of by the number of labels that count.

        Returns:
            `loss` (scalar), `logits` (batch, kept, vocab_size), `past_key_values`, `hidden_states` and `attentions`;
            with `return_dict=False` a tuple in this order without those that are None.

        Raises:
            ValueError: labels and targets are both given, or come with `logits_to_keep`; or see `NanoGPTModel`.
        """
        logits_to_keep = kwargs.pop("num_logits_to_keep", logits_to_keep)
        if labels is not None and targets is not None:
            raise ValueError("give labels (shifted by the model) or targets (already shifted), not both")
        keeps_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if not keeps_all and (labels is not None or targets is not None):
            raise ValueError("a loss needs the logits of all positions; leave logits_to_keep out")

        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])

        loss = None
        if targets is not None:
            kwargs |= {"shift_labels": targets, "ignore_index": IGNORED_TARGET}
        if labels is not None or targets is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

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

    def _validate_generated_length(
        self, generation_config: Any, input_ids_length: int, has_default_max_length: bool
    ) -> None:
        # The last token is never fed back. Without this, a cached generation would fail half-way, or not at all.
        needed, block_size = generation_config.max_length - 1, self.config.block_size
        if generation_config.use_cache and needed > block_size:
            raise ValueError(
                f"generating up to {needed + 1} tokens needs {needed} positions, but block_size={block_size}; a cache "
                f"cannot move beyond that: generate fewer tokens, or from input_ids with generate(use_cache=False)"
            )
        super()._validate_generated_length(generation_config, input_ids_length, has_default_max_length)

    @classmethod
    def from_nanogpt_ckpt(cls, path: str | os.PathLike[str]) -> Self:
        """Load a checkpoint that nanoGPT's `train.py` wrote; the model comes back in eval mode.

        Every tensor keeps its bits and its dtype. See `checkpoint.load_checkpoint` for the dialects.

        Raises:
            CheckpointError: the file is missing, damaged, hostile or not a nanoGPT checkpoint.
        """
        checkpoint = load_checkpoint(path)
        with torch.device("meta"):
            model = cls(cls.config_class(**checkpoint.model_args))
        model.load_state_dict(checkpoint.state_dict, strict=True, assign=True)
        model.tie_weights()
        model.eval()
        return model

    def to_nanogpt_ckpt(
        self,
        path: str | os.PathLike[str],
        *,
        iter_num: int = 0,
        best_val_loss: float = 1e9,
        train_config: dict[str, Any] | None = None,
    ) -> None:
        """Write a checkpoint from which nanoGPT's `train.py` resumes and its `sample.py` samples.

        Args:
            path: where to write; an existing file is replaced only once the new one is complete.
            iter_num: number of training steps done.
            best_val_loss: best validation loss so far; by default any loss is better.
            train_config: what `train.py` ran with; `sample.py` looks for `dataset` in it.

        Raises:
            OSError: the file cannot be written; nothing is left behind.
        """
        config = self.config
        names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
        save_checkpoint(
            path,
            state_dict=self.state_dict(),
            model_args={name: getattr(config, name) for name in names},
            iter_num=iter_num,
            best_val_loss=best_val_loss,
            config=train_config or {},
        )


NanoGPTModel.register_for_auto_class("AutoModel")
NanoGPTLMHeadModel.register_for_auto_class("AutoModelForCausalLM")
# As remote code this file must not register: the next checkpoint of this type would then silently run this code.
if not __name__.startswith("transformers_modules"):
    AutoConfig.register(NanoGPTConfig.model_type, NanoGPTConfig, exist_ok=True)
    AutoModel.register(NanoGPTConfig, NanoGPTModel, exist_ok=True)
    AutoModelForCausalLM.register(NanoGPTConfig, NanoGPTLMHeadModel, exist_ok=True)
