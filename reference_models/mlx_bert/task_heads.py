# SPDX-License-Identifier: Apache-2.0
"""Which of our heads is the one of a transformers task model, and what its tensors are called there."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from .config import BertConfig
from .heads import HeadConfig

SEQUENCE, TOKEN, MASKED_LM = "sequence", "token", "masked_lm"

# How the name of a transformers class ends -> the kind of its head. Other tasks have no head here.
_ENDINGS = {
    "ForSequenceClassification": SEQUENCE,
    "ForTokenClassification": TOKEN,
    "ForMaskedLM": MASKED_LM,
    "ForPreTraining": MASKED_LM,
}
_CLASS_ENDINGS = {
    SEQUENCE: "ForSequenceClassification",
    TOKEN: "ForTokenClassification",
    MASKED_LM: "ForMaskedLM",
}
_CLASS_STEMS = {"bert": "Bert", "distilbert": "DistilBert", "roberta": "Roberta"}
# Type of head -> the kind of transformers task head that is one.
KINDS: Mapping[str, str] = {
    "binary_classification": SEQUENCE,
    "multiclass_classification": SEQUENCE,
    "multilabel_classification": SEQUENCE,
    "regression": SEQUENCE,
    "token_classification": TOKEN,
    "masked_lm": MASKED_LM,
}
# Type of head -> transformers' problem_type; it has no word for one logit of yes and no.
_PROBLEM_TYPES = {
    "multiclass_classification": "single_label_classification",
    "multilabel_classification": "multi_label_classification",
    "regression": "regression",
}
# model_type and kind -> module or parameter of our head -> its name in transformers' file.
_NAMES: Mapping[tuple[str, str], Mapping[str, str]] = {
    ("bert", SEQUENCE): {"classifier": "classifier"},
    ("bert", TOKEN): {"classifier": "classifier"},
    ("bert", MASKED_LM): {
        "transform.dense": "cls.predictions.transform.dense",
        "transform.LayerNorm": "cls.predictions.transform.LayerNorm",
        "bias": "cls.predictions.bias",
        "decoder": "cls.predictions.decoder",
    },
    ("distilbert", SEQUENCE): {"projection.0.dense": "pre_classifier", "classifier": "classifier"},
    ("distilbert", TOKEN): {"classifier": "classifier"},
    ("distilbert", MASKED_LM): {
        "transform.dense": "vocab_transform",
        "transform.LayerNorm": "vocab_layer_norm",
        "bias": "vocab_projector.bias",
        "decoder": "vocab_projector",
    },
    ("roberta", SEQUENCE): {"projection.0.dense": "classifier.dense", "classifier": "classifier.out_proj"},
    ("roberta", TOKEN): {"classifier": "classifier"},
    ("roberta", MASKED_LM): {
        "transform.dense": "lm_head.dense",
        "transform.LayerNorm": "lm_head.layer_norm",
        "bias": "lm_head.bias",
        "decoder": "lm_head.decoder",
    },
}
# TensorFlow's words for the tensors of a LayerNorm.
_OLD_TAILS = {"gamma": "weight", "beta": "bias"}


def kind_of(config: BertConfig, keys: Collection[str], *, has_pooler: bool) -> str | None:
    """The kind of head that a file's head tensors are, by the class that config.json names, else by their names.

    None where they are of a task that has no head here, and where there are none.
    """
    named = config.extra.get("architectures")
    architecture = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    if not keys:
        return None
    for ending, kind in _ENDINGS.items():
        if architecture.endswith(ending):
            return kind
    if "For" in architecture:
        return None
    names = _NAMES[config.model_type, MASKED_LM]
    if f"{names['transform.dense']}.weight" in keys:
        return MASKED_LM
    sequence = _NAMES[config.model_type, SEQUENCE]
    if all(f"{name}.weight" in keys for name in sequence.values()):
        # BERT's two have the same names, and only the one of texts has a pooler.
        return SEQUENCE if config.model_type != "bert" or has_pooler else TOKEN
    return TOKEN if "classifier.weight" in keys else None


def head_type_for(config: BertConfig, kind: str, labels: int) -> str:
    """The type of head that transformers takes a task model's for: by problem_type, else by the number of labels."""
    if kind != SEQUENCE:
        return {TOKEN: "token_classification", MASKED_LM: "masked_lm"}[kind]
    problems = {problem: name for name, problem in _PROBLEM_TYPES.items()}
    found = problems.get(str(config.extra.get("problem_type")))
    return found or ("regression" if labels == 1 else "multiclass_classification")


def labels_key(config: BertConfig, kind: str) -> str | None:
    """The tensor of a file whose first axis is the labels; None for a masked language model."""
    return None if kind == MASKED_LM else f"{_NAMES[config.model_type, kind]['classifier']}.weight"


