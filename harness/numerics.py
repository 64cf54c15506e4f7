# SPDX-License-Identifier: Apache-2.0
"""How far two results may differ: the error measure, its bounds, calibration against the original, near ties."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.errors import Mismatch, Skip

if TYPE_CHECKING:
    import torch

SEMANTICS_BOUND = 1e-9
"""Relative error in float64. Correct implementations of one formula stay near 1e-14, the smallest defect near 1e-7."""

FLOAT32_INSIDE_BOUND = 1e-5
"""Relative error in float64 for a port that is seen to compute a part in float32."""

FLOAT32_GRADIENT_BOUND = 1e-4
"""The same for gradients and what follows from them: a backward pass adds up errors of the whole forward pass."""

CALIBRATION_FACTOR = 2.0
"""A port's error at a dtype over the original's at that dtype: FlashAttention's rule, with the original as baseline."""

FLOOR_ULPS = 4.0
"""Units in the last place, at the output's scale, that the calibrated bound allows on top."""


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """max|actual - expected| / rms(expected) in float64; infinite when a value is not finite in one alone.

    Shapes must be equal (ValueError). An all-zero `expected` counts as scale 1.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"shapes {tuple(actual.shape)} and {tuple(expected.shape)} cannot be compared")
    left, right = actual.detach().cpu().double(), expected.detach().cpu().double()
    if right.numel() == 0:
        return 0.0
    scale = _root_mean_square(right[right.isfinite()])
    error = float(_distance(left, right).max()) / (scale if scale > 0 else 1.0)
    return error if error == error else float("inf")


def _distance(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """|left - right|, where equal infinities are no distance apart."""
    return (left - right).abs().where(left != right, 0.0)


def _root_mean_square(values: torch.Tensor) -> float:
    """Root mean square of any finite numbers, also those whose squares are none; 0 of nothing."""
    largest = float(values.abs().max()) if values.numel() else 0.0
    return largest * float((values / largest).square().mean().sqrt()) if largest > 0 else 0.0


def require_shape(what: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Raises Mismatch when two tensors differ in shape."""
    if actual.shape != expected.shape:
        raise Mismatch(f"{what} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")


def require_close(
    what: str, actual: torch.Tensor, expected: torch.Tensor, *, bound: float, first_divergence: str | None = None
) -> float:
    """The relative error of `actual`, after checking shape and bound. Raises Mismatch with both tensors."""
    require_shape(what, actual, expected)
    error = relative_error(actual, expected)
    if not error <= bound:
        raise Mismatch(
            f"{what}: relative error {error:.1e}, bound {bound:.0e}{_where(actual, expected)}",
            metrics={"error": error, "bound": bound},
            tensors={"actual": actual, "expected": expected},
            first_divergence=first_divergence,
        )
    return error


def _where(actual: torch.Tensor, expected: torch.Tensor) -> str:
    left, right = actual.detach().cpu().double(), expected.detach().cpu().double()
    if bad := int((~left.isfinite() & (left != right)).sum()):
        return f"; {bad} of {left.numel()} values are not finite"
    if left.ndim == 0:
        return f" ({float(left):.9g} instead of {float(right):.9g})"
    place: Any = _distance(left, right).nan_to_num(nan=float("inf")).flatten().argmax()
    index = []
    for size in reversed(left.shape):
        index.append(int(place % size))
        place = place // size
    at = tuple(reversed(index))
    pairs = (f"{float(left[at]):.{digits}g} instead of {float(right[at]):.{digits}g}" for digits in (6, 9, 12, 17))
    telling = next((pair for pair in pairs if len(set(pair.split(" instead of "))) == 2), "equal numbers")
    return f", largest at {list(at)}: {telling}"


def typical_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """rms(actual - expected) / rms(expected) in float64; infinite where `actual` is not finite."""
    left, right = actual.detach().cpu().double(), expected.detach().cpu().double()
    if not bool(left.isfinite().all()):
        return float("inf")
    return _root_mean_square(left - right) / (_root_mean_square(right) or 1.0)


def calibrated_bound(*, baseline: float, epsilon: float) -> float:
    """What the error of a port at a dtype may be, given the original's error there and the dtype's epsilon."""
    return CALIBRATION_FACTOR * baseline + FLOOR_ULPS * epsilon


def require_calibrated(
    what: str, actual: torch.Tensor, baseline: torch.Tensor, oracle: torch.Tensor, *, epsilon: float
) -> dict[str, float]:
    """Checks e(actual) <= 2 e(baseline) + floor against the float64 oracle; gives both errors and their ratio.

    e is the root mean square, not the largest error: over 900 draws of correct pairs that only differ in the order of
    their operations, the ratio of the largest errors reached 3.4, that of the root mean squares 1.2.
    Raises Skip where the original overflows.
    """
    require_shape(what, actual, oracle)
    if not bool(baseline.isfinite().all() and oracle.isfinite().all()):
        raise Skip(f"{what}: the original's own are not finite at this dtype or in float64, and so are no measure")
    ours, theirs = typical_error(actual, oracle), typical_error(baseline, oracle)
    bound = calibrated_bound(baseline=theirs, epsilon=epsilon)
    metrics = {"error": ours, "original_error": theirs, "ratio": ours / max(theirs, epsilon)}
    if not ours <= bound:
        raise Mismatch(
            f"{what}: error {ours:.1e} against the float64 oracle, the original's is {theirs:.1e} at the same dtype,"
            f" bound {bound:.1e}{_where(actual, oracle)}",
            metrics={**metrics, "bound": bound},
            tensors={"actual": actual, "expected": oracle, "original": baseline},
        )
    return metrics


def first_difference(actual: torch.Tensor, expected: torch.Tensor) -> tuple[int, int] | None:
    """(row, position) of the earliest position at which two (rows, tokens) id tensors differ; None when equal."""
    different = (actual != expected).nonzero()
    if not len(different):
        return None
    row, position = min(different.tolist(), key=lambda place: (place[1], place[0]))
    return int(row), int(position)


def top_two_gap(logits: torch.Tensor) -> float:
    """Distance between the largest and the second largest of (vocabulary,) logits, over their rms."""
    if logits.numel() < 2:
        return float("inf")
    best = logits.double().topk(2).values
    return float(best[0] - best[1]) / max(float(logits.double().square().mean().sqrt()), 1e-300)
