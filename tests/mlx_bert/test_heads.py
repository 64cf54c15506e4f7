# SPDX-License-Identifier: Apache-2.0
"""The heads: names and shapes of what they give, their losses by their formulas, masks, training, and bad input."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="needs MLX: pip install 'parity-harness[mlx]'")
import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optimizers  # noqa: E402
import torch  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from torch.nn import functional  # noqa: E402

from reference_models.mlx_bert import heads, losses  # noqa: E402
from reference_models.mlx_bert.config import BertConfig, ConfigError  # noqa: E402
from reference_models.mlx_bert.heads import HEAD_TYPES, HeadConfig, default_head  # noqa: E402
from reference_models.mlx_bert.pooling import POOLINGS  # noqa: E402
from reference_models.mlx_bert.task_heads import task_head  # noqa: E402
from reference_models.mlx_bert.with_head import BertWithHead, create  # noqa: E402
from tests.mlx_bert.oracle import relative, to_torch  # noqa: E402

pytestmark = [pytest.mark.mlx, pytest.mark.usefixtures("one_thread", "mlx_on_the_cpu")]

CONFIG = BertConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=40,
    max_position_embeddings=16,
)
ROWS, TOKENS, LABELS = 3, 5, 4
IDS = mx.array([[2, 3, 4, 5, 6], [7, 8, 9, 0, 0], [10, 11, 12, 13, 0]])
MASK = mx.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
# What can be asked for by num_labels.
LABELS_OF = {"binary_classification": None, "regression": None, "masked_lm": None}
TYPES = pytest.mark.parametrize("head_type", HEAD_TYPES)


def head_of(head_type: str, config: BertConfig = CONFIG, **values: Any) -> HeadConfig:
    return default_head(config, head_type, LABELS_OF.get(head_type, LABELS), **values)


def model_of(head_type: str, config: BertConfig = CONFIG, *, seed: int = 0, **values: Any) -> BertWithHead:
    """A model with weights that show."""
    mx.random.seed(seed)
    model = create(config, head_of(head_type, config, **values))
    generator = np.random.default_rng(seed)
    noisy = [
        (name, value + mx.array(generator.normal(size=value.shape).astype(np.float32) * 0.2))
        for name, value in tree_flatten(model.parameters())
        if "thresholds" not in name and "temperature" not in name
    ]
    model.load_weights(noisy, strict=False)
    return model


def labels_for(head_type: str) -> Any:
    """Labels of a head, and with some to ignore where that can be."""
    return {
        "binary_classification": mx.array([1, 0, 1]),
        "multiclass_classification": mx.array([3, 0, -100]),
        "multilabel_classification": mx.array([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 0]]),
        "regression": mx.array([0.5, -1.0, 2.0]),
        "ordinal_regression": mx.array([3, 0, 1]),
        "time_series": mx.array([[0.5, -1.0, 2.0, 1.0], [0.1, 0.2, 0.3, 0.4], [0.0, 0.0, 1.0, -1.0]]),
        "token_classification": mx.array([[0, 1, 2, 3, -100], [0, 0, 1, -100, -100], [3, 3, 3, 3, -100]]),
        "masked_lm": mx.array([[-100, 33, -100, -100, 63], [-100] * 5, [0, -100, -100, -100, -100]]),
    }[head_type]


# The table of the specification: B rows, T tokens, N labels, V words.
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "binary_classification": {
        "logits": (ROWS, 1),
        "probabilities": (ROWS, 1),
        "probabilities_2class": (ROWS, 2),
        "predictions": (ROWS, 1),
    },
    "multiclass_classification": {
        "logits": (ROWS, LABELS),
        "probabilities": (ROWS, LABELS),
        "predictions": (ROWS,),
    },
    "multilabel_classification": {
        "logits": (ROWS, LABELS),
        "probabilities": (ROWS, LABELS),
        "predictions": (ROWS, LABELS),
    },
    "regression": {"logits": (ROWS, 1), "predictions": (ROWS, 1)},
    "ordinal_regression": {
        "logits": (ROWS, LABELS - 1),
        "threshold_logits": (ROWS, LABELS - 1),
        "cumulative_probabilities": (ROWS, LABELS - 1),
        "class_probabilities": (ROWS, LABELS),
        "probabilities": (ROWS, LABELS),
        "predictions": (ROWS,),
    },
    "time_series": {
        "logits": (ROWS, 1, LABELS),
        "predictions": (ROWS, 1, LABELS),
        "seasonal": (ROWS, 1, LABELS),
        "trend": (ROWS, 1, LABELS),
        "residual": (ROWS, 1, LABELS),
    },
    "token_classification": {
        "logits": (ROWS, TOKENS, LABELS),
        "probabilities": (ROWS, TOKENS, LABELS),
        "predictions": (ROWS, TOKENS),
    },
    "masked_lm": {
        "logits": (ROWS, TOKENS, 64),
        "probabilities": (ROWS, TOKENS, 64),
        "predictions": (ROWS, TOKENS),
    },
}


@TYPES
def test_outputs_have_their_names_shapes_and_dtypes(head_type: str) -> None:
    model = model_of(head_type)
    found = model(IDS, MASK)
    assert {name: value.shape for name, value in found["head_outputs"].items()} == SHAPES[head_type]
    assert set(found) == {"loss", "logits", "predictions", "probabilities", "bert_outputs", "head_outputs"}
    assert found["loss"] is None
    for name in ("logits", "predictions", "probabilities"):
        assert found[name] is found["head_outputs"].get(name)
    is_value = head_type in ("regression", "time_series")
    assert found["predictions"].dtype == (mx.float32 if is_value else mx.int32)
    assert found["bert_outputs"].last_hidden_state.shape == (ROWS, TOKENS, 32)
    assert all(mx.isfinite(value).all() for value in found["head_outputs"].values())
    assert model(IDS, MASK, return_dict=False)[0] is None


@TYPES
def test_what_probabilities_and_predictions_are(head_type: str) -> None:
    found = {name: to_torch(value) for name, value in model_of(head_type)(IDS, MASK)["head_outputs"].items()}
    logits = found["logits"]
    if head_type == "binary_classification":
        assert torch.allclose(found["probabilities"], logits.sigmoid(), atol=1e-6)
        assert torch.allclose(found["probabilities_2class"][:, 1:], found["probabilities"])
        assert torch.allclose(found["probabilities_2class"].sum(1), torch.ones(ROWS).double(), atol=1e-6)
        assert torch.equal(found["predictions"], (logits > 0).double())
    elif head_type == "multilabel_classification":
        assert torch.allclose(found["probabilities"], logits.sigmoid(), atol=1e-6)
        assert torch.equal(found["predictions"], (logits > 0).double())
    elif head_type == "ordinal_regression":
        above = found["cumulative_probabilities"]
        assert torch.allclose(above, logits.sigmoid(), atol=1e-6)
        # A higher class is never more likely to be passed than a lower one.
        assert (above.diff(dim=1) < 0).all() and (found["class_probabilities"] >= 0).all()
        assert torch.allclose(found["class_probabilities"].sum(1), torch.ones(ROWS).double(), atol=1e-6)
        assert torch.allclose(found["class_probabilities"][:, 1:].flip(1).cumsum(1).flip(1), above, atol=1e-6)
        assert torch.equal(found["predictions"], (above > 0.5).sum(1).double())
    elif head_type == "time_series":
        assert torch.allclose(logits, found["trend"] + found["seasonal"] + found["residual"], atol=1e-6)
    elif head_type != "regression":
        assert torch.allclose(found["probabilities"], logits.softmax(-1), atol=1e-6)
        assert torch.equal(found["predictions"], logits.argmax(-1).double())


def test_a_new_ordinal_finds_every_class_equally_likely_for_a_score_of_zero() -> None:
    for classes in (2, 3, 7):
        head = heads.build(head_of("ordinal_regression", output_size=classes))
        assert np.allclose(1 / (1 + np.exp(np.array(heads.ordered_thresholds(head.thresholds)))),
                           1 - np.arange(1, classes) / classes)  # fmt: skip


def test_thresholds_temperature_scale_and_uncertainty() -> None:
    multilabel = model_of("multilabel_classification")
    likely = multilabel(IDS, MASK)["probabilities"]
    multilabel.head.adaptive_thresholds = mx.array([0.0, 1.0, 0.0, 1.0])
    assert multilabel(IDS, MASK)["predictions"].tolist() == [[1, 0, 1, 0]] * ROWS
    assert mx.array_equal(multilabel(IDS, MASK)["probabilities"], likely)

    tempered = model_of("multiclass_classification", use_temperature=True)
    logits = tempered(IDS, MASK)["logits"]
    tempered.head.temperature = mx.array([2.0])
    assert mx.allclose(tempered(IDS, MASK)["logits"], logits / 2)

    plain, scaled = model_of("regression"), model_of("regression", output_scale=3.0, output_bias=-1.0)
    assert mx.allclose(scaled(IDS, MASK)["logits"], plain(IDS, MASK)["logits"] * 3 - 1, atol=1e-6)

    ordinal = model_of("ordinal_regression")
    ordinal.head.classifier.weight = mx.zeros((1, 32))
    step = math.log(math.expm1(1.1))
    ordinal.head.thresholds = mx.array([-1.0, step, step])
    assert mx.allclose(heads.ordered_thresholds(ordinal.head.thresholds), mx.array([-1.0, 0.1, 1.2]), atol=1e-6)
    assert ordinal(IDS, MASK)["predictions"].tolist() == [1] * ROWS

    unscaled = model_of("regression", use_uncertainty=True)(IDS, MASK)["head_outputs"]
    certain = model_of("regression", use_uncertainty=True, output_scale=2.0)(IDS, MASK)["head_outputs"]
    assert mx.allclose(certain["variance"], 4 * unscaled["variance"])
    assert {name: value.shape for name, value in certain.items()} == dict.fromkeys(
        ("logits", "predictions", "log_variance", "variance", "uncertainty"), (ROWS, 1)
    )
    assert mx.allclose(certain["variance"], mx.exp(certain["log_variance"]))
    assert mx.allclose(mx.square(certain["uncertainty"]), certain["variance"])


@pytest.mark.parametrize("pooling", [*POOLINGS, "pooler"])
@pytest.mark.parametrize("form", ["int", "bool", "float", "additive"])
def test_every_pooling_under_every_mask(pooling: str, form: str) -> None:
    model = model_of("multiclass_classification", pooling=pooling)
    masks = {
        "int": MASK,
        "bool": MASK.astype(mx.bool_),
        "float": MASK.astype(mx.float32),
        "additive": (1 - MASK) * -1e9,
    }
    found = model(IDS, masks[form])["logits"]
    assert mx.allclose(found, model(IDS, MASK)["logits"], atol=1e-6)
    # What is padding shows in nothing.
    assert mx.allclose(found, model(mx.where(MASK == 1, IDS, 50), masks[form])["logits"], atol=1e-5)
    # Nor does it in training, and a row with nothing kept is finite.
    empty = masks[form] * 0 if form != "additive" else mx.full(MASK.shape, -1e9)
    empty = empty.astype(masks[form].dtype)
    empty = mx.concatenate([masks[form][:2], empty[2:]])
    loss, gradients = nn.value_and_grad(model, lambda m: m(IDS, empty, labels=mx.array([0, 1, 2]))["loss"])(model)
    assert mx.isfinite(loss) and all(mx.isfinite(value).all() for _, value in tree_flatten(gradients))
    if pooling in ("mean", "max", "last", "weighted_mean", "attention"):
        zeros = model.head(model.bert(IDS, mx.zeros_like(MASK)), model.bert.embeddings.word_embeddings, training=False)[
            "logits"
        ]
        assert mx.allclose(zeros[0], zeros[1])


def expected_loss(head_type: str, found: dict[str, Any], labels: Any, values: dict[str, Any]) -> torch.Tensor:
    """The losses once more, by torch's own where it has them, else by a loop."""
    logits = to_torch(found["logits"])
    target = torch.from_numpy(np.array(labels))
    gamma = values.get("focal_gamma", 0.0)
    if head_type in ("multiclass_classification", "token_classification", "masked_lm"):
        each = functional.cross_entropy(logits.flatten(0, -2), target.flatten().long(), reduction="none")
        counted = target.flatten() != -100
        return (((1 - (-each).exp()) ** gamma) * each)[counted].mean()
    if head_type in ("binary_classification", "multilabel_classification"):
        target = target.reshape(logits.shape).double()
        each = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return (((1 - (-each).exp()) ** gamma) * each).mean()
    if head_type == "ordinal_regression":
        total = 0.0
        for row, label in zip(logits.tolist(), target.tolist(), strict=True):
            for k, logit in enumerate(row):
                total += math.log1p(math.exp(-logit if label > k else logit))
        return torch.tensor(total / len(logits), dtype=torch.float64)
    target = target.reshape(logits.shape).double()
    if values.get("use_uncertainty"):
        variance = to_torch(found["head_outputs"]["variance"])
        return functional.gaussian_nll_loss(logits, target, variance)
    return functional.mse_loss(logits, target)


