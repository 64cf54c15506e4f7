# SPDX-License-Identifier: Apache-2.0
"""The heads that a BERT on MLX can have: from its hidden states to logits, probabilities and predictions."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from . import accurate, masks, pooling
from .config import ACTIVATIONS, BertConfig, ConfigError
from .core import BertOutput, activation, dropout

POOLED_TYPES = (
    "binary_classification",
    "multiclass_classification",
    "multilabel_classification",
    "regression",
    "ordinal_regression",
    "time_series",
)
TOKEN_TYPES = ("token_classification", "masked_lm")
HEAD_TYPES = (*POOLED_TYPES, *TOKEN_TYPES)
# Other names of a type: the one that the document's registry has.
ALIASES = {"time_series_regression": "time_series"}
POOLINGS = (*pooling.POOLINGS, "pooler")
# The fewest outputs that a type makes sense with; one is the only number for a binary classification.
_FEWEST = {"multiclass_classification": 2, "ordinal_regression": 2}
_FOCAL_TYPES = ("binary_classification", "multiclass_classification", "multilabel_classification")
_TEMPERED_TYPES = (*_FOCAL_TYPES, "ordinal_regression", "token_classification")


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """What a head is made of. A pooled head is `classifier(dropout(layers(input_dropout(pooled))))`.

    A layer is dense, LayerNorm where `use_layer_norm`, activation, dropout. A token head does the same per token; a
    masked language model's is one layer without dropout and the word embeddings as the classifier.

    Args:
        head_type: one of `HEAD_TYPES`; `ALIASES` are brought to it.
        input_size: width of what the head reads: the hidden states', or the pooler output's for pooling "pooler".
        output_size: labels, values, classes of an ordinal, steps of a time series, or words. 1 for binary.
        pooling: one of `POOLINGS`; None is "cls" for the types that pool, and the others take no other.
        hidden_sizes: width of each layer before the classifier. Masked language models have their own one.
        input_dropout: of what is pooled, or of the tokens' hidden states.
        dropout: after each layer.
        activation: of the layers, one of `config.ACTIVATIONS`.
        use_layer_norm, layer_norm_eps: of the layers.
        initializer_range: standard deviation of the matrices at their start.
        focal_gamma: exponent of the focal loss, 0 for none, else 1 or more; classification of texts alone.
        use_temperature: whether the logits are divided by a trained number, which starts at 1.
        use_uncertainty: whether a regression gives the variance of each value too.
        output_scale, output_bias: of a regression's values, for targets that are not near 0 and 1.
        tie_word_embeddings: whether a masked language model's classifier is the word embeddings.

    Raises:
        ConfigError: a value is not supported, or has no place in a head of this type.
    """

    head_type: str
    input_size: int
    output_size: int = 1
    pooling: str | None = None
    hidden_sizes: tuple[int, ...] = ()
    input_dropout: float = 0.0
    dropout: float = 0.1
    activation: str = "gelu"
    use_layer_norm: bool = True
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    focal_gamma: float = 0.0
    use_temperature: bool = False
    use_uncertainty: bool = False
    output_scale: float = 1.0
    output_bias: float = 0.0
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        """Refuses what no head can be built from, and what would be passed over in silence."""
        object.__setattr__(self, "head_type", head_type_of(self.head_type))
        if self.pooling is None and self.head_type in POOLED_TYPES:
            object.__setattr__(self, "pooling", "cls")
        if isinstance(self.hidden_sizes, list):
            object.__setattr__(self, "hidden_sizes", tuple(self.hidden_sizes))
        for name, (accepts, expected) in _EXPECTED.items():
            if not accepts(getattr(self, name)):
                raise ConfigError(f"{name}={getattr(self, name)!r} is not supported in a head: expected {expected}")
        _check_type(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HeadConfig:
        """The head that `to_dict` described.

        Raises:
            ConfigError: an unknown key, which names the nearest; a key that lacks; a value that is not supported.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"a head's configuration is a mapping of names to values, not {type(values).__name__}")
        names = [entry.name for entry in fields(cls)]
        for key in values:
            if key not in names:
                raise ConfigError(f"head config key {key!r} is unknown{nearest(str(key), names)}")
        for name in ("head_type", "input_size"):
            if name not in values:
                raise ConfigError(f"head config lacks {name!r}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, as JSON has them."""
        return dataclasses.asdict(self) | {"hidden_sizes": list(self.hidden_sizes)}


def nearest(name: str, names: Any) -> str:
    """ ": did you mean ...?", or nothing where no name is near."""
    # What only begins a name is near to it too, however long the rest is.
    close = [other for other in names if name and other.startswith(name)]
    close = close or difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f": did you mean {close[0]!r}?" if close else f": expected one of {', '.join(names)}"


def head_type_of(name: Any) -> str:
    """The type of a name or alias of one.

    Raises:
        ConfigError: there is no such type; it says which is nearest.
    """
    found = ALIASES.get(name, name) if isinstance(name, str) else name
    if found not in HEAD_TYPES:
        raise ConfigError(f"head_type={name!r} is unknown{nearest(str(name), [*HEAD_TYPES, *ALIASES])}")
    return str(found)


def default_head(config: BertConfig, head_type: str, num_labels: int | None = None, **values: Any) -> HeadConfig:
    """The document's head of a type for a model: half the hidden size and gelu for most, mean pooling for regression.

    Args:
        num_labels: outputs; a binary classification has one logit for its 2 labels, a regression 1 value unless told.
        values: fields of `HeadConfig` to set otherwise.

    Raises:
        ConfigError: as `HeadConfig`; also a type that needs `num_labels` without it.
        TypeError: a value is no field of `HeadConfig`; it says which is nearest.
    """
    head_type = head_type_of(head_type)
    names = [entry.name for entry in fields(HeadConfig)]
    for name in values:
        if name not in names:
            raise TypeError(f"unknown head option {name!r}{nearest(name, names)}")
    width = config.hidden_size
    half = (max(width // 2, 1),)
    layers: dict[str, dict[str, Any]] = {
        "binary_classification": {"hidden_sizes": half},
        "multiclass_classification": {"hidden_sizes": half},
        "multilabel_classification": {"hidden_sizes": half, "pooling": "attention"},
        "regression": {
            "hidden_sizes": (*half, max(width // 4, 1)),
            "pooling": "mean",
            "dropout": 0.2,
            "activation": "relu",
        },
        "masked_lm": {"activation": config.hidden_act, "layer_norm_eps": config.layer_norm_eps, "dropout": 0.0},
    }
    chosen = layers.get(head_type, {"input_dropout": 0.1})
    if values.get("pooling") == "pooler" and config.pooler_hidden_size is not None:
        width = config.pooler_hidden_size
    chosen |= {"input_size": width, "output_size": outputs_of(config, head_type, num_labels)}
    return HeadConfig(head_type=head_type, **(chosen | {"initializer_range": config.initializer_range} | values))


def outputs_of(config: BertConfig, head_type: str, num_labels: int | None) -> int:
    """How many outputs a head of a type has for so many labels; the labels of config.json where none are given.

    Raises:
        ConfigError: the type needs a number and there is none, or it takes no such number.
    """
    if head_type == "masked_lm":
        if num_labels not in (None, config.vocab_size):
            raise ConfigError(f"num_labels={num_labels!r}: a masked_lm head has vocab_size={config.vocab_size} outputs")
        return config.vocab_size
    if head_type == "binary_classification":
        if num_labels not in (None, 1, 2):
            fault = "a binary_classification has 2 labels and one logit"
            raise ConfigError(f"num_labels={num_labels!r}: {fault}; more are a multiclass_classification")
        return 1
    if num_labels is not None:
        return num_labels
    if head_type == "regression":
        return 1
    labels = config.extra.get("id2label")
    if not isinstance(labels, Mapping) or not labels:
        raise ConfigError(f"a {head_type} head needs num_labels: the configuration has no id2label to count")
    return len(labels)


def build(config: HeadConfig) -> nn.Module:
    """A new head with weights from MLX's generator.

    It is called with the `BertOutput`, the module of the word embeddings, and `training`, and returns arrays by name:
    `logits` first of all; see `OUTPUTS`.
    """
    return MaskedLMHead(config) if config.head_type == "masked_lm" else Head(config)


class Head(nn.Module):
    """A head on one vector of each text, or on each token.

    The parameters: `projection.<i>.dense`, `projection.<i>.LayerNorm`, `classifier`, and what the type has beside it.
    """

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self._config = config
        widths = (config.input_size, *config.hidden_sizes)
        if config.pooling == "attention":
            self.attention = _Dense(config, config.input_size, 1)
        self.projection = [_Layer(config, *pair) for pair in itertools.pairwise(widths)]
        for name in _CLASSIFIERS.get(config.head_type, ("classifier",)):
            outputs = 1 if config.head_type == "ordinal_regression" else config.output_size
            setattr(self, name, _Dense(config, widths[-1], outputs, bias=config.head_type != "ordinal_regression"))
        if config.use_uncertainty:
            self.log_variance = _Dense(config, widths[-1], config.output_size)
        if config.head_type == "ordinal_regression":
            self.thresholds = _even_thresholds(config.output_size)
        if config.head_type == "multilabel_classification":
            self.adaptive_thresholds = mx.full((config.output_size,), 0.5)
            self.freeze(recurse=False, keys="adaptive_thresholds")
        if config.use_temperature:
            self.temperature = mx.ones((1,))

    def __call__(self, states: BertOutput, word_embeddings: nn.Module, *, training: bool) -> dict[str, mx.array]:
        """What `OUTPUTS` says of the head's type, each in the dtype of the weights; predictions of classes int32."""
        config = self._config
        features = dropout(self._features(states), config.input_dropout, training)
        for layer in self.projection:
            features = layer(features, training=training)
        return OUTPUTS[config.head_type](self, config, features)

    def _features(self, states: BertOutput) -> mx.array:
        hidden, kind = states.last_hidden_state, self._config.pooling
        if kind is None:
            return hidden
        if kind == "pooler":
            return states.get_pooled_output("pooler")
        kept = masks.kept_tokens(states.attention_mask, rows=hidden.shape[0], tokens=hidden.shape[1])
        scores = self.attention(hidden)[..., 0] if kind == "attention" else None
        return pooling.pool(hidden, kept, kind, scores)

    def tempered(self, logits: mx.array) -> mx.array:
        """The logits divided by the temperature, where there is one."""
        return logits / self.temperature if "temperature" in self else logits


class MaskedLMHead(nn.Module):
    """A dense layer, its activation, a LayerNorm, and a score for each word of the vocabulary."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self._config = config
        self.transform = _Layer(config, config.input_size, config.input_size)
        self.bias = mx.zeros((config.output_size,))
        if not config.tie_word_embeddings:
            self.decoder = _Dense(config, config.input_size, config.output_size, bias=False)

    def __call__(self, states: BertOutput, word_embeddings: nn.Module, *, training: bool) -> dict[str, mx.array]:
        """logits and probabilities (rows, tokens, words), predictions (rows, tokens)."""
        features = self.transform(states.last_hidden_state, training=training)
        scores = self.decoder(features) if "decoder" in self else word_embeddings.as_linear(features)
        return _classes(scores + self.bias)


class _Dense(nn.Module):
    """nn.Linear for what stays in its own precision when a model is quantised: a head has few numbers."""

    def __init__(self, config: HeadConfig, inputs: int, outputs: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = mx.random.normal((outputs, inputs), scale=config.initializer_range)
        if bias:
            self.bias = mx.zeros((outputs,))

    def __call__(self, values: mx.array) -> mx.array:
        if "bias" not in self:
            return values @ self.weight.T
        return mx.addmm(self.bias, values, self.weight.T)


class _Norm(nn.Module):
    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self._epsilon = epsilon
        self.weight = mx.ones((width,))
        self.bias = mx.zeros((width,))

    def __call__(self, values: mx.array) -> mx.array:
        return accurate.layer_norm(values, self.weight, self.bias, self._epsilon)


class _Layer(nn.Module):
    """Dense, LayerNorm, activation and dropout; a masked language model's norm comes after its activation."""

    def __init__(self, config: HeadConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        self._config = config
        self._activation = activation(config.activation)
        self.dense = _Dense(config, inputs, outputs)
        if config.use_layer_norm:
            self.LayerNorm = _Norm(outputs, config.layer_norm_eps)

    def __call__(self, values: mx.array, *, training: bool) -> mx.array:
        values = self.dense(values)
        if self._config.head_type == "masked_lm":
            values = self.LayerNorm(self._activation(values))
        else:
            values = self._activation(self.LayerNorm(values) if "LayerNorm" in self else values)
        return dropout(values, self._config.dropout, training)


def ordered_thresholds(raw: mx.array) -> mx.array:
    """The thresholds (classes - 1,) of an ordinal, each above the one before: the first, and steps of a softplus."""
    first = mx.arange(raw.size) == 0
    return mx.cumsum(mx.where(first, raw, softplus(raw)))


def softplus(values: mx.array) -> mx.array:
    """log(1 + exp(values)), which does not overflow, and whose gradient at 0 is 1/2."""
    size = mx.abs(values)
    return 0.5 * (values + size) + mx.log1p(accurate.exp(-size))


def _even_thresholds(classes: int) -> mx.array:
    """Thresholds at which a score of 0 makes every class equally likely, as `ordered_thresholds` takes them."""
    values = [math.log(k / (classes - k)) for k in range(1, classes)]
    steps = [after - before for before, after in itertools.pairwise(values)]
    return mx.array([values[0], *(math.log(math.expm1(step)) for step in steps)])


def _classes(logits: mx.array) -> dict[str, mx.array]:
    return {
        "logits": logits,
        "probabilities": accurate.softmax(logits),
        "predictions": mx.argmax(logits, axis=-1).astype(mx.int32),
    }


def _binary(head: Any, config: HeadConfig, features: mx.array) -> dict[str, mx.array]:
    logits = head.tempered(head.classifier(features))
    likely = accurate.sigmoid(logits)
    return {
        "logits": logits,
        "probabilities": likely,
        "probabilities_2class": mx.concatenate([accurate.sigmoid(-logits), likely], axis=-1),
        "predictions": (likely > 0.5).astype(mx.int32),
    }


def _multiclass(head: Any, config: HeadConfig, features: mx.array) -> dict[str, mx.array]:
    return _classes(head.tempered(head.classifier(features)))


def _multilabel(head: Any, config: HeadConfig, features: mx.array) -> dict[str, mx.array]:
    logits = head.tempered(head.classifier(features))
    likely = accurate.sigmoid(logits)
    predictions = (likely > head.adaptive_thresholds).astype(mx.int32)
    return {"logits": logits, "probabilities": likely, "predictions": predictions}


def _regression(head: Any, config: HeadConfig, features: mx.array) -> dict[str, mx.array]:
    values = _scaled(config, head.classifier(features))
    found = {"logits": values, "predictions": values}
    if config.use_uncertainty:
        # The scale is the values' own, so that of the variance is its square.
        log_variance = head.log_variance(features) + 2 * math.log(abs(config.output_scale))
        found |= {"log_variance": log_variance, "variance": accurate.exp(log_variance)}
        found["uncertainty"] = accurate.exp(0.5 * log_variance)
    return found


def _ordinal(head: Any, config: HeadConfig, features: mx.array) -> dict[str, mx.array]:
    logits = head.tempered(head.classifier(features) - ordered_thresholds(head.thresholds))
    above = accurate.sigmoid(logits)
    # The probability of class k is that of being above k - 1 less that of being above k.
    edge = mx.ones_like(above[:, :1])
    each = mx.concatenate([edge, above], axis=-1) - mx.concatenate([above, mx.zeros_like(edge)], axis=-1)
    return {
        "logits": logits,
        "threshold_logits": logits,
        "cumulative_probabilities": above,
        "class_probabilities": each,
        "probabilities": each,
        "predictions": (above > 0.5).sum(axis=-1).astype(mx.int32),
    }


def _time_series(head: Any, config: HeadConfig, features: mx.array) -> dict[str, mx.array]:
    parts = {name: getattr(head, name)(features)[:, None] for name in ("trend", "seasonal", "residual")}
    parts = {name: value * config.output_scale for name, value in parts.items()}
    total = parts["trend"] + parts["seasonal"] + parts["residual"] + config.output_bias
    return {"logits": total, "predictions": total} | parts


def _scaled(config: HeadConfig, values: mx.array) -> mx.array:
    return values * config.output_scale + config.output_bias


# The dense layers that end a head, where that is not one of the name "classifier".
_CLASSIFIERS = {"time_series": ("trend", "seasonal", "residual")}

OUTPUTS: Mapping[str, Callable[[Any, HeadConfig, mx.array], dict[str, mx.array]]] = {
    "binary_classification": _binary,
    "multiclass_classification": _multiclass,
    "multilabel_classification": _multilabel,
    "regression": _regression,
    "ordinal_regression": _ordinal,
    "time_series": _time_series,
    "token_classification": _multiclass,
}
"""Type -> what gives its outputs. Shapes, for B rows, T tokens and N outputs:

- binary_classification: logits, probabilities, predictions (B, 1); probabilities_2class (B, 2).
- multiclass_classification: logits, probabilities (B, N); predictions (B,).
- multilabel_classification: logits, probabilities, predictions (B, N).
- regression: logits, predictions (B, N); with uncertainty log_variance, variance, uncertainty (B, N), its root.
- ordinal_regression: logits, threshold_logits, cumulative_probabilities (B, N - 1); class_probabilities and
  probabilities (B, N); predictions (B,), the number of thresholds that are passed more likely than not.
- time_series: logits, predictions, seasonal, trend, residual (B, 1, N); predictions are the sum of the three.
- token_classification: logits, probabilities (B, T, N); predictions (B, T). masked_lm the same over the words.
"""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_probability(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


# Field -> the test of its value, and what the message says was expected.
_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "input_size": (_is_size, "a positive integer"),
    "output_size": (_is_size, "a positive integer"),
    "pooling": (lambda value: value is None or value in POOLINGS, f"one of {', '.join(POOLINGS)}, or None"),
    "hidden_sizes": (
        lambda value: isinstance(value, tuple) and all(map(_is_size, value)),
        "a list of positive integers",
    ),
    "input_dropout": (_is_probability, "a number in [0, 1)"),
    "dropout": (_is_probability, "a number in [0, 1)"),
    "activation": (lambda value: value in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}"),
    "use_layer_norm": (lambda value: isinstance(value, bool), "true or false"),
    "layer_norm_eps": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    "initializer_range": (lambda value: _is_number(value) and value >= 0, "a number, 0 or more"),
    "focal_gamma": (lambda value: _is_number(value) and (value == 0 or value >= 1), "0, or a number of 1 or more"),
    "use_temperature": (lambda value: isinstance(value, bool), "true or false"),
    "use_uncertainty": (lambda value: isinstance(value, bool), "true or false"),
    "output_scale": (lambda value: _is_number(value) and value != 0, "a number other than 0"),
    "output_bias": (_is_number, "a number"),
    "tie_word_embeddings": (lambda value: isinstance(value, bool), "true or false"),
}


def _check_type(config: HeadConfig) -> None:
    """Refuses a field that a head of this type has no use for."""
    kind = config.head_type
    own = {
        "pooling": (kind in POOLED_TYPES, None),
        "hidden_sizes": (kind != "masked_lm", ()),
        "input_dropout": (kind != "masked_lm", 0.0),
        "use_layer_norm": (kind != "masked_lm", True),
        "focal_gamma": (kind in _FOCAL_TYPES, 0.0),
        "use_temperature": (kind in _TEMPERED_TYPES, False),
        "use_uncertainty": (kind == "regression", False),
        "output_scale": (kind in ("regression", "time_series"), 1.0),
        "output_bias": (kind in ("regression", "time_series"), 0.0),
        "tie_word_embeddings": (kind == "masked_lm", True),
    }
    for name, (has, without) in own.items():
        if not has and getattr(config, name) != without:
            raise ConfigError(f"{name}={getattr(config, name)!r} has no place in a {kind} head: expected {without!r}")
    fewest = _FEWEST.get(kind, 1)
    if config.output_size < fewest:
        raise ConfigError(f"output_size={config.output_size} is too few for a {kind} head: expected {fewest} or more")
    if kind == "binary_classification" and config.output_size != 1:
        raise ConfigError(f"output_size={config.output_size} is not supported for binary_classification: expected 1")
