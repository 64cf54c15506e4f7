# SPDX-License-Identifier: Apache-2.0
"""Checks of the forward pass: the port computes what the original computes, everywhere it can be asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from harness import localise
from harness.cases import Case, large_cases
from harness.checks.loss import at_least_two_tokens, original_targets, port_labels
from harness.checks.masks import padded_batch
from harness.errors import Mismatch, Skip
from harness.families import first_position_of, has_relative_positions, longest_of, padding_of, with_dropout
from harness.layout import layout_of
from harness.ports import first_line
from harness.routes import carry, logits_by
from harness.trial import (
    Pair,
    Trial,
    call_port,
    content_tokens,
    copied,
    draw,
    each_attention,
    is_asked,
    original_model,
    outputs_of,
    place,
    port_logits,
    prepare,
    require_semantics,
    run_original,
    run_port,
    takes,
    worst,
)

SMALL_SCALE, LARGE_SCALE = 1e-3, 10.0

OUTSIDE = 1_000_003
"""A number of no row, in any table of token types."""


def logits(trial: Trial, case: Case) -> dict[str, float]:
    """Logits at all positions equal the original's, by every route the weights can take.

    Would have caught: the missing 1/sqrt(d) of an existing port (off by 3.5), its tanh GELU (2e-3), a wrong epsilon.
    """
    original, batch = original_model(trial, case), draw(trial, case)
    expected = run_original(trial, original, batch.tokens, batch.targets)["logits"]
    actual = logits_by(trial, case, original, batch.tokens)
    try:
        return require_semantics(
            trial,
            "logits",
            actual,
            expected,
            baseline=lambda: _baseline(trial, case, batch.tokens, batch.targets),
        )
    except Mismatch:
        if trial.route == "direct" and trial.port.loader != "state_dict":
            layout = layout_of(trial, case)
            if layout is not None and not layout.is_plain(trial):
                raise Skip(
                    f"the port's loader arranges tensors anew; names alone do not bring them ({trial.port.load})"
                ) from None
        raise


def blocks(trial: Trial, case: Case) -> dict[str, float]:
    """The output of the embedding, of each block and of the last norm equal the original's, in the order data passes.

    Would have caught: two faults that cancel in the logits, and names the first module where any fault appears.
    """
    pair = prepare(trial, case)
    found = localise.compare_taps(trial, case, pair)
    if not found:
        raise Skip("none of the family's taps is a module that the port runs")
    numbers = []
    for tap, actual, expected in found:
        what = f"output of {tap}"
        numbers.append(require_semantics(trial, what, actual, expected, first_divergence=tap))
    return {**worst(*numbers), "taps": float(len(found))}


def outputs(trial: Trial, case: Case) -> dict[str, float]:
    """What the original gives beside its main output, such as that of a pooler, is the port's too.

    Would have caught: a pooler without its activation, or over another token than the first.
    """
    pair = prepare(trial, case)
    expected = run_original(trial, pair.original, pair.batch.tokens)
    actual = run_port(trial, pair.port, pair.batch.tokens)
    names = [name for name in expected if name not in ("logits", "loss")]
    if not names:
        raise Skip("the original gives nothing else in this configuration")
    numbers = []
    for name in names:
        if actual.get(name) is None:
            raise Mismatch(f"forward gives no {name}, which the original does")
        baseline = lambda name=name: run_original(  # noqa: E731
            trial, original_model(trial, case, dtype=trial.dtype), pair.batch.tokens
        )[name]
        numbers.append(require_semantics(trial, name, actual[name], expected[name], baseline=baseline))
    return worst(*numbers)


def further_inputs(trial: Trial, case: Case) -> dict[str, float]:
    """What the original's forward takes beside tokens, such as token types, means the same to the port.

    Beside position_ids too. Would have caught: token types that are ignored, or added behind the norm.
    """
    fields, run = case.fields, trial.family.run_further
    assert run is not None  # the check needs further_inputs
    pair = prepare(trial, case)
    tokens = pair.batch.tokens
    made = {name: make(fields, tokens, case.seed) for name, make in trial.family.further_inputs.items()}
    given = {name: value for name, value in made.items() if value is not None}
    if not given:
        raise Skip("this configuration takes tokens alone")
    with torch.no_grad():
        expected = run(pair.original, tokens, given)["logits"]
        baseline = lambda: run(original_model(trial, case, dtype=trial.dtype), tokens, given)["logits"]  # noqa: E731
        actual = port_logits(trial, pair.port, tokens, **given)
        what = f"logits with {', '.join(given)}"
        found = require_semantics(trial, what, actual, expected, baseline=baseline)
        told = "learned_positions" in trial.family.features and takes(pair.port, "position_ids")
        if not told or padding_of(trial.family, fields) is not None:
            return found
        positions = torch.arange(tokens.shape[1]).expand_as(tokens) + first_position_of(trial.family, fields)
        beside = port_logits(trial, pair.port, tokens, position_ids=positions, **given)
        return worst(found, require_semantics(trial, f"{what} beside position_ids", beside, actual))


def outside_vocabulary(trial: Trial, case: Case) -> dict[str, float]:
    """A token id that the model has no row for, too large or negative, ends in an error.

    So does such a number in a further input, such as token types, where the original refuses it. Would have caught: a
    gather that does not look, which reads the memory behind its table.
    """
    pair = prepare(trial, case)
    for wrong in (case.fields[trial.family.vocabulary], -1):
        tokens = pair.batch.tokens.clone()
        tokens[-1, -1] = wrong
        try:
            port_logits(trial, pair.port, tokens)
        except (IndexError, ValueError, RuntimeError):
            continue
        rows = case.fields[trial.family.vocabulary]
        raise Mismatch(f"token id {wrong} is accepted by a model with {rows} rows; expected an error that names it")
    for name, make in trial.family.further_inputs.items():
        value = make(case.fields, pair.batch.tokens, case.seed)
        if value is not None and not value.is_floating_point():
            _refuses_outside(trial, pair, name, value)
    return {}


def _refuses_outside(trial: Trial, pair: Pair, name: str, value: torch.Tensor) -> None:
    """Raises Mismatch for a number of a further input that the original refuses and the port takes."""
    run = trial.family.run_further
    assert run is not None  # who has further inputs has what runs them
    for wrong in (OUTSIDE, -1):
        given = value.clone()
        given[..., -1] = wrong
        try:
            run(pair.original, pair.batch.tokens, {name: given})
        except (IndexError, ValueError, RuntimeError):
            pass
        else:
            continue
        try:
            port_logits(trial, pair.port, pair.batch.tokens, **{name: given})
        except (IndexError, ValueError, RuntimeError):
            continue
        raise Mismatch(f"{wrong} in {name} is accepted, which the original refuses; expected an error that names it")


def lengths(trial: Trial, case: Case) -> dict[str, float]:
    """One token, and exactly the maximum number of tokens, give the original's logits.

    Would have caught: position tables one row short or shifted by one, masks built for a length less one.
    """
    maximum = longest_of(trial.family, case.fields)
    pair = prepare(trial, case)
    numbers = []
    for tokens in (1, maximum):
        batch = draw(trial, dataclasses.replace(case, tokens=tokens))
        numbers.append(_same_logits(trial, case, pair, batch.tokens, batch.targets, f"logits of {tokens} tokens"))
    return worst(*numbers)


def large(trial: Trial, case: Case) -> dict[str, float]:
    """Logits and loss of the family's large models equal the original's, with a mask of ones too.

    Would have caught: a name pattern that knows layers of one digit, a head size that is capped, positions counted in
    float16, token ids kept in 16 bits, a loss over the first 256 tokens.
    """
    sizes = list(large_cases(trial.family, case))
    if not sizes:
        raise Skip(f"family '{trial.family.name}' declares no large sizes")
    numbers = []
    for size, big in sizes:
        pair = prepare(trial, big)
        tokens, targets, options = pair.batch.tokens, pair.batch.targets, {}
        if is_asked(trial, "loss", "loss.value"):
            options = {"labels": port_labels(trial, tokens, targets)}
            targets = original_targets(trial, options["labels"])
        expected = run_original(trial, pair.original, tokens, targets)
        for attention in each_attention(pair.port):
            actual = run_port(trial, pair.port, tokens, **options)
            for name in expected if options else ("logits",):
                if actual.get(name) is not None:  # a loss that is not there is the finding of loss.value
                    what = f"{name} of {tokens.shape[1]} tokens ({size}, attention: {attention})"
                    numbers.append(require_semantics(trial, what, actual[name], expected[name]))
        if is_asked(trial, "masks", "masks.none_is_ones"):
            actual = run_port(trial, pair.port, tokens, attention_mask=torch.ones_like(tokens))
            what = f"logits of {tokens.shape[1]} tokens with a mask of ones ({size})"
            numbers.append(require_semantics(trial, what, actual["logits"], expected["logits"]))
    return worst(*numbers)


def beyond_maximum(trial: Trial, case: Case) -> dict[str, float]:
    """One token more than the position table has is refused with a ValueError that names the maximum.

    So is the one that a cache leaves no place for, and a position the table does not have. Where only distances of
    positions matter there is no such end: the original's logits go on. Would have caught: an IndexError from the table
    (on CUDA a device-side assertion that ends the process), and positions that wrap around and give finite, wrong
    logits; a table of rotations that does not grow.
    """
    maximum = longest_of(trial.family, case.fields)
    if has_relative_positions(trial.family, case.fields):
        pair = prepare(trial, case)
        batches = [draw(trial, dataclasses.replace(case, tokens=maximum + more)) for more in (8, 1, 0)]
        return worst(
            *(
                _same_logits(trial, case, pair, b.tokens, b.targets, f"logits of {b.tokens.shape[1]} tokens")
                for b in batches
            )
        )
    last = maximum - 1 + first_position_of(trial.family, case.fields)
    port = place(trial, carry(trial, case, original_model(trial, case)))
    tokens = content_tokens(trial, case, draw(trial, dataclasses.replace(case, tokens=maximum + 1)).tokens)
    _refused(maximum, f"{maximum + 1} tokens", lambda: port_logits(trial, port, tokens))
    if takes(port, "position_ids"):
        try:
            port_logits(trial, port, tokens[:1, :1], position_ids=torch.tensor([[last + 1]]))
        except (ValueError, AssertionError, IndexError):
            pass
        else:
            raise Mismatch(f"position {last + 1} is accepted, the position table ends at {last}")
    if takes(port, "past_key_values") and "generation" in trial.family.features:
        with torch.no_grad():
            cached = getattr(call_port(trial, port, tokens[:, :-1], use_cache=True), "past_key_values", None)
        if cached is not None:
            more = lambda: port_logits(trial, port, tokens[:, -1:], past_key_values=cached, use_cache=True)  # noqa: E731
            _refused(maximum, f"a token behind a cache of {maximum}", more)
    return {}


def _refused(maximum: int, what: str, call: Callable[[], object]) -> None:
    try:
        call()
    except (ValueError, AssertionError) as error:
        if str(maximum) not in str(error):
            raise Mismatch(f"{what}: refused without naming the maximum {maximum}: {first_line(error)}") from None
        return
    except Mismatch:
        raise
    except Exception as error:  # whatever else it raises is the finding
        kind = f"{type(error).__name__}: {first_line(error)}"
        raise Mismatch(f"{what}: ends in {kind}; expected a ValueError that names the maximum {maximum}") from None
    raise Mismatch(f"{what}: accepted, where the position table ends at {maximum}; expected a ValueError")


def small_scale(trial: Trial, case: Case) -> dict[str, float]:
    """With embeddings a thousand times smaller, where a norm's epsilon outweighs the variance, logits still agree.

    Would have caught: epsilon 1e-6 for 1e-5, epsilon outside the root, an epsilon read from a field nobody set.
    """
    return _scaled(trial, case, SMALL_SCALE)


def large_scale(trial: Trial, case: Case) -> dict[str, float]:
    """With embeddings ten times larger, and logits with them, logits and loss still agree.

    Would have caught: logits that are clipped before the loss, activations that are kept within half precision.
    """
    return _scaled(trial, case, LARGE_SCALE)


def _scaled(trial: Trial, case: Case, scale: float) -> dict[str, float]:
    case = at_least_two_tokens(case)
    original = original_model(trial, case)
    with torch.no_grad():
        for module in original.modules():
            if isinstance(module, torch.nn.Embedding):
                module.weight.copy_((module.weight * scale).float())
    batch = draw(trial, case)
    port = place(trial, carry(trial, case, original))
    baseline = copied(original).to(next(port.parameters()).dtype)
    options = {}
    targets = batch.targets
    if is_asked(trial, "loss", "loss.value"):
        options = {"labels": port_labels(trial, batch.tokens, batch.targets)}
        targets = original_targets(trial, options["labels"])
    actual = run_port(trial, port, batch.tokens, **options)
    expected = run_original(trial, original, batch.tokens, targets)
    kind = "small" if scale < 1 else "large"
    return worst(
        *(
            require_semantics(
                trial,
                f"{name} of {kind}-scale input",
                actual[name],
                expected[name],
                baseline=lambda name=name: run_original(trial, baseline, batch.tokens, targets)[name],  # type: ignore[misc]
            )
            for name in ("logits", *(["loss"] if options else []))
            if actual.get(name) is not None
        )
    )


def rows_independent(trial: Trial, case: Case) -> dict[str, float]:
    """A row of a batch gets the logits it gets alone, and rows in another order get theirs in that order.

    Would have caught: statistics over the batch, masks or positions of the first row used for all.
    """
    pair = prepare(trial, dataclasses.replace(case, rows=3))
    tokens = pair.batch.tokens
    together = port_logits(trial, pair.port, tokens)
    alone = torch.cat([port_logits(trial, pair.port, tokens[row : row + 1]) for row in range(3)])
    order = torch.tensor([2, 0, 1])
    reordered = port_logits(trial, pair.port, tokens[order])
    return worst(
        require_semantics(trial, "logits of a batch against its rows alone", together, alone),
        require_semantics(trial, "logits of a batch with its rows in another order", reordered, together[order]),
    )


def causal(trial: Trial, case: Case) -> dict[str, float]:
    """A token changes its own and later logits, and none before it.

    Would have caught: a bidirectional mask, a mask shifted by one, a diagonal left out.
    """
    tokens_count = max(case.tokens, 2) if longest_of(trial.family, case.fields) > 1 else 0
    if not tokens_count:
        raise Skip("one position has no order")
    pair = prepare(trial, dataclasses.replace(case, tokens=tokens_count))
    tokens = pair.batch.tokens
    before = port_logits(trial, pair.port, tokens)
    place_changed = case.seed % tokens_count
    changed = tokens.clone()
    changed[:, place_changed] = (changed[:, place_changed] + 1) % case.fields[trial.family.vocabulary]
    after = port_logits(trial, pair.port, changed)
    numbers: dict[str, float] = {}
    if place_changed:
        what = f"logits before position {place_changed}, whose token changed"
        numbers = require_semantics(trial, what, after[:, :place_changed], before[:, :place_changed])
    same = (after[:, place_changed:] == before[:, place_changed:]).all(dim=-1)
    if bool(same.all()):
        raise Mismatch(f"the token at position {place_changed} changes no logits from there on")
    return numbers


def deterministic(trial: Trial, case: Case) -> dict[str, float]:
    """In evaluation mode two calls give the same bits, with dropout probability above zero in the configuration.

    Would have caught: dropout through the functional form without `training`, noise that is added in evaluation.
    """
    pair = prepare(trial, dataclasses.replace(case, fields=with_dropout(trial.family, case.fields, 0.5)))
    for attention in each_attention(pair.port):
        first, second = (port_logits(trial, pair.port, pair.batch.tokens) for _ in range(2))
        if not torch.equal(first, second):
            raise Mismatch(
                f"two calls in evaluation mode differ (attention: {attention})",
                tensors={"actual": second, "expected": first},
            )
    return _same_logits(trial, case, pair, pair.batch.tokens, pair.batch.targets, "logits with dropout configured")


def inputs_embeds(trial: Trial, case: Case) -> dict[str, float]:
    """Token embeddings given as `inputs_embeds` are the same input as the token ids, behind padding too.

    Would have caught: positions, scaling or dropout that are applied on one of the two paths only, positions that count
    the padding of embeddings.
    """
    pair = prepare(trial, case)
    tokens = content_tokens(trial, case, pair.batch.tokens)
    embeds = embedded(trial, pair.port, pair.original, tokens)
    if embeds is None:
        raise Skip("the port takes no inputs_embeds, or neither model shows a table (get_input_embeddings)")
    expected = port_logits(trial, pair.port, tokens)
    embeds.requires_grad_()
    actual = outputs_of(trial, call_port(trial, pair.port, None, inputs_embeds=embeds))["logits"]
    (gradient,) = torch.autograd.grad(actual.sum(), embeds, allow_unused=True) if actual.requires_grad else (None,)
    if gradient is None:
        raise Mismatch("no gradient reaches inputs_embeds, so that a prompt cannot be tuned")
    numbers = require_semantics(trial, "logits from inputs_embeds", actual.detach(), expected)
    return worst(
        numbers,
        _embeds_behind_padding(trial, case, pair),
        _embeds_behind_a_cache(trial, pair, embeds.detach(), expected),
    )


def embedded(trial: Trial, port: Any, original: Any, tokens: torch.Tensor) -> torch.Tensor | None:
    """The port's embeddings of tokens, in its dtype; by the original's table where its library has no such door.

    None where there is nothing to ask: the port takes no `inputs_embeds`, or no table is shown.
    """
    shows = port if trial.family.framework == "transformers" else original
    if shows is original and not (takes(port, "inputs_embeds") and hasattr(original, "get_input_embeddings")):
        return None
    table = shows.get_input_embeddings()
    found: torch.Tensor = table(tokens.to(table.weight.device)).detach()
    return found.to(next(port.parameters()).dtype)


def _embeds_behind_padding(trial: Trial, case: Case, pair: Pair) -> dict[str, float]:
    if not (is_asked(trial, "masks", "masks.left_padding") and takes(pair.port, "attention_mask")):
        return {}
    if padding_of(trial.family, case.fields) is not None and not trial.family.positions_by_mask:
        return {}  # what tells padding by its id alone sees none here
    padded = padded_batch(trial, case, pair, "left")
    tokens = torch.where(padded.mask, content_tokens(trial, case, padded.tokens), padded.tokens)
    embeds = embedded(trial, pair.port, pair.original, tokens)
    mask = padded.mask.long()
    expected = port_logits(trial, pair.port, tokens, attention_mask=mask)
    with torch.no_grad():
        output = call_port(trial, pair.port, None, inputs_embeds=embeds, attention_mask=mask)
    actual = outputs_of(trial, output)["logits"]
    what = "logits from inputs_embeds of left-padded rows"
    return require_semantics(trial, what, actual[padded.mask], expected[padded.mask])


def _embeds_behind_a_cache(trial: Trial, pair: Pair, embeds: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    if not is_asked(trial, "generation", "generation.cache") or embeds.shape[1] < 2:
        return {}
    half = embeds.shape[1] // 2
    with torch.no_grad():
        cached = call_port(trial, pair.port, None, inputs_embeds=embeds[:, :half], use_cache=True).past_key_values
        output = call_port(trial, pair.port, None, inputs_embeds=embeds[:, half:], past_key_values=cached)
    what = f"logits from inputs_embeds behind a cache of {half}"
    return require_semantics(trial, what, outputs_of(trial, output)["logits"], expected[:, half:])


def position_ids(trial: Trial, case: Case) -> dict[str, float]:
    """`position_ids` are the rows of the position table that are used, and the default counts from zero.

    They count beside a mask too, and each row has its own. The oracle for shifted positions is the original with its
    table rolled. Where only distances matter a shift changes nothing, wherever it leads, and a gap is the original's
    with tokens masked there.
    Would have caught: position_ids accepted and ignored, or overruled by a mask; those of the first row used for all;
    positions that start at one; an IndexError of a table of rotations.
    """
    if has_relative_positions(trial.family, case.fields):
        return _relative_position_ids(trial, case)
    maximum, start = longest_of(trial.family, case.fields), first_position_of(trial.family, case.fields)
    pair = prepare(trial, dataclasses.replace(case, rows=max(case.rows, 2)))
    tokens = content_tokens(trial, case, pair.batch.tokens)
    shift = 1 + case.seed % max(maximum - tokens.shape[1], 1)
    if shift + tokens.shape[1] > maximum:
        shift = 0
    ids = torch.arange(tokens.shape[1]).expand_as(tokens) + start + shift
    rolled = copied(pair.original)
    tables = [
        module
        for module in rolled.modules()
        if isinstance(module, torch.nn.Embedding) and module.num_embeddings == maximum + start
    ]
    if len(tables) != 1 and shift:
        raise Skip("the original's position table cannot be told from its other embeddings in this configuration")
    if shift:
        with torch.no_grad():
            tables[0].weight.copy_(tables[0].weight.roll(-shift, dims=0))
    expected = run_original(trial, rolled, tokens, pair.batch.targets)["logits"]
    numbers = []
    for what, given, mask in (
        ("", ids, None),
        (" for all rows", ids[:1], None),
        (" and a mask of ones", ids, torch.ones_like(tokens)),
    ):
        if mask is not None and not ("masks" in trial.family.features and takes(pair.port, "attention_mask")):
            continue
        actual = port_logits(trial, pair.port, tokens, position_ids=given, attention_mask=mask)
        what = f"logits with position_ids from {start + shift}{what}"
        numbers.append(require_semantics(trial, what, actual, expected))
    ids[1:] -= shift
    expected[1:] = run_original(trial, pair.original, tokens, pair.batch.targets)["logits"][1:]
    actual = port_logits(trial, pair.port, tokens, position_ids=ids)
    numbers.append(require_semantics(trial, "logits with position_ids of its own for a row", actual, expected))
    return worst(*numbers)


def _relative_position_ids(trial: Trial, case: Case) -> dict[str, float]:
    pair = prepare(trial, dataclasses.replace(at_least_two_tokens(case), rows=max(case.rows, 2)))
    tokens = pair.batch.tokens
    count, maximum = tokens.shape[1], longest_of(trial.family, case.fields)
    plain = run_original(trial, pair.original, tokens, pair.batch.targets)["logits"]
    numbers = []
    for shift in (1, maximum + 3):
        actual = port_logits(trial, pair.port, tokens, position_ids=torch.arange(count).expand_as(tokens) + shift)
        numbers.append(require_semantics(trial, f"logits with position_ids from {shift}", actual, plain))
    if trial.family.run_masked is not None:
        first, gap = 1 + case.seed % (count - 1), 1 + case.seed % 3
        ids = torch.cat([torch.arange(first), torch.arange(first, count) + gap])
        wider = torch.zeros(len(tokens), count + gap, dtype=torch.int64)
        wider[:, ids] = tokens
        mask = torch.zeros(wider.shape, dtype=torch.bool)
        mask[:, ids] = True
        with torch.no_grad():
            expected = trial.family.run_masked(pair.original, wider, mask)["logits"][:, ids]
        actual = port_logits(trial, pair.port, tokens, position_ids=ids.expand_as(tokens))
        numbers.append(require_semantics(trial, f"logits with position_ids that skip {gap}", actual, expected))
        ids = torch.stack([ids, *[torch.arange(count)] * (len(tokens) - 1)])
        expected = torch.cat([expected[:1], plain[1:]])
        actual = port_logits(trial, pair.port, tokens, position_ids=ids)
        numbers.append(require_semantics(trial, "logits with position_ids of its own for a row", actual, expected))
    return worst(*numbers)


def _baseline(trial: Trial, case: Case, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return run_original(trial, original_model(trial, case, dtype=trial.dtype), tokens, targets)["logits"]


def _same_logits(
    trial: Trial, case: Case, pair: Pair, tokens: torch.Tensor, targets: torch.Tensor, what: str
) -> dict[str, float]:
    return require_semantics(
        trial,
        what,
        port_logits(trial, pair.port, tokens),
        run_original(trial, pair.original, tokens, targets)["logits"],
        baseline=lambda: _baseline(trial, case, tokens, targets),
    )
