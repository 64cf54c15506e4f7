# SPDX-License-Identifier: Apache-2.0
"""transformers' own task models, loaded with their heads: logits, losses and gradients, and the way back."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

mx = pytest.importorskip("mlx.core", reason="needs MLX: pip install 'parity-harness[mlx]'")
import mlx.nn as nn  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from harness.cases.weights import sensitising_state  # noqa: E402
from reference_models.mlx_bert import with_head  # noqa: E402
from reference_models.mlx_bert.checkpoint import write_hf_directory  # noqa: E402
from reference_models.mlx_bert.config import ConfigError  # noqa: E402
from reference_models.mlx_bert.core import BertCore  # noqa: E402
from reference_models.mlx_bert.heads import default_head  # noqa: E402
from reference_models.mlx_bert.quantisation import quantize  # noqa: E402
from reference_models.mlx_bert.task_heads import our_key, task_head  # noqa: E402
from reference_models.mlx_bert.weights import WeightsError  # noqa: E402
from reference_models.mlx_bert.with_head import BertWithHead  # noqa: E402
from tests.mlx_bert.oracle import MODEL_TYPES, core_name, relative, to_mlx, to_torch, torch_model  # noqa: E402

pytestmark = [pytest.mark.mlx, pytest.mark.usefixtures("one_thread", "mlx_on_the_cpu")]
TYPES = pytest.mark.parametrize("model_type", MODEL_TYPES)
STEMS = {"bert": "Bert", "distilbert": "DistilBert", "roberta": "Roberta"}
ENDINGS = {"sequence": "ForSequenceClassification", "token": "ForTokenClassification", "masked_lm": "ForMaskedLM"}
HEAD_TYPES = {
    "sequence": "multiclass_classification",
    "token": "token_classification",
    "masked_lm": "masked_lm",
}
KINDS = pytest.mark.parametrize("kind", ENDINGS)
FLOAT32 = 2e-6
IDS = torch.tensor([[2, 3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 1, 1, 1], [20, 21, 22, 23, 24, 1, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]])
LABELS = {
    "sequence": torch.tensor([2, 0, 1]),
    "token": torch.tensor([[0, 1, 2, -100, 2, 1, 0], [2, 2, 2, 2, -100, -100, -100], [1, 1, 0, 0, 0, -100, -100]]),
    "masked_lm": torch.where(IDS % 3 == 0, IDS + 30, -100),
}


def task_model(model_type: str, kind: str, **fields: Any) -> Any:
    """A task model of transformers in float64 and evaluation mode, with weights that show and eager attention."""
    config = torch_model(model_type).config
    config.update({"num_labels": 3} | fields)
    config.architectures = None
    model = getattr(transformers, STEMS[model_type] + ENDINGS[kind])(config).double().eval()
    model.load_state_dict(sensitising_state(model, gains={}, seed=7))
    model.tie_weights()
    return model


def save(model: Any, directory: Path) -> Path:
    """What transformers writes; the weights are exact in float32."""
    model.float().save_pretrained(directory)
    model.double()
    return directory


def loaded(directory: Path, **options: Any) -> BertWithHead:
    """The model, and no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return BertWithHead.from_pretrained(directory, **options)


def states_of(model: Any) -> dict[str, Any]:
    return dict(tree_flatten(model.parameters()))


def ours_of(model: BertWithHead, kind: str, name: str) -> str:
    """The parameter of ours that a parameter of a task model is."""
    prefix = f"{model.config.model_type}."
    if name.startswith(prefix):
        return f"bert.{core_name(name.removeprefix(prefix))}"
    return f"head.{our_key(model.config, kind, name)}"


def equal(one: Any, other: Any) -> bool:
    first, second = states_of(one), states_of(other)
    return set(first) == set(second) and all(
        first[name].dtype == second[name].dtype and bool(mx.array_equal(first[name], second[name])) for name in first
    )