@pytest.mark.parametrize(
    ("head_type", "values"),
    [
        *((head_type, {}) for head_type in HEAD_TYPES),
        ("binary_classification", {"focal_gamma": 2.0}),
        ("multiclass_classification", {"focal_gamma": 2.0}),
        ("multilabel_classification", {"focal_gamma": 1.0}),
        ("regression", {"use_uncertainty": True}),
    ],
)
def test_a_loss_is_its_formula(head_type: str, values: dict[str, Any]) -> None:
    model = model_of(head_type, **values)
    found = model(IDS, MASK, labels=labels_for(head_type))
    assert found["loss"].shape == () and found["loss"].dtype == mx.float32
    truth = expected_loss(head_type, found, labels_for(head_type), values)
    assert abs(found["loss"].item() / truth.item() - 1) < 2e-6
    model.set_dtype(mx.float64)
    found = model(IDS, MASK, labels=labels_for(head_type))
    truth = expected_loss(head_type, found, labels_for(head_type), values)
    assert abs(found["loss"].item() / truth.item() - 1) < 1e-13


def test_a_loss_is_finite_far_out_and_flat_where_nothing_counts() -> None:
    far = mx.array([[1e4], [-1e4], [0.0]])
    for label in (0.0, 1.0):
        value, gradient = mx.value_and_grad(lambda z: losses.binary_cross_entropy(z, mx.full(z.shape, label)))(far)  # noqa: B023
        assert mx.isfinite(value) and mx.isfinite(gradient).all()
        assert gradient[2].item() == pytest.approx((0.5 - label) / 3)
    none = mx.array([-100, -100])
    value, gradient = mx.value_and_grad(lambda z: losses.cross_entropy(z, none))(mx.array([[1e4, -1e4], [3.0, 4.0]]))
    assert value.item() == 0 and (gradient == 0).all()
    value, gradient = mx.value_and_grad(lambda z: losses.ordinal(z, none))(mx.array([[1e4], [-1e4]]))
    assert value.item() == 0 and (gradient == 0).all()


