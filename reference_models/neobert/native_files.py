# SPDX-License-Identifier: Apache-2.0
"""NeoBERT's checkpoint directories as the harness needs them: written as training does, and read as it would."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from harness.families import Fields

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]
    Edit = Callable[[Any], Any]


def write_checkpoint(module: torch.nn.Module, fields: Fields, path: Path) -> None:
    """The directory of one step of a run, with a tokenizer as large as the vocabulary."""
    _write(module, fields, path)


def _write(
    module: Any,
    fields: Fields,
    path: Path,
    *,
    layout: Literal["state_dict.pt", "model.safetensors"] = "state_dict.pt",
    tokenizer: Literal["4.57", "5"] = "5",
) -> None:
    from reference_models.neobert.checkpoint import write_run
    from reference_models.neobert.original import NeoBERTConfig
    from reference_models.neobert.tokenizer import write_tokenizer

    module.config = NeoBERTConfig(**fields)
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory) / "tokenizer"
        write_tokenizer(
            place,
            vocab_size=fields["vocab_size"],
            pad_token_id=fields["pad_token_id"],
            max_length=fields["max_length"],
            layout=tokenizer,
        )
        if path.exists():
            shutil.rmtree(path)
        write_run(path, module, tokenizer=place, layout=layout)


def read_checkpoint(path: str) -> tuple[Fields, Tensors]:
    """Fields and state dict of a directory, whose names training takes as they are."""
    import torch

    from reference_models.neobert.checkpoint import read_run

    fields = read_run(path).fields
    return fields, torch.load(Path(path) / "state_dict.pt", map_location="cpu", weights_only=True)


def checkpoint_dialects(module: torch.nn.Module, fields: Fields, directory: Path) -> Mapping[str, Path]:
    """The same model as revisions and settings of the trainer write it, by what is different in the directory."""
    plain = directory / "plain"
    _write(module, fields, plain)
    paths: dict[str, Path] = {}

    def put(name: str) -> Path:
        paths[name] = directory / str(len(paths))
        return paths[name]

    def renamed(name: str, prefix: str, only: str = "") -> None:
        def edit(tensors: Tensors) -> Tensors:
            return {prefix + key if key.startswith(only) else key: tensor for key, tensor in tensors.items()}

        _weights_edited(plain, put(name), edit)

    # torch.compile, DistributedDataParallel, and both.
    renamed("names with the prefix _orig_mod.", "_orig_mod.")
    renamed("names with the prefix module.", "module.")
    renamed("names with the prefixes module._orig_mod.", "module._orig_mod.")
    renamed("the decoder inside of the model", "model.", only="decoder.")
    _weights_edited(plain, put("its tensors in another order"), lambda tensors: dict(reversed(tensors.items())))
    _write(module, fields, put("model.safetensors"), layout="model.safetensors")
    _write(module, fields, put("a tokenizer that transformers 4.57 saved"), tokenizer="4.57")
    # The class that is trained had the tie by default, and its file has no word for it.
    _settings_edited(plain, put("no tie_word_embeddings"), {"tie_word_embeddings": None})
    _settings_edited(plain, put("hidden_act with capitals"), {"hidden_act": fields["hidden_act"].upper()})
    _settings_edited(plain, put("dropout instead of dropout_prob"), {"dropout_prob": None, "dropout": 0.0})
    if fields["hidden_act"] == "swiglu":  # xFormers had one matrix for both
        _weights_edited(plain, put("SwiGLU's gate packed with what it multiplies"), _packed)
    if fields["tie_word_embeddings"]:
        _weights_edited(
            plain,
            put("tied tensors as two copies"),
            lambda tensors: {key: tensor.clone() for key, tensor in tensors.items()},
        )
    return paths


def _packed(tensors: Tensors) -> Tensors:
    import torch

    packed = dict(tensors)
    for gate in [key for key in tensors if key.endswith(".ffn.w1.weight")]:
        other = gate.replace(".w1.", ".w2.")
        packed[gate.replace(".w1.", ".w12.")] = torch.cat([packed.pop(gate), packed.pop(other)])
    return packed


def _weights_edited(plain: Path, path: Path, edit: Edit) -> None:
    import torch

    shutil.copytree(plain, path)
    file = path / "state_dict.pt"
    torch.save(edit(torch.load(file, map_location="cpu", weights_only=True)), file)


def _settings_edited(plain: Path, path: Path, changes: Mapping[str, Any]) -> None:
    """The directory with fields of config.yaml's model changed, or taken out where they are None."""
    import yaml

    shutil.copytree(plain, path)
    file = path / "config.yaml"
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    model = settings["model"] | changes
    settings["model"] = {key: value for key, value in model.items() if value is not None}
    file.write_text(json.dumps(settings), encoding="utf-8")  # which is YAML too