@TYPES
@KINDS
def test_logits_and_loss_are_those_of_transformers(model_type: str, kind: str, tmp_path: Path) -> None:
    theirs = task_model(model_type, kind)
    ours = loaded(save(theirs, tmp_path))
    assert ours.head_config.head_type == HEAD_TYPES[kind] and not ours.training
    with torch.no_grad():
        truth = theirs(IDS, attention_mask=MASK, labels=LABELS[kind])
    found = ours(to_mlx(IDS), to_mlx(MASK), labels=to_mlx(LABELS[kind]))
    assert relative(found["logits"], truth.logits) <= FLOAT32
    assert abs(found["loss"].item() / truth.loss.item() - 1) <= FLOAT32
    assert (to_torch(found["predictions"]).long() == truth.logits.argmax(-1)).all()
    assert relative(found["probabilities"], truth.logits.softmax(-1)) <= FLOAT32
    # The tuple is the loss and the logits.
    loss, logits = ours(to_mlx(IDS), to_mlx(MASK), labels=to_mlx(LABELS[kind]), return_dict=False)
    assert loss.item() == found["loss"].item() and mx.array_equal(logits, found["logits"])


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_the_norm_of_a_masked_language_model_has_the_models_epsilon(model_type: str, tmp_path: Path) -> None:
    theirs = task_model(model_type, "masked_lm", layer_norm_eps=0.5)
    truth = theirs(IDS, attention_mask=MASK).logits.detach()
    ours = loaded(save(theirs, tmp_path))
    assert relative(ours(to_mlx(IDS), to_mlx(MASK))["logits"], truth) <= FLOAT32
    assert default_head(ours.config, "masked_lm").layer_norm_eps == 0.5


@TYPES
@KINDS
def test_in_float64_only_erf_is_short_of_it(model_type: str, kind: str, tmp_path: Path) -> None:
    # RoBERTa's masked language model has GELU in its code.
    bound = FLOAT32 if (model_type, kind) == ("roberta", "masked_lm") else 1e-13
    name = "activation" if model_type == "distilbert" else "hidden_act"
    theirs = task_model(model_type, kind, **{name: "gelu_new"})
    ours = loaded(save(theirs, tmp_path), dtype=mx.float64)
    with torch.no_grad():
        truth = theirs(IDS, attention_mask=MASK, labels=LABELS[kind])
    found = ours(to_mlx(IDS), to_mlx(MASK), labels=to_mlx(LABELS[kind]))
    assert found["logits"].dtype == mx.float64 and found["loss"].dtype == mx.float64
    assert relative(found["logits"], truth.logits) <= bound
    assert abs(found["loss"].item() / truth.loss.item() - 1) <= bound


@TYPES
@KINDS
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_are_those_of_torch(model_type: str, kind: str, dtype: str, tmp_path: Path) -> None:
    name = "activation" if model_type == "distilbert" else "hidden_act"
    theirs = task_model(model_type, kind, **{name: "gelu_new"})
    ours = loaded(save(theirs, tmp_path), dtype=getattr(mx, dtype))
    theirs(IDS, attention_mask=MASK, labels=LABELS[kind]).loss.backward()

    def loss_of(model: BertWithHead) -> Any:
        return model(to_mlx(IDS), to_mlx(MASK), labels=to_mlx(LABELS[kind]))["loss"]

    loss, gradients = nn.value_and_grad(ours, loss_of)(ours)
    assert mx.isfinite(loss)
    found = dict(tree_flatten(gradients))
    erf = (model_type, kind) == ("roberta", "masked_lm")
    bound = 1e-5 if dtype == "float32" else 2e-6 if erf else 1e-11
    parameters = {ours_of(ours, kind, name): value for name, value in theirs.named_parameters()}
    assert set(found) == set(parameters)
    largest = max(float(value.grad.abs().max()) for value in parameters.values())
    for name, value in parameters.items():
        # A key's bias has no gradient but rounding's.
        scale = max(float(value.grad.abs().max()), 1e-2 * largest)
        assert float((to_torch(found[name]) - value.grad).abs().max()) <= bound * scale, name


