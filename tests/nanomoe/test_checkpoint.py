# SPDX-License-Identifier: Apache-2.0
"""nanoMoE checkpoints: each layout of both originals in and out, and nothing hostile, contradictory or half-written."""

import dataclasses
import errno
import json
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reference_models.nanogpt import original as nanogpt
from reference_models.nanogpt.checkpoint import CheckpointError
from reference_models.nanomoe import ancestor, native_files
from reference_models.nanomoe import original as nanomoe
from reference_models.nanomoe.checkpoint import (
    MODEL_ARGS,
    Architecture,
    expected_shapes,
    expert_layers,
    from_nanomoe_ckpt,
    load_checkpoint,
    save_checkpoint,
    to_nanomoe_ckpt,
    to_nanomoe_directory,
)
from reference_models.nanomoe.modeling_nanomoe_gpt import GPT
from tests.disk import limited_file_size

SIZES = {"n_layer": 4, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": 31}
SPARSE = {"n_exp": 3, "top_k": 1, "train_capacity": 1.5, "eval_capacity": 1.0, "min_capacity": 2, "stride": 2}
VARIANTS: list[tuple[Architecture, dict[str, Any]]] = [
    ("nanomoe", {}),
    ("nanomoe", {"bias": False}),
    ("nanomoe", {"use_qwen3_moe_mlp": True}),
    ("nanomoe", {"use_noisy_top_k": True, "stride": 1, "moe_start_layer": 2}),
    ("nanomoe", {"n_exp": 1, "top_k": 2}),
    ("ancestor", {"dropout": 0.1}),
    ("ancestor", {"bias": False}),
    ("ancestor", {"use_noisy_top_k": True, "stride": 3}),
    ("ancestor", {"n_exp": 1, "top_k": 2}),
]
ORIGINALS = {"nanomoe": nanomoe, "ancestor": ancestor}
IDX = torch.randint(31, (2, 12), generator=torch.Generator().manual_seed(5))
EITHER = pytest.mark.parametrize("architecture", ["nanomoe", "ancestor"])
EACH = pytest.mark.parametrize(("architecture", "fields"), VARIANTS, ids=str)


def arguments(architecture: Architecture, **fields: Any) -> dict[str, Any]:
    return {**MODEL_ARGS[architecture], **SIZES, **SPARSE, **fields}


def original(architecture: Architecture, **fields: Any) -> Any:
    torch.manual_seed(0)
    module: Any = ORIGINALS[architecture]
    model = module.GPT(module.GPTConfig(**arguments(architecture, **fields))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def weights(architecture: Architecture, **fields: Any) -> dict[str, Tensor]:
    return dict(original(architecture, **fields).state_dict())


def contents(architecture: Architecture, /, **entries: Any) -> dict[str, Any]:
    """Return what that original's train.py saves."""
    written = {
        "model": weights(architecture),
        "model_args": arguments(architecture),
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "openwebtext", "compile": True},
    }
    if architecture == "ancestor":
        written |= {"iter_num": 2000, "optimizer": {}}
    return written | entries


def without(mapping: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in mapping.items() if name not in names}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ckpt.pt"


def assert_same(path: Path, expected: dict[str, Tensor]) -> None:
    """Assert that both readers find exactly these tensors, in this order."""
    checkpoint = load_checkpoint(path)
    assert list(checkpoint.state_dict) == list(expected)
    assert checkpoint.state_dict["lm_head.weight"] is checkpoint.state_dict["transformer.wte.weight"]
    model = from_nanomoe_ckpt(path)
    assert not model.training
    assert model.lm_head.weight is model.transformer.wte.weight
    held = model.state_dict()
    assert held.keys() == expected.keys()
    for name, tensor in expected.items():
        for found in (checkpoint.state_dict[name], held[name]):
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor), name


# What the originals have


@pytest.mark.parametrize("architecture", ORIGINALS)
def test_fields_are_those_of_the_original(architecture: Architecture) -> None:
    config: Any = ORIGINALS[architecture]
    fields = {field.name: field.default for field in dataclasses.fields(config.GPTConfig)}
    assert fields == MODEL_ARGS[architecture]


