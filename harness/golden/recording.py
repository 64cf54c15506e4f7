# SPDX-License-Identifier: Apache-2.0
"""Making a golden file from anyone's original of a known family."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from harness.errors import DescriptionError, ParityError
from harness.families import Family
from harness.golden.file import FORMAT_VERSION, Golden, one_line, write_golden
from harness.golden.reproduction import family_of, reference_settings
from harness.golden.verification import SUFFIX

if TYPE_CHECKING:
    import torch

ADAMW = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
SAMPLING = {"temperature": 0.8, "top_k": 5}
DISTURBANCE = 2e-6
"""Relative change of weights that must leave generated tokens alone, or they would depend on the machine."""

LENGTH, PROMPT = 16, 4
"""Tokens of a batch and of a prompt where nothing else is asked for and the model takes as many."""


def record(
    original_spec: str,
    out: str | Path,
    *,
    fields: Mapping[str, Any],
    family: str,
    seed: int = 0,
    batch: int = 2,
    length: int | None = None,
    mode: Literal["eval", "train"] = "eval",
    generate: int = 0,
    adamw_steps: int = 0,
    inputs: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Writes a golden file of a class (`file.py:Class` or `module:Class`) and returns its path.

    fields: configuration in the original's own fields. seed: draws weights and inputs. batch, length: of the
    token ids; the length is at most 16 when not given. generate: new tokens of the stored generation.
    adamw_steps: steps of the stored training. inputs: used instead of the drawn `idx`, `targets`, `prompt`,
    `adamw_idx`, `adamw_targets`, for families whose inputs go by other names.

    Weights are sensitising; outputs are taken in float64 and float32, gradients in float64. Raises
    DescriptionError when no sound file can be made; then nothing is written and an older file stays.
    """
    import torch

    from harness.cases.weights import sensitising_state
    from harness.ports import load_object

    out, known = Path(out), family_of(family)
    _check_request(out, known, batch=batch, generate=generate, adamw_steps=adamw_steps, seed=seed)
    original = load_object(original_spec, root=Path.cwd())
    if not isinstance(original, type):
        raise DescriptionError(f"'{original_spec}' is a {type(original).__name__}, expected a class")
    with reference_settings():
        try:
            module = known.build_original(original, fields)
        except Exception as error:
            raise DescriptionError(
                f"the config does not build {original_spec}: {type(error).__name__}: {one_line(error)}"
            ) from None
        aliases = _tied(module)
        state = sensitising_state(module, gains=known.gains, seed=seed)
        # A buffer is not learned: a random one (a mask, a table of angles) would be another model.
        state |= {key: value for key, value in module.named_buffers() if key in state}
        weights = {key: _exact(value) for key, value in state.items() if key not in aliases}
        if inputs is None:
            inputs = _drawn(known, fields, seed, batch=batch, length=length, generate=generate, steps=adamw_steps)
        golden = Golden(
            path=out,
            family=family,
            fields=fields,
            mode=mode,
            tie_aliases=aliases,
            weights=weights,
            inputs=inputs,
            stored={},
            metadata=_metadata(known, original_spec, seed, mode=mode, generate=generate, steps=adamw_steps),
            sections=_sections(known, adamw_steps),
            original=original,
        )
        produced = _run(known, golden)
        for name, value in produced.items():
            if not value.isfinite().all():
                raise DescriptionError(f"the original gives values that are not finite: {name}")
        if generate:
            _check_generation_is_stable(golden, known, produced)

    tensors = {
        **{f"weights/{key}": value for key, value in weights.items()},
        **{f"inputs/{name}": value for name, value in inputs.items()},
        **produced,
    }
    described = {
        **golden.metadata, "name": out.stem, "family": family, "config": dict(fields), "tie_aliases": aliases,
        "torch_version": torch.__version__,
    }  # fmt: skip
    write_golden(out, tensors, described)
    return out


def _run(family: Family, golden: Golden) -> Mapping[str, torch.Tensor]:
    assert family.golden is not None
    try:
        return family.golden(golden)
    except ParityError:
        raise
    except Exception as error:
        raise DescriptionError(f"the original raised {type(error).__name__}: {one_line(error)}") from None


def _check_request(out: Path, family: Family, *, batch: int, generate: int, adamw_steps: int, seed: int) -> None:
    if out.suffix != SUFFIX:
        raise DescriptionError(f"{out}: a golden file's name ends in {SUFFIX}")
    if not out.parent.is_dir():
        raise DescriptionError(f"{out}: there is no directory {out.parent}")
    if family.golden is None:
        raise DescriptionError(f"family '{family.name}' cannot reproduce golden files, so none can be recorded")
    if batch < 1 or generate < 0 or adamw_steps < 0 or not 0 <= seed < 2**63:
        raise DescriptionError("batch has to be at least 1; seed, generate and adamw-steps at least 0")
    if generate and family.generate_original is None:
        raise DescriptionError(f"family '{family.name}' has no generation to record")
    if adamw_steps and family.parameter_groups is None:
        raise DescriptionError(f"family '{family.name}' has no parameter groups to take AdamW steps with")