@pytest.mark.parametrize(
    ("problem", "labels", "head_type"),
    [
        ("regression", 1, "regression"),
        (None, 1, "regression"),
        ("regression", 3, "regression"),
        ("multi_label_classification", 3, "multilabel_classification"),
        ("single_label_classification", 3, "multiclass_classification"),
        (None, 2, "multiclass_classification"),
    ],
)
@TYPES
def test_the_type_of_a_classifier_is_transformers_own(
    model_type: str, problem: str | None, labels: int, head_type: str, tmp_path: Path
) -> None:
    theirs = task_model(model_type, "sequence", problem_type=problem, num_labels=labels)
    ours = loaded(save(theirs, tmp_path))
    assert (ours.head_config.head_type, ours.head_config.output_size) == (head_type, labels)
    generator = torch.Generator().manual_seed(3)
    truths = {
        "regression": torch.randn(3, labels, generator=generator, dtype=torch.float64),
        "multilabel_classification": torch.randint(2, (3, labels), generator=generator).double(),
        "multiclass_classification": torch.tensor([1, 0, 1]),
    }
    target = truths[head_type]
    with torch.no_grad():
        truth = theirs(IDS, attention_mask=MASK, labels=target.squeeze(-1) if labels == 1 else target)
    found = ours(to_mlx(IDS), to_mlx(MASK), labels=to_mlx(target.float() if target.is_floating_point() else target))
    assert relative(found["logits"], truth.logits) <= FLOAT32
    assert abs(found["loss"].item() / truth.loss.item() - 1) <= FLOAT32
    # And the way back.
    ours.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    assert again.config.problem_type == (problem or {1: "regression", 2: "single_label_classification"}[labels])
    assert all((again.state_dict()[name] == value.float()).all() for name, value in theirs.state_dict().items())


@TYPES
@KINDS
def test_what_is_saved_comes_back_here_and_in_transformers(model_type: str, kind: str, tmp_path: Path) -> None:
    theirs = task_model(model_type, kind)
    ours = loaded(save(theirs, tmp_path / "theirs"))
    ours.save_pretrained(tmp_path / "ours")
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == ["config.json", "model.safetensors"]
    assert equal(loaded(tmp_path / "ours"), ours)
    assert loaded(tmp_path / "ours").head_config == ours.head_config
    again, said = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"]
    assert all((again.state_dict()[name] == value.float()).all() for name, value in theirs.state_dict().items())
    # The body of it alone is a BertCore as ever.
    body = BertCore.from_pretrained(tmp_path / "ours", add_pooling_layer="pooler" in ours.bert)
    assert equal(body, ours.bert)


@TYPES
@KINDS
@pytest.mark.parametrize("layout", ["bin", "sharded"])
def test_other_layouts_have_the_same_head(model_type: str, kind: str, layout: Any, tmp_path: Path) -> None:
    theirs = task_model(model_type, kind)
    expected = loaded(save(theirs, tmp_path / "theirs"))
    write_hf_directory(theirs, None, tmp_path / layout, layout=layout, dtype="float32")
    with warnings.catch_warnings():
        warnings.filterwarnings("error")
        warnings.filterwarnings("ignore", message=".*is a pickle of torch's")
        assert equal(BertWithHead.from_pretrained(tmp_path / layout), expected)


@pytest.mark.parametrize("architecture", [True, False])
def test_the_first_checkpoints_of_bert_have_a_masked_language_model(architecture: bool, tmp_path: Path) -> None:
    config = torch_model("bert").config
    theirs = transformers.BertForPreTraining(config).double().eval()
    theirs.load_state_dict(sensitising_state(theirs, gains={}, seed=7))
    write_hf_directory(theirs, None, tmp_path, layout="gamma-beta", dtype="float32")
    if not architecture:
        edit(tmp_path, architectures=None)
    with pytest.warns(UserWarning, match="cls.seq_relationship.bias, cls.seq_relationship.weight are of another head"):
        ours = BertWithHead.from_pretrained(tmp_path)
    truth = theirs(IDS, attention_mask=MASK).prediction_logits.detach()
    assert relative(ours(to_mlx(IDS), to_mlx(MASK))["logits"], truth) <= FLOAT32


