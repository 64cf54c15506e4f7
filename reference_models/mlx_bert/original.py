# SPDX-License-Identifier: Apache-2.0
"""The truth that BERT on MLX is held to: transformers' own BERT, DistilBERT and RoBERTa in torch, behind one door.

Their code is transformers' as it is installed, 4.57 or 5, with eager attention, whose numbers do not depend on a fused
kernel, and in evaluation mode. Fields have BERT's names for all three, and so do the names on the port's side.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harness.families import Fields, Tap, nearest

if TYPE_CHECKING:
    import torch

    Outputs = dict[str, torch.Tensor]

BODY = "body"

CLASSES: Mapping[str, Mapping[str, str]] = {
    "bert": {
        BODY: "BertModel",
        "masked_lm": "BertForMaskedLM",
        "sequence_classification": "BertForSequenceClassification",
        "token_classification": "BertForTokenClassification",
        "pretraining": "BertForPreTraining",
    },
    "distilbert": {
        BODY: "DistilBertModel",
        "masked_lm": "DistilBertForMaskedLM",
        "sequence_classification": "DistilBertForSequenceClassification",
        "token_classification": "DistilBertForTokenClassification",
    },
    "roberta": {
        BODY: "RobertaModel",
        "masked_lm": "RobertaForMaskedLM",
        "sequence_classification": "RobertaForSequenceClassification",
        "token_classification": "RobertaForTokenClassification",
    },
}
"""model_type -> head -> the class of transformers. `pretraining` is what BERT's first checkpoints hold."""

CONFIGURATIONS: Mapping[str, str] = {"bert": "BertConfig", "distilbert": "DistilBertConfig", "roberta": "RobertaConfig"}

SHARED_FIELDS: Sequence[str] = (
    "vocab_size",
    "max_position_embeddings",
    "initializer_range",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)

RENAMED_FIELDS: Mapping[str, str] = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "classifier_dropout": "seq_classif_dropout",
}
"""BERT's name of a field -> DistilBERT's."""

WITHOUT_COUNTERPART: Sequence[str] = ("type_vocab_size", "layer_norm_eps")
"""Fields of BERT and RoBERTa that DistilBERT has not: it has no token types, and its epsilon is always 1e-12."""

OWN_FIELDS: Sequence[str] = ("qa_dropout", "sinusoidal_pos_embds")
"""Fields of DistilBERT that BERT has not."""

OPTIONS: Sequence[str] = ("num_labels", "problem_type")
"""What configures a classifier's head."""

DISTILBERT_EPSILON = 1e-12

EMBEDDING_PATHS: Mapping[str, str] = {
    "token_embedding": "embeddings.word_embeddings",
    "embedding": "embeddings.LayerNorm",
}
"""Name of a tap -> submodule, the same in all three models."""

LAYER_PATHS: Mapping[str, tuple[str, str]] = {
    ".query": ("attention.self.query", "attention.q_lin"),
    ".key": ("attention.self.key", "attention.k_lin"),
    ".value": ("attention.self.value", "attention.v_lin"),
    ".attention_output": ("attention.output.dense", "attention.out_lin"),
    ".attention_norm": ("attention.output.LayerNorm", "sa_layer_norm"),
    ".intermediate": ("intermediate.dense", "ffn.lin1"),
    ".output": ("output.dense", "ffn.lin2"),
    "": ("output.LayerNorm", "output_layer_norm"),
}
"""What follows `block.<i>` in a tap's name -> submodule of the layer in BERT and RoBERTa, and in DistilBERT.

In the order data passes. All are parts without parts of their own, which no port can leave unrun; `.intermediate` is
before the activation, and the last is what the layer gives.
"""

LAYERS, DISTILBERT_LAYERS = "encoder.layer", "transformer.layer"


class BertOriginal:
    """`BertOriginal(config)` is transformers' `BertModel`, `DistilBertModel` or `RobertaModel`, by `model_type`."""

    def __new__(cls, config: Any) -> Any:
        return _class_of(config.model_type, BODY)(config)


class MaskedLMOriginal:
    """`MaskedLMOriginal(config)` is transformers' `...ForMaskedLM` of the configuration's `model_type`."""

    def __new__(cls, config: Any) -> Any:
        return _class_of(config.model_type, "masked_lm")(config)


class SequenceClassificationOriginal:
    """`SequenceClassificationOriginal(config)` is transformers' `...ForSequenceClassification` of the `model_type`."""

    def __new__(cls, config: Any) -> Any:
        return _class_of(config.model_type, "sequence_classification")(config)


