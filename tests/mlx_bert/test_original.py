# SPDX-License-Identifier: Apache-2.0
"""The torch originals of BERT on MLX against their golden files, a second implementation, and their description."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from harness import families
from harness.capture import capture
from harness.cases.weights import sensitising_state
from harness.families import Family
from harness.golden import read_golden, verify
from reference_models.mlx_bert import golden as golden_files
from reference_models.mlx_bert import original
from reference_models.mlx_bert.original import BertOriginal, build, configuration, fields_of, maximum_length, run

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden" / "mlx_bert"
FILES = sorted(path.name for path in GOLDEN.glob("*.safetensors"))
MODEL_TYPES = ("bert", "distilbert", "roberta")
EACH = pytest.mark.parametrize("model_type", MODEL_TYPES)
SIZES: dict[str, Any] = {
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "vocab_size": 23,
    "max_position_embeddings": 9,
}


def fields_for(model_type: str, **more: Any) -> dict[str, Any]:
    own = {"bert": {"type_vocab_size": 3}, "distilbert": {}, "roberta": {"type_vocab_size": 2, "pad_token_id": 1}}
    return {"model_type": model_type, **SIZES, **own[model_type], **more}


def sensitive(fields: Mapping[str, Any], **options: Any) -> Any:
    """The model in float64, with weights drawn so wide that each of them matters."""
    model = build(fields, **options).double()
    model.load_state_dict(sensitising_state(model, gains={}, seed=3))
    return model


def tokens(rows: int, length: int, *, seed: int = 1) -> Tensor:
    """Tokens of which none is padding."""
    return torch.randint(4, 23, (rows, length), generator=torch.Generator().manual_seed(seed))


def assert_close(found: Any, expected: Any, bound: float = 1e-12) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=0, atol=bound)


def far(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() > 1e-3)


# A second implementation, written from the description alone: NumPy, float64, one loop for all three models.


ACTIVATIONS: Mapping[str, Any] = {
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    "gelu_new": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "gelu_pytorch_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def second_bert(
    fields: Mapping[str, Any],
    weights: Mapping[str, np.ndarray],
    input_ids: np.ndarray,
    attention_mask: np.ndarray | None = None,
    token_type_ids: np.ndarray | None = None,
) -> tuple[list[np.ndarray], np.ndarray | None]:
    """Hidden states, the embeddings first, and the pooler's output, from weights with BERT's names."""

    def dense(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        epsilon = fields.get("layer_norm_eps", 1e-12)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def softmax(scores: np.ndarray) -> np.ndarray:
        powers = np.exp(scores - scores.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True)

    positions = np.broadcast_to(np.arange(input_ids.shape[1]), input_ids.shape)
    if fields["model_type"] == "roberta":
        real = input_ids != fields["pad_token_id"]
        positions = np.cumsum(real, axis=1) * real + fields["pad_token_id"]
    x = weights["embeddings.word_embeddings.weight"][input_ids]
    x = x + weights["embeddings.position_embeddings.weight"][positions]
    if "embeddings.token_type_embeddings.weight" in weights:
        types = np.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        x = x + weights["embeddings.token_type_embeddings.weight"][types]
    states = [norm(x, "embeddings.LayerNorm")]
    heads = fields["num_attention_heads"]
    for layer in range(fields["num_hidden_layers"]):
        x, block = states[-1], f"encoder.layer.{layer}"
        rows, length, width = x.shape

        def split(name: str, x: np.ndarray = x, block: str = block) -> np.ndarray:
            projected = dense(x, f"{block}.attention.self.{name}")
            return projected.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)

        scores = split("query") @ split("key").transpose(0, 1, 3, 2) / math.sqrt(width // heads)
        if attention_mask is not None:
            scores = np.where(attention_mask[:, None, None, :] != 0, scores, -1e300)
        mixed = (softmax(scores) @ split("value")).transpose(0, 2, 1, 3).reshape(rows, length, width)
        x = norm(x + dense(mixed, f"{block}.attention.output.dense"), f"{block}.attention.output.LayerNorm")
        inner = ACTIVATIONS[fields.get("hidden_act", "gelu")](dense(x, f"{block}.intermediate.dense"))
        states.append(norm(x + dense(inner, f"{block}.output.dense"), f"{block}.output.LayerNorm"))
    pooled = np.tanh(dense(states[-1][:, 0], "pooler.dense")) if "pooler.dense.weight" in weights else None
    return states, pooled


def named_weights(model: Any) -> dict[str, np.ndarray]:
    return {original.port_key(key): value.double().numpy() for key, value in model.state_dict().items()}


def assert_as_second(fields: Mapping[str, Any], model: Any, *given: Tensor | None) -> None:
    with torch.no_grad():
        found = run(model, *given, everything=True)
    states, pooled = second_bert(
        fields, named_weights(model), *(None if each is None else each.numpy() for each in given)
    )
    for name, expected in original.named_states(states).items():
        assert found[name].dtype == torch.float64
        assert_close(found[name], expected)
    assert_close(found["last_hidden_state"], states[-1])
    assert ("pooler_output" in found) == (fields["model_type"] != "distilbert") == (pooled is not None)
    if pooled is not None:
        assert_close(found["pooler_output"], pooled)


@EACH
def test_a_second_implementation_gives_the_same_at_every_length(model_type: str) -> None:
    fields = fields_for(model_type)
    model = sensitive(fields)
    assert maximum_length(fields) == (7 if model_type == "roberta" else 9)
    for length in range(1, maximum_length(fields) + 1):
        assert_as_second(fields, model, tokens(2, length, seed=length))


@EACH
def test_one_token_more_than_the_maximum_is_refused(model_type: str) -> None:
    fields = fields_for(model_type)
    with pytest.raises((RuntimeError, IndexError)):
        run(sensitive(fields), tokens(1, maximum_length(fields) + 1))


@EACH
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_second_implementation_gives_the_same_with_padding(model_type: str, side: str) -> None:
    fields = fields_for(model_type)
    mask = torch.ones(3, 6, dtype=torch.long)
    ids = tokens(3, 6)
    for row, count in enumerate((0, 1, 4)):
        padding = slice(6 - count, 6) if side == "right" else slice(0, count)
        mask[row, padding] = 0
        ids[row, padding] = configuration(fields).pad_token_id
    assert_as_second(fields, sensitive(fields), ids, mask)


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_a_second_implementation_gives_the_same_with_token_types(model_type: str) -> None:
    fields = fields_for(model_type)
    types = torch.randint(fields["type_vocab_size"], (2, 6), generator=torch.Generator().manual_seed(2))
    model = sensitive(fields)
    assert_as_second(fields, model, tokens(2, 6), None, types)
    plain, typed = (run(model, tokens(2, 6), None, each)["last_hidden_state"] for each in (None, types))
    assert far(plain, typed)


@EACH
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_a_second_implementation_gives_the_same_with_other_activations(model_type: str, activation: str) -> None:
    fields = fields_for(model_type, hidden_act=activation)
    assert_as_second(fields, sensitive(fields), tokens(2, 5))


def test_the_epsilon_is_used_in_every_norm() -> None:
    fields = fields_for("bert", layer_norm_eps=0.5)
    assert_as_second(fields, sensitive(fields), tokens(2, 5))


def test_roberta_counts_positions_behind_its_padding_id_and_skips_padding() -> None:
    fields = fields_for("roberta", pad_token_id=0)
    assert maximum_length(fields) == 8
    ids = tokens(1, 6)
    ids[0, 2] = 0  # in the middle of a row
    assert_as_second(fields, sensitive(fields), ids)


# What a call takes and gives


@EACH
def test_masks_of_integers_floats_and_bool_are_one(model_type: str) -> None:
    model, ids = sensitive(fields_for(model_type)), tokens(2, 5)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    expected = run(model, ids, mask)["last_hidden_state"]
    for other in (mask.bool(), mask.double()):
        assert_close(run(model, ids, other)["last_hidden_state"].detach(), expected.detach(), 0.0)
    assert_close(original.run_masked(model, ids, mask.bool())["last_hidden_state"].detach(), expected.detach(), 0.0)
    assert far(expected, run(model, ids)["last_hidden_state"])
    changed = torch.where(mask.bool(), ids, (ids + 1) % 19 + 4)
    kept = mask.bool()
    assert_close(run(model, changed, mask)["last_hidden_state"][kept].detach(), expected[kept].detach())


@EACH
def test_a_row_with_nothing_to_see_averages_everything_in_float32(model_type: str) -> None:
    model = sensitive(fields_for(model_type)).float()
    found = run(model, tokens(2, 5), torch.tensor([[0] * 5, [1] * 5]), everything=True)
    assert_close(found["attention.0"][0].detach(), np.full((3, 5, 5), 0.2), 1e-7)
    assert bool(found["last_hidden_state"].isfinite().all())


@EACH
def test_a_model_is_in_evaluation_mode_and_eager(model_type: str) -> None:
    model = build(fields_for(model_type, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5))
    assert not any(part.training for part in model.modules())
    assert model.config._attn_implementation == "eager"
    ids = tokens(2, 5)
    assert torch.equal(run(model, ids)["last_hidden_state"], run(model, ids)["last_hidden_state"])


@EACH
def test_dropout_acts_where_the_fields_say_in_training(model_type: str) -> None:
    for field in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model, ids = sensitive(fields_for(model_type, **none)).train(), tokens(2, 5)
        assert not far(run(model, ids)["last_hidden_state"], run(model, ids)["last_hidden_state"])
        model = sensitive(fields_for(model_type, **none | {field: 0.5})).train()
        torch.manual_seed(0)
        assert far(run(model, ids)["last_hidden_state"], run(model, ids)["last_hidden_state"])


def test_positions_can_be_given() -> None:
    for model_type in ("bert", "roberta"):
        fields = fields_for(model_type)
        model, ids = sensitive(fields), tokens(2, 5)
        first = 0 if model_type == "bert" else 2
        positions = torch.arange(first, first + 5).expand(2, 5)
        plain = run(model, ids)["last_hidden_state"].detach()
        assert_close(run(model, ids, position_ids=positions)["last_hidden_state"].detach(), plain, 0.0)
        turned = run(model, ids, position_ids=positions.flip(1))["last_hidden_state"]
        assert far(turned, plain)


def test_distilbert_refuses_token_types() -> None:
    # transformers 5 would take them and leave them aside.
    with pytest.raises(ValueError, match=r"^DistilBertModel takes no token_type_ids; leave it out$"):
        run(sensitive(fields_for("distilbert")), tokens(2, 5), None, torch.zeros(2, 5, dtype=torch.long))


@EACH
def test_gradients_are_float64_and_nothing_is_left_out(model_type: str) -> None:
    model = sensitive(fields_for(model_type))
    outputs = run(model, tokens(2, 6))
    sum(value.square().sum() for value in outputs.values()).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float64, key


@EACH
def test_the_row_of_the_padding_id_has_no_gradient(model_type: str) -> None:
    # torch leaves it out of the gradient of an embedding with padding_idx; RoBERTa has one for positions too.
    fields = fields_for(model_type)
    model, pad = sensitive(fields), configuration(fields).pad_token_id
    ids = tokens(2, 5)
    ids[:, 3:] = pad
    run(model, ids)["last_hidden_state"].square().sum().backward()
    assert not model.embeddings.word_embeddings.weight.grad[pad].any()
    positions = model.embeddings.position_embeddings.weight.grad
    assert bool(positions[pad].any()) == (model_type != "roberta")


# Configurations


def test_distilbert_takes_its_own_names_and_berts() -> None:
    own = {"dim": 12, "n_layers": 2, "n_heads": 3, "hidden_dim": 20, "activation": "relu", "vocab_size": 23}
    berts = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}
    berts |= {"model_type": "distilbert", "hidden_act": "relu", "vocab_size": 23}
    assert configuration(own).to_dict() == configuration(berts).to_dict()
    assert configuration(own).hidden_dim == 20
    with pytest.raises(ValueError, match=r"^hidden_size and dim are one field of DistilBERT"):
        configuration(berts | {"dim": 12})


@EACH
def test_fields_and_configuration_are_inverse(model_type: str) -> None:
    fields = fields_for(model_type, hidden_dropout_prob=0.25, attention_probs_dropout_prob=0.5, classifier_dropout=0.3)
    found = fields_of(configuration(fields))
    assert {name: found.get(name) for name in fields} == fields
    assert configuration(found).to_dict() == configuration(fields).to_dict()
    assert ("type_vocab_size" in found) == ("layer_norm_eps" in found) == (model_type != "distilbert")


@EACH
def test_what_is_not_given_is_as_transformers_has_it(model_type: str) -> None:
    config = configuration({"model_type": model_type})
    expected = getattr(transformers, original.CONFIGURATIONS[model_type])()
    assert config.to_dict() == expected.to_dict()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "albert"}, "model_type is 'albert', expected bert, distilbert, roberta"),
        ({"hiden_size": 12}, "'hiden_size' is no field of bert; did you mean 'hidden_size'?"),
        ({"position_embedding_type": "relative_key"}, "'position_embedding_type' is no field of bert"),
        ({"dim": 12, "layer_norm_eps": 1e-5}, "layer_norm_eps is 1e-05, and DistilBERT's is always 1e-12"),
        ({"hidden_size": 12, "qa_dropout": 0.1}, "'qa_dropout' is no field of bert"),
    ],
)
def test_what_is_no_configuration_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as caught:
        configuration(fields)
    assert "\n" not in str(caught.value)


def test_a_head_that_a_model_has_not_is_refused() -> None:
    with pytest.raises(ValueError, match="roberta has no head 'pretraining'"):
        build(fields_for("roberta"), head="pretraining")


# Names


def test_every_tensor_of_distilbert_has_a_name_in_bert() -> None:
    berts = set(build(fields_for("bert")).state_dict())
    distilberts = {original.port_key(key) for key in build(fields_for("distilbert")).state_dict()}
    assert berts - distilberts == {
        "embeddings.token_type_embeddings.weight",
        "pooler.dense.weight",
        "pooler.dense.bias",
    }
    assert distilberts <= berts
    assert all(original.port_key(key) == key for key in berts)
    headed = build(fields_for("distilbert"), head="masked_lm").state_dict()
    assert "distilbert.encoder.layer.1.output.LayerNorm.bias" in {original.port_key(key) for key in headed}


@EACH
def test_taps_are_in_the_order_data_passes_and_at_places_that_run(model_type: str) -> None:
    fields = fields_for(model_type)
    model, taps = sensitive(fields), original.taps(fields)
    found, seen = capture(
        model, {tap.name: tap.original for tap in taps}, lambda: run(model, tokens(2, 5), everything=True)
    )
    assert len(taps) == 2 + 2 * 8 + (model_type != "distilbert")
    assert {tap.name for tap in taps} == set(seen)
    assert list(seen) == [tap.name for tap in taps]
    for name in ("embedding", "block.0", "block.1"):
        assert torch.equal(seen[name], found[name])
    if model_type != "distilbert":
        assert torch.equal(seen["pooler"].tanh(), found["pooler_output"])
    names = {name for name, _ in build(fields_for("bert")).named_modules()}
    assert {tap.port for tap in taps} <= names


# Heads


@EACH
def test_a_classifier_of_rows_gives_what_its_layers_say(model_type: str) -> None:
    fields = fields_for(model_type)
    model = original.build_head(original.SequenceClassificationOriginal, fields, {"num_labels": 3}).double()
    state = sensitising_state(model, gains={}, seed=4)
    model.load_state_dict(state)
    ids, mask = tokens(2, 5), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    labels = torch.tensor([2, 0])
    body = run(getattr(model, model_type), ids, mask)
    first = body["last_hidden_state"][:, 0]
    hidden = {
        "bert": lambda: body["pooler_output"],
        "distilbert": lambda: (first @ state["pre_classifier.weight"].T + state["pre_classifier.bias"]).relu(),
        "roberta": lambda: (first @ state["classifier.dense.weight"].T + state["classifier.dense.bias"]).tanh(),
    }[model_type]()
    last = "classifier.out_proj" if model_type == "roberta" else "classifier"
    expected = hidden @ state[f"{last}.weight"].T + state[f"{last}.bias"]
    found = run(model, ids, mask, labels=labels)
    assert_close(found["logits"].detach(), expected.detach())
    assert_close(found["loss"].detach(), torch.nn.functional.cross_entropy(expected, labels).detach())
    assert torch.equal(original.run_classifier(model, ids, mask.bool()), found["logits"])


@EACH
def test_a_masked_language_model_ties_its_decoder_and_ignores_minus_100(model_type: str) -> None:
    model = sensitive(fields_for(model_type), head="masked_lm")
    ids = tokens(2, 5)
    labels = ids.clone()
    labels[:, 1:3] = -100
    found = original.run_original(model, ids, labels)
    assert found["logits"].shape == (2, 5, 23) and found["logits"].dtype == torch.float64
    kept = labels != -100
    expected = torch.nn.functional.cross_entropy(found["logits"][kept], labels[kept])
    assert_close(found["loss"].detach(), expected.detach())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@EACH
def test_a_classifier_of_tokens_gives_one_row_of_logits_per_token(model_type: str) -> None:
    model = sensitive(fields_for(model_type), head="token_classification", num_labels=4)
    ids = tokens(2, 5)
    state = model.state_dict()
    body = run(getattr(model, model_type), ids)["last_hidden_state"]
    expected = body @ state["classifier.weight"].T + state["classifier.bias"]
    assert_close(original.run_original(model, ids, None)["logits"].detach(), expected.detach())


def test_the_doors_give_the_classes_of_the_model_type() -> None:
    doors = {
        "BertModel": (BertOriginal, "bert"),
        "DistilBertModel": (BertOriginal, "distilbert"),
        "RobertaForMaskedLM": (original.MaskedLMOriginal, "roberta"),
        "DistilBertForSequenceClassification": (original.SequenceClassificationOriginal, "distilbert"),
        "BertForTokenClassification": (original.TokenClassificationOriginal, "bert"),
    }
    for name, (door, model_type) in doors.items():
        assert type(original.build_original(door, fields_for(model_type))) is getattr(transformers, name)


# Golden files


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The family, with no more than golden files need."""
    monkeypatch.setattr(families, "_registered", {})
    families.register_family(
        Family(
            name="of_tests",
            features=frozenset(),
            configurations=lambda: pytest.fail("a golden file needs no drawn configuration"),
            original=f"{original.__name__}:BertOriginal",
            build_original=original.build_original,
            run_original=lambda *_: pytest.fail("golden files of this family are run by a function of its own"),
            golden=golden_files.golden,
            golden_names=(golden_files.GOLDEN_FAMILY,),
            golden_bounds=golden_files.BOUNDS,
        )
    )
    return


