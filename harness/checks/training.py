# SPDX-License-Identifier: Apache-2.0
"""Checks of training: gradients, optimiser steps, initialisation and dropout are the original's too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from harness.cases import Case
from harness.checks.loss import at_least_two_tokens, original_targets, port_labels, training_loss
from harness.errors import Mismatch, Skip
from harness.numerics import SEMANTICS_BOUND, relative_error, require_close
from harness.trial import (
    Pair,
    Trial,
    each_attention,
    initial_original,
    port_class,
    port_config,
    port_logits,
    prepare,
    require_semantics,
    run_original,
    worst,
)

STEPS = 3
LEARNING_RATE = 1e-2
WEIGHT_DECAY = 0.1
ADAMW_EPSILON = 1e-6
"""Larger than usual: 1e-8 would blow up the rounding noise in gradients that are zero by construction (a key bias)."""

CONSTRUCTIONS = 24
DRAWS, GROUPS = 400, 40
SIGMAS = 6.0


def gradients(trial: Trial, case: Case) -> dict[str, float]:
    """The gradient of the loss for every parameter equals the original's.

    Would have caught: a detached branch, a loss that is right in value and scaled in its gradient.
    """
    case = at_least_two_tokens(case)
    pair = prepare(trial, case)
    labels = port_labels(trial, pair.batch.tokens, pair.batch.targets)
    actual = port_gradients(trial, pair, labels)
    expected = original_gradients(trial, pair.original, pair.batch.tokens, original_targets(trial, labels))
    return _same_tensors(trial, case, "gradient", actual, expected, run=lambda: port_gradients(trial, pair, labels))


def optimiser_steps(trial: Trial, case: Case) -> dict[str, float]:
    """Weights after three AdamW steps equal the original's; the port is grouped as the Hugging Face Trainer does.

    Would have caught: a tied tensor that is two parameters, a norm that decays, a parameter no group has.
    """
    case = at_least_two_tokens(case)
    pair = prepare(trial, case)
    groups = trial.family.parameter_groups
    assert groups is not None  # the check needs parameter_groups
    labels = port_labels(trial, pair.batch.tokens, pair.batch.targets)
    targets = original_targets(trial, labels)
    settings: Any = {"lr": LEARNING_RATE, "betas": (0.9, 0.95), "eps": ADAMW_EPSILON}
    theirs = torch.optim.AdamW(groups(pair.original, WEIGHT_DECAY), **settings)
    ours = torch.optim.AdamW(_trainer_groups(pair.port), **settings)
    for _ in range(STEPS):
        theirs.zero_grad()
        trial.family.run_original(pair.original, pair.batch.tokens, targets)["loss"].backward()
        theirs.step()
        ours.zero_grad()
        training_loss(trial, pair.port, pair.batch.tokens, labels).backward()
        ours.step()
    actual = {name: parameter.detach().cpu() for name, parameter in pair.port.named_parameters()}
    expected = {name: parameter.detach() for name, parameter in pair.original.named_parameters()}
    return _same_tensors(trial, case, f"after {STEPS} AdamW steps", actual, expected)


def initialisation(trial: Trial, case: Case) -> dict[str, float]:
    """A new port starts from the original's distribution: mean, standard deviation and tails of every tensor.

    Would have caught: the residual projections left at 0.02 on transformers 5, whose initialiser skipped them.
    """
    ours, theirs = _initial_tensors(trial, case, port=True), _initial_tensors(trial, case, port=False)
    largest = 0.0
    for key, expected in theirs.items():
        name = trial.family.port_key(key)
        if name not in ours:
            raise Skip("the port's tensors have names of their own")
        actual = ours[name]
        if float(expected.std()) == 0.0:
            if not torch.equal(actual, expected):
                raise Mismatch(
                    f"{name} starts at {float(actual.mean()):.3g}, the original's at {float(expected.mean()):.3g}"
                )
            continue
        deviation = abs(float(actual.std() / expected.std()) - 1) * actual.numel() ** 0.5
        offset = abs(float(actual.mean() - expected.mean()) / float(expected.std())) * (actual.numel() / 2) ** 0.5
        tails = abs(_kurtosis(actual) - _kurtosis(expected)) * (actual.numel() / 48) ** 0.5
        largest = max(largest, deviation, offset)
        if not max(deviation, offset) <= SIGMAS or not tails <= 3 * SIGMAS:
            raise Mismatch(
                f"{name} starts with mean {float(actual.mean()):.2g}, standard deviation {float(actual.std()):.3g};"
                f" the original's with {float(expected.mean()):.2g}, {float(expected.std()):.3g}",
                metrics={"sigmas": max(deviation, offset)},
            )
    return {"sigmas": largest}


def dropout(trial: Trial, case: Case) -> dict[str, float]:
    """With dropout above zero in training mode, the logits spread as the original's do.

    Under one seed both draw the same masks when dropout stands in the same places, in the same order; otherwise mean
    and variance of many draws must agree. Would have caught: dropout left out of one residual branch, or given twice.
    """
    assert trial.family.dropout is not None  # the check needs dropout
    fields = {**case.fields, trial.family.dropout: 0.3}
    pair = prepare(trial, dataclasses.replace(case, fields=fields, rows=1, tokens=max(2, min(case.tokens, 6))))
    pair.port.train()
    pair.original.train()
    return worst(*(_same_spread(trial, case, pair, attention) for attention in each_attention(pair.port)))


def _same_spread(trial: Trial, case: Case, pair: Pair, attention: str) -> dict[str, float]:
    tokens, targets = pair.batch.tokens, pair.batch.targets
    torch.manual_seed(case.seed)
    theirs = run_original(trial, pair.original, tokens, targets)["logits"]
    torch.manual_seed(case.seed)
    ours = port_logits(trial, pair.port, tokens)
    if ours.shape == theirs.shape and relative_error(ours, theirs) < SEMANTICS_BOUND:
        return {"other_masks": 0.0}
    theirs, ours = (_spreads(run) for run in _dropout_runs(trial, pair, tokens, targets))
    distance = (ours - theirs).mean(dim=0) / ((ours.var(dim=0) + theirs.var(dim=0)) / len(ours)).sqrt()
    ratio = float(ours.mean(dim=0)[-1] / theirs.mean(dim=0)[-1])
    metrics = {"other_masks": 1.0, "spread_ratio": ratio, "sigmas": float(distance.abs().max())}
    if not metrics["sigmas"] <= SIGMAS:
        raise Mismatch(
            f"under dropout the logits' variance is {ratio:.3f} times the original's,"
            f" {metrics['sigmas']:.0f} standard errors away (attention: {attention})",
            metrics=metrics,
        )
    return metrics


def _dropout_runs(
    trial: Trial, pair: Pair, tokens: torch.Tensor, targets: torch.Tensor
) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:
    many, many_targets = tokens.expand(DRAWS, -1), targets.expand(DRAWS, -1)
    return (
        lambda: run_original(trial, pair.original, many, many_targets)["logits"],
        lambda: port_logits(trial, pair.port, many),
    )


def _spreads(run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Mean and variance of a model's logits, averaged over logits, for each of many groups of draws: (groups, 2)."""
    groups = [run() for _ in range(GROUPS)]
    return torch.stack([torch.stack([logits.mean(), logits.var(dim=0).mean()]) for logits in groups])


