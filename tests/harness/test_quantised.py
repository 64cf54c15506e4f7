# SPDX-License-Identifier: Apache-2.0
"""What quantising may do to a number: a step of its group, and nothing to what has no rows of whole groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harness.backends import frameworks
from harness.checks.precision import _within_a_step
from harness.errors import Mismatch

OPTIONS = {"bits": 4, "group_size": 32}


class Model(torch.nn.Module):
    """A matrix of two groups a row, a narrow one, and a norm's weight."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.wide = torch.nn.Parameter(torch.randn(3, 64, generator=generator).double())
        self.narrow = torch.nn.Parameter(torch.randn(3, 8, generator=generator).double())
        self.norm = torch.nn.Parameter(torch.ones(64).double())


def rounded(tensor: torch.Tensor, steps: float = 15) -> torch.Tensor:
    """The nearest of sixteen numbers in each group."""
    groups = tensor.detach().unflatten(-1, (-1, 32))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (high - low) / steps
    return (low + ((groups - low) / step).round() * step).flatten(-2)


def checked(**stored: torch.Tensor) -> None:
    model = Model()
    everything = {name: tensor.detach() for name, tensor in model.named_parameters()} | stored
    _within_a_step(model, {name: name for name in everything}, everything, OPTIONS)


def test_numbers_that_are_rounded_to_their_steps_hold() -> None:
    checked()
    checked(wide=rounded(Model().wide).float())


def test_a_number_beyond_a_step_is_named() -> None:
    with pytest.raises(Mismatch, match=r"^quantize with 4 bits in groups of 32: a number of wide is .* steps"):
        checked(wide=rounded(Model().wide, steps=3))


@pytest.mark.parametrize("name", ["narrow", "norm"])
def test_what_has_no_rows_of_whole_groups_is_left_alone(name: str) -> None:
    tensor = getattr(Model(), name).detach()
    with pytest.raises(Mismatch, match=f"^quantize changes {name}, which has no rows of whole groups"):
        checked(**{name: tensor + 1e-6})


def linear_of_mlx() -> Any:
    nn = pytest.importorskip("mlx.nn", reason="needs MLX: pip install 'parity-harness[mlx]'")
    import mlx.core as mx

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(32, 4)
            self.dense.weight = mx.random.normal((4, 32), key=mx.random.key(0))

        def __call__(self, values: Any) -> Any:
            return self.dense(values)

    return frameworks.torch_module(Layer())


@pytest.mark.mlx
def test_a_quantised_model_of_mlx_tells_the_numbers_it_stores() -> None:
    layer = linear_of_mlx()
    import mlx.nn as nn

    def quantize(model: Any, **options: Any) -> Any:
        nn.quantize(model, **options)
        return model

    before = {name: tensor.detach().clone() for name, tensor in layer.named_parameters()}
    found, stored = frameworks.quantised(layer, quantize, OPTIONS)
    assert set(stored) >= set(before)
    assert torch.equal(stored["dense.bias"], before["dense.bias"])
    assert 0 < float((stored["dense.weight"] - before["dense.weight"]).abs().max()) < 0.5
    values = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    expected = values @ stored["dense.weight"].T + stored["dense.bias"]
    torch.testing.assert_close(found(values), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.mlx
def test_a_quantize_that_changes_no_layer_is_told() -> None:
    with pytest.raises(Mismatch, match=r"^quantize\(bits=4, group_size=32\) changes no layer"):
        frameworks.quantised(linear_of_mlx(), lambda model, **options: model, OPTIONS)
