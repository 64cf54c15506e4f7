# SPDX-License-Identifier: Apache-2.0
"""Checks of precision: at each dtype the port errs no more than the original does there."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from harness.backends import frameworks, pytorch
from harness.capture import capture_both
from harness.cases import Case
from harness.checks.generation import incremental_logits
from harness.checks.loss import at_least_two_tokens, original_targets, port_labels
from harness.checks.masks import padded_batch, rows_as_original
from harness.checks.training import original_gradients, port_gradients
from harness.errors import Mismatch, Skip
from harness.families import Fields, longest_of, taps_of
from harness.layout import layout_of
from harness.numerics import relative_error, require_calibrated
from harness.ports import beside, load_object
from harness.routes.pretrained import load
from harness.trial import (
    Pair,
    Trial,
    copied,
    each_attention,
    is_asked,
    place,
    port_logits,
    prepare,
    run_original,
    run_port,
    worst,
)

MANY_POSITIONS = 600

STEEP = 3.0
"""By how much matrices grow for scores that are far below zero, with everything still finite in float16."""

STEP_SLACK = 1e-3
"""Of a step of quantisation: its scale and bias are float32 numbers."""

ROWS = 8
"""Many rows, so that the largest of many rounding errors is compared and not the luck of a few."""


def logits(trial: Trial, case: Case) -> dict[str, float]:
    """Logits at this dtype are at most twice as far from the float64 oracle as the original's at this dtype.

    Would have caught: a norm or softmax done in half precision where the original's is not, masks that overflow.
    """
    pair, oracle = pairs(trial, case)
    actual = port_logits(trial, pair.port, pair.batch.tokens)
    numbers = _calibrated(trial, "logits", actual, *_logits(trial, pair, oracle))
    if trial.dtype == "autocast":
        _as_wide_as_the_original(trial, case, pair)
    return numbers


def _as_wide_as_the_original(trial: Trial, case: Case, pair: Pair) -> None:
    """Raises Mismatch when a place holds half precision under autocast where the original's holds float32.

    With few layers the sum of the residual stream shows no error that is large enough.
    """
    tokens, targets = pair.batch.tokens, pair.batch.targets
    ours, theirs = capture_both(
        taps_of(trial.family, case.fields),
        (pair.original, lambda: _original(trial, pair, tokens, targets, "logits")),
        (pair.port, lambda: port_logits(trial, pair.port, tokens)),
    )
    for name, tensor in ours.items():
        if tensor.dtype.itemsize < theirs[name].dtype.itemsize:
            raise Mismatch(
                f"output of {name} is {tensor.dtype} under autocast, where the original's is {theirs[name].dtype};"
                " sums over layers need the wider"
            )


def loss(trial: Trial, case: Case) -> dict[str, float]:
    """The loss at this dtype is at most twice as far from the float64 oracle as the original's at this dtype.

    Would have caught: a cross entropy summed in half precision.
    """
    pair, oracle = pairs(trial, at_least_two_tokens(case))
    tokens = pair.batch.tokens
    labels = port_labels(trial, tokens, pair.batch.targets)
    targets = original_targets(trial, labels)
    value = run_port(trial, pair.port, tokens, labels=labels).get("loss")
    if not isinstance(value, torch.Tensor):
        raise Mismatch("forward with labels returned no loss")
    _same_loss_dtype(trial, pair, tokens, labels, value)
    return _calibrated(
        trial,
        "loss",
        value,
        _original(trial, pair, tokens, targets, "loss"),
        run_original(trial, oracle, tokens, targets)["loss"],
    )


def _same_loss_dtype(trial: Trial, pair: Pair, tokens: torch.Tensor, labels: torch.Tensor, value: torch.Tensor) -> None:
    """Raises Mismatch when the loss is widened to float32 in one of the two half precisions only."""
    others = {"float16": "bfloat16", "bfloat16": "float16"}
    if trial.dtype not in others:
        return
    there = dataclasses.replace(trial, dtype=others[trial.dtype])
    model = copied(pair.port).to(pytorch.DTYPES[there.dtype])
    other = run_port(there, model, tokens, labels=labels)["loss"]
    if (value.dtype == torch.float32) != (other.dtype == torch.float32):
        raise Mismatch(
            f"the loss of a model in {trial.dtype} is {value.dtype}, of one in {there.dtype} {other.dtype};"
            " it is summed in float32 in both, or in neither"
        )


def masks(trial: Trial, case: Case) -> dict[str, float]:
    """Padded rows at this dtype are finite, and no further from the oracle than the original's unpadded rows allow.

    Would have caught: a causal and a padding mask, each the lowest number of the dtype, that add up to -inf and NaN.
    """
    pair, oracle = pairs(trial, case)
    padded = padded_batch(trial, case, pair, "left")
    mask = padded.mask.long()
    baseline, expected = (rows_as_original(trial, case, module, padded, "left") for module in (pair.original, oracle))
    numbers = []
    for attention in each_attention(pair.port):
        every = port_logits(trial, pair.port, padded.tokens, attention_mask=mask)
        if not bool(every.isfinite().all()):
            raise Mismatch(
                f"left-padded rows give logits that are not finite in {trial.dtype} (attention: {attention})"
            )
        what = f"logits of left-padded rows (attention: {attention})"
        numbers.append(_calibrated(trial, what, every[padded.mask], baseline, expected))
        if is_asked(trial, "masks", "masks.additive"):
            _finite_with_four_axes(trial, pair, attention)
    return worst(*numbers)


def _finite_with_four_axes(trial: Trial, pair: Pair, attention: str) -> None:
    """Raises Mismatch unless logits are finite with masks of four axes, one row masked as a whole, as with two axes.

    Scores far below zero, plus the lowest number of half precision, are minus infinity.
    """
    tokens = pair.batch.tokens
    rows, count = tokens.shape
    dtype = next(pair.port.parameters()).dtype
    allowed = torch.ones(rows, 1, count, count, dtype=torch.bool).tril()
    allowed[0] = False
    steep = copied(pair.port)
    with torch.no_grad():
        for parameter in steep.parameters():
            if parameter.ndim == 2:
                parameter.mul_(STEEP)
    lowest = torch.finfo(dtype).min
    masks = {"boolean": allowed, str(dtype): torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, lowest)}
    two_axes = torch.ones_like(tokens)
    two_axes[0] = 0
    for model in (pair.port, steep):
        if not bool(port_logits(trial, model, tokens, attention_mask=two_axes).isfinite().all()):
            continue  # as in the library's own eager attention, whose scores overflow
        # A sum with the lowest number of float16 overflows where its own scores are steep, in many a correct port.
        for name, mask in list(masks.items())[: 1 if model is steep else None]:
            try:
                actual = port_logits(trial, model, tokens, attention_mask=mask)
            except (TypeError, ValueError, IndexError, RuntimeError):
                continue  # masks.additive asks whether one is taken
            if not bool(actual.isfinite().all()):
                raise Mismatch(
                    f"a {name} mask of four axes, of which one row masks everything, gives logits that are not finite"
                    f" in {trial.dtype} (attention: {attention}), where one of two axes gives finite ones"
                )


def gradients(trial: Trial, case: Case) -> dict[str, float]:
    """All gradients together, at this dtype, are at most twice as far from the oracle's as the original's are.

    Would have caught: a backward pass through a narrower dtype than the forward pass.
    """
    pair, oracle = pairs(trial, at_least_two_tokens(case))
    tokens = pair.batch.tokens
    labels = port_labels(trial, tokens, pair.batch.targets)
    targets = original_targets(trial, labels)
    actual = port_gradients(trial, pair, labels)
    baseline = original_gradients(trial, pair.original, tokens, targets)
    expected = original_gradients(trial, oracle, tokens, targets)
    layout = layout_of(trial, case)
    if layout is not None:
        baseline, expected = layout.arrange(baseline), layout.arrange(expected)
    else:
        baseline, expected = (
            {trial.family.port_key(key): tensor for key, tensor in tensors.items()} for tensors in (baseline, expected)
        )
    if not expected.keys() <= actual.keys():
        raise Skip("the port's loader does not tell which of its parameters is which of the original's")
    flat = [
        torch.cat([tensors[name].double().flatten() for name in expected]) for tensors in (actual, baseline, expected)
    ]
    return _calibrated(trial, "gradients", *flat)


def long_positions(trial: Trial, case: Case) -> dict[str, float]:
    """At 600 positions logits at this dtype are as close to the oracle as the original's: counting is exact.

    Would have caught: positions counted in the model's dtype, where bfloat16 has no whole number between 256 and 258.
    """
    fields = {**case.fields, trial.family.maximum_length: MANY_POSITIONS}
    case = dataclasses.replace(case, fields=fields, tokens=longest_of(trial.family, fields))
    pair, oracle = pairs(trial, case, rows=1)
    tokens = pair.batch.tokens
    baseline, expected = _logits(trial, pair, oracle)
    what = f"logits of {case.tokens} tokens"
    numbers = [_calibrated(trial, what, port_logits(trial, pair.port, tokens), baseline, expected)]
    if is_asked(trial, "masks", "masks.none_is_ones"):
        actual = port_logits(trial, pair.port, tokens, attention_mask=torch.ones_like(tokens))
        numbers.append(_calibrated(trial, f"{what} with a mask", actual, baseline, expected))
    return worst(*numbers)


def cache(trial: Trial, case: Case) -> dict[str, float]:
    """Decoding with a cache at this dtype is no further from the oracle than twice the original's whole pass.

    Would have caught: a cache kept in a narrower dtype than the model.
    """
    pair, oracle = pairs(trial, case)
    tokens = pair.batch.tokens
    actual = incremental_logits(trial, pair.port, tokens, [1] * tokens.shape[1])
    return _calibrated(trial, "logits with a cache", actual, *_logits(trial, pair, oracle))


def quantised(trial: Trial, case: Case) -> dict[str, float]:
    """A quantised port computes what the original does with the numbers it stores, each within a step of the float's.

    Saved and loaded it is the very same. What quantising costs is in the numbers, as the logits' error against those of
    the float original. Would have caught: settings that are left aside or lost in a file, norms that are rounded too.
    """
    settings = trial.family.quantisation
    assert settings is not None  # the check needs quantisation
    spec = beside(trial.port, "quantize")
    if spec is None:
        file = trial.port.model.rpartition(":")[0]
        raise Skip(f"there is no function quantize in {file} or another file that the port's `code` names")
    case = dataclasses.replace(case, fields={**case.fields, **settings.fields})
    numbers = []
    for options in settings.options:
        pair, oracle = pairs(trial, case)
        tokens, targets = pair.batch.tokens, pair.batch.targets
        of_float = run_original(trial, oracle, tokens, targets)["logits"]
        port, stored = frameworks.quantised(pair.port, load_object(spec, root=trial.port.root), options)
        names = {key: trial.family.port_key(key) for key in oracle.state_dict()}
        if lacking := sorted(set(names.values()) - set(stored)):
            raise Skip(f"the port has no {lacking[0]}: its tensors have other names")
        _within_a_step(oracle, names, stored, options)
        for module in (oracle, pair.original):
            module.load_state_dict({key: stored[name] for key, name in names.items()})
        baseline, expected = _logits(trial, pair, oracle)
        actual = port_logits(trial, port, tokens)
        what = f"logits of the port quantised with {', '.join(f'{name}={value}' for name, value in options.items())}"
        found = _calibrated(trial, what, actual, baseline, expected)
        _same_from_file(trial, port, tokens, actual, what)
        numbers.append({**found, f"against_float_{options['bits']}_bits": relative_error(expected, of_float)})
    return worst(*numbers)


def _within_a_step(
    original: torch.nn.Module, names: Mapping[str, str], stored: Mapping[str, torch.Tensor], options: Fields
) -> None:
    """Raises Mismatch for a number that is further from the float's than a step of its group, where it is rounded."""
    for key, tensor in original.state_dict().items():
        difference = (stored[names[key]].double() - tensor).abs()
        if not bool(difference.any()):
            continue
        if tensor.ndim != 2 or tensor.shape[-1] % options["group_size"]:
            raise Mismatch(f"quantize changes {names[key]}, which has no rows of whole groups")
        groups = tensor.unflatten(-1, (-1, options["group_size"]))
        step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / (2 ** options["bits"] - 1)
        off = float((difference.view_as(groups) / step.clamp_min(1e-30)).max())
        if off > 1 + STEP_SLACK:
            said = f"with {options['bits']} bits in groups of {options['group_size']}"
            raise Mismatch(f"quantize {said}: a number of {names[key]} is {off:.1f} steps from the float one, bound 1")


