# SPDX-License-Identifier: Apache-2.0
"""The loss of each head, by its formula, and what is asked of the labels.

Every loss is a scalar in float32 at least. Where a label is -100 it does not count, as in torch; where none counts the
loss is 0, and not torch's NaN, so that a batch without a label changes no weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

from . import accurate
from .core import raise_first
from .heads import HeadConfig, softplus

IGNORED = -100


def loss(config: HeadConfig, outputs: Mapping[str, mx.array], labels: mx.array) -> mx.array:
    """The loss of a head's outputs.

    Args:
        labels: integers (rows,) for multiclass and ordinal, (rows, tokens) for the token types, -100 to ignore;
            (rows,) or (rows, 1) of 0 and 1, or probabilities, for binary; (rows, outputs) of them for multilabel;
            floats (rows, outputs) for a regression, (rows,) too where that is 1; (rows, steps) or (rows, 1, steps)
            for a time series.

    Raises:
        ValueError: labels of another shape or dtype, or, outside of `mx.compile` and `mx.vmap`, out of range.
    """
    return _LOSSES[config.head_type](config, outputs, _checked(config, outputs["logits"], labels))


def cross_entropy(logits: mx.array, labels: mx.array, *, focal_gamma: float = 0.0) -> mx.array:
    """mean over the labels y that count of -(1 - p_y)^gamma log p_y, where p = softmax(logits).

    logits (..., classes), labels integers (...). gamma 0 is the plain cross entropy.
    """
    counted = labels != IGNORED
    place = mx.where(counted, labels, 0)[..., None]
    likely = mx.take_along_axis(_log_softmax(logits), place, axis=-1)[..., 0]
    return _mean(-likely * _focus(likely, focal_gamma), counted)


def binary_cross_entropy(logits: mx.array, labels: mx.array, *, focal_gamma: float = 0.0) -> mx.array:
    """mean of -(1 - p)^gamma y log p - p^gamma (1 - y) log(1 - p), where p = sigmoid(logits); shapes equal.

    gamma 0 is the plain binary cross entropy.
    """
    yes, no = -softplus(-logits), -softplus(logits)
    each = -labels * yes * _focus(yes, focal_gamma) - (1 - labels) * no * _focus(no, focal_gamma)
    return each.mean()


def squared_error(predictions: mx.array, labels: mx.array) -> mx.array:
    """mean of (prediction - y)^2; shapes equal."""
    return mx.square(predictions - labels).mean()


def gaussian(predictions: mx.array, log_variance: mx.array, labels: mx.array) -> mx.array:
    """mean of ((prediction - y)^2 / v + log v) / 2, the negative log likelihood of a normal without its constant."""
    return 0.5 * (mx.square(predictions - labels) * accurate.exp(-log_variance) + log_variance).mean()


def ordinal(logits: mx.array, labels: mx.array) -> mx.array:
    """mean over the rows of the sum over k of the binary cross entropy of sigmoid(logits_k) and [y > k].

    logits (rows, classes - 1), labels integers (rows,).
    """
    counted = labels != IGNORED
    passed = (labels[:, None] > mx.arange(logits.shape[-1])).astype(logits.dtype)
    each = passed * softplus(-logits) + (1 - passed) * softplus(logits)
    return _mean(each.sum(axis=-1), counted)


def _wide(values: mx.array) -> mx.array:
    return values.astype(mx.float32) if values.dtype in (mx.float16, mx.bfloat16) else values


def _log_softmax(logits: mx.array) -> mx.array:
    shifted = logits - mx.stop_gradient(logits.max(axis=-1, keepdims=True))
    return shifted - mx.log(accurate.exp(shifted).sum(axis=-1, keepdims=True))


def _focus(log_likely: mx.array, gamma: float) -> mx.array | float:
    return mx.power(1 - accurate.exp(log_likely), gamma) if gamma else 1.0


def _mean(values: mx.array, counted: mx.array) -> mx.array:
    number = mx.maximum(counted.sum(), 1).astype(values.dtype)
    return mx.where(counted, values, 0).sum() / number


def _classes(config: HeadConfig, outputs: Mapping[str, mx.array], labels: mx.array) -> mx.array:
    return cross_entropy(_wide(outputs["logits"]), labels, focal_gamma=config.focal_gamma)


def _yes_or_no(config: HeadConfig, outputs: Mapping[str, mx.array], labels: mx.array) -> mx.array:
    return binary_cross_entropy(_wide(outputs["logits"]), labels, focal_gamma=config.focal_gamma)


def _values(config: HeadConfig, outputs: Mapping[str, mx.array], labels: mx.array) -> mx.array:
    if config.use_uncertainty:
        return gaussian(_wide(outputs["predictions"]), _wide(outputs["log_variance"]), labels)
    return squared_error(_wide(outputs["predictions"]), labels)


def _ordinal(config: HeadConfig, outputs: Mapping[str, mx.array], labels: mx.array) -> mx.array:
    return ordinal(_wide(outputs["logits"]), labels)


_LOSSES: Mapping[str, Callable[[HeadConfig, Mapping[str, mx.array], mx.array], mx.array]] = {
    "binary_classification": _yes_or_no,
    "multiclass_classification": _classes,
    "multilabel_classification": _yes_or_no,
    "regression": _values,
    "ordinal_regression": _ordinal,
    "time_series": _values,
    "token_classification": _classes,
    "masked_lm": _classes,
}


def _checked(config: HeadConfig, logits: mx.array, labels: Any) -> mx.array:
    """The labels in the shape and dtype that the formula takes."""
    kind = config.head_type
    if not isinstance(labels, mx.array):
        raise ValueError(f"labels are of type {type(labels).__name__}: expected an mlx.core.array")
    counts = kind in ("multiclass_classification", "ordinal_regression", "token_classification", "masked_lm")
    shape = logits.shape[:-1] if counts else logits.shape
    shapes = [shape]
    if not counts and kind != "multilabel_classification" and 1 in shape[1:]:
        # (rows,) for (rows, 1), and (rows, steps) for (rows, 1, steps).
        shapes.insert(0, (shape[0], *(size for size in shape[1:] if size != 1)))
        if kind == "time_series":
            shapes[0] = (shape[0], shape[2])
    if labels.shape not in shapes:
        raise ValueError(f"labels have shape {labels.shape}: a {kind} head expects {' or '.join(map(str, shapes))}")
    if counts:
        if not mx.issubdtype(labels.dtype, mx.integer):
            raise ValueError(f"labels have dtype {labels.dtype}: a {kind} head expects an integer dtype")
        labels = labels.astype(mx.int64)
        outside = ((labels < 0) & (labels != IGNORED)) | (labels >= config.output_size)
        message = f"labels are not all in 0 to {config.output_size - 1}, or {IGNORED} to ignore one"
        raise_first([(outside.any(), message)])
        return labels
    if mx.issubdtype(labels.dtype, mx.complexfloating):
        raise ValueError(f"labels have dtype {labels.dtype}: a {kind} head expects real numbers")
    values = labels.reshape(shape).astype(_wide(logits).dtype)
    if kind in ("binary_classification", "multilabel_classification"):
        # Put so that NaN is refused too.
        inside = (values >= 0) & (values <= 1)
        raise_first([(~inside.all(), f"labels of a {kind} head are not all in 0 to 1")])
    else:
        raise_first([(~mx.isfinite(values).all(), f"labels of a {kind} head are not all finite numbers")])
    return values
