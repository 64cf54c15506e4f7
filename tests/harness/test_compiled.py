# SPDX-License-Identifier: Apache-2.0
"""Models as their frameworks' compilers make them: the same numbers, and one line where a value decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harness.backends import frameworks
from harness.errors import Mismatch, Skip

WEIGHT = torch.tensor([[1.0, 2.0], [3.0, -4.0]], dtype=torch.float64)


class Plain(torch.nn.Module):
    """A product and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(WEIGHT.clone())

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values @ self.weight + 1


class ByValue(Plain):
    """What it computes depends on a number among its inputs."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return super().forward(values) * (2 if float(values.sum()) > 0 else 3)


BATCHES = [torch.eye(2, dtype=torch.float64), -torch.eye(2, dtype=torch.float64)]


@pytest.mark.parametrize("whole", [True, False])
def test_a_torch_module_compiled_gives_the_same(whole: bool) -> None:
    model = Plain()
    with frameworks.compiled(model, whole=whole) as graph:
        for values in BATCHES:
            torch.testing.assert_close(graph(values), model(values), rtol=1e-12, atol=0)


def test_a_torch_module_that_looks_at_a_value_is_not_one_graph() -> None:
    with (
        pytest.raises(Mismatch, match=r"^torch\.compile\(fullgraph=True\) fails: "),
        frameworks.compiled(ByValue(), whole=True) as graph,
    ):
        graph(BATCHES[0])


def test_a_torch_module_that_looks_at_a_value_may_be_several_graphs() -> None:
    model = ByValue()
    with frameworks.compiled(model, whole=False) as graph:
        for values in BATCHES:
            torch.testing.assert_close(graph(values), model(values), rtol=1e-12, atol=0)


def of_mlx(by_value: bool = False) -> Any:
    """The same two models in MLX, as torch modules."""
    mlx_nn = pytest.importorskip("mlx.nn", reason="needs MLX: pip install 'parity-harness[mlx]'")
    import mlx.core as mx

    class Model(mlx_nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = mx.array(WEIGHT.float().numpy())

        def __call__(self, values: Any, scale: float = 1.0) -> dict[str, Any]:
            found = scale * (values @ self.weight + 1)
            if by_value:
                found = found * (2 if float(values.sum()) > 0 else 3)
            return {"logits": found, "sums": (found.sum(axis=0),)}

    return frameworks.torch_module(Model())


@pytest.mark.mlx
def test_a_model_of_mlx_compiled_gives_the_same_for_every_kind_of_call() -> None:
    model = of_mlx()
    with frameworks.compiled(model, whole=True) as graph:
        for values in map(torch.Tensor.float, BATCHES):
            for call in ({}, {"scale": 0.5}):
                found = graph(values, **call)
                expected = call.get("scale", 1.0) * (values @ WEIGHT.float() + 1)
                torch.testing.assert_close(found["logits"], expected)
                torch.testing.assert_close(found["sums"][0], expected.sum(0))
        assert len(model.graphs) == 2
    assert model.graphs is None


@pytest.mark.mlx
def test_a_model_of_mlx_that_looks_at_a_value_is_told() -> None:
    with (
        pytest.raises(Mismatch, match=r"^mlx\.core\.compile fails: "),
        frameworks.compiled(of_mlx(by_value=True), whole=True) as graph,
    ):
        graph(BATCHES[0].float())


@pytest.mark.mlx
def test_where_mlx_compiles_nothing_nothing_is_said_to_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    model = of_mlx()
    import mlx.core as mx

    monkeypatch.setattr(mx, "compile", lambda function: function)  # as where there is no C++ compiler
    with pytest.raises(Skip, match=r"C\+\+ compiler"), frameworks.compiled(model, whole=True):
        pass