def test_all_four_vectors_are_here() -> None:
    assert len(FILES) == 4


@pytest.mark.parametrize("file", FILES)
def test_vectors(registered: None, file: str) -> None:
    (result,) = verify(GOLDEN / file)
    assert (result.status, result.reason) == ("verified", "")
    assert set(result.errors) == set(read_golden(GOLDEN / file).stored)
    assert {result.bounds[name] for name in result.bounds if "_f64" in name} == {1e-12}


class WithRelu(transformers.BertModel):
    """BERT with the activation that upstream's port has."""

    def __init__(self, config: Any) -> None:
        config.hidden_act = "relu"
        super().__init__(config)


def test_vectors_fail_with_another_activation(registered: None) -> None:
    override = {golden_files.GOLDEN_FAMILY: WithRelu}
    (result,) = verify(GOLDEN / "bert_nomask_grads.safetensors", original_override=override)
    assert result.status == "failed"
    assert max(result.errors.values()) > 1e-2 > 1e-12 >= result.errors["outputs_f64/embedding"]


def as_second(file: str, **changes: Any) -> tuple[Any, Mapping[str, Any]]:
    golden = read_golden(GOLDEN / file)
    fields = {**golden_files.fields(golden), **changes}
    states, pooled = second_bert(fields, golden_files.weights(golden), **golden_files.inputs(golden))
    return golden, golden_files.named(golden, hidden_states=states, pooler_output=pooled)


