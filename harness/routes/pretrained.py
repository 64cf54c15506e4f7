# SPDX-License-Identifier: Apache-2.0
"""Route `pretrained`: the port saves itself to a directory and is loaded back from there."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from harness.errors import Mismatch
from harness.routes import carry as carry_by
from harness.routes import main_route
from harness.trial import Trial, port_class

if TYPE_CHECKING:
    from harness.cases import Case


def carry(trial: Trial, case: Case, original: torch.nn.Module) -> torch.nn.Module:
    """The port after `save_pretrained` and `from_pretrained` in this process."""
    return load(trial, save(trial, case, original)).eval()


def save(trial: Trial, case: Case, original: torch.nn.Module, **options: Any) -> Path:
    """The directory the port saved itself to, with the original's weights; `options` go to `save_pretrained`."""
    first = main_route(trial.port)
    source = dataclasses.replace(trial, route="direct" if first == "pretrained" else first)
    model = carry_by(source, case, original)
    directory = trial.workdir / "saved"
    model.save_pretrained(directory, **options)  # type: ignore[operator]
    return directory


def load(trial: Trial, directory: Path, **options: Any) -> torch.nn.Module:
    """The port from a saved directory. Raises Mismatch where tensors were missing, left over or of another shape."""
    cls: Any = port_class(trial)
    model, info = cls.from_pretrained(directory, output_loading_info=True, **options)
    require_clean(info)
    loaded: torch.nn.Module = model
    return loaded


def require_clean(info: dict[str, Any]) -> None:
    """Raises Mismatch unless a loading report has no missing, unexpected or mismatched key."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, info.get(kind, ()))):
            raise Mismatch(
                f"from_pretrained reports {kind.replace('_', ' ')}: {', '.join(keys[:3])}", metrics={kind: len(keys)}
            )