def gradient_checkpointing(trial: Trial, case: Case) -> dict[str, float]:
    """Gradients with gradient checkpointing equal those without, and it can be switched off again.

    Would have caught: a checkpointed block called with its arguments out of order (NameError in an existing port).
    """
    case = at_least_two_tokens(case)
    pair = prepare(trial, case)
    model: Any = pair.port
    labels = port_labels(trial, pair.batch.tokens, pair.batch.targets)
    model.train()
    plain = port_gradients(trial, pair, labels)
    model.gradient_checkpointing_enable()
    calls = _count_block_calls(model, lambda: port_gradients(trial, pair, labels))
    numbers = _equal_tensors("gradient with checkpointing", port_gradients(trial, pair, labels), plain)
    if not calls:
        raise Mismatch("gradient_checkpointing_enable() changes nothing: no block runs again in the backward pass")
    model.gradient_checkpointing_disable()
    return worst(numbers, _equal_tensors("gradient after checkpointing", port_gradients(trial, pair, labels), plain))


def micro_batches(trial: Trial, case: Case) -> dict[str, float]:
    """Gradients of micro-batches, given the number of labels in the whole batch, add up to those of the batch.

    Would have caught: `num_items_in_batch` accepted and ignored, which scales the loss by the number of micro-batches.
    """
    case = dataclasses.replace(at_least_two_tokens(case), rows=3)
    pair = prepare(trial, case)
    labels = port_labels(trial, pair.batch.tokens, pair.batch.targets)
    generator = torch.Generator().manual_seed(case.seed)
    drop = torch.rand(labels.shape, generator=generator) < 0.3
    drop[:, -1] = False
    labels = labels.masked_fill(drop, trial.port.ignored_label)
    whole = port_gradients(trial, pair, labels)
    counted = original_targets(trial, labels)
    total = int((counted != trial.family.loss.ignore_index).sum())
    pair.port.zero_grad()
    for row in range(3):
        part = slice(row, row + 1)
        training_loss(
            trial, pair.port, pair.batch.tokens[part], labels[part], num_items_in_batch=torch.tensor(total)
        ).backward()
    summed = {name: p.grad.detach().cpu().clone() for name, p in pair.port.named_parameters() if p.grad is not None}
    return _equal_tensors("gradient of three micro-batches", summed, whole)


