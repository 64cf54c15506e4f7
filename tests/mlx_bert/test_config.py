# SPDX-License-Identifier: Apache-2.0
"""The configuration of the MLX BERT: transformers' own defaults and names, both formats, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

from reference_models.mlx_bert import config as configs
from reference_models.mlx_bert.config import BertConfig, ConfigError

CLASSES = {
    "bert": transformers.BertConfig,
    "distilbert": transformers.DistilBertConfig,
    "roberta": transformers.RobertaConfig,
}
TYPES = pytest.mark.parametrize("model_type", CLASSES)


def test_neither_mlx_nor_torch_nor_transformers_is_imported() -> None:
    program = (
        "import sys, reference_models.mlx_bert.config as c; c.BertConfig.from_hf_config({'model_type': 'bert'}); "
        "print(sorted({'mlx', 'torch', 'transformers', 'numpy'} & {name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@TYPES
def test_an_absent_key_has_the_default_of_the_transformers_class(model_type: str) -> None:
    ours = BertConfig.from_hf_config({"model_type": model_type}).to_hf_config()
    theirs = CLASSES[model_type]().to_dict()
    own = [key for key in ours if key not in ("architectures",)]
    assert {key: ours[key] for key in own} == {key: theirs[key] for key in own}


@TYPES
def test_a_config_json_that_transformers_wrote_comes_back_key_by_key(model_type: str, tmp_path: Path) -> None:
    config = CLASSES[model_type](
        num_labels=3, problem_type="single_label_classification", layer_norm_eps=1e-12, hidden_size=48, vocab_size=99
    )
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    ours = configs.read(tmp_path)
    assert ours.hidden_size == 48 and ours.vocab_size == 99
    back = ours.to_hf_config()
    if model_type == "distilbert":
        # transformers writes the class's name of the field, or both where it was given the other one.
        written.pop("layer_norm_eps", None)
        back["layer_norm_eps"] = ours.layer_norm_eps
    assert {key: back[key] for key in written} == written
    assert configs.from_hf_config(back) == configs.from_hf_config(configs.from_hf_config(back).to_hf_config())
    reread = CLASSES[model_type].from_dict(back)
    assert reread.hidden_size == 48 and reread.num_labels == 3


@TYPES
def test_transformers_reads_what_we_write(model_type: str, tmp_path: Path) -> None:
    ours = BertConfig(
        model_type=model_type,
        vocab_size=77,
        hidden_size=36,
        num_hidden_layers=3,
        num_attention_heads=6,
        intermediate_size=44,
        hidden_act="gelu_new",
        hidden_dropout_prob=0.2,
        attention_probs_dropout_prob=0.3,
        max_position_embeddings=17,
        pad_token_id=5,
    )
    (tmp_path / "config.json").write_text(json.dumps(ours.to_hf_config()))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(theirs) is CLASSES[model_type]
    assert (theirs.hidden_size, theirs.num_hidden_layers, theirs.num_attention_heads) == (36, 3, 6)
    inner = theirs.hidden_dim if model_type == "distilbert" else theirs.intermediate_size
    assert (theirs.vocab_size, theirs.max_position_embeddings, theirs.pad_token_id, inner) == (77, 17, 5, 44)
    drops = ("dropout", "attention_dropout") if model_type == "distilbert" else (
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
    )  # fmt: skip
    assert [getattr(theirs, name) for name in drops] == [0.2, 0.3]
    assert (theirs.activation if model_type == "distilbert" else theirs.hidden_act) == "gelu_new"


def test_the_configuration_survives_both_formats() -> None:
    config = BertConfig(
        hidden_size=24,
        num_attention_heads=4,
        pooler_hidden_size=16,
        pooler_dropout=0.5,
        pooler_activation="relu",
        compute_additional_pooling=False,
        quantization={"group_size": 64, "bits": 4},
        classifier_dropout=0.3,
        extra={"id2label": {"0": "no"}, "torch_dtype": "float16"},
    )
    assert BertConfig.from_hf_config(config.to_hf_config()) == config
    assert BertConfig.from_dict(config.to_hf_config()) == config
    assert BertConfig.from_dict(config.to_dict()) == config
    assert BertConfig(**config.to_dict()) == config
    assert BertConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_null_classifier_dropout_stays_null_and_a_number_changes_no_other_dropout() -> None:
    assert BertConfig.from_hf_config({"model_type": "bert", "classifier_dropout": None}).classifier_dropout is None
    config = BertConfig.from_hf_config({"classifier_dropout": 0.5})
    assert (config.hidden_dropout_prob, config.classifier_dropout) == (0.1, 0.5)
    assert BertConfig(hidden_dropout_prob=0.3).to_hf_config()["classifier_dropout"] is None


def test_the_document_s_own_format_is_told_by_its_lack_of_a_model_type() -> None:
    written = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "use_fused_attention": True,
        "gradient_checkpointing": False,
    }
    config = BertConfig.from_dict(written)
    assert (config.model_type, config.vocab_size, config.hidden_size) == ("bert", 30522, 32)
    assert config.extra == {"use_fused_attention": True, "gradient_checkpointing": False}


def test_presets() -> None:
    sizes = [
        (c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.intermediate_size, c.max_position_embeddings)
        for c in (BertConfig.base(), BertConfig.large(), BertConfig.mini())
    ]
    assert sizes == [(768, 12, 12, 3072, 512), (1024, 24, 16, 4096, 512), (256, 4, 4, 1024, 128)]
    assert BertConfig.mini(vocab_size=9).vocab_size == 9


def test_both_names_of_a_distilbert_field_are_read() -> None:
    config = BertConfig.from_hf_config({"model_type": "distilbert", "hidden_size": 24, "n_heads": 4, "hidden_dim": 50})
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (24, 4, 50)
    with pytest.raises(ConfigError, match="dim=24 and hidden_size=36 name one field"):
        BertConfig.from_hf_config({"model_type": "distilbert", "hidden_size": 36, "dim": 24})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "electra"}, "model_type='electra' is not supported: expected one of bert, distilbert, roberta"),
        ({"model_type": ["bert"]}, "model_type="),
        ({"hidden_size": "768"}, "hidden_size='768'.*a positive integer"),
        ({"hidden_size": 0}, "hidden_size=0"),
        ({"hidden_size": 32.0}, "hidden_size=32.0"),
        ({"vocab_size": True}, "vocab_size=True"),
        ({"num_hidden_layers": -1}, "num_hidden_layers=-1"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "hidden_size=30 is no multiple of num_attention_heads=4"),
        ({"hidden_act": "swiglu"}, "hidden_act='swiglu' is not supported: expected one of gelu"),
        ({"pooler_activation": ["tanh"]}, "pooler_activation="),
        ({"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob=1.0.*\[0, 1\)"),
        ({"hidden_dropout_prob": None}, "hidden_dropout_prob=None"),
        ({"attention_probs_dropout_prob": -0.1}, "attention_probs_dropout_prob=-0.1"),
        ({"classifier_dropout": "none"}, "classifier_dropout='none'.*or null"),
        ({"layer_norm_eps": 0}, "layer_norm_eps=0"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps=nan"),
        ({"pad_token_id": 30522}, "pad_token_id=30522 is not in the vocabulary"),
        ({"model_type": "roberta", "pad_token_id": None}, "pad_token_id=None is not supported for roberta"),
        ({"model_type": "roberta", "max_position_embeddings": 2}, "max_position_embeddings=2 leaves roberta no token"),
        ({"model_type": "distilbert", "layer_norm_eps": 1e-5}, "layer_norm_eps=1e-05 is not supported for distilbert"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'.*'absolute'"),
        ({"is_decoder": True}, "is_decoder=True is not supported"),
        ({"add_cross_attention": True}, "add_cross_attention=True"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads="),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map="),
        ({"num_hidden_layer": 3}, "'num_hidden_layer' is unknown and looks like 'num_hidden_layers'"),
        ({"quantization": 4}, "quantization=4"),
        ({"quantization": {"bits": 4}}, "quantization has group_size None"),
        ({"quantization": {"bits": 7, "group_size": 64}}, "quantization has bits 7"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method='gptq'"),
        (7, "a configuration is a mapping"),
    ],
)
def test_what_is_not_supported_is_refused_by_name_in_one_line(values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        BertConfig.from_hf_config(values)
    assert "\n" not in str(caught.value) and isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "extra",
    [
        # google-bert/bert-base-chinese and bert-base-multilingual hold these, older DistilBERTs `tie_weights_`.
        {"directionality": "bidi", "pooler_fc_size": 768, "pooler_num_attention_heads": 12, "pooler_num_fc_layers": 3},
        {"pooler_size_per_head": 128, "pooler_type": "first_token_transform", "output_past": True},
        {"tie_weights_": True, "sinusoidal_pos_embds": True, "qa_dropout": 0.1, "chunk_size_feed_forward": 5},
        {"position_embedding_type": "absolute", "is_decoder": False, "gradient_checkpointing": False},
        {
            "language": "en",
            "task_specific_params": {"a": [1]},
            "_name_or_path": "x",
            "architectures": ["BertForMaskedLM"],
        },
        {"quantization_config": {"group_size": 64, "bits": 4}, "output_hidden_states": True},
    ],
)
def test_keys_that_change_no_number_are_kept_as_they_are(extra: dict[str, Any]) -> None:
    config = BertConfig.from_hf_config({"model_type": "bert"} | extra)
    assert config.extra == extra
    assert extra.items() <= config.to_hf_config().items()


def test_mlx_s_quantisation_is_read_under_both_its_names() -> None:
    written = {"group_size": 64, "bits": 4}
    assert BertConfig.from_hf_config({"quantization": written}).quantization == written
    assert BertConfig.from_hf_config({"quantization_config": written}).quantization == written


def test_an_unknown_key_of_the_document_s_format_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'hiden_size' is unknown: did you mean 'hidden_size'"):
        BertConfig.from_dict({"hiden_size": 3})


def test_an_override_of_no_field_names_the_nearest() -> None:
    assert configs.override(BertConfig(), {"hidden_dropout_prob": 0.0}).hidden_dropout_prob == 0.0
    with pytest.raises(TypeError, match="'hidden_dropout': did you mean 'hidden_dropout_prob'"):
        configs.override(BertConfig(), {"hidden_dropout": 0.0})
    with pytest.raises(ConfigError, match="hidden_size=7"):
        configs.override(BertConfig(), {"hidden_size": 7})


def test_given_values_and_results_share_nothing() -> None:
    given = {"model_type": "bert", "id2label": {"0": "a"}}
    config = BertConfig.from_hf_config(given)
    given["id2label"]["0"] = "b"
    written = config.to_hf_config()
    written["id2label"]["0"] = "c"
    assert config.extra["id2label"] == {"0": "a"}


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "no such file"), ("{", "cannot be read as JSON"), ("[1]", "a mapping"), ('{"model_type": "gpt2"}', "gpt2")],
)
def test_a_bad_config_json_is_an_error_that_names_the_file(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        configs.read(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)
