# SPDX-License-Identifier: Apache-2.0
"""The formulas of routing and its losses against the measured table and the vectors of the upstream code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.families import Observed
from harness.golden.file import Golden, read_golden
from harness.golden.reproduction import build
from harness.routing import combined, observed, watch_layers
from reference_models.nanomoe import closed_forms
from reference_models.nanomoe.family import ANCESTOR, FAMILY

VECTORS = Path(__file__).parents[2] / "fixtures/golden/nanomoe"
FAMILIES = {family.name: family for family in (FAMILY, ANCESTOR)}
TABLE = [
    # logits, best two experts, their ranks, kept weights
    ([2.0, 1.0, 0.0, -1.0], [0, 1], [0, 2], [0.7311, 0.0]),
    ([2.0, 0.0, 1.0, -1.0], [0, 2], [1, 1], [0.7311, 0.2689]),
    ([0.0, 3.0, 1.0, -2.0], [1, 2], [0, 2], [0.8808, 0.0]),
    ([3.0, 2.0, 1.0, 0.0], [0, 1], [2, 3], [0.0, 0.0]),
    ([1.0, 2.0, 0.0, -1.0], [1, 0], [1, 3], [0.7311, 0.0]),
    ([0.0, 1.0, 2.0, -1.0], [2, 1], [0, 4], [0.7311, 0.0]),
]


def test_the_measured_routing_table() -> None:
    fields = {"n_exp": 4, "top_k": 2, "eval_capacity": 0.5, "min_capacity": 1}
    decision = closed_forms.decide(torch.tensor([row[0] for row in TABLE]), fields, False)
    assert decision.indices.tolist() == [row[1] for row in TABLE]
    assert decision.ranks.tolist() == [row[2] for row in TABLE]
    assert torch.allclose(decision.weights, torch.tensor([row[3] for row in TABLE]), atol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "training", "evaluation"),
    [(1, 4, 4), (7, 4, 4), (16, 6, 8), (31, 10, 16), (80, 26, 40), (100, 32, 50), (1000, 312, 500)],
)
def test_the_measured_capacities(tokens: int, training: int, evaluation: int) -> None:
    fields = {"n_exp": 8, "top_k": 2, "train_capacity": 1.25, "eval_capacity": 2.0, "min_capacity": 4}
    assert closed_forms.capacity(fields, tokens, True) == training
    assert closed_forms.capacity(fields, tokens, False) == evaluation


def vectors() -> list[Golden]:
    """The files with experts."""
    every = [read_golden(path) for path in sorted(VECTORS.glob("*.safetensors"))]
    return [golden for golden in every if FAMILIES[golden.family].routing.layers(golden.fields)]  # type: ignore[union-attr]


def ran(golden: Golden) -> tuple[list[Observed], list[int], Any]:
    """Routed layers of the original on a file's inputs in float64, their numbers, and the family's routing."""
    routing: Any = FAMILIES[golden.family].routing
    layers = routing.layers(golden.fields)
    module = build(golden, torch.float64)
    inputs: Any = golden.inputs
    _, seen = watch_layers(module, layers, "original", lambda: module(inputs["idx"], inputs["targets"]))
    return observed(module, layers, seen), [int(layer.layer.name.split(".")[1]) for layer in layers], routing


def stored(golden: Golden, layer: int, name: str) -> Tensor:
    return golden.stored[f"outputs_f64/router.{layer}.{name}"]


@pytest.mark.parametrize("golden", vectors(), ids=lambda golden: golden.path.stem)
def test_choices_of_the_upstream_code(golden: Golden) -> None:
    layers, numbers, routing = ran(golden)
    for layer, number in zip(layers, numbers, strict=True):
        decision = closed_forms.decide(stored(golden, number, "logits"), golden.fields, golden.mode == "train")
        assert torch.equal(decision.indices, stored(golden, number, "topk_indices"))
        assert torch.equal(decision.keep, stored(golden, number, "keep").bool())
        assert torch.equal(decision.ranks[decision.keep], stored(golden, number, "rank")[decision.keep])
        assert torch.allclose(decision.weights, stored(golden, number, "probs_kept"), rtol=0, atol=1e-12)
        outputs = routing.expert_outputs(layer.module, layer.inputs)
        weights = combined(decision, golden.fields["n_exp"])
        expected = stored(golden, number, "moe_output").reshape(len(weights), -1)
        assert torch.allclose(torch.einsum("ne,ned->nd", weights, outputs), expected, rtol=0, atol=1e-12)


TERMS = {
    "aux_loss": (closed_forms.load_balance, "aux_loss_weight"),
    "z_loss": (closed_forms.router_z, "router_z_loss_weight"),
    "router_ortho_loss": (closed_forms.router_orthogonality, "router_ortho_loss_weight"),
    "experts_ortho_loss": (closed_forms.experts_orthogonality, "experts_ortho_loss_weight"),
    "gate_output_loss": (closed_forms.gate_output, "gate_output_loss_weight"),
}


@pytest.mark.parametrize("golden", vectors(), ids=lambda golden: golden.path.stem)
def test_losses_of_the_upstream_code(golden: Golden) -> None:
    layers, numbers, _ = ran(golden)
    compared = 0
    for name, (closed_form, weight) in TERMS.items():
        for layer, number in zip(layers, numbers, strict=True):
            if f"outputs_f64/router.{number}.{name}" not in golden.stored:
                continue
            expected = float(stored(golden, number, name))
            if expected:
                found = closed_form(golden.fields, [layer]).item() / golden.fields[weight]
                # Upstream computes these two in float32, whatever the model's dtype.
                in_float32 = name in ("aux_loss", "experts_ortho_loss")
                assert found == pytest.approx(expected, rel=1e-6 if in_float32 else 1e-12)
                compared += 1
    assert compared >= (len(layers) if golden.mode == "train" else 0)