@TYPES
@KINDS
def test_the_kind_of_a_head_is_known_by_its_tensors_too(model_type: str, kind: str, tmp_path: Path) -> None:
    edit(save(task_model(model_type, kind), tmp_path), architectures=None)
    assert loaded(tmp_path).head_config.head_type == HEAD_TYPES[kind]


@TYPES
def test_a_decoder_of_its_own(model_type: str, tmp_path: Path) -> None:
    theirs = task_model(model_type, "masked_lm", tie_word_embeddings=False)
    ours = loaded(save(theirs, tmp_path))
    assert "decoder" in ours.head and not ours.head_config.tie_word_embeddings
    truth = theirs(IDS, attention_mask=MASK).logits.detach()
    assert relative(ours(to_mlx(IDS), to_mlx(MASK))["logits"], truth) <= FLOAT32
    ours.save_pretrained(tmp_path / "again")
    again, said = type(theirs).from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"]
    difference = again.double()(IDS, attention_mask=MASK).logits.detach() - truth
    assert float(difference.abs().max()) < 1e-12
    assert equal(loaded(tmp_path / "again"), ours)
    edit(tmp_path, tie_word_embeddings=True)
    with pytest.raises(WeightsError, match=r"the decoder (is not the word embeddings|has two biases that differ)"):
        BertWithHead.from_pretrained(tmp_path)


def test_a_decoder_with_two_biases(tmp_path: Path) -> None:
    expected = loaded(save(task_model("bert", "masked_lm"), tmp_path))
    bias = mx.array(expected.head.bias)
    rewrite(tmp_path, lambda tensors: tensors.update({"cls.predictions.decoder.bias": bias}))
    assert equal(loaded(tmp_path), expected)
    rewrite(tmp_path, lambda tensors: tensors.pop("cls.predictions.bias"))
    assert equal(loaded(tmp_path), expected)
    rewrite(tmp_path, lambda tensors: tensors.update({"cls.predictions.bias": bias + 1}))
    with pytest.raises(WeightsError, match="the decoder has two biases that differ"):
        BertWithHead.from_pretrained(tmp_path)


def edit(directory: Path, **values: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rewrite(directory: Path, change: Any) -> None:
    path = str(directory / "model.safetensors")
    tensors = dict(mx.load(path))
    mx.eval(tensors)
    change(tensors)
    mx.save_safetensors(path, tensors, metadata={"format": "pt"})


@KINDS
def test_a_tensor_of_the_head_that_lacks(kind: str, tmp_path: Path) -> None:
    save(task_model("bert", kind), tmp_path)
    name = {"masked_lm": "cls.predictions.transform.dense.bias"}.get(kind, "classifier.bias")
    rewrite(tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(WeightsError, match=f"lacks {name} of its head; random_init=True leaves them random"):
        BertWithHead.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=f"lacks {name} of its head; random, as random_init=True asks for"):
        BertWithHead.from_pretrained(tmp_path, random_init=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"classifier.weight": mx.zeros((3, 16))}), r"classifier.weight has shape \(3, 16\), expec"),
        (lambda t: t.update({"classifier.bias": mx.zeros((4,))}), r"classifier.bias has shape \(4,\), expected \(3,\)"),
        (lambda t: t.update({"classifier.bias": mx.zeros((3,), mx.int32)}), "classifier.bias is of type .*int32"),
        (lambda t: t.pop("classifier.weight"), "lacks classifier.weight, which its architectures"),
        (lambda t: t.update({"classifier.scales": mx.zeros((3, 1))}), "classifier.scales is there without"),
    ],
)
def test_a_damaged_head(change: Any, message: str, tmp_path: Path) -> None:
    rewrite(save(task_model("bert", "sequence"), tmp_path), change)
    with pytest.raises(WeightsError, match=message):
        BertWithHead.from_pretrained(tmp_path)


