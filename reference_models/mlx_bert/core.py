# SPDX-License-Identifier: Apache-2.0
"""BERT, DistilBERT and RoBERTa as one MLX module that gives the numbers of transformers' classes."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from . import accurate, hub, masks, pooling, quantisation, weights
from . import config as configs
from .config import BertConfig
from .hub import _is_hub_model_id as _is_hub_model_id  # the document imports it from here
from .weights import Checkpoint, WeightsError

_BLOCK = 128  # tokens in one product of a dense layer on the Linux CPU


@dataclass(frozen=True, kw_only=True, eq=False)
class BertOutput:
    """What a forward pass gives, in the dtype of the model's weights.

    Args:
        last_hidden_state: (rows, tokens, hidden).
        pooler_output: (rows, pooler hidden); None for DistilBERT, which has no pooler.
        hidden_states: the embeddings and then every layer's output, (rows, tokens, hidden) each; None unless asked for.
        attentions: every layer's attention probabilities, (rows, heads, tokens, tokens) each; None unless asked for.
        cls_output, mean_pooled, max_pooled: (rows, hidden); zeros of mean and max where the mask keeps nothing.
            None where the configuration or the call wants no additional pooling.
        attention_mask: the mask as it was given.
    """

    last_hidden_state: mx.array
    pooler_output: mx.array | None
    hidden_states: tuple[mx.array, ...] | None = None
    attentions: tuple[mx.array, ...] | None = None
    cls_output: mx.array | None = None
    mean_pooled: mx.array | None = None
    max_pooled: mx.array | None = None
    attention_mask: mx.array | None = None

    def get_pooled_output(self, kind: str = "cls") -> mx.array:
        """The pooling "cls", "mean", "max" or "pooler".

        Raises:
            ValueError: another kind, or one that this output does not have.
        """
        names = {"cls": "cls_output", "mean": "mean_pooled", "max": "max_pooled", "pooler": "pooler_output"}
        if kind not in names:
            raise ValueError(f"pooling {kind!r} is unknown: expected one of {', '.join(names)}")
        pooled: mx.array | None = getattr(self, names[kind])
        if pooled is None:
            why = "the model has no pooler" if kind == "pooler" else "additional pooling was not asked for"
            raise ValueError(f"this output has no {kind!r} pooling: {why}")
        return pooled


class BertCore(nn.Module):
    """transformers' `BertModel`, `DistilBertModel` or `RobertaModel`, whichever `config.model_type` names.

    The names of the parameters are those of `BertModel` for all three; DistilBERT has no token types and no pooler.
    The model starts in evaluation mode; `train()` turns the dropout on. New weights are drawn from MLX's generator
    (`mx.random.seed`) as transformers draws them.

    Args:
        config: the hyperparameters.
        add_pooling_layer: whether there is a pooler. A masked language model and a token classifier have none.

    Raises:
        TypeError: the configuration is no BertConfig.
    """

    def __init__(self, config: BertConfig, *, add_pooling_layer: bool = True) -> None:
        super().__init__()
        if not isinstance(config, BertConfig):
            made = "expected a BertConfig, which BertConfig.from_dict makes"
            raise TypeError(f"config is of type {type(config).__name__}: {made}")
        # Quantisation puts another in its place.
        self.config = config
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config)
        if add_pooling_layer and config.model_type != "distilbert":
            self.pooler = _Pooler(config)
        self.eval()

    def __call__(
        self,
        input_ids: mx.array | None = None,
        attention_mask: mx.array | None = None,
        token_type_ids: mx.array | None = None,
        position_ids: mx.array | None = None,
        *,
        inputs_embeds: mx.array | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        compute_pooling: bool = True,
        training: bool | None = None,
    ) -> BertOutput:
        """The hidden states of a batch.

        Args:
            input_ids: integers (rows, tokens).
            attention_mask: None, or 1 and 0 of any dtype, or bool, or additive floats, (rows, tokens); or the same
                per query as (rows, 1, tokens, tokens). See `masks.for_attention`. A query that may attend nothing
                gets the mean of all values, as with transformers' eager attention.
            token_type_ids: integers (rows, tokens); zeros without it.
            position_ids: integers (rows, tokens) or (1, tokens); 0, 1, 2, ... without it, for RoBERTa the places of
                the tokens that are not padding.
            inputs_embeds: word embeddings (rows, tokens, hidden) in place of `input_ids`.
            output_hidden_states, output_attentions: whether to return them.
            compute_pooling: whether to return cls, mean and max pooling, where the configuration has them.
            training: whether dropout is active in this call; the module's own mode if None.

        Raises:
            ValueError: wrong shapes or dtypes, an empty batch, more tokens than there are positions, or, outside of
                `mx.compile` and `mx.vmap`, where no value can be read, an id out of its table's range.
        """
        rows, tokens = self._checked(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        training = self.training if training is None else training
        hidden = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds, training=training)
        bias = masks.for_attention(attention_mask, hidden.dtype)
        states, probabilities = [hidden], []
        for layer in self.encoder.layer:
            hidden, attended = layer(hidden, bias, output_attentions=output_attentions, training=training)
            states.append(hidden)
            probabilities.append(attended)
        pooled: dict[str, mx.array] = {}
        if compute_pooling and self.config.compute_additional_pooling:
            kept = masks.kept_tokens(attention_mask, rows=rows, tokens=tokens)
            names = {"cls_output": "cls", "mean_pooled": "mean", "max_pooled": "max"}
            pooled = {name: pooling.pool(hidden, kept, kind) for name, kind in names.items()}
        return BertOutput(
            last_hidden_state=hidden,
            pooler_output=self.pooler(hidden, training=training) if "pooler" in self else None,
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(probabilities) if output_attentions else None,
            attention_mask=attention_mask,
            **pooled,
        )

    @classmethod
    def from_pretrained(
        cls,
        id_or_path: str | Path,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        strict: bool = True,
        *,
        random_init: bool = False,
        default_config: bool = False,
        add_pooling_layer: bool = True,
        dtype: mx.Dtype | None = None,
        **config_overrides: Any,
    ) -> BertCore:
        """The model of a local directory, or of a repository `org/name` or `org/name@revision` of the Hub.

        Every layout that `weights.read` knows is converted. The model is in evaluation mode.

        Args:
            id_or_path: directory or Hub id; see `hub.resolve`.
            revision, cache_dir, token: of the Hub.
            strict: whether a tensor that is left over is an error; else it is passed over with a warning. The tensors
                of a task's head are not left over.
            random_init: whether weights that are missing, all of them too, stay random, with a warning. Weights that
                are damaged or of another model are an error all the same.
            default_config: whether an absent or faulty config.json gives the default configuration, with a warning.
            add_pooling_layer: whether there is a pooler.
            dtype: the dtype of the parameters; that of the file without it.
            config_overrides: fields of the configuration to replace.

        Raises:
            ConfigError, HubError, WeightsError: the configuration, the download or the weights are at fault.
            TypeError: an override is no field of the configuration.
            ValueError: no model computes in that dtype.
        """
        directory = hub.resolve(id_or_path, revision=revision, cache_dir=cache_dir, token=token)
        config = configs.override(config_of(directory, default_config=default_config), config_overrides)
        checkpoint = checkpoint_of(directory, config, random_init=random_init)
        return cls.from_checkpoint(
            config,
            checkpoint,
            strict=strict,
            random_init=random_init,
            add_pooling_layer=add_pooling_layer,
            dtype=dtype,
        )

    @classmethod
    def from_checkpoint(
        cls,
        config: BertConfig,
        checkpoint: Checkpoint | None,
        *,
        strict: bool = True,
        random_init: bool = False,
        add_pooling_layer: bool = True,
        dtype: mx.Dtype | None = None,
    ) -> BertCore:
        """The model of what `checkpoint_of` read; the arguments are those of `from_pretrained`.

        Raises:
            WeightsError: the weights are not those of the configuration.
            ValueError: no model computes in that dtype.
        """
        check_dtype(dtype, config)
        model = cls(config, add_pooling_layer=add_pooling_layer)
        if checkpoint is not None:
            load(model, checkpoint, strict=strict, random_init=random_init)
        if dtype is not None:
            model.set_dtype(dtype)
        # What cannot be read is an error here and not in the first forward pass.
        mx.eval(model.parameters())
        return model

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes config.json and model.safetensors as transformers has them; its `AutoModel` reads the directory.

        Both are on the disk before either takes its place.

        Raises:
            OSError: they cannot be written.
            WeightsError: the parameters are not those of the configuration.
        """
        # A file that said another dtype than the weights have would make transformers load them in that one.
        dtype = str(self.embeddings.LayerNorm.weight.dtype).rpartition(".")[2]
        kept = {key: dtype if key in ("dtype", "torch_dtype") else value for key, value in self.config.extra.items()}
        weights.write(directory, dict(tree_flatten(self.parameters())), replace(self.config, extra=kept))

    def _checked(
        self,
        input_ids: Any,
        attention_mask: mx.array | None,
        token_type_ids: mx.array | None,
        position_ids: mx.array | None,
        inputs_embeds: Any,
    ) -> tuple[int, int]:
        """Refuses a batch that the model would read garbage for; returns its rows and tokens."""
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected either input_ids or inputs_embeds, and not both")
        if inputs_embeds is None:
            _check_array("input_ids", input_ids, rank=2, integer=True)
            rows, tokens = input_ids.shape
        else:
            _check_array("inputs_embeds", inputs_embeds, rank=3, integer=False)
            rows, tokens, width = inputs_embeds.shape
            if width != config.hidden_size:
                raise ValueError(f"inputs_embeds has width {width}: expected hidden_size={config.hidden_size}")
        if rows == 0 or tokens == 0:
            raise ValueError(f"the batch is empty: {rows} rows of {tokens} tokens")
        faults: list[tuple[mx.array, str]] = []
        if input_ids is not None:
            faults.append(_outside("input_ids", input_ids, config.vocab_size, "vocab_size"))
        if token_type_ids is not None:
            if config.model_type == "distilbert":
                raise ValueError("token_type_ids were given: DistilBERT has no token types")
            _check_array("token_type_ids", token_type_ids, rank=2, integer=True)
            _check_rows("token_type_ids", token_type_ids, rows, tokens, broadcast=False)
            faults.append(_outside("token_type_ids", token_type_ids, config.type_vocab_size, "type_vocab_size"))
        if position_ids is not None:
            _check_array("position_ids", position_ids, rank=2, integer=True)
            _check_rows("position_ids", position_ids, rows, tokens, broadcast=True)
            table = "max_position_embeddings"
            faults.append(_outside("position_ids", position_ids, config.max_position_embeddings, table))
        else:
            longest = config.max_position_embeddings - _first_position(config)
            message = f"expected at most {longest}, max_position_embeddings={config.max_position_embeddings}"
            if config.model_type == "roberta" and input_ids is not None and tokens > longest:
                # Padding takes no position, so it is the tokens beside it that have to fit.
                counted = (input_ids != config.pad_token_id).sum(axis=1).max()
                faults.append((counted > longest, f"a row has too many tokens that are not padding: {message}"))
            elif tokens > longest:
                raise ValueError(f"the batch has {tokens} tokens: {message}")
        if attention_mask is not None:
            _check_array("attention_mask", attention_mask, rank=None, integer=None)
            masks.check_shape(attention_mask, rows=rows, tokens=tokens, heads=config.num_attention_heads)
            faults.extend(masks.value_faults(attention_mask))
        raise_first(faults)
        return rows, tokens


