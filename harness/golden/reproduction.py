# SPDX-License-Identifier: Apache-2.0
"""Running an original from a golden file alone, so that a family's `golden` function stays a few lines."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.capture import capture
from harness.errors import DescriptionError, Mismatch
from harness.families import Family, family_names, find_family
from harness.golden.file import SECTION, Golden, Named, dtype_name, one_line, some

if TYPE_CHECKING:
    import torch

    Tensors = Mapping[str, torch.Tensor]
    Run = Callable[[torch.nn.Module, Tensors], Tensors]


def family_of(name: str) -> Family:
    """The family that answers for a golden file's `family`: by its name, or by one of its `golden_names`.

    Raises DescriptionError when there is none here, and ImportError when it needs what is not installed.
    """
    names = family_names()
    if name not in names:
        for other in names:
            with contextlib.suppress(ImportError, DescriptionError):
                if name in find_family(other).golden_names:
                    return find_family(other)
    return find_family(name)


def build(golden: Golden, dtype: torch.dtype) -> torch.nn.Module:
    """The original with the file's weights in `dtype`, on the CPU, in the file's mode.

    Its state dict must consist of exactly the file's weights and tie aliases, in names and shapes;
    DescriptionError says what does not fit. Mismatch when it does not tie what the file says is one tensor.
    """
    import torch

    from harness.ports import load_object

    family = family_of(golden.family)
    try:
        original = golden.original or load_object(family.original, root=Path.cwd())
    except DescriptionError as error:  # not the file's fault
        raise Mismatch(f"the original of {family.name} cannot be loaded: {error}") from None
    state = {**golden.weights, **{alias: golden.weights[key] for alias, key in golden.tie_aliases.items()}}
    try:
        # A model without storage costs nothing: a wrong size is found before gigabytes are allocated for it.
        with contextlib.suppress(NotImplementedError, RuntimeError), torch.device("meta"):
            _check_fit(family.build_original(original, golden.fields), state)
        module = family.build_original(original, golden.fields).to(dtype)
    except DescriptionError:
        raise
    except Exception as error:
        cause = f"{type(error).__name__}: {one_line(error)}"
        raise DescriptionError(f"its config does not build {original.__name__}: {cause}") from None
    _check_fit(module, state)
    module.load_state_dict(state)
    own = module.state_dict(keep_vars=True)
    for alias, key in golden.tie_aliases.items():
        if own[alias] is not own[key]:
            raise Mismatch(f"{original.__name__} does not tie {alias} to {key}, as the file says its original does")
    return module.train(golden.mode == "train")


def _check_fit(module: torch.nn.Module, state: Tensors) -> None:
    own = module.state_dict()
    absent, extra = set(own) - set(state), set(state) - set(own)
    if absent or extra:
        parts = [f"lack {some(absent)}"] * bool(absent) + [f"hold {some(extra)} too many"] * bool(extra)
        raise DescriptionError(f"weights {' and '.join(parts)}, expected those of {type(module).__name__}")
    for key, tensor in own.items():
        if tensor.shape != state[key].shape:
            found, expected = tuple(state[key].shape), tuple(tensor.shape)
            raise DescriptionError(f"weights/{key} has shape {found}, {type(module).__name__} expects {expected}")
        if tensor.is_floating_point() != state[key].is_floating_point():
            found_dtype, expected_dtype = dtype_name(state[key]), dtype_name(tensor)
            raise DescriptionError(f"weights/{key} is {found_dtype}, {type(module).__name__} expects {expected_dtype}")


def inputs_at(golden: Golden, dtype: torch.dtype) -> Named:
    """The file's inputs, the floating-point ones in `dtype`."""
    floats = {name: value.to(dtype) for name, value in golden.inputs.items() if value.is_floating_point()}
    return Named("it holds no inputs/", {**golden.inputs, **floats})


