# SPDX-License-Identifier: Apache-2.0
"""Checks of experts: who gets which token, who has no room, what the choice costs, and what follows from it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional

from harness.backends import pytorch
from harness.cases import Case
from harness.cases.batches import draw_batch
from harness.checks.generation import continues, prompted
from harness.checks.loss import at_least_two_tokens, loss_of, original_targets, port_labels, training_loss
from harness.checks.masks import padded_batch, unpadded_logits
from harness.checks.precision import pairs
from harness.checks.training import (
    collected,
    in_training,
    original_gradients,
    port_gradients,
    rows_alone,
    same_spread,
    same_tensors,
)
from harness.checks.weights import said
from harness.errors import Mismatch, Skip
from harness.families import Auxiliary, Decision, RoutedLayer, longest_of
from harness.numerics import FLOAT32_INSIDE_BOUND, SEMANTICS_BOUND, relative_error, require_calibrated
from harness.routing import (
    Seen,
    all_terms,
    combined,
    deciding_as,
    mixture,
    observed,
    routed_layers,
    routing_of,
    watch_layers,
)
from harness.trial import (
    Pair,
    Trial,
    port_logits,
    prepare,
    require_semantics,
    run_original,
    run_port,
    takes,
    worst,
)

COUNTS = (1, 7, 16, 31, 80, 100, 1000)
"""Numbers of tokens at which capacities are compared: one, odd and even, more than any drawn batch has."""

ASIDE = 0.2
"""The largest share of tokens that may be set aside as near ties, in a layer."""


def logits(trial: Trial, case: Case) -> dict[str, float]:
    """The router logits of every routed layer equal the original's, and the same layers have experts.

    What forward gives for output_router_logits, where it takes that, are these. Would have caught: experts in every
    layer where the original has them in every second one, or in the other half; a router that reads its input before
    the norm; probabilities given out as logits.
    """
    pair = prepare(trial, case)
    layers = routed_layers(trial, case)
    ours, theirs = _both(trial, pair, layers)
    numbers = []
    for layer in layers:
        name = layer.layer.name
        actual, expected = ours[name].logits, theirs[name].logits
        if expected is None:
            raise Mismatch(f"the original did not run {layer.logits.original}")
        if actual is None:
            continue
        what = f"router logits of {name}"
        numbers.append(require_semantics(trial, what, actual.cpu(), expected.cpu(), first_divergence=name))
    if not numbers:
        raise Skip(f"the port has no module {layers[0].logits.port} whose output could be read")
    numbers.append(_given_out(trial, pair, layers, theirs))
    return {**worst(*numbers), "layers": float(len(numbers) - 1)}


def _given_out(trial: Trial, pair: Pair, layers: Any, theirs: Mapping[str, Seen]) -> dict[str, float]:
    """Compares the router_logits of a port's output, (tokens, experts) for each routed layer, with the original's."""
    if not takes(pair.port, "output_router_logits"):
        return {}
    found = run_port(trial, pair.port, pair.batch.tokens, output_router_logits=True).get("router_logits")
    given = [value for value in found or () if isinstance(value, torch.Tensor)]
    if len(given) != len(layers):
        raise Mismatch(
            f"output_router_logits=True gives router_logits of {len(given)} layers, expected {len(layers)}, one for"
            " each layer with experts"
        )
    numbers = []
    for layer, actual in zip(layers, given, strict=True):
        expected = theirs[layer.layer.name].logits
        assert expected is not None  # the caller made sure
        actual = actual.detach().cpu().reshape(-1, actual.shape[-1])
        numbers.append(require_semantics(trial, f"router_logits given out of {layer.layer.name}", actual, expected))
    return worst(*numbers)


def choices(trial: Trial, case: Case) -> dict[str, float]:
    """Every token goes to the original's experts, with their weights, and finds room where it does there.

    Read from the outputs of each layer, which are a sum of its experts' outputs: what a port says of its choices
    (indices, ranks, kept slots) is compared besides. In evaluation, and with the capacity of training. Would have
    caught: a softmax over all experts, weights that are shared out again after a drop, queues in the order of tokens
    instead of choices.
    """
    pair = prepare(trial, case)
    layers = routed_layers(trial, case)
    numbers = [_same_choices(trial, case, pair, layers, pair.batch.tokens)]
    numbers.append(_same_choices(trial, case, in_training(pair), layers, pair.batch.tokens))
    return worst(*numbers)


def capacity(trial: Trial, case: Case) -> dict[str, float]:
    """With too little room, experts take as many tokens as the original's do, of 1 token up to 1000.

    Would have caught: a capacity that is rounded up where the original rounds down, odd ones that stay odd, one that is
    bounded, the factor of evaluation in training.
    """
    routing = routing_of(trial)
    case = dataclasses.replace(case, fields=routing.crowded(case.fields))
    pair = prepare(trial, case)
    layers = routed_layers(trial, case)
    maximum = longest_of(trial.family, case.fields)
    numbers = []
    for count in COUNTS:
        width = next(width for width in range(min(maximum, count), 0, -1) if count % width == 0)
        size = {"vocabulary": case.fields[trial.family.vocabulary], "seed": case.seed}
        tokens = draw_batch(rows=count // width, tokens=width, **size).tokens
        for training in (False, True):
            numbers.append(_same_choices(trial, case, in_training(pair, training), layers, tokens))
    return worst(*numbers)


def auxiliary(trial: Trial, case: Case) -> dict[str, float]:
    """Each auxiliary loss alone, in training, is its closed form on the original's router logits; so is its gradient.

    In evaluation it is part of the loss where it is part of the original's. Would have caught: a mean over layers for a
    sum, a balance loss over kept tokens only, one that divides by k, a term that is never added, gradients that are not
    scaled.
    """
    routing = routing_of(trial)
    routed_layers(trial, case)
    if not routing.auxiliary:
        raise Skip(f"family '{trial.family.name}' declares no auxiliary losses")
    numbers = []
    case = at_least_two_tokens(case)
    for term in routing.auxiliary:
        fields = {**case.fields, **routing.quiet, **term.on}
        numbers.append(_one_term(trial, dataclasses.replace(case, fields=fields), term))
    return worst(*numbers)


def _one_term(trial: Trial, case: Case, term: Auxiliary) -> dict[str, float]:
    routing = routing_of(trial)
    pair = prepare(trial, case)
    layers = routed_layers(trial, case)
    labels = port_labels(trial, pair.batch.tokens, pair.batch.targets)
    targets = original_targets(trial, labels)
    numbers = []
    for training in (True, False):
        in_training(pair, training)
        run = functools.partial(trial.family.run_original, pair.original, pair.batch.tokens, targets)
        output, seen = watch_layers(pair.original, layers, "original", run)
        flat = output["logits"].flatten(0, 1), targets.flatten()
        expected = functional.cross_entropy(*flat, ignore_index=trial.family.loss.ignore_index)
        if training or routing.auxiliary_in_evaluation:
            expected = expected + term.closed_form(case.fields, observed(pair.original, layers, seen))
        mode = "training" if training else "evaluation"
        what = f"loss with {term.name} alone, in {mode}"
        actual = training_loss(trial, pair.port, pair.batch.tokens, labels).detach().cpu()
        numbers.append(require_semantics(trial, what, actual, expected.detach()))
        if training:
            expected.backward()
            what = f"gradient with {term.name} alone"
            actual_gradients = port_gradients(trial, pair, labels)
            numbers.append(same_tensors(trial, case, what, actual_gradients, collected(pair.original)))
    return worst(*numbers)


def noise(trial: Trial, case: Case) -> dict[str, float]:
    """Noise in the choice is there when the original's is, and spreads logits as far as the original's.

    In training it follows the original's under one seed, and so do the loss with all its terms and its gradient; or
    else in mean and variance. In evaluation two calls are the same bits where the original's are. Would have caught:
    noise in evaluation, noise that is never there, a standard deviation without its softplus or one that is never
    trained, a term that leaves the noise out.
    """
    routing = routing_of(trial)
    routed_layers(trial, case)
    if not routing.noise:
        raise Skip(f"family '{trial.family.name}' has no noise in its choice")
    independent = trial.family.independent or dict
    fields = {**independent(case.fields), **all_terms(routing), **routing.noise}
    case = dataclasses.replace(case, fields=fields, rows=1, tokens=max(2, min(case.tokens, 6)))
    pair = prepare(trial, case)
    tokens = pair.batch.tokens
    labels = port_labels(trial, tokens, pair.batch.targets)
    targets = original_targets(trial, labels)
    numbers = []
    for training in (False, True):
        in_training(pair, training)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(case.seed)
            theirs = [run_original(trial, pair.original, tokens, targets) for _ in range(2)]
            torch.manual_seed(case.seed)
            ours = [run_port(trial, pair.port, tokens, labels=labels) for _ in range(2)]
            torch.manual_seed(case.seed)
            gradients = original_gradients(trial, pair.original, tokens, targets)
            torch.manual_seed(case.seed)
            actual_gradients = port_gradients(trial, pair, labels)
        (actual, again), (expected, other) = ([each["logits"] for each in pairs] for pairs in (ours, theirs))
        what = f"with {_listed(routing.noise)}"
        if torch.equal(expected, other):
            if not torch.equal(actual, again):
                mode = "training" if training else "evaluation"
                raise Mismatch(f"two calls in {mode} differ {what}, the original's are equal")
            numbers.append(require_semantics(trial, f"logits {what}", actual, expected))
        elif not relative_error(actual, expected) < SEMANTICS_BOUND:
            numbers.append(same_spread(trial, pair, what))
            continue
        numbers.append(require_semantics(trial, f"loss {what}", ours[0]["loss"], theirs[0]["loss"]))
        numbers.append(same_tensors(trial, case, f"gradient {what}", actual_gradients, gradients))
    return worst({}, *numbers)


def _listed(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in fields.items())


def variance(trial: Trial, case: Case) -> dict[str, float]:
    """Where room is short a token depends on others; the port's logits do by just as much as the original's.

    Given are the first half of each row, each row alone, the rows in another order, and rows with another last token.
    The numbers say by how much the original's own logits change: that is expected, and no failure. Would have caught:
    capacity counted over other tokens than the original's.
    """
    case = dataclasses.replace(at_least_two_tokens(case), rows=max(case.rows, 2))
    if longest_of(trial.family, case.fields) < 2:
        raise Skip("one position has no order")
    routed_layers(trial, case)
    pair = prepare(trial, case)
    tokens = pair.batch.tokens
    whole = run_original(trial, pair.original, tokens, torch.zeros_like(tokens))["logits"]
    half = tokens.shape[1] // 2
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % case.fields[trial.family.vocabulary]
    ways = {
        "the first half": ([tokens[:, :half]], whole[:, :half]),
        "rows alone": ([tokens[row : row + 1] for row in range(len(tokens))], whole),
        "rows in another order": ([tokens.flip(0)], whole.flip(0)),
        "another last token": ([other], whole),
    }
    numbers, changes = [], {}
    for name, (batches, before) in ways.items():
        expected = [run_original(trial, pair.original, each, torch.zeros_like(each))["logits"] for each in batches]
        actual = [port_logits(trial, pair.port, each) for each in batches]
        numbers.append(require_semantics(trial, f"logits of {name}", torch.cat(actual), torch.cat(expected)))
        length = before.shape[1] - 1 if name == "another last token" else before.shape[1]
        changes[name] = float((torch.cat(expected) - before)[:, :length].abs().max())
    return {**worst(*numbers), **{f"variance: {name}": change for name, change in changes.items()}}


def padding(trial: Trial, case: Case) -> dict[str, float]:
    """Padding takes no room from real tokens: a padded row gets the logits that the original gives it alone.

    In training, with all auxiliary losses, it gets that row's gradient too. Several rows with too little room go where
    the original's layer sends their tokens in one row without the padding. Would have caught: pads that are routed, or
    counted in what the capacity is computed from, in training alone too; a capacity from the longest row; an auxiliary
    loss that is a mean over pads as well.
    """
    case = dataclasses.replace(at_least_two_tokens(case), rows=1)
    layers = routed_layers(trial, case)
    pair = prepare(trial, case)
    numbers = []
    for side in ("right", "left"):
        padded = padded_batch(trial, case, pair, side)
        actual = port_logits(trial, pair.port, padded.tokens, attention_mask=padded.mask.long())[padded.mask]
        expected = unpadded_logits(trial, pair.original, padded)
        what = f"logits of a {side}-padded row against the row alone"
        numbers.append(require_semantics(trial, what, actual, expected))
    routing = routing_of(trial)
    together = dataclasses.replace(case, fields=routing.crowded(case.fields), rows=3)
    pair = prepare(trial, together)
    padded = padded_batch(trial, together, pair, "left")
    for training in (False, True):
        way = in_training(pair, training)
        numbers.append(_same_choices(trial, together, way, layers, padded.tokens, padded.mask))
    if "loss" in trial.family.features:
        numbers.append(_padded_gradient(trial, dataclasses.replace(case, fields={**case.fields, **all_terms(routing)})))
    return worst(*numbers)


def _padded_gradient(trial: Trial, case: Case) -> dict[str, float]:
    """Compares the gradient of one padded row, in training, with the original's of the row alone."""
    pair = in_training(prepare(trial, case))
    padded = padded_batch(trial, case, pair, "left")
    labels, expected = rows_alone(trial, pair, padded)
    given = dataclasses.replace(pair, batch=dataclasses.replace(pair.batch, tokens=padded.tokens))
    actual = port_gradients(trial, given, labels, attention_mask=padded.mask.long())
    what = "gradient of a left-padded row with all auxiliary losses, against the row alone"
    return same_tensors(trial, case, what, actual, expected)


