# SPDX-License-Identifier: Apache-2.0
"""One check at work on one port: building the original and the port from a case, and running both."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from harness import numerics
from harness.backends import frameworks, pytorch
from harness.cases import Case
from harness.cases.batches import Batch, draw_batch
from harness.cases.weights import sensitising_state
from harness.errors import DescriptionError, Mismatch
from harness.families import Family, Fields, nearest, padding_of
from harness.ports import Port, lacks, load_object

if TYPE_CHECKING:
    from harness.sandbox import Sandbox


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recorded:
    """What a case was when it failed: the original's tensors by key (float64; of tied ones one), and the batch."""

    case: Case
    weights: Mapping[str, torch.Tensor]
    batch: Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """What a check is given beside its case: the port, how the weights travel, and where the port runs.

    workdir is an empty directory of this trial's own; `sandbox` starts fresh processes, `hub` those that talk to a Hub.
    float32_inside: the port was seen to compute a part in float32, and is held to the bound for that. recorded: weights
    and batch of a bundle, which its case has instead of drawing them: another release of torch may draw others.
    """

    port: Port
    family: Family
    route: str
    backend: str
    dtype: str
    workdir: Path
    sandbox: Sandbox
    hub: Sandbox
    float32_inside: bool = False
    recorded: Recorded | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """Original (float64, CPU) and port (the trial's dtype and backend) with the same weights, and a batch."""

    original: torch.nn.Module
    port: torch.nn.Module
    batch: Batch


def original_class(trial: Trial) -> type:
    """The class that is the truth: the repository's own where the port names one, else the family's."""
    return load_class(trial.port.original or trial.family.original, trial.port.root)


def load_class(spec: str, root: Path) -> type:
    """The class a spec names. Raises DescriptionError when it names something else."""
    found = load_object(spec, root=root)
    if not isinstance(found, type):
        raise DescriptionError(f"'{spec}' is a {type(found).__name__}, not a class")
    return found


def original_model(trial: Trial, case: Case, *, dtype: str = "float64") -> torch.nn.Module:
    """The original with the case's sensitising weights, in evaluation mode on the CPU."""
    module = initial_original(trial, case.fields)
    state = sensitising_state(module, gains=trial.family.gains, seed=case.seed)
    if trial.recorded is not None and (case.fields, case.seed) == (
        trial.recorded.case.fields,
        trial.recorded.case.seed,
    ):
        known = {id(state[key]): tensor for key, tensor in trial.recorded.weights.items() if key in state}
        state = {key: known.get(id(tensor), tensor) for key, tensor in state.items()}  # tied ones are one object
    module.load_state_dict(state)
    return module.to(pytorch.DTYPES[dtype]).eval()


def initial_original(trial: Trial, fields: Fields) -> torch.nn.Module:
    """The original as its own initialisation leaves it."""
    return trial.family.build_original(original_class(trial), fields)


def draw(trial: Trial, case: Case) -> Batch:
    """The case's batch."""
    if trial.recorded is not None and trial.recorded.case == case:
        return trial.recorded.batch
    vocabulary = case.fields[trial.family.vocabulary]
    return draw_batch(rows=case.rows, tokens=case.tokens, vocabulary=vocabulary, seed=case.seed)


def content_tokens(trial: Trial, case: Case, tokens: torch.Tensor) -> torch.Tensor:
    """The tokens with another in place of each that the model takes for padding by its id, so that all count."""
    pad = padding_of(trial.family, case.fields)
    if pad is None:
        return tokens
    return tokens.masked_fill(tokens == pad, (pad + 1) % case.fields[trial.family.vocabulary])


def prepare(trial: Trial, case: Case) -> Pair:
    """Original, port and batch of a case; the weights travel by the trial's route."""
    from harness.routes import carry

    original = original_model(trial, case)
    port = place(trial, carry(trial, case, original))
    return Pair(original=original, port=port, batch=draw(trial, case))


def place(trial: Trial, model: torch.nn.Module) -> torch.nn.Module:
    """A port in the trial's dtype, on its device, in evaluation mode."""
    placed = model.to(device=pytorch.device_of(trial.backend), dtype=pytorch.DTYPES[trial.dtype]).eval()
    if trial.backend.startswith("mlx-"):
        placed.device = trial.backend.partition("-")[2]  # type: ignore[assignment]
    return placed


