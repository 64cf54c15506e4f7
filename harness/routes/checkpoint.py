# SPDX-License-Identifier: Apache-2.0
"""Route `checkpoint`: the original writes its own file, and the port's converter reads it."""

from __future__ import annotations

import hashlib
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from harness import programs
from harness.backends import frameworks
from harness.errors import Mismatch, Skip
from harness.ports import converter_spec, load_object
from harness.trial import Trial, copied, port_class

if TYPE_CHECKING:
    from harness.cases import Case


def carry(trial: Trial, case: Case, original: torch.nn.Module) -> torch.nn.Module:
    """The port as its converter makes it from the original's file, which holds float32 tensors."""
    return load(trial, write(trial, case, original)).eval()


def write(trial: Trial, case: Case, original: torch.nn.Module, *, dtype: torch.dtype | None = torch.float32) -> Path:
    """The original's own checkpoint file below the trial's directory, in float32 as training leaves it, or another.

    dtype: None leaves each tensor in its own.
    """
    if trial.family.write_checkpoint is None:
        raise Skip(f"family '{trial.family.name}' declares no checkpoint file of its own")
    path = trial.workdir / trial.family.checkpoint_name
    trial.family.write_checkpoint(copied(original).to(dtype=dtype), case.fields, path)
    return path


def load(trial: Trial, path: Path) -> torch.nn.Module:
    """What the port's `load` makes of a checkpoint file."""
    kind, _, rest = trial.port.load.partition(":")
    if kind == "command":
        converted_model: torch.nn.Module = port_class(trial).from_pretrained(converted(trial, path))  # type: ignore[attr-defined]
        return converted_model
    if kind != "checkpoint":
        raise Skip(f"the port declares no converter: its load is {trial.port.load!r}")
    model = frameworks.torch_module(converter(trial)(str(path)))
    if not isinstance(model, torch.nn.Module):
        raise Mismatch(f"{rest} returned {type(model).__name__}; a converter returns the model")
    return model


def converter(trial: Trial) -> Any:
    """The callable of `load = "checkpoint:..."`."""
    spec = converter_spec(trial.port)
    assert spec is not None  # the caller looked at the kind
    return load_object(spec, root=trial.port.root)


def converted(trial: Trial, path: Path, *, cold: bool = False) -> Path:
    """The directory that the converter program of `load = "command:..."` makes of a checkpoint file or directory.

    What it made of the same bytes before is copied; but where `cold` asks for an interpreter of its own.
    """
    out = Path(tempfile.mkdtemp(dir=trial.workdir)) / "converted"
    content = hashlib.sha256(trial.port.load.encode() + str(trial.port.root).encode() + content_of(path)).hexdigest()
    known = trial.sandbox.root / "converted" / content
    if known.is_dir() and not cold:
        return Path(shutil.copytree(known, out))
    command = programs.command_of(trial.port, checkpoint=path, out=out)
    programs.run(command, root=trial.port.root, sandbox=trial.sandbox, cold=cold)
    if not out.is_dir():
        raise Mismatch(f"the converter ended well and wrote no directory {{out}}: {shlex.join(command)}")
    shutil.copytree(out, known, dirs_exist_ok=True)
    return out


def content_of(path: Path) -> bytes:
    """What tells one checkpoint from another: its bytes, of a directory those of every file with its name."""
    if not path.is_dir():
        return path.read_bytes()
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return b"".join(str(file.relative_to(path)).encode() + file.read_bytes() for file in files)