def parameter_groups(trial: Trial, case: Case) -> dict[str, float]:
    """The Trainer's weight decay falls on the tensors the original decays, and every parameter is in one group.

    Would have caught: a norm of one's own that the Trainer does not know, so that its gains decay.
    """
    original, port = initial_original(trial, case.fields), port_class(trial)(port_config(trial, case.fields))
    groups = trial.family.parameter_groups
    assert groups is not None  # the check needs parameter_groups
    names = {id(parameter): name for name, parameter in original.named_parameters()}
    theirs = {
        trial.family.port_key(names[id(parameter)]): group["weight_decay"]
        for group in groups(original, WEIGHT_DECAY)
        for parameter in group["params"]
    }
    port_names = {id(parameter): name for name, parameter in port.named_parameters()}
    ours = {
        port_names[id(parameter)]: group["weight_decay"]
        for group in _trainer_groups(port)
        for parameter in group["params"]
    }
    if theirs.keys() != ours.keys():
        odd = sorted(theirs.keys() ^ ours.keys())
        raise Mismatch(f"original and port do not optimise the same parameters: {odd[0]} is in one only")
    for name, decay in theirs.items():
        if ours[name] != decay:
            raise Mismatch(f"{name} has weight decay {ours[name]}, the original gives it {decay}")
    return {"parameters": float(len(ours))}


def port_gradients(trial: Trial, pair: Pair, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of the port's loss by parameter name, on the CPU; zeros where the loss does not depend on it."""
    pair.port.zero_grad()
    training_loss(trial, pair.port, pair.batch.tokens, labels).backward()
    return _collected(pair.port)


def original_gradients(
    trial: Trial, original: torch.nn.Module, tokens: torch.Tensor, targets: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Gradients of the original's loss by parameter name."""
    original.zero_grad()
    device = next(original.parameters()).device
    trial.family.run_original(original, tokens.to(device), targets.to(device))["loss"].backward()
    return _collected(original)


def _collected(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: torch.zeros_like(p).cpu() if p.grad is None else p.grad.detach().cpu().clone()
        for name, p in module.named_parameters()
    }


def _same_tensors(
    trial: Trial,
    case: Case,
    what: str,
    actual: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    *,
    run: Callable[[], Any] | None = None,
) -> dict[str, float]:
    """Compares tensors by name on one scale, so that those which are zero by construction do not count rounding."""
    names = {key: trial.family.port_key(key) for key in expected}
    if set(names.values()) != set(actual):
        odd = sorted(set(names.values()) ^ set(actual))
        raise Mismatch(f"{what}: original and port do not have the same parameters: {odd[0]} is in one only")
    scale = torch.cat([tensor.flatten() for tensor in expected.values()]).double().square().mean().sqrt()
    numbers = []
    for key, tensor in expected.items():
        floor = torch.full((1,), float(scale), dtype=torch.float64)
        numbers.append(
            require_semantics(
                trial,
                f"{what}, {names[key]}",
                torch.cat([actual[names[key]].double().flatten(), floor]),
                torch.cat([tensor.double().flatten(), floor]),
                run=run,
            )
        )
    return worst(*numbers)


def _equal_tensors(
    what: str, actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    scale = torch.cat([tensor.flatten() for tensor in expected.values()]).double().square().mean().sqrt()
    bound = 1e-9 if next(iter(expected.values())).dtype == torch.float64 else 1e-3
    errors = [0.0]
    for name, tensor in expected.items():
        floor = torch.full((1,), float(scale), dtype=torch.float64)
        left, right = (torch.cat([t.double().flatten(), floor]) for t in (actual[name], tensor))
        errors.append(require_close(f"{what}, {name}", left, right, bound=bound))
    return {"error": max(errors)}


def _trainer_groups(model: Any) -> list[dict[str, Any]]:
    from transformers import Trainer

    # The rule needs nothing of a trainer but the model.
    decaying = set(Trainer.get_decay_parameter_names(None, model))
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [p for name, p in named if name in decaying], "weight_decay": WEIGHT_DECAY},
        {"params": [p for name, p in named if name not in decaying], "weight_decay": 0.0},
    ]


def _initial_tensors(trial: Trial, case: Case, *, port: bool) -> dict[str, torch.Tensor]:
    drawn: dict[str, list[torch.Tensor]] = {}
    cls, config = port_class(trial), port_config(trial, case.fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed + (1 if port else 2))
        for _ in range(CONSTRUCTIONS):
            model = cls(config) if port else initial_original(trial, case.fields)
            for name, parameter in model.named_parameters():
                drawn.setdefault(name, []).append(parameter.detach().double().flatten())
    return {name: torch.cat(pieces) for name, pieces in drawn.items()}


def _kurtosis(values: torch.Tensor) -> float:
    centred = values - values.mean()
    return float(centred.pow(4).mean() / centred.square().mean().square())


def _count_block_calls(model: torch.nn.Module, run: Callable[[], Any]) -> bool:
    """Whether some submodule runs again in the backward pass: more often than without checkpointing."""
    counts: dict[str, int] = {}

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            counts[name] = counts.get(name, 0) + 1

        return hook

    leaves = {name: module for name, module in model.named_modules() if not list(module.children())}
    hooks = [module.register_forward_hook(count(name)) for name, module in leaves.items()]
    run()
    for handle in hooks:
        handle.remove()
    return max(counts.values(), default=0) > 1
