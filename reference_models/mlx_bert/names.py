# SPDX-License-Identifier: Apache-2.0
"""Says which tensor of a file is which parameter of BertCore, in every naming that BERT's weights come in."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

Shape = tuple[int, ...]

MODEL_TYPES = ("bert", "distilbert", "roberta")

# The modules of a layer as BertModel names them, which is how BertCore names them too.
_LAYER = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)
_SHORT = (
    "attention.query_proj",
    "attention.key_proj",
    "attention.value_proj",
    "attention.out_proj",
    "ln1",
    "linear1",
    "linear2",
    "ln2",
)
_DISTILBERT = (
    "attention.q_lin",
    "attention.k_lin",
    "attention.v_lin",
    "attention.out_lin",
    "sa_layer_norm",
    "ffn.lin1",
    "ffn.lin2",
    "output_layer_norm",
)
# What a module's tensors are called; TensorFlow's LayerNorm has other words for the same two.
_TAILS = {"weight": "weight", "bias": "bias", "scales": "scales", "biases": "biases"}
_NORM_TAILS = _TAILS | {"gamma": "weight", "beta": "bias"}
# Buffers that older files hold. They are a count of positions and zeros, which a model makes for itself.
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
# Modules that transformers' task models put beside the encoder, and what a head has that none of them has.
_HEADS = (
    "cls.", "classifier.", "head.", "lm_head.", "pre_classifier.", "qa_outputs.", "vocab_layer_norm.",
    "vocab_projector.", "vocab_transform.",
)  # fmt: skip


class Sizes(Protocol):
    """What the names and shapes of the parameters depend on; a BertConfig is one."""

    @property
    def model_type(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def type_vocab_size(self) -> int: ...
    @property
    def pooler_hidden_size(self) -> int | None: ...
    @property
    def quantization(self) -> Mapping[str, Any] | None: ...


@dataclass(frozen=True)
class Layout:
    """One naming: what stands before and after the number of a layer, and the modules that have other names.

    `layer` has the modules of a layer in the order of BertModel's.
    """

    name: str
    before: str
    after: str
    layer: tuple[str, ...]
    model_types: tuple[str, ...] = ("bert",)
    embeddings_norm: str = "embeddings.LayerNorm"
    pooler: str = "pooler.dense"


HF = Layout("transformers", "encoder.layer.", ".", _LAYER, ("bert", "roberta"))
DISTILBERT = Layout("transformers' DistilBERT", "transformer.layer.", ".", _DISTILBERT, ("distilbert",))
LAYOUTS = (
    HF,
    DISTILBERT,
    Layout("mlx-examples", "encoder.layers.", ".", _SHORT, embeddings_norm="embeddings.norm", pooler="pooler"),
    Layout("bert-playground a7f08d8", "encoder_layers.", ".transformer_layer.", _SHORT),
    Layout("bert-playground 997e078", "encoder_layers.", ".", _LAYER),
)


class NamesError(ValueError):
    """Tensors have the names of another model."""


@dataclass(frozen=True)
class Names:
    """Every key of a file, once.

    parameters: key to the parameter that it is. head: keys of a task head. dropped: keys of buffers that hold nothing.
    unexpected: all other keys.
    """

    layout: str
    parameters: Mapping[str, str]
    head: tuple[str, ...]
    dropped: tuple[str, ...]
    unexpected: tuple[str, ...]


def parameter_shapes(config: Sizes, *, pooler: bool = True) -> dict[str, Shape]:
    """Return name and shape of every parameter of a BertCore that is not quantised.

    pooler: False leaves the pooler out, as BertForTokenClassification and BertForMaskedLM do; DistilBERT has none.
    """
    width, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, Shape] = {
        "embeddings.word_embeddings.weight": (config.vocab_size, width),
        "embeddings.position_embeddings.weight": (config.max_position_embeddings, width),
    }
    is_distilbert = config.model_type == "distilbert"
    if not is_distilbert:
        shapes["embeddings.token_type_embeddings.weight"] = (config.type_vocab_size, width)
    shapes |= _norm("embeddings.LayerNorm", width)
    for number in range(config.num_hidden_layers):
        for module in _LAYER:
            path = f"{HF.before}{number}{HF.after}{module}"
            if module.endswith("LayerNorm"):
                shapes |= _norm(path, width)
            elif module == "intermediate.dense":
                shapes |= _dense(path, inner, width)
            else:
                shapes |= _dense(path, width, inner if module == "output.dense" else width)
    if pooler and not is_distilbert:
        shapes |= _dense("pooler.dense", config.pooler_hidden_size or width, width)
    return shapes


def canonical(keys: Iterable[str], model_type: str) -> Names:
    """Return which parameter each key of a file is, in whichever naming names most of them.

    A prefix `bert.`, `roberta.` or `distilbert.`, as task models have it, is part of the naming: keys without it are
    then a head's or unexpected.

    Raises NamesError when the naming is not one of `model_type`, or two keys are one parameter.
    """
    keys = list(keys)
    named = [(layout, prefix) for layout in LAYOUTS for prefix in ("", *layout.model_types)]
    # Of equals the first is taken, and the embeddings of some have the same names.
    named.sort(key=lambda candidate: model_type not in _types(*candidate))
    found = [_parameters(keys, layout, prefix and f"{prefix}.") for layout, prefix in named]
    (layout, prefix), parameters = max(zip(named, found, strict=True), key=lambda candidate: len(candidate[1]))
    if model_type not in _types(layout, prefix):
        theirs = " or a ".join(_types(layout, prefix))
        raise NamesError(f"its tensors have the names of a {theirs} model, expected those of a {model_type} model")
    sources: dict[str, str] = {}
    for key, parameter in parameters.items():
        if parameter in sources:
            raise NamesError(f"{sources[parameter]} and {key} are the same parameter, expected one of them")
        sources[parameter] = key
    buffers = {f"{base}{name}" for name in _BUFFERS for base in ("", f"{prefix}.")}
    left = [key for key in keys if key not in parameters]
    dropped = tuple(key for key in left if key in buffers)
    head = tuple(key for key in left if key.startswith(_HEADS))
    unexpected = tuple(key for key in left if key not in buffers and not key.startswith(_HEADS))
    return Names(layout.name, parameters, head, dropped, unexpected)


def original(parameter: str, model_type: str) -> str:
    """Return the name that transformers' own model of this type has for a parameter of BertCore."""
    if model_type != "distilbert":
        return parameter
    for module, name in zip(_LAYER, _DISTILBERT, strict=True):
        found = re.fullmatch(rf"encoder\.layer\.(\d+)\.{re.escape(module)}\.(\w+)", parameter)
        if found:
            return f"{DISTILBERT.before}{found[1]}.{name}.{found[2]}"
    return parameter


