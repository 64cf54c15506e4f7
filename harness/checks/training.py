# SPDX-License-Identifier: Apache-2.0
"""Checks of training: gradients, optimiser steps, initialisation and dropout are the original's too."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from harness.capture import capture_both
from harness.cases import Case
from harness.cases.batches import Padded
from harness.checks.forward import embedded
from harness.checks.loss import at_least_two_tokens, original_targets, port_labels, training_loss
from harness.checks.masks import padded_batch
from harness.checks.untouched import untouched
from harness.errors import Mismatch, Skip
from harness.families import dropouts_of, taps_of, with_dropout
from harness.layout import layout_of
from harness.numerics import FLOAT32_GRADIENT_BOUND, SEMANTICS_BOUND, relative_error, require_shape
from harness.routing import all_terms
from harness.trial import (
    Pair,
    Trial,
    call_port,
    content_tokens,
    each_attention,
    field_known_by,
    initial_original,
    is_asked,
    outputs_of,
    place,
    port_class,
    port_config,
    port_logits,
    prepare,
    require_semantics,
    run_original,
    takes,
    worst,
)

STEPS = 3
LEARNING_RATE = 1e-2
WEIGHT_DECAY = 0.1
ADAMW_EPSILON, ADAMW_EPSILON_FLOAT32 = 1e-6, 1e-2
"""Larger than usual: 1e-8 would blow up the rounding noise in gradients that are zero by construction (a key bias)."""

CONSTRUCTIONS = 24
DRAWS, GROUPS = 400, 40
SHARE = 0.03
SIGMAS = 6.0


def gradients(trial: Trial, case: Case) -> dict[str, float]:
    """The gradient of the loss in training mode equals the original's, for every parameter.

    Without a loss it is that of a sum of the outputs, each number weighted at random. Would have caught: a detached
    branch, a loss that is right in value and scaled in its gradient, a term of the loss that only training adds.
    """
    case = at_least_two_tokens(case)
    pair = in_training(prepare(trial, case))
    if "loss" not in trial.family.features:
        return _gradients_of_outputs(trial, case, pair)
    labels = port_labels(trial, pair.batch.tokens, pair.batch.targets)
    actual = port_gradients(trial, pair, labels)
    expected = original_gradients(trial, pair.original, pair.batch.tokens, original_targets(trial, labels))
    return same_tensors(trial, case, "gradient", actual, expected)


def _gradients_of_outputs(trial: Trial, case: Case, pair: Pair) -> dict[str, float]:
    tokens = pair.batch.tokens
    theirs = trial.family.run_original(pair.original, tokens, None)
    ours = outputs_of(trial, call_port(trial, pair.port, tokens))
    generator = torch.Generator().manual_seed(case.seed + 7)
    weights = {name: torch.randn(value.shape, generator=generator, dtype=value.dtype) for name, value in theirs.items()}
    for model, outputs in ((pair.original, theirs), (pair.port, ours)):
        model.zero_grad()
        sum((outputs[name] * weight).sum() for name, weight in weights.items()).backward()  # type: ignore[union-attr]
    return same_tensors(trial, case, "gradient", collected(pair.port), collected(pair.original))


def gradients_masked(trial: Trial, case: Case) -> dict[str, float]:
    """Gradients of a padded batch are finite, and the sum of those that the original has for the rows alone.

    So are they finite beside a row that is masked as a whole. Would have caught: masks whose NaN is repaired in the
    forward pass only, padding that takes part in the loss.
    """
    case = at_least_two_tokens(case)
    pair = in_training(prepare(trial, dataclasses.replace(case, rows=2)))
    numbers = []
    for side in ("left", "right"):
        padded = padded_batch(trial, case, pair, side)
        labels, expected = rows_alone(trial, pair, padded)
        for attention in each_attention(pair.port):
            pair.port.zero_grad()
            mask = padded.mask.long()
            training_loss(trial, pair.port, padded.tokens, labels, attention_mask=mask).backward()
            what = f"gradient of a {side}-padded batch (attention: {attention})"
            numbers.append(same_tensors(trial, case, what, collected(pair.port), expected))
    _require_finite_beside_nothing(trial, pair)
    return worst(*numbers)


def _require_finite_beside_nothing(trial: Trial, pair: Pair) -> None:
    """Raises Mismatch when a row that is masked as a whole, of which nothing is asked, gives no finite gradients."""
    tokens = pair.batch.tokens
    labels = port_labels(trial, tokens, pair.batch.targets)
    labels[1] = trial.port.ignored_label
    mask = torch.ones_like(tokens)
    mask[1] = 0
    for attention in each_attention(pair.port):
        pair.port.zero_grad()
        training_loss(trial, pair.port, tokens, labels, attention_mask=mask).backward()
        for name, gradient in collected(pair.port).items():
            if not bool(gradient.isfinite().all()):
                raise Mismatch(
                    f"gradient, {name}: not finite beside a row that is masked as a whole (attention: {attention})",
                    metrics={"error": float("inf")},
                )


def in_training(pair: Pair, training: bool = True) -> Pair:
    """The pair, both of its models in training mode from now on, or in evaluation mode."""
    pair.original.train(training)
    pair.port.train(training)
    return pair


def rows_alone(trial: Trial, pair: Pair, padded: Padded) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Labels of a padded batch, padding ignored, and the original's gradients of the same loss, row by row."""
    ignored = trial.port.ignored_label
    labels = port_labels(trial, padded.tokens, padded.tokens).masked_fill(~padded.mask, ignored)
    if trial.port.labels == "hf":
        # What a pad predicts is no text.
        first = padded.mask.long().argmax(dim=1)
        labels[torch.arange(len(first)), first] = ignored
    together = zip(padded.tokens, padded.mask, labels, strict=True)
    rows = [(tokens[mask][None], row[mask][None]) for tokens, mask, row in together]
    counts = [int((original_targets(trial, row) != trial.family.loss.ignore_index).sum()) for _, row in rows]
    if not sum(counts):
        raise Skip("no row has two tokens")
    summed: dict[str, torch.Tensor] = {}
    for (tokens, row), count in zip(rows, counts, strict=True):
        if not count:
            continue
        for name, gradient in original_gradients(trial, pair.original, tokens, original_targets(trial, row)).items():
            summed[name] = summed.get(name, torch.zeros_like(gradient)) + gradient * count / sum(counts)
    return labels, summed