class TokenClassificationOriginal:
    """`TokenClassificationOriginal(config)` is transformers' `...ForTokenClassification` of the `model_type`."""

    def __new__(cls, config: Any) -> Any:
        return _class_of(config.model_type, "token_classification")(config)


def model_type_of(fields: Fields) -> str:
    """The `model_type` of a configuration; one without it is DistilBERT's by DistilBERT's names, else BERT's.

    Raises ValueError when there is no such model here.
    """
    own = "distilbert" if {"dim", "n_layers", "n_heads"} & set(fields) else "bert"
    found = str(fields.get("model_type", own))
    if found not in CLASSES:
        raise ValueError(f"model_type is '{found}', expected {', '.join(CLASSES)}")
    return found


def configuration(fields: Fields) -> Any:
    """The configuration of transformers, with eager attention.

    fields: BERT's names, or DistilBERT's own ones. What is not given has transformers' default, which is another for
    each `model_type`. DistilBERT, which has no token types, leaves `type_vocab_size` aside.
    Raises ValueError, one line, for a field that does not exist or has no place in the model.
    """
    import transformers

    model_type = model_type_of(fields)
    given = {name: value for name, value in fields.items() if name != "model_type"}
    known = [*SHARED_FIELDS, *RENAMED_FIELDS, *WITHOUT_COUNTERPART, *OPTIONS]
    if model_type == "distilbert":
        if (epsilon := given.pop("layer_norm_eps", DISTILBERT_EPSILON)) != DISTILBERT_EPSILON:
            raise ValueError(f"layer_norm_eps is {epsilon}, and DistilBERT's is always {DISTILBERT_EPSILON}")
        given.pop("type_vocab_size", None)
        if twice := sorted(name for name, own in RENAMED_FIELDS.items() if name in given and own in given):
            raise ValueError(f"{twice[0]} and {RENAMED_FIELDS[twice[0]]} are one field of DistilBERT; give one of them")
        known += [*RENAMED_FIELDS.values(), *OWN_FIELDS]
        # DistilBERT's dropout before its classifier is never null: left out, it is transformers' 0.2.
        given = {
            RENAMED_FIELDS.get(name, name): value
            for name, value in given.items()
            if (name, value) != ("classifier_dropout", None)
        }
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"'{unknown[0]}' is no field of {model_type}{nearest(unknown[0], sorted(known))}")
    config = getattr(transformers, CONFIGURATIONS[model_type])(**given)
    config._attn_implementation = "eager"
    return config


def fields_of(config: Any) -> dict[str, Any]:
    """BERT's names of a configuration of transformers, `model_type` among them; the inverse of `configuration`."""
    distilbert = config.model_type == "distilbert"
    own = RENAMED_FIELDS if distilbert else {}
    names = [*SHARED_FIELDS, *RENAMED_FIELDS, *(OWN_FIELDS if distilbert else WITHOUT_COUNTERPART)]
    return {"model_type": config.model_type} | {name: getattr(config, own.get(name, name)) for name in names}


def build_original(cls: Any, fields: Fields) -> torch.nn.Module:
    """`cls(config)` in evaluation mode, float32, with transformers' own initialisation.

    cls: one of the doors above, or a class that takes a configuration of transformers.
    Raises what `configuration` raises, and what transformers raises for sizes that do not fit.
    """
    module: torch.nn.Module = cls(configuration(fields))
    return module.eval()


def build_head(cls: Any, fields: Fields, options: Fields) -> torch.nn.Module:
    """As `build_original`, with the options of a head: `num_labels`, `problem_type`."""
    return build_original(cls, {**fields, **options})


def build(fields: Fields, *, head: str = BODY, **options: Any) -> torch.nn.Module:
    """The model of a configuration, with one of the heads of `CLASSES`; see `build_original`."""
    return build_original(_class_of(model_type_of(fields), head), {**fields, **options})


def maximum_length(fields: Fields) -> int:
    """The most tokens of a row without padding. RoBERTa's positions begin behind the row of its padding id."""
    config = configuration(fields)
    offset = config.pad_token_id + 1 if config.model_type == "roberta" else 0
    return int(config.max_position_embeddings) - offset


