# SPDX-License-Identifier: Apache-2.0
"""nanoGPT's own checkpoint file: every dialect in, the original's form out, and nothing hostile or half-written."""

import errno
import os
import pickle
import stat
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reference_models.nanogpt.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from reference_models.nanogpt.modeling_nanogpt import NanoGPTLMHeadModel
from reference_models.nanogpt.original import GPT, GPTConfig
from tests.disk import limited_file_size

ARGS: dict[str, Any] = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "block_size": 12,
    "bias": True,
    "vocab_size": 31,
    "dropout": 0.1,
}
IDX = torch.randint(31, (2, 12), generator=torch.Generator().manual_seed(5))


def original(**args: Any) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**(ARGS | args))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def contents(model: GPT | None = None, /, **entries: Any) -> dict[str, Any]:
    """Return what train.py saves."""
    model = model or original()
    return {
        "model": model.state_dict(),
        "optimizer": model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu").state_dict(),
        "model_args": {name: getattr(model.config, name) for name in ARGS},
        "iter_num": 2000,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "shakespeare_char", "compile": True},
    } | entries


def without(mapping: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in mapping.items() if name not in names}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ckpt.pt"


def assert_same_model(path: Path, model: GPT) -> None:
    port = NanoGPTLMHeadModel.from_nanogpt_ckpt(path)
    assert not port.training
    assert port.lm_head.weight is port.transformer.wte.weight
    assert torch.equal(port(IDX).logits, model(IDX, IDX)[0])
    for name, tensor in model.state_dict().items():
        assert torch.equal(port.state_dict()[name], tensor), name


# Dialects


@pytest.mark.parametrize("bias", [True, False])
def test_head_revision(path: Path, bias: bool) -> None:
    model = original(bias=bias)
    torch.save(contents(model), path)
    assert_same_model(path, model)
    checkpoint = load_checkpoint(path)
    assert (checkpoint.iter_num, checkpoint.best_val_loss) == (2000, 1.5)
    assert checkpoint.config["dataset"] == "shakespeare_char"
    assert list(checkpoint.state_dict) == list(model.state_dict())


def test_compiled_model(path: Path) -> None:
    model = original()
    state = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save(contents(model, model=state), path)
    assert_same_model(path, model)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_stored_masks(path: Path, bias: bool, dtype: torch.dtype) -> None:
    model = original(bias=bias)
    state = model.state_dict()
    for layer in range(2):
        state[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 12, 12, dtype=dtype).tril()
        if dtype == torch.bool:
            state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(contents(model, model=state), path)
    assert_same_model(path, model)


def test_first_revisions(path: Path) -> None:
    model = original(vocab_size=50257)
    file = {
        "model": model.state_dict(),
        "model_args": without(vars(model.config), "bias", "vocab_size", "dropout"),
    }
    torch.save(file, path)
    checkpoint = load_checkpoint(path)
    assert checkpoint.model_args["bias"] is True
    assert checkpoint.model_args["vocab_size"] == 50257
    assert (checkpoint.iter_num, checkpoint.best_val_loss, checkpoint.config) == (0, 1e9, {})
    assert_same_model(path, model)


def test_vocabulary_left_out_is_read_off_the_table(path: Path) -> None:
    model = original()
    torch.save(contents(model, model_args=without(ARGS, "vocab_size")), path)
    assert_same_model(path, model)


@pytest.mark.parametrize("lost", ["lm_head.weight", "transformer.wte.weight"])
def test_one_name_of_the_tied_tensor(path: Path, lost: str) -> None:
    model = original()
    torch.save(contents(model, model=without(model.state_dict(), lost)), path)
    assert_same_model(path, model)


def test_head_wins_over_a_different_embedding(path: Path) -> None:
    model = original()
    state = dict(model.state_dict())
    state["transformer.wte.weight"] = torch.zeros(31, 16)
    torch.save(contents(model, model=state), path)
    with pytest.warns(UserWarning, match=r"ckpt\.pt.*lm_head\.weight.*transformer\.wte\.weight"):
        assert_same_model(path, model)
    upstream = GPT(GPTConfig(**ARGS))
    upstream.load_state_dict(state)
    assert torch.equal(upstream.transformer.wte.weight, model.lm_head.weight)


def test_subclass_is_respected(path: Path) -> None:
    class Special(NanoGPTLMHeadModel):
        pass

    torch.save(contents(), path)
    assert type(Special.from_nanogpt_ckpt(path)) is Special


def test_loading_leaves_the_random_numbers_alone(path: Path) -> None:
    torch.save(contents(), path)
    before = torch.get_rng_state()
    NanoGPTLMHeadModel.from_nanogpt_ckpt(path)
    assert torch.equal(before, torch.get_rng_state())