def test_another_number_of_labels_is_an_error_and_a_new_head_only_by_name(tmp_path: Path) -> None:
    save(task_model("bert", "sequence"), tmp_path)
    with pytest.raises(WeightsError, match=r"has 3 outputs, expected 5 for this multiclass.*num_labels=3 takes"):
        BertWithHead.from_pretrained(tmp_path, num_labels=5)
    with pytest.raises(WeightsError, match=r"expected 1 for this binary.*head_type='multiclass_classification' takes"):
        BertWithHead.from_pretrained(tmp_path, head_type="binary_classification")
    with pytest.warns(UserWarning, match="has no head of a multiclass.*not used: classifier.bias, classifier.weight"):
        model = BertWithHead.from_pretrained(tmp_path, num_labels=5, random_init=True)
    assert model.head.classifier.weight.shape == (5, 32)
    assert loaded(tmp_path, head_type="multilabel_classification").head_config.output_size == 3
    assert loaded(tmp_path, num_labels=3).head_config.head_type == "multiclass_classification"


def test_one_logit_may_be_a_binary_classification(tmp_path: Path) -> None:
    theirs = task_model("bert", "sequence", num_labels=1)
    ours = loaded(save(theirs, tmp_path), head_type="binary_classification", num_labels=2)
    truth = theirs(IDS, attention_mask=MASK).logits.detach()
    found = ours(to_mlx(IDS), to_mlx(MASK))
    assert relative(found["probabilities"], truth.sigmoid()) <= FLOAT32
    ours.save_pretrained(tmp_path / "again")
    assert loaded(tmp_path / "again").head_config.head_type == "binary_classification"


def test_a_head_of_another_type_is_new_and_says_so(tmp_path: Path) -> None:
    save(task_model("bert", "token"), tmp_path)
    with pytest.warns(UserWarning, match="no head of a regression of 1 outputs; .* random .*; not used: class"):
        model = BertWithHead.from_pretrained(tmp_path, head_type="regression")
    assert "pooler" not in model.bert
    with pytest.raises(WeightsError, match=r"lacks pooler\.dense"):
        BertWithHead.from_pretrained(tmp_path, head_config=task_head(model.config, "regression"))
    body = tmp_path / "body"
    torch_model("bert").float().save_pretrained(body)
    with pytest.raises(ConfigError, match="head_type is not given and the weights have no head: expected one of b"):
        BertWithHead.from_pretrained(body)


@pytest.mark.parametrize("task", ["QuestionAnswering", "MultipleChoice"])
@TYPES
def test_the_head_of_another_task_is_taken_for_none_of_ours(model_type: str, task: str, tmp_path: Path) -> None:
    theirs = getattr(transformers, f"{STEMS[model_type]}For{task}")(torch_model(model_type).config)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="the weights have no head"):
        BertWithHead.from_pretrained(tmp_path)


def test_exactly_the_head_that_is_asked_for(tmp_path: Path) -> None:
    save(task_model("bert", "sequence"), tmp_path)
    theirs = loaded(tmp_path)
    same = loaded(tmp_path, head_config=task_head(theirs.config, "multiclass_classification", 3, dropout=0.5).to_dict())
    assert equal(same, theirs) and same.head_config.dropout == 0.5
    with pytest.warns(UserWarning, match="has no head of a multiclass_classification of 3 outputs"):
        other = BertWithHead.from_pretrained(
            tmp_path, head_config=default_head(theirs.config, "multiclass_classification", 3)
        )
    assert equal(other.bert, theirs.bert) and not equal(other.head, theirs.head)
    with pytest.raises(ConfigError, match="disagree"):
        BertWithHead.from_pretrained(tmp_path, head_type="regression", head_config=theirs.head_config)


def recorded(model: BertWithHead, monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], float]]:
    """Shape and probability of each dropout of the head in a call that trains."""
    calls: list[tuple[tuple[int, ...], float]] = []

    def dropout(values: Any, probability: float, training: bool) -> Any:
        if training and probability:
            calls.append((values.shape, probability))
        return values

    monkeypatch.setattr(with_head.heads, "dropout", dropout)
    model(to_mlx(IDS), training=True)
    return calls