def generation(trial: Trial, case: Case) -> dict[str, float]:
    """Without a cache generation equals the original's where room is short too; by default it does so, or warns.

    With a cache tokens compete with the new ones alone: a port that has one by default says so. Would have caught: a
    capacity from the prompt that is kept for all steps, a cache that silently changes the tokens.
    """
    routed_layers(trial, case)
    pair, prompt, count = prompted(trial, case)
    numbers = continues(trial, pair, prompt, min(count, 8), use_cache=False)
    with said() as messages:
        try:
            return worst(numbers, continues(trial, pair, prompt, min(count, 8)))
        except Mismatch as error:
            if any("cache" in message for message in messages):
                return {**numbers, "variance: a cache by default": 1.0}
            raise Mismatch(
                f"{error}; with use_cache=False they are the original's: where an expert can be full, a cache is for"
                " those who ask for it, or comes with a warning that names it",
                metrics=error.metrics,
                tensors=error.tensors,
            ) from error


def purity(trial: Trial, case: Case) -> dict[str, float]:
    """In training, with all auxiliary losses, loss and gradients are the same bits whatever was called in between.

    That is: calls without labels, calls of a second model, generation, a call in evaluation. Would have caught: losses
    that are collected in a module-global list, of which the next labelled call takes all.
    """
    routing = routing_of(trial)
    routed_layers(trial, case)
    case = dataclasses.replace(at_least_two_tokens(case), fields={**case.fields, **all_terms(routing)})
    pair = prepare(trial, case)
    tokens = pair.batch.tokens
    labels = port_labels(trial, tokens, pair.batch.targets)
    other = prepare(trial, dataclasses.replace(case, seed=case.seed + 1))
    other.port.train()
    pair.port.train()
    loss, gradients = loss_of(trial, pair, labels), port_gradients(trial, pair, labels)
    for what, call in _interludes(trial, pair, other, labels).items():
        call()
        pair.port.train()
        now = loss_of(trial, pair, labels)
        if not torch.equal(loss, now):
            raise Mismatch(f"the loss in training was {float(loss):.9g} and is {float(now):.9g} after {what}")
        call()
        pair.port.train()
        for key, gradient in port_gradients(trial, pair, labels).items():
            if not torch.equal(gradient, gradients[key]):
                raise Mismatch(f"the gradient of {key} is another one after {what}")
    return {}


