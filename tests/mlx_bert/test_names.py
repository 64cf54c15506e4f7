# SPDX-License-Identifier: Apache-2.0
"""Every name that transformers gives a tensor, and every other naming, is the right parameter or is listed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from reference_models.mlx_bert import names
from reference_models.mlx_bert.names import NamesError, canonical, original, parameter_shapes

SIZES: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 7,
    "type_vocab_size": 3,
    "pooler_hidden_size": None,
    "quantization": None,
}


def sizes(model_type: str = "bert", **changes: Any) -> Any:
    return SimpleNamespace(**SIZES | {"model_type": model_type} | changes)


def transformers_model(model_type: str, task: str = "Model", **options: Any) -> Any:
    import transformers

    stem = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}[model_type]
    fields = {"vocab_size": 11, "max_position_embeddings": 7}
    if model_type == "distilbert":
        fields |= {"dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 12}
    else:
        fields |= {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
        fields |= {"type_vocab_size": 3}
    config = getattr(transformers, f"{stem}Config")(**fields)
    return getattr(transformers, f"{stem}{task}")(config, **options)


@pytest.mark.parametrize("model_type", names.MODEL_TYPES)
def test_the_parameters_are_those_of_transformers_model_with_their_shapes(model_type: str) -> None:
    model = transformers_model(model_type)
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    ours = parameter_shapes(sizes(model_type))
    assert {original(name, model_type): shape for name, shape in ours.items()} == theirs
    there = canonical(theirs, model_type)
    assert dict(there.parameters) == {original(name, model_type): name for name in ours}
    assert (there.head, there.dropped, there.unexpected) == ((), (), ())


def test_a_model_without_a_pooler_has_all_other_parameters() -> None:
    model = transformers_model("bert", add_pooling_layer=False)
    assert set(parameter_shapes(sizes(), pooler=False)) == {name for name, _ in model.named_parameters()}


def test_the_pooler_has_a_width_of_its_own() -> None:
    shapes = parameter_shapes(sizes(pooler_hidden_size=5))
    assert (shapes["pooler.dense.weight"], shapes["pooler.dense.bias"]) == ((5, 8), (5,))


@pytest.mark.parametrize(
    ("model_type", "task"),
    [
        ("bert", "ForSequenceClassification"),
        ("bert", "ForTokenClassification"),
        ("bert", "ForMaskedLM"),
        ("bert", "ForPreTraining"),
        ("bert", "ForQuestionAnswering"),
        ("roberta", "ForSequenceClassification"),
        ("roberta", "ForMaskedLM"),
        ("distilbert", "ForSequenceClassification"),
        ("distilbert", "ForMaskedLM"),
    ],
)
def test_a_task_models_encoder_is_taken_and_its_head_told_apart(model_type: str, task: str) -> None:
    model = transformers_model(model_type, task)
    keys = list(model.state_dict())
    there = canonical(keys, model_type)
    mine = [key for key in keys if key.startswith(f"{model_type}.")]
    assert list(there.parameters) == mine
    plain = canonical([key.removeprefix(f"{model_type}.") for key in mine], model_type)
    assert list(there.parameters.values()) == list(plain.parameters.values())
    assert set(there.head) == set(keys) - set(mine) and there.head
    assert there.unexpected == ()


def test_mlx_examples_names_are_those_that_its_converter_makes() -> None:
    for parameter in parameter_shapes(sizes()):
        # The replacements of mlx-examples' bert/convert.py, in its order.
        key = parameter.replace(".layer.", ".layers.")
        for word in ("key", "query", "value"):
            key = key.replace(f".self.{word}.", f".{word}_proj.")
        for old, new in [
            (".attention.output.dense.", ".attention.out_proj."),
            (".attention.output.LayerNorm.", ".ln1."),
            (".output.LayerNorm.", ".ln2."),
            (".intermediate.dense.", ".linear1."),
            (".output.dense.", ".linear2."),
            (".LayerNorm.", ".norm."),
            ("pooler.dense.", "pooler."),
        ]:
            key = key.replace(old, new)
        together = [key, "encoder.layers.0.ln1.weight", "encoder.layers.0.ln2.weight", "encoder.layers.1.ln2.bias"]
        assert canonical(dict.fromkeys(together), "bert").parameters[key] == parameter


def test_both_namings_of_bert_playground_are_known() -> None:
    older = {
        "embeddings.LayerNorm.bias": "embeddings.LayerNorm.bias",
        "encoder_layers.1.transformer_layer.attention.query_proj.weight": "encoder.layer.1.attention.self.query.weight",
        "encoder_layers.1.transformer_layer.attention.key_proj.weight": "encoder.layer.1.attention.self.key.weight",
        "encoder_layers.1.transformer_layer.attention.value_proj.weight": "encoder.layer.1.attention.self.value.weight",
        "encoder_layers.1.transformer_layer.attention.out_proj.weight": "encoder.layer.1.attention.output.dense.weight",
        "encoder_layers.1.transformer_layer.ln1.bias": "encoder.layer.1.attention.output.LayerNorm.bias",
        "encoder_layers.1.transformer_layer.linear1.weight": "encoder.layer.1.intermediate.dense.weight",
        "encoder_layers.1.transformer_layer.linear2.weight": "encoder.layer.1.output.dense.weight",
        "encoder_layers.1.transformer_layer.ln2.bias": "encoder.layer.1.output.LayerNorm.bias",
        "pooler.dense.weight": "pooler.dense.weight",
    }
    there = canonical([*older, "embeddings.position_ids"], "bert")
    assert there.parameters == older and there.dropped == ("embeddings.position_ids",)
    newer = {name.replace("encoder.layer.", "encoder_layers."): name for name in parameter_shapes(sizes())}
    assert canonical(newer, "bert").parameters == newer


def test_tensorflows_words_for_a_layer_norm_are_its_weight_and_bias_and_nobody_elses() -> None:
    keys = ["bert.encoder.layer.0.output.LayerNorm.gamma", "bert.encoder.layer.0.output.LayerNorm.beta"]
    there = canonical([*keys, "bert.encoder.layer.0.output.dense.gamma"], "bert")
    assert list(there.parameters.values()) == [
        "encoder.layer.0.output.LayerNorm.weight",
        "encoder.layer.0.output.LayerNorm.bias",
    ]
    assert there.unexpected == ("bert.encoder.layer.0.output.dense.gamma",)


def test_what_mlx_adds_to_a_quantised_weight_keeps_its_name() -> None:
    keys = [f"distilbert.transformer.layer.3.ffn.lin2.{tail}" for tail in ("weight", "scales", "biases", "bias")]
    there = canonical(keys, "distilbert").parameters
    assert list(there.values()) == [f"encoder.layer.3.output.dense.{key.rpartition('.')[2]}" for key in keys]
    assert [original(name, "distilbert") for name in there.values()] == [
        key.removeprefix("distilbert.") for key in keys
    ]


@pytest.mark.parametrize(
    "key",
    [
        "encoder.layer.0.crossattention.self.query.weight",
        "encoder.layer.01.output.dense.weight",
        "encoder.layer.-1.output.dense.weight",
        "encoder.layer.0.output.dense.weight_g",
        "encoder.layer.0.output.weight",
        "xencoder.layer.0.output.dense.weight",
        "embeddings.word_embeddings.weight.weight",
        "bert.embeddings.word_embeddings.weight",
        "weight",
        "",
    ],
)
def test_a_key_that_is_no_parameter_is_listed(key: str) -> None:
    known = list(parameter_shapes(sizes()))
    there = canonical([*known, key], "bert")
    assert list(there.parameters) == known and there.unexpected == (key,)


def test_a_file_with_two_namings_has_one_of_them_left_over() -> None:
    hf = list(parameter_shapes(sizes()))
    other = "encoder_layers.0.transformer_layer.ln1.weight"
    assert canonical([*hf, other], "bert").unexpected == (other,)


@pytest.mark.parametrize("model_type", names.MODEL_TYPES)
def test_what_several_models_have_is_taken_for_the_one_expected(model_type: str) -> None:
    keys = ["embeddings.word_embeddings.weight", "embeddings.LayerNorm.bias"]
    assert list(canonical(keys, model_type).parameters) == keys
    assert canonical(["x"], model_type).unexpected == ("x",)


def test_one_parameter_under_two_names_is_refused() -> None:
    keys = ["embeddings.LayerNorm.weight", "embeddings.LayerNorm.gamma"]
    with pytest.raises(NamesError, match=r"weight and .*gamma are the same parameter"):
        canonical(keys, "bert")


@pytest.mark.parametrize(
    ("keys_of", "prefix", "expected"),
    [
        ("distilbert", "", "bert"),
        ("distilbert", "distilbert.", "bert"),
        ("bert", "", "distilbert"),
        ("bert", "bert.", "roberta"),
        ("roberta", "roberta.", "bert"),
        ("bert", "bert.", "distilbert"),
    ],
)
def test_the_tensors_of_another_model_type_are_refused(keys_of: str, prefix: str, expected: str) -> None:
    keys = [prefix + original(name, keys_of) for name in parameter_shapes(sizes(keys_of))]
    with pytest.raises(NamesError, match=f"expected those of a {expected} model"):
        canonical(keys, expected)
