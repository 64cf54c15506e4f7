# SPDX-License-Identifier: Apache-2.0
"""The hyperparameters of the Hugging Face NeoBERT, under NeoBERT's own names."""

import difflib
import inspect
import math
from typing import Any, ClassVar, Self

from transformers import GenerationConfig, PretrainedConfig

# What a config.json may hold beside NeoBERT's fields and beside what the installed transformers itself knows: keys
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
    "use_cache",
}

_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_length",
)
_NUMBERS = ("embedding_init_range", "decoder_init_range", "classifier_init_range", "norm_eps", "base_scale")
_FLAGS = ("rms_norm", "rope", "flash_attention", "tie_word_embeddings", "ngpt")
_CHOICES = {
    "hidden_act": ("swiglu", "gelu"),
    "attn_backend": ("sdpa", "flash_attn_varlen"),
    "kernel_backend": ("auto", "liger", "torch"),
}


class NeoBERTConfig(PretrainedConfig):
    """Configuration of a [`NeoBERT`].

    Field names are those of `NeoBERTConfig` in pszemraj/NeoBERT at commit 3c73efd, defaults those of its Hugging Face
    class. `max_length` and `max_position_embeddings` are two names of one number, `dropout` and `dropout_prob` too;
    config.json has both names of the first.

    Args:
        hidden_size: width of the model.
        num_hidden_layers: number of blocks.
        num_attention_heads: number of attention heads; divides `hidden_size`.
        intermediate_size: width inside a feed-forward network. SwiGLU has two thirds of it, up to a multiple of 8.
        dropout: probability of dropping an attention weight or an output of a residual branch.
        embedding_init_range, decoder_init_range: embeddings, and linear layers, start uniform between minus this and
            this.
        classifier_init_range: standard deviation of the layers of a classification head at their start.
        rms_norm: RMSNorm, else LayerNorm.
        rope: rotary position embeddings, else a learned position table of `max_length` rows and one for padding.
        norm_eps: epsilon of the norms.
        hidden_act: "swiglu" or "gelu" (erf), in any case; kept in lower case.
        vocab_size: number of tokens.
        pad_token_id: the padding token. Its embedding gets no gradient, and learned positions do not count it.
        max_length: longest text; with rotary embeddings longer ones work too.
        attn_backend, kernel_backend, flash_attention: kernels that a training run asked for; kept, and ignored.
        tie_word_embeddings: whether the output matrix is the token embedding.
        ngpt: refused if true, normalised NeoBERT is another architecture. `base_scale` is of use to it alone.
        classifier_dropout: probability of dropout in a classification head; None for `dropout`.
        bos_token_id, eos_token_id: NeoBERT has none of them.
        kwargs: what every `PretrainedConfig` takes.

    Raises:
        ValueError: a value is out of range, two names of one field disagree, or a keyword is unknown.
    """

    model_type = "neobert"
    attribute_map: ClassVar[dict[str, str]] = {
        "dropout_prob": "dropout",
        "max_position_embeddings": "max_length",
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
        hidden_size: int = 768,
        num_hidden_layers: int = 28,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        dropout: float = 0.0,
        embedding_init_range: float = 0.02,
        decoder_init_range: float = 0.02,
        classifier_init_range: float = 0.02,
        rms_norm: bool = True,
        rope: bool = True,
        norm_eps: float = 1e-6,
        hidden_act: str = "swiglu",
        vocab_size: int = 30522,
        pad_token_id: int = 0,
        max_length: int = 1024,
        *,
        attn_backend: str = "sdpa",
        kernel_backend: str = "auto",
        flash_attention: bool = False,
        tie_word_embeddings: bool = True,
        ngpt: bool = False,
        base_scale: float = 1.0 / math.sqrt(960.0),
        classifier_dropout: float | None = 0.1,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        given = locals()
        own = {name: given[name] for name in inspect.signature(NeoBERTConfig.__init__).parameters if name in given}
        del own["self"], own["kwargs"]
        own |= {name: kwargs.pop(alias) for alias, name in self.attribute_map.items() if alias in kwargs}
        if isinstance(hidden_act, str):
            own["hidden_act"] = hidden_act.lower()
        # Upstream's class wrote these two beside its fields: what follows from them, and what it did not know.
        dim_head = kwargs.pop("dim_head", None)
        kwargs.pop("kwargs", None)
        self._refuse_unknown(own, kwargs)
        super().__init__(**kwargs)
        for name, value in own.items():
            setattr(self, name, value)
        self.validate_architecture()
        if dim_head not in (None, self.dim_head):
            raise ValueError(
                f"dim_head={dim_head!r} must be hidden_size / num_attention_heads = {self.dim_head}; leave it out"
            )

    def _refuse_unknown(self, own: dict[str, Any], kwargs: dict[str, Any]) -> None:
        """Raise for a keyword that neither NeoBERT nor transformers knows, and for a file of another model."""
        model_type = kwargs.get("model_type", self.model_type)
        if model_type != self.model_type:
            raise ValueError(f"config.json is of a model of type {model_type!r}, expected {self.model_type!r}")
        known = {*PretrainedConfig().to_dict(), *GenerationConfig().to_dict(), *_GENERIC_KEYS}
        for key in kwargs:
            if key not in known and not key.startswith("_"):
                nearest = difflib.get_close_matches(key, [*own, *self.attribute_map], n=1, cutoff=0.0)
                raise ValueError(f"unknown key {key}={kwargs[key]!r}; did you mean {nearest[0]}?")

    @property
    def dim_head(self) -> int:
        """Channels of one attention head."""
        return int(self.hidden_size // self.num_attention_heads)

    def validate_architecture(self) -> None:
        """Raise `ValueError`, naming field and value, unless a model can be built from the fields."""
        if self.ngpt is True:
            raise ValueError("ngpt=True is another architecture (nGPT, NormNeoBERT), which is not supported")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be true or false")
        for name in _SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
        for name in (*_NUMBERS, "dropout", "classifier_dropout"):
            value = getattr(self, name)
            if name == "classifier_dropout" and value is None:
                continue
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
                raise ValueError(f"{name}={value!r} must be a finite number of at least 0")
            if "dropout" in name and value > 1:
                raise ValueError(f"{name}={value!r} must be a probability, from 0 to 1")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"unsupported {name}={getattr(self, name)!r}; expected one of {', '.join(choices)}")
        if self.hidden_size % self.num_attention_heads != 0:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={self.num_attention_heads}"
            )
        if self.rope and self.dim_head % 2 != 0:
            raise ValueError(
                f"RoPE requires an even head dimension: hidden_size={self.hidden_size} over"
                f" num_attention_heads={self.num_attention_heads} gives {self.dim_head}"
            )
        pad = self.pad_token_id
        if not isinstance(pad, int) or isinstance(pad, bool) or not 0 <= pad < self.vocab_size:
            raise ValueError(f"pad_token_id={pad!r} must be a token, from 0 to vocab_size - 1 = {self.vocab_size - 1}")

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, the length under both of its names."""
        return {**super().to_dict(), **self._always_written()}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what goes into config.json: always with the tie and the length, whose defaults differ elsewhere."""
        return {**super().to_diff_dict(), **self._always_written()}

    def _always_written(self) -> dict[str, Any]:
        names = ("max_length", "max_position_embeddings", "tie_word_embeddings")
        return {name: getattr(self, name) for name in names}

    # Either line looks for attributes with names of generation parameters, to move them elsewhere (4.57) or to refuse
    # them (5.x); here `max_length` is the longest text that the model was made for.

    def _get_non_default_generation_parameters(self) -> dict[str, Any]:
        found = super()._get_non_default_generation_parameters()
        return {name: value for name, value in found.items() if name != "max_length"}

    def _get_generation_parameters(self) -> dict[str, Any]:
        found = super()._get_generation_parameters()
        return {name: value for name, value in found.items() if name != "max_length"}


NeoBERTConfig.register_for_auto_class()