def special_tokens(trial: Trial, case: Case) -> dict[str, float]:
    """A pad token in the configuration, as fine-tuning scripts set it, changes neither the loss nor a gradient.

    Asked where the original has no such token. Would have caught: an embedding whose row for the pad token gets no
    gradient, a mask that is made up from the token ids.
    """
    if field_known_by(trial, case.fields, "pad_token_id") is not None:
        raise Skip("the original has a pad token of its own")
    case = at_least_two_tokens(case)
    pair = prepare(trial, case)
    labels = port_labels(trial, pair.batch.tokens, pair.batch.targets)
    expected = port_gradients(trial, pair, labels)
    config = port_config(trial, case.fields)
    if not hasattr(config, "pad_token_id"):
        raise Skip("the configuration has no pad_token_id")
    config.pad_token_id = int(pair.batch.tokens[0, 0])
    model = port_class(trial)(config)
    model.load_state_dict(pair.port.state_dict())
    other = dataclasses.replace(pair, port=place(trial, model))
    return equal_tensors(trial, "gradient with a pad token configured", port_gradients(trial, other, labels), expected)


def optimiser_steps(trial: Trial, case: Case) -> dict[str, float]:
    """Weights after three AdamW steps equal the original's; the port is grouped as the Hugging Face Trainer does.

    Would have caught: a tied tensor that is two parameters, a norm that decays, a parameter no group has.
    """
    case = at_least_two_tokens(case)
    pair = in_training(prepare(trial, case))
    groups = trial.family.parameter_groups
    assert groups is not None  # the check needs parameter_groups
    labels = port_labels(trial, pair.batch.tokens, pair.batch.targets)
    targets = original_targets(trial, labels)
    epsilon = ADAMW_EPSILON_FLOAT32 if trial.float32_inside else ADAMW_EPSILON
    settings: Any = {"lr": LEARNING_RATE, "betas": (0.9, 0.95), "eps": epsilon}
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
    return same_tensors(trial, case, f"after {STEPS} AdamW steps", actual, expected)