def run_original(
    trial: Trial, module: torch.nn.Module, tokens: torch.Tensor, targets: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """The original's outputs by name, without gradients, on the CPU; it runs where its parameters are."""
    device = next(module.parameters()).device
    with torch.no_grad():
        outputs = trial.family.run_original(module, tokens.to(device), None if targets is None else targets.to(device))
    return {name: value.cpu() for name, value in outputs.items()}


def run_port(trial: Trial, model: torch.nn.Module, tokens: torch.Tensor, **options: Any) -> dict[str, Any]:
    """The port's outputs by name, on the CPU, without gradients; `options` are further arguments of its forward."""
    with torch.no_grad():
        outputs = outputs_of(trial, call_port(trial, model, tokens, **options))
    if (
        not {"logits_to_keep", "num_logits_to_keep"} & set(options)
        and outputs["logits"].shape[1] == 1 < tokens.shape[1]
    ):
        raise Mismatch(
            "forward gives logits of the last position only; a port gives those of every position, fewer with"
            " logits_to_keep"
        )
    return outputs


def port_logits(trial: Trial, model: torch.nn.Module, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    """The port's logits (rows, tokens, vocabulary), on the CPU."""
    logits: torch.Tensor = run_port(trial, model, tokens, **options)["logits"]
    return logits


def call_port(trial: Trial, model: torch.nn.Module, tokens: torch.Tensor | None, **options: Any) -> Any:
    """What the port's forward returns, untouched; tensors are moved to the trial's device, None is not passed on.

    Raises Mismatch when forward changes a tensor that it was given.
    """
    device = pytorch.device_of(trial.backend)
    inputs = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    if tokens is not None:
        inputs["input_ids"] = tokens.to(device)
    given = {name: value for name, value in inputs.items() if value is not None}
    _require_taken(model, given)
    before = {name: value.clone() for name, value in given.items() if isinstance(value, torch.Tensor)}
    with pytorch.autocast(trial.backend, trial.dtype):
        output = model(**given)
    for name, value in before.items():
        if not torch.equal(_without_nan(given[name]), _without_nan(value)):
            raise Mismatch(f"forward writes into its argument '{name}'; the caller's tensor must stay as it was")
    return output


def _without_nan(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with zeros for what is not a number, which does not equal itself."""
    return torch.where(tensor.isnan(), 0, tensor.detach()) if tensor.is_floating_point() else tensor


def _require_taken(model: torch.nn.Module, names: Iterable[str]) -> None:
    for name in names:
        if not takes(model, name, by_keywords=True):
            raise Mismatch(f"forward takes no '{name}'; a port of this family does, or declares what it lacks")


def takes(model: torch.nn.Module, name: str, *, by_keywords: bool = False) -> bool:
    """Whether a model's forward has a parameter of that name, or, `by_keywords`, takes any keyword."""
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or (by_keywords and any(p.kind is p.VAR_KEYWORD for p in parameters.values()))


def is_asked(trial: Trial, feature: str, check: str) -> bool:
    """Whether the family has a feature, and the port does not say that it lacks the check of it."""
    return feature in trial.family.features and not lacks(trial.port, check)


def field_known_by(trial: Trial, fields: Fields, name: str) -> str | None:
    """The original's name, among `fields`, of the field that transformers knows by this name."""
    return next((field for field in fields if name in (field, *trial.family.fields.get(field, ()))), None)


def outputs_of(trial: Trial, output: Any) -> dict[str, Any]:
    """Outputs by name from what a forward returned: an output object, a mapping, or a tuple.

    In a tuple the first tensor with three axes counts as logits and a first scalar as the loss, as Hugging Face
    orders them. Tensors come back on the CPU. Raises Mismatch where there are no logits.
    """
    if isinstance(output, tuple) and not hasattr(output, "_fields"):
        tensors = [value for value in output if isinstance(value, torch.Tensor)]
        named: dict[str, Any] = {}
        for value in tensors:
            named.setdefault("logits" if value.ndim == 3 else "loss" if value.ndim == 0 else "other", value)
    elif isinstance(output, Mapping):
        named = dict(output)
    else:
        named = {"logits": output} if isinstance(output, torch.Tensor) else dict(getattr(output, "__dict__", {}))
    named.setdefault("logits", named.get(trial.family.output))
    if not isinstance(named["logits"], torch.Tensor):
        raise Mismatch(
            f"forward returned {type(output).__name__} without {trial.family.output}; a port returns an output with"
            f" .{trial.family.output}"
        )
    return {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in named.items()}


def port_class(trial: Trial) -> type:
    """The port's model class; for one of MLX the class of torch modules that stands for it."""
    return frameworks.torch_class(load_class(trial.port.model, trial.port.root))


def config_class(trial: Trial) -> type:
    """The port's configuration class."""
    return load_class(trial.port.config, trial.port.root)


def port_config(trial: Trial, fields: Fields, **options: Any) -> Any:
    """The port's configuration for the original's fields. Raises Mismatch when a field has no place in it."""
    cls = config_class(trial)
    config = cls(
        **{port_field(trial, cls, name): value for name, value in fields.items()}, **constants(trial, cls), **options
    )
    for field, name in trial.port.config_map.items():
        if not hasattr(config, name):
            raise Mismatch(f"config_map sends '{field}' to '{name}', which {cls.__name__} does not have")
    return config


def port_field(trial: Trial, cls: type, field: str) -> str:
    """The name of one of the original's fields in the port's configuration."""
    if field in trial.port.config_map:
        return trial.port.config_map[field]
    accepted = accepted_fields(cls)
    for name in (field, *trial.family.fields.get(field, ())):
        if name in accepted:
            return name
    raise Mismatch(
        f"{cls.__name__} has no field for the original's '{field}'; give it one, or name in config_map the one that is"
        f" meant{nearest(field, sorted(accepted))}"
    )


def accepted_fields(cls: type) -> set[str]:
    """The names a configuration class takes: parameters of its constructor, its dataclass fields and its aliases."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]  # type: ignore[misc]
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    fields = {name for name in getattr(cls, "__dataclass_fields__", {}) if not name.startswith("_")}
    return named | fields | set(getattr(cls, "attribute_map", {}))


def constants(trial: Trial, cls: type) -> dict[str, Any]:
    """What every configuration of the family is given, as far as the port's class takes it."""
    accepted = accepted_fields(cls)
    return {name: value for name, value in trial.family.port_fields.items() if name in accepted}


def require_semantics(
    trial: Trial,
    what: str,
    actual: torch.Tensor,
    expected: torch.Tensor,
    *,
    baseline: Callable[[], torch.Tensor] | None = None,
    first_divergence: str | None = None,
    float32_bound: float = numerics.FLOAT32_INSIDE_BOUND,
) -> dict[str, float]:
    """Checks a port's tensor against the float64 oracle, with the bound of the trial's dtype; gives the numbers.

    float64: 1e-9 relative, or `float32_bound` for a port that is known to narrow to float32 inside.
    Anything less: calibrated against `baseline`, the original's tensor at that dtype, or 1000 units in the last place.
    """
    if trial.dtype != "float64":
        epsilon = pytorch.epsilon(trial.dtype)
        if baseline is not None:
            return numerics.require_calibrated(what, actual, baseline(), expected, epsilon=epsilon)
        return {"error": numerics.require_close(what, actual, expected, bound=1000 * epsilon)}
    bound = float32_bound if trial.float32_inside else numerics.SEMANTICS_BOUND
    return {"error": numerics.require_close(what, actual, expected, bound=bound, first_divergence=first_divergence)}


def each_attention(model: Any) -> Iterator[str]:
    """Sets the port's attention implementations one after the other, and yields the name of each: its own, then eager.

    A port that has only one yields that alone.
    """
    if not hasattr(model, "set_attn_implementation"):
        yield "its own"
        return
    own = getattr(model.config, "_attn_implementation", None) or "sdpa"
    for name in dict.fromkeys((own, "eager")):
        model.set_attn_implementation(name)
        yield name
    model.set_attn_implementation(own)


def copied(model: torch.nn.Module) -> torch.nn.Module:
    """An independent copy, ties kept."""
    return copy.deepcopy(model)


def worst(*metrics: Mapping[str, float]) -> dict[str, float]:
    """The largest of each number."""
    largest: dict[str, float] = {}
    for numbers in metrics:
        for name, value in numbers.items():
            largest[name] = max(value, largest.get(name, value))
    return largest