def _interludes(trial: Trial, pair: Pair, other: Pair, labels: torch.Tensor) -> dict[str, Callable[[], object]]:
    """What may happen between two labelled calls of a model in training, in words."""
    tokens = pair.batch.tokens
    model: Any = pair.port
    prompt = tokens[:, :1].to(next(model.parameters()).device)
    calls: dict[str, Callable[[], object]] = {
        "a call without labels": lambda: port_logits(trial, model, tokens),
        "a call of another model": lambda: loss_of(trial, other, labels),
        "a call of another model without labels": lambda: port_logits(trial, other.port, tokens),
        "a call in evaluation": lambda: port_logits(trial, model.eval(), tokens),
    }
    if hasattr(model, "generate") and "generation" in trial.family.features:
        calls["generate()"] = lambda: model.generate(prompt, max_new_tokens=2, do_sample=False)
    return calls


def precision(trial: Trial, case: Case) -> dict[str, float]:
    """At this dtype logits err no more than the original's there; near ties are set aside, and few.

    Two experts that are as good as tied change places by a rounding, and with them whole outputs. So the oracle decides
    such a token as the run does that it judges. Would have caught: router logits or weights in a narrower dtype than
    the original's.
    """
    layers = routed_layers(trial, case)
    pair, oracle = pairs(trial, case)
    tokens, targets = pair.batch.tokens, pair.batch.targets

    def native() -> torch.Tensor:
        with pytorch.autocast(trial.backend, trial.dtype):
            return run_original(trial, pair.original, tokens, targets)["logits"]

    actual, ours = watch_layers(pair.port, layers, "port", lambda: port_logits(trial, pair.port, tokens))
    baseline, theirs = watch_layers(pair.original, layers, "original", native)
    if not (bool(baseline.isfinite().all()) and bool(actual.isfinite().all())):
        raise Skip(f"logits are not finite in {trial.dtype}, which precision.logits judges")
    expected, aside = _decided(trial, case, oracle, layers, ours, tokens, targets)
    same, native_aside = _decided(trial, case, oracle, layers, theirs, tokens, targets)
    share = aside / (tokens.numel() * len(layers))
    allowed = max(ASIDE, 2 * native_aside / (tokens.numel() * len(layers)))
    if share > allowed:
        raise Mismatch(
            f"{aside} of {tokens.numel() * len(layers)} choices are near ties that fall otherwise in {trial.dtype},"
            f" of the original's {native_aside}",
            metrics={"aside": share},
        )
    # The two runs may have decided otherwise: each is judged by the oracle that decided as it did.
    measure = expected + (baseline.double() - same)
    numbers = require_calibrated("logits", actual, measure, expected, epsilon=pytorch.epsilon(trial.dtype))
    return {**numbers, "aside": share}


