# SPDX-License-Identifier: Apache-2.0
"""What golden files of BERT store, reproduced by the original; and how far any other implementation is from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harness.errors import DescriptionError

if TYPE_CHECKING:
    import torch

    from harness.families import Fields
    from harness.golden import Golden

GOLDEN_FAMILY = "bert"
"""The `family` of the files, of DistilBERT's too."""

BOUNDS: Mapping[str, float] = {"*_f64/*": 1e-12, "*_f32/*": 1e-5}
"""Relative bounds by tensor-name pattern: rounding. No part of the original leaves float64 in a float64 model."""

OBJECTIVE = "probe_objective"
PROBES = "grad_probe."
CALL: Sequence[str] = ("attention_mask", "token_type_ids", "position_ids")
"""Inputs beside `input_ids`, in the order of the call."""


def golden(golden: Golden) -> Mapping[str, torch.Tensor]:
    """Everything that a golden file of BERT or DistilBERT stores, by its full name.

    Raises DescriptionError when the config is not one of the original's.
    """
    from harness.golden import reproduce
    from reference_models.mlx_bert.original import taps

    # What a layer gives is what its last norm gives.
    names = {"embedding", *(f"block.{layer}" for layer in range(int(fields(golden)["num_hidden_layers"])))}
    places = {tap.name: tap.original for tap in taps(fields(golden)) if tap.name in names}
    return reproduce(golden, places=places, run=_run, objective=OBJECTIVE)


def fields(golden: Golden) -> Fields:
    """The file's configuration by BERT's names, `model_type` among them, for a model that is built from these.

    Raises DescriptionError when it is not one of the original's.
    """
    from reference_models.mlx_bert.original import configuration, fields_of

    try:
        return fields_of(configuration(golden.fields))
    except (TypeError, ValueError) as error:
        raise DescriptionError(f"its config is not that of {golden.family}: {error}") from None


def weights(golden: Golden) -> Mapping[str, Any]:
    """The file's weights by BERT's names, which are the port's in every model: NumPy arrays, float64."""
    from reference_models.mlx_bert.original import port_key

    return {port_key(key): tensor.numpy() for key, tensor in golden.weights.items()}


def inputs(golden: Golden) -> Mapping[str, Any]:
    """What a model is called with: `input_ids` and the arguments of `CALL` that the file has, NumPy arrays, int64."""
    return {name: golden.inputs[name].numpy() for name in ("input_ids", *CALL) if name in golden.inputs}


def named(
    golden: Golden,
    *,
    hidden_states: Sequence[Any],
    pooler_output: Any | None,
    gradients: Mapping[str, Any] | None = None,
    precision: str = "f64",
) -> Mapping[str, Any]:
    """What another implementation computed, as NumPy arrays by the names under which the file stores it.

    Args:
        hidden_states: the embeddings, then what each layer gives: (rows, tokens, hidden).
        pooler_output: (rows, hidden); None where the model has no pooler.
        gradients: of `probe_objective`, by BERT's names.
        precision: "f64" or "f32", which of the stored outputs is meant.
    """
    import numpy

    from reference_models.mlx_bert.original import named_states, port_key

    outputs = {**named_states(hidden_states), "last_hidden_state": hidden_states[-1]}
    outputs |= {} if pooler_output is None else {"pooler_output": pooler_output}
    arrays = {name: numpy.asarray(value) for name, value in outputs.items()}
    probes = {name: golden.inputs[f"{PROBES}{name}"].numpy() for name in arrays if f"{PROBES}{name}" in golden.inputs}
    arrays[OBJECTIVE] = numpy.asarray(sum((arrays[name] * probe).sum() for name, probe in probes.items()))
    found = {f"outputs_{precision}/{name}": value for name, value in arrays.items()}
    # The file has the original's names, which are DistilBERT's own in DistilBERT.
    own = {port_key(key): key for key in golden.weights}
    return found | {f"grads_{precision}/{own[key]}": numpy.asarray(value) for key, value in (gradients or {}).items()}


def differences(golden: Golden, produced: Mapping[str, Any]) -> Mapping[str, float]:
    """Relative error `max|a-b| / rms(b)` of what another implementation gives, by stored name.

    produced: arrays by full name ("outputs_f64/block.0"), see `named`. A gradient is measured by the scale of all
    gradients, since some are zero by construction. Names that only one side has are infinitely far, if that side's
    section ("outputs_f64", "grads_f64") is among both; so are arrays of another shape or with NaN.
    """
    import torch

    from harness.numerics import relative_error

    sections = {_section(name) for name in produced} & golden.sections
    stored = {name: value for name, value in golden.stored.items() if _section(name) in sections}
    gradients = [value.double().flatten() for name, value in stored.items() if name.startswith("grads")]
    scale = float(torch.cat(gradients).square().mean().sqrt()) if gradients else 0.0
    errors = dict.fromkeys(set(stored) ^ {name for name in produced if _section(name) in sections}, float("inf"))
    for name in set(stored) & set(produced):
        expected, own = stored[name], torch.as_tensor(produced[name])
        if own.shape != expected.shape:
            errors[name] = float("inf")
            continue
        errors[name] = relative_error(own, expected)
        size = float(expected.double().square().mean().sqrt())
        if name.startswith("grads") and size < scale:
            errors[name] *= (size or 1.0) / scale
    return dict(sorted(errors.items()))


def _section(name: str) -> str:
    return name.partition("/")[0]


def _run(module: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One call of the original, and the scalar whose gradients are stored."""
    from reference_models.mlx_bert.original import run

    outputs = run(module, inputs["input_ids"], *(inputs.get(name) for name in CALL))
    probed = [
        (value * inputs[f"{PROBES}{name}"]).sum() for name, value in outputs.items() if f"{PROBES}{name}" in inputs
    ]
    if probed:
        outputs[OBJECTIVE] = sum(probed[1:], start=probed[0])
    return outputs
