# SPDX-License-Identifier: Apache-2.0
"""Every form of attention mask, brought to the one that attention takes and to the tokens that pooling counts."""

from __future__ import annotations

import mlx.core as mx

# An additive mask drops what has this value or less: softmax gives it 0 in every dtype. -10000, -1e9, the dtype's
# minimum and minus infinity all mean the same then, in a row with nothing kept too.
DROPPED = -1000.0


def check_shape(mask: mx.array, *, rows: int, tokens: int, heads: int) -> None:
    """Refuses a mask that is not (rows, tokens), (rows, tokens, tokens) or (rows, heads, tokens, tokens).

    Rows, heads and the queries' axis may be 1, the keys' axis may not.

    Raises:
        ValueError: another shape, or a complex mask.
    """
    full = {2: (rows, tokens), 3: (rows, tokens, tokens), 4: (rows, heads, tokens, tokens)}.get(mask.ndim)
    fits = full is not None and all(
        size == expected or (size == 1 and axis < mask.ndim - 1)
        for axis, (size, expected) in enumerate(zip(mask.shape, full, strict=True))
    )
    if not fits:
        raise ValueError(
            f"attention_mask has shape {mask.shape}: expected (rows, tokens) = ({rows}, {tokens}), or "
            f"(rows, 1, tokens, tokens) with 1 for any axis but the last"
        )
    if mx.issubdtype(mask.dtype, mx.complexfloating):
        raise ValueError(f"attention_mask has dtype {mask.dtype}: expected bool, an integer or a real dtype")


def value_faults(mask: mx.array) -> list[tuple[mx.array, str]]:
    """Scalar bool arrays, each true where the mask has values of no meaning, and what to say of them."""
    if mx.issubdtype(mask.dtype, mx.floating):
        bad = mx.isnan(mask) | (mask == mx.inf)
        return [(bad.any(), "attention_mask has NaN or positive infinity: expected 1 and 0, or an additive mask")]
    if mx.issubdtype(mask.dtype, mx.signedinteger):
        message = "attention_mask is of integers and has negative values: expected 1 and 0, or a float additive mask"
        return [((mask < 0).any(), message)]
    return []


def for_attention(mask: mx.array | None, dtype: mx.Dtype) -> mx.array | None:
    """What attention takes: bool, True where a key is attended, or additive in `dtype`; None for no mask.

    Its axes are (rows, heads, queries, keys), each of them possibly 1.

    bool, and integers other than 0, keep. A float mask with a negative value, or of zeros alone, is additive; in any
    other float mask what is not 0 keeps. Which of the two a float mask is, is found within the graph, so that no
    value is read and `mx.compile` takes it.
    """
    if mask is None:
        return None
    if mask.ndim == 2:
        mask = mask[:, None, None, :]
    elif mask.ndim == 3:
        mask = mask[:, None]
    if not mx.issubdtype(mask.dtype, mx.floating):
        return mask != 0
    # Half of the lowest number: a score can be added to it in float16 and it stays finite.
    lowest = mx.array(mx.finfo(dtype).min / 2, dtype=dtype)
    keep, bias = _float_mask(mask)
    return mx.where(keep, bias.astype(dtype), lowest)


def kept_tokens(mask: mx.array | None, *, rows: int, tokens: int) -> mx.array:
    """The tokens that pooling counts: bool (rows, tokens). A key counts when a query of a head attends it."""
    if mask is None:
        return mx.ones((rows, tokens), dtype=mx.bool_)
    keep = _float_mask(mask)[0] if mx.issubdtype(mask.dtype, mx.floating) else mask != 0
    if keep.ndim > 2:
        keep = keep.any(axis=tuple(range(1, keep.ndim - 1)))
    return mx.broadcast_to(keep, (rows, tokens))


def _float_mask(mask: mx.array) -> tuple[mx.array, mx.array]:
    """What a float mask keeps, and what it adds to the scores of what it keeps."""
    additive = (mask < 0).any() | (mask == 0).all()
    keep = mx.where(additive, mask > DROPPED, mask != 0)
    return keep, mx.where(additive & keep, mask, mx.zeros_like(mask))