def _types(layout: Layout, prefix: str) -> tuple[str, ...]:
    return (prefix,) if prefix else layout.model_types


def _parameters(keys: list[str], layout: Layout, prefix: str) -> dict[str, str]:
    modules = {name: name for name in ("embeddings.word_embeddings", "embeddings.position_embeddings")}
    modules |= {layout.embeddings_norm: "embeddings.LayerNorm"}
    if layout is not DISTILBERT:
        modules |= {"embeddings.token_type_embeddings": "embeddings.token_type_embeddings"}
        modules |= {layout.pooler: "pooler.dense"}
    layer = dict(zip(layout.layer, _LAYER, strict=True))
    below = re.compile(rf"{re.escape(layout.before)}(0|[1-9][0-9]*){re.escape(layout.after)}(.+)")
    parameters = {}
    for key in keys:
        path, _, tail = key.removeprefix(prefix).rpartition(".")
        if not key.startswith(prefix):
            continue
        if found := below.fullmatch(path):
            module = layer.get(found[2])
            name = module and f"{HF.before}{found[1]}{HF.after}{module}"
        else:
            name = modules.get(path)
        tails = _NORM_TAILS if name and name.endswith("LayerNorm") else _TAILS
        if name and tail in tails:
            parameters[key] = f"{name}.{tails[tail]}"
    return parameters


def _norm(path: str, width: int) -> dict[str, Shape]:
    return {f"{path}.weight": (width,), f"{path}.bias": (width,)}


def _dense(path: str, width: int, source: int) -> dict[str, Shape]:
    return {f"{path}.weight": (width, source), f"{path}.bias": (width,)}
