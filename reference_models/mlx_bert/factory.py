# SPDX-License-Identifier: Apache-2.0
"""Makes a BERT on MLX, with a head or without, from names: of a model, of a task, of an entry of the registry."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from . import config as configs
from . import heads, hub, weights, with_head
from .config import BertConfig
from .core import BertCore, check_dtype, checkpoint_of, config_of, load
from .heads import HeadConfig, nearest
from .with_head import BertWithHead

MODEL_TYPES = ("bert_core", "bert_with_head")

# Name in the registry -> what `create_model` is given for it. What a caller gives beside it has to agree or be more.
REGISTRY: Mapping[str, Mapping[str, Any]] = {
    "bert-core": {"model_type": "bert_core"},
    "bert-binary": {"head_type": "binary_classification"},
    "bert-multiclass": {"head_type": "multiclass_classification"},
    "bert-multilabel": {"head_type": "multilabel_classification"},
    "bert-regression": {"head_type": "regression"},
    "bert-ordinal": {"head_type": "ordinal_regression"},
    "bert-time-series": {"head_type": "time_series"},
    "bert-token-classification": {"head_type": "token_classification"},
    "bert-masked-lm": {"head_type": "masked_lm"},
    "titanic-bert": {"head_type": "binary_classification"},
}
# Name of a task or competition -> type of head; the types themselves are names too.
TASKS: Mapping[str, str] = {
    **{head_type: head_type for head_type in heads.HEAD_TYPES},
    **heads.ALIASES,
    "binary": "binary_classification",
    "classification": "multiclass_classification",
    "fill_mask": "masked_lm",
    "mlm": "masked_lm",
    "multiclass": "multiclass_classification",
    "multilabel": "multilabel_classification",
    "ner": "token_classification",
    "ordinal": "ordinal_regression",
    "titanic": "binary_classification",
    "token": "token_classification",
}
_OF_A_HEAD = ("head_type", "head_config", "num_labels")
_OF_LOADING = ("revision", "cache_dir", "token", "strict", "random_init", "default_config")


def create_model(
    model_type: str = "bert_with_head",
    *,
    config: BertConfig | Mapping[str, Any] | None = None,
    model_name: str | None = None,
    bert_name: str | None = None,
    pretrained_path: str | Path | None = None,
    head_type: str | None = None,
    head_config: HeadConfig | Mapping[str, Any] | None = None,
    num_labels: int | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    strict: bool = True,
    freeze_bert: bool = False,
    random_init: bool = False,
    default_config: bool = False,
    dtype: mx.Dtype | None = None,
    **unknown: Any,
) -> BertCore | BertWithHead:
    """A model in evaluation mode: loaded, from one of the three places, or new, from a configuration.

    Args:
        model_type: "bert_core" or "bert_with_head".
        config: of a new model, whose weights are random without a warning: nothing was to be loaded. A dictionary is
            read as `BertConfig.from_dict` reads it.
        model_name: a path, or a model of the Hub as `org/name` or `org/name@revision`. `bert_name` is the same.
        pretrained_path: a path, and never the Hub.
        head_type, head_config, num_labels: see `BertWithHead.from_pretrained`. A new model has the head of
            `heads.default_head`, where none is given.
        freeze_bert: whether the body is frozen.
        revision, cache_dir, token, strict, random_init, default_config: see `BertCore.from_pretrained`.
        dtype: of the parameters; float32 for a new model without it.

    Raises:
        ValueError: another model type; no place, or more than one; something for loading where nothing is loaded; a
            dtype that no model computes in.
        TypeError: an unknown argument, with the nearest that there is; one for a head, where there is none.
        ConfigError, HubError, WeightsError: as `from_pretrained` of the model raises them.
    """
    _refuse_unknown(unknown)
    if model_type not in MODEL_TYPES:
        more = (
            "; create_from_registry takes this name"
            if model_type in REGISTRY
            else nearest(str(model_type), MODEL_TYPES)
        )
        raise ValueError(f"model type {model_type!r} is unknown{more}")
    head: dict[str, Any] = {"head_type": head_type, "head_config": head_config, "num_labels": num_labels}
    loading: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "token": token, "strict": strict}
    loading |= {"random_init": random_init, "default_config": default_config}
    places = {"config": config, "model_name": model_name, "bert_name": bert_name, "pretrained_path": pretrained_path}
    place = _only_one({name: value for name, value in places.items() if value is not None})
    if model_type == "bert_core":
        for name, value in head.items():
            if value is not None:
                raise TypeError(f"a bert_core has no head, and {name}={value!r} was given: expected 'bert_with_head'")
    model: BertCore | BertWithHead
    if config is not None:
        _refuse_loading(loading)
        config = config if isinstance(config, BertConfig) else BertConfig.from_dict(config)
        check_dtype(dtype, config)
        model = _new(config, model_type, head)
        if dtype is not None:
            model.set_dtype(dtype)
    else:
        source = Path(place) if pretrained_path is not None else place
        if model_type == "bert_core":
            model = BertCore.from_pretrained(source, **loading, dtype=dtype)
        else:
            model = BertWithHead.from_pretrained(source, **loading, **head, dtype=dtype)
    if freeze_bert:
        _body(model).freeze()
    return model


def create_bert_core(config: BertConfig | Mapping[str, Any] | None = None, **options: Any) -> BertCore:
    """`create_model("bert_core", ...)`."""
    model = create_model("bert_core", config=config, **options)
    assert isinstance(model, BertCore)
    return model


def create_bert_with_head(head_type: str | None = None, **options: Any) -> BertWithHead:
    """`create_model("bert_with_head", ...)`."""
    model = create_model("bert_with_head", head_type=head_type, **options)
    assert isinstance(model, BertWithHead)
    return model


def create_modular_bert(head_type: str | None = None, **options: Any) -> BertCore | BertWithHead:
    """A model with a head where one is named, by `head_type` or `head_config`, and else without."""
    named = head_type is not None or options.get("head_config") is not None
    return create_bert_with_head(head_type, **options) if named else create_bert_core(**options)


def create_bert_for_task(task: str, **options: Any) -> BertWithHead:
    """A model with the head of a task, one of `TASKS`; the rest is `create_model`'s.

    Raises:
        ValueError: there is no such task; it says which is nearest.
        TypeError: head_type is given too.
    """
    if task not in TASKS:
        raise ValueError(f"task {task!r} is unknown{nearest(str(task), TASKS)}")
    if "head_type" in options:
        raise TypeError(f"head_type={options['head_type']!r} was given beside the task {task!r}: expected one of them")
    return create_bert_with_head(TASKS[task], **options)


def create_bert_for_competition(competition: str, **options: Any) -> BertWithHead:
    """The same as `create_bert_for_task`, for a competition's name or kind."""
    return create_bert_for_task(competition, **options)


