# SPDX-License-Identifier: Apache-2.0
"""Reading who got which token from what a layer gave; and oracles that decide near ties as another run did."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from harness.capture import like
from harness.cases import Case, Kind, cases
from harness.families import Decision, RoutedLayer, Tap, find_family
from harness.routing import combined, deciding_as, mixture, watch_layers

EPSILON = torch.finfo(torch.bfloat16).eps


class Layer(nn.Module):
    """Scores of four experts, and the best two of them added up."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(8, 4, bias=False).double()

    def forward(self, x: Tensor) -> Tensor:
        best, indices = self.scores(x).topk(2, dim=-1)
        one_hot = torch.zeros(*x.shape[:-1], 4, dtype=x.dtype).scatter(-1, indices, best.softmax(dim=-1))
        return torch.cat([one_hot, one_hot], dim=-1)


def tap(name: str, path: str) -> Tap:
    return Tap(name=name, original=path, port=path)


LAYERS = [
    RoutedLayer(layer=tap("one", "0"), logits=tap("one.scores", "0.scores"), router=tap("one.router", "0.router"))
]


def test_weights_are_read_from_a_sum_of_expert_outputs() -> None:
    generator = torch.Generator().manual_seed(1)
    of_experts = torch.randn(5, 3, 8, generator=generator, dtype=torch.float64)
    weights = torch.tensor(
        [[0.7, 0.3, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.2, 0.3, 0.5], [0.0, 0.0, 0.4]]
    ).double()
    found = mixture(torch.einsum("ne,ned->nd", weights, of_experts), of_experts)
    assert bool(found.told.all())
    assert torch.allclose(found.weights, weights, atol=1e-12)
    assert float(found.rest.max()) < 1e-12


def test_what_is_no_mixture_of_the_experts_is_told_from_what_is() -> None:
    of_experts = torch.eye(3, 8, dtype=torch.float64).expand(2, 3, 8)
    outputs = torch.zeros(2, 8, dtype=torch.float64)
    outputs[1, 7] = 0.5
    assert mixture(outputs, of_experts).rest.tolist() == [0.0, 0.5]


def test_where_two_experts_say_the_same_their_weights_cannot_be_told() -> None:
    of_experts = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    of_experts[1, 2] = of_experts[1, 0]
    assert mixture(of_experts.sum(dim=1), of_experts).told.tolist() == [True, False]


def test_more_experts_than_channels_cannot_be_told() -> None:
    of_experts = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert not bool(mixture(of_experts.sum(dim=1), of_experts).told.any())


def test_a_decision_as_weights_of_all_experts_leaves_out_what_found_no_room() -> None:
    decision = Decision(
        indices=torch.tensor([[2, 0], [1, 2]]),
        ranks=torch.tensor([[0, 0], [0, 1]]),
        keep=torch.tensor([[True, True], [True, False]]),
        weights=torch.tensor([[0.75, 0.25], [0.5, 0.5]]),
    )
    assert combined(decision, 4).tolist() == [[0.25, 0.0, 0.75, 0.0], [0.0, 0.5, 0.0, 0.0]]


def test_what_a_layer_was_given_and_gave_has_one_row_for_each_token() -> None:
    model = nn.Sequential(Layer())
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    output, seen = watch_layers(model, LAYERS, "port", lambda: model(x))
    assert torch.equal(seen["one"].outputs, output.reshape(6, 8))  # type: ignore[arg-type]
    assert torch.equal(seen["one"].inputs, x.reshape(6, 8))  # type: ignore[arg-type]
    assert seen["one"].logits is not None and seen["one"].logits.shape == (6, 4)
    assert seen["one"].router is None  # there is no such module


def near_tie() -> tuple[nn.Module, Tensor, Tensor]:
    """A model, two tokens of which the first has the second and third expert all but tied, and its scores."""
    model = nn.Sequential(Layer())
    with torch.no_grad():
        model[0].scores.weight.copy_(torch.eye(4, 8))  # type: ignore[union-attr, operator]
    x = torch.zeros(2, 8, dtype=torch.float64)
    x[0, :4] = torch.tensor([3.0, 1.0, 1.001, -1.0])
    x[1, :4] = torch.tensor([3.0, 2.0, 1.0, 0.0])
    return model, x, x[:, :4].clone()


def test_a_near_tie_falls_as_in_the_other_run_and_is_counted() -> None:
    model, x, scores = near_tie()
    scores[0, 1] = 1.002
    with deciding_as(model, LAYERS, {"one": scores}, epsilon=EPSILON, k=2) as aside:
        decided = model(x)
    assert aside == [1]
    assert decided[0, 1] > 0 and decided[0, 2] == 0
    assert torch.equal(decided[1], model(x)[1])
    assert model(x)[0, 2] > 0  # afterwards it decides by itself again


def test_a_near_tie_that_falls_alike_is_not_set_aside() -> None:
    model, x, scores = near_tie()
    with deciding_as(model, LAYERS, {"one": scores * 1.0001}, epsilon=EPSILON, k=2) as aside:
        decided = model(x)
    assert aside == [0]
    assert torch.equal(decided, model(x))


def test_a_choice_that_is_no_near_tie_is_judged_by_the_oracle_alone() -> None:
    model, x, scores = near_tie()
    scores[1] = torch.tensor([3.0, 1.0, 2.0, 0.0])
    with deciding_as(model, LAYERS, {"one": scores}, epsilon=EPSILON, k=2) as aside:
        decided = model(x)
    assert aside == [0]
    assert torch.equal(decided, model(x))


@pytest.mark.parametrize(("kind", "blocks"), [("drawn", {2, 4}), ("independent", {20}), ("continuous", {30})])
def test_a_check_is_asked_of_the_models_of_its_kind(kind: Kind, blocks: set[int]) -> None:
    nearby: Any = {name: lambda fields, size=size: {**fields, "block_size": size} for name, size in _SIZES.items()}
    fields = {"vocab_size": 11, "n_layer": 1, "n_head": 1, "n_embd": 4, "dropout": 0.0, "bias": True}
    family = dataclasses.replace(
        find_family("nanogpt"),
        configurations=lambda: st.sampled_from([{**fields, "block_size": size} for size in (2, 4)]),
        **nearby,
    )
    seen = set()

    @settings(max_examples=20, database=None, derandomize=True)
    @given(cases(family, kind))
    def draw(case: Case) -> None:
        seen.add(case.fields["block_size"])

    draw()
    assert seen == blocks


_SIZES = {"independent": 20, "continuous": 30}


def test_checks_of_experts_are_asked_of_models_that_have_some() -> None:
    family, seen = find_family("nanomoe"), []

    @settings(max_examples=30, database=None, derandomize=True)
    @given(cases(family, "routed"))
    def draw(case: Case) -> None:
        assert family.routing is not None
        seen.append(len(family.routing.layers(case.fields)))

    draw()
    assert min(seen) == 1 and max(seen) > 1


def test_rows_and_tokens_in_one_axis_are_the_same_tensor() -> None:
    flat = torch.arange(24.0).reshape(6, 4)
    assert like(flat, torch.zeros(2, 3, 4)).shape == (2, 3, 4)
    assert like(flat, torch.zeros(3, 8)).shape == (6, 4)


def test_what_a_layer_is_given_by_keyword_is_seen_too() -> None:
    model = nn.Sequential(Layer())
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    _, seen = watch_layers(model, LAYERS, "port", lambda: model[0](x=x))
    assert torch.equal(seen["one"].inputs, x)  # type: ignore[arg-type]