@EACH
def test_shapes_are_those_of_the_original(architecture: Architecture, fields: dict[str, Any]) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in weights(architecture, **fields).items()}
    assert list(expected_shapes(architecture, arguments(architecture, **fields)).items()) == list(shapes.items())


def test_placement() -> None:
    layers = {"n_layer": 4, "n_exp": 2, "stride": 2, "moe_start_layer": 0}
    assert expert_layers("ancestor", layers) == [0, 2]
    assert expert_layers("nanomoe", layers) == [1, 3]
    assert expert_layers("nanomoe", layers | {"stride": 1, "moe_start_layer": 2}) == [2, 3]
    assert expert_layers("nanomoe", {"n_layer": 7, "n_exp": 2, "stride": 3, "moe_start_layer": 3}) == [5]
    for architecture in MODEL_ARGS:
        assert expert_layers(architecture, layers | {"n_exp": 1}) == []


# Layouts


@EACH
def test_files_of_train_py(path: Path, architecture: Architecture, fields: dict[str, Any]) -> None:
    state, args = weights(architecture, **fields), arguments(architecture, **fields)
    torch.save(contents(architecture, model=state, model_args=args), path)
    assert_same(path, state)
    checkpoint = load_checkpoint(path)
    assert checkpoint.architecture == architecture
    assert checkpoint.model_args == args
    assert checkpoint.iter_num == (2000 if architecture == "ancestor" else 0)
    assert (checkpoint.best_val_loss, checkpoint.config["dataset"]) == (1.5, "openwebtext")
    config = from_nanomoe_ckpt(path).config
    assert config.architecture == architecture
    for name, value in args.items():
        assert getattr(config, "moe_top_k" if name == "top_k" else name) == value, name


@EACH
def test_the_model_computes_what_the_original_does(
    path: Path, architecture: Architecture, fields: dict[str, Any]
) -> None:
    if architecture == "ancestor" and "use_noisy_top_k" in fields:
        fields = fields | {"use_noisy_top_k": False}  # it makes noise in evaluation too
    model = original(architecture, **fields).double()
    native_files.write_checkpoint(model, arguments(architecture, **fields), path)
    with torch.no_grad():
        assert torch.allclose(from_nanomoe_ckpt(path)(IDX).logits, model(IDX, IDX)[0], rtol=0, atol=1e-12)


def test_a_dense_file_of_nanogpt(path: Path) -> None:
    torch.manual_seed(0)
    args = SIZES | {"bias": True, "dropout": 0.2}
    state = dict(nanogpt.GPT(nanogpt.GPTConfig(**args)).state_dict())
    torch.save(contents("ancestor", model=state, model_args=args), path)
    assert_same(path, state)
    checkpoint = load_checkpoint(path)
    assert checkpoint.architecture == "ancestor"
    assert checkpoint.model_args == MODEL_ARGS["ancestor"] | args
    torch.save(contents("ancestor", model=state, model_args=without(args, "dropout", "bias", "vocab_size")), path)
    assert_same(path, state)
    assert load_checkpoint(path).model_args == MODEL_ARGS["ancestor"] | args | {"dropout": 0.0}


@EITHER
def test_compiled_model(path: Path, architecture: Architecture) -> None:
    state = weights(architecture)
    torch.save(contents(architecture, model={f"_orig_mod.{name}": state[name] for name in state}), path)
    assert_same(path, state)


@EITHER
def test_stored_masks_and_another_order(path: Path, architecture: Architecture) -> None:
    state = weights(architecture)
    masks = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 12, 12).tril() for layer in range(4)}
    torch.save(contents(architecture, model=dict(reversed((state | masks).items()))), path)
    assert_same(path, state)


@EITHER
@pytest.mark.parametrize("lost", ["lm_head.weight", "transformer.wte.weight"])
def test_one_name_of_the_tied_tensor(path: Path, architecture: Architecture, lost: str) -> None:
    state = weights(architecture)
    torch.save(contents(architecture, model=without(state, lost)), path)
    assert_same(path, state)