@pytest.mark.parametrize(
    ("model_type", "kind", "fields", "expected"),
    [
        ("bert", "sequence", {"hidden_dropout_prob": 0.3}, [((3, 32), 0.3)]),
        ("bert", "sequence", {"classifier_dropout": 0.4}, [((3, 32), 0.4)]),
        ("bert", "token", {"classifier_dropout": 0.4}, [((3, 7, 32), 0.4)]),
        ("bert", "masked_lm", {"hidden_dropout_prob": 0.3}, []),
        ("roberta", "sequence", {"classifier_dropout": 0.4}, [((3, 32), 0.4), ((3, 32), 0.4)]),
        ("roberta", "token", {"hidden_dropout_prob": 0.3}, [((3, 7, 32), 0.3)]),
        ("distilbert", "sequence", {"seq_classif_dropout": 0.4}, [((3, 32), 0.4)]),
        ("distilbert", "token", {"dropout": 0.3}, [((3, 7, 32), 0.3)]),
    ],
)
def test_dropout_is_where_transformers_has_it(
    model_type: str, kind: str, fields: Any, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(save(task_model(model_type, kind, **fields), tmp_path))
    assert recorded(model, monkeypatch) == expected


@pytest.mark.parametrize("kind", ["sequence", "masked_lm"])
def test_a_quantised_body_with_its_head(kind: str, tmp_path: Path) -> None:
    model = loaded(save(task_model("bert", kind), tmp_path / "whole"))
    whole = model(to_mlx(IDS))["logits"]
    head = {name: mx.array(value) for name, value in states_of(model.head).items()}
    quantize(model, bits=8, group_size=32)
    assert model.config.quantization == {"bits": 8, "group_size": 32}
    assert all(mx.array_equal(value, head[name]) for name, value in states_of(model.head).items())
    assert 0 < relative(model(to_mlx(IDS))["logits"], to_torch(whole)) < 0.05
    model.save_pretrained(tmp_path / "quantised")
    again = loaded(tmp_path / "quantised")
    assert equal(again, model)
    assert mx.array_equal(again(to_mlx(IDS))["logits"], model(to_mlx(IDS))["logits"])


def test_a_head_that_is_quantised_is_made_whole(tmp_path: Path) -> None:
    model = loaded(save(task_model("bert", "sequence"), tmp_path / "whole"))
    quantize(model, bits=8, group_size=32)
    model.save_pretrained(tmp_path / "quantised")
    weight, bits = model.head.classifier.weight, {"bits": 8, "group_size": 32}
    parts = dict(zip(("weight", "scales", "biases"), mx.quantize(weight, **bits), strict=True))
    rewrite(tmp_path / "quantised", lambda t: t.update({f"classifier.{name}": part for name, part in parts.items()}))
    found = loaded(tmp_path / "quantised").head.classifier.weight
    assert mx.array_equal(found, mx.dequantize(parts["weight"], parts["scales"], parts["biases"], **bits))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_dtype_is_kept(dtype: str, tmp_path: Path) -> None:
    theirs = task_model("bert", "sequence")
    write_hf_directory(theirs, None, tmp_path / "half", dtype=dtype)  # type: ignore[arg-type]
    ours = loaded(tmp_path / "half")
    assert {value.dtype for value in states_of(ours).values()} == {getattr(mx, dtype)}
    found = ours(to_mlx(IDS), to_mlx(MASK), labels=to_mlx(LABELS["sequence"]))
    assert found["logits"].dtype == getattr(mx, dtype) and found["loss"].dtype == mx.float32
    truth = theirs(IDS, attention_mask=MASK).logits.detach()
    assert relative(found["logits"], truth) < {"float16": 0.01, "bfloat16": 0.1}[dtype]
    ours.save_pretrained(tmp_path / "again")
    assert equal(loaded(tmp_path / "again"), ours)
    assert dtype in (tmp_path / "again" / "config.json").read_text()
    # A new head has the dtype of the body.
    with pytest.warns(UserWarning, match="random"):
        new = BertWithHead.from_pretrained(tmp_path / "half", head_type="ordinal_regression", num_labels=4)
    assert {value.dtype for value in states_of(new).values()} == {getattr(mx, dtype)}
