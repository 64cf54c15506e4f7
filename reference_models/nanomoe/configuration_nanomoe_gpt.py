# SPDX-License-Identifier: Apache-2.0
"""The hyperparameters of the Hugging Face nanoMoE, under nanoMoE's own names."""

import difflib
import inspect
import math
from typing import Any, ClassVar, Self

from transformers import GenerationConfig, PretrainedConfig

# What a config.json may hold beside nanoMoE's fields and beside what the installed transformers itself knows: keys
# that either 4.57 or 5.x, the Auto classes, a quantizer or `from_pretrained` put there.
_GENERIC_KEYS = {
    "add_cross_attention",
    "attn_implementation",
    "auto_map",
    "cross_attention_hidden_size",
    "custom_pipelines",
    "experts_implementation",
    "finetuning_task",
    "gradient_checkpointing",
    "is_causal",
    "is_decoder",
    "name_or_path",
    "num_labels",
    "per_layer_config",
    "prefix",
    "pruned_heads",
    "quantization_config",
    "sep_token_id",
    "task_specific_params",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tie_last_hidden_states",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "transformers_weights",
    "use_bfloat16",
}

_SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "n_exp", "moe_top_k", "min_capacity", "stride")
_FLAGS = (
    "bias",
    "use_aux_loss",
    "use_router_z_loss",
    "use_router_ortho_loss",
    "use_experts_ortho_loss",
    "use_gate_output_loss",
    "use_noisy_top_k",
    "use_switch_tfm_init",
    "router_use_full_prec",
    "use_qwen3_moe_mlp",
    "pad_tokens_take_capacity",
)
_WEIGHTS = (
    "aux_loss_weight",
    "router_z_loss_weight",
    "router_ortho_loss_weight",
    "router_ortho_neg_corr_weight",
    "experts_ortho_loss_weight",
    "gate_output_loss_weight",
)
_ABOVE_ZERO = ("train_capacity", "eval_capacity", "switch_tfm_init_scale")
_CHOICES = {
    "architecture": ("nanomoe", "ancestor"),
    "gelu_approximate": ("none", "tanh"),
    "label_convention": ("hf", "preshifted"),
}
# What the ancestor's own file does not have, at the values that switch it off.
_NOT_IN_THE_ANCESTOR = {"moe_start_layer": 0, "use_qwen3_moe_mlp": False, "use_router_ortho_loss": False}
_ONLY_IN_THE_ANCESTOR: dict[str, Any] = {"dropout": 0, "gelu_approximate": "none"}


