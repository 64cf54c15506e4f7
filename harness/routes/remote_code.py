# SPDX-License-Identifier: Apache-2.0
"""Route `remote_code`: the port is saved, and loaded by name of its directory in a process that never saw its code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from harness.errors import Mismatch
from harness.families import tied_of
from harness.routes import pretrained
from harness.routes.checkpoint import converted, write
from harness.trial import Trial

if TYPE_CHECKING:
    from harness.cases import Case
    from harness.sandbox import Answer


def logits(trial: Trial, case: Case, original: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """The port's logits for token ids (rows, tokens), as a fresh process computes them from the saved directory."""
    return logits_of(load(trial, directory(trial, case, original), {"input_ids": tokens}))


def directory(trial: Trial, case: Case, original: torch.nn.Module) -> Path:
    """What a user of the port would be given: the directory it saves, or that its converter writes."""
    if trial.port.loader == "command":
        return converted(trial, write(trial, case, original))
    return pretrained.save(trial, case, original)


def load(
    trial: Trial,
    saved: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    poisoned_memory: bool = False,
    cold: bool = False,
    **request: Any,
) -> Answer:
    """Loads and runs a saved directory in a fresh process that cannot read the port's repository.

    Raises Mismatch (as SandboxFailure) when the process cannot, and for tensors that were missing or left over.
    """
    run = trial.sandbox.run_cold if cold else trial.sandbox.run
    answer = run(
        "load_and_run",
        request_for(trial, directory=str(saved), **request),
        tensors=tensors,
        hidden_paths=hidden(trial),
        poisoned_memory=poisoned_memory,
    )
    pretrained.require_clean(answer.values["loading"])
    return answer


def request_for(trial: Trial, **request: Any) -> dict[str, Any]:
    """A sandbox request with the dtype of the trial and what loads its port: an Auto class, or the port's own class."""
    if trial.family.framework == "transformers":
        return {"auto_class": trial.family.port_auto_class, "dtype": trial.dtype, **request}
    return {"class": trial.port.model, "root": str(trial.port.root), "dtype": trial.dtype, **request}


def hidden(trial: Trial) -> list[Path]:
    """What a user of a saved port does not have: its repository, where the port travels with its code."""
    return [trial.port.root] if trial.family.framework == "transformers" else []


def tied_groups(trial: Trial, case: Case) -> list[list[str]]:
    """The names in the port of each group of parameters that are one tensor."""
    return [[trial.family.port_key(key) for key in group] for group in tied_of(trial.family, case.fields)]


def logits_of(answer: Answer, prefix: str = "output.") -> torch.Tensor:
    """The logits among a process's outputs, as named output or as the first tensor with three axes of a tuple."""
    outputs = {name.removeprefix(prefix): t for name, t in answer.tensors.items() if name.startswith(prefix)}
    for name in ("logits", *outputs):
        if name in outputs and outputs[name].ndim == 3:
            return outputs[name]
    raise Mismatch(f"the fresh process returned no logits, only {', '.join(outputs) or 'nothing'}")
