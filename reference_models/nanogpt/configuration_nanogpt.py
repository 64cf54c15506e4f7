# SPDX-License-Identifier: Apache-2.0
"""The hyperparameters of the Hugging Face nanoGPT, under nanoGPT's own names."""

import difflib
import inspect
from typing import Any, ClassVar, Self

from transformers import GenerationConfig, PretrainedConfig

# What a config.json may hold beside nanoGPT's fields and beside what the installed transformers itself knows: keys
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


class NanoGPTConfig(PretrainedConfig):
    """Configuration of a [`NanoGPTModel`].

    Field names and defaults are those of `GPTConfig` in karpathy/nanoGPT, `model.py` at commit 3adf61e; the names
    other models use (`hidden_size`, `max_position_embeddings`, ...) work too, as arguments and as attributes.

    Args:
        block_size: longest sequence, and number of rows of the position table.
        vocab_size: number of tokens.
        n_layer: number of blocks.
        n_head: number of attention heads; divides `n_embd`.
        n_embd: width of the model. The MLP is four times as wide.
        dropout: probability of dropping an embedding, an attention weight or an output of a residual branch.
        bias: whether linear layers and layer norms have an offset.
        use_cache: whether `forward` returns a key-value cache unless told otherwise.
        tie_word_embeddings: always true, the output matrix is the token embedding.
        bos_token_id, eos_token_id, pad_token_id: nanoGPT has none of them.
        kwargs: what every `PretrainedConfig` takes.

    Raises:
        ValueError: a value is out of range, two names of one field disagree, or a keyword is unknown.
    """

    model_type = "nanogpt"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "block_size",
        "n_positions": "block_size",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
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
        dropout: float = 0.0,
        bias: bool = True,
        *,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        own = {
            "block_size": block_size,
            "vocab_size": vocab_size,
            "n_layer": n_layer,
            "n_head": n_head,
            "n_embd": n_embd,
            "dropout": dropout,
            "bias": bias,
            "use_cache": use_cache,
            "tie_word_embeddings": tie_word_embeddings,
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id,
        }
        own |= {name: kwargs.pop(alias) for alias, name in self.attribute_map.items() if alias in kwargs}
        self._refuse_unknown(own, kwargs)
        super().__init__(**kwargs)
        for name, value in own.items():
            setattr(self, name, value)
        self.validate_architecture()

    def _refuse_unknown(self, own: dict[str, Any], kwargs: dict[str, Any]) -> None:
        """Raise for a keyword that neither nanoGPT nor transformers knows."""
        known = {*PretrainedConfig().to_dict(), *GenerationConfig().to_dict(), *_GENERIC_KEYS}
        for key in kwargs:
            if key not in known and not key.startswith("_"):
                nearest = difflib.get_close_matches(key, [*own, *self.attribute_map], n=1, cutoff=0.0)
                raise ValueError(f"unknown key {key}={kwargs[key]!r}; did you mean {nearest[0]}?")

    def validate_architecture(self) -> None:
        """Raise `ValueError`, naming field and value, unless a model can be built from the fields."""
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
        if self.n_embd % self.n_head != 0:
            raise ValueError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}")
        is_number = isinstance(self.dropout, int | float) and not isinstance(self.dropout, bool)
        if not is_number or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r} must be a number from 0 up to, but not including, 1")
        for name in ("bias", "use_cache"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be true or false")
        if self.tie_word_embeddings is not True:
            raise ValueError(
                f"tie_word_embeddings={self.tie_word_embeddings!r} must be true: nanoGPT has one matrix for both"
            )

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what goes into config.json: always with the tie, whose default differs between libraries."""
        return {**super().to_diff_dict(), "tie_word_embeddings": self.tie_word_embeddings}


NanoGPTConfig.register_for_auto_class()
