# SPDX-License-Identifier: Apache-2.0
"""The factory's names and arguments, none of which is passed over, and models with a head on the disk."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

mx = pytest.importorskip("mlx.core", reason="needs MLX: pip install 'parity-harness[mlx]'")
import torch  # noqa: E402
import transformers  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from reference_models.mlx_bert import factory, weights, with_head  # noqa: E402
from reference_models.mlx_bert.config import BertConfig, ConfigError  # noqa: E402
from reference_models.mlx_bert.core import BertCore  # noqa: E402
from reference_models.mlx_bert.factory import (  # noqa: E402
    REGISTRY,
    TASKS,
    create_bert_core,
    create_bert_for_competition,
    create_bert_for_task,
    create_bert_with_head,
    create_competition_classifier,
    create_from_registry,
    create_kaggle_classifier,
    create_model,
    create_model_from_checkpoint,
    create_modular_bert,
    list_available_models,
    load_pretrained_weights,
)
from reference_models.mlx_bert.heads import HEAD_TYPES, default_head  # noqa: E402
from reference_models.mlx_bert.hub import NotFoundError  # noqa: E402
from reference_models.mlx_bert.quantisation import quantize  # noqa: E402
from reference_models.mlx_bert.weights import WeightsError  # noqa: E402
from reference_models.mlx_bert.with_head import BertWithHead  # noqa: E402
from tests.mlx_bert.oracle import relative, to_mlx, torch_model  # noqa: E402

pytestmark = [pytest.mark.mlx, pytest.mark.usefixtures("one_thread", "mlx_on_the_cpu")]

IDS = torch.tensor([[2, 3, 4, 5], [6, 7, 8, 9]])
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 16,
}
CONFIG = BertConfig(**SIZES)
NEW_HEAD = pytest.mark.filterwarnings("ignore:.*the model's is random until it is trained")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A body that transformers wrote, float32."""
    torch_model("bert").float().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def states_of(model: Any) -> dict[str, Any]:
    return dict(tree_flatten(model.parameters()))


def equal(one: Any, other: Any) -> bool:
    first, second = states_of(one), states_of(other)
    return set(first) == set(second) and all(
        first[name].dtype == second[name].dtype and bool(mx.array_equal(first[name], second[name])) for name in first
    )


