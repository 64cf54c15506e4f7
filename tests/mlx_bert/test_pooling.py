# SPDX-License-Identifier: Apache-2.0
"""Pooling against its definition, token by token, rows without tokens and half precision too."""

from __future__ import annotations

from typing import Any

import pytest

mx = pytest.importorskip("mlx.core", reason="needs MLX: pip install 'parity-harness[mlx]'")
import numpy as np  # noqa: E402

from reference_models.mlx_bert.pooling import POOLINGS, pool  # noqa: E402

pytestmark = [pytest.mark.mlx, pytest.mark.usefixtures("mlx_on_the_cpu")]
KEPT = np.array([[1, 1, 1, 0, 0], [0, 1, 0, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]], dtype=bool)


def states(dtype: Any = None) -> Any:
    values = np.random.default_rng(3).normal(size=(5, 5, 3)) - 2  # below zero: a maximum with zeros would show
    return values if dtype is None else mx.array(values, dtype=mx.float64).astype(dtype)


def defined(kind: str, hidden: Any, kept: Any, scores: Any) -> Any:
    """The pooling of one row, by a loop over its kept tokens."""
    if kind == "cls":
        return hidden[0]
    tokens = np.flatnonzero(kept)
    if not len(tokens):
        return np.zeros(hidden.shape[-1])
    if kind == "max":
        return hidden[tokens].max(axis=0)
    if kind == "last":
        return hidden[tokens[-1]]
    weights = {
        "mean": np.ones(len(tokens)),
        "weighted_mean": np.arange(1, len(tokens) + 1) if scores is None else scores[tokens],
        "attention": None if scores is None else np.exp(scores[tokens]),
    }[kind]
    return (hidden[tokens] * (weights / weights.sum())[:, None]).sum(axis=0)


@pytest.mark.parametrize(
    ("kind", "scored"), [(kind, kind == "attention") for kind in POOLINGS] + [("weighted_mean", True)]
)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(mx.float64, 1e-14), (mx.float32, 2e-6), (mx.float16, 4e-3), (mx.bfloat16, 3e-2)]
)
def test_pooling_is_what_it_says(kind: str, scored: bool, dtype: Any, bound: float) -> None:
    scores = np.random.default_rng(4).uniform(0.1, 2, size=KEPT.shape) if scored else None
    found = pool(states(dtype), mx.array(KEPT), kind, None if scores is None else mx.array(scores, dtype=mx.float64))
    truth = [defined(kind, *row) for row in zip(states(), KEPT, [None] * 5 if scores is None else scores, strict=True)]
    assert found.dtype == dtype and found.shape == (5, 3)
    assert np.abs(np.array(found.astype(mx.float64)) - np.array(truth)).max() <= bound


@pytest.mark.parametrize("kind", ["mean", "max", "last", "weighted_mean"])
@pytest.mark.parametrize("bad", [mx.inf, -mx.inf, mx.nan])
def test_what_a_dropped_token_holds_does_not_matter(kind: str, bad: float) -> None:
    kept = mx.array(KEPT)
    hidden = mx.where(kept[:, :, None], states(mx.float32), bad)
    assert (pool(hidden, kept, kind) == pool(states(mx.float32), kept, kind)).all()


def test_a_long_text_does_not_overflow_float16() -> None:
    hidden, kept = mx.full((1, 512, 2), 1000.0, dtype=mx.float16), mx.ones((1, 512), dtype=mx.bool_)
    for kind in ("mean", "weighted_mean"):
        assert (pool(hidden, kept, kind) == 1000).all()


@pytest.mark.parametrize("kind", POOLINGS)
def test_gradients_are_finite_where_nothing_is_kept(kind: str) -> None:
    scores = mx.ones(KEPT.shape) if kind == "attention" else None
    found = mx.grad(lambda hidden: pool(hidden, mx.array(KEPT), kind, scores).sum())(states(mx.float32))
    assert mx.isfinite(found).all()
    assert kind == "cls" or (mx.where(mx.array(KEPT)[..., None], 0, found) == 0).all()


def test_what_is_refused() -> None:
    kept = mx.array(KEPT)
    with pytest.raises(ValueError, match="pooling 'sum' is unknown: expected one of cls, mean, max"):
        pool(states(mx.float32), kept, "sum")
    with pytest.raises(ValueError, match="pooling 'attention' needs scores"):
        pool(states(mx.float32), kept, "attention")
    with pytest.raises(ValueError, match="pooling 'mean' takes no scores"):
        pool(states(mx.float32), kept, "mean", mx.ones(KEPT.shape))
