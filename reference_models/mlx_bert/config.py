# SPDX-License-Identifier: Apache-2.0
"""The hyperparameters of a BERT, DistilBERT or RoBERTa on MLX, read from both formats on disk and written back."""

from __future__ import annotations

import copy
import difflib
import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from . import quantisation

CONFIG_FILE = "config.json"
_ARCHITECTURES = {"bert": "BertModel", "distilbert": "DistilBertModel", "roberta": "RobertaModel"}
MODEL_TYPES = tuple(_ARCHITECTURES)
# Names of transformers' ACT2FN whose formula core.py has; every other name is refused.
ACTIVATIONS = (
    "gelu",
    "gelu_10",
    "gelu_accurate",
    "gelu_fast",
    "gelu_new",
    "gelu_python",
    "gelu_python_tanh",
    "gelu_pytorch_tanh",
    "leaky_relu",
    "linear",
    "mish",
    "quick_gelu",
    "relu",
    "relu2",
    "relu6",
    "sigmoid",
    "silu",
    "swish",
    "tanh",
)
# The epsilon that transformers' DistilBERT has in its code, with no field for it.
DISTILBERT_EPSILON = 1e-12

# DistilBERT's names of the fields.
_DISTILBERT_NAMES = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "classifier_dropout": "seq_classif_dropout",
}
# Where a transformers class has another default than BERT's.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "bert": {},
    "distilbert": {"num_hidden_layers": 6, "classifier_dropout": 0.2},
    "roberta": {"vocab_size": 50265, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
}
# Fields that transformers does not have: written only where they differ from the default.
_OWN_FIELDS = (
    "pooler_hidden_size",
    "pooler_dropout",
    "pooler_activation",
    "compute_additional_pooling",
    "quantization",
)
# Fields of BERT and RoBERTa that DistilBERT has no use for.
_NOT_IN_DISTILBERT = ("type_vocab_size", "layer_norm_eps", *_OWN_FIELDS[:3])
# Flags that the document's own format holds and that change no number.
_UPSTREAM_FLAGS = ("use_fused_attention", "use_memory_efficient_attention", "gradient_checkpointing")
# Keys beside the fields that change the numbers of a transformers model, and the values that this model computes.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": (None, "absolute"),
    "is_decoder": (None, False),
    "add_cross_attention": (None, False),
    "is_encoder_decoder": (None, False),
    "pruned_heads": (None, {}),
    "per_layer_config": (None, {}),
    "auto_map": (None, {}),
}
# Keys that are known to change no number, so that none of them is taken for a misspelt field.
_HARMLESS = {
    "_attn_implementation",
    "_name_or_path",
    "_num_labels",
    "architectures",
    "attn_implementation",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "directionality",
    "dtype",
    "embedding_size",
    "finetuning_task",
    "id2label",
    "initializer_factor",
    "label2id",
    "layer_norm_epsilon",
    "model_max_length",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "output_past",
    "pooler_fc_size",
    "pooler_num_attention_heads",
    "pooler_num_fc_layers",
    "pooler_size_per_head",
    "pooler_type",
    "problem_type",
    "qa_dropout",
    "quantization_config",
    "return_dict",
    "sep_token_id",
    "sinusoidal_pos_embds",
    "tie_weights_",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    *_UPSTREAM_FLAGS,
}