def initialisation(trial: Trial, case: Case) -> dict[str, float]:
    """A new port starts from the original's distribution: mean, standard deviation and tails of every tensor.

    Would have caught: the residual projections left at 0.02 on transformers 5, whose initialiser skipped them.
    """
    ours, theirs = _initial_tensors(trial, case, port=True), _initial_tensors(trial, case, port=False)
    named = {trial.family.port_key(key): tensor for key, tensor in theirs.items()}
    if named.keys() != ours.keys():
        layout = layout_of(trial, case)
        if layout is None:
            raise Skip("the port's tensors have names of their own, and its loader does not tell which is which")
        named = {name: tensor[:, layout.known(name)] for name, tensor in layout.arrange(theirs).items()}
        ours = {name: tensor[:, layout.known(name)] for name, tensor in ours.items() if name in named}
    largest = 0.0
    for name, expected in named.items():
        actual = ours[name]
        if float(expected.std()) == 0.0:
            if not torch.equal(actual, expected):
                raise Mismatch(
                    f"{name} starts at {float(actual.mean()):.3g}, the original's at {float(expected.mean()):.3g}"
                )
            continue
        starts_at_zero = (expected == 0).all(dim=0)  # such as the row of a padding token
        if bool((actual[:, starts_at_zero] != 0).any()):
            raise Mismatch(f"parts of {name} start at random, which start at 0 in the original")
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
    numbers = []
    for name in dropouts_of(trial.family):
        fields = {**case.fields, name: 0.3}
        pair = prepare(trial, dataclasses.replace(case, fields=fields, rows=1, tokens=max(2, min(case.tokens, 6))))
        pair.port.train()
        pair.original.train()
        numbers += [_same_spread(trial, case, pair, attention) for attention in each_attention(pair.port)]
    return worst(*numbers)


def _same_spread(trial: Trial, case: Case, pair: Pair, attention: str) -> dict[str, float]:
    tokens, targets = content_tokens(trial, case, pair.batch.tokens), pair.batch.targets
    torch.manual_seed(case.seed)
    theirs = run_original(trial, pair.original, tokens, targets)["logits"]
    torch.manual_seed(case.seed)
    ours = port_logits(trial, pair.port, tokens)
    _same_with_embeddings(trial, case, pair, tokens, ours)
    if ours.shape == theirs.shape and relative_error(ours, theirs) < SEMANTICS_BOUND:
        return {"other_draws": 0.0}
    metrics = same_spread(trial, pair, f"under dropout (attention: {attention})")
    _same_share_left_alone(trial, case, pair, attention)
    return metrics


def same_spread(trial: Trial, pair: Pair, what: str) -> dict[str, float]:
    """Compares mean and variance of the logits over many draws, in the mode that both models are in.

    Raises Mismatch, which names `what` the logits spread with, where they are further apart than chance allows.
    """
    theirs, ours = (_spreads(run) for run in _random_runs(trial, pair, pair.batch.tokens, pair.batch.targets))
    distance = (ours - theirs).mean(dim=0) / ((ours.var(dim=0) + theirs.var(dim=0)) / len(ours)).sqrt()
    ratio = float(ours.mean(dim=0)[-1] / theirs.mean(dim=0)[-1])
    metrics = {"other_draws": 1.0, "spread_ratio": ratio, "sigmas": float(distance.abs().max())}
    if not metrics["sigmas"] <= SIGMAS:
        raise Mismatch(
            f"the logits' variance {what} is {ratio:.3f} times the original's, {metrics['sigmas']:.0f} standard errors"
            " away",
            metrics=metrics,
        )
    return metrics


def _same_share_left_alone(trial: Trial, case: Case, pair: Pair, attention: str) -> None:
    """Raises Mismatch when blocks leave another share of their numbers as they were than the original's do.

    Dropout at the end of every branch leaves some; in front of a branch's last product it leaves none, with logits
    that spread much the same.
    """
    taps = taps_of(trial.family, case.fields)
    stream = [tap for tap in taps if tap.name == "embedding" or re.fullmatch(r"block\.\d+", tap.name)]
    if len(stream) < 2:
        return
    tokens = pair.batch.tokens.expand(DRAWS, -1)
    targets = pair.batch.targets.expand(DRAWS, -1)
    ours, theirs = capture_both(
        stream,
        (pair.original, lambda: run_original(trial, pair.original, tokens, targets)),
        (pair.port, lambda: port_logits(trial, pair.port, tokens)),
    )
    if ours.keys() != {tap.name for tap in stream}:
        return
    for before, after in itertools.pairwise(tap.name for tap in stream):
        found, expected = (float((seen[after] == seen[before]).double().mean()) for seen in (ours, theirs))
        if abs(found - expected) > SHARE:
            raise Mismatch(
                f"under dropout {after} leaves {found:.0%} of its input's numbers as they were, the original's"
                f" {expected:.0%}: dropout does not stand at the end of each branch (attention: {attention})"
            )


