# SPDX-License-Identifier: Apache-2.0
"""The golden file itself: its layout, reading one that may be broken, writing one whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from harness.errors import DescriptionError

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = "1"
REQUIRED = (
    "family",
    "implementation",
    "config",
    "mode",
    "conventions",
    "tie_aliases",
    "seed",
    "torch_version",
)
SECTION = re.compile(r"(?:outputs|grads|adamw(?P<steps>\d+))_f(?P<bits>64|32)(?P<nocast>_nocast)?")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Golden:
    """One golden file, read and found sound as far as that can be told without its original.

    path: where it was read from.
    family: the word in the file; the family that answers for it may have another name.
    fields: the configuration, as the original's own fields.
    mode: the mode the original ran in.
    tie_aliases: state-dict key that is not stored -> the stored key of the same tensor.
    weights: the original's state-dict keys -> float64 tensors, finite; integer buffers as they are.
    inputs: name without `inputs/` -> tensor; floats (additive masks, probes) may hold -inf but no NaN.
    stored: full name ("outputs_f64/logits") -> float64, float32, integer or bool tensor, finite.
    metadata: every metadata string; `conventions`, `generation` and `adamw` (where present) parsed from JSON.
    sections: what has to be produced, as the first parts of the stored names ("outputs_f64", "adamw3_f64").
    original: the class to build instead of the family's own, None for the family's own.
    """

    path: Path
    family: str
    fields: Mapping[str, Any]
    mode: Literal["eval", "train"]
    tie_aliases: Mapping[str, str]
    weights: Mapping[str, torch.Tensor]
    inputs: Mapping[str, torch.Tensor]
    stored: Mapping[str, torch.Tensor]
    metadata: Mapping[str, Any]
    sections: frozenset[str]
    original: type | None = None


class Named(dict[str, Any]):
    """A dict that lacks a key through the fault of its file: asking for the key raises DescriptionError."""

    def __init__(self, lacking: str, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.lacking = lacking

    def __missing__(self, key: str) -> Any:
        raise DescriptionError(f"{self.lacking}{key}")


def read_golden(path: str | Path) -> Golden:
    """Reads one file. Raises DescriptionError, one line that begins with the path, if anything is wrong."""
    path = Path(path)
    try:
        return _parse(path, *_load(path))
    except DescriptionError as error:
        raise DescriptionError(f"{path}: {error}") from None


def write_golden(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes a golden file whole or not at all; metadata that is not a string is written as JSON.

    Raises DescriptionError when the place cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    strings = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished, metadata=strings)
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        raise DescriptionError(f"{path}: cannot be written: {one_line(error)}") from None
    finally:
        unfinished.unlink(missing_ok=True)


def one_line(error: BaseException) -> str:
    """What an exception says, in one line of at most 300 characters; its type where it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def some(names: set[str] | list[str]) -> str:
    """Names for an error message: the first three in order, and how many more there are."""
    shown = sorted(names)
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")