@EITHER
def test_what_older_revisions_left_out(path: Path, architecture: Architecture) -> None:
    state = weights(architecture)
    args = without(arguments(architecture), "bias", "vocab_size", "use_aux_loss", "switch_tfm_init_scale")
    file = {"model": state, "model_args": args}
    torch.save(file, path)
    assert_same(path, state)
    checkpoint = load_checkpoint(path)
    assert checkpoint.model_args == arguments(architecture)
    assert (checkpoint.iter_num, checkpoint.best_val_loss, checkpoint.config) == (0, 1e9, {})


@EITHER
def test_head_wins_over_a_different_embedding(path: Path, architecture: Architecture) -> None:
    state = weights(architecture)
    torch.save(contents(architecture, model=state | {"transformer.wte.weight": torch.zeros(31, 16)}), path)
    with pytest.warns(UserWarning, match=r"ckpt\.pt.*lm_head\.weight.*transformer\.wte\.weight"):
        assert_same(path, state)


def test_loading_leaves_the_random_numbers_alone(path: Path) -> None:
    torch.save(contents("nanomoe"), path)
    before = torch.get_rng_state()
    from_nanomoe_ckpt(path)
    assert torch.equal(before, torch.get_rng_state())


# Back again


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_there_and_back_is_exact(
    path: Path, tmp_path: Path, architecture: Architecture, fields: dict[str, Any], dtype: torch.dtype
) -> None:
    state = {name: tensor.to(dtype) for name, tensor in weights(architecture, **fields).items()}
    torch.save(contents(architecture, model=state, model_args=arguments(architecture, **fields)), path)
    back = tmp_path / "back.pt"
    to_nanomoe_ckpt(from_nanomoe_ckpt(path), back, iter_num=7, best_val_loss=2.5, train_config={"dataset": "x"})
    first, second = (torch.load(file, weights_only=True) for file in (path, back))
    assert list(first["model"]) == list(second["model"])
    for name, tensor in state.items():
        assert second["model"][name].dtype == tensor.dtype
        assert torch.equal(second["model"][name], tensor), name
    assert second["model"]["lm_head.weight"].data_ptr() == second["model"]["transformer.wte.weight"].data_ptr()
    assert list(second["model_args"].items()) == list(first["model_args"].items())
    assert (second["iter_num"], second["best_val_loss"], second["config"]) == (7, 2.5, {"dataset": "x"})


def test_entries_are_those_of_the_original(path: Path) -> None:
    for architecture in MODEL_ARGS:
        torch.save(contents(architecture), path)
        expected = torch.load(path, weights_only=True).keys()
        to_nanomoe_ckpt(from_nanomoe_ckpt(path), path)
        assert torch.load(path, weights_only=True).keys() == expected


@EACH
def test_the_original_resumes(path: Path, architecture: Architecture, fields: dict[str, Any]) -> None:
    source = original(architecture, **fields)
    native_files.write_checkpoint(source, arguments(architecture, **fields), path)
    to_nanomoe_ckpt(from_nanomoe_ckpt(path), path, iter_num=3)
    args, state = native_files.read_checkpoint(str(path))
    module: Any = ORIGINALS[architecture]
    model = module.GPT(module.GPTConfig(**args))
    model.load_state_dict(state, strict=True)
    native_files.resume(model, str(path))
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_nanogpt_resumes_a_dense_ancestor(path: Path) -> None:
    to_nanomoe_ckpt(GPT(GPT.config_class(architecture="ancestor", **SIZES)), path)
    checkpoint = torch.load(path, weights_only=True)
    # What train.py takes of model_args with --init_from=resume.
    forced = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")
    model = nanogpt.GPT(nanogpt.GPTConfig(**{name: checkpoint["model_args"][name] for name in forced}))
    model.load_state_dict(checkpoint["model"], strict=True)
    native_files.resume(model, str(path))


def test_a_view_is_saved_alone(path: Path) -> None:
    whole = torch.randn(10_000, 16)
    state = weights("nanomoe") | {"transformer.wpe.weight": whole[:12]}
    save_checkpoint(path, architecture="nanomoe", state_dict=state, model_args=arguments("nanomoe"))
    assert path.stat().st_size < whole.nbytes
    assert torch.equal(load_checkpoint(path).state_dict["transformer.wpe.weight"], whole[:12])