@TYPES
def test_labels_may_have_an_axis_of_one(head_type: str) -> None:
    model, labels = model_of(head_type), labels_for(head_type)
    others = {
        "binary_classification": labels.reshape(-1, 1),
        "regression": labels.reshape(-1, 1),
        "time_series": labels[:, None] if head_type == "time_series" else labels,
    }
    loss = model(IDS, MASK, labels=labels)["loss"]
    assert model(IDS, MASK, labels=others.get(head_type, labels))["loss"].item() == loss.item()


@TYPES
def test_every_head_learns(head_type: str) -> None:
    mx.random.seed(1)
    model, labels = model_of(head_type), labels_for(head_type)
    model.train()

    def loss_of(model: BertWithHead) -> Any:
        return model(IDS, MASK, labels=labels)["loss"]

    gradient = nn.value_and_grad(model, loss_of)
    before, gradients = gradient(model)
    names = {name for name, _ in tree_flatten(gradients)}
    assert names == {name for name, _ in tree_flatten(model.parameters())} - {"head.adaptive_thresholds"}
    # The bias of attention's scores moves all of a row alike, so that its gradient is zero but for rounding.
    useless = {"head.attention.bias"}
    heads_own = [value for name, value in tree_flatten(gradients) if name.startswith("head.") and name not in useless]
    assert all(mx.isfinite(value).all() for _, value in tree_flatten(gradients))
    assert all((value != 0).any() for value in heads_own)
    optimizer = optimizers.Adam(learning_rate=0.005)
    for _ in range(60):
        _, gradients = gradient(model)
        optimizer.update(model, gradients)
        mx.eval(model.parameters())
    model.eval()
    assert loss_of(model).item() < 0.7 * before.item()