def create_kaggle_classifier(task: str = "binary", **options: Any) -> BertWithHead:
    """The same as `create_bert_for_task`."""
    return create_bert_for_task(task, **options)


def create_competition_classifier(competition: str, **options: Any) -> BertWithHead:
    """The same as `create_bert_for_task`."""
    return create_bert_for_task(competition, **options)


def create_from_registry(name: str, **options: Any) -> BertCore | BertWithHead:
    """The model of an entry of `REGISTRY`; the rest is `create_model`'s.

    Raises:
        ValueError: there is no such entry; it says which is nearest.
        TypeError: an option that the entry decides.
    """
    if name not in REGISTRY:
        raise ValueError(f"{name!r} is not in the registry{nearest(str(name), REGISTRY)}")
    entry = REGISTRY[name]
    for option in entry:
        if option in options:
            raise TypeError(f"{option}={options[option]!r} was given, which {name!r} decides: leave it out")
    return create_model(**{**entry, **options})


def list_available_models() -> list[str]:
    """The names that `create_from_registry` takes, in the order of the alphabet."""
    return sorted(REGISTRY)


def create_model_from_checkpoint(path: str | Path, **options: Any) -> BertCore | BertWithHead:
    """The model of a directory as it was saved: with its head where it has one that is here, and else without.

    options: those of `create_model` for loading, and `dtype` and `freeze_bert`.

    Raises:
        NotFoundError: there is no such path.
        ConfigError, WeightsError: as `from_pretrained` raises them.
        TypeError: an unknown option.
    """
    known = (*_OF_LOADING, "dtype", "freeze_bert")
    for name in options:
        if name not in known:
            raise TypeError(f"unknown argument {name!r}{nearest(name, known)}")
    given = {name: inspect.signature(create_model).parameters[name].default for name in known} | options
    directory = hub.resolve(Path(path), revision=given["revision"], cache_dir=given["cache_dir"], token=given["token"])
    config = config_of(directory, default_config=given["default_config"])
    checkpoint = checkpoint_of(directory, config, random_init=given["random_init"])
    made: type[BertCore] | type[BertWithHead] = BertWithHead if with_head.has_head(checkpoint, config) else BertCore
    model = made.from_checkpoint(
        config, checkpoint, strict=given["strict"], random_init=given["random_init"], dtype=given["dtype"]
    )
    if given["freeze_bert"]:
        _body(model).freeze()
    return model


