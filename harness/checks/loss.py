# SPDX-License-Identifier: Apache-2.0
"""Checks of the loss: its convention, its value, and that nothing else leaks into it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.nn import functional

from harness import numerics
from harness.cases import Case
from harness.cases.batches import Batch
from harness.checks.untouched import untouched
from harness.errors import Mismatch, Skip
from harness.trial import (
    Pair,
    Trial,
    call_port,
    is_asked,
    original_model,
    outputs_of,
    prepare,
    require_semantics,
    run_original,
    run_port,
    takes,
    worst,
)


def value(trial: Trial, case: Case) -> dict[str, float]:
    """The loss equals the original's on the same text, each model given labels by its own convention; in training too.

    Would have caught: labels shifted twice or not at all (6.58 against 6.86 on the same text), a sum for a mean.
    """
    case = at_least_two_tokens(case)
    pair = prepare(trial, case)
    try:
        numbers = _same_loss(trial, case, pair, pair.batch, ignored=None)
    except Mismatch as error:
        _require_declared_labels(trial, pair, error)
        raise
    pair.port.train()
    pair.original.train()
    return worst(numbers, _same_loss(trial, case, pair, pair.batch, ignored=None))


def ignored(trial: Trial, case: Case) -> dict[str, float]:
    """Positions that carry the ignored label do not count, and the mean is over the others.

    Would have caught: -1 where -100 is meant (an IndexError, or a class that does not exist), a mean over all.
    """
    case = at_least_two_tokens(case)
    pair = prepare(trial, case)
    generator = torch.Generator().manual_seed(case.seed + 3)
    mask = torch.rand(pair.batch.tokens.shape, generator=generator) < 0.4
    mask[:, -1] = False
    return _same_loss(trial, case, pair, pair.batch, ignored=mask)


def from_logits(trial: Trial, case: Case) -> dict[str, float]:
    """In evaluation mode the loss is the cross entropy of all the logits that the same call returns.

    Where the original's loss has terms besides, so has the port's. Would have caught: a loss from other logits than the
    returned ones, auxiliary terms that are not declared.
    """
    case = at_least_two_tokens(case)
    pair = prepare(trial, case)
    labels = port_labels(trial, pair.batch.tokens, pair.batch.targets)
    output = run_port(trial, pair.port, pair.batch.tokens, labels=labels)
    logits, targets = _aligned(trial, output["logits"], labels)
    expected = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=trial.port.ignored_label)
    besides = _besides_cross_entropy(trial, pair, original_targets(trial, labels))
    return require_semantics(trial, "loss against its own logits", _loss(output), expected + besides)


def _besides_cross_entropy(trial: Trial, pair: Pair, targets: torch.Tensor) -> torch.Tensor:
    """What the original's loss has beside the cross entropy of its logits, where the family has experts; else zero."""
    if trial.family.routing is None:
        return torch.zeros(())
    output = run_original(trial, pair.original, pair.batch.tokens, targets)
    flat = output["logits"].flatten(0, 1), targets.flatten()
    return output["loss"] - functional.cross_entropy(*flat, ignore_index=trial.family.loss.ignore_index)


def pure(trial: Trial, case: Case) -> dict[str, float]:
    """The loss is the same bits before and after an unlabelled call, a training call, and with a second model alive.

    generate() leaves mode, configuration and weights as they were. Would have caught: auxiliary losses collected in a
    module-global list, a cache that survives its call, dropout that sampling in between switches off for good.
    """
    case = at_least_two_tokens(case)
    pair = prepare(trial, case)
    labels = port_labels(trial, pair.batch.tokens, pair.batch.targets)
    before = loss_of(trial, pair, labels)
    other = prepare(trial, dataclasses.replace(case, seed=case.seed + 1))
    loss_of(trial, other, labels)
    run_port(trial, pair.port, pair.batch.tokens)
    pair.port.train()
    run_port(trial, pair.port, pair.batch.tokens, labels=labels)
    generate: Any = getattr(pair.port, "generate", None)
    if generate is not None and "generation" in trial.family.features:
        prompt = pair.batch.tokens[:, :1].to(next(pair.port.parameters()).device)
        with untouched(pair.port, "generate()"):
            in_training = generate(prompt, max_new_tokens=3, do_sample=False)
        pair.port.eval()
        if not torch.equal(generate(prompt, max_new_tokens=3, do_sample=False), in_training):
            raise Mismatch("generate() of a model in training, without dropout, gives other tokens")
    pair.port.eval()
    after = loss_of(trial, pair, labels)
    if not torch.equal(before, after):
        raise Mismatch(f"the loss was {float(before):.9g} and is {float(after):.9g} after other calls")
    return {}