def silently(call: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call()


# --- what is made


def test_a_core_by_name_has_the_weights_of_the_name(saved: Path) -> None:
    expected = BertCore.from_pretrained(saved)
    truth = torch_model("bert")(IDS).last_hidden_state.detach()
    calls: list[Callable[[], Any]] = [
        lambda: create_model("bert_core", model_name=str(saved)),
        lambda: create_model("bert_core", bert_name=str(saved)),
        lambda: create_model("bert_core", pretrained_path=saved),
        lambda: create_bert_core(model_name=str(saved)),
        lambda: create_modular_bert(model_name=str(saved)),
        lambda: create_from_registry("bert-core", model_name=str(saved)),
        lambda: create_model_from_checkpoint(saved),
        lambda: load_pretrained_weights(BertCore(CONFIG), saved),
    ]
    for call in calls:
        model = silently(call)
        assert type(model) is BertCore and equal(model, expected) and not model.training
        assert relative(model(to_mlx(IDS)).last_hidden_state, truth) <= 2e-6


def test_a_model_with_a_head_by_name_has_the_weights_of_the_name(saved: Path) -> None:
    expected = BertCore.from_pretrained(saved)
    binary: dict[str, Any] = {"head_type": "binary_classification"}
    calls: list[Callable[[], Any]] = [
        lambda: create_model(model_name=str(saved), **binary),
        lambda: create_model("bert_with_head", model_name=str(saved), **binary),
        lambda: create_model("bert_with_head", bert_name=str(saved), **binary),
        lambda: create_model("bert_with_head", pretrained_path=str(saved), **binary),
        lambda: create_model(model_name=str(saved), head_config=default_head(CONFIG, "binary_classification")),
        lambda: create_model(
            model_name=str(saved), head_config=default_head(CONFIG, "binary_classification").to_dict()
        ),
        lambda: create_bert_with_head("binary_classification", model_name=str(saved)),
        lambda: create_modular_bert("binary_classification", model_name=str(saved)),
        lambda: create_bert_for_task("binary", model_name=str(saved)),
        lambda: create_bert_for_competition("titanic", model_name=str(saved)),
        lambda: create_competition_classifier("binary_classification", model_name=str(saved)),
        lambda: create_kaggle_classifier(model_name=str(saved)),
        lambda: create_kaggle_classifier("binary", model_name=str(saved)),
        lambda: create_from_registry("bert-binary", model_name=str(saved)),
        lambda: create_from_registry("titanic-bert", model_name=str(saved)),
    ]
    for call in calls:
        with pytest.warns(
            UserWarning, match="has no head of a binary_classification of 1 outputs; the model's is random"
        ):
            model = call()
        assert type(model) is BertWithHead and equal(model.bert, expected) and not model.training
        assert model.head_config == default_head(CONFIG, "binary_classification")
        assert model(to_mlx(IDS))["logits"].shape == (2, 1)


def test_a_body_is_loaded_into_a_model_and_its_head_stays(saved: Path) -> None:
    model = create_model(config=CONFIG, head_type="regression")
    head = states_of(model.head)
    with pytest.warns(UserWarning, match="has no head of a regression"):
        assert load_pretrained_weights(model, saved) is model
    assert equal(model.bert, BertCore.from_pretrained(saved))
    assert all(mx.array_equal(value, head[name]) for name, value in states_of(model.head).items())
    with pytest.raises(WeightsError, match="shape"):
        load_pretrained_weights(BertCore(BertConfig(**(SIZES | {"hidden_size": 64}))), saved)
    with pytest.raises(TypeError, match="model is of type dict: expected a BertCore or a BertWithHead"):
        load_pretrained_weights({}, saved)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_every_entry_of_the_registry(name: str) -> None:
    assert name in list_available_models()
    needs = {"bert-multiclass", "bert-multilabel", "bert-ordinal", "bert-time-series", "bert-token-classification"}
    options = {"num_labels": 4} if name in needs else {}
    model = silently(lambda: create_from_registry(name, config=CONFIG, **options))
    assert isinstance(model, BertCore if name == "bert-core" else BertWithHead)
    if isinstance(model, BertWithHead):
        assert model.head_config.head_type == REGISTRY[name]["head_type"]
    model(to_mlx(IDS))


def test_the_registry_of_the_document_is_there() -> None:
    documented = {"bert-core", "bert-binary", "bert-multiclass", "bert-multilabel", "bert-regression", "titanic-bert"}
    assert documented <= set(list_available_models())


@pytest.mark.parametrize("task", sorted(TASKS))
def test_every_task(task: str) -> None:
    takes = TASKS[task] not in ("binary_classification", "regression", "masked_lm")
    model = silently(lambda: create_bert_for_task(task, config=CONFIG, **({"num_labels": 4} if takes else {})))
    assert model.head_config.head_type == TASKS[task]


@pytest.mark.parametrize("form", [CONFIG, CONFIG.to_hf_config(), CONFIG.to_dict()])
def test_a_configuration_alone_makes_a_new_model_of_the_seed(form: Any) -> None:
    def new() -> Any:
        mx.random.seed(3)
        return silently(lambda: create_model("bert_with_head", config=form, head_type="regression"))

    first = new()
    assert equal(first, new()) and first.config == CONFIG
    mx.random.seed(3)
    assert equal(create_model("bert_core", config=form), first.bert)
    assert {value.dtype for value in states_of(create_model("bert_core", config=form, dtype=mx.float16)).values()} == {
        mx.float16
    }


@NEW_HEAD
def test_what_is_asked_for_is_passed_on(saved: Path) -> None:
    model = create_model(model_name=str(saved), head_type="regression", dtype=mx.bfloat16, freeze_bert=True)
    assert {value.dtype for value in states_of(model).values()} == {mx.bfloat16}
    assert all(name.startswith("head.") for name, _ in tree_flatten(model.trainable_parameters()))
    model.unfreeze_all()
    assert any(name.startswith("bert.") for name, _ in tree_flatten(model.trainable_parameters()))
    assert not tree_flatten(create_model("bert_core", pretrained_path=saved, freeze_bert=True).trainable_parameters())
    with pytest.raises(ValueError, match="has no revision 'v1'"):
        create_model("bert_core", model_name=str(saved), revision="v1")
    with pytest.raises(NotFoundError, match="'org/model' is no path"):
        create_model("bert_core", pretrained_path="org/model")


# --- what is random only by name


def test_nothing_is_random_but_by_name(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    for options in ({"model_type": "bert_core"}, {"head_type": "regression"}):
        with pytest.raises(WeightsError, match=r"expected one of model\.safetensors"):
            create_model(model_name=str(saved), **options)
        with pytest.warns(UserWarning, match="no weights; all are random, as random_init=True asks for"):
            create_model(model_name=str(saved), random_init=True, **options)
    with pytest.raises(WeightsError):
        create_model_from_checkpoint(saved)
    (saved / "config.json").unlink()
    with pytest.raises(ConfigError, match="no such file"):
        create_model(model_name=str(saved), head_type="regression", random_init=True)


@NEW_HEAD
def test_a_tensor_of_the_body_that_lacks(saved: Path) -> None:
    path = str(saved / "model.safetensors")
    tensors = dict(mx.load(path))
    mx.eval(tensors)
    tensors.pop("encoder.layer.1.output.dense.bias")
    mx.save_safetensors(path, tensors)
    with pytest.raises(WeightsError, match=r"lacks encoder\.layer\.1\.output\.dense\.bias"):
        create_model(model_name=str(saved), head_type="regression")
    with pytest.warns(UserWarning, match=r"lacks encoder\.layer\.1\.output\.dense\.bias; random"):
        create_model(model_name=str(saved), head_type="regression", random_init=True)
    tensors["surplus.weight"] = mx.zeros((2, 2))
    mx.save_safetensors(path, tensors)
    with pytest.raises(WeightsError, match=r"surplus\.weight"):
        create_model(model_name=str(saved), head_type="regression", random_init=True)


@NEW_HEAD
@pytest.mark.parametrize("with_a_head", [False, True])
def test_a_pickle_is_read_once_and_warned_of_once(
    with_a_head: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = torch_model("bert").float()
    if with_a_head:
        theirs = transformers.BertForSequenceClassification(theirs.config)
    theirs.config.architectures = [type(theirs).__name__]
    theirs.config.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    load, reads = torch.load, []
    monkeypatch.setattr(torch, "load", lambda path, **options: reads.append(path) or load(path, **options))
    calls: list[Callable[[], Any]] = [
        lambda: create_model_from_checkpoint(tmp_path),
        lambda: create_model("bert_core", pretrained_path=tmp_path),
        lambda: create_model(pretrained_path=tmp_path, head_type="multiclass_classification", num_labels=2),
    ]
    made = []
    for call in calls:
        reads.clear()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            made.append(call())
        assert len(reads) == 1
        assert sum("is a pickle of torch's" in str(warning.message) for warning in said) == 1
    assert [type(model) is BertWithHead for model in made] == [with_a_head, False, True]


@pytest.mark.parametrize("lost", ["model.safetensors", "config.json"])
def test_a_checkpoint_in_parts_is_taken_only_by_name(lost: str, saved: Path) -> None:
    (saved / lost).unlink()
    with pytest.raises((WeightsError, ConfigError)):
        create_model_from_checkpoint(saved)
    if lost == "config.json":
        with pytest.warns(UserWarning, match="the default configuration is used"), pytest.raises(WeightsError):
            create_model_from_checkpoint(saved, default_config=True)
    else:
        with pytest.warns(UserWarning, match="no weights; all are random, as random_init=True asks for"):
            model = create_model_from_checkpoint(saved, random_init=True, freeze_bert=True, dtype=mx.float16)
        assert type(model) is BertCore and not tree_flatten(model.trainable_parameters())
        assert {value.dtype for value in states_of(model).values()} == {mx.float16}


# --- what is refused


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: create_model("bert_cor", config=CONFIG),
            ValueError,
            "'bert_cor' is unknown: did you mean 'bert_core'",
        ),
        (lambda: create_model("bert-core", config=CONFIG), ValueError, "create_from_registry takes this name"),
        (lambda: create_model("bert_core"), ValueError, "expected one of config, model_name and pretrained_path"),
        (
            lambda: create_model("bert_core", config=CONFIG, model_name="a/b"),
            ValueError,
            "config and model_name were given: expected one of",
        ),
        (
            lambda: create_model("bert_core", model_nam="a/b"),
            TypeError,
            "unknown argument 'model_nam': did you mean 'model_name'",
        ),
        (
            lambda: create_model(config=CONFIG, head_type="regression", hidden_size=3),
            TypeError,
            "unknown argument 'hidden_size'",
        ),
        (
            lambda: create_model("bert_core", config=CONFIG, head_type="regression"),
            TypeError,
            "a bert_core has no head, and head_type='regression' was given",
        ),
        (lambda: create_model("bert_core", config=CONFIG, num_labels=2), TypeError, "a bert_core has no head"),
        (
            lambda: create_model(None, config=CONFIG),
            ValueError,
            "model type None is unknown: expected one of bert_core",
        ),
        (
            lambda: create_model("bert_core", config=CONFIG, dtype="float16"),
            ValueError,
            "dtype is 'float16': expected mlx.core.float32",
        ),
        (
            lambda: create_model(config=CONFIG, head_type="regresion"),
            ConfigError,
            "head_type='regresion' is unknown: did you mean 'regression'",
        ),
        (lambda: create_model(config=CONFIG), ConfigError, "head_type is not given: expected one of binary"),
        (
            lambda: create_model(config=CONFIG, head_type="multiclass_classification"),
            ConfigError,
            "a multiclass_classification head needs num_labels",
        ),
        (
            lambda: create_model("bert_core", config=CONFIG, random_init=True),
            ValueError,
            "random_init=True was given, and a new model from a config loads nothing",
        ),
        (lambda: create_model("bert_core", config=CONFIG, revision="v1"), ValueError, "revision='v1' was given"),
        (
            lambda: create_model("bert_core", config=SIZES | {"hiden_size": 3}),
            ConfigError,
            "'hiden_size' is unknown: did you mean 'hidden_size'",
        ),
        (
            lambda: create_model(
                config=CONFIG, head_type="regression", head_config=default_head(CONFIG, "binary_classification")
            ),
            ConfigError,
            "head_type='regression' and the head_config of a binary_classification disagree",
        ),
        (
            lambda: create_model(config=CONFIG, num_labels=2, head_config=default_head(CONFIG, "regression")),
            ConfigError,
            "num_labels=2 and head_config.output_size=1 disagree",
        ),
        (lambda: create_from_registry("bert-binari"), ValueError, "not in the registry: did you mean 'bert-binary'"),
        (
            lambda: create_from_registry("bert-binary", config=CONFIG, head_type="regression"),
            TypeError,
            "head_type='regression' was given, which 'bert-binary' decides",
        ),
        (
            lambda: create_bert_for_task("regresion"),
            ValueError,
            "task 'regresion' is unknown: did you mean 'regression'",
        ),
        (lambda: create_kaggle_classifier("titanik"), ValueError, "did you mean 'titanic'"),
        (
            lambda: create_bert_for_task("ner", head_type="regression"),
            TypeError,
            "head_type='regression' was given beside the task 'ner'",
        ),
        (
            lambda: create_model_from_checkpoint("x", head_type="regression"),
            TypeError,
            "unknown argument 'head_type'",
        ),
        (lambda: create_model_from_checkpoint("./not/there"), NotFoundError, "'not/there' is no path that is there"),
        (
            lambda: create_model("bert_core", model_name="bert-base-uncased"),
            NotFoundError,
            "'bert-base-uncased' is no path that is there, and no Hub id",
        ),
    ],
)
def test_what_is_refused_and_in_which_words(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_every_argument_is_the_models_own(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the arguments for loading arrives at from_pretrained as it was given."""
    given: dict[str, Any] = {
        "revision": "v1",
        "cache_dir": saved,
        "token": "hf",
        "strict": False,
        "random_init": True,
        "default_config": True,
        "dtype": mx.float16,
    }
    calls = []
    for model in (BertCore, BertWithHead):
        monkeypatch.setattr(
            model, "from_pretrained", lambda source, **options: calls.append((source, options)) or BertCore(CONFIG)
        )
    create_model("bert_core", model_name="org/name", **given)
    create_model("bert_with_head", model_name="org/name@v2", head_type="regression", num_labels=3, **given)
    create_model("bert_with_head", pretrained_path="org/name", **given)
    head = {"head_type": "regression", "head_config": None, "num_labels": 3}
    nothing = dict.fromkeys(head)
    assert calls == [
        ("org/name", given),
        ("org/name@v2", given | head),
        (Path("org/name"), given | nothing),
    ]


def test_a_model_with_a_head_hands_on_what_it_is_given(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def resolve(id_or_path: Any, **options: Any) -> Path:
        calls.append((id_or_path, options))
        return saved

    monkeypatch.setattr(with_head.hub, "resolve", resolve)
    with pytest.warns(UserWarning, match="is random until it is trained"):
        model = BertWithHead.from_pretrained(
            "org/name", "v1", saved / "cache", "hf", head_type="regression", hidden_dropout_prob=0.4
        )
    assert calls == [("org/name", {"revision": "v1", "cache_dir": saved / "cache", "token": "hf"})]
    assert model.config.hidden_dropout_prob == 0.4
    with pytest.raises(TypeError, match="'hidden_dropout': did you mean 'hidden_dropout_prob'"):
        BertWithHead.from_pretrained("org/name", head_type="regression", hidden_dropout=0.4)


@NEW_HEAD
def test_what_is_left_over_is_passed_over_only_by_name(saved: Path) -> None:
    path = str(saved / "model.safetensors")
    tensors = dict(mx.load(path))
    mx.eval(tensors)
    mx.save_safetensors(path, tensors | {"surplus.weight": mx.zeros((2, 2))})
    with pytest.raises(WeightsError, match=r"surplus\.weight"):
        create_model(pretrained_path=saved, head_type="regression")
    with pytest.warns(UserWarning, match=r"surplus\.weight are not the model's and passed over, strict=False"):
        create_model(pretrained_path=saved, head_type="regression", strict=False)
    with pytest.warns(UserWarning, match=r"surplus\.weight are not"):
        load_pretrained_weights(create_model(config=CONFIG, head_type="regression"), saved, strict=False)


# --- on the disk


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "roberta"])
@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_a_model_with_its_head_comes_back_exactly(head_type: str, model_type: str, tmp_path: Path) -> None:
    config = BertConfig.from_hf_config(SIZES | {"model_type": model_type, "pad_token_id": 0})
    labels = {"binary_classification": None, "regression": None, "masked_lm": None}.get(head_type, 4)
    extra: dict[str, Any] = {"use_temperature": True} if head_type == "ordinal_regression" else {}
    extra |= {"use_uncertainty": True, "output_scale": 2.0} if head_type == "regression" else {}
    model = create_model(config=config, head_config=default_head(config, head_type, labels, **extra), dtype=mx.bfloat16)
    if head_type == "multilabel_classification":
        model.head.adaptive_thresholds = mx.array([0.1, 0.2, 0.3, 0.4], dtype=mx.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    for again in (
        silently(lambda: create_model_from_checkpoint(tmp_path / "saved")),
        silently(lambda: create_model("bert_with_head", model_name=str(tmp_path / "saved"))),
        silently(lambda: create_model("bert_with_head", pretrained_path=tmp_path / "saved", head_type=head_type)),
        silently(lambda: BertWithHead.from_pretrained(tmp_path / "saved")),
        silently(lambda: load_pretrained_weights(create_like(model), tmp_path / "saved")),
    ):
        assert equal(again, model) and not again.training and again.head_config == model.head_config
        assert mx.array_equal(again(to_mlx(IDS))["logits"], model(to_mlx(IDS))["logits"])
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["head_config"] == model.head_config.to_dict()
    # Saved over itself it is still the same, and the body alone is a BertCore, and transformers' own.
    again.save_pretrained(tmp_path / "saved")
    assert equal(create_model_from_checkpoint(tmp_path / "saved"), model)
    body = create_model("bert_core", pretrained_path=tmp_path / "saved") if "pooler" in model.bert else None
    assert body is None or equal(body, model.bert)
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "saved", dtype=torch.float64)
    truth = theirs.eval()(IDS).last_hidden_state.detach()
    assert relative(model(to_mlx(IDS))["bert_outputs"].last_hidden_state, truth) < 0.1


def create_like(model: BertWithHead) -> Any:
    mx.random.seed(99)
    return create_model(config=model.config, head_config=model.head_config, dtype=mx.float32)


def test_a_quantised_model_with_its_head_comes_back_exactly(tmp_path: Path) -> None:
    model = quantize(
        create_model(config=CONFIG, head_type="multiclass_classification", num_labels=3), bits=4, group_size=32
    )
    model.save_pretrained(tmp_path)
    again = silently(lambda: create_model_from_checkpoint(tmp_path))
    assert equal(again, model) and again.config.quantization == {"bits": 4, "group_size": 32}
    assert mx.array_equal(again(to_mlx(IDS))["logits"], model(to_mlx(IDS))["logits"])


def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_model(config=CONFIG, head_type="regression").save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write = weights._write_tensors

    def fail(file: Any, *arguments: Any) -> None:
        write(file, *arguments)
        raise OSError("no space left")

    monkeypatch.setattr(weights, "_write_tensors", fail)
    with pytest.raises(OSError, match="no space left"):
        create_model(config=CONFIG, head_type="binary_classification").save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_head_is_not_loaded_into_a_model(tmp_path: Path) -> None:
    create_model(config=CONFIG, head_type="multiclass_classification", num_labels=3).save_pretrained(tmp_path)
    model = create_model(config=CONFIG, head_type="regression")
    before = states_of(model)
    with pytest.raises(
        WeightsError, match="has the head of a multiclass_classification of 3 outputs, expected that of a"
    ):
        load_pretrained_weights(model, tmp_path)
    assert all(mx.array_equal(value, before[name]) for name, value in states_of(model).items())
    with pytest.raises(WeightsError, match="its head has 3 outputs, expected 4"):
        create_model(pretrained_path=tmp_path, num_labels=4)
    with pytest.warns(UserWarning, match="has no head of a multilabel_classification of 3 outputs"):
        create_model(pretrained_path=tmp_path, head_type="multilabel_classification", num_labels=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_config": {"head_type": "regression"}}, r"config\.json: head_config: head config lacks 'input_size'"),
        ({"head_config": []}, "a head's configuration is a mapping"),
        ({"head_config": {"head_type": "regression", "input_size": 32, "droput": 1}}, "'droput' is unknown"),
    ],
)
def test_a_head_config_that_is_damaged(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    create_model(config=CONFIG, head_type="regression").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=message):
        create_model_from_checkpoint(tmp_path)


def test_a_file_for_another_head_config_is_refused(tmp_path: Path) -> None:
    create_model(config=CONFIG, head_type="regression").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    values["head_config"]["hidden_sizes"] = [16, 9]
    path.write_text(json.dumps(values))
    with pytest.raises(WeightsError, match=r"head\.classifier\.weight has shape \(1, 8\), expected \(1, 9\)"):
        create_model_from_checkpoint(tmp_path)
    values["head_config"]["hidden_sizes"] = [16, 8, 4]
    path.write_text(json.dumps(values))
    with pytest.raises(WeightsError, match="shape"):
        create_model_from_checkpoint(tmp_path)


def test_transformers_names_its_class_only_where_it_computes_the_same(tmp_path: Path) -> None:
    from reference_models.mlx_bert.task_heads import task_head

    create_model(config=CONFIG, head_type="regression").save_pretrained(tmp_path / "own")
    assert json.loads((tmp_path / "own" / "config.json").read_text())["architectures"] == ["BertModel"]
    same = create_model(config=CONFIG, head_config=task_head(CONFIG, "multiclass_classification", 3))
    same.save_pretrained(tmp_path / "theirs")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "theirs").double().eval()
    assert type(theirs) is transformers.BertForSequenceClassification and theirs.config.num_labels == 3
    assert relative(same(to_mlx(IDS))["logits"], theirs(IDS).logits.detach()) < 2e-6
    # A class without a pooler finds none.
    token = create_model(config=CONFIG, head_config=task_head(CONFIG, "token_classification", 3))
    token.save_pretrained(tmp_path / "token")
    _, said = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "token", output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"]


def test_nothing_of_the_factory_is_without_a_test() -> None:
    public = {name for name in vars(factory) if name.startswith(("create_", "load_", "list_"))}
    assert public <= set(globals())


def test_no_module_imports_what_is_private_in_another() -> None:
    directory = Path(factory.__file__).parent
    for path in sorted(directory.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            private = {name for name in names if name.startswith("_")} - {"_is_hub_model_id"}  # the document's own name
            assert not private, f"{path.name} imports {private}"