def load_pretrained_weights(
    model: BertCore | BertWithHead, path: str | Path, *, strict: bool = True
) -> BertCore | BertWithHead:
    """Puts the weights of a directory into a model, all or none of the body's, and returns it.

    A head stays as it is, with a warning, where the directory has none.

    Raises:
        WeightsError, ConfigError: as `from_pretrained` raises them; a tensor of another shape than the model's too.
        TypeError: another model.
    """
    if isinstance(model, BertWithHead):
        model.load_pretrained(path, strict=strict)
        return model
    if not isinstance(model, BertCore):
        raise TypeError(f"model is of type {type(model).__name__}: expected a BertCore or a BertWithHead")
    load(model, weights.read_checkpoint(Path(path), model.config), strict=strict, random_init=False)
    mx.eval(model.parameters())
    return model


def _new(config: BertConfig, model_type: str, head: Mapping[str, Any]) -> BertCore | BertWithHead:
    if model_type == "bert_core":
        return BertCore(config)
    given, head_type, num_labels = head["head_config"], head["head_type"], head["num_labels"]
    if given is not None:
        return with_head.create(config, with_head.agreed(with_head.as_head_config(given), head_type, num_labels))
    if head_type is None:
        raise configs.ConfigError(f"head_type is not given: expected one of {', '.join(heads.HEAD_TYPES)}")
    return with_head.create(config, heads.default_head(config, head_type, num_labels))


def _body(model: BertCore | BertWithHead) -> BertCore:
    return model.bert if isinstance(model, BertWithHead) else model


def _only_one(places: Mapping[str, Any]) -> Any:
    expected = "expected one of config, model_name and pretrained_path"
    if not places:
        raise ValueError(f"neither a configuration nor a name or path of a model was given: {expected}")
    if len(places) > 1:
        raise ValueError(f"{' and '.join(places)} were given: {expected}")
    return next(iter(places.values()))


def _refuse_loading(loading: Mapping[str, Any]) -> None:
    """Refuses what has a use only where something is loaded."""
    without = inspect.signature(create_model).parameters
    for name, value in loading.items():
        if value != without[name].default:
            raise ValueError(f"{name}={value!r} was given, and a new model from a config loads nothing: leave it out")


def _refuse_unknown(unknown: Mapping[str, Any]) -> None:
    known = [name for name in inspect.signature(create_model).parameters if name != "unknown"]
    for name in unknown:
        raise TypeError(f"create_model got an unknown argument {name!r}{nearest(name, known)}")