def gradients(golden: Golden, module: torch.nn.Module, objective: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a scalar by the file's names, a tied tensor once; zeros where it has no part."""
    import torch

    module.zero_grad(set_to_none=True)
    objective.backward()
    return {
        key: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for key, parameter in _parameters(golden, module).items()
    }


def after_adamw(
    golden: Golden, dtype: torch.dtype, run: Run, *, objective: str = "loss"
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Weights by the file's names after the steps of its `adamw` metadata; the loss before each (steps,).

    Step s runs on `adamw_<name>[s]` in place of input `<name>`; groups are the family's `parameter_groups`.
    """
    import torch

    options, family = golden.metadata["adamw"], family_of(golden.family)
    if family.parameter_groups is None:
        raise Mismatch(f"family '{family.name}' has no parameter groups for the stored AdamW steps")
    module = build(golden, dtype).train(options.get("mode", golden.mode) == "train")
    groups = family.parameter_groups(module, options["weight_decay"])
    optimiser = torch.optim.AdamW(groups, lr=options["lr"], betas=tuple(options["betas"]), eps=options["eps"])
    inputs, losses = inputs_at(golden, dtype), []
    batches = [name for name in inputs if name.startswith("adamw_")]
    for step in range(options["steps"]):
        batch = {name.removeprefix("adamw_"): inputs[name][step] for name in batches}
        loss = _objective(golden, run(module, Named(inputs.lacking, {**inputs, **batch})), objective)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    weights = {key: parameter.detach() for key, parameter in _parameters(golden, module).items()}
    return weights, torch.stack(losses)


def generated(golden: Golden, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Prompt + new tokens (batch, tokens) of the family's `generate_original`, by the `generation` metadata.

    `generate.greedy` is the native loop with top_k=1, which leaves the draw no choice; `generate.sampled` is
    seeded right before the call.
    """
    import torch

    options, generate = golden.metadata["generation"], family_of(golden.family).generate_original
    if generate is None:
        raise Mismatch(f"family '{golden.family}' has no generation, which is stored")
    module, prompt, count = build(golden, dtype), golden.inputs["prompt"], options["max_new_tokens"]
    greedy = generate(module, prompt, max_new_tokens=count, temperature=1.0, top_k=1)
    torch.manual_seed(options["seed"])
    sampled = generate(module, prompt, max_new_tokens=count, temperature=options["temperature"], top_k=options["top_k"])
    return {"generate.greedy": greedy, "generate.sampled": sampled}


@contextlib.contextmanager
def without_downcast() -> Iterator[None]:
    """Makes `Tensor.float()` convert to float64, for originals with parts in float32 at any dtype."""
    import torch

    changed: Any = torch.Tensor
    before = changed.float
    changed.float = changed.double
    try:
        yield
    finally:
        changed.float = before


def reproduce(
    golden: Golden,
    *,
    places: Mapping[str, str],
    run: Run | None = None,
    objective: str = "loss",
    pick: Mapping[str, Callable[[Any], torch.Tensor]] | None = None,
) -> dict[str, torch.Tensor]:
    """Everything `golden.sections` asks for, under its full name in the layout; most families need only this.

    places: name in the layout (`embedding`, `block.0`, `final_norm`) -> path of a submodule, see `capture`.
    run: (module, inputs by name) -> outputs by name, differentiable; by default the family's
        `run_original` on `idx` and, where stored, `targets`.
    objective: the output that is differentiated.
    pick: see `capture`.
    """
    import torch

    family = family_of(golden.family)

    def decode(module: torch.nn.Module, inputs: Tensors) -> Tensors:
        return family.run_original(module, inputs["idx"], inputs.get("targets"))

    run = run or decode
    produced: dict[str, torch.Tensor] = {}
    sections = [match for match in map(SECTION.fullmatch, sorted(golden.sections)) if match]
    for bits, nocast in sorted({(match["bits"], match["nocast"] or "") for match in sections}):
        tag, dtype = f"f{bits}{nocast}", torch.float64 if bits == "64" else torch.float32
        with without_downcast() if nocast else contextlib.nullcontext(), torch.enable_grad():
            module, inputs = build(golden, dtype), inputs_at(golden, dtype)
            outputs, seen = capture(module, places, functools.partial(run, module, inputs), pick=pick)
            found = {f"outputs_{tag}/{name}": value for name, value in {**outputs, **seen}.items()}
            if f"grads_{tag}" in golden.sections:
                grads = gradients(golden, module, _objective(golden, outputs, objective))
                found |= {f"grads_{tag}/{key}": value for key, value in grads.items()}
            for match in sections:
                if match["steps"] and match[0].endswith(f"_{tag}"):
                    weights, losses = after_adamw(golden, dtype, run, objective=objective)
                    found |= {f"{match[0]}/{key}": value for key, value in weights.items()}
                    found[f"outputs_{tag}/adamw_losses"] = losses
        # Copies, because names that share storage (a tied tensor, a view) cannot be written to a file.
        produced |= {name: value.detach().clone() for name, value in found.items()}
    if "generation" in golden.metadata:
        bits = "64" if golden.metadata["generation"].get("dtype") == "float64" else "32"
        tokens = generated(golden, torch.float64 if bits == "64" else torch.float32)
        produced |= {f"outputs_f{bits}/{name}": value for name, value in tokens.items()}
    return produced


@contextlib.contextmanager
def reference_settings() -> Iterator[None]:
    """What golden files are made under: one CPU thread, float32 as default, the caller's draws untouched."""
    import torch

    threads, default = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(default)


def _parameters(golden: Golden, module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    # Duplicates kept, because which name of a tied tensor the file stores is the file's choice.
    named = module.named_parameters(remove_duplicate=False)
    return {key: parameter for key, parameter in named if key in golden.weights}


def _objective(golden: Golden, outputs: Tensors, objective: str) -> torch.Tensor:
    if objective not in outputs:
        raise DescriptionError(f"it stores gradients, but its inputs give no '{objective}'")
    return outputs[objective]
