# SPDX-License-Identifier: Apache-2.0
"""Route `checkpoint`: the original writes its own file, and the port's converter reads it."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from harness.errors import Mismatch, Skip
from harness.ports import converter_spec, load_object
from harness.trial import Trial, copied, port_class

if TYPE_CHECKING:
    from harness.cases import Case

CONVERTER_SECONDS = 300


def carry(trial: Trial, case: Case, original: torch.nn.Module) -> torch.nn.Module:
    """The port as its converter makes it from the original's file, which holds float32 tensors."""
    return load(trial, write(trial, case, original)).eval()


def write(trial: Trial, case: Case, original: torch.nn.Module, *, dtype: torch.dtype = torch.float32) -> Path:
    """The original's own checkpoint file below the trial's directory, in float32 as training leaves it, or another."""
    if trial.family.write_checkpoint is None:
        raise Skip(f"family '{trial.family.name}' declares no checkpoint file of its own")
    path = trial.workdir / trial.family.checkpoint_name
    trial.family.write_checkpoint(copied(original).to(dtype), case.fields, path)
    return path


def load(trial: Trial, path: Path) -> torch.nn.Module:
    """What the port's `load` makes of a checkpoint file."""
    kind, _, rest = trial.port.load.partition(":")
    if kind == "command":
        converted_model: torch.nn.Module = port_class(trial).from_pretrained(converted(trial, path))  # type: ignore[attr-defined]
        return converted_model
    if kind != "checkpoint":
        raise Skip(f"the port declares no converter: its load is {trial.port.load!r}")
    model = converter(trial)(str(path))
    if not isinstance(model, torch.nn.Module):
        raise Mismatch(f"{rest} returned {type(model).__name__}; a converter returns the model")
    return model


def converter(trial: Trial) -> Any:
    """The callable of `load = "checkpoint:..."`."""
    spec = converter_spec(trial.port)
    assert spec is not None  # the caller looked at the kind
    return load_object(spec, root=trial.port.root)


def converted(trial: Trial, path: Path) -> Path:
    """The directory that the converter program of `load = "command:..."` makes of a checkpoint file.

    A program takes seconds to start: what it made of the same bytes before is copied.
    """
    template = trial.port.load.partition(":")[2]
    out = Path(tempfile.mkdtemp(dir=trial.workdir)) / "converted"
    content = hashlib.sha256(trial.port.load.encode() + str(trial.port.root).encode() + path.read_bytes()).hexdigest()
    known = trial.sandbox.root / "converted" / content
    if known.is_dir():
        return Path(shutil.copytree(known, out))
    command = [part.format(checkpoint=path, out=out) for part in shlex.split(template)]
    # `python` is the one that runs the gate, also where its environment is not activated.
    places = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
    try:
        done = subprocess.run(
            command,
            cwd=trial.port.root,
            env={**os.environ, "PATH": places},
            capture_output=True,
            text=True,
            timeout=CONVERTER_SECONDS,
            check=False,
        )
    except OSError as error:
        raise Mismatch(f"the converter cannot be started: {error}") from None
    except subprocess.TimeoutExpired:
        raise Mismatch(f"the converter did not end within {CONVERTER_SECONDS} s: {shlex.join(command)}") from None
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "it printed nothing").splitlines()[-1]
        raise Mismatch(f"the converter ended with status {done.returncode}: {last}")
    if not out.is_dir():
        raise Mismatch(f"the converter ended well and wrote no directory {{out}}: {shlex.join(command)}")
    shutil.copytree(out, known, dirs_exist_ok=True)
    return out