# Back again


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_there_and_back_is_exact(path: Path, tmp_path: Path, bias: bool, dtype: torch.dtype) -> None:
    torch.save(contents(original(bias=bias).to(dtype)), path)
    back = tmp_path / "back.pt"
    NanoGPTLMHeadModel.from_nanogpt_ckpt(path).to_nanogpt_ckpt(
        back, iter_num=7, best_val_loss=2.5, train_config={"dataset": "x"}
    )
    first, second = (torch.load(file, weights_only=True) for file in (path, back))
    assert list(first["model"]) == list(second["model"])
    for name, tensor in first["model"].items():
        assert second["model"][name].dtype == tensor.dtype
        assert torch.equal(second["model"][name], tensor), name
    assert second["model"]["lm_head.weight"].data_ptr() == second["model"]["transformer.wte.weight"].data_ptr()
    assert second["model_args"] == first["model_args"]
    assert (second["iter_num"], second["best_val_loss"], second["config"]) == (7, 2.5, {"dataset": "x"})


def test_original_resumes(path: Path) -> None:
    source = original()
    torch.save(contents(source), path)
    NanoGPTLMHeadModel.from_nanogpt_ckpt(path).to_nanogpt_ckpt(path)
    # What train.py does with --init_from=resume.
    checkpoint = torch.load(path, weights_only=True)
    model = GPT(GPTConfig(**checkpoint["model_args"]))
    model.load_state_dict(checkpoint["model"], strict=True)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu")
    fresh = optimizer.state_dict()
    optimizer.load_state_dict(checkpoint["optimizer"])
    assert optimizer.state_dict() == fresh
    _, loss = model(IDX, IDX)
    loss.backward()
    optimizer.step()
    assert not torch.equal(model.transformer.wpe.weight, source.transformer.wpe.weight)


def test_a_view_is_saved_alone(path: Path, tmp_path: Path) -> None:
    model = original()
    whole = torch.randn(10_000, 16)
    state = dict(model.state_dict()) | {"transformer.wpe.weight": whole[:12]}
    save_checkpoint(path, state_dict=state, model_args=ARGS)
    assert path.stat().st_size < whole.nbytes
    assert torch.equal(load_checkpoint(path).state_dict["transformer.wpe.weight"], whole[:12])


def test_model_of_another_shape_is_not_written(path: Path) -> None:
    state = dict(original().state_dict()) | {"adapter.weight": torch.ones(1)}
    with pytest.raises(ValueError, match=r"adapter\.weight"):
        save_checkpoint(path, state_dict=state, model_args=ARGS)
    assert not path.exists()


# Hostile and broken files


