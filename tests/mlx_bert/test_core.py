# SPDX-License-Identifier: Apache-2.0
"""BertCore against transformers' models in float64, and what it promises beside their numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

mx = pytest.importorskip("mlx.core", reason="needs MLX: pip install 'parity-harness[mlx]'")
import mlx.nn as nn  # noqa: E402
import torch  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from transformers.activations import ACT2FN  # noqa: E402

from reference_models.mlx_bert import core as cores  # noqa: E402
from reference_models.mlx_bert import masks  # noqa: E402
from reference_models.mlx_bert.config import ACTIVATIONS, BertConfig  # noqa: E402
from reference_models.mlx_bert.core import BertCore  # noqa: E402
from tests.mlx_bert.oracle import (  # noqa: E402
    MAXIMUM,
    MODEL_TYPES,
    VOCABULARY,
    core_name,
    core_of,
    parameter_names,
    relative,
    to_mlx,
    to_torch,
    torch_model,
)

pytestmark = [pytest.mark.mlx, pytest.mark.usefixtures("one_thread", "mlx_on_the_cpu")]
TYPES = pytest.mark.parametrize("model_type", MODEL_TYPES)
FLOAT32 = 2e-6


def ids_of(rows: int, tokens: int, *, pad: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 100 + tokens)
    ids = torch.randint(2, VOCABULARY, (rows, tokens), generator=generator)
    return ids if pad is None else torch.where(MASKS["right"][:rows, :tokens].bool(), ids, pad)


def _mask(*rows: str) -> torch.Tensor:
    return torch.tensor([[int(character) for character in row] for row in rows])


MASKS = {
    "full": _mask("111111111", "111111111", "111111111"),
    "right": _mask("111110000", "111111111", "110000000"),
    "left": _mask("000011111", "111111111", "000000001"),
    "interior": _mask("110011101", "101010101", "111111111"),
}


def assert_equal(core: Any, model: Any, *, bound: float, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """All hidden states, all attentions, the last hidden state and the pooler output."""
    asked = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        truth = model(**theirs, **asked)
    found = core(**ours, **asked)
    assert len(found.hidden_states) == len(truth.hidden_states) and len(found.attentions) == len(truth.attentions)
    pairs = list(zip((*found.hidden_states, *found.attentions), (*truth.hidden_states, *truth.attentions), strict=True))
    pairs.append((found.last_hidden_state, truth.last_hidden_state))
    # Without attentions asked for, MLX's own attention kernel runs.
    pairs.append((core(**ours).last_hidden_state, truth.last_hidden_state))
    if "pooler" in core:
        pairs.append((found.pooler_output, truth.pooler_output))
    errors = [relative(mine, theirs) for mine, theirs in pairs]
    assert all(error <= bound for error in errors), errors


@TYPES
def test_the_parameters_have_the_names_of_transformers(model_type: str) -> None:
    model = torch_model(model_type)
    core = core_of(model)
    assert parameter_names(core) == {core_name(name) for name, _ in model.named_parameters()}
    if model_type != "distilbert":
        assert parameter_names(core) == {name for name, _ in model.named_parameters()}
    assert not any("position_ids" in name for name in parameter_names(core))
    assert all(mx.issubdtype(value.dtype, mx.floating) for _, value in tree_flatten(core.parameters()))


@TYPES
@pytest.mark.parametrize("form", ["none", "int", "bool", "float", "additive", "minimum", "infinite", "four_axes"])
@pytest.mark.parametrize("shape", ["right", "left", "interior"])
def test_float32_equals_transformers_under_every_mask(model_type: str, form: str, shape: str) -> None:
    model = torch_model(model_type)
    keep = MASKS[shape]
    forms = {
        "none": None,
        "int": to_mlx(keep),
        "bool": to_mlx(keep.bool()),
        "float": to_mlx(keep, mx.float32),
        "additive": to_mlx((1 - keep) * -10000.0, mx.float32),
        "minimum": to_mlx((1 - keep) * torch.finfo(torch.float32).min, mx.float32),
        "infinite": mx.where(to_mlx(keep.bool()), 0.0, -mx.inf),
        "four_axes": mx.broadcast_to(to_mlx(keep.bool())[:, None, None, :], (3, 1, 9, 9)),
    }
    ids = ids_of(3, 9, pad=model.config.pad_token_id)
    assert_equal(
        core_of(model),
        model,
        bound=FLOAT32,
        ours={"input_ids": to_mlx(ids), "attention_mask": forms[form]},
        theirs={"input_ids": ids, "attention_mask": None if form == "none" else keep},
    )


@TYPES
def test_an_additive_mask_per_query_is_added_as_transformers_adds_it(model_type: str) -> None:
    model = torch_model(model_type)
    bias = torch.randn((3, 1, 9, 9), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    bias = torch.where(torch.rand(bias.shape, generator=torch.Generator().manual_seed(2)) < 0.3, -1e9, bias)
    ids = ids_of(3, 9)
    assert_equal(
        core_of(model),
        model,
        bound=FLOAT32,
        ours={"input_ids": to_mlx(ids), "attention_mask": to_mlx(bias, mx.float32)},
        theirs={"input_ids": ids, "attention_mask": bias},
    )


@TYPES
def test_every_length_up_to_the_maximum(model_type: str) -> None:
    model = torch_model(model_type)
    core = core_of(model)
    longest = MAXIMUM - (2 if model_type == "roberta" else 0)
    for tokens in range(1, longest + 1):
        ids = ids_of(2, tokens)
        assert_equal(core, model, bound=FLOAT32, ours={"input_ids": to_mlx(ids)}, theirs={"input_ids": ids})
    with pytest.raises(ValueError, match=rf"{longest + 1} tokens|row has too many"):
        core(to_mlx(ids_of(2, longest + 1)))


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_token_types_and_positions(model_type: str) -> None:
    model = torch_model(model_type, type_vocab_size=3)
    ids, types = ids_of(3, 9), ids_of(3, 9) % 3
    positions = torch.tensor([[4, 4, 0, 15, 1, 2, 3, 7, 9]])
    for given in ({"token_type_ids": types}, {"position_ids": positions}, {"position_ids": positions.expand(3, -1)}):
        given = {"input_ids": ids, **given}
        ours = {name: to_mlx(value) for name, value in given.items()}
        assert_equal(core_of(model), model, bound=FLOAT32, ours=ours, theirs=given)


@TYPES
def test_embeddings_in_place_of_ids(model_type: str) -> None:
    model = torch_model(model_type)
    vectors = torch.randn((2, 5, 32), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = {"inputs_embeds": to_mlx(vectors, mx.float32)}
    assert_equal(core_of(model), model, bound=FLOAT32, ours=ours, theirs={"inputs_embeds": vectors})


def test_roberta_counts_its_positions_past_padding_inside_and_before_the_text() -> None:
    model = torch_model("roberta")
    ids = ids_of(2, 9)
    ids[0, 2:4] = ids[1, 0] = ids[1, 8] = 1
    ours = {"input_ids": to_mlx(ids)}
    assert_equal(core_of(model), model, bound=FLOAT32, ours=ours, theirs={"input_ids": ids})


def test_roberta_takes_more_tokens_than_positions_when_the_rest_is_padding() -> None:
    model = torch_model("roberta")
    ids = torch.cat([ids_of(2, 14), torch.ones((2, 6), dtype=torch.long)], dim=1)
    ours = {"input_ids": to_mlx(ids), "attention_mask": to_mlx(ids != 1)}
    theirs = {"input_ids": ids, "attention_mask": (ids != 1).long()}
    assert_equal(core_of(model), model, bound=FLOAT32, ours=ours, theirs=theirs)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 1},
        {"num_attention_heads": 1},
        {"num_attention_heads": 32},
        {"intermediate_size": 1},
        {"layer_norm_eps": 1e-2},
        {"type_vocab_size": 1},
        {"pad_token_id": None},
    ],
)
def test_other_sizes(fields: dict[str, Any]) -> None:
    model = torch_model("bert", **fields)
    ids = ids_of(2, 7)
    assert_equal(core_of(model), model, bound=FLOAT32, ours={"input_ids": to_mlx(ids)}, theirs={"input_ids": ids})


@TYPES
def test_epsilon_shows_when_the_input_of_a_norm_hardly_varies(model_type: str) -> None:
    # The variance of a norm's input is near 1e-6 then, where 1e-5 in place of 1e-12 changes all.
    model = torch_model(model_type)
    for parameter in model.parameters():
        parameter.data *= 1e-3
    ids = ids_of(2, 7)
    assert_equal(
        core_of(model, mx.float64), model, bound=1e-5, ours={"input_ids": to_mlx(ids)}, theirs={"input_ids": ids}
    )


@TYPES
@pytest.mark.parametrize("activation", ["relu", "gelu_new", "quick_gelu", "silu"])
def test_float64_is_float64_throughout(model_type: str, activation: str) -> None:
    name = "activation" if model_type == "distilbert" else "hidden_act"
    model = torch_model(model_type, **{name: activation})
    ids, keep = ids_of(3, 9), MASKS["right"]
    assert_equal(
        core_of(model, mx.float64),
        model,
        bound=1e-13,
        ours={"input_ids": to_mlx(ids), "attention_mask": to_mlx(keep)},
        theirs={"input_ids": ids, "attention_mask": keep},
    )


@TYPES
def test_float64_gelu_is_as_accurate_as_the_erf_of_mlx(model_type: str) -> None:
    model = torch_model(model_type)
    core = core_of(model, mx.float64)
    ids = ids_of(3, 9)
    assert_equal(core, model, bound=FLOAT32, ours={"input_ids": to_mlx(ids)}, theirs={"input_ids": ids})
    assert core(to_mlx(ids)).last_hidden_state.dtype == mx.float64


@TYPES
@pytest.mark.parametrize(("dtype", "name"), [(mx.float16, "float16"), (mx.bfloat16, "bfloat16")])
def test_half_precision_is_about_as_close_to_the_truth_as_torch_is(model_type: str, dtype: Any, name: str) -> None:
    # MLX rounds a product before it adds the bias, torch after: measured, that is 1.07 to 1.25 times torch's error.
    model = torch_model(model_type)
    core = core_of(model, dtype)
    ids, keep = ids_of(24, 9), MASKS["right"].repeat(8, 1)
    with torch.no_grad():
        truth = model(ids, attention_mask=keep).last_hidden_state
        half = model.to(getattr(torch, name))(ids, attention_mask=keep).last_hidden_state.double()
    for mask in (to_mlx(keep), to_mlx((1 - keep) * -1e9, mx.float32), to_mlx((1 - keep) * -1e4, dtype)):
        found = core(to_mlx(ids), mask)
        assert found.last_hidden_state.dtype == dtype
        error = to_torch(found.last_hidden_state) - truth
        assert error.square().mean() <= 1.5**2 * (half - truth).square().mean()
        assert all(mx.isfinite(value).all() for value in (found.mean_pooled, found.max_pooled))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32, mx.float64])
@pytest.mark.parametrize("form", ["int", "bool", "float", "additive", "infinite"])
def test_a_row_that_keeps_nothing_gets_the_mean_of_all_values(form: str, dtype: Any) -> None:
    model = torch_model("bert")
    keep = MASKS["right"].clone()
    keep[0] = 0
    forms = {
        "int": to_mlx(keep),
        "bool": to_mlx(keep.bool()),
        "float": to_mlx(keep, mx.float32),
        "additive": to_mlx((1 - keep) * -1e4, mx.float32),
        "infinite": mx.where(to_mlx(keep.bool()), 0.0, -mx.inf),
    }
    ids = ids_of(3, 9)
    core = core_of(model, dtype)
    with torch.no_grad():
        truth = model(ids, attention_mask=keep, output_attentions=True)
    for output in (core(to_mlx(ids), forms[form]), core(to_mlx(ids), forms[form], output_attentions=True)):
        bound = {mx.float16: 1e-2, mx.bfloat16: 8e-2}.get(dtype, FLOAT32)
        assert relative(output.last_hidden_state, truth.last_hidden_state) <= bound
        assert (output.mean_pooled[0] == 0).all() and (output.max_pooled[0] == 0).all()
        assert mx.isfinite(output.mean_pooled).all() and mx.isfinite(output.max_pooled).all()


def test_low_scores_stay_finite_under_an_additive_mask_in_float16() -> None:
    query = mx.full((1, 1, 2, 4), 8.0, dtype=mx.float16)
    bias = masks.for_attention(mx.full((1, 2), -1e9), mx.float16)
    # Scores of -256: added to the lowest float16 they would be infinite, and their softmax NaN.
    assert (cores.attention_probabilities(query, -query, bias, 1.0) == 0.5).all()
    assert (mx.fast.scaled_dot_product_attention(query, -query, query, scale=1.0, mask=bias) == 8.0).all()


def test_what_a_padded_place_holds_changes_nothing() -> None:
    core = core_of(torch_model("bert"))
    ids, keep = to_mlx(ids_of(3, 9)), to_mlx(MASKS["interior"])
    other = mx.where(keep == 1, ids, 5)
    first, second = core(ids, keep), core(other, keep)
    assert (mx.where(keep[..., None] == 1, first.last_hidden_state - second.last_hidden_state, 0) == 0).all()
    assert (first.mean_pooled == second.mean_pooled).all() and (first.max_pooled == second.max_pooled).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_equal_torch_s(name: str) -> None:
    inputs = torch.linspace(-12, 12, 1001, dtype=torch.float64)
    truth = ACT2FN[name](inputs)
    compute = cores.activation(name)
    assert relative(compute(to_mlx(inputs, mx.float32)), truth) <= 2e-7
    erf = name in ("gelu", "gelu_python", "gelu_10")
    assert relative(compute(to_mlx(inputs, mx.float64)), truth) <= (2e-7 if erf else 1e-15)
    for dtype, rounding in ((mx.float16, 2**-11), (mx.bfloat16, 2**-8)):
        rounded = inputs.to(torch.float32).to(getattr(torch, str(dtype).split(".")[-1])).double()
        found = to_torch(compute(to_mlx(inputs, mx.float32).astype(dtype)))
        assert ((found - ACT2FN[name](rounded)).abs() <= rounding * 1.01 * found.abs() + 1e-6).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_of_activations_equal_torch_s(name: str) -> None:
    inputs = (torch.linspace(-5, 7, 400, dtype=torch.float64) + 0.0123).requires_grad_()
    ACT2FN[name](inputs).sum().backward()
    found = mx.grad(lambda values: cores.activation(name)(values).sum())(to_mlx(inputs, mx.float32))
    assert relative(found, inputs.grad) <= 2e-6


def gradients(core: Any, ids: Any, mask: Any, probe: Any) -> dict[str, Any]:
    def loss(core: Any) -> Any:
        found = core(ids, mask)
        total = (found.last_hidden_state * probe).sum()
        return total if found.pooler_output is None else total + (found.pooler_output * probe[:, 0]).sum()

    return dict(tree_flatten(nn.value_and_grad(core, loss)(core)[1]))


@TYPES
@pytest.mark.parametrize(("dtype", "bound"), [(mx.float32, 1e-5), (mx.float64, 1e-12)])
def test_gradients_equal_torch_s(model_type: str, dtype: Any, bound: float) -> None:
    field = {"activation" if model_type == "distilbert" else "hidden_act": "gelu" if dtype == mx.float32 else "relu"}
    model = torch_model(model_type, **field)
    # Padding inside the text too: torch's padding_idx gives its embedding no gradient.
    ids = ids_of(3, 9, pad=model.config.pad_token_id)
    ids[1, 3] = model.config.pad_token_id
    keep = MASKS["right"]
    probe = torch.randn((3, 9, 32), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    truth = model(ids, attention_mask=keep)
    total = (truth.last_hidden_state * probe).sum()
    if model_type != "distilbert":
        total = total + (truth.pooler_output * probe[:, 0]).sum()
    total.backward()
    core = core_of(model, dtype)
    found = gradients(core, to_mlx(ids), to_mlx(keep), to_mlx(probe, dtype))
    assert found.keys() == parameter_names(core)
    scale = max(float(parameter.grad.abs().max()) for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        difference = float((to_torch(found[core_name(name)]) - parameter.grad).abs().max())
        # A key's bias shifts all scores of a query alike: its gradient is 0 but for rounding.
        size = scale if "k_lin.bias" in name or "key.bias" in name else float(parameter.grad.abs().max())
        assert difference <= bound * size, name
    pad = found["embeddings.word_embeddings.weight"][model.config.pad_token_id]
    assert (pad == 0).all()


@TYPES
@pytest.mark.parametrize("attentions", [False, True])
def test_dropout_is_where_transformers_has_it(
    model_type: str, attentions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both draw the same masks in the same order: only dropout in the same places gives the same numbers."""
    drops = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2}
    if model_type == "distilbert":
        drops = {"dropout": 0.3, "attention_dropout": 0.2}
    model = torch_model(model_type, **drops).train()
    core = core_of(model)
    ids, keep = ids_of(3, 9), MASKS["right"]
    shapes: dict[str, list[Any]] = {"torch": [], "mlx": []}

    def drawn(side: str, kept: float, shape: Any) -> torch.Tensor:
        shapes[side].append((round(kept, 6), tuple(shape)))
        generator = torch.Generator().manual_seed(len(shapes[side]))
        return torch.rand(tuple(shape), generator=generator, dtype=torch.float64) < kept

    def torch_dropout(values: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        return values * drawn("torch", 1 - p, values.shape) / (1 - p) if training and p else values

    monkeypatch.setattr(torch.nn.functional, "dropout", torch_dropout)
    monkeypatch.setattr(mx.random, "bernoulli", lambda kept, shape: to_mlx(drawn("mlx", kept, shape)))
    with torch.no_grad():
        truth = model(ids, attention_mask=keep, output_attentions=True)
    core.train()
    found = core(to_mlx(ids), to_mlx(keep), output_attentions=attentions)
    assert shapes["mlx"] == shapes["torch"] and len(shapes["mlx"]) == {"distilbert": 7}.get(model_type, 10)
    assert relative(found.last_hidden_state, truth.last_hidden_state) <= FLOAT32
    if attentions:
        assert all(relative(*pair) <= FLOAT32 for pair in zip(found.attentions, truth.attentions, strict=True))


def test_dropout_is_active_in_training_alone() -> None:
    core = core_of(torch_model("bert", hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5))
    ids = to_mlx(ids_of(2, 7))
    assert not core.training

    def states(**given: Any) -> Any:
        return core(ids, **given).last_hidden_state

    still = states()
    assert (states() == still).all()
    assert (states(training=True) != still).any() and not core.training
    core.train()
    assert (states() != still).any() and (states() != states()).any()
    assert (states(training=False) == still).all() and core.training
    core.eval()
    assert (states() == still).all()


def test_pooler_dropout_activation_and_width() -> None:
    config = BertConfig.mini(
        vocab_size=VOCABULARY,
        pooler_hidden_size=6,
        pooler_activation="relu",
        pooler_dropout=0.5,
        hidden_dropout_prob=0.0,
    )
    core = BertCore(dataclasses.replace(config, attention_probs_dropout_prob=0.0))
    core.pooler.dense.weight = core.pooler.dense.weight * 50
    output = core(to_mlx(ids_of(40, 4)))
    linear = output.last_hidden_state[:, 0] @ core.pooler.dense.weight.T
    assert output.pooler_output.shape == (40, 6)
    assert mx.allclose(output.pooler_output, mx.maximum(linear, 0), atol=1e-5)
    dropped = core(to_mlx(ids_of(40, 4)), training=True).pooler_output
    assert mx.allclose(mx.where(dropped != 0, dropped, 2 * mx.maximum(linear, 0)), 2 * mx.maximum(linear, 0), atol=1e-4)
    assert (dropped == 0).sum() > (output.pooler_output == 0).sum()


def test_new_weights_are_drawn_as_transformers_draws_them() -> None:
    config = BertConfig.mini(initializer_range=0.05, pad_token_id=3)
    mx.random.seed(1)
    first = dict(tree_flatten(BertCore(config).parameters()))
    mx.random.seed(1)
    second = dict(tree_flatten(BertCore(config).parameters()))
    for name, value in first.items():
        assert (value == second[name]).all()
        if value.ndim == 2:
            assert abs(float(value.std()) / 0.05 - 1) < 0.1, name
        else:
            assert (value == (0 if name.endswith("bias") else 1)).all()
    assert (first["embeddings.word_embeddings.weight"][3] == 0).all()


def test_the_output_holds_what_was_asked_for() -> None:
    core = core_of(torch_model("bert"))
    ids, keep = to_mlx(ids_of(3, 9)), to_mlx(MASKS["right"])
    output = core(ids, keep)
    assert output.hidden_states is None and output.attentions is None and output.attention_mask is keep
    with pytest.raises(dataclasses.FrozenInstanceError):
        output.pooler_output = None
    states = output.last_hidden_state
    assert (output.cls_output == states[:, 0]).all()
    for row, length in enumerate((5, 9, 2)):
        assert mx.allclose(output.mean_pooled[row], states[row, :length].mean(axis=0), atol=1e-6)
        assert (output.max_pooled[row] == states[row, :length].max(axis=0)).all()
    kinds = {"cls": output.cls_output, "mean": output.mean_pooled, "max": output.max_pooled}
    for kind, value in {**kinds, "pooler": output.pooler_output}.items():
        assert output.get_pooled_output(kind) is value
    with pytest.raises(ValueError, match="pooling 'sum' is unknown: expected one of cls, mean, max, pooler"):
        output.get_pooled_output("sum")
    bare = core(ids, keep, compute_pooling=False)
    with pytest.raises(ValueError, match="no 'mean' pooling: additional pooling was not asked for"):
        bare.get_pooled_output("mean")
    assert bare.pooler_output is not None


def test_poolings_that_the_configuration_does_not_want() -> None:
    core = BertCore(BertConfig.mini(vocab_size=VOCABULARY, compute_additional_pooling=False))
    assert core(to_mlx(ids_of(1, 3))).mean_pooled is None


def test_a_model_without_a_pooler() -> None:
    core = BertCore(BertConfig.mini(vocab_size=VOCABULARY), add_pooling_layer=False)
    assert not any(name.startswith("pooler") for name in parameter_names(core))
    output = core(to_mlx(ids_of(1, 3)))
    assert output.pooler_output is None
    with pytest.raises(ValueError, match="no 'pooler' pooling: the model has no pooler"):
        output.get_pooled_output("pooler")


def array(*values: Any, dtype: Any = None) -> Any:
    return mx.array(list(values), dtype=dtype or mx.int32)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": array([2, VOCABULARY])}, "input_ids are not all in 0 to 63, vocab_size=64"),
        ({"input_ids": array([2, -1])}, "input_ids are not all in 0 to 63"),
        ({"input_ids": array([2.0], dtype=mx.float32)}, "input_ids has dtype mlx.core.float32: expected an integer"),
        ({"input_ids": array([True], dtype=mx.bool_)}, "input_ids has dtype mlx.core.bool"),
        ({"input_ids": array(2, 3)}, r"input_ids has shape \(2,\): expected \(rows, tokens\)"),
        ({"input_ids": [[2, 3]]}, "input_ids is of type list: expected an mlx.core.array"),
        ({"input_ids": mx.zeros((0, 3), dtype=mx.int32)}, "the batch is empty: 0 rows of 3 tokens"),
        ({"input_ids": mx.zeros((2, 0), dtype=mx.int32)}, "the batch is empty"),
        ({"input_ids": mx.zeros((1, MAXIMUM + 1), dtype=mx.int32)}, "has 17 tokens: expected at most 16"),
        ({}, "either input_ids or inputs_embeds"),
        ({"input_ids": array([2]), "inputs_embeds": mx.zeros((1, 1, 32))}, "either input_ids or inputs_embeds"),
        ({"inputs_embeds": mx.zeros((1, 1, 31))}, "inputs_embeds has width 31: expected hidden_size=32"),
        ({"inputs_embeds": mx.zeros((1, 32))}, r"inputs_embeds has shape \(1, 32\): expected \(rows, tokens, hidden\)"),
        ({"token_type_ids": array([0, 2, 0])}, "token_type_ids are not all in 0 to 1, type_vocab_size=2"),
        ({"token_type_ids": array([0, 0])}, r"token_type_ids has shape \(1, 2\)"),
        ({"position_ids": array([0, 1, MAXIMUM])}, "position_ids are not all in 0 to 15, max_position_embeddings=16"),
        ({"position_ids": array([0, 1, -1])}, "position_ids are not all in 0 to 15"),
        ({"position_ids": array([0.0, 1, 2], dtype=mx.float32)}, "position_ids has dtype"),
        ({"attention_mask": array([1, 1])}, r"attention_mask has shape \(1, 2\).*\(1, 3\)"),
        ({"attention_mask": array(1, 1, 1)}, r"attention_mask has shape \(3,\)"),
        ({"attention_mask": [[1, 1, 1]]}, "attention_mask is of type list"),
        ({"attention_mask": array([1, -1, 1])}, "attention_mask is of integers and has negative values"),
        ({"attention_mask": array([1, float("nan"), 1], dtype=mx.float32)}, "attention_mask has NaN"),
    ],
)
def test_a_batch_that_mlx_would_read_garbage_for_is_refused_in_one_line(given: dict[str, Any], message: str) -> None:
    core = core_of(torch_model("bert", num_hidden_layers=1))
    extras = {"token_type_ids", "position_ids", "attention_mask"}
    given = ({"input_ids": array([2, 3, 4])} if given.keys() & extras else {}) | given
    with pytest.raises(ValueError, match=message) as caught:
        core(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [None, {"hidden_size": 32}, "bert-base-uncased"])