def targets(trial: Trial, case: Case) -> dict[str, float]:
    """Where forward takes `targets` too, these are the original's own: its shift, its ignored value, its loss.

    Would have caught: targets that are shifted already and are shifted again, -1 that is not ignored.
    """
    case = at_least_two_tokens(case)
    pair = prepare(trial, case)
    if not takes(pair.port, "targets"):
        raise Skip("forward takes no targets beside labels")
    given = pair.batch.targets.clone()
    given[:, 0] = trial.family.loss.ignore_index
    actual = _loss(run_port(trial, pair.port, pair.batch.tokens, targets=given))
    expected = run_original(trial, pair.original, pair.batch.tokens, given)["loss"]
    return require_semantics(trial, "loss of the original's own targets", actual, expected)


def at_least_two_tokens(case: Case) -> Case:
    """The case with two tokens where it had one: a single token has nothing to predict once labels are shifted."""
    return dataclasses.replace(case, tokens=max(case.tokens, 2))


def port_labels(trial: Trial, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Labels of a batch by the port's convention: the tokens where the port shifts, the targets where it does not."""
    shifts = trial.port.labels == "hf" and "causal" in trial.family.features
    return (tokens if shifts else targets).clone()


def original_targets(trial: Trial, labels: torch.Tensor) -> torch.Tensor:
    """The original's targets for which its loss is over the same positions as the port's for `labels`."""
    targets = labels.clone()
    if trial.port.labels == "hf" and trial.family.loss.labels == "preshifted":
        targets = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], trial.port.ignored_label)], dim=1)
    return targets.masked_fill(targets == trial.port.ignored_label, trial.family.loss.ignore_index)


def _aligned(trial: Trial, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if logits.shape[:2] != labels.shape:
        raise Mismatch(f"logits of shape {tuple(logits.shape)} beside a loss over labels {tuple(labels.shape)}")
    if trial.port.labels == "hf" and "causal" in trial.family.features:
        return logits[:, :-1], labels[:, 1:]
    return logits, labels


def _same_loss(trial: Trial, case: Case, pair: Pair, batch: Batch, *, ignored: torch.Tensor | None) -> dict[str, float]:
    labels = port_labels(trial, batch.tokens, batch.targets)
    if ignored is not None:
        labels = labels.masked_fill(ignored, trial.port.ignored_label)
    targets = original_targets(trial, labels)
    return worst(
        require_semantics(
            trial,
            "loss",
            loss_of(trial, pair, labels),
            run_original(trial, pair.original, batch.tokens, targets)["loss"],
            baseline=lambda: run_original(trial, original_model(trial, case, dtype=trial.dtype), batch.tokens, targets)[
                "loss"
            ],
        )
    )


def _require_declared_labels(trial: Trial, pair: Pair, error: Mismatch) -> None:
    """Raises Mismatch that says so where a loss is right by the convention that the port does not declare."""
    if trial.family.loss.labels != "preshifted" or not is_asked(trial, "causal", "loss.value"):
        return
    labels = port_labels(trial, pair.batch.tokens, pair.batch.targets)
    declared = trial.port.labels
    taken, advice = {
        "hf": ("are shifted already", "shifts them inside, or its description says labels = 'preshifted'"),
        "preshifted": ("it shifts inside", "takes them shifted, or its description says labels = 'hf'"),
    }[declared]
    other = dataclasses.replace(
        trial.port,
        labels="preshifted" if declared == "hf" else "hf",
        ignore_index=trial.port.ignored_label,
    )
    targets = original_targets(dataclasses.replace(trial, port=other), labels)
    expected = run_original(trial, pair.original, pair.batch.tokens, targets)["loss"]
    actual = loss_of(trial, pair, labels)
    if numerics.relative_error(actual, expected) <= numerics.FLOAT32_INSIDE_BOUND:
        raise Mismatch(f"the loss is that of labels that {taken}; a port {advice}", metrics=error.metrics) from error


def loss_of(trial: Trial, pair: Pair, labels: torch.Tensor) -> torch.Tensor:
    """The port's loss of the pair's batch, without a graph, on the CPU."""
    return _loss(run_port(trial, pair.port, pair.batch.tokens, labels=labels))


def _loss(output: dict[str, Any]) -> torch.Tensor:
    loss = output.get("loss")
    if not isinstance(loss, torch.Tensor):
        raise Mismatch("forward with labels returned no loss")
    if loss.ndim:
        raise Mismatch(f"the loss has shape {tuple(loss.shape)}, expected a scalar")
    return loss


def training_loss(
    trial: Trial, model: torch.nn.Module, tokens: torch.Tensor, labels: torch.Tensor, **options: Any
) -> torch.Tensor:
    """The port's loss with its graph, on the trial's device."""
    output = call_port(trial, model, tokens, labels=labels, **options)
    loss = output.loss if hasattr(output, "loss") else outputs_of(trial, output).get("loss")
    return _loss({"loss": loss})