def _decided(
    trial: Trial,
    case: Case,
    oracle: torch.nn.Module,
    layers: Any,
    seen: Mapping[str, Seen],
    tokens: torch.Tensor,
    targets: torch.Tensor,
) -> tuple[torch.Tensor, int]:
    """The oracle's logits where it decides near ties as the logits seen in another run do, and how many it did."""
    known = {name: there.logits.cpu() for name, there in seen.items() if there.logits is not None}
    if len(known) != len(layers):
        raise Skip(f"the port has no module {layers[0].logits.port} whose output could be read")
    k = routing_of(trial).decide(next(iter(known.values())), case.fields, False).indices.shape[1]
    with deciding_as(oracle, layers, known, epsilon=pytorch.epsilon(trial.dtype), k=k) as aside:
        found = run_original(trial, oracle, tokens, targets)["logits"]
    return found, sum(aside)


def _both(trial: Trial, pair: Pair, layers: Any) -> tuple[dict[str, Seen], dict[str, Seen]]:
    tokens, targets = pair.batch.tokens, pair.batch.targets
    _, theirs = watch_layers(
        pair.original, layers, "original", lambda: run_original(trial, pair.original, tokens, targets)
    )
    _, ours = watch_layers(pair.port, layers, "port", lambda: port_logits(trial, pair.port, tokens))
    return ours, theirs