class ConfigError(ValueError):
    """A configuration that names no model we can compute: which field, which value, and what was expected."""


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Hyperparameters under the names of transformers' `BertConfig`; the defaults are those of BERT.

    Args:
        model_type: "bert", "distilbert" or "roberta". `from_hf_config` has the defaults of the other two.
        vocab_size: number of tokens.
        hidden_size: width of the hidden states; a multiple of `num_attention_heads`.
        num_hidden_layers: number of layers.
        num_attention_heads: number of attention heads.
        intermediate_size: width inside a feed-forward network.
        hidden_act: activation of the feed-forward networks, one of `ACTIVATIONS`.
        hidden_dropout_prob: dropout of the embeddings and of what is added to the residual stream.
        attention_probs_dropout_prob: dropout of the attention probabilities.
        max_position_embeddings: rows of the position table. RoBERTa's longest text has `pad_token_id + 1` fewer tokens.
        type_vocab_size: number of token types; DistilBERT has none.
        initializer_range: standard deviation of the matrices at their start.
        layer_norm_eps: epsilon of every LayerNorm; DistilBERT's is 1e-12.
        pad_token_id: its embedding gets no gradient; RoBERTa's positions skip it.
        bos_token_id, eos_token_id: kept, not used.
        classifier_dropout: dropout of a classification head; None for `hidden_dropout_prob`.
        pooler_hidden_size: width of the pooler output; None for `hidden_size`.
        pooler_dropout: dropout of the pooler output.
        pooler_activation: activation of the pooler, one of `ACTIVATIONS`. transformers has "tanh" in its code.
        compute_additional_pooling: whether the model's output has cls, mean and max pooling.
        quantization: {"group_size", "bits"} of a quantised model.
        extra: every other key of a transformers config.json, none of which changes a number.

    Raises:
        ConfigError: a value has the wrong type, is out of range, or is not supported.
    """

    model_type: str = "bert"
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    classifier_dropout: float | None = None
    pooler_hidden_size: int | None = None
    pooler_dropout: float = 0.0
    pooler_activation: str = "tanh"
    compute_additional_pooling: bool = True
    quantization: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses what no model can be built from, and what would be another model than the one asked for."""
        _check_fields(self)
        _check_relations(self)
        _check_quantization(self.quantization)
        _check_extra(self.extra)

    @classmethod
    def from_hf_config(cls, values: Mapping[str, Any]) -> BertConfig:
        """The configuration that a transformers config.json holds; see `from_hf_config` of this module."""
        return from_hf_config(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BertConfig:
        """The configuration that a config.json of either format holds; see `from_dict` of this module."""
        return from_dict(values)

    def to_hf_config(self) -> dict[str, Any]:
        """The transformers config.json of this configuration; see `to_hf_config` of this module."""
        return to_hf_config(self)

    def to_dict(self) -> dict[str, Any]:
        """Every field by name: `BertConfig(**config.to_dict()) == config`, and so does `from_dict`."""
        return {entry.name: copy.deepcopy(getattr(self, entry.name)) for entry in fields(self)}

    @classmethod
    def base(cls, **values: Any) -> BertConfig:
        """BERT-base: 12 layers, 12 heads, hidden size 768."""
        return cls(**values)

    @classmethod
    def large(cls, **values: Any) -> BertConfig:
        """BERT-large: 24 layers, 16 heads, hidden size 1024."""
        sizes = {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        }
        return cls(**(sizes | values))

    @classmethod
    def mini(cls, **values: Any) -> BertConfig:
        """The document's small model: 4 layers, 4 heads, hidden size 256, 128 positions."""
        sizes = {
            "hidden_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 1024,
            "max_position_embeddings": 128,
        }
        return cls(**(sizes | values))


def from_hf_config(given: Mapping[str, Any]) -> BertConfig:
    """The configuration of a transformers config.json; an absent key has the default of that model type's class.

    `model_type` may be absent, and is then "bert". DistilBERT's fields have its own names (`dim`, `n_layers`, ...).
    Keys that change no number are kept in `extra`.

    Raises:
        ConfigError: another model type, a value that is not supported, two names of one field that disagree, or a key
            that looks like a misspelt field.
    """
    values: dict[str, Any] = copy.deepcopy(dict(_mapping(given)))
    model_type = values.pop("model_type", "bert")
    if model_type not in MODEL_TYPES:
        raise ConfigError(f"model_type={model_type!r} is not supported: expected one of {', '.join(MODEL_TYPES)}")
    known = dict(_DEFAULTS[model_type])
    for name, key in _hf_names(model_type).items():
        if key in values:
            known[name] = values.pop(key)
            if name in values and values[name] != known[name]:
                raise ConfigError(f"{key}={known[name]!r} and {name}={values[name]!r} name one field and disagree")
            values.pop(name, None)
        elif name != key and name in values:
            # transformers itself reads only some of them; the others it would pass over for a default in silence.
            known[name] = values.pop(name)
    if model_type == "distilbert" and values.get("layer_norm_eps", DISTILBERT_EPSILON) != DISTILBERT_EPSILON:
        raise ConfigError(
            f"layer_norm_eps={values['layer_norm_eps']!r} is not supported for distilbert: "
            f"transformers' DistilBERT has {DISTILBERT_EPSILON} in its code"
        )
    quantised_by = values.get("quantization_config")
    if known.get("quantization") is None and isinstance(quantised_by, Mapping) and "group_size" in quantised_by:
        known["quantization"] = {name: quantised_by[name] for name in quantised_by if name != "quant_method"}
    for key in values:
        if key not in _HARMLESS and key not in _NEUTRAL and (nearest := _nearest(key, _hf_names(model_type).values())):
            raise ConfigError(f"config key {key!r} is unknown and looks like {nearest!r}: rename or remove it")
    if values.get("architectures") == [_ARCHITECTURES[model_type]]:
        # What `to_hf_config` writes anyway.
        del values["architectures"]
    return BertConfig(model_type=model_type, **known, extra=values)


def from_dict(values: Mapping[str, Any]) -> BertConfig:
    """The configuration of a config.json: transformers' format where it has `model_type`, else the document's own.

    The document's own format has this class's field names and a few flags without use; `to_dict` writes the first.

    Raises:
        ConfigError: as `from_hf_config`; in the document's format an unknown key too.
    """
    values = _mapping(values)
    if "model_type" in values and "extra" not in values:
        return from_hf_config(values)
    names = [entry.name for entry in fields(BertConfig)]
    given = {key: copy.deepcopy(value) for key, value in values.items() if key not in _UPSTREAM_FLAGS}
    for key in given:
        if key not in names:
            nearest = _nearest(key, names, cutoff=0.6)
            meant = f"did you mean {nearest!r}?" if nearest else "a transformers config.json has a key 'model_type'"
            raise ConfigError(f"config key {key!r} is unknown: {meant}")
    flags = {key: values[key] for key in _UPSTREAM_FLAGS if key in values}
    return BertConfig(**(given | {"extra": {**given.get("extra", {}), **flags}}))


def to_hf_config(config: BertConfig) -> dict[str, Any]:
    """The config.json that transformers reads: its own names for the model type, and every key of `extra` as it was.

    Fields that transformers does not know are written only where they differ from their default.
    """
    values: dict[str, Any] = {"model_type": config.model_type, "architectures": [_ARCHITECTURES[config.model_type]]}
    defaults = {entry.name: entry.default for entry in fields(BertConfig)}
    for name, key in _hf_names(config.model_type).items():
        value = getattr(config, name)
        if name not in _OWN_FIELDS or value != defaults[name]:
            values[key] = copy.deepcopy(value)
    if config.model_type == "distilbert" and config.classifier_dropout is None:
        # transformers' DistilBERT has no null here.
        values["seq_classif_dropout"] = config.hidden_dropout_prob
    return values | copy.deepcopy(dict(config.extra))


def override(config: BertConfig, values: Mapping[str, Any]) -> BertConfig:
    """`config` with some fields replaced.

    Raises:
        TypeError: a name is no field; it says which field is nearest.
        ConfigError: the result is no valid configuration.
    """
    names = [entry.name for entry in fields(BertConfig)]
    for key in values:
        if key not in names:
            nearest = _nearest(key, names, cutoff=0.6)
            raise TypeError(f"unknown argument {key!r}" + (f": did you mean {nearest!r}?" if nearest else ""))
    return replace(config, **values)


def read(directory: Path) -> BertConfig:
    """The configuration in a model's directory.

    Raises:
        ConfigError: there is no config.json, it is no JSON object, or it names no model that is supported.
    """
    path = Path(directory) / CONFIG_FILE
    try:
        return from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; a model's directory has a {CONFIG_FILE}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _hf_names(model_type: str) -> dict[str, str]:
    """Field -> key of config.json of that model type."""
    names = [entry.name for entry in fields(BertConfig) if entry.name not in ("model_type", "extra")]
    if model_type != "distilbert":
        return {name: name for name in names}
    return {name: _DISTILBERT_NAMES.get(name, name) for name in names if name not in _NOT_IN_DISTILBERT}


def _mapping(values: Any) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise ConfigError(f"a configuration is a mapping of names to values, not {type(values).__name__}")
    return values


def _nearest(key: str, names: Collection[str], cutoff: float = 0.85) -> str | None:
    return next(iter(difflib.get_close_matches(key, list(names), n=1, cutoff=cutoff)), None)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def _is_probability(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


def _is_token_list(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_integer, value))


# Field -> the test of its value, and what the message says was expected.
_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = (
    {"model_type": (lambda value: value in MODEL_TYPES, f"one of {', '.join(MODEL_TYPES)}")}
    | {
        name: (lambda value: _is_integer(value) and value > 0, "a positive integer")
        for name in (
            "vocab_size",
            "hidden_size",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "type_vocab_size",
        )
    }
    | {
        # transformers builds an encoder of no layers too.
        "num_hidden_layers": (lambda value: _is_integer(value) and value >= 0, "an integer, 0 or more"),
        "initializer_range": (lambda value: _is_number(value) and value >= 0, "a number, 0 or more"),
        "layer_norm_eps": (lambda value: _is_number(value) and value > 0, "a number above 0"),
        "pooler_hidden_size": (
            lambda value: value is None or (_is_integer(value) and value > 0),
            "a positive integer or null",
        ),
        "compute_additional_pooling": (lambda value: isinstance(value, bool), "true or false"),
        "classifier_dropout": (lambda value: value is None or _is_probability(value), "a number in [0, 1) or null"),
        "eos_token_id": (
            lambda value: value is None or _is_integer(value) or _is_token_list(value),
            "an integer, a list of them or null",
        ),
    }
    | {
        name: (lambda value: value is None or _is_integer(value), "an integer or null")
        for name in ("pad_token_id", "bos_token_id")
    }
    | {
        name: (lambda value: _is_probability(value), "a number in [0, 1)")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "pooler_dropout")
    }
    | {
        name: (lambda value: value in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}")
        for name in ("hidden_act", "pooler_activation")
    }
)