@EITHER
def test_another_model_is_not_written(path: Path, architecture: Architecture) -> None:
    state, args = weights(architecture), arguments(architecture)
    with pytest.raises(ValueError, match=r"adapter\.weight"):
        save_checkpoint(
            path, architecture=architecture, state_dict=state | {"adapter.weight": torch.ones(1)}, model_args=args
        )
    with pytest.raises(ValueError, match="top_k"):
        save_checkpoint(path, architecture=architecture, state_dict=state, model_args=without(args, "top_k"))
    other: Architecture = "ancestor" if architecture == "nanomoe" else "nanomoe"
    with pytest.raises(ValueError, match=r"nanoMoE: dropout"):
        save_checkpoint(path, architecture=other, state_dict=state, model_args=args)
    assert not path.exists()


def test_another_gelu_is_not_written(path: Path) -> None:
    torch.save(contents("ancestor"), path)
    model = from_nanomoe_ckpt(path)
    model.config.gelu_approximate = "tanh"
    with pytest.raises(ValueError, match="gelu_approximate='tanh'"):
        to_nanomoe_ckpt(model, path)


# Directories


def directory_of(parent: Path, **fields: Any) -> tuple[Path, dict[str, Tensor]]:
    """Return what train.py of askerlee/nanoMoE wrote, and the weights in it."""
    model = original("nanomoe", **fields)
    directory = parent / "ckpt-1"
    native_files.write_directory(model, arguments("nanomoe", **fields), directory)
    return directory, dict(model.state_dict())


def edited(directory: Path, change: dict[str, Any], *lost: str, file: str = "config.json") -> None:
    content = json.loads((directory / file).read_text())
    (directory / file).write_text(json.dumps(without(content | change, *lost)))


@pytest.mark.parametrize("fields", [fields for architecture, fields in VARIANTS if architecture == "nanomoe"], ids=str)
def test_directory(tmp_path: Path, fields: dict[str, Any]) -> None:
    directory, state = directory_of(tmp_path, **fields)
    assert_same(directory, state)
    checkpoint = load_checkpoint(directory)
    assert (checkpoint.architecture, checkpoint.model_args) == ("nanomoe", arguments("nanomoe", **fields))
    for name, tensor in GPT.from_pretrained(directory).state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_directory_there_and_back(tmp_path: Path, dtype: torch.dtype) -> None:
    directory, state = directory_of(tmp_path, use_qwen3_moe_mlp=True)
    back = tmp_path / "back"
    back.mkdir()
    to_nanomoe_directory(from_nanomoe_ckpt(directory).to(dtype), back)
    assert sorted(os.listdir(back)) == ["config.json", "model.safetensors"]
    assert_same(back, {name: tensor.to(dtype) for name, tensor in state.items()})
    assert load_file(back / "model.safetensors").keys() == state.keys() - {"lm_head.weight"}
    first, second = (json.loads((place / "config.json").read_text()) for place in (directory, back))
    assert second == first | {"dtype": str(dtype).removeprefix("torch."), "tie_word_embeddings": True}


def test_directory_with_renamed_fields(tmp_path: Path) -> None:
    directory, state = directory_of(tmp_path)
    edited(directory, {"sequence_len": 12, "top_k": 1}, "block_size", "moe_top_k")
    assert_same(directory, state)
    assert load_checkpoint(directory).model_args == arguments("nanomoe")


def test_directory_with_a_pickle(tmp_path: Path) -> None:
    directory, state = directory_of(tmp_path)
    (directory / "model.safetensors").unlink()
    torch.save(state, directory / "pytorch_model.bin")
    assert_same(directory, state)
    torch.save([1], directory / "pytorch_model.bin")
    refused(directory / "pytorch_model.bin", "list", at=directory)


@EITHER
@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_directory_of_the_port(tmp_path: Path, architecture: Architecture, size: str) -> None:
    model = original(architecture)
    native_files.write_checkpoint(model, arguments(architecture), tmp_path / "ckpt.pt")
    port = from_nanomoe_ckpt(tmp_path / "ckpt.pt")
    port.config.label_convention = "preshifted"
    port.config.use_cache = True
    port.save_pretrained(tmp_path / "saved", max_shard_size=size)
    assert (tmp_path / "saved/model.safetensors.index.json").is_file() == (size == "20KB")
    assert_same(tmp_path / "saved", dict(model.state_dict()))
    config = from_nanomoe_ckpt(tmp_path / "saved").config
    assert (config.architecture, config.label_convention, config.use_cache) == (architecture, "preshifted", True)