class _Embeddings(nn.Module):
    """Word, token type and position embeddings, summed and normalised."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self._config = config
        self.word_embeddings = _embedding(config, config.vocab_size, padding=True)
        self.position_embeddings = _embedding(
            config, config.max_position_embeddings, padding=config.model_type == "roberta"
        )
        if config.model_type != "distilbert":
            self.token_type_embeddings = _embedding(config, config.type_vocab_size, padding=False)
        self.LayerNorm = _LayerNorm(config)

    def __call__(
        self,
        input_ids: Any,
        token_type_ids: mx.array | None,
        position_ids: mx.array | None,
        inputs_embeds: mx.array | None,
        *,
        training: bool,
    ) -> mx.array:
        config = self._config
        shape = input_ids.shape if inputs_embeds is None else inputs_embeds.shape[:2]
        if position_ids is None:
            position_ids = _positions(config, input_ids, shape[1])
        if inputs_embeds is None:
            inputs_embeds = _without_gradient(self.word_embeddings(input_ids), input_ids, config.pad_token_id)
        hidden = inputs_embeds
        if "token_type_embeddings" in self:
            types = mx.zeros((1, 1), dtype=mx.int32) if token_type_ids is None else token_type_ids
            hidden = hidden + self.token_type_embeddings(types)
        positions = self.position_embeddings(position_ids)
        if config.model_type == "roberta":
            positions = _without_gradient(positions, position_ids, config.pad_token_id)
        return dropout(self.LayerNorm(hidden + positions), config.hidden_dropout_prob, training)


class _Encoder(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = [_Layer(config) for _ in range(config.num_hidden_layers)]


class _Layer(nn.Module):
    """Attention and feed-forward network, each added to its input and then normalised."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self._activation = activation(config.hidden_act)
        self.attention = _Attention(config)
        self.intermediate = _Dense(config, config.hidden_size, config.intermediate_size)
        self.output = _Residual(config, config.intermediate_size, config.hidden_dropout_prob)

    def __call__(
        self, hidden: mx.array, bias: mx.array | None, *, output_attentions: bool, training: bool
    ) -> tuple[mx.array, mx.array | None]:
        hidden, attended = self.attention(hidden, bias, output_attentions=output_attentions, training=training)
        inner = self._activation(self.intermediate.dense(hidden))
        return self.output(inner, hidden, training=training), attended


