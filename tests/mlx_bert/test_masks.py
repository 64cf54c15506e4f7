# SPDX-License-Identifier: Apache-2.0
"""Every form of attention mask says the same to attention and to pooling."""

from __future__ import annotations

from typing import Any

import pytest

mx = pytest.importorskip("mlx.core", reason="needs MLX: pip install 'parity-harness[mlx]'")

from reference_models.mlx_bert import masks  # noqa: E402

pytestmark = [pytest.mark.mlx, pytest.mark.usefixtures("mlx_on_the_cpu")]
KEEP = [[True, True, False, False], [True, False, True, True]]
DTYPES = [mx.float16, mx.bfloat16, mx.float32, mx.float64]


def forms(keep: Any) -> dict[str, Any]:
    kept = mx.array(keep)
    return {
        "bool": kept,
        "int8": kept.astype(mx.int8),
        "uint32": kept.astype(mx.uint32) * 7,
        "int64": kept.astype(mx.int64),
        "float32": kept.astype(mx.float32),
        "bfloat16": kept.astype(mx.bfloat16) * 0.5,
        "additive -10000": mx.where(kept, 0.0, -10000.0),
        "additive -1e9": mx.where(kept, 0.0, -1e9),
        "additive minimum": mx.where(kept, 0.0, mx.finfo(mx.float32).min),
        "additive infinity": mx.where(kept, 0.0, -mx.inf),
        "additive float16": mx.where(kept, 0.0, -65504.0).astype(mx.float16),
    }


FORMS = pytest.mark.parametrize("form", list(forms(KEEP)))


def is_dropped(bias: Any) -> Any:
    """Whether a mask of attention drops a key, whichever of the two it is."""
    return ~bias if bias.dtype == mx.bool_ else bias < -30000


@FORMS
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_form_keeps_the_same_keys_and_adds_nothing_to_them(form: str, dtype: Any) -> None:
    bias = masks.for_attention(forms(KEEP)[form], dtype)
    assert bias.shape == (2, 1, 1, 4) and bias.dtype in (mx.bool_, dtype)
    assert is_dropped(bias)[:, 0, 0].tolist() == [[not kept for kept in row] for row in KEEP]
    assert bias.dtype == mx.bool_ or (mx.isfinite(bias).all() and (mx.where(is_dropped(bias), 0, bias) == 0).all())
    assert masks.kept_tokens(forms(KEEP)[form], rows=2, tokens=4).tolist() == KEEP


@FORMS
def test_a_row_that_keeps_nothing_beside_one_that_does(form: str) -> None:
    keep = [[False] * 4, [True, False, True, True]]
    bias = masks.for_attention(forms(keep)[form], mx.float16)
    assert is_dropped(bias)[:, 0, 0].tolist() == [[not kept for kept in row] for row in keep]
    assert masks.kept_tokens(forms(keep)[form], rows=2, tokens=4).tolist() == keep


def test_zeros_of_a_float_are_additive_and_of_an_integer_keep_nothing() -> None:
    zeros = mx.zeros((2, 4))
    assert not is_dropped(masks.for_attention(zeros, mx.float32)).any()
    assert masks.kept_tokens(zeros, rows=2, tokens=4).all()
    assert not masks.for_attention(zeros.astype(mx.int32), mx.float32).any()
    assert not masks.kept_tokens(zeros.astype(mx.int32), rows=2, tokens=4).any()


def test_what_an_additive_mask_adds_is_added() -> None:
    bias = mx.array([[0.0, -1.5, 2.0, -1000.0]])
    found = masks.for_attention(bias, mx.float32)
    assert found[0, 0, 0, :3].tolist() == [0.0, -1.5, 2.0] and found[0, 0, 0, 3] < -1e30
    assert masks.kept_tokens(bias, rows=1, tokens=4).tolist() == [[True, True, True, False]]


def test_no_mask_keeps_everything() -> None:
    assert masks.for_attention(None, mx.float32) is None
    assert masks.kept_tokens(None, rows=2, tokens=3).tolist() == [[True] * 3] * 2


@pytest.mark.parametrize("form", ["bool", "int8", "float32", "additive -1e9"])
def test_masks_per_query(form: str) -> None:
    # Key 1 is attended by the first query alone, key 2 by none.
    keep = [[[True, True, False], [True, False, False], [True, False, False]]]
    three = forms(keep)[form]
    for mask in (three, three[:, None], mx.broadcast_to(three[:, None], (1, 2, 3, 3))):
        masks.check_shape(mask, rows=1, tokens=3, heads=2)
        bias = masks.for_attention(mask, mx.float32)
        assert bias.ndim == 4 and is_dropped(bias)[0, 0].tolist() == [[not kept for kept in row] for row in keep[0]]
        assert masks.kept_tokens(mask, rows=1, tokens=3).tolist() == [[True, True, False]]


@pytest.mark.parametrize(
    ("shape", "fits"),
    [
        ((2, 4), True),
        ((1, 4), True),
        ((2, 4, 4), True),
        ((2, 1, 4), True),
        ((2, 1, 1, 4), True),
        ((2, 1, 4, 4), True),
        ((1, 1, 4, 4), True),
        ((2, 3, 4, 4), True),
        ((4,), False),
        ((), False),
        ((2, 1), False),
        ((2, 5), False),
        ((3, 4), False),
        ((2, 2, 4, 4), False),
        ((2, 1, 4, 1), False),
        ((2, 1, 5, 4), False),
        ((1, 2, 1, 1, 4), False),
    ],
)
def test_shapes(shape: tuple[int, ...], fits: bool) -> None:
    mask = mx.ones(shape, dtype=mx.int32)
    if fits:
        masks.check_shape(mask, rows=2, tokens=4, heads=3)
        assert masks.kept_tokens(mask, rows=2, tokens=4).shape == (2, 4)
    else:
        with pytest.raises(ValueError, match=r"attention_mask has shape .*expected \(rows, tokens\) = \(2, 4\)"):
            masks.check_shape(mask, rows=2, tokens=4, heads=3)


def test_a_complex_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="complex64: expected bool"):
        masks.check_shape(mx.ones((2, 4), dtype=mx.complex64), rows=2, tokens=4, heads=1)


def test_values_of_no_meaning() -> None:
    def said(mask: Any) -> list[str]:
        return [message for fault, message in masks.value_faults(mask) if fault]

    for bad in (float("nan"), float("inf")):
        assert "NaN or positive infinity: expected 1 and 0, or an additive mask" in said(mx.array([[1.0, bad]]))[0]
    assert "negative" in said(mx.array([[0, -10000]]))[0]
    for mask in forms(KEEP).values():
        assert said(mask) == []
