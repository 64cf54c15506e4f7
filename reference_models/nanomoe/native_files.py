# SPDX-License-Identifier: Apache-2.0
"""The originals' own files as the harness needs them: written as train.py does, and read as its resuming does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.families import Fields
from reference_models.nanogpt.family import TRAINING_STATE, read_checkpoint, read_training_state, write_dialects
from reference_models.nanogpt.family import resume as resume_nanogpt

if TYPE_CHECKING:
    import torch

__all__ = [
    "TRAINING_STATE",
    "checkpoint_dialects",
    "read_checkpoint",
    "read_training_state",
    "resume",
    "write_checkpoint",
]


def is_ancestor(fields: Fields) -> bool:
    """Whether fields are those of wolfecameron/nanoMoE, which alone has a dropout."""
    return "dropout" in fields


def write_checkpoint(module: torch.nn.Module, fields: Fields, path: Path) -> None:
    """The file of the original's train.py, without optimiser state."""
    import torch

    torch.save(_contents(module, fields), path)


def resume(module: torch.nn.Module, path: str) -> None:
    """What train.py does with the rest of a file; that of askerlee/nanoMoE starts its optimiser and steps anew."""
    import torch

    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if is_ancestor(checkpoint["model_args"]):
        resume_nanogpt(module, path)
    else:
        float(checkpoint["best_val_loss"]), dict(checkpoint["config"])


def checkpoint_dialects(module: torch.nn.Module, fields: Fields, directory: Path) -> Mapping[str, Path]:
    """The same model as revisions and settings of train.py write it, by what is different in the file."""
    import torch

    plain = _contents(module, fields)
    optimizer = module.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu").state_dict()  # type: ignore[operator]
    files: dict[str, Any] = {}
    if is_ancestor(fields):
        plain["optimizer"] = optimizer
        names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
        few = {name: fields[name] for name in names}
        if fields == {name: vars(type(module.config)(**few))[name] for name in fields}:
            files["nanoGPT's model_args"] = plain | {"model_args": few}
    else:
        files["an optimizer and iter_num"] = plain | {"optimizer": optimizer, "iter_num": 3}
    paths = {name: directory / f"nanomoe_{number}.pt" for number, name in enumerate(files)}
    for name, path in paths.items():
        torch.save(files[name], path)
    if not is_ancestor(fields):
        paths["the form of a directory"] = directory / "checkpoint-1"
        write_directory(module, fields, paths["the form of a directory"])
    return write_dialects(plain, directory) | paths


def write_directory(module: torch.nn.Module, fields: Fields, directory: Path) -> None:
    """What train.py of askerlee/nanoMoE writes since 07e6c16, without the code: config.json and model.safetensors."""
    from safetensors.torch import save_file

    config = {"moe_top_k" if name == "top_k" else name: value for name, value in fields.items()}
    dtype = str(next(module.parameters()).dtype).removeprefix("torch.")
    config |= {"architectures": ["GPT"], "dtype": dtype, "model_type": "nanomoe_gpt"}
    tensors = {name: tensor.contiguous() for name, tensor in module.state_dict().items() if name != "lm_head.weight"}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _contents(module: torch.nn.Module, fields: Fields) -> dict[str, Any]:
    """What train.py saves, but the optimizer."""
    import torch

    contents = {
        "model": module.state_dict(),
        "model_args": dict(fields),
        "best_val_loss": torch.tensor(2.5),
        "config": {"dataset": "none"},
    }
    return contents | {"iter_num": 3} if is_ancestor(fields) else contents