class _Attention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = _SelfAttention(config)
        # DistilBERT has no dropout between attention and the residual stream.
        dropout = 0.0 if config.model_type == "distilbert" else config.hidden_dropout_prob
        self.output = _Residual(config, config.hidden_size, dropout)

    def __call__(
        self, hidden: mx.array, bias: mx.array | None, *, output_attentions: bool, training: bool
    ) -> tuple[mx.array, mx.array | None]:
        mixed, attended = self.self(hidden, bias, output_attentions=output_attentions, training=training)
        return self.output(mixed, hidden, training=training), attended


class _SelfAttention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self._heads = config.num_attention_heads
        self._dropout = config.attention_probs_dropout_prob
        self.query = _linear(config, config.hidden_size, config.hidden_size)
        self.key = _linear(config, config.hidden_size, config.hidden_size)
        self.value = _linear(config, config.hidden_size, config.hidden_size)

    def __call__(
        self, hidden: mx.array, bias: mx.array | None, *, output_attentions: bool, training: bool
    ) -> tuple[mx.array, mx.array | None]:
        rows, tokens, width = hidden.shape
        split = (rows, tokens, self._heads, width // self._heads)
        query, key, value = (
            linear(hidden).reshape(split).transpose(0, 2, 1, 3) for linear in (self.query, self.key, self.value)
        )
        scale = 1.0 / math.sqrt(split[-1])
        attended = None
        # MLX's kernel gives no probabilities, drops none of them, and computes float64 in float32.
        if output_attentions or hidden.dtype == mx.float64 or (training and self._dropout > 0):
            attended = dropout(attention_probabilities(query, key, bias, scale), self._dropout, training)
            mixed = attended @ value
        else:
            mixed = mx.fast.scaled_dot_product_attention(query, key, value, scale=scale, mask=bias)
        return mixed.transpose(0, 2, 1, 3).reshape(hidden.shape), attended


class _Residual(nn.Module):
    """A dense layer back to the hidden size, added to the residual stream and normalised."""

    def __init__(self, config: BertConfig, width: int, dropout: float) -> None:
        super().__init__()
        self._dropout = dropout
        self.dense = _linear(config, width, config.hidden_size)
        self.LayerNorm = _LayerNorm(config)

    def __call__(self, inner: mx.array, hidden: mx.array, *, training: bool) -> mx.array:
        return self.LayerNorm(dropout(self.dense(inner), self._dropout, training) + hidden)


class _Pooler(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self._activation = activation(config.pooler_activation)
        self._dropout = config.pooler_dropout
        width = config.hidden_size if config.pooler_hidden_size is None else config.pooler_hidden_size
        self.dense = _linear(config, config.hidden_size, width)

    def __call__(self, hidden: mx.array, *, training: bool) -> mx.array:
        return dropout(self._activation(self.dense(hidden[:, 0])), self._dropout, training)


class _Dense(nn.Module):
    def __init__(self, config: BertConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        self.dense = _linear(config, inputs, outputs)


class _Linear(nn.Linear):
    """nn.Linear, with its product formed the way round that the BLAS of MLX's Linux wheel is fast at."""

    def __call__(self, hidden: mx.array) -> mx.array:
        if sys.platform != "linux" or mx.default_device() != mx.cpu:
            return super().__call__(hidden)
        # That BLAS takes twice as long for a transposed second factor; a copy of the hidden states is nothing to it.
        # It also reads all columns again for each row of the weight, so that few at a time, which a cache holds, are
        # faster than many: by a third for 32 rows of 512 tokens.
        rows = hidden.reshape(-1, hidden.shape[-1])
        blocks = mx.split(rows, range(_BLOCK, rows.shape[0], _BLOCK))
        products = [mx.addmm(self.bias[:, None], self.weight, mx.contiguous(block.T)).T for block in blocks]
        return mx.contiguous(mx.concatenate(products)).reshape(*hidden.shape[:-1], -1)


class _LayerNorm(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self._epsilon = config.layer_norm_eps
        self.weight = mx.ones((config.hidden_size,))
        self.bias = mx.zeros((config.hidden_size,))

    def __call__(self, hidden: mx.array) -> mx.array:
        return accurate.layer_norm(hidden, self.weight, self.bias, self._epsilon)


def attention_probabilities(query: mx.array, key: mx.array, bias: mx.array | None, scale: float) -> mx.array:
    """softmax(scale query keyᵀ) under a mask of `masks.for_attention`: (rows, heads, queries, keys).

    What is masked takes the lowest number in place of its score, so that a query that may attend nothing attends
    everything alike.
    """
    scores = (query @ key.swapaxes(-1, -2)) * scale
    if bias is not None and bias.dtype == mx.bool_:
        scores = mx.where(bias, scores, mx.array(mx.finfo(scores.dtype).min, dtype=scores.dtype))
    elif bias is not None:
        scores = scores + bias
    return accurate.softmax(scores)


def _gelu(values: mx.array) -> mx.array:
    # MLX compiles its own activations: good on a GPU, and half a second of a C++ compiler on the CPU.
    if mx.default_device() != mx.cpu:
        return nn.gelu(values)
    return values * (1 + mx.erf(values / math.sqrt(2))) / 2


def _relu(values: mx.array) -> mx.array:
    return mx.maximum(values, 0)


def _tanh_gelu(values: mx.array, slope: float = math.sqrt(2 / math.pi)) -> mx.array:
    return 0.5 * values * (1 + mx.tanh(slope * (values + 0.044715 * (values * values * values))))


def _softplus(values: mx.array) -> mx.array:
    return mx.maximum(values, 0) + mx.log1p(accurate.exp(-mx.abs(values)))


_FORMULAS: dict[str, Callable[[mx.array], mx.array]] = {
    "gelu": _gelu,
    "gelu_10": lambda values: mx.clip(_gelu(values), -10, 10),
    "gelu_accurate": _tanh_gelu,
    "gelu_fast": partial(_tanh_gelu, slope=0.7978845608),
    "gelu_new": _tanh_gelu,
    "gelu_python": _gelu,
    "gelu_python_tanh": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "leaky_relu": lambda values: mx.maximum(0.01 * values, values),
    "linear": lambda values: values,
    "mish": lambda values: values * mx.tanh(_softplus(values)),
    "quick_gelu": lambda values: values * accurate.sigmoid(1.702 * values),
    "relu": _relu,
    "relu2": lambda values: mx.square(_relu(values)),
    "relu6": lambda values: mx.clip(values, 0, 6),
    "sigmoid": accurate.sigmoid,
    "silu": lambda values: values * accurate.sigmoid(values),
    "swish": lambda values: values * accurate.sigmoid(values),
    "tanh": mx.tanh,
}


def activation(name: str) -> Callable[[mx.array], mx.array]:
    """The activation of transformers' `ACT2FN` with that name; float16 and bfloat16 are computed in float32.

    torch computes its own activations so, and rounds once; MLX would round after each operation.
    """
    formula = _FORMULAS[name]

    def compute(values: mx.array) -> mx.array:
        if values.dtype in (mx.float16, mx.bfloat16):
            return formula(values.astype(mx.float32)).astype(values.dtype)
        return formula(values)

    return compute


def _embedding(config: BertConfig, count: int, *, padding: bool) -> nn.Embedding:
    table = nn.Embedding(count, config.hidden_size)
    table.weight = _normal(config, (count, config.hidden_size))
    if padding and config.pad_token_id is not None and config.pad_token_id < count:
        table.weight[config.pad_token_id] = 0.0
    return table


def _linear(config: BertConfig, inputs: int, outputs: int) -> nn.Linear:
    linear = _Linear(inputs, outputs)
    linear.weight = _normal(config, (outputs, inputs))
    linear.bias = mx.zeros((outputs,))
    return linear


def _normal(config: BertConfig, shape: tuple[int, ...]) -> mx.array:
    return mx.random.normal(shape, scale=config.initializer_range)


def _first_position(config: BertConfig) -> int:
    return (config.pad_token_id or 0) + 1 if config.model_type == "roberta" else 0


def _positions(config: BertConfig, input_ids: mx.array | None, tokens: int) -> mx.array:
    """Positions (1, tokens), or for RoBERTa's ids (rows, tokens): padding stays at the padding's own position."""
    if config.model_type != "roberta" or input_ids is None:
        return mx.arange(tokens)[None] + _first_position(config)
    counted = (input_ids != config.pad_token_id).astype(mx.int32)
    return mx.cumsum(counted, axis=1) * counted + config.pad_token_id


def _without_gradient(vectors: mx.array, ids: mx.array, pad: int | None) -> mx.array:
    """The same vectors; those of the padding id pass no gradient on, as with torch's `padding_idx`."""
    if pad is None:
        return vectors
    return mx.where((ids == pad)[..., None], mx.stop_gradient(vectors), vectors)


def dropout(values: mx.array, probability: float, training: bool) -> mx.array:
    """The values, in training each dropped with that probability, and the others scaled up to make good for them."""
    if not training or probability == 0:
        return values
    kept = mx.random.bernoulli(1 - probability, values.shape)
    return mx.where(kept, values * (1 / (1 - probability)), mx.zeros_like(values))


def _check_array(name: str, value: Any, *, rank: int | None, integer: bool | None) -> None:
    if not isinstance(value, mx.array):
        raise ValueError(f"{name} is of type {type(value).__name__}: expected an mlx.core.array")
    if integer is not None and not mx.issubdtype(value.dtype, mx.integer if integer else mx.floating):
        raise ValueError(f"{name} has dtype {value.dtype}: expected {'an integer' if integer else 'a float'} dtype")
    if rank is not None and value.ndim != rank:
        axes = ("rows", "tokens", "hidden")[:rank]
        raise ValueError(f"{name} has shape {value.shape}: expected ({', '.join(axes)})")


def _check_rows(name: str, value: mx.array, rows: int, tokens: int, *, broadcast: bool) -> None:
    if value.shape != (rows, tokens) and not (broadcast and value.shape == (1, tokens)):
        raise ValueError(f"{name} has shape {value.shape}: expected (rows, tokens) = ({rows}, {tokens})")


def _outside(name: str, ids: mx.array, size: int, field: str) -> tuple[mx.array, str]:
    return (ids < 0).any() | (ids >= size).any(), f"{name} are not all in 0 to {size - 1}, {field}={size}"


def raise_first(faults: list[tuple[mx.array, str]]) -> None:
    """Raises what the first true array says, all of which are read at once.

    Where nothing can be read, under `mx.compile` and `mx.vmap`, nothing is raised.

    Args:
        faults: bool scalars, each with the message that it stands for.

    Raises:
        ValueError: one of them is true.
    """
    if not faults:
        return
    try:
        found = mx.stack([fault for fault, _ in faults]).tolist()
    except ValueError as error:
        if "during function transformations" not in str(error):
            raise
        return
    for (_, message), fault in zip(faults, found, strict=True):
        if fault:
            raise ValueError(message)


def check_dtype(dtype: Any, config: BertConfig) -> None:
    """Refuses a dtype that no model of this configuration computes in; None is none.

    Raises:
        ValueError: it is no float dtype of MLX, or float64 for quantised weights.
    """
    if dtype is None:
        return
    if not isinstance(dtype, mx.Dtype) or not mx.issubdtype(dtype, mx.floating):
        raise ValueError(f"dtype is {dtype!r}: expected mlx.core.float32, float16, bfloat16 or float64")
    if dtype == mx.float64 and config.quantization is not None:
        raise ValueError("dtype is float64, and MLX computes nothing quantised in it: expected another float dtype")


def config_of(directory: Path, *, default_config: bool) -> BertConfig:
    """The configuration of a directory; the default one, with a warning, where that is asked for and it has none.

    Raises:
        ConfigError: config.json is absent or faulty, and no default is asked for.
    """
    try:
        return configs.read(directory)
    except configs.ConfigError as error:
        if not default_config:
            raise
        warnings.warn(f"{error}; the default configuration is used, as default_config=True asks for", stacklevel=3)
        return BertConfig()


def checkpoint_of(directory: Path, config: BertConfig, *, random_init: bool) -> Checkpoint | None:
    """What a directory holds of a model; None, with a warning, where that is nothing and random weights are asked for.

    Raises:
        WeightsError, ImportError: as `weights.read_checkpoint` raises them.
    """
    has_weights = any((directory / name).exists() for name in weights.FILES) or any(directory.glob("*.npz"))
    if random_init and not has_weights:
        warnings.warn(f"{directory}: no weights; all are random, as random_init=True asks for", stacklevel=3)
        return None
    return weights.read_checkpoint(directory, config)


def load(model: BertCore, checkpoint: Checkpoint, *, strict: bool, random_init: bool) -> None:
    """Puts a checkpoint's tensors in the model; what is missing or left over is an error or, asked for, a warning.

    Raises:
        WeightsError: the checkpoint is not the model's. The model is then as it was.
    """
    tensors, missing = dict(checkpoint.tensors), checkpoint.missing
    if "pooler" not in model:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler.")}
        missing = tuple(name for name in missing if not name.startswith("pooler."))
    elif missing and not random_init and all(name.startswith("pooler.") for name in missing):
        fault = f"lacks {', '.join(missing)}, as a masked language model and a token classifier do"
        raise WeightsError(checkpoint.path, f"{fault}: add_pooling_layer=False loads the rest", missing=missing)
    refused = () if not strict else checkpoint.unexpected
    weights.require(replace(checkpoint, missing=() if random_init else missing, unexpected=refused))
    if missing:
        listed = ", ".join(missing)
        warnings.warn(f"{checkpoint.path}: lacks {listed}; random, as random_init=True asks for", stacklevel=4)
    if checkpoint.unexpected:
        listed = ", ".join(checkpoint.unexpected)
        warnings.warn(f"{checkpoint.path}: {listed} are not the model's and passed over, strict=False", stacklevel=4)
    if model.config.quantization is not None:
        quantisation.make_places(model, tensors, model.config.quantization)
    model.load_weights(list(tensors.items()), strict=False)