def task_head(config: BertConfig, head_type: str, num_labels: int = 1, **values: Any) -> HeadConfig:
    """The head of transformers' own task model: for BERT dropout and a dense layer on the pooler output.

    RoBERTa's and DistilBERT's have a dense layer more, on the first token's hidden state.

    Args:
        num_labels: outputs; the vocabulary for a masked language model whatever is said.
        values: fields of `HeadConfig` beside those that make the head what it is.

    Raises:
        ConfigError: as `HeadConfig`.
        ValueError: transformers has no such head.
    """
    if head_type not in KINDS:
        raise ValueError(f"transformers has no {head_type} head: expected one of {', '.join(KINDS)}")
    kind, width = KINDS[head_type], config.hidden_size
    dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
    if kind == TOKEN and config.model_type == "distilbert":
        dropout = config.hidden_dropout_prob
    fields: dict[str, Any] = {"input_size": width, "output_size": num_labels, "input_dropout": dropout, "dropout": 0.0}
    if kind == MASKED_LM:
        act = "gelu" if config.model_type == "roberta" else config.hidden_act
        fields |= {"output_size": config.vocab_size, "input_dropout": 0.0, "activation": act}
        fields |= {"layer_norm_eps": config.layer_norm_eps}
        fields |= {"tie_word_embeddings": config.extra.get("tie_word_embeddings") is not False}
    elif kind == SEQUENCE and config.model_type == "bert":
        fields |= {"pooling": "pooler", "input_size": config.pooler_hidden_size or width}
    elif kind == SEQUENCE:
        fields |= {"hidden_sizes": (width,), "use_layer_norm": False, "dropout": dropout}
        if config.model_type == "distilbert":
            fields |= {"input_dropout": 0.0, "activation": "relu"}
        else:
            fields |= {"activation": "tanh"}
    fields |= {"initializer_range": config.initializer_range}
    return HeadConfig(head_type=head_type, **(fields | values))


def task_kind(config: BertConfig, head: HeadConfig) -> str | None:
    """The kind of transformers' task model that computes what a model with this head does; None where none does.

    Dropout, the start of the weights and the loss make no other model.
    """
    if head.head_type not in KINDS:
        return None
    theirs = task_head(config, head.head_type, head.output_size)
    has_layers = bool(head.hidden_sizes) or head.head_type == "masked_lm"
    free = ["input_dropout", "dropout", "initializer_range", "focal_gamma"]
    # Without layers their activation and norm are nothing's.
    free += [] if has_layers else ["activation", "use_layer_norm"]
    free += [] if has_layers and head.use_layer_norm else ["layer_norm_eps"]
    same = replace(head, **{name: getattr(theirs, name) for name in free}) == theirs
    return KINDS[head.head_type] if same else None


def our_key(config: BertConfig, kind: str | None, key: str) -> str | None:
    """The parameter of our head that a tensor of a file is; None where it is none.

    Where there is no kind, and for what transformers has no name for, it is what follows `head.`.
    """
    if key.startswith("head."):
        return key.removeprefix("head.")
    path, _, tail = key.rpartition(".")
    for ours, theirs in _NAMES.get((config.model_type, kind or ""), {}).items():
        if key == theirs:
            return ours
        if path == theirs:
            return f"{ours}.{_OLD_TAILS.get(tail, tail) if ours.endswith('LayerNorm') else tail}"
    return None


def their_key(config: BertConfig, kind: str | None, name: str) -> str:
    """The name in a file of a parameter of our head, as `our_key` reads it."""
    path, _, tail = name.rpartition(".")
    names = _NAMES.get((config.model_type, kind or ""), {})
    if name in names:
        return names[name]
    return f"{names[path]}.{tail}" if path in names else f"head.{name}"


def config_entries(config: BertConfig, head: HeadConfig) -> dict[str, Any]:
    """What the config.json of a model with this head has beside the body's: `head_config`, and what transformers reads.

    transformers' class is named only where it computes the same.
    """
    kind = task_kind(config, head)
    stem = _CLASS_STEMS[config.model_type]
    entries: dict[str, Any] = {"architectures": [f"{stem}{_CLASS_ENDINGS[kind]}" if kind else f"{stem}Model"]}
    if kind in (SEQUENCE, TOKEN):
        labels = config.extra.get("id2label")
        if not isinstance(labels, Mapping) or len(labels) != head.output_size:
            entries["id2label"] = {str(label): f"LABEL_{label}" for label in range(head.output_size)}
            entries["label2id"] = {f"LABEL_{label}": label for label in range(head.output_size)}
    if kind == SEQUENCE:
        entries["problem_type"] = _PROBLEM_TYPES.get(head.head_type)
    return entries | {"head_config": head.to_dict()}