def _check_fields(config: BertConfig) -> None:
    for name, (accepts, expected) in _EXPECTED.items():
        value = getattr(config, name)
        if not accepts(value):
            raise ConfigError(f"{name}={value!r} is not supported: expected {expected}")


def _check_relations(config: BertConfig) -> None:
    if config.hidden_size % config.num_attention_heads:
        raise ConfigError(
            f"hidden_size={config.hidden_size} is no multiple of num_attention_heads={config.num_attention_heads}"
        )
    pad = config.pad_token_id
    if pad is not None and not -config.vocab_size <= pad < config.vocab_size:
        raise ConfigError(f"pad_token_id={pad} is not in the vocabulary of vocab_size={config.vocab_size}")
    if config.model_type == "roberta":
        if pad is None or pad < 0:
            raise ConfigError(f"pad_token_id={pad!r} is not supported for roberta: its positions start after it")
        if config.max_position_embeddings < pad + 2:
            raise ConfigError(
                f"max_position_embeddings={config.max_position_embeddings} leaves roberta no token: its positions "
                f"start at pad_token_id + 1 = {pad + 1}"
            )
    if config.model_type == "distilbert" and config.layer_norm_eps != DISTILBERT_EPSILON:
        raise ConfigError(
            f"layer_norm_eps={config.layer_norm_eps} is not supported for distilbert: "
            f"transformers' DistilBERT has {DISTILBERT_EPSILON} in its code"
        )


def _check_quantization(quantization: Mapping[str, Any] | None) -> None:
    if quantization is None:
        return
    if not isinstance(quantization, Mapping):
        raise ConfigError(
            f"quantization={quantization!r} is not supported: expected {{'group_size': ..., 'bits': ...}}"
        )
    try:
        quantisation.settings(quantization)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _check_extra(extra: Mapping[str, Any]) -> None:
    if not isinstance(extra, Mapping):
        raise ConfigError(f"extra is a mapping of further config keys, not {type(extra).__name__}")
    for key, neutral in _NEUTRAL.items():
        if key in extra and extra[key] not in neutral:
            raise ConfigError(f"{key}={extra[key]!r} is not supported: expected {neutral[-1]!r}, or no such key")
    quantised_by = extra.get("quantization_config")
    method = quantised_by.get("quant_method") if isinstance(quantised_by, Mapping) else None
    if method not in (None, "mlx"):
        raise ConfigError(f"quantization_config.quant_method={method!r} is not supported: expected MLX's quantisation")