def test_what_is_no_configuration_is_told_what_makes_one(config: Any) -> None:
    with pytest.raises(TypeError, match=f"config is of type {type(config).__name__}: .* BertConfig.from_dict makes"):
        BertCore(config)


def test_distilbert_has_no_token_types() -> None:
    core = core_of(torch_model("distilbert", num_hidden_layers=1))
    with pytest.raises(ValueError, match="DistilBERT has no token types"):
        core(array([2, 3]), token_type_ids=array([0, 0]))


@pytest.mark.parametrize("dtype", [mx.int8, mx.uint8, mx.int16, mx.int64, mx.uint32, mx.uint64])
def test_ids_and_masks_of_every_integer_dtype(dtype: Any) -> None:
    core = core_of(torch_model("bert", num_hidden_layers=1))
    ids, keep = to_mlx(ids_of(3, 9)), to_mlx(MASKS["right"])
    types = mx.zeros_like(ids)
    truth = core(ids, keep, types).last_hidden_state
    found = core(ids.astype(dtype), keep.astype(dtype), types.astype(dtype)).last_hidden_state
    assert (found == truth).all()


@TYPES
def test_a_compiled_model_gives_the_same_numbers_and_reads_no_value(model_type: str) -> None:
    core = core_of(torch_model(model_type))
    ids, keep = to_mlx(ids_of(3, 9)), to_mlx(MASKS["right"])
    truth = core(ids, keep)

    @mx.compile
    def compiled(ids: Any, keep: Any) -> Any:
        output = core(ids, keep)
        return output.last_hidden_state, output.mean_pooled

    for mask in (keep, keep.astype(mx.bool_), (1 - keep) * -1e9):
        states, mean = compiled(ids, mask)
        assert mx.allclose(states, truth.last_hidden_state, rtol=0, atol=4e-6)
        assert mx.allclose(mean, truth.mean_pooled, rtol=0, atol=4e-6)
    compiled(ids + VOCABULARY, keep)


