# SPDX-License-Identifier: Apache-2.0
"""Where models run: the names of the backends, and whether each one is here."""

from __future__ import annotations

import importlib.util

BACKENDS = ("torch-cpu", "torch-cuda", "torch-mps", "mlx-cpu", "mlx-gpu")
NO_FLOAT64 = frozenset({"torch-mps", "mlx-gpu"})

MLX_INSTALL = "pip install 'parity-harness[mlx]'"

_MARKS = {"torch-cuda": "cuda", "torch-mps": "metal", "mlx-cpu": "mlx", "mlx-gpu": "mlx"}


def unavailable(backend: str) -> str | None:
    """Why a backend cannot be used here, in one phrase; None when it can."""
    if backend == "torch-cpu":
        return None  # torch is always here, and takes seconds to import
    framework, _, device = backend.partition("-")
    if framework == "mlx":
        if importlib.util.find_spec("mlx") is None:
            return f"MLX is not installed ({MLX_INSTALL})"
        try:
            from harness.backends import mlx
        except ImportError as error:  # on Linux the package `mlx` alone has no library to load
            said = (str(error).splitlines() or [type(error).__name__])[0]
            return f"MLX cannot be imported: {said} ({MLX_INSTALL})"

        return mlx.unavailable(device)
    from harness.backends import pytorch

    return pytorch.unavailable(device)


def mark_of(backend: str) -> str | None:
    """The pytest marker that items of a backend carry, if any."""
    return _MARKS.get(backend)