class RunsCode:
    """Pickles as a call that leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.fspath(self.trace),)


def refused(path: Path, *words: str) -> None:
    """Assert that both readers refuse a file in one line that names it and says these words."""
    for reader in (load_checkpoint, NanoGPTLMHeadModel.from_nanogpt_ckpt):
        with pytest.raises(CheckpointError) as caught:
            reader(path)
        message = str(caught.value)
        assert "\n" not in message
        assert message.startswith(f"{path}: ")
        for word in words:
            assert word in message, message


def test_code_in_a_pickle_does_not_run(path: Path, tmp_path: Path) -> None:
    trace = tmp_path / "was_here"
    torch.save(contents(config=RunsCode(trace)), path)
    refused(path, "code", "mkdir")
    path.write_bytes(pickle.dumps(RunsCode(trace)))
    refused(path, "not a zip")
    assert not trace.exists()


def test_missing_file_and_directory(path: Path, tmp_path: Path) -> None:
    refused(path, "not found")
    refused(tmp_path, "directory")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated(path: Path, share: float) -> None:
    torch.save(contents(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    refused(path, "truncated" if share else "not a zip")


def test_one_flipped_bit(path: Path) -> None:
    torch.save(contents(), path)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    refused(path, "damaged")


def test_other_files(path: Path) -> None:
    path.write_text("hello")
    refused(path, "not a zip")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "hello")
    refused(path, "damaged")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", bytes(10_000_000))
    refused(path, "10000000 bytes")
    torch.save([1, 2], path)
    refused(path, "list", "model")
    torch.save({"weights": {}}, path)
    refused(path, "'model'", "weights")
    torch.save({"model": {}}, path)
    refused(path, "'model_args'")


NAME = "transformer.h.1.mlp.c_fc.weight"


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.full((64, 16), float("nan")), ["NaN"]),
        (torch.full((64, 16), float("-inf")), ["infinite"]),
        (torch.zeros(16, 64), ["(16, 64)", "(64, 16)"]),
        (torch.zeros(64, 16, dtype=torch.int64), ["int64", "float32"]),
        (torch.zeros(64, 16, dtype=torch.complex64), ["complex64", "float32"]),
        (torch.zeros(64, 16).to_sparse(), ["dense"]),
        (torch.zeros(1).expand(64, 16), ["larger than its data"]),
        (3.0, ["float", "tensor"]),
    ],
    ids=["nan", "inf", "transposed", "int", "complex", "sparse", "expanded", "number"],
)
def test_bad_tensor(path: Path, tensor: Any, words: list[str]) -> None:
    torch.save(contents(model=dict(original().state_dict()) | {NAME: tensor}), path)
    refused(path, NAME, *words)


def test_keys_missing_or_left_over(path: Path) -> None:
    state = dict(original().state_dict())
    torch.save(contents(model=without(state, NAME)), path)
    refused(path, "missing", NAME)
    torch.save(contents(model=without(state, "lm_head.weight", "transformer.wte.weight")), path)
    refused(path, "missing", "transformer.wte.weight")
    torch.save(contents(model=state | {"transformer.h.2.ln_1.weight": torch.ones(16)}), path)
    refused(path, "left over", "transformer.h.2.ln_1.weight")
    torch.save(contents(model=state | {"_orig_mod." + NAME: state[NAME]}), path)
    refused(path, "_orig_mod.")
    torch.save(contents(model=state | {"transformer.h.0.attn.bias": torch.ones(48)}), path)
    refused(path, "transformer.h.0.attn.bias", "(48,)", "(1, 1, 12, 12)")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_head": 3}, ["n_embd=16", "n_head=3"]),
        ({"n_head": 0}, ["n_head=0"]),
        ({"block_size": 8}, ["transformer.wpe.weight", "(12, 16)", "(8, 16)"]),
        ({"vocab_size": 32}, ["transformer.wte.weight", "(31, 16)", "(32, 16)"]),
        ({"n_layer": 3}, ["missing", "transformer.h.2."]),
        ({"n_layer": 1}, ["left over", "transformer.h.1."]),
        ({"n_layer": 10**12}, ["n_layer=1000000000000"]),
        ({"n_embd": 10**12}, ["1000000000000"]),
        ({"n_embd": "16"}, ["n_embd='16'"]),
        ({"bias": False}, ["left over", ".bias"]),
        ({"dropout": 2.0}, ["dropout=2.0"]),
        ({"n_heads": 2}, ["n_heads"]),
    ],
    ids=str,
)
def test_arguments_that_disagree(path: Path, change: dict[str, Any], words: list[str]) -> None:
    torch.save(contents(model_args=ARGS | change), path)
    refused(path, *words)


def test_arguments_left_out(path: Path) -> None:
    torch.save(contents(model_args=without(ARGS, "n_head")), path)
    refused(path, "model_args lacks n_head")
    torch.save(contents(original(bias=False), model_args=without(ARGS, "bias")), path)
    refused(path, "missing", ".bias")


@pytest.mark.parametrize("entry", [{"iter_num": "many"}, {"best_val_loss": torch.ones(2)}, {"config": 3}], ids=str)
def test_bad_bookkeeping(path: Path, entry: dict[str, Any]) -> None:
    torch.save(contents(**entry), path)
    refused(path, next(iter(entry)))


# Interruption


@pytest.fixture
def old(path: Path) -> bytes:
    """Return the bytes of a checkpoint that is in the place of the one to be written."""
    torch.save(contents(), path)
    return path.read_bytes()


def write(path: Path, state: dict[str, Tensor] | None = None) -> None:
    save_checkpoint(path, state_dict=state or original(n_layer=1).state_dict(), model_args=ARGS | {"n_layer": 1})


@pytest.mark.parametrize("limit", [0, 5_000, 20_000])
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


def test_interrupted_inside_torch(path: Path, old: bytes) -> None:
    class Interrupting(Tensor):
        def untyped_storage(self) -> Any:
            raise KeyboardInterrupt

    state = dict(original(n_layer=1).state_dict())
    state["transformer.wpe.weight"] = state["transformer.wpe.weight"].as_subclass(Interrupting)
    with pytest.raises(KeyboardInterrupt):
        write(path, state)
    assert path.read_bytes() == old
    assert os.listdir(path.parent) == [path.name]


def test_no_such_directory(tmp_path: Path) -> None:
    missing = tmp_path / "no" / "ckpt.pt"
    with pytest.raises(FileNotFoundError) as caught:
        write(missing)
    assert caught.value.filename == os.fspath(missing)


def test_others_may_read_the_file(path: Path) -> None:
    mask = os.umask(0o022)
    try:
        write(path)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