@TYPES
def test_evaluation_repeats_itself_and_training_does_not(head_type: str) -> None:
    model = model_of(head_type)
    first = model(IDS, MASK)["logits"]
    assert mx.array_equal(first, model(IDS, MASK)["logits"])
    assert not mx.array_equal(first, model(IDS, MASK, training=True)["logits"])
    assert not model.training
    model.train()
    assert model.training and not mx.array_equal(model(IDS, MASK)["logits"], model(IDS, MASK)["logits"])
    assert mx.array_equal(first, model(IDS, MASK, training=False)["logits"])


def test_hidden_states_and_attentions_are_given_where_they_are_asked_for() -> None:
    found = model_of("regression")(IDS, MASK, output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in found["hidden_states"]] == [(ROWS, TOKENS, 32)] * 3
    assert [state.shape for state in found["attentions"]] == [(ROWS, 4, TOKENS, TOKENS)] * 2


@TYPES
def test_every_argument_reaches_the_body(head_type: str) -> None:
    model = model_of(head_type)
    types, places = mx.ones_like(IDS), mx.array([[4, 3, 2, 1, 0]] * ROWS)
    states = model.bert(IDS, MASK, types, places)
    expected = model.head(states, model.bert.embeddings.word_embeddings, training=False)["logits"]
    assert mx.array_equal(model(IDS, MASK, types, places)["logits"], expected)
    for fewer in ((IDS, MASK, types), (IDS, MASK, None, places), (IDS, None, types, places)):
        assert not mx.array_equal(model(*fewer)["logits"], expected)
    words = model.bert.embeddings.word_embeddings(IDS)
    found = model(None, MASK, types, places, inputs_embeds=words)["logits"]
    assert mx.allclose(found, expected, atol=1e-6)