def run(
    module: torch.nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    token_type_ids: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    *,
    labels: torch.Tensor | None = None,
    everything: bool = False,
) -> Outputs:
    """What the model gives, by name, differentiable, in the dtype of its parameters.

    A body gives `last_hidden_state` (rows, tokens, hidden) and, where it has a pooler, `pooler_output` (rows, hidden).
    A head gives `logits`, and `loss` where there are labels. Only what is given is passed on.

    Args:
        input_ids: int64 (rows, tokens).
        attention_mask: (rows, tokens), 1 and 0 as integers or floats, or bool; 0 drops. A row of nothing but 0 is
            averaged over all its tokens; in float64, under transformers 4.57, DistilBERT gives NaN for it.
        token_type_ids, position_ids: int64 (rows, tokens).
        labels: as the head takes them; -100 is ignored where they stand at tokens.
        everything: also `embedding`, `block.<i>` (rows, tokens, hidden) and `attention.<i>`, which are probabilities
            (rows, heads, queries, keys).

    Raises:
        ValueError: the model has no such argument. DistilBERT has no token types, and under transformers 4.57 no
            positions either.
    """
    given = {
        "attention_mask": attention_mask,
        "token_type_ids": token_type_ids,
        "position_ids": position_ids,
        "labels": labels,
    }
    given = {name: value for name, value in given.items() if value is not None}
    # transformers 5 takes any keyword, and leaves aside what it does not know.
    if unknown := set(given) - set(inspect.signature(module.forward).parameters):
        raise ValueError(f"{type(module).__name__} takes no {min(unknown)}; leave it out")
    asked = dict.fromkeys(("output_hidden_states", "output_attentions"), everything)
    outputs = module(input_ids=input_ids, **given, **asked)
    names = ("last_hidden_state", "pooler_output", "logits", "loss")
    found = {name: outputs[name] for name in names if outputs.get(name) is not None}
    if everything:
        found |= named_states(outputs.hidden_states)
        found |= {f"attention.{layer}": value for layer, value in enumerate(outputs.attentions)}
    return found


def named_states(hidden_states: Sequence[Any]) -> dict[str, Any]:
    """transformers' list of hidden states, the embeddings first, by the names of golden files and taps; any arrays."""
    return {f"block.{index - 1}" if index else "embedding": state for index, state in enumerate(hidden_states)}


def run_original(module: torch.nn.Module, tokens: torch.Tensor, targets: torch.Tensor | None) -> Outputs:
    """`run` without a mask, as a Family has it; targets are a head's labels."""
    return run(module, tokens, labels=targets)


def run_masked(module: torch.nn.Module, tokens: torch.Tensor, mask: torch.Tensor) -> Outputs:
    """`run` with a bool mask (rows, tokens), True where a token is to be seen, as the integers 1 and 0."""
    return run(module, tokens, mask.long())


def run_classifier(module: torch.nn.Module, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The logits of a head, as a `Head` has it: (rows, labels), or (rows, tokens, labels or vocabulary)."""
    return run_masked(module, tokens, mask)["logits"]


def taps(fields: Fields) -> Sequence[Tap]:
    """Where both models can be compared, in the order data passes them. The port has BERT's names in every model."""
    config = configuration(fields)
    distilbert = config.model_type == "distilbert"
    places = {name: (path, path) for name, path in EMBEDDING_PATHS.items()}
    for layer in range(config.num_hidden_layers):
        for part, (theirs, own) in LAYER_PATHS.items():
            original = f"{DISTILBERT_LAYERS}.{layer}.{own}" if distilbert else f"{LAYERS}.{layer}.{theirs}"
            places[f"block.{layer}{part}"] = (original, f"{LAYERS}.{layer}.{theirs}")
    if not distilbert:
        places["pooler"] = ("pooler.dense", "pooler.dense")
    return [Tap(name=name, original=original, port=port) for name, (original, port) in places.items()]


def port_key(key: str) -> str:
    """BERT's name of a tensor of any of the three models: DistilBERT's layers renamed, everything else as it is."""
    for theirs, own in LAYER_PATHS.values():
        if found := re.fullmatch(rf"(.*){re.escape(DISTILBERT_LAYERS)}\.(\d+)\.{re.escape(own)}\.(\w+)", key):
            return f"{found[1]}{LAYERS}.{found[2]}.{theirs}.{found[3]}"
    return key


def _class_of(model_type: str, head: str) -> Any:
    import transformers

    heads = CLASSES[model_type]
    if head not in heads:
        raise ValueError(f"{model_type} has no head '{head}'{nearest(head, list(heads))}")
    return getattr(transformers, heads[head])
