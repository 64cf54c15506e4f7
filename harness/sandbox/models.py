# SPDX-License-Identifier: Apache-2.0
"""What the jobs of fresh processes do with models: load one as its user would, run it, and describe it as data.

Runs inside the child only, and like `jobs.py` imports nothing of the harness, and no framework until it is called.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]

Values = dict[str, Any]


OF_THE_HUB = ("revision", "code_revision", "token", "cache_dir")
"""Options of loading that say where the files are; a configuration is looked for with the same."""


def load(source: str, request: Mapping[str, Any]) -> tuple[Any, Values]:
    """The model of a directory or a repository of the Hub, as its user would load it, and what is said about it.

    With a `class` (a spec, and `root`) it is loaded by that: it is no model of transformers, and its code is there.

    Raises ValueError when `auto_class` names no Auto class of models.
    """
    if "class" in request:
        return _load_own(source, request)
    import torch
    import transformers

    name = request.get("auto_class", "AutoModelForCausalLM")
    if not str(name).startswith("AutoModel") or not hasattr(transformers, name):
        raise ValueError(f"transformers has no Auto class {name!r} of models; expected AutoModel or AutoModelFor...")
    transformers.utils.logging.disable_progress_bar()
    trust = bool(request.get("trust_remote_code", True))
    options = request.get("load", {})
    place = {name: value for name, value in options.items() if name in OF_THE_HUB}
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust, **place)
    # The configuration is not handed on: a user who has only the directory does not hand it on either.
    model, info = getattr(transformers, name).from_pretrained(
        source,
        trust_remote_code=trust,
        dtype=getattr(torch, request.get("dtype", "float32")),
        output_loading_info=True,
        **options,
    )
    loading: Values = {
        "config_class": type(config).__name__,
        "missing_keys": sorted(info["missing_keys"]),
        "unexpected_keys": sorted(info["unexpected_keys"]),
        "mismatched_keys": sorted([str(key), list(file), list(model)] for key, file, model in info["mismatched_keys"]),
        "errors": [str(error) for error in info.get("error_msgs") or ()],
    }
    return model.eval(), loading


def _load_own(source: str, request: Mapping[str, Any]) -> tuple[Any, Values]:
    import torch

    from harness.backends import frameworks
    from harness.ports import load_object

    cls: Any = frameworks.torch_class(load_object(request["class"], root=Path(request["root"]), watch=False))
    model = cls.from_pretrained(source, **request.get("load", {})).to(getattr(torch, request.get("dtype", "float32")))
    return model.eval(), {"missing_keys": [], "unexpected_keys": []}


def forward(model: Any, request: Mapping[str, Any], tensors: Tensors) -> tuple[Values, Any]:
    """The outputs of one call in evaluation mode, and the type of each by name, those that are no tensors too."""
    import torch

    inputs = {name: tensor for name, tensor in tensors.items() if not name.startswith("generate.")}
    with torch.no_grad():
        outputs = model(**inputs, **request.get("forward", {}))
    return {name: type(value).__name__ for name, value in items(outputs)}, outputs


def inputs_for(name: str, names: Sequence[str], tensors: Tensors) -> Tensors:
    """The tensors that are for every model, and those of this one without their prefix."""
    shared = {key: value for key, value in tensors.items() if key.split(".")[0] not in names}
    own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    return shared | own


def generation_inputs(tensors: Tensors) -> Tensors:
    """The tensors named `generate.*`; without any, those of the forward that generate takes."""
    own = {name.removeprefix("generate."): value for name, value in tensors.items() if name.startswith("generate.")}
    taken = ("input_ids", "attention_mask", "inputs_embeds", "position_ids")
    return own or {name: tensor for name, tensor in tensors.items() if name in taken}


def items(value: Any) -> list[tuple[str, Any]]:
    """The parts of an output under their names; those of a tuple are numbered."""
    value = vars(value) if isinstance(value, types.SimpleNamespace) else value
    if isinstance(value, Mapping):
        return [(str(name), part) for name, part in value.items()]
    parts = value if isinstance(value, list | tuple) else [value]
    return [(str(number), part) for number, part in enumerate(parts)]


def flatten(name: str, value: Any) -> Tensors:
    """Every tensor in nested outputs under its dotted name; what is neither tensor nor container is left out."""
    import torch

    if torch.is_tensor(value):
        return {name: value}
    if not isinstance(value, Mapping | list | tuple | types.SimpleNamespace):
        return {}
    return {key: part for inner, nested in items(value) for key, part in flatten(f"{name}.{inner}", nested).items()}


def describe_model(model: Any, tied: Sequence[Sequence[str]]) -> Values:
    """Class, origin, configuration, every parameter and buffer, and whether each tied group is one tensor."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    saved = model.state_dict().keys()
    return {
        "class": type(model).__name__,
        "module": type(model).__module__,
        "file": getattr(sys.modules.get(type(model).__module__), "__file__", None),
        "training": bool(model.training),
        "config": model.config.to_dict(),
        "parameters": {name: describe_tensor(tensor) for name, tensor in parameters.items()},
        "buffers": {name: describe_tensor(tensor) | {"saved": name in saved} for name, tensor in buffers.items()},
        "tied": [describe_group(group, parameters | buffers) for group in tied],
    }


def describe_tensor(tensor: torch.Tensor) -> Values:
    """Shape, dtype, checksum, and whether every value is finite."""
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "checksum": checksum(tensor),
        "finite": bool(tensor.isfinite().all()),
    }


def describe_group(names: Sequence[str], tensors: Mapping[str, torch.Tensor]) -> Values:
    """Whether the named tensors are one object and one memory, and which of the names do not exist."""
    found = [tensors[name] for name in names if name in tensors]
    complete = len(found) == len(names)
    return {
        "names": list(names),
        "missing": [name for name in names if name not in tensors],
        "same_tensor": complete and all(tensor is found[0] for tensor in found),
        "same_memory": complete and len({tensor.data_ptr() for tensor in found}) == 1,
    }


def checksum(tensor: torch.Tensor) -> float:
    """A float64 sum with a weight per position, so that a permutation or transposition changes it."""
    import torch

    flat = tensor.detach().flatten().to(torch.float64)
    return float(flat @ torch.linspace(1.0, 2.0, flat.numel(), dtype=torch.float64, device=flat.device))


def files_below(directory: Path) -> dict[str, int]:
    """Relative path of every file and its size."""
    found = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in found}


def describe_process() -> Values:
    """Where the job runs, and what it found there before anything was loaded."""
    cache = Path(os.environ["HF_MODULES_CACHE"])
    return {
        "pid": os.getpid(),
        "working_directory": os.getcwd(),
        "working_directory_files": sorted(os.listdir()),
        "home": os.environ["HOME"],
        "module_cache": str(cache),
        "module_cache_files": sorted(files_below(cache)) if cache.is_dir() else [],
    }


def is_importable(name: str) -> bool:
    """Whether an import of that name succeeds."""
    try:
        importlib.import_module(name)
    except Exception:
        return False
    return True