def test_a_model_does_without_its_directory(tmp_path: Path) -> None:
    directory, state = directory_of(tmp_path)
    model = from_nanomoe_ckpt(directory)
    file = directory / "model.safetensors"
    with open(file, "rb+") as opened:
        opened.seek(-4096, os.SEEK_END)
        opened.write(bytes(4096))
    for name, tensor in state.items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_directory_that_is_not_written(tmp_path: Path) -> None:
    directory, _ = directory_of(tmp_path)
    before = {file: file.read_bytes() for file in directory.iterdir()}
    with pytest.raises(FileExistsError, match=r"ckpt-1 is not empty"):
        to_nanomoe_directory(from_nanomoe_ckpt(directory), directory)
    assert {file: file.read_bytes() for file in directory.iterdir()} == before
    with pytest.raises(ValueError, match=r"'ancestor'.*to_nanomoe_ckpt"):
        to_nanomoe_directory(GPT(GPT.config_class(architecture="ancestor", **SIZES)), tmp_path / "new")
    assert os.listdir(tmp_path) == ["ckpt-1"]


@pytest.mark.parametrize(
    ("change", "lost", "words"),
    [
        ({"n_shared_experts": 2}, (), ["unknown key n_shared_experts=2"]),
        ({"model_type": "gpt2"}, (), ["model_type='gpt2'", "'nanomoe_gpt'"]),
        ({}, ("moe_top_k",), ["lacks moe_top_k"]),
        ({}, ("n_head", "stride"), ["lacks n_head, stride"]),
        ({"moe_top_k": 4}, (), ["moe_top_k=4", "n_exp=3"]),
        ({"top_k": 2}, (), ["moe_top_k=1", "top_k=2", "disagree"]),
        ({"eval_capacity": float("nan")}, (), ["eval_capacity=nan"]),
        ({"tie_word_embeddings": False}, (), ["tie_word_embeddings=False"]),
        ({"dtype": "float7"}, (), ["float7"]),
    ],
    ids=str,
)
def test_bad_config_json(tmp_path: Path, change: dict[str, Any], lost: tuple[str, ...], words: list[str]) -> None:
    directory, _ = directory_of(tmp_path)
    edited(directory, change, *lost)
    refused(directory / "config.json", *words, at=directory)


