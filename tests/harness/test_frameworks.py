# SPDX-License-Identifier: Apache-2.0
"""What checks run is a torch module: torch's own is left as it is, whether MLX is here or not, and MLX's is wrapped."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from harness.backends import frameworks


@pytest.fixture(params=["as it is here", "not imported"])
def any_mlx(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX as it is in this environment, and as where it is not imported and cannot be."""
    if request.param == "not imported":
        for name in [name for name in sys.modules if name.split(".")[0] == "mlx"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.delitem(sys.modules, "harness.backends.mlx_module", raising=False)
        monkeypatch.setitem(sys.modules, "mlx", None)


class Sourced(torch.nn.Linear):
    """A port may have any attribute, of those that MlxModule has too."""

    source = "somewhere"
    mlx_model = None


@pytest.mark.usefixtures("any_mlx")
@pytest.mark.parametrize("cls", [torch.nn.Linear, Sourced, dict, int])
def test_what_is_not_of_mlx_is_left_as_it_is(cls: type) -> None:
    assert frameworks.torch_class(cls) is cls
    model: Any = cls(2, 3) if issubclass(cls, torch.nn.Linear) else cls()
    assert frameworks.torch_module(model) is model


@pytest.mark.usefixtures("any_mlx")
def test_a_torch_model_is_watched_in_its_operations() -> None:
    model, values = Sourced(2, 3).double(), torch.ones(1, 2, dtype=torch.float64)
    assert not frameworks.float32_inside(model, lambda: model(values))
    assert frameworks.float32_inside(model, lambda: model(values).float().tanh().double())


@pytest.mark.mlx
def test_a_class_and_a_model_of_mlx_become_torchs() -> None:
    nn = pytest.importorskip("mlx.nn", reason="needs MLX: pip install 'parity-harness[mlx]'")
    cls = frameworks.torch_class(nn.Linear)
    assert issubclass(cls, torch.nn.Module) and cls.__name__ == "Linear"
    model = nn.Linear(2, 3)
    module = frameworks.torch_module(model)
    assert isinstance(module, torch.nn.Module) and set(module.state_dict()) == {"weight", "bias"}
    assert frameworks.torch_module(module) is module
    assert frameworks.torch_class(type(module)) is type(module)


@pytest.mark.mlx
def test_a_model_of_mlx_is_judged_by_its_numbers() -> None:
    mx = pytest.importorskip("mlx.core", reason="needs MLX: pip install 'parity-harness[mlx]'")
    import mlx.nn as nn

    class Erf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def __call__(self, values: Any) -> Any:
            return mx.erf(self.layer(values))

    module = frameworks.torch_module(Erf()).double()
    values = torch.ones(1, 4, dtype=torch.float64)
    # No operation of torch's sees it.
    assert frameworks.float32_inside(module, lambda: module(values))


def test_importing_needs_no_framework() -> None:
    lines = "import sys; from harness.backends import frameworks; print(*{'torch', 'mlx'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