class GPTConfig(PretrainedConfig):
    """Configuration of a [`GPT`].

    Field names, order and defaults are those of `GPTConfig` in askerlee/nanoMoE at commit 07e6c16; the names that
    other models and other revisions use (`hidden_size`, `sequence_len`, `num_experts`, `top_k`, ...) work too, as
    arguments, in config.json and as attributes. `top_k` is always the number of experts of a token, never the
    generation parameter, which belongs to `GenerationConfig` or to the call of `generate`.

    Args:
        block_size: longest sequence, and number of rows of the position table.
        vocab_size: number of tokens.
        n_layer: number of blocks.
        n_head: number of attention heads; divides `n_embd`.
        n_embd: width of the model. An MLP and an expert are four times as wide.
        bias: whether linear layers and plain experts have an offset. RMSNorm and SwiGLU experts never do.
        n_exp: number of experts of a layer; 1 makes every layer dense.
        moe_top_k: number of experts of a token, at most `n_exp`.
        use_aux_loss, use_router_z_loss, use_router_ortho_loss, use_experts_ortho_loss, use_gate_output_loss: which
            auxiliary losses are added to the training loss; the last three exist with SwiGLU experts only.
        use_noisy_top_k: add noise of a learned size to the router logits in training.
        aux_loss_weight, router_z_loss_weight, router_ortho_loss_weight, experts_ortho_loss_weight,
            gate_output_loss_weight: factors of the losses, each summed over layers.
        router_ortho_neg_corr_weight: factor of negative correlations in the router orthogonality loss.
        train_capacity, eval_capacity: how many times its fair share of slots an expert accepts.
        min_capacity: how many slots an expert accepts at least.
        stride, moe_start_layer: layer i has experts if i >= moe_start_layer and (i + 1) % stride == 0, in the
            ancestor if i % stride == 0. stride is 1 by default, in the ancestor 2.
        use_switch_tfm_init: start linear layers and experts from a truncated normal, as the Switch Transformer.
        switch_tfm_init_scale: its variance times the fan-in, before truncation.
        router_use_full_prec: leave autocast off in the router.
        use_qwen3_moe_mlp: SwiGLU experts, without offsets.
        architecture: which original this is. "nanomoe" has RMSNorm, QK norm and squared ReLU (askerlee/nanoMoE at
            84a1de8); "ancestor" has LayerNorm, erf GELU and dropout, and adds noise, load balancing and router z loss
            in evaluation too (wolfecameron/nanoMoE at 661fbcf).
        dropout: probability of dropping an embedding, an attention weight or an output of a branch; ancestor only.
        gelu_approximate: "none" is the ancestor's GELU; "tanh" the approximation that GPT-2 was trained with.
        label_convention: what `labels` means. "hf", the default, because the library's Trainer and collators give the
            input itself: the model shifts. "preshifted" is upstream's: `labels[:, t]` follows `input_ids[:, t]`.
            -100 and -1 are ignored in both; `targets` are always pre-shifted.
        pad_tokens_take_capacity: route tokens that the attention mask marks as padding like any other, as the
            originals do. By default they are left out, so that a padded row equals the row alone.
        use_cache: whether `forward` and `generate` use a key-value cache unless told otherwise. None: exactly where
            that cannot change the result, so not where `capacity_can_drop`.
        tie_word_embeddings: always true, the output matrix is the token embedding.
        bos_token_id, eos_token_id, pad_token_id: nanoMoE has none of them.
        kwargs: what every `PretrainedConfig` takes.

    Raises:
        ValueError: a value is out of range, two names of one field disagree, a field does not exist in the chosen
            architecture, or a keyword is unknown.
    """

    model_type = "nanomoe_gpt"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "losses", "router_logits"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "block_size",
        "n_positions": "block_size",
        "num_attention_heads": "n_head",
        "num_experts": "n_exp",
        "num_experts_per_tok": "moe_top_k",
        "num_hidden_layers": "n_layer",
        "num_local_experts": "n_exp",
        "sequence_len": "block_size",
        "top_k": "moe_top_k",
    }

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Refuse two names of one field that disagree; only here does a given value not look like a default."""
        given = dict(zip(inspect.signature(cls.__init__).parameters, (None, *args), strict=False)) | kwargs
        for alias, name in cls.attribute_map.items():
            if alias in given and given.setdefault(name, given[alias]) != given[alias]:
                raise ValueError(
                    f"{name}={given[name]!r} and {alias}={given[alias]!r} are names of one field and disagree"
                )
        instance: Self = super().__new__(cls)
        return instance

    def __init__(
        self,
        block_size: int = 1024,
        vocab_size: int = 50304,
        n_layer: int = 12,
        n_head: int = 12,
        n_embd: int = 768,
        bias: bool = True,
        n_exp: int = 1,
        moe_top_k: int = 2,
        use_aux_loss: bool = False,
        use_router_z_loss: bool = False,
        use_router_ortho_loss: bool = False,
        use_experts_ortho_loss: bool = True,
        use_gate_output_loss: bool = True,
        use_noisy_top_k: bool = False,
        aux_loss_weight: float = 0.01,
        router_z_loss_weight: float = 0.001,
        router_ortho_loss_weight: float = 0.01,
        router_ortho_neg_corr_weight: float = 1,
        experts_ortho_loss_weight: float = 0.01,
        gate_output_loss_weight: float = 0.01,
        train_capacity: float = 1.25,
        eval_capacity: float = 2.0,
        min_capacity: int = 4,
        stride: int | None = None,
        moe_start_layer: int = 0,
        use_switch_tfm_init: bool = False,
        switch_tfm_init_scale: float = 1.0,
        router_use_full_prec: bool = False,
        use_qwen3_moe_mlp: bool = False,
        *,
        architecture: str = "nanomoe",
        dropout: float = 0.0,
        gelu_approximate: str = "none",
        label_convention: str = "hf",
        pad_tokens_take_capacity: bool = False,
        use_cache: bool | None = None,
        tie_word_embeddings: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        given = locals()
        own = {name: given[name] for name in inspect.signature(GPTConfig.__init__).parameters if name in given}
        del own["self"], own["kwargs"]
        if stride is None:
            own["stride"] = 2 if architecture == "ancestor" else 1
        own |= {name: kwargs.pop(alias) for alias, name in self.attribute_map.items() if alias in kwargs}
        self._refuse_unknown(own, kwargs)
        super().__init__(**kwargs)
        for name, value in own.items():
            setattr(self, name, value)
        self.validate_architecture()

    def _refuse_unknown(self, own: dict[str, Any], kwargs: dict[str, Any]) -> None:
        """Raise for a keyword that neither nanoMoE nor transformers knows, and for a file of another model."""
        model_type = kwargs.get("model_type", self.model_type)
        if model_type != self.model_type:
            hint = "; GPT.from_pretrained_gpt2 imports it" if model_type == "gpt2" else ""
            raise ValueError(f"config.json is of a model of type {model_type!r}, expected {self.model_type!r}{hint}")
        known = {*PretrainedConfig().to_dict(), *GenerationConfig().to_dict(), *_GENERIC_KEYS}
        for key in kwargs:
            if key not in known and not key.startswith("_"):
                nearest = difflib.get_close_matches(key, [*own, *self.attribute_map], n=1, cutoff=0.0)
                raise ValueError(
                    f"unknown key {key}={kwargs[key]!r}: not a field of this revision; did you mean {nearest[0]}?"
                )

    @property
    def capacity_can_drop(self) -> bool:
        """Whether an evaluation can leave a token without an expert that it chose.

        If so, what a token gets depends on every other token of the call: on later ones, on padding and on the rest of
        the batch. See `use_cache`.
        """
        return bool(self.n_exp > 1 and self.moe_top_k * self.eval_capacity < self.n_exp)

    def has_experts(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has experts instead of an MLP."""
        if self.n_exp == 1:
            return False
        if self.architecture == "ancestor":
            return bool(layer % self.stride == 0)
        return bool(layer >= self.moe_start_layer and (layer + 1) % self.stride == 0)

    def validate_architecture(self) -> None:
        """Raise `ValueError`, naming field and value, unless a model can be built from the fields."""
        for name in (*_SIZES, "moe_start_layer"):
            value, least = getattr(self, name), 0 if name == "moe_start_layer" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")
        for name in (*_WEIGHTS, *_ABOVE_ZERO, "dropout"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
                raise ValueError(f"{name}={value!r} must be a finite number")
            if name in _ABOVE_ZERO and value <= 0:
                raise ValueError(f"{name}={value!r} must be above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r} must be a number from 0 up to, but not including, 1")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be true or false")
        if not (self.use_cache is None or isinstance(self.use_cache, bool)):
            raise ValueError(f"use_cache={self.use_cache!r} must be true, false or none")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(choices)}")
        if self.n_embd % self.n_head != 0:
            raise ValueError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}")
        if self.n_exp > 1 and self.moe_top_k > self.n_exp:
            raise ValueError(f"moe_top_k={self.moe_top_k} must be at most n_exp={self.n_exp}, the number of experts")
        absent = _NOT_IN_THE_ANCESTOR if self.architecture == "ancestor" else _ONLY_IN_THE_ANCESTOR
        for name, off in absent.items():
            if (value := getattr(self, name)) != off:
                raise ValueError(f"{name}={value!r} must be {off!r}: architecture={self.architecture!r} is without it")
        if self.tie_word_embeddings is not True:
            raise ValueError(
                f"tie_word_embeddings={self.tie_word_embeddings!r} must be true: nanoMoE has one matrix for both"
            )

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what goes into config.json: always with the tie, whose default differs between libraries."""
        return {**super().to_diff_dict(), "tie_word_embeddings": self.tie_word_embeddings}

    # Either line looks for attributes with names of generation parameters, to move them elsewhere (4.57) or to refuse
    # them (5.x); here `top_k` is another name of moe_top_k.

    def _get_non_default_generation_parameters(self) -> dict[str, Any]:
        found = super()._get_non_default_generation_parameters()
        return {name: value for name, value in found.items() if name not in self.attribute_map}

    def _get_generation_parameters(self) -> dict[str, Any]:
        found = super()._get_generation_parameters()
        return {name: value for name, value in found.items() if name not in self.attribute_map}


GPTConfig.register_for_auto_class()
