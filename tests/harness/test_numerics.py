# SPDX-License-Identifier: Apache-2.0
"""A port is judged by these numbers: an error that is measured too small hides a defect, one too large invents it."""

import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import Mismatch, Skip
from harness.numerics import (
    calibrated_bound,
    first_difference,
    relative_error,
    require_calibrated,
    require_close,
    require_shape,
    top_two_gap,
    typical_error,
)

INF, NAN = math.inf, math.nan

ordinary = st.floats(-1e6, 1e6, allow_subnormal=False).filter(lambda value: value == 0 or abs(value) > 1e-6)
vectors = st.lists(ordinary, min_size=1, max_size=8)


def tensor(*values: Any, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


# The error measure


@pytest.mark.parametrize(
    ("actual", "expected", "error"),
    [
        ([3.0, 4.0], [3.0, 4.0], 0.0),
        ([3.0, 5.0], [3.0, 4.0], 1 / math.sqrt(12.5)),  # the largest difference over the root mean square
        ([1.0, -1.0, 3.0, 1.0], [1.0, -1.0, 1.0, 1.0], 2.0),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 0.25], [0.0, 0.0], 0.25),  # nothing to be relative to: the scale is 1
        ([], [], 0.0),
    ],
)
def test_relative_error_of_plain_numbers(actual: list[float], expected: list[float], error: float) -> None:
    assert relative_error(tensor(*actual), tensor(*expected)) == pytest.approx(error, rel=1e-15)


def test_relative_error_of_scalars() -> None:
    assert relative_error(torch.tensor(3.0), torch.tensor(2.0)) == 0.5


@pytest.mark.parametrize(("left", "right"), [((2, 3), (3, 2)), ((2,), (2, 1)), ((), (1,)), ((0,), (0, 1))])
def test_relative_error_refuses_other_shapes(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"shapes {left} and {right} cannot be compared")):
        relative_error(torch.zeros(left), torch.zeros(right))


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        ([NAN, 1.0], [1.0, 1.0]),
        ([1.0, 1.0], [NAN, 1.0]),
        ([INF, 1.0], [1.0, 1.0]),
        ([1.0, 1.0], [-INF, 1.0]),
        ([INF, 1.0], [-INF, 1.0]),
        ([1.0], [INF]),
        ([NAN], [INF]),
    ],
)
def test_a_value_that_is_not_finite_in_one_alone_is_an_infinite_error(
    actual: list[float], expected: list[float]
) -> None:
    assert relative_error(tensor(*actual), tensor(*expected)) == INF


def test_equal_infinities_differ_by_nothing_and_do_not_set_the_scale() -> None:
    assert relative_error(tensor(INF, -INF), tensor(INF, -INF)) == 0.0
    assert relative_error(tensor(-INF, 3.0), tensor(-INF, 2.0)) == 0.5


def test_relative_error_counts_in_float64_whatever_it_is_given() -> None:
    # In float32 this difference is rounded away, and in float16 the square overflows.
    assert relative_error(tensor(1.0 + 1e-12), tensor(1.0, dtype=torch.float32)) == pytest.approx(1e-12, rel=1e-3)
    assert relative_error(tensor(30000.0, dtype=torch.float16), tensor(60000.0, dtype=torch.float16)) == 0.5


def test_relative_error_takes_tensors_with_gradients() -> None:
    assert relative_error(tensor(2.0).requires_grad_(), tensor(1.0).requires_grad_()) == 1.0


@given(values=vectors, factor=st.sampled_from([1e-6, 0.5, 3.0, 1e6]))
def test_relative_error_does_not_depend_on_the_unit(values: Sequence[float], factor: float) -> None:
    expected = tensor(*values)
    actual = expected + 1.0
    unit = factor if bool(expected.any()) else 1.0  # all zeros are measured absolutely
    assert relative_error(actual * unit, expected * unit) == pytest.approx(relative_error(actual, expected), rel=1e-6)


@given(values=vectors, places=st.data())
def test_relative_error_sees_a_change_at_every_place(values: Sequence[float], places: st.DataObject) -> None:
    expected = tensor(*values)
    place = places.draw(st.integers(0, len(values) - 1))
    actual = expected.clone()
    actual[place] += 1.0
    rms = math.sqrt(sum(value * value for value in values) / len(values)) or 1.0
    assert relative_error(actual, expected) == pytest.approx(1.0 / rms, rel=1e-6)
    assert relative_error(expected, expected) == 0.0