@TYPES
def test_a_compiled_model_gives_the_same(head_type: str) -> None:
    model, labels = model_of(head_type), labels_for(head_type)
    compiled = mx.compile(lambda ids, mask, wanted: model(ids, mask, labels=wanted, return_dict=False))
    loss, logits = compiled(IDS, MASK, labels)
    assert relative(logits, to_torch(model(IDS, MASK)["logits"])) < 2e-6
    assert loss.item() == pytest.approx(model(IDS, MASK, labels=labels)["loss"].item(), rel=1e-5)


def trained(model: BertWithHead) -> set[str]:
    return {name for name, _ in tree_flatten(model.trainable_parameters())}


def test_what_is_frozen_and_what_is_trained() -> None:
    model = model_of("multilabel_classification", pooling="pooler")
    everything = trained(model)
    assert "head.adaptive_thresholds" not in everything
    model.freeze_bert()
    assert trained(model) == {name for name in everything if name.startswith("head.")}
    model.unfreeze_all()
    assert trained(model) == everything
    model.freeze_encoder()
    assert trained(model) == {name for name in everything if name.startswith(("head.", "bert.pooler."))}
    model.unfreeze_all()
    # No gradient, and no step of an optimizer, reaches what is frozen.
    model.freeze_bert()
    before = dict(tree_flatten(model.parameters()))
    labels = labels_for("multilabel_classification")
    _, gradients = nn.value_and_grad(model, lambda m: m(IDS, MASK, labels=labels)["loss"])(model)
    assert {name for name, _ in tree_flatten(gradients)} == trained(model)
    optimizers.SGD(learning_rate=0.1).update(model, gradients)
    after = dict(tree_flatten(model.parameters()))
    assert all(mx.array_equal(after[name], before[name]) == (name not in trained(model)) for name in before)


def test_quantised_weights_stay_frozen_and_the_rest_trains() -> None:
    from reference_models.mlx_bert.quantisation import quantize

    model = quantize(model_of("binary_classification"), bits=8, group_size=32)
    model.unfreeze_all()
    loss, gradients = nn.value_and_grad(model, lambda m: m(IDS, MASK, labels=mx.array([0, 1, 0]))["loss"])(model)
    names = {name for name, _ in tree_flatten(gradients)}
    assert mx.isfinite(loss) and "head.classifier.weight" in names and "bert.embeddings.LayerNorm.weight" in names
    assert not any(name.endswith((".scales", ".biases")) for name in names)