def _load(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        if path.stat().st_size == 0:
            raise DescriptionError("is empty, expected a safetensors file")
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise DescriptionError(f"is truncated or not safetensors ({one_line(error)})") from None
    except (OSError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise DescriptionError(f"cannot be read: {one_line(error)}") from None


def _parse(path: Path, metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> Golden:
    if missing := [key for key in REQUIRED if key not in metadata]:
        raise DescriptionError(f"metadata lacks {', '.join(missing)}; expected a golden file")
    if (version := metadata.get("format_version", FORMAT_VERSION)) != FORMAT_VERSION:
        raise DescriptionError(f"format_version is '{version}', expected '{FORMAT_VERSION}'")
    mode = metadata["mode"]
    if mode not in ("eval", "train"):
        raise DescriptionError(f"mode is '{mode}', expected 'eval' or 'train'")
    parsed: dict[str, Any] = {
        key: _json(metadata, key) for key in ("conventions", "generation", "adamw") if key in metadata
    }

    weights = _below(tensors, "weights/")
    inputs = _below(tensors, "inputs/")
    stored = {name: value for name, value in tensors.items() if not name.startswith(("weights/", "inputs/"))}
    if not weights:
        raise DescriptionError("holds no weights, expected tensors named weights/<state-dict key>")
    if not stored:
        raise DescriptionError("holds nothing to reproduce, expected tensors named outputs_f64/...")
    _check_values(tensors)

    aliases = _json(metadata, "tie_aliases")
    for alias, key in aliases.items():
        if key not in weights or alias in weights:
            raise DescriptionError(f"tie_aliases says {alias} is {key}, expected weights/{key} and no weights/{alias}")
    golden = Golden(
        path=path,
        family=metadata["family"],
        fields=Named("its config lacks ", _json(metadata, "config")),
        mode="train" if mode == "train" else "eval",
        tie_aliases=aliases,
        weights=weights,
        inputs=Named("it holds no inputs/", inputs),
        stored=stored,
        metadata={**metadata, **parsed},
        sections=frozenset(name.partition("/")[0] for name in stored),
    )
    _check_generation(golden)
    _check_adamw(golden)
    return golden


def _below(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _json(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        value = json.loads(metadata[key])
    except (ValueError, RecursionError) as error:
        raise DescriptionError(f"metadata '{key}' is not JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise DescriptionError(f"metadata '{key}' is a JSON {type(value).__name__}, expected an object")
    return value


def _check_values(tensors: Mapping[str, torch.Tensor]) -> None:
    import torch

    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            if tensor.is_complex():
                raise DescriptionError(f"{name} is {dtype_name(tensor)}, expected a real dtype")
            continue
        section = SECTION.fullmatch(name.partition("/")[0])
        expected = torch.float32 if section and section["bits"] == "32" else torch.float64
        if tensor.dtype != expected:
            wanted = str(expected).removeprefix("torch.")
            raise DescriptionError(f"{name} is {dtype_name(tensor)}, expected {wanted}")
        # An additive mask is an input, and its dropped places are -inf.
        odd = tensor.isnan() | tensor.isposinf() if name.startswith("inputs/") else ~tensor.isfinite()
        if odd.any():
            raise DescriptionError(f"{name} holds {int(odd.sum())} values that are not finite")


def _check_generation(golden: Golden) -> None:
    options = golden.metadata.get("generation")
    if options is None:
        return
    _check_options("generation", options, max_new_tokens=int, seed=int, temperature=float)
    if not isinstance(options.get("top_k"), int | None):
        raise DescriptionError(f"generation: top_k is {options['top_k']!r}, expected an integer or null")
    prompt = golden.inputs.get("prompt")
    if prompt is None or prompt.ndim != 2:
        raise DescriptionError("generation is described, but there is no two-dimensional inputs/prompt")
    shape = (prompt.shape[0], prompt.shape[1] + options["max_new_tokens"])
    for name, tensor in golden.stored.items():
        # Known before the model runs, so that a wrong number cannot make it run for hours.
        if name.partition("/")[2].startswith("generate.") and tuple(tensor.shape) != shape:
            found = tuple(tensor.shape)
            raise DescriptionError(f"{name} has shape {found}, expected {shape}: prompt + new tokens")


def _check_adamw(golden: Golden) -> None:
    options = golden.metadata.get("adamw")
    if options is None:
        if any(section.startswith("adamw") for section in golden.sections):
            raise DescriptionError("metadata lacks adamw, expected it beside weights after AdamW steps")
        return
    _check_options("adamw", options, steps=int, lr=float, eps=float, weight_decay=float)
    betas = options.get("betas")
    if not isinstance(betas, list) or [isinstance(beta, int | float) for beta in betas] != [True, True]:
        raise DescriptionError(f"adamw: betas is {betas!r}, expected two numbers")
    batches = {name: value for name, value in golden.inputs.items() if name.startswith("adamw_")}
    if not batches:
        raise DescriptionError("adamw is described, but there is no inputs/adamw_* for its steps")
    for name, value in batches.items():
        if value.ndim == 0 or value.shape[0] != options["steps"]:
            raise DescriptionError(
                f"inputs/{name} has shape {tuple(value.shape)}, expected {options['steps']} steps first"
            )


def _check_options(what: str, options: Mapping[str, Any], **kinds: type) -> None:
    for key, kind in kinds.items():
        value = options.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
            wanted = "a number" if kind is float else "an integer"
            raise DescriptionError(f"{what}: {key} is {value!r}, expected {wanted}")


def dtype_name(tensor: torch.Tensor) -> str:
    """The dtype in one word: "float64"."""
    return str(tensor.dtype).removeprefix("torch.")