@pytest.mark.parametrize("unit", [1e200, 1e-200])
def test_relative_error_of_numbers_whose_square_is_no_number(unit: float) -> None:
    assert relative_error(tensor(2.0 * unit), tensor(1.0 * unit)) == pytest.approx(1.0)


# Bounds


def test_require_close_gives_the_error_within_the_bound() -> None:
    assert require_close("x", tensor(1.5, 1.0), tensor(1.0, 1.0), bound=0.5) == 0.5


def test_require_close_names_what_differs_by_how_much_and_where() -> None:
    expected = torch.ones(2, 3, 4)
    actual = expected.clone()
    actual[1, 2, 3], actual[0, 0, 1] = 3.25, 2.0
    with pytest.raises(Mismatch) as caught:
        require_close("logits", actual, expected, bound=1e-9, first_divergence="block.0")
    mismatch = caught.value
    assert str(mismatch) == (
        "logits: relative error 2.2e+00, bound 1e-09, largest at [1, 2, 3]: 3.25 instead of 1"  # 2.25, to even
    )
    assert mismatch.metrics == {"error": 2.25, "bound": 1e-9}
    assert mismatch.tensors["actual"] is actual and mismatch.tensors["expected"] is expected
    assert mismatch.first_divergence == "block.0"


def test_require_close_shows_both_values_of_a_scalar() -> None:
    with pytest.raises(Mismatch, match=re.escape("loss: relative error 5.0e-01, bound 1e-02 (3 instead of 2)")):
        require_close("loss", torch.tensor(3.0), torch.tensor(2.0), bound=1e-2)


def test_require_close_counts_values_that_are_not_finite() -> None:
    with pytest.raises(Mismatch, match=r"relative error inf, .*; 2 of 6 values are not finite"):
        require_close("x", torch.tensor([[1.0, NAN, 1.0], [INF, 1.0, 1.0]]), torch.ones(2, 3), bound=1e9)


def test_require_close_finds_the_place_that_is_not_finite_in_the_expected_tensor() -> None:
    with pytest.raises(Mismatch, match=re.escape("largest at [2]: 1 instead of nan")):
        require_close("x", torch.ones(4), tensor(1.0, 9.0, NAN, 1.0), bound=1e9)


def test_require_close_finds_the_place_beside_equal_infinities() -> None:
    with pytest.raises(Mismatch, match=re.escape("largest at [2]: 3 instead of 1")):
        require_close("x", tensor(-INF, 1.0, 3.0), tensor(-INF, 1.0, 1.0), bound=1e-9)


def test_a_bound_that_is_not_a_number_is_never_met() -> None:
    with pytest.raises(Mismatch):
        require_close("x", torch.ones(1), torch.ones(1), bound=NAN)


def test_another_shape_is_a_mismatch_with_both_shapes() -> None:
    expected = re.escape("hidden states has shape (2, 3), expected (3, 2)")
    with pytest.raises(Mismatch, match=expected):
        require_close("hidden states", torch.zeros(2, 3), torch.zeros(3, 2), bound=INF)
    with pytest.raises(Mismatch, match=expected):
        require_shape("hidden states", torch.zeros(2, 3), torch.zeros(3, 2))
    require_shape("hidden states", torch.zeros(2, 3), torch.ones(2, 3))


@given(bound=st.floats(1e-12, 1e3), error=st.floats(1e-12, 1e3))
def test_require_close_raises_exactly_beyond_the_bound(bound: float, error: float) -> None:
    actual, expected = tensor(1.0 + error), tensor(1.0)
    measured = relative_error(actual, expected)
    if measured <= bound:
        assert require_close("x", actual, expected, bound=bound) == measured
    else:
        with pytest.raises(Mismatch):
            require_close("x", actual, expected, bound=bound)


# Calibration


def test_calibrated_bound_is_twice_the_originals_error_and_a_floor() -> None:
    assert calibrated_bound(baseline=0.01, epsilon=0.001) == pytest.approx(0.024)
    assert calibrated_bound(baseline=0.0, epsilon=0.001) == pytest.approx(0.004)


@pytest.mark.parametrize(
    ("ours", "theirs", "ratio"),
    [
        (0.5, 0.25, 2.0),
        (0.25, 0.25, 1.0),
        (0.0625, 0.0, 4.0),  # an exact original: over one unit in the last place
    ],
)
def test_require_calibrated_reports_both_errors_and_their_ratio(ours: float, theirs: float, ratio: float) -> None:
    metrics = require_calibrated("x", tensor(1 + ours), tensor(1 + theirs), tensor(1.0), epsilon=2**-6)
    assert metrics == {"error": ours, "original_error": theirs, "ratio": ratio}