def _same_with_embeddings(trial: Trial, case: Case, pair: Pair, tokens: torch.Tensor, expected: torch.Tensor) -> None:
    """Token embeddings instead of ids go through the same dropout, as the tuning of prompts needs."""
    if not takes(pair.port, "inputs_embeds"):
        return
    embeds = embedded(trial, pair.port, pair.original, tokens)
    if embeds is None:
        return
    torch.manual_seed(case.seed)
    with torch.no_grad():
        actual = outputs_of(trial, call_port(trial, pair.port, None, inputs_embeds=embeds))["logits"]
    require_semantics(
        trial, "logits from inputs_embeds under dropout, with the seed of the same token ids", actual, expected
    )


def _random_runs(
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
    """Gradients with gradient checkpointing equal those without, under dropout too; it can be switched off again.

    Would have caught: a checkpointed block called with its arguments out of order (NameError in an existing port),
    other dropout when a block runs again, a configuration that is left changed.
    """
    case = dataclasses.replace(at_least_two_tokens(case), fields=with_dropout(trial.family, case.fields, 0.3))
    pair = prepare(trial, case)
    model: Any = pair.port
    labels = port_labels(trial, pair.batch.tokens, pair.batch.targets)
    model.train()

    masked = {}
    if is_asked(trial, "masks", "masks.left_padding"):
        masked = {"attention_mask": torch.ones_like(pair.batch.tokens)}
        masked["attention_mask"][0, 0] = 0

    def gradients() -> dict[str, torch.Tensor]:
        torch.manual_seed(case.seed)
        return port_gradients(trial, pair, labels, **masked)

    plain, cached = gradients(), _returns_cache(trial, pair)
    with untouched(model, "a step with gradient checkpointing"):
        model.gradient_checkpointing_enable()
        calls = _count_block_calls(model, gradients)
        numbers = equal_tensors(trial, "gradient with checkpointing", gradients(), plain)
    if not calls:
        raise Mismatch("gradient_checkpointing_enable() changes nothing: no block runs again in the backward pass")
    if _returns_cache(trial, pair) != cached:
        raise Mismatch("with gradient checkpointing enabled, evaluation returns no cache any more")
    model.gradient_checkpointing_disable()
    return worst(numbers, equal_tensors(trial, "gradient after checkpointing", gradients(), plain))


def _returns_cache(trial: Trial, pair: Pair) -> bool:
    """Whether the port in evaluation mode returns a cache when asked to; the mode is left as it was."""
    if not takes(pair.port, "use_cache"):
        return False
    training = pair.port.training
    with torch.no_grad():
        output = call_port(trial, pair.port.eval(), pair.batch.tokens, use_cache=True)
    pair.port.train(training)
    return getattr(output, "past_key_values", None) is not None


def micro_batches(trial: Trial, case: Case) -> dict[str, float]:
    """Gradients of micro-batches, given the number of labels in the whole batch, add up to those of the batch.

    With experts, three copies of one batch add up to its own gradient, auxiliary losses included. Would have caught:
    `num_items_in_batch` accepted and ignored, which scales the loss by the number of micro-batches; auxiliary losses
    that every micro-batch adds as a whole.
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
    if getattr(pair.port, "accepts_loss_kwargs", None) is False:
        raise Mismatch("accepts_loss_kwargs is False: the Trainer gives such a model no num_items_in_batch")
    numbers = []
    for count in (torch.tensor(total), total):  # the Trainer gives a tensor, loops of one's own an int
        pair.port.zero_grad()
        for row in range(3):
            part = slice(row, row + 1)
            tokens = pair.batch.tokens[part]
            training_loss(trial, pair.port, tokens, labels[part], num_items_in_batch=count).backward()
        what = f"gradient of three micro-batches with num_items_in_batch ({type(count).__name__})"
        numbers.append(equal_tensors(trial, what, collected(pair.port), whole))
    return worst(*numbers, _copies_add_up(trial, case, labels, total))


def _copies_add_up(trial: Trial, case: Case, labels: torch.Tensor, total: int) -> dict[str, float]:
    """Compares the gradient of a batch, in training with all auxiliary losses, with that of its copies together."""
    routing = trial.family.routing
    if routing is None or not routing.layers(case.fields):
        return {}
    pair = in_training(prepare(trial, dataclasses.replace(case, fields={**case.fields, **all_terms(routing)})))
    whole = port_gradients(trial, pair, labels)
    pair.port.zero_grad()
    for _ in range(3):
        training_loss(trial, pair.port, pair.batch.tokens, labels, num_items_in_batch=3 * total).backward()
    what = "gradient of three copies of a batch with num_items_in_batch and all auxiliary losses"
    return equal_tensors(trial, what, collected(pair.port), whole)


def parameter_groups(trial: Trial, case: Case) -> dict[str, float]:
    """The Trainer's weight decay falls on the tensors the original decays, and every parameter is in one group.

    Would have caught: a norm of one's own that the Trainer does not know, so that its gains decay.
    """
    original, port = initial_original(trial, case.fields), port_class(trial)(port_config(trial, case.fields))
    groups = trial.family.parameter_groups
    assert groups is not None  # the check needs parameter_groups
    names = {id(parameter): name for name, parameter in original.named_parameters()}
    decays = {
        names[id(parameter)]: torch.full_like(parameter, group["weight_decay"], dtype=torch.float64)
        for group in groups(original, WEIGHT_DECAY)
        for parameter in group["params"]
    }
    theirs = {trial.family.port_key(name): tensor for name, tensor in decays.items()}
    port_names = {id(parameter): name for name, parameter in port.named_parameters()}
    ours = {
        port_names[id(parameter)]: group["weight_decay"]
        for group in _trainer_groups(port)
        for parameter in group["params"]
    }
    layout = layout_of(trial, case) if theirs.keys() != ours.keys() else None
    if layout is not None and decays.keys() == layout.sources.keys():
        theirs = {name: tensor[layout.known(name)] for name, tensor in layout.arrange(decays).items()}
    if theirs.keys() != ours.keys():
        odd = sorted(theirs.keys() ^ ours.keys())
        raise Mismatch(f"original and port do not optimise the same parameters: {odd[0]} is in one only")
    for name, decay in theirs.items():
        if bool((decay != ours[name]).any()):
            raise Mismatch(f"{name} has weight decay {ours[name]}, the original gives it {float(decay.mean()):.3g}")
    return {"parameters": float(len(ours))}


def port_gradients(trial: Trial, pair: Pair, labels: torch.Tensor, **options: Any) -> dict[str, torch.Tensor]:
    """Gradients of the port's loss by parameter name, on the CPU; zeros where the loss does not depend on it."""
    pair.port.zero_grad()
    training_loss(trial, pair.port, pair.batch.tokens, labels, **options).backward()
    return collected(pair.port)


def original_gradients(
    trial: Trial, original: torch.nn.Module, tokens: torch.Tensor, targets: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Gradients of the original's loss by parameter name."""
    original.zero_grad()
    device = next(original.parameters()).device
    trial.family.run_original(original, tokens.to(device), targets.to(device))["loss"].backward()
    return collected(original)


def collected(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of a module's parameters by name, on the CPU; zeros where there is none."""
    return {
        name: torch.zeros_like(p).cpu() if p.grad is None else p.grad.detach().cpu().clone()
        for name, p in module.named_parameters()
    }


def same_tensors(
    trial: Trial,
    case: Case,
    what: str,
    actual: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
) -> dict[str, float]:
    """Compares the port's tensors with the original's, by parameter; where the port arranges them otherwise, so."""
    named = {trial.family.port_key(key): tensor for key, tensor in expected.items()}
    try:
        if odd := sorted(set(named) ^ set(actual)):
            raise Mismatch(f"{what}: original and port do not have the same parameters: {odd[0]} is in one only")
        return equal_tensors(trial, what, actual, named)
    except Mismatch:
        layout = layout_of(trial, case)
        if layout is None or layout.is_plain(trial):
            raise
    if layout.added:
        raise Mismatch(f"{what}: the port trains {layout.added[0]} besides, which the original does not have")
    return equal_tensors(trial, what, actual, layout.arrange(expected))


def equal_tensors(
    trial: Trial, what: str, actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """Compares tensors by name on one scale, so that those which are zero by construction do not count rounding."""
    scale = torch.cat([tensor.flatten() for tensor in expected.values()]).double().square().mean().sqrt()
    numbers = []
    for name, tensor in expected.items():
        require_shape(f"{what}, {name}", actual[name], tensor)
        floor = torch.full((1,), float(scale), dtype=torch.float64)
        left, right = (torch.cat([t.double().flatten(), floor]) for t in (actual[name], tensor))
        numbers.append(require_semantics(trial, f"{what}, {name}", left, right, float32_bound=FLOAT32_GRADIENT_BOUND))
    return worst(*numbers)


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
                drawn.setdefault(name, []).append(parameter.detach().double())
    return {name: torch.stack(pieces) for name, pieces in drawn.items()}


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
