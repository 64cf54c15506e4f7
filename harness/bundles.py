# SPDX-License-Identifier: Apache-2.0
"""Bundles: a directory for each failure with all that replays it, and nothing in it that needs unpickling."""

from __future__ import annotations

import dataclasses
import json
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import DescriptionError
from harness.ports import Port
from harness.report.files import new_directory
from harness.results import Result, as_json

if TYPE_CHECKING:
    import torch

    from harness.cases import Case
    from harness.trial import Recorded, Trial

DESCRIPTION = "failure.json"
TENSOR_BYTES = 1 << 30
RECORDED = ("check", "route", "backend", "dtype", "status", "reason", "metrics")
PACKAGES = ("parity-harness", "torch", "transformers", "safetensors", "huggingface_hub", "hypothesis", "mlx", "numpy")


def write(result: Result, trial: Trial, case: Case, error: Exception, *, directory: Path) -> Path:
    """Writes the bundle of a failed result and gives its path: whole, or not at all.

    failure.json has the result, the port's description, the case, the versions and the command that replays it;
    weights.safetensors, batch.safetensors and outputs.safetensors hold float64, int64 and float64 tensors.
    """
    from safetensors.torch import save_file

    name = re.sub(r"[^\w.-]+", "_", f"{result.port}-{result.check}-{result.route}-{result.backend}-{result.dtype}")
    path = directory / name
    document = {
        "replay": f"parity repro {path}",
        "result": as_json(result),
        "case": case.as_dict(),
        "port": {**dataclasses.asdict(trial.port), "root": str(trial.port.root)},
        "versions": versions(),
    }
    with new_directory(path, replace=True) as temporary:
        (temporary / DESCRIPTION).write_text(json.dumps(document, indent=2, default=str) + "\n", encoding="utf-8")
        for file, tensors in (
            ("weights", _weights(trial, case)),
            ("batch", _batch(trial, case)),
            ("outputs", _outputs(error)),
        ):
            if tensors:
                save_file(tensors, temporary / f"{file}.safetensors")
    return path


def read(path: Path) -> tuple[Port, Case, Mapping[str, Any]]:
    """The port, the case and the result of a bundle, with the `versions` it was recorded with.

    Raises DescriptionError for a directory that is none.
    """
    from harness.cases import case_from_dict

    file = path / DESCRIPTION if path.is_dir() else path
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        numbers = [document["case"][key] for key in ("rows", "tokens", "seed")]
        if not all(isinstance(number, int) for number in numbers):
            raise ValueError("rows, tokens and seed of its case must be whole numbers")
        recorded = {key: document["result"][key] for key in RECORDED} | {"versions": dict(document["versions"])}
        port = {**document["port"], "root": Path(document["port"]["root"])}
        return Port(**port), case_from_dict(document["case"]), recorded
    except OSError as error:
        raise DescriptionError(f"{path} is not a bundle: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DescriptionError(f"{file} does not describe a failure: {error}") from None


def tensors(path: Path, case: Case) -> Recorded:
    """Weights and batch of a bundle. Raises DescriptionError for files that are not as `write` leaves them."""
    from harness.cases.batches import Batch
    from harness.sandbox import parse_tensors, read_bounded
    from harness.trial import Recorded

    directory = path if path.is_dir() else path.parent
    read = {}
    for name in ("weights", "batch"):
        try:
            content = read_bounded(directory / f"{name}.safetensors", TENSOR_BYTES)
            read[name] = {} if content is None else parse_tensors(content)
        except (OSError, ValueError) as error:
            raise DescriptionError(f"{directory / name}.safetensors cannot be read: {error}") from None
    batch = read["batch"]
    if {"tokens", "targets"} - set(batch) or any(tensor.shape != (case.rows, case.tokens) for tensor in batch.values()):
        raise DescriptionError(
            f"{directory / 'batch.safetensors'} has no tokens and targets of shape ({case.rows}, {case.tokens})"
        )
    return Recorded(case=case, weights=read["weights"], batch=Batch(tokens=batch["tokens"], targets=batch["targets"]))


def versions() -> dict[str, str]:
    """Versions of Python, the platform and the packages that numbers depend on; absent ones are left out."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _weights(trial: Trial, case: Case) -> dict[str, torch.Tensor]:
    from harness.trial import original_model

    state = original_model(trial, case).state_dict()
    kept = {tensor.data_ptr(): key for key, tensor in reversed(state.items())}
    return {key: tensor.contiguous() for key, tensor in state.items() if kept[tensor.data_ptr()] == key}


def _batch(trial: Trial, case: Case) -> dict[str, torch.Tensor]:
    from harness.trial import draw

    batch = draw(trial, case)
    return {"tokens": batch.tokens.clone(), "targets": batch.targets.clone()}


def _outputs(error: Exception) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in getattr(error, "tensors", {}).items()}
