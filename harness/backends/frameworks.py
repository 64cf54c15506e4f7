# SPDX-License-Identifier: Apache-2.0
"""Models of other frameworks as torch modules, which is what checks run; a torch module is what it is."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any


def torch_class(cls: type) -> type:
    """The class of torch modules that stands for a class of models."""
    mlx = sys.modules.get("mlx.nn")  # whoever has a class of MLX has imported it
    if mlx is None or not issubclass(cls, mlx.Module):
        return cls
    from harness.backends import mlx_module

    return mlx_module.torch_class(cls)


def float32_inside(model: Any, run: Callable[[], Any]) -> bool:
    """Whether a part of a model's float64 computation, which `run` is and whose tensor it returns, is in float32."""
    if _is_of_mlx(model):
        from harness.backends import mlx_module

        return mlx_module.float32_inside(model, run)
    from harness.backends import pytorch

    return pytorch.float32_inside(run) is not None


@contextlib.contextmanager
def compiled(model: Any, *, whole: bool) -> Iterator[Any]:
    """A model as its framework's compiler makes it, in one graph where it is `whole`.

    Raises Mismatch where the compiler cannot, and Skip where there is none.
    """
    if _is_of_mlx(model):
        from harness.backends import mlx_module

        with mlx_module.compiled(model) as graph:
            yield graph
    else:
        from harness.backends import pytorch

        with pytorch.compiled(model, whole=whole) as graph:
            yield graph


def quantised(model: Any, quantize: Callable[..., Any], options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A model after `quantize(model, **options)` of its own framework, and the numbers it stores, by parameter.

    Raises Mismatch where nothing is quantised.
    """
    from harness.backends import mlx_module  # the one framework whose ports are quantised so

    return mlx_module.quantised(model, quantize, options)


def torch_module(model: Any) -> Any:
    """The torch module that stands for a model."""
    mlx = sys.modules.get("mlx.nn")
    if mlx is None or not isinstance(model, mlx.Module):
        return model
    from harness.backends import mlx_module

    return mlx_module.torch_module(model)


def _is_of_mlx(model: Any) -> bool:
    wrapping = sys.modules.get("harness.backends.mlx_module")  # imported where there is anything of MLX
    return wrapping is not None and isinstance(model, wrapping.MlxModule)