def test_a_training_step_can_be_compiled() -> None:
    core = core_of(torch_model("bert", num_hidden_layers=1))
    core.train()
    import mlx.optimizers as optimizers

    optimizer = optimizers.SGD(learning_rate=1e-3)
    state = [core.state, optimizer.state, mx.random.state]
    ids = to_mlx(ids_of(3, 9))

    def step(ids: Any) -> Any:
        loss, found = nn.value_and_grad(core, lambda core: mx.square(core(ids).pooler_output).mean())(core)
        optimizer.update(core, found)
        return loss

    step = mx.compile(step, inputs=state, outputs=state)
    losses = []
    for _ in range(20):
        losses.append(step(ids))
        mx.eval(state)
    assert float(mx.stack(losses[-5:]).mean()) < float(mx.stack(losses[:5]).mean())


def test_frozen_parts_get_no_gradient() -> None:
    core = core_of(torch_model("bert", num_hidden_layers=2))
    ids, keep = to_mlx(ids_of(3, 9)), to_mlx(MASKS["right"])
    core.embeddings.freeze()
    core.encoder.layer[0].freeze()
    found = gradients(core, ids, keep, mx.ones((3, 9, 32)))
    assert found and all(name.startswith(("encoder.layer.1.", "pooler.")) for name in found)
    core.unfreeze()
    assert gradients(core, ids, keep, mx.ones((3, 9, 32))).keys() == parameter_names(core)