@pytest.mark.parametrize("file", FILES)
def test_the_second_implementation_gives_the_vectors_too(file: str) -> None:
    golden, produced = as_second(file)
    errors = golden_files.differences(golden, produced)
    assert set(errors) == {name for name in golden.stored if name.startswith("outputs_f64/")}
    assert max(errors.values()) <= 1e-12


@pytest.mark.parametrize("file", FILES)
def test_differences_sees_another_implementation_that_is_wrong(file: str) -> None:
    golden, produced = as_second(file, hidden_act="relu")
    errors = golden_files.differences(golden, produced)
    assert errors["outputs_f64/embedding"] <= 1e-12
    assert errors["outputs_f64/block.0"] > 1e-2


def test_differences_sees_what_is_missing_too_much_of_another_shape_or_not_a_number() -> None:
    golden, produced = as_second("bert_nomask_grads.safetensors")
    changed = dict(produced)
    del changed["outputs_f64/block.0"]
    changed["outputs_f64/block.7"] = changed["outputs_f64/block.1"]
    changed["outputs_f64/embedding"] = changed["outputs_f64/embedding"][:1]
    changed["outputs_f64/pooler_output"] = changed["outputs_f64/pooler_output"] * np.nan
    errors = golden_files.differences(golden, changed)
    infinite = {name.removeprefix("outputs_f64/") for name, error in errors.items() if error == math.inf}
    assert infinite == {"block.0", "block.7", "embedding", "pooler_output"}