def test_require_calibrated_refuses_more_than_the_original_justifies() -> None:
    actual, baseline, oracle = tensor(1.75), tensor(1.25), tensor(1.0)
    with pytest.raises(Mismatch) as caught:
        require_calibrated("logits", actual, baseline, oracle, epsilon=2**-6)
    mismatch = caught.value
    assert str(mismatch) == (
        "logits: error 7.5e-01 against the float64 oracle, the original's is 2.5e-01 at the same dtype,"
        " bound 5.6e-01, largest at [0]: 1.75 instead of 1"
    )
    assert mismatch.metrics == {"error": 0.75, "original_error": 0.25, "ratio": 3.0, "bound": 0.5625}
    assert mismatch.tensors == {"actual": actual, "expected": oracle, "original": baseline}


def test_typical_error_is_a_root_mean_square_over_a_root_mean_square() -> None:
    # One outlier that two orders of summation differ by counts with the rest, not alone.
    assert typical_error(tensor(2.0, 2.0, 2.0, 6.0), tensor(2.0, 2.0, 2.0, 2.0)) == pytest.approx(1.0)
    assert typical_error(tensor(3.0, -3.0), tensor(1.0, -1.0)) == pytest.approx(2.0)
    assert typical_error(tensor(0.25, -0.25), tensor(0.0, 0.0)) == pytest.approx(0.25)
    assert typical_error(tensor(3e200), tensor(2e200)) == pytest.approx(0.5)
    assert typical_error(tensor(1.0, NAN), tensor(1.0, 1.0)) == INF


def test_require_calibrated_checks_the_shape_first() -> None:
    with pytest.raises(Mismatch, match="logits has shape"):
        require_calibrated("logits", torch.ones(2), torch.ones(3), torch.ones(3), epsilon=1.0)


def test_require_calibrated_refuses_a_port_that_is_not_finite() -> None:
    with pytest.raises(Mismatch, match="1 of 2 values are not finite"):
        require_calibrated("x", tensor(NAN, 1.0), torch.ones(2), torch.ones(2), epsilon=1e-3)


def test_an_original_that_is_not_finite_justifies_nothing() -> None:
    with pytest.raises(Skip, match="the original's own are not finite at this dtype"):
        require_calibrated("x", tensor(777.0), tensor(NAN), tensor(1.0), epsilon=1e-3)


# Token ids


def test_first_difference_is_the_earliest_position_then_the_first_row() -> None:
    expected = torch.zeros(3, 5, dtype=torch.long)
    assert first_difference(expected.clone(), expected) is None
    actual = expected.clone()
    actual[0, 4] = actual[2, 1] = actual[1, 1] = 7
    # Row 0 differs too, but later; what is generated after a difference means nothing.
    assert first_difference(actual, expected) == (1, 1)


@given(st.data())
def test_first_difference_has_nothing_different_before_it(data: st.DataObject) -> None:
    ids = st.lists(st.lists(st.integers(0, 2), min_size=4, max_size=4), min_size=2, max_size=2)
    actual, expected = torch.tensor(data.draw(ids)), torch.tensor(data.draw(ids))
    place = first_difference(actual, expected)
    if place is None:
        assert torch.equal(actual, expected)
    else:
        row, position = place
        assert actual[row, position] != expected[row, position]
        assert torch.equal(actual[:, :position], expected[:, :position])
        assert torch.equal(actual[:row, position], expected[:row, position])


def test_top_two_gap_is_over_the_scale_of_the_logits() -> None:
    logits = tensor(1.0, -5.0, 3.0, -1.0)  # root mean square 3
    assert top_two_gap(logits) == pytest.approx(2 / 3)
    assert top_two_gap(1000 * logits) == pytest.approx(2 / 3)


def test_top_two_gap_of_a_tie_is_nothing_and_of_one_token_everything() -> None:
    assert top_two_gap(tensor(2.0, 2.0, 1.0)) == 0.0
    assert top_two_gap(tensor(2.0)) == INF
    assert top_two_gap(torch.zeros(3)) == 0.0


def test_top_two_gap_counts_in_float64() -> None:
    logits = tensor(60000.0, 30000.0, dtype=torch.float16)
    assert top_two_gap(logits) == pytest.approx(30000 / math.sqrt((60000**2 + 30000**2) / 2), rel=1e-9)
