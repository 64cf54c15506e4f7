# SPDX-License-Identifier: Apache-2.0
"""The first module that differs between two ways of calling a port that ought to give the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from harness.backends.pytorch import DTYPES, device_of
from harness.capture import Call, watch
from harness.families import longest_of
from harness.localise.finding import Divergence, Search, distance, explains, tap_names
from harness.localise.relations import factor_between, number, relation_of_outputs
from harness.trial import call_port, copied, each_attention, outputs_of, port_logits, takes

EMBEDDED = ("forward.inputs_embeds", "generation.inputs_embeds")
MASKED = ("masks.all_masked_row", "precision.masks")


def find(search: Search) -> Divergence | None:
    """What differs with embeddings for ids, in a row alone, or beside a row that is masked; None where nothing does."""
    if search.check in EMBEDDED:
        return _embedded(search)
    if search.check == "forward.rows_independent":
        return _alone(search)
    if search.check == "generation.left_padded":
        return _told_by_generate(search)
    return _masked(search) if search.check in MASKED else None


def _embedded(search: Search) -> Divergence | None:
    port, tokens = search.pair.port, search.pair.batch.tokens
    with torch.no_grad():
        embeds = port.get_input_embeddings()(tokens.to(device_of(search.trial.backend)))  # type: ignore[operator]

    def run() -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = outputs_of(search.trial, call_port(search.trial, port, None, inputs_embeds=embeds))[
                "logits"
            ]
        return logits

    return _compared(search, "with inputs_embeds", lambda: port_logits(search.trial, port, tokens), run)


def _alone(search: Search) -> Divergence | None:
    """Three rows against the first of them; a fault may need more than two."""
    tokens = search.pair.batch.tokens
    several = torch.cat([tokens[:1], *[(tokens[:1] + step) % int(tokens.max() + 1) for step in (1, 2)]])
    return _compared(
        search,
        "in a batch of three rows",
        lambda: port_logits(search.trial, search.pair.port, several[:1]),
        lambda: port_logits(search.trial, search.pair.port, several),
    )


def _compared(
    search: Search, words: str, right: Callable[[], torch.Tensor], other: Callable[[], torch.Tensor]
) -> Divergence | None:
    """The first module whose output differs between two runs; the first rows of both are compared."""
    expected, whole = watch(search.pair.port, right)
    actual, calls = watch(search.pair.port, other)
    first = {call.path: call for call in reversed(whole)}
    differing = [call for call in calls if _differs(call, first.get(call.path), search.bound)]
    for call in _innermost(differing)[:1]:
        ours, theirs = _common(call.output, first[call.path].output)
        said = next(_relations(search, ours, theirs, whole), None)
        name = tap_names(search).get(call.path, call.path)
        sentence = f"{words}, {name} is the first module that gives something else"
        return Divergence(module=name, sentence=sentence + (f": its output {said}" if said else ""))
    ours, theirs = _common(actual, expected)
    if distance(ours, theirs) <= search.bound:
        return None
    return Divergence(
        module="logits", sentence=f"{words}, every module gives the same, and what is made of the last one does not"
    )


def _relations(search: Search, actual: torch.Tensor, expected: torch.Tensor, calls: list[Call]) -> Iterator[str]:
    error = distance(actual, expected)
    for call in calls:
        part, _ = _common(call.output, expected)
        factor = factor_between(actual - expected, part) if part.shape == expected.shape else None
        if factor is not None and explains(expected + factor * part, actual, error=error, bound=search.bound):
            yield f"has {number(1 + factor)}x the output of {tap_names(search).get(call.path, call.path)}"
    if said := relation_of_outputs(actual, expected, error=error, bound=search.bound):
        yield said


def _innermost(calls: list[Call]) -> list[Call]:
    """The calls of modules none of whose parts is among the calls."""
    return [call for call in calls if not any(other.path.startswith(call.path + ".") for other in calls)]


def _common(left: torch.Tensor | None, right: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Both tensors cut to the rows they share."""
    if left is None or right is None:
        return torch.empty(0), torch.empty(0)
    rows = min(len(left), len(right)) if left.ndim and right.ndim else 0
    return left[:rows].cpu(), right[:rows].cpu()


def _differs(call: Call, other: Call | None, bound: float) -> bool:
    if other is None or call.output is None or other.output is None or not call.output.is_floating_point():
        return False
    left, right = _common(call.output, other.output)
    return left.shape == right.shape and left.ndim > 1 and distance(left, right) > bound


def _masked(search: Search) -> Divergence | None:
    """The first module whose output is not finite, in every attention, at the check's own dtype."""
    port = copied(search.pair.port)
    if not takes(port, "attention_mask"):
        return None
    tokens = search.pair.batch.tokens
    hidden = torch.ones_like(tokens)
    hidden[1:] = 0
    padded = torch.ones_like(tokens)
    padded[:, :-1] = 0
    for attention in each_attention(port):
        masks = [("a row that is masked as a whole", hidden), ("padding on the left", padded)]
        for what, mask in masks if search.check == "masks.all_masked_row" else reversed(masks):
            logits, calls = watch(
                port.to(DTYPES[search.dtype]),
                lambda mask=mask: port_logits(search.trial, port, tokens, attention_mask=mask),  # type: ignore[misc]
            )
            if bool(logits.isfinite().all()):
                continue
            broken = [call for call in calls if call.output is not None and not bool(call.output.isfinite().all())]
            # Where it begins: what it was given is finite.
            inner = _innermost([call for call in broken if all(bool(x.isfinite().all()) for x in call.inputs[:1])])
            name = tap_names(search).get(inner[0].path, inner[0].path) if inner else "logits"
            output = inner[0].output if inner else logits
            assert output is not None
            place = (~output.isfinite()).nonzero()[0].tolist()
            where = f"row {place[0]}" + (f", position {place[1]}" if len(place) > 2 else "")
            said = f"with {what} and {attention} attention, {name} is the first whose output is not finite ({where})"
            return Divergence(module=name, sentence=said)
    return None


def _told_by_generate(search: Search) -> Divergence | None:
    """Positions that generate() gives for a padded row, where they do not count from its first token."""
    port: Any = search.pair.port
    tokens = search.pair.batch.tokens
    longest = longest_of(search.trial.family, search.case.fields)
    tokens = tokens[:, : max(2, min(tokens.shape[1], longest - 2))]
    mask = torch.ones_like(tokens)
    mask[-1, 0] = 0
    device = device_of(search.trial.backend)
    told: list[dict[str, Any]] = []
    handle = port.register_forward_pre_hook(lambda _module, _args, kwargs: told.append(kwargs), with_kwargs=True)
    try:
        options = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
        port.generate(tokens.to(device), attention_mask=mask.to(device), **options)
    finally:
        handle.remove()
    for step, kwargs in enumerate(told):
        positions, seen = kwargs.get("position_ids"), kwargs.get("attention_mask")
        if positions is None or seen is None or seen.ndim != 2:
            continue
        width = positions.shape[-1]
        right = (seen.long().cumsum(-1) - 1).clamp(min=0)[:, -width:]
        wrong = (positions.expand_as(right) != right) & seen[:, -width:].bool()
        if bool(wrong.any()):
            row, place = (int(index) for index in wrong.nonzero()[0])
            got, expected = int(positions.expand_as(right)[row, place]), int(right[row, place])
            where = place + seen.shape[1] - width
            said = f"generate() gives the token at {where} of row {row} position {got} instead of {expected}"
            said += f" (step {step}, padded on the left)"
            return Divergence(module="prepare_inputs_for_generation", sentence=said)
    return None