def _same_choices(
    trial: Trial, case: Case, pair: Pair, layers: Any, tokens: torch.Tensor, mask: torch.Tensor | None = None
) -> dict[str, float]:
    """Compares, layer by layer, on what the port's layer was given, where its tokens went.

    mask: bool (rows, tokens), false for padding, which the original is not given.
    """
    options = {} if mask is None else {"attention_mask": mask.long()}
    _, ours = watch_layers(pair.port, layers, "port", lambda: port_logits(trial, pair.port, tokens, **options))
    numbers = []
    for layer in layers:
        seen = ours[layer.layer.name]
        if seen.inputs is None or seen.outputs is None:
            continue
        given = tokens
        if mask is not None:
            real = mask.flatten()
            # What a router says of padding is its own affair.
            seen = Seen(inputs=seen.inputs.cpu()[real], outputs=seen.outputs.cpu()[real])
            given = tokens[mask][None]
        numbers.append(_same_in_layer(trial, case, pair, layer, seen, given))
    if not numbers:
        raise Skip(f"the port has no module {layers[0].layer.port} that it runs")
    return worst(*numbers)


def _same_in_layer(
    trial: Trial, case: Case, pair: Pair, layer: RoutedLayer, seen: Seen, tokens: torch.Tensor
) -> dict[str, float]:
    routing, training = routing_of(trial), pair.original.training
    assert seen.inputs is not None and seen.outputs is not None  # the caller made sure
    module = pair.original.get_submodule(layer.layer.original)
    inputs = seen.inputs.detach().cpu().double()
    shaped = inputs.reshape(*tokens.shape, -1)
    with torch.no_grad():
        _, natively = watch_layers(pair.original, [layer], "original", lambda: module(shaped))
        scores = natively[layer.layer.name].logits
        if scores is None:
            raise Mismatch(f"the original did not run {layer.logits.original}")
        decision = routing.decide(scores, case.fields, training)
        found = mixture(seen.outputs.cpu(), routing.expert_outputs(module, inputs))
    expected = combined(decision, scores.shape[-1]).double()
    numbers = _exposed(layer, routing.exposed(seen.router), decision)
    where = f"{layer.layer.name}, {'training' if training else 'evaluation'}, {tokens.numel()} tokens"
    bound = FLOAT32_INSIDE_BOUND
    if bool((found.rest[found.told] > bound).any()):
        token = int(found.rest.where(found.told, 0.0).argmax())
        raise Mismatch(
            f"{where}: what token {_place(token, tokens)} gets is no mixture of the experts' outputs"
            f" ({float(found.rest[token]):.1e} of it is something else): an expert computes something else",
            metrics={"error": float(found.rest[token])},
            first_divergence=layer.layer.name,
        )
    differs = ((found.weights - expected).abs() > bound).any(dim=-1) & found.told
    if bool(differs.any()):
        token = int(differs.nonzero()[0])
        size = routing.capacity(case.fields, tokens.numel(), training)
        raise Mismatch(
            f"{where}: {_in_words(token, tokens, found.weights[token], expected[token], decision, size)}",
            metrics={"tokens": float(differs.sum())},
            tensors={"actual": found.weights, "expected": expected},
            first_divergence=layer.layer.name,
        )
    dropped = float((~decision.keep).double().mean())
    return {**numbers, "dropped": dropped, "untold": float((~found.told).double().mean())}