def test_gradients_of_another_implementation_go_by_berts_names() -> None:
    golden = read_golden(GOLDEN / "bert_nomask_grads.safetensors")
    stored = {
        name.removeprefix("grads_f64/"): value.numpy() for name, value in golden.stored.items() if "grads" in name
    }
    given: dict[str, Any] = {"hidden_states": [np.zeros((2, 16, 16))] * 3, "pooler_output": np.zeros((2, 16))}
    produced = golden_files.named(golden, **given, gradients=stored)
    errors = golden_files.differences(golden, produced)
    assert {error for name, error in errors.items() if "grads" in name} == {0.0}
    wrong = {**stored, "pooler.dense.bias": stored["pooler.dense.bias"] * 1.01}
    errors = golden_files.differences(golden, golden_files.named(golden, **given, gradients=wrong))
    assert errors["grads_f64/pooler.dense.bias"] > 1e-4


def test_gradients_of_distilbert_are_stored_by_its_own_names() -> None:
    golden = read_golden(GOLDEN / "distilbert_rightpad.safetensors")
    states = [np.zeros((3, 12, 24))] * 3
    gradients = {"encoder.layer.1.output.LayerNorm.bias": np.ones(24), "embeddings.LayerNorm.bias": np.ones(24)}
    produced = golden_files.named(golden, hidden_states=states, pooler_output=None, gradients=gradients)
    found = {name for name in produced if name.startswith("grads_f64/")}
    assert found == {"grads_f64/transformer.layer.1.output_layer_norm.bias", "grads_f64/embeddings.LayerNorm.bias"}
