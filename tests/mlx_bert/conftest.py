# SPDX-License-Identifier: Apache-2.0
"""What the tests of the MLX BERT share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def mlx_on_the_cpu() -> Iterator[None]:
    """MLX on the CPU, where float64 is: the numbers are those of one machine whatever else it has."""
    import mlx.core as mx

    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)
