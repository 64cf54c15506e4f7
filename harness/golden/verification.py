# SPDX-License-Identifier: Apache-2.0
"""Whether originals still give what golden files store, one file at a time."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from harness.errors import DescriptionError, Mismatch, NotHere
from harness.families import Family
from harness.golden.file import Golden, dtype_name, one_line, read_golden, some
from harness.golden.reproduction import family_of, reference_settings

if TYPE_CHECKING:
    import torch

BOUNDS: Mapping[str, float] = {"float64": 1e-9, "float32": 1e-4}
"""Largest relative error `max|a-b| / rms(b)` by the dtype of the stored tensor; integers must be equal.

The numbers are those of "Precision" in the README of the golden files (fixtures/golden/README.md), which are
absolute ones for outputs of scale 1; `Family.golden_bounds` holds the exceptions it names.
"""

SUFFIX = ".safetensors"
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GoldenResult:
    """What became of one golden file.

    file: path relative to what was verified. family: as the file says, "" when it could not be read.
    status: `verified`; `failed`, the original does not give what is stored; `broken`, the file is unsound;
        `skipped`, there is no original of its family here. reason: one line, "" only when verified.
    errors: stored name -> relative error, for integers and booleans the number of elements that differ.
    bounds: the same names -> the largest error allowed.
    """

    file: str
    family: str
    status: Literal["verified", "failed", "broken", "skipped"]
    reason: str = ""
    errors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    bounds: Mapping[str, float] = dataclasses.field(default_factory=dict)


def verify(path: str | Path, *, original_override: Mapping[str, str | type] | None = None) -> list[GoldenResult]:
    """Verifies one file, or every *.safetensors below a directory in the order of their names.

    original_override: family -> class, or its `file.py:Class` or `module:Class`, to hold against the files
    instead of the family's own original.

    A file that is broken or fails is a result and hides no other. Raises DescriptionError when there is
    nothing to verify, and what `load_object` raises when an override cannot be loaded.
    """
    root = Path(path)
    originals = {name: _loaded(name, spec) for name, spec in (original_override or {}).items()}
    if root.is_file():
        return [_verify_file(root, root.name, None, originals)]
    if not root.is_dir():
        raise DescriptionError(f"{root}: there is no such file or directory, expected golden files")
    files = sorted(file for file in root.rglob(f"*{SUFFIX}") if not file.name.startswith("."))
    if not files:
        raise DescriptionError(f"{root}: holds no {SUFFIX} files, expected golden files")
    digests: dict[Path, Any] = {}
    results = []
    for manifest in sorted(root.rglob(MANIFEST)):
        try:
            entries = json.loads(manifest.read_bytes())
            listed = {manifest.parent / entry["file"]: entry.get("sha256") for entry in entries}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            reason = f"is not a list of objects with 'file' and 'sha256': {one_line(error)}"
            results.append(_broken(str(manifest.relative_to(root)), "", reason))
            continue
        digests |= listed
        absent = sorted(file for file in listed if not file.is_file())
        results += [_broken(file.name, "", f"is listed in {MANIFEST} but absent") for file in absent]
    results += [_verify_file(file, str(file.relative_to(root)), digests.get(file), originals) for file in files]
    return sorted(results, key=lambda result: result.file)


def _verify_file(path: Path, name: str, digest: str | None, originals: dict[str, type]) -> GoldenResult:
    try:
        golden = read_golden(path)
    except DescriptionError as error:
        return _broken(name, "", str(error).removeprefix(f"{path}: "))
    if digest is not None and digest != _sha256(path):
        return _broken(name, golden.family, f"differs from {MANIFEST}: its SHA-256 is not the one listed")
    try:
        family = family_of(golden.family)
    except DescriptionError:
        return _skipped(name, golden.family, f"there is no original of '{golden.family}' here")
    except ImportError as error:
        return _skipped(name, golden.family, f"the family needs what is not installed: {one_line(error)}")
    if family.golden is None:
        return _skipped(name, golden.family, f"family '{family.name}' cannot reproduce golden files")
    try:
        if (original := originals.get(golden.family, originals.get(family.name))) is not None:
            golden = dataclasses.replace(golden, original=original)
        with reference_settings():
            produced = family.golden(golden)
        return _compare(golden, family, name, produced)
    except DescriptionError as error:
        return _broken(name, golden.family, one_line(error).removeprefix(f"{path}: "))
    except NotHere as error:
        return _skipped(name, golden.family, one_line(error))
    except Mismatch as error:
        return GoldenResult(file=name, family=golden.family, status="failed", reason=one_line(error))
    except Exception as error:  # whatever an original raises is its own affair and must not hide other files
        reason = f"the original raised {type(error).__name__}: {one_line(error)}"
        return GoldenResult(file=name, family=golden.family, status="failed", reason=reason)


def _compare(golden: Golden, family: Family, name: str, produced: Mapping[str, torch.Tensor]) -> GoldenResult:
    errors: dict[str, float] = {}
    bounds: dict[str, float] = {}
    own_bounds = family.golden_bounds(golden) if callable(family.golden_bounds) else family.golden_bounds
    floors = {name: _gradient_scale(golden, name) for name in golden.sections if name.startswith("grads")}
    unreproduced = set(golden.stored) - set(produced)
    for tensor_name in sorted(set(golden.stored) - unreproduced):
        stored, own = golden.stored[tensor_name], produced[tensor_name]
        if stored.shape != own.shape:
            shapes = f"shape {tuple(stored.shape)}, the original gives {tuple(own.shape)}"
            raise DescriptionError(f"{tensor_name} is stored with {shapes}")
        if stored.dtype != own.dtype:
            raise DescriptionError(
                f"{tensor_name} is stored as {dtype_name(stored)}, the original gives {dtype_name(own)}"
            )
        if stored.is_floating_point():
            errors[tensor_name] = _error(own, stored, floors.get(tensor_name.partition("/")[0], 0.0))
            bounds[tensor_name] = _bound(tensor_name, stored, own_bounds)
        else:
            errors[tensor_name], bounds[tensor_name] = float((own != stored).sum()), 0.0
    reason = _reason(unreproduced, errors, bounds)
    status: Literal["verified", "failed"] = "failed" if reason else "verified"
    return GoldenResult(file=name, family=golden.family, status=status, reason=reason, errors=errors, bounds=bounds)


def _error(own: torch.Tensor, stored: torch.Tensor, floor: float) -> float:
    from harness.numerics import relative_error

    error = relative_error(own, stored)
    scale = _rms([stored])
    return error * (scale or 1.0) / max(scale, floor) if floor else error


def _gradient_scale(golden: Golden, section: str) -> float:
    # A gradient that is zero by construction (a key bias, an unused position) is rounding noise: over its own
    # size two correct runs differ by 1, over the scale of the whole section by 1e-16.
    return _rms([value for name, value in golden.stored.items() if name.startswith(f"{section}/")])


def _rms(tensors: list[torch.Tensor]) -> float:
    count = sum(tensor.numel() for tensor in tensors)
    total = sum(float(tensor.double().square().sum()) for tensor in tensors)
    return math.sqrt(total / count) if count else 0.0


def _bound(name: str, stored: torch.Tensor, own: Mapping[str, float]) -> float:
    fitting = (bound for pattern, bound in own.items() if fnmatch.fnmatchcase(name, pattern))
    return next(fitting, BOUNDS[dtype_name(stored)])


def _reason(unreproduced: set[str], errors: Mapping[str, float], bounds: Mapping[str, float]) -> str:
    reasons = [f"the original gives no {some(unreproduced)}"] if unreproduced else []
    over = {name for name, error in errors.items() if not error <= bounds[name]}
    if counts := {name for name in over if bounds[name] == 0.0}:
        first = min(counts)
        reasons.append(f"{first} differs in {errors[first]:.0f} elements, expected none{_more(counts)}")
    if floats := over - counts:
        worst = max(floats, key=lambda name: (errors[name] / bounds[name], name))
        reasons.append(f"{worst} differs by {errors[worst]:.1e}, bound {bounds[worst]:.0e}{_more(floats)}")
    return "; ".join(reasons)


def _more(names: set[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _broken(file: str, family: str, reason: str) -> GoldenResult:
    return GoldenResult(file=file, family=family, status="broken", reason=reason)


def _skipped(file: str, family: str, reason: str) -> GoldenResult:
    return GoldenResult(file=file, family=family, status="skipped", reason=reason)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _loaded(family: str, spec: str | type) -> type:
    from harness.ports import load_object

    family_of(family)  # a name that no file can have is a slip of the pen
    loaded = load_object(spec, root=Path.cwd()) if isinstance(spec, str) else spec
    if not isinstance(loaded, type):
        raise DescriptionError(f"'{spec}' is a {type(loaded).__name__}, expected a class")
    return loaded
