# SPDX-License-Identifier: Apache-2.0
"""Checkpoint directories of BERT: as transformers and MLX's tools write them, and read back without loss."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.cases.weights import sensitising_state
from reference_models.mlx_bert import checkpoint
from reference_models.mlx_bert.checkpoint import config_of, read_hf_directory, write_hf_directory
from reference_models.mlx_bert.original import CLASSES, build, fields_of, run

SIZES: dict[str, Any] = {
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "vocab_size": 23,
    "max_position_embeddings": 9,
}
EACH = pytest.mark.parametrize("model_type", sorted(CLASSES))
EVERY_HEAD = pytest.mark.parametrize(
    ("model_type", "head"), [(model_type, head) for model_type, heads in CLASSES.items() for head in heads]
)
OF_ALL = ("safetensors", "sharded", "bin", "gamma-beta", "mlx-community")
OF_BERT = ("mlx-examples", "997e078")


def model_of(model_type: str, head: str = "body", *, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """A small model with weights of which none is at its initial value."""
    model = build({"model_type": model_type, **SIZES, **fields}, head=head)
    model.load_state_dict(sensitising_state(model, gains={}, seed=5))
    return model.to(dtype)


def tensors_of(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


# What transformers writes


@EVERY_HEAD
@pytest.mark.parametrize("layout", ["safetensors", "sharded"])
def test_the_files_are_those_of_save_pretrained(tmp_path: Path, model_type: str, head: str, layout: Any) -> None:
    model = model_of(model_type, head)
    size = "8KB" if layout == "sharded" else "1GB"
    model.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    write_hf_directory(model, None, tmp_path / "ours", layout=layout)
    theirs, ours = ({file.name for file in (tmp_path / name).iterdir()} for name in ("theirs", "ours"))
    assert ours == theirs - {"generation_config.json"}
    assert (len(ours) > 3) == (layout == "sharded")
    for name in ours:
        if name.endswith(".safetensors"):
            assert_same(load_file(tmp_path / "ours" / name), load_file(tmp_path / "theirs" / name))
            with safe_open(tmp_path / "ours" / name, "pt") as file:
                assert file.metadata() == {"format": "pt"}
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "ours")]
    assert configs[0] == configs[1]
    if layout == "sharded":
        indices = [json.loads((tmp_path / name / checkpoint.INDEX).read_text()) for name in ("theirs", "ours")]
        assert indices[0]["weight_map"] == indices[1]["weight_map"]
        assert indices[0]["metadata"]["total_size"] == indices[1]["metadata"]["total_size"]


def test_a_state_dict_is_written_whole(tmp_path: Path) -> None:
    model = model_of("bert", "masked_lm")
    write_hf_directory(model.state_dict(), config_of(model), tmp_path)
    assert_same(tensors_of(tmp_path), model.state_dict())
    write_hf_directory(model, None, tmp_path)
    assert set(model.state_dict()) - set(tensors_of(tmp_path)) == {
        "cls.predictions.decoder.weight",
        "cls.predictions.decoder.bias",
    }


# There and back


@pytest.mark.parametrize(
    ("model_type", "layout"),
    [(model_type, layout) for model_type in sorted(CLASSES) for layout in OF_ALL]
    + [("bert", each) for each in OF_BERT],
)
def test_a_body_comes_back_as_it_was(tmp_path: Path, model_type: str, layout: Any) -> None:
    model = model_of(model_type, hidden_act="relu", hidden_dropout_prob=0.25)
    assert write_hf_directory(model, None, tmp_path, layout=layout) == tmp_path
    fields, state = read_hf_directory(tmp_path)
    assert_same(state, model.state_dict())
    expected = fields_of(model.config)
    if layout == "997e078":  # upstream's configuration has ids of its own, and no dropout of a classifier
        expected |= {"bos_token_id": 101, "eos_token_id": 102}
    assert fields == expected
    ids = torch.tensor([[4, 5, 6], [7, 8, 9]])
    again = build(fields)
    again.load_state_dict(state)
    assert torch.equal(run(again, ids)["last_hidden_state"], run(model, ids)["last_hidden_state"])


@EVERY_HEAD
@pytest.mark.parametrize("layout", OF_ALL)
def test_a_checkpoint_with_a_head_comes_back_whole_and_as_a_body(
    tmp_path: Path, model_type: str, head: str, layout: Any
) -> None:
    model = model_of(model_type, head)
    write_hf_directory(model, None, tmp_path, layout=layout)
    _, state = read_hf_directory(tmp_path, head=head)
    assert_same(state, model.state_dict())
    fields, body = read_hf_directory(tmp_path)
    inner = model if head == "body" else getattr(model, model_type)
    assert_same(body, inner.state_dict())
    lacking = set(build(fields).state_dict()) - set(body)
    without_pooler = model_type == "roberta" or (model_type, head) in {
        ("bert", "masked_lm"),
        ("bert", "token_classification"),
    }
    pooler = {"pooler.dense.weight", "pooler.dense.bias"}
    assert lacking == (pooler if without_pooler and head != "body" else set())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("layout", ["safetensors", "mlx-community", "bin"])
def test_dtypes_are_kept(tmp_path: Path, dtype: Any, layout: Any) -> None:
    model = model_of("bert")
    write_hf_directory(model, None, tmp_path, layout=layout, dtype=dtype)
    _, state = read_hf_directory(tmp_path)
    assert_same(state, {key: tensor.to(getattr(torch, dtype)) for key, tensor in model.state_dict().items()})
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


def test_integers_keep_their_dtype(tmp_path: Path) -> None:
    model = model_of("bert")
    state = model.state_dict() | {"embeddings.position_ids": torch.arange(9).unsqueeze(0)}
    write_hf_directory(state, config_of(model), tmp_path, dtype="float16")
    found = tensors_of(tmp_path)
    assert found.pop("embeddings.position_ids").dtype == torch.int64
    assert {tensor.dtype for tensor in found.values()} == {torch.float16}


def test_npz_holds_float16_and_refuses_bfloat16(tmp_path: Path) -> None:
    write_hf_directory(model_of("bert"), None, tmp_path, layout="mlx-examples", dtype="float16")
    _, state = read_hf_directory(tmp_path)
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    with pytest.raises(ValueError, match=r"^weights\.npz cannot hold bfloat16"):
        write_hf_directory(model_of("bert"), None, tmp_path / "other", layout="mlx-examples", dtype="bfloat16")


# What sets each layout apart


def test_names_of_mlx_examples(tmp_path: Path) -> None:
    model = model_of("bert", num_hidden_layers=1)
    write_hf_directory(model, None, tmp_path, layout="mlx-examples")
    with np.load(tmp_path / "weights.npz") as file:
        found = {name: file[name] for name in file.files}
    state = model.state_dict()
    layer = {
        "attention.query_proj": "attention.self.query",
        "attention.key_proj": "attention.self.key",
        "attention.value_proj": "attention.self.value",
        "attention.out_proj": "attention.output.dense",
        "ln1": "attention.output.LayerNorm",
        "linear1": "intermediate.dense",
        "linear2": "output.dense",
        "ln2": "output.LayerNorm",
    }
    modules = {f"encoder.layers.0.{own}": f"encoder.layer.0.{theirs}" for own, theirs in layer.items()}
    modules |= {"embeddings.norm": "embeddings.LayerNorm", "pooler": "pooler.dense"}
    expected = {f"{own}.{kind}": f"{theirs}.{kind}" for own, theirs in modules.items() for kind in ("weight", "bias")}
    tables = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    expected |= {f"embeddings.{table}.weight": f"embeddings.{table}.weight" for table in tables}
    assert set(found) == set(expected)
    for own, theirs in expected.items():
        assert np.array_equal(found[own], state[theirs].numpy()), own


@pytest.mark.parametrize("layout", ["997e078", "a7f08d8"])
def test_names_of_upstreams_port(tmp_path: Path, layout: Any) -> None:
    model = model_of("bert", num_hidden_layers=1)
    write_hf_directory(model, None, tmp_path, layout=layout)
    found, state = tensors_of(tmp_path), model.state_dict()
    ids = found.pop("embeddings.position_ids")
    assert ids.dtype == torch.int32 and ids.tolist() == [list(range(9))]
    if layout == "997e078":
        expected = {key.replace("encoder.layer.", "encoder_layers."): value for key, value in state.items()}
    else:
        inside = "encoder_layers.0.transformer_layer"
        renamed = {
            f"{inside}.attention.query_proj.weight": "attention.self.query.weight",
            f"{inside}.attention.key_proj.weight": "attention.self.key.weight",
            f"{inside}.attention.value_proj.weight": "attention.self.value.weight",
            f"{inside}.attention.out_proj.weight": "attention.output.dense.weight",
        }
        norms_and_feed_forward = {
            "ln1": "attention.output.LayerNorm",
            "linear1": "intermediate.dense",
            "linear2": "output.dense",
            "ln2": "output.LayerNorm",
        }
        for own, theirs in norms_and_feed_forward.items():
            renamed |= {f"{inside}.{own}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}
        expected = {key: value for key, value in state.items() if not key.startswith("encoder.")}
        expected |= {own: state[f"encoder.layer.0.{theirs}"] for own, theirs in renamed.items()}
        assert len(state) - len(expected) == 4
    assert_same(found, expected)
    _, back = read_hf_directory(tmp_path)
    assert len(back) == len(expected) and all(torch.equal(back[key], state[key]) for key in back)


def test_upstreams_configuration_has_its_fields_and_no_model_type(tmp_path: Path) -> None:
    write_hf_directory(model_of("bert"), None, tmp_path, layout="997e078")
    config = json.loads((tmp_path / "config.json").read_text())
    assert "model_type" not in config and config["hidden_size"] == 12
    upstreams = "pooler_hidden_size pooler_dropout pooler_activation use_fused_attention use_memory_efficient_attention"
    rest = "gradient_checkpointing compute_additional_pooling bos_token_id eos_token_id pad_token_id layer_norm_eps"
    assert set(f"{upstreams} {rest}".split()) < set(config)
    assert len(config) == 22
    extra = json.loads((tmp_path / "bert_core_config.json").read_text())
    assert extra == {"compute_additional_pooling": True, "bert_core_version": "1.0.0"}


@pytest.mark.parametrize(("head", "prefix"), [("body", ""), ("masked_lm", "bert.")])
def test_mlx_community_has_position_ids_an_index_and_its_own_format(tmp_path: Path, head: str, prefix: str) -> None:
    model = model_of("bert", head)
    write_hf_directory(model, None, tmp_path, layout="mlx-community", dtype="bfloat16")
    found = tensors_of(tmp_path)
    ids = found[f"{prefix}embeddings.position_ids"]
    assert ids.dtype == torch.int64 and ids.tolist() == [list(range(9))]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == dict.fromkeys(found, "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "mlx"}


def test_a_bin_file_is_safe_to_read_and_has_tied_tensors_twice(tmp_path: Path) -> None:
    model = model_of("bert", "masked_lm")
    write_hf_directory(model, None, tmp_path, layout="bin")
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "pytorch_model.bin"}
    found = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert set(found) == {*model.state_dict(), "bert.embeddings.position_ids"}
    embedding, decoder = (
        found[key] for key in ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight")
    )
    assert embedding.data_ptr() == decoder.data_ptr()


@EACH
def test_old_norms_have_gamma_and_beta(tmp_path: Path, model_type: str) -> None:
    model = model_of(model_type, "masked_lm")
    write_hf_directory(model, None, tmp_path, layout="gamma-beta")
    found = tensors_of(tmp_path)
    assert not any("LayerNorm.weight" in key or "LayerNorm.bias" in key for key in found)
    # DistilBERT's layers name their norms in another way.
    count = 1 if model_type == "distilbert" else 1 + 2 * 2 + (model_type == "bert")
    assert sum(key.endswith("LayerNorm.gamma") for key in found) == count
    assert sum(key.endswith("LayerNorm.beta") for key in found) == count


# Refusals


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    bert = model_of("bert")
    refused: list[tuple[Any, dict[str, Any], str]] = [
        (bert, {"layout": "mlx-comunity"}, "there is no layout 'mlx-comunity'; did you mean 'mlx-community'?"),
        (bert, {"dtype": "float8"}, "dtype is 'float8'"),
        (bert.state_dict(), {}, "config is None, and a state dict has none; give what config.json is to hold"),
        (model_of("roberta"), {"layout": "mlx-examples"}, "layout 'mlx-examples' is of BERT alone"),
        (model_of("distilbert"), {"layout": "997e078"}, "layout '997e078' is of BERT alone"),
        (model_of("bert", "masked_lm"), {"layout": "mlx-examples"}, "layout 'mlx-examples' has no place for bert."),
    ]
    for model, keywords, message in refused:
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is asked after below
            write_hf_directory(model, None, tmp_path, **keywords)
        assert str(caught.value).startswith(message)


def test_a_missing_tensor_is_no_random_one(tmp_path: Path) -> None:
    write_hf_directory(model_of("bert"), None, tmp_path)
    tensors = tensors_of(tmp_path)
    del tensors["encoder.layer.1.output.dense.bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks encoder\.layer\.1\.output\.dense\.bias$"):
        read_hf_directory(tmp_path)


def test_a_left_over_tensor_of_mlx_examples_is_refused(tmp_path: Path) -> None:
    write_hf_directory(model_of("bert"), None, tmp_path, layout="mlx-examples")
    with np.load(tmp_path / "weights.npz") as file:
        tensors = {name: file[name] for name in file.files}
    np.savez(tmp_path / "weights.npz", **tensors, other=np.zeros(2))
    with pytest.raises(ValueError, match=r"holds other too many$"):
        read_hf_directory(tmp_path)


# As a family has them


@EACH
def test_the_familys_checkpoint_is_float32_where_that_is_exact(tmp_path: Path, model_type: str) -> None:
    path = tmp_path / "checkpoint"
    model = model_of(model_type, dtype=torch.float64)
    checkpoint.write_checkpoint(model, fields_of(model.config), path)
    fields, state = checkpoint.read_checkpoint(str(path))
    assert fields == fields_of(model.config)
    assert_same(state, {key: tensor.float() for key, tensor in model.state_dict().items()})
    with torch.no_grad():
        model.embeddings.LayerNorm.bias += 1e-12
    (path / "stale").touch()
    checkpoint.write_checkpoint(model, fields_of(model.config), path)
    assert not (path / "stale").exists()
    assert_same(checkpoint.read_checkpoint(str(path))[1], model.state_dict())


@EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_every_dialect_holds_the_same_model(tmp_path: Path, model_type: str, dtype: torch.dtype) -> None:
    model = model_of(model_type, dtype=dtype)
    expected = {key: tensor.float() if dtype == torch.float64 else tensor for key, tensor in model.state_dict().items()}
    paths = checkpoint.checkpoint_dialects(model, fields_of(model.config), tmp_path)
    assert len(paths) == {"bert": 9, "distilbert": 6, "roberta": 4}[model_type]
    assert len(set(paths.values())) == len(paths)
    for name, path in paths.items():
        fields, state = read_hf_directory(path)
        assert fields["hidden_size"] == 12, name
        assert_same(state, expected)
    if model_type == "bert":
        # The original is transformers, and what it does not read is no file of its own.
        for name in ("mlx-examples' weights.npz", "the names of upstream's commit 997e078"):
            with pytest.raises(ValueError, match="which transformers does not read"):
                checkpoint.read_checkpoint(str(paths[name]))
        assert "bert.embeddings.LayerNorm.gamma" in tensors_of(
            paths["inside of BertForPreTraining, with gamma and beta"]
        )
