# SPDX-License-Identifier: Apache-2.0
"""What golden files of both originals store, reproduced; and how closely it has to agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from harness.errors import DescriptionError, Mismatch

if TYPE_CHECKING:
    import torch

    from harness.golden import Golden

    Picks = dict[str, Callable[[Any], torch.Tensor]]

ANCESTOR = "nanomoe_ancestor"
"""The `family` of the ancestor's files; those of the original say `nanomoe`."""


def golden(golden: Golden) -> Mapping[str, torch.Tensor]:
    """Everything that a golden file of either family stores.

    Raises DescriptionError when the config has unknown fields, Mismatch when a router returns no `Routing`.
    """
    from harness.golden import reproduce

    config, has_experts = _config(golden)
    places = {"embedding": "transformer.drop", "final_norm": "transformer.ln_f"}
    picks: Picks = {}
    for layer in range(config.n_layer):
        path = f"transformer.h.{layer}"
        places[f"block.{layer}"] = path
        if has_experts(config, layer):
            for submodule, taken in {"mlp.router": _of_router(golden), "mlp": _of_layer(golden, config)}.items():
                named = {f"router.{layer}.{name}": pick for name, pick in taken.items()}
                places |= dict.fromkeys(named, f"{path}.{submodule}")
                picks |= named
    return reproduce(golden, places=places, pick=picks, run=_run)


def bounds(golden: Golden) -> Mapping[str, float]:
    """Relative bounds by tensor-name pattern: rounding, but behind the losses that upstream takes in float32 always.

    These themselves agree to 1e-6 (a sum of squares of small cosines loses a digit), what depends on them to 1e-7.
    """
    config, _ = _config(golden)
    losses = _losses(golden, config) if config.n_exp > 1 else {}
    exact = {"outputs_f64/loss_term.ntp_loss": 1e-12, "outputs_f64/*z_loss": 1e-12, "*_f64/*": 1e-12}
    if not {"aux_loss", "experts_ortho_loss"} & set(losses):
        return exact
    rounded = {"outputs_f64/*.aux_loss": 1e-6, "outputs_f64/*.experts_ortho_loss": 1e-6}
    behind = ("outputs_f64/loss", "outputs_f64/adamw_losses", "grads_f64/*", "adamw*_f64/*")
    return rounded | dict.fromkeys(behind, 1e-7) | exact


def _config(golden: Golden) -> tuple[Any, Callable[[Any, int], bool]]:
    """The original's configuration, and where it has experts."""
    from reference_models.nanomoe import ancestor, original

    try:
        if golden.family == ANCESTOR:
            return ancestor.GPTConfig(**golden.fields), ancestor.is_moe_layer
        return original.GPTConfig(**golden.fields), original.is_moe_layer
    except TypeError as error:
        raise DescriptionError(f"its config is not that of {golden.family}: {error}") from None


def _run(module: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Logits, the loss, and the terms of the loss where the original names them."""
    import torch

    targets = inputs.get("targets", inputs["idx"])  # logits of all positions are given with targets only
    logits, loss, *terms = module(inputs["idx"], targets)
    if "targets" not in inputs:
        return {"logits": logits}
    named = terms[0] if terms else {}
    return {
        "logits": logits,
        "loss": loss,
        **{f"loss_term.{name}": torch.as_tensor(value, dtype=loss.dtype) for name, value in named.items()},
    }


def _of_router(golden: Golden) -> Picks:
    """What is stored of the routing in one layer, taken from what its router returns."""
    import torch

    ancestor = golden.family == ANCESTOR

    def checked(pick: Callable[[Any], torch.Tensor]) -> Callable[[Any], torch.Tensor]:
        def from_routing(value: Any) -> torch.Tensor:
            if not hasattr(value, "keep"):
                raise Mismatch(f"the router returns {type(value).__name__}, expected a Routing as the built-in one's")
            return pick(value)

        return from_routing

    def used_capacity(routing: Any) -> torch.Tensor:
        kept: torch.Tensor = routing.indices[routing.keep]
        return kept.bincount(minlength=routing.logits.shape[1])

    picks: Picks = {
        "logits": lambda routing: routing.logits,
        "topk_indices": lambda routing: routing.indices,
        # The ancestor forgets the place of a slot that it drops.
        "rank": lambda routing: routing.ranks.masked_fill(~routing.keep, -1) if ancestor else routing.ranks,
        "keep": lambda routing: routing.keep,
        "probs_kept": lambda routing: routing.weights.masked_fill(~routing.keep, 0),
        "capacity": lambda routing: torch.tensor(int(routing.capacity)),
    }
    picks |= {"used_capacity": used_capacity} if ancestor else {}
    return {name: checked(pick) for name, pick in picks.items()}


def _of_layer(golden: Golden, config: Any) -> Picks:
    """What is stored of one layer with experts, taken from what it returns: hidden states and its losses."""
    losses = {
        stored: lambda output, name=name: output[1][name]  # the default binds this name, not the last one
        for stored, name in _losses(golden, config).items()
    }
    return {"moe_output": lambda output: output[0], **losses}


def _losses(golden: Golden, config: Any) -> dict[str, str]:
    """The losses that one layer with experts computes in the file's mode: name in the file -> the layer's own."""
    names = {"aux_loss": "aux_loss"} if config.use_aux_loss else {}
    names |= {"z_loss": "router_z_loss"} if config.use_router_z_loss else {}
    if golden.family == ANCESTOR:
        return names
    if config.use_qwen3_moe_mlp:
        swiglu = ("router_ortho_loss", "experts_ortho_loss", "gate_output_loss")
        names |= {name: name for name in swiglu if getattr(config, f"use_{name}")}
    return names if golden.mode == "train" else {}