def test_both_ways_round_of_a_product_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    core = core_of(torch_model("bert", hidden_act="relu"), mx.float64)
    ids, keep = to_mlx(ids_of(3, 9)), to_mlx(MASKS["right"])
    first = core(ids, keep)
    monkeypatch.setattr(cores.sys, "platform", "darwin")
    second = core(ids, keep)
    assert mx.abs(first.last_hidden_state - second.last_hidden_state).max() <= 1e-13
    assert mx.abs(first.pooler_output - second.pooler_output).max() <= 1e-13


def test_a_product_formed_in_blocks_gives_the_same_numbers_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    core = core_of(torch_model("bert", hidden_act="relu"), mx.float64)
    ids, keep = to_mlx(ids_of(3, 9)), to_mlx(MASKS["right"])
    weights = mx.random.normal((3, 9, 32))

    def found() -> list[mx.array]:
        return [core(ids, keep).last_hidden_state, *gradients(core, ids, keep, weights).values()]

    whole = found()
    for block in (1, 4, 27):
        monkeypatch.setattr(cores, "_BLOCK", block)
        assert all(mx.abs(mine - other).max() <= 1e-12 for mine, other in zip(found(), whole, strict=True)), block


def test_two_calls_and_two_models_give_equal_bits() -> None:
    model = torch_model("bert")
    ids, keep = to_mlx(ids_of(3, 9)), to_mlx(MASKS["right"])
    results = [core(ids, keep).last_hidden_state for core in (core_of(model), core_of(model)) for _ in range(2)]
    assert all((result == results[0]).all() for result in results)
