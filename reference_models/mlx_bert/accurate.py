# SPDX-License-Identifier: Apache-2.0
"""Functions that MLX computes to float32's accuracy even in float64, to float64's there and with MLX's own elsewhere.

Measured with mlx 0.32 on its CPU: exp, sigmoid, softmax, fast.layer_norm and fast.scaled_dot_product_attention are
off by 1e-8 to 2e-6 in float64; tanh, log1p, power, sqrt, means and products are not. erf is off by 4e-7, and stays so.
"""

from __future__ import annotations

import math

import mlx.core as mx


def exp(values: mx.array) -> mx.array:
    """e to the power of each value."""
    if values.dtype != mx.float64:
        return mx.exp(values)
    return mx.power(mx.array(math.e, dtype=mx.float64), values)


def sigmoid(values: mx.array) -> mx.array:
    """1 / (1 + exp(-values))."""
    return mx.sigmoid(values) if values.dtype != mx.float64 else 0.5 * (1 + mx.tanh(0.5 * values))


def softmax(values: mx.array) -> mx.array:
    """Softmax over the last axis; float16 and bfloat16 are summed in float32."""
    if values.dtype != mx.float64:
        return mx.softmax(values, axis=-1, precise=True)
    powers = exp(values - mx.stop_gradient(values.max(axis=-1, keepdims=True)))
    return powers / powers.sum(axis=-1, keepdims=True)


def layer_norm(values: mx.array, weight: mx.array, bias: mx.array, epsilon: float) -> mx.array:
    """LayerNorm over the last axis."""
    if values.dtype != mx.float64:
        return mx.fast.layer_norm(values, weight, bias, epsilon)
    centred = values - values.mean(axis=-1, keepdims=True)
    variance = mx.square(centred).mean(axis=-1, keepdims=True)
    return centred * mx.rsqrt(variance + epsilon) * weight + bias
