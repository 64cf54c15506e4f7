# SPDX-License-Identifier: Apache-2.0
"""The originals' own files as the harness writes and reads them: complete, resumable, and each dialect one model."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from reference_models.nanomoe import ancestor
from reference_models.nanomoe import original as nanomoe
from reference_models.nanomoe.checkpoint import from_nanomoe_ckpt, to_nanomoe_ckpt
from reference_models.nanomoe.native_files import (
    TRAINING_STATE,
    checkpoint_dialects,
    read_checkpoint,
    read_training_state,
    resume,
    write_checkpoint,
)

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 6, "vocab_size": 13}
ORIGINALS: dict[str, Any] = {"nanomoe": nanomoe, "ancestor": ancestor}
CASES = [(name, changes) for name in ORIGINALS for changes in ({"n_exp": 3, "stride": 1}, {"bias": False}, {})]


def original(name: str, **changes: Any) -> tuple[torch.nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    config = ORIGINALS[name].GPTConfig(**SIZES, **changes)
    return ORIGINALS[name].GPT(config).eval(), dataclasses.asdict(config)


@pytest.mark.parametrize(("name", "changes"), CASES, ids=str)
def test_a_file_comes_back_bit_for_bit_with_its_fields(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    module, fields = original(name, **changes)
    write_checkpoint(module, fields, tmp_path / "ckpt.pt")
    read, state = read_checkpoint(str(tmp_path / "ckpt.pt"))
    assert read == fields
    assert list(state) == list(module.state_dict())
    for key, tensor in module.state_dict().items():
        assert torch.equal(state[key], tensor), key


def test_entries_are_those_that_train_py_saves(tmp_path: Path) -> None:
    expected = {"model", "model_args", "best_val_loss", "config"}
    for name, entries in (("nanomoe", expected), ("ancestor", expected | {"iter_num"})):
        write_checkpoint(*original(name), tmp_path / "ckpt.pt")
        assert torch.load(tmp_path / "ckpt.pt", weights_only=True).keys() == entries


@pytest.mark.parametrize(("name", "changes"), CASES, ids=str)
def test_every_dialect_is_the_same_model(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    module, fields = original(name, **changes)
    write_checkpoint(module, fields, tmp_path / "ckpt.pt")
    expected = from_nanomoe_ckpt(tmp_path / "ckpt.pt")
    (tmp_path / "dialects").mkdir()
    files = checkpoint_dialects(module, fields, tmp_path / "dialects")
    assert len(set(files.values())) == len(files)
    assert ("nanoGPT's model_args" in files) == (name == "ancestor" and changes.get("n_exp", 1) == 1)
    assert ("the form of a directory" in files) == ("an optimizer and iter_num" in files) == (name == "nanomoe")
    for what, path in files.items():
        actual = from_nanomoe_ckpt(path)
        for key in ("architecture", *fields):
            assert getattr(actual.config, key, None) == getattr(expected.config, key, None), (what, key)
        for key, tensor in expected.state_dict().items():
            assert torch.equal(actual.state_dict()[key], tensor), (what, key)


def test_nanogpts_own_fields_are_a_dialect_only_of_what_they_say(tmp_path: Path) -> None:
    module, fields = original("ancestor", min_capacity=8)
    assert "nanoGPT's model_args" not in checkpoint_dialects(module, fields, tmp_path)


@pytest.mark.parametrize("name", ORIGINALS)
def test_training_resumes_from_what_the_port_writes(name: str, tmp_path: Path) -> None:
    module, fields = original(name, n_exp=3)
    path = tmp_path / "ckpt.pt"
    write_checkpoint(module, fields, path)
    to_nanomoe_ckpt(from_nanomoe_ckpt(path), path)
    resume(module, str(path))
    checkpoint = torch.load(path, weights_only=True)
    for entry in ("optimizer", "best_val_loss") if name == "ancestor" else ("best_val_loss", "config"):
        torch.save({key: value for key, value in checkpoint.items() if key != entry}, path)
        with pytest.raises(KeyError, match=entry):
            resume(module, str(path))


def test_biases_of_experts_do_not_decay_after_resuming(tmp_path: Path) -> None:
    module, fields = original("ancestor", n_exp=3, stride=1)
    path = tmp_path / "ckpt.pt"
    write_checkpoint(module, fields, path)
    to_nanomoe_ckpt(from_nanomoe_ckpt(path), path)
    checkpoint = torch.load(path, weights_only=True)
    decaying, others = (len(group["params"]) for group in checkpoint["optimizer"]["param_groups"])
    names = [key for key, _ in module.named_parameters()]
    assert others == sum(key.endswith("bias") or "ln_" in key for key in names)
    assert decaying + others == len(names)


@pytest.mark.parametrize("name", ORIGINALS)
def test_the_state_of_training_travels(name: str, tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    write_checkpoint(*original(name), path)
    given = {key: TRAINING_STATE[key] for key in ("iter_num", "best_val_loss", "train_config")}
    to_nanomoe_ckpt(from_nanomoe_ckpt(path), path, **given)
    found = read_training_state(str(path))
    assert {key: found[key] for key in given} == given


def test_importing_needs_no_framework() -> None:
    code = "import sys, reference_models.nanomoe.native_files; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