def _tied(module: torch.nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for key, tensor in module.state_dict(keep_vars=True).items():
        if first.setdefault(id(tensor), key) != key:
            aliases[key] = first[id(tensor)]
    return aliases


def _exact(value: torch.Tensor) -> torch.Tensor:
    # Through float32, so that the float32 run of the same file uses the same numbers.
    return value.detach().float().double() if value.is_floating_point() else value.detach().clone()


def _sections(family: Family, adamw_steps: int) -> frozenset[str]:
    sections = {"outputs_f64", "outputs_f32"}
    if "loss" in family.features:
        sections |= {"grads_f64", *([f"adamw{adamw_steps}_f64"] if adamw_steps else [])}
    return frozenset(sections)


def _drawn(
    family: Family,
    fields: Mapping[str, Any],
    seed: int,
    *,
    batch: int,
    length: int | None,
    generate: int,
    steps: int,
) -> dict[str, torch.Tensor]:
    import torch

    vocabulary, maximum = (_size(fields, key) for key in (family.vocabulary, family.maximum_length))
    length = min(LENGTH, maximum) if length is None else length
    if not 1 <= length <= maximum:
        raise DescriptionError(f"length is {length}, expected 1 to {family.maximum_length}={maximum}")
    generator = torch.Generator().manual_seed(seed)

    def ids(*shape: int) -> torch.Tensor:
        return torch.randint(vocabulary, shape, generator=generator)

    def targets(own: torch.Tensor) -> torch.Tensor:
        drawn = own.clone() if family.loss.labels == "hf" else ids(*own.shape)
        ignored = torch.rand(own.shape, generator=generator) < 0.1
        ignored[..., :2] = False  # something has to be left in every row, also after a shift
        return drawn.masked_fill(ignored, family.loss.ignore_index)

    drawn = {"idx": ids(batch, length)}
    if "loss" in family.features:
        drawn["targets"] = targets(drawn["idx"])
        if steps:
            drawn["adamw_idx"] = ids(steps, batch, length)
            drawn["adamw_targets"] = targets(drawn["adamw_idx"])
    if generate:
        drawn["prompt"] = ids(batch, min(PROMPT, length))
    return drawn


def _size(fields: Mapping[str, Any], key: str) -> int:
    value = fields.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise DescriptionError(f"the config has {key}={value!r}, expected a whole number to draw inputs from")
    return value


def _metadata(family: Family, original_spec: str, seed: int, *, mode: str, generate: int, steps: int) -> dict[str, Any]:
    shift = {
        "hf": "the model shifts the targets itself",
        "preshifted": "pre-shifted: the model does not shift",
    }
    place, _, name = original_spec.rpartition(":")
    described: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        # The file's name alone: where it lies on this machine is nobody's business.
        "implementation": f"{Path(place).name if place.endswith('.py') else place}:{name}",
        "upstream_repo": "",
        "upstream_commit": "",
        "mode": mode,
        "conventions": {"ignore_index": family.loss.ignore_index, "target_shift": shift[family.loss.labels]},
        "seed": str(seed),
        "seed_used": {"weights": seed, "inputs": seed},
        "transformers_version": _version("transformers"),
        "device": "cpu",
        "threads": "1",
        "exercises": "",
        "notes": "",
    }
    if generate:
        described["generation"] = {
            **SAMPLING, "max_new_tokens": generate, "seed": seed, "dtype": "float32",
            "greedy": "top_k=1, temperature=1.0",
            "rng": "torch.manual_seed(seed) immediately before the call, CPU",
        }  # fmt: skip
    if steps:
        described["adamw"] = {
            **ADAMW, "steps": steps, "dtype": "float64", "mode": mode, "grad_clip": "none",
            "decay": "the family's parameter groups", "batches": "inputs/adamw_<name>[s]",
        }  # fmt: skip
    return described


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _check_generation_is_stable(golden: Golden, family: Family, produced: Mapping[str, torch.Tensor]) -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    disturbed = {
        key: value * (1 + DISTURBANCE * torch.randn(value.shape, generator=generator, dtype=value.dtype))
        if value.is_floating_point()
        else value
        for key, value in golden.weights.items()
    }
    again = _run(family, dataclasses.replace(golden, weights=disturbed, sections=frozenset({"outputs_f32"})))
    for name, value in produced.items():
        if "/generate." in name and not torch.equal(value, again[name]):
            raise DescriptionError(f"{name} sits on a near tie and would differ between machines; try another seed")