def _exposed(layer: RoutedLayer, said: Mapping[str, torch.Tensor] | None, decision: Decision) -> dict[str, float]:
    """Compares what a port's router says of its choice; where a slot has no room its rank alone is compared."""
    for name, value in (said or {}).items():
        expected = getattr(decision, name)
        actual = value.detach().cpu().reshape(expected.shape)
        if name == "weights":
            actual, same = actual.double(), FLOAT32_INSIDE_BOUND
            wrong = ((actual - decision.weights).abs() > same) & decision.keep
        else:
            wrong = actual != expected
        if bool(wrong.any()):
            token, choice = wrong.nonzero()[0].tolist()
            raise Mismatch(
                f"{layer.router.name} says {name} {actual[token, choice].item()} of token {token}, choice {choice};"
                f" the original has {expected[token, choice].item()}",
                first_divergence=layer.layer.name,
            )
    return {"exposed": float(len(said or {}))}


def _place(token: int, tokens: torch.Tensor) -> str:
    row, position = divmod(token, tokens.shape[1])
    return f"{token} (row {row}, position {position})"


def _in_words(
    token: int, tokens: torch.Tensor, actual: torch.Tensor, expected: torch.Tensor, decision: Decision, size: int
) -> str:
    """What became of a token, and what of the original's."""
    slots = []
    for expert, rank, keep in zip(
        decision.indices[token].tolist(), decision.ranks[token].tolist(), decision.keep[token].tolist(), strict=True
    ):
        room = "" if keep else f", where it is number {rank + 1} and {size} have room"
        slots.append(f"{expert}{room}")
    ours = _mixture_in_words(actual)
    theirs = _mixture_in_words(expected)
    chosen = " and ".join(slots)
    return f"token {_place(token, tokens)} gets {ours}, expected {theirs}; it chooses expert {chosen}"


def _mixture_in_words(weights: torch.Tensor) -> str:
    parts = [f"{float(w):.4g} of expert {expert}" for expert, w in enumerate(weights) if abs(float(w)) > 1e-6]
    return " + ".join(parts) or "nothing"
