# SPDX-License-Identifier: Apache-2.0
"""One vector of a text from the hidden states of its tokens."""

from __future__ import annotations

import mlx.core as mx

from . import accurate

# Every pooling of the document; "attention" and "weighted_mean" take scores of the tokens.
POOLINGS = ("cls", "mean", "max", "attention", "weighted_mean", "last")


def pool(hidden: mx.array, kept: mx.array, kind: str, scores: mx.array | None = None) -> mx.array:
    """(rows, hidden) in the dtype of `hidden`, from `hidden` (rows, tokens, hidden) and bool `kept` (rows, tokens).

    - "cls": the first token, kept or not.
    - "mean", "max": over the kept tokens.
    - "last": the last kept token.
    - "attention": the sum of the kept tokens times the softmax of their `scores` (rows, tokens).
    - "weighted_mean": the mean of the kept tokens by weight; the weights are `scores`, 0 or more, and without scores
      1 for the first kept token, 2 for the second, and so on.

    A row with nothing kept gives zeros, except for "cls". Sums are taken in float32 at least.

    Raises:
        ValueError: another kind; "attention" without scores; scores for a kind that takes none.
    """
    if kind not in POOLINGS:
        raise ValueError(f"pooling {kind!r} is unknown: expected one of {', '.join(POOLINGS)}")
    if scores is not None and kind not in ("attention", "weighted_mean"):
        raise ValueError(f"pooling {kind!r} takes no scores")
    if kind == "cls":
        return hidden[:, 0]
    if kind == "max":
        return max_over(hidden, kept)
    if kind == "mean":
        return _weighted(hidden, kept.astype(_wide(hidden)))
    if kind == "last":
        place = mx.arange(kept.shape[1])
        last = mx.where(kept, place, -1).max(axis=1, keepdims=True)
        return _weighted(hidden, (kept & (place == last)).astype(_wide(hidden)))
    if kind == "weighted_mean":
        weights = mx.cumsum(kept.astype(mx.int32), axis=1) if scores is None else scores
        return _weighted(hidden, mx.where(kept, weights.astype(_wide(hidden)), 0))
    if scores is None:
        raise ValueError("pooling 'attention' needs scores of shape (rows, tokens)")
    lowest = mx.finfo(_wide(hidden)).min
    weights = accurate.softmax(mx.where(kept, scores.astype(_wide(hidden)), lowest))
    return _weighted(hidden, mx.where(kept, weights, 0))


def max_over(hidden: mx.array, kept: mx.array) -> mx.array:
    """The largest value of each feature over the kept tokens; zeros where none is kept."""
    highest = mx.where(kept[:, :, None], hidden, mx.array(-mx.inf, dtype=hidden.dtype)).max(axis=1)
    return mx.where(kept.any(axis=1, keepdims=True), highest, mx.zeros_like(highest))


def _wide(hidden: mx.array) -> mx.Dtype:
    return mx.float64 if hidden.dtype == mx.float64 else mx.float32


def _weighted(hidden: mx.array, weights: mx.array) -> mx.array:
    total = weights.sum(axis=1, keepdims=True)
    shares = mx.where(total > 0, weights / mx.where(total > 0, total, 1), 0)
    # A dropped token may hold infinity or NaN, which no weight of 0 takes away.
    states = mx.where(weights[:, :, None] > 0, hidden.astype(weights.dtype), 0)
    return (shares[:, None, :] @ states)[:, 0].astype(hidden.dtype)