def test_config_json_that_is_none(tmp_path: Path) -> None:
    refused(tmp_path / "config.json", "not found", at=tmp_path)
    for content, word in (("[]", "list"), ("{", "not JSON"), ("[" * 100_000, "not JSON"), ("\xff", "not JSON")):
        (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
        refused(tmp_path / "config.json", word, at=tmp_path)


def test_bad_tensors_in_a_directory(tmp_path: Path) -> None:
    directory, _ = directory_of(tmp_path)
    file = directory / "model.safetensors"
    whole = file.read_bytes()
    edited(directory, {"stride": 1})
    refused(directory, "has experts in layers 1, 3, expected them in layers 0, 1, 2, 3")
    edited(directory, {"stride": 2})
    tensors = load_file(file)
    name = C_FC.format(1)
    for tensor, word in (
        (torch.full((3, 16, 64), float("nan")), "NaN"),
        (torch.zeros(3, 64, 16), "transposed"),
        (torch.zeros(3, 16, 64, dtype=torch.int8), "int8"),
    ):
        save_file(tensors | {name: tensor}, file)
        refused(directory, name, word)
    save_file(without(tensors, name), file)
    refused(directory, "missing", name)
    for content in (whole[: len(whole) * 2 // 3], b"", b"\xff" * 100):
        file.write_bytes(content)
        refused(file, "damaged or truncated", at=directory)
    file.unlink()
    refused(directory, "no weights", "model.safetensors", "pytorch_model.bin")


def test_bad_index(tmp_path: Path) -> None:
    directory, state = directory_of(tmp_path)
    (directory / "model.safetensors").rename(directory / "a.safetensors")
    index = directory / "model.safetensors.index.json"
    places = dict.fromkeys(without(state, "lm_head.weight"), "a.safetensors")
    index.write_text(json.dumps({"weight_map": places}))
    assert_same(directory, state)
    for weight_map, place, word in (
        (None, index, "weight_map"),
        ({"transformer.wte.weight": 3}, index, "weight_map"),
        (places | {"x": "../a.safetensors"}, index, "'../a.safetensors'"),
        (places | {"x": "b.safetensors"}, directory / "b.safetensors", "not found"),
        (places | {"x": "a.safetensors"}, directory / "a.safetensors", "x"),
        (without(places, "transformer.wpe.weight"), directory / "a.safetensors", "transformer.wpe.weight"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        refused(place, word, at=directory)


# Hostile and broken files


class RunsCode:
    """Pickles as a call that leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.fspath(self.trace),)


def refused(path: Path, *words: str, at: Path | None = None) -> None:
    """Assert that both readers refuse a file, or the directory it is in, in one line that names it and says so."""
    for reader in (load_checkpoint, from_nanomoe_ckpt):
        with pytest.raises(CheckpointError) as caught:
            reader(at or path)
        message = str(caught.value)
        assert "\n" not in message
        assert message.startswith(f"{path}: ")
        for word in words:
            assert word in message, message


def test_code_in_a_pickle_does_not_run(path: Path, tmp_path: Path) -> None:
    trace = tmp_path / "was_here"
    torch.save(contents("nanomoe", config=RunsCode(trace)), path)
    refused(path, "code", "mkdir")
    path.write_bytes(pickle.dumps(RunsCode(trace)))
    refused(path, "not a zip")
    assert not trace.exists()


@EITHER
def test_damaged_files(path: Path, architecture: Architecture) -> None:
    refused(path, "not found")
    torch.save(contents(architecture), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    refused(path, "truncated")
    damaged = bytearray(whole)
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    refused(path, "damaged")
    torch.save({"model": {}}, path)
    refused(path, "'model_args'")


C_FC = "transformer.h.{}.mlp.experts.c_fc"


@EITHER
@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.full((3, 16, 64), float("nan")), ["NaN"]),
        (torch.full((3, 16, 64), float("-inf")), ["infinite"]),
        (torch.zeros(3, 64, 16), ["(3, 64, 16), transposed", "(3, 16, 64)", "expert, in, out"]),
        (torch.zeros(4, 16, 64), ["4 experts", "n_exp=3"]),
        (torch.zeros(3, 16, 48), ["(3, 16, 48)", "(3, 16, 64)", "n_embd=16"]),
        (torch.zeros(3, 16, 64, dtype=torch.int64), ["int64", "float32"]),
        (torch.zeros(3, 16, 64).to_sparse(), ["dense"]),
        (torch.zeros(1).expand(3, 16, 64), ["larger than its data"]),
        (3.0, ["float", "tensor"]),
    ],
    ids=["nan", "inf", "transposed", "experts", "narrow", "int", "sparse", "expanded", "number"],
)
def test_bad_tensor(path: Path, architecture: Architecture, tensor: Any, words: list[str]) -> None:
    name = C_FC.format(expert_layers(architecture, arguments(architecture))[-1])
    torch.save(contents(architecture, model=weights(architecture) | {name: tensor}), path)
    refused(path, name, *words)


@EITHER
def test_tensors_missing_or_left_over(path: Path, architecture: Architecture) -> None:
    state = weights(architecture)
    name = C_FC.format(expert_layers(architecture, arguments(architecture))[0])
    for lost in (name, "transformer.ln_f.weight"):
        torch.save(contents(architecture, model=without(state, lost)), path)
        refused(path, "missing", lost)
    torch.save(contents(architecture, model=without(state, "lm_head.weight", "transformer.wte.weight")), path)
    refused(path, "missing", "transformer.wte.weight")
    for more in (f"{name}_left_over", "transformer.h.4.ln_1.weight"):
        torch.save(contents(architecture, model=state | {more: torch.ones(16)}), path)
        refused(path, "left over", more)
    torch.save(contents(architecture, model=state | {"_orig_mod." + name: state[name]}), path)
    refused(path, "_orig_mod.")


@EITHER
def test_experts_in_other_layers(path: Path, architecture: Architecture) -> None:
    others = {"nanomoe": "layers 0, 2", "ancestor": "layers 1, 3"}
    mine = {"nanomoe": "layers 1, 3", "ancestor": "layers 0, 2"}
    rule = {"nanomoe": "(i + 1) % stride == 0", "ancestor": "i % stride == 0"}
    owner = {"nanomoe": "wolfecameron/nanoMoE", "ancestor": "askerlee/nanoMoE"}
    swapped = {}
    for name, tensor in weights(architecture).items():
        layer = name.split(".")[2] if ".mlp." in name else ""
        swapped[name.replace(f"h.{layer}.", f"h.{int(layer) ^ 1}.") if layer else name] = tensor
    torch.save(contents(architecture, model=swapped), path)
    refused(
        path,
        f"has experts in {others[architecture]}, expected them in {mine[architecture]}",
        "stride=2",
        rule[architecture],
        f"that is where {owner[architecture]} puts them",
    )
    for change, words in (
        ({"stride": 1}, "expected them in layers 0, 1, 2, 3"),
        ({"stride": 9}, "expected them in " + ("no layer" if architecture == "nanomoe" else "layer 0")),
        ({"n_exp": 1}, "expected them in no layer"),
    ):
        torch.save(contents(architecture, model_args=arguments(architecture, **change)), path)
        refused(path, f"has experts in {mine[architecture]}, {words}")
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(path)
        assert "puts them" not in str(caught.value)


@EITHER
def test_a_dense_file_that_says_it_has_experts(path: Path, architecture: Architecture) -> None:
    torch.save(contents(architecture, model=weights(architecture, n_exp=1)), path)
    refused(path, "has experts in no layer, expected them in layers", "n_exp=3")


def test_tensors_of_the_other_original(path: Path) -> None:
    ancestor = arguments("ancestor", stride=1)
    nanomoe = arguments("nanomoe", stride=1)
    torch.save(contents("nanomoe", model=weights("ancestor", stride=1), model_args=nanomoe), path)
    refused(path, "transformer.h.0.ln_1.bias", "LayerNorm", "RMSNorm", "wolfecameron", "askerlee")
    torch.save(contents("ancestor", model=weights("nanomoe", stride=1), model_args=ancestor), path)
    refused(path, "RMSNorm", "wolfecameron", "askerlee", "transformer.ln_f.bias")
    state = weights("nanomoe", stride=1, bias=False, use_qwen3_moe_mlp=True)
    torch.save(contents("ancestor", model=state, model_args=ancestor | {"bias": False}), path)
    refused(path, "transformer.h.0.mlp.experts.gate_proj", "no use_qwen3_moe_mlp")


@pytest.mark.parametrize(
    ("flag", "name"),
    [("use_qwen3_moe_mlp", "mlp.experts.gate_proj"), ("use_noisy_top_k", "mlp.router.w_noise.weight")],
)
def test_another_kind_of_experts(path: Path, flag: str, name: str) -> None:
    torch.save(contents("nanomoe", model=weights("nanomoe", **{flag: True})), path)
    refused(path, name, f"{flag}=False")
    torch.save(contents("nanomoe", model_args=arguments("nanomoe", **{flag: True})), path)
    refused(path, "missing", name)


@EITHER
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"top_k": 4}, ["top_k=4", "n_exp"]),
        ({"top_k": 0}, ["top_k=0"]),
        ({"stride": 0}, ["stride=0"]),
        ({"eval_capacity": -1.0}, ["eval_capacity=-1.0"]),
        ({"eval_capacity": 10**400}, ["cannot be", "too large"]),
        ({"n_exp": 0}, ["n_exp=0"]),
        ({"n_exp": torch.ones(2)}, ["n_exp=tensor"]),
        ({"n_exp": 10**12}, ["3 experts", "n_exp=1000000000000"]),
        ({"n_head": 3}, ["n_embd=16", "n_head=3"]),
        ({"block_size": 8}, ["transformer.wpe.weight", "(12, 16)", "(8, 16)"]),
        ({"vocab_size": 32}, ["transformer.wte.weight", "(31, 16)", "(32, 16)"]),
        ({"n_layer": 10**12}, ["n_layer=1000000000000"]),
        ({"n_embd": 10**12}, ["1000000000000"]),
        ({"n_embd": "16"}, ["n_embd='16'"]),
        ({"bias": "yes"}, ["bias='yes'"]),
        ({"top_kk": 2}, ["top_kk", "top_k?"]),
        ({"sequence_len": 12}, ["sequence_len"]),
    ],
    ids=str,
)
def test_arguments_that_cannot_be(
    path: Path, architecture: Architecture, change: dict[str, Any], words: list[str]
) -> None:
    torch.save(contents(architecture, model_args=arguments(architecture, **change)), path)
    refused(path, *words)


@EITHER
def test_arguments_left_out(path: Path, architecture: Architecture) -> None:
    args = arguments(architecture)
    for name in ("n_head", "n_layer"):
        torch.save(contents(architecture, model_args=without(args, name)), path)
        refused(path, f"model_args lacks {name}")
    for name in ("top_k", "eval_capacity", "train_capacity", "min_capacity", "stride"):
        torch.save(contents(architecture, model_args=without(args, name)), path)
        refused(path, f"n_exp=3 and lacks {name}")


def test_arguments_of_both_or_of_none(path: Path) -> None:
    torch.save(contents("nanomoe", model_args=arguments("nanomoe", dropout=0.0)), path)
    refused(path, "dropout of wolfecameron/nanoMoE", "moe_start_layer", "askerlee/nanoMoE", "one of the two")
    torch.save(contents("ancestor", model_args=without(arguments("ancestor"), "dropout")), path)
    refused(path, "neither dropout", "nor moe_start_layer")


@pytest.mark.parametrize("entry", [{"iter_num": "many"}, {"best_val_loss": torch.ones(2)}, {"config": 3}], ids=str)
def test_bad_bookkeeping(path: Path, entry: dict[str, Any]) -> None:
    torch.save(contents("ancestor", **entry), path)
    refused(path, next(iter(entry)))


# Interruption


@pytest.fixture
def old(path: Path) -> bytes:
    """Return the bytes of a checkpoint that is in the place of the one to be written."""
    torch.save(contents("nanomoe"), path)
    return path.read_bytes()


def write(path: Path) -> None:
    save_checkpoint(path, architecture="nanomoe", state_dict=weights("nanomoe"), model_args=arguments("nanomoe"))


@pytest.mark.parametrize("limit", [0, 20_000])
def test_no_room_left(path: Path, old: bytes, limit: int) -> None:
    with limited_file_size(limit), pytest.raises(OSError, match=r"ckpt\.pt") as caught:
        write(path)
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == old
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_interrupted(path: Path, old: bytes, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, call, interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(path)
    assert path.read_bytes() == old
    assert os.listdir(path.parent) == [path.name]


def test_others_may_read_the_file(path: Path) -> None:
    mask = os.umask(0o022)
    try:
        write(path)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_no_room_left_for_a_directory(tmp_path: Path) -> None:
    directory, _ = directory_of(tmp_path)
    model = from_nanomoe_ckpt(directory)
    with limited_file_size(20_000), pytest.raises(OSError, match="new"):
        to_nanomoe_directory(model, tmp_path / "new")
    assert os.listdir(tmp_path) == ["ckpt-1"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_interrupted_directory(tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, _ = directory_of(tmp_path)
    model = from_nanomoe_ckpt(directory)

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, call, interrupt)
    with pytest.raises(KeyboardInterrupt):
        to_nanomoe_directory(model, tmp_path / "new")
    assert os.listdir(tmp_path) == ["ckpt-1"]


def test_no_parent_directory(tmp_path: Path) -> None:
    torch.save(contents("nanomoe"), tmp_path / "ckpt.pt")
    with pytest.raises(FileNotFoundError) as caught:
        to_nanomoe_directory(from_nanomoe_ckpt(tmp_path / "ckpt.pt"), tmp_path / "no" / "new")
    assert caught.value.filename == os.fspath(tmp_path / "no" / "new")