def _same_from_file(trial: Trial, port: torch.nn.Module, tokens: torch.Tensor, actual: torch.Tensor, what: str) -> None:
    """Raises Mismatch unless a quantised port that was saved and loaded is quantised and gives the same logits."""
    directory = Path(tempfile.mkdtemp(dir=trial.workdir))
    port.save_pretrained(directory)  # type: ignore[operator]
    again = load(trial, directory)
    if set(again.state_dict()) != set(port.state_dict()):
        lost = sorted(set(again.state_dict()) ^ set(port.state_dict()))
        raise Mismatch(f"{what}, saved and loaded: it has other tensors, such as {lost[0]}")
    found = port_logits(trial, place(trial, again), tokens)
    if not torch.equal(found, actual):
        raise Mismatch(f"{what}, saved and loaded: they differ by {relative_error(found, actual):.1e}")


def pairs(trial: Trial, case: Case, *, rows: int = ROWS) -> tuple[Pair, torch.nn.Module]:
    """Port and original at the trial's dtype and device, and the float64 oracle with the same, rounded weights."""
    case = dataclasses.replace(case, rows=rows)
    pair = prepare(trial, case)
    at_dtype = pair.original.to(pytorch.DTYPES[trial.dtype])
    oracle = copied(at_dtype).double()
    at_dtype = at_dtype.to(pytorch.device_of(trial.backend))
    return dataclasses.replace(pair, original=at_dtype), oracle


def _logits(trial: Trial, pair: Pair, oracle: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """The original's logits of the batch at the trial's dtype, and the oracle's."""
    tokens, targets = pair.batch.tokens, pair.batch.targets
    return _original(trial, pair, tokens, targets, "logits"), run_original(trial, oracle, tokens, targets)["logits"]


def _original(trial: Trial, pair: Pair, tokens: torch.Tensor, targets: torch.Tensor, name: str) -> torch.Tensor:
    with pytorch.autocast(trial.backend, trial.dtype):
        return run_original(trial, pair.original, tokens, targets)[name]


def _calibrated(
    trial: Trial, what: str, actual: torch.Tensor, baseline: torch.Tensor, oracle: torch.Tensor
) -> dict[str, float]:
    if not bool(actual.isfinite().all()) and bool(baseline.isfinite().all()):
        raise Mismatch(f"{what}: not finite in {trial.dtype}, where the original's are")
    return require_calibrated(what, actual, baseline, oracle, epsilon=pytorch.epsilon(trial.dtype))