@pytest.mark.parametrize(
    ("head_type", "labels", "message"),
    [
        ("multiclass_classification", mx.array([0, 1]), r"labels have shape \(2,\): a multiclass.* expects \(3,\)"),
        ("multiclass_classification", mx.array([0.0, 1.0, 1.0]), "labels have dtype .*float32: .* an integer dtype"),
        ("multiclass_classification", mx.array([0, 1, 4]), "labels are not all in 0 to 3, or -100 to ignore one"),
        ("multiclass_classification", mx.array([0, 1, -1]), "labels are not all in 0 to 3"),
        ("multiclass_classification", [0, 1, 2], "labels are of type list: expected an mlx.core.array"),
        ("binary_classification", mx.array([0, 1, 2]), "labels of a binary_classification head are not all in 0 to 1"),
        ("binary_classification", mx.array([0, 1, math.nan]), "not all in 0 to 1"),
        ("regression", mx.array([0, 1j, 1]), "labels have dtype .*complex64: a regression head expects real numbers"),
        ("multilabel_classification", mx.array([0, 1, 1]), r"labels have shape \(3,\): .* expects \(3, 4\)"),
        ("regression", mx.array([0.0, math.inf, 1.0]), "labels of a regression head are not all finite"),
        ("regression", mx.zeros((3, 2)), r"labels have shape \(3, 2\): a regression head expects \(3,\) or \(3, 1\)"),
        ("ordinal_regression", mx.array([0, 4, 1]), "labels are not all in 0 to 3"),
        ("time_series", mx.zeros((3, 3)), r"expects \(3, 4\) or \(3, 1, 4\)"),
        ("token_classification", mx.array([0, 1, 1]), r"expects \(3, 5\)"),
        ("masked_lm", mx.full((3, 5), 64), "labels are not all in 0 to 63"),
    ],
)
def test_labels_that_are_none_of_the_head(head_type: str, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of(head_type)(IDS, MASK, labels=labels)


def test_what_is_no_body_or_no_head_is_told_so() -> None:
    model = model_of("regression")
    with pytest.raises(TypeError, match="bert is of type str: expected a BertCore"):
        BertWithHead("bert-base-uncased", model.head_config)
    for head in ("regression", model.head_config.to_dict(), None):
        with pytest.raises(TypeError, match=f"head is of type {type(head).__name__}: expected a HeadConfig"):
            BertWithHead(model.bert, head)


def test_the_body_still_says_what_is_wrong_with_a_batch() -> None:
    model = model_of("binary_classification")
    with pytest.raises(ValueError, match="input_ids are not all in 0 to 63"):
        model(mx.array([[64]]))
    with pytest.raises(ValueError, match="17 tokens"):
        model(mx.ones((1, 17), dtype=mx.int32))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"head_type": "binary"}, "head_type='binary' is unknown: did you mean 'binary_classification'"),
        ({"head_type": "ranking"}, "head_type='ranking' is unknown"),
        ({"output_size": 2}, "output_size=2 is not supported for binary_classification: expected 1"),
        ({"head_type": "multiclass_classification"}, "output_size=1 is too few for a multiclass.*: expected 2 or more"),
        ({"head_type": "ordinal_regression"}, "output_size=1 is too few"),
        ({"input_size": 0}, "input_size=0 is not supported in a head: expected a positive integer"),
        ({"output_size": True}, "output_size=True"),
        ({"pooling": "first"}, "pooling='first' is not supported in a head: expected one of cls, mean"),
        ({"hidden_sizes": (0,)}, "hidden_sizes"),
        ({"hidden_sizes": 3}, "hidden_sizes=3"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"input_dropout": -0.1}, "input_dropout=-0.1"),
        ({"activation": "gleu"}, "activation='gleu'"),
        ({"use_layer_norm": 1}, "use_layer_norm=1"),
        ({"layer_norm_eps": 0}, "layer_norm_eps=0"),
        ({"initializer_range": math.nan}, "initializer_range=nan"),
        ({"focal_gamma": 0.5}, "focal_gamma=0.5"),
        ({"output_scale": 0}, "output_scale=0"),
        ({"output_scale": 2.0}, "output_scale=2.0 has no place in a binary_classification head"),
        ({"use_uncertainty": True}, "use_uncertainty=True has no place"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False has no place"),
        ({"head_type": "token_classification", "pooling": "cls"}, "pooling='cls' has no place in a token_class"),
        ({"head_type": "masked_lm", "hidden_sizes": (3,)}, r"hidden_sizes=\(3,\) has no place"),
        ({"head_type": "regression", "focal_gamma": 2.0}, "focal_gamma=2.0 has no place"),
        ({"head_type": "regression", "use_temperature": True}, "use_temperature=True has no place"),
    ],
)
def test_a_head_that_is_none(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        HeadConfig(**({"head_type": "binary_classification", "input_size": 32} | values))
    assert "\n" not in str(caught.value)


def test_a_heads_configuration_as_a_dictionary() -> None:
    head = head_of("regression", use_uncertainty=True)
    assert HeadConfig.from_dict(head.to_dict()) == head
    with pytest.raises(ConfigError, match="head config key 'droput' is unknown: did you mean 'dropout'"):
        HeadConfig.from_dict(head.to_dict() | {"droput": 0.1})
    with pytest.raises(ConfigError, match="head config lacks 'input_size'"):
        HeadConfig.from_dict({"head_type": "regression"})
    with pytest.raises(ConfigError, match="mapping"):
        HeadConfig.from_dict([])  # type: ignore[arg-type]


def test_the_documents_default_heads() -> None:
    """Each type's pooling, layers, activation and dropout."""
    found = {kind: (head.pooling, head.hidden_sizes, head.activation, head.dropout)
             for kind in HEAD_TYPES for head in [head_of(kind)]}  # fmt: skip
    assert found == {
        "binary_classification": ("cls", (16,), "gelu", 0.1),
        "multiclass_classification": ("cls", (16,), "gelu", 0.1),
        "multilabel_classification": ("attention", (16,), "gelu", 0.1),
        "regression": ("mean", (16, 8), "relu", 0.2),
        "ordinal_regression": ("cls", (), "gelu", 0.1),
        "time_series": ("cls", (), "gelu", 0.1),
        "token_classification": (None, (), "gelu", 0.1),
        "masked_lm": (None, (), "gelu", 0.0),
    }
    assert head_of("time_series_regression").head_type == "time_series"
    labelled = BertConfig.from_hf_config(CONFIG.to_hf_config() | {"id2label": {"0": "a", "1": "b", "2": "c"}})
    assert default_head(labelled, "token_classification").output_size == 3
    with pytest.raises(ConfigError, match="a token_classification head needs num_labels"):
        default_head(CONFIG, "token_classification")
    with pytest.raises(ConfigError, match="num_labels=3: a binary_classification has 2 labels and one logit"):
        default_head(CONFIG, "binary_classification", 3)
    with pytest.raises(ConfigError, match="num_labels=3: a masked_lm head has vocab_size=64 outputs"):
        default_head(CONFIG, "masked_lm", 3)
    with pytest.raises(TypeError, match="unknown head option 'hidden_size': did you mean 'hidden_sizes'"):
        default_head(CONFIG, "regression", hidden_size=3)
    with pytest.raises(ValueError, match="transformers has no ordinal_regression head"):
        task_head(CONFIG, "ordinal_regression", 3)


def test_a_head_has_to_fit_the_body() -> None:
    with pytest.raises(ValueError, match="the head has input_size=16: expected hidden_size=32"):
        create(CONFIG, HeadConfig(head_type="regression", input_size=16))
    with pytest.raises(ValueError, match="the head has output_size=63: expected vocab_size=64"):
        create(CONFIG, HeadConfig(head_type="masked_lm", input_size=32, output_size=63))
    distilbert = BertConfig.from_hf_config(CONFIG.to_hf_config() | {"model_type": "distilbert"})
    with pytest.raises(ValueError, match="the model has no pooler"):
        create(distilbert, HeadConfig(head_type="regression", input_size=32, pooling="pooler"))
    narrow = BertConfig(**(CONFIG.to_dict() | {"pooler_hidden_size": 12}))
    model = create(narrow, default_head(narrow, "regression", pooling="pooler", hidden_sizes=()))
    assert model(IDS)["logits"].shape == (ROWS, 1)
    with pytest.raises(ValueError, match="the head has input_size=32: expected the pooler's width=12"):
        create(narrow, HeadConfig(head_type="regression", input_size=32, pooling="pooler"))


def test_a_new_head_is_the_seeds() -> None:
    def new() -> Any:
        mx.random.seed(5)
        return create(CONFIG, head_of("multiclass_classification"))

    first, second = (dict(tree_flatten(new().parameters())) for _ in range(2))
    assert all(mx.array_equal(first[name], second[name]) for name in first)
    assert 0.01 < first["head.projection.0.dense.weight"].square().mean().sqrt().item() < 0.03
    assert (first["head.classifier.bias"] == 0).all()
