# SPDX-License-Identifier: Apache-2.0
"""The row and the column where attention sees what the mask hides, or does not see what it shows."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch

from harness.cases.batches import Side, pad
from harness.errors import ParityError
from harness.families import has_relative_positions, longest_of, padding_of
from harness.localise import operations
from harness.localise.finding import Divergence, Search, distance, require_time, while_there_is_time
from harness.localise.visibility import is_seen, is_unseen, visible
from harness.numerics import FLOAT32_INSIDE_BOUND
from harness.ports import lacks
from harness.trial import each_attention, port_logits, run_original, takes

CHECKS = ("masks.", "backend.attention", "precision.masks", "training.gradients_masked", "generation.left_padded")
MORE_CHECKS = (
    "forward.position_ids",
    "generation.static_cache",
    "forward.causal",
    "forward.rows_independent",
    "generation.cache_masked",
    "generation.batch",
)


LOOKED_AT = 8
"""So many positions, each of which takes two runs, are enough for any mask."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One way of giving a mask: tokens (rows, width), the port's options, and which tokens are real (rows, width).

    named: id of the check that is about it. name: how a sentence about it begins.
    """

    named: str
    name: str
    tokens: torch.Tensor
    options: dict[str, Any]
    real: torch.Tensor


def find(search: Search) -> Divergence | None:
    """The first row and column that are wrong under any mask that the check may have given; else None."""
    if not search.check.startswith((*CHECKS, *MORE_CHECKS)):
        return None
    # The likeliest to have failed first: what the check is called after.
    asked = [each for each in _settings(search) if not lacks(search.trial.port, each.named)]
    settings = sorted(asked, key=lambda setting: setting.named != search.check)
    several = search.check.startswith(("backend.", "masks."))
    training = search.check.startswith("training.")
    search.pair.port.train(training)
    own = None
    for attention in each_attention(search.pair.port) if several else ["its own"]:
        own = own or attention
        for setting in while_there_is_time(settings, search.until):
            try:
                found = _of_setting(search, setting)
            except (AttributeError, IndexError, RuntimeError, TypeError, ValueError, ParityError):
                continue  # what a port does not take is another check's finding
            if found is not None:
                said = ("in training mode, " if training else "") + setting.name
                said = f"with {attention} attention, {said}" if attention != own else said
                return dataclasses.replace(found, sentence=said + found.sentence)
    return _told_positions(search) if search.check == "forward.position_ids" else None


def _settings(search: Search) -> Iterator[Setting]:
    tokens = search.pair.batch.tokens[:, :LOOKED_AT]
    every = torch.ones_like(tokens).bool()
    yield Setting(named="forward.causal", name="", tokens=tokens, options={}, real=every)
    if "masks" not in search.trial.family.features or not takes(search.pair.port, "attention_mask"):
        return
    for name, mask in (("int64", every.long()), ("bool", every)):
        yield Setting(
            named="masks.none_is_ones",
            name=f"with a mask of {name} ones, ",
            tokens=tokens,
            options={"attention_mask": mask},
            real=every,
        )
    fields, family = search.case.fields, search.trial.family
    width = min(longest_of(family, fields), tokens.shape[1] + 2)
    # Where only distances of positions count, a hole between tokens moves them apart.
    sides: tuple[Side, ...] = (
        ("right", "left") if has_relative_positions(family, fields) else ("right", "left", "interior")
    )
    for side in sides:
        count = max(1, min(tokens.shape[1], width - 2))  # with one pad alone several faults look the same
        padded = pad(
            tokens[:, :count],
            side=side,
            seed=search.case.seed,
            vocabulary=fields[family.vocabulary],
            width=width,
            pad_id=padding_of(family, fields),
        )
        yield Setting(
            named=f"masks.{side}_padding",
            name=f"with padding on the {side}, " if side != "interior" else "with padding between tokens, ",
            tokens=padded.tokens,
            options={"attention_mask": padded.mask.long()},
            real=padded.mask,
        )
    if "causal" not in family.features:
        return
    hidden = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
    if search.check.startswith(("masks.additive", "backend.")):
        mask = torch.zeros(len(tokens), 1, *hidden.shape, dtype=torch.float64)
        mask = mask.masked_fill(hidden, torch.finfo(torch.float64).min)
        options = {"attention_mask": mask}
        yield Setting(
            named="masks.additive", name="with an additive mask, ", tokens=tokens, options=options, real=every
        )
    if search.check == "generation.static_cache":  # generate() gives such masks with a static cache
        options = {"attention_mask": ~hidden.expand(len(tokens), 1, *hidden.shape)}
        name = "with a boolean mask of four axes, "
        yield Setting(named="generation.static_cache", name=name, tokens=tokens, options=options, real=every)


def _of_setting(search: Search, setting: Setting) -> Divergence | None:
    vocabulary = search.case.fields[search.trial.family.vocabulary]
    run = functools.partial(_port, search, setting)
    ours = visible(run, setting.tokens, vocabulary)
    theirs = _as_original(search, setting, vocabulary)
    width = setting.tokens.shape[1]
    real = setting.real
    wrong = (is_seen(ours) & is_unseen(theirs)) | (is_unseen(ours) & is_seen(theirs))
    wrong &= real[:, :, None]  # what padding sees is nobody's business
    if bool(wrong.any()):
        row, position, other = (int(index) for index in wrong.nonzero()[0])
        return _seen_wrongly(search, setting, row, position, other, bool(is_seen(ours)[row, position, other]))
    if across := _across_rows(search, setting, vocabulary):
        return across
    if bool(real.all()) and not setting.options:
        return None
    actual, expected = run(setting.tokens)[real], _unpadded(search, setting)
    if distance(actual, expected) <= max(search.bound, FLOAT32_INSIDE_BOUND):
        return None if setting.options.get("attention_mask") is None else _cut(search, setting, width)
    return _positions(search, setting, expected)


def _port(search: Search, setting: Setting, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    require_time(search)
    return port_logits(search.trial, search.pair.port, tokens, **setting.options, **options)


def _as_original(search: Search, setting: Setting, vocabulary: int) -> torch.Tensor:
    """What the original sees of every row without its padding, at the places where its tokens stand."""
    rows, width = setting.tokens.shape
    changes = torch.zeros(rows, width, width, dtype=torch.float64)
    for row in range(rows):
        places = setting.real[row].nonzero().flatten()
        alone = setting.tokens[row, places][None]
        changes[row, places[:, None], places] = visible(functools.partial(_original, search), alone, vocabulary)[0]
    return changes


def _original(search: Search, tokens: torch.Tensor) -> torch.Tensor:
    return run_original(search.trial, search.pair.original, tokens, torch.zeros_like(tokens))["logits"]


def _unpadded(search: Search, setting: Setting) -> torch.Tensor:
    rows = [_original(search, tokens[real][None])[0] for tokens, real in zip(setting.tokens, setting.real, strict=True)]
    return torch.cat(rows)


def _seen_wrongly(search: Search, setting: Setting, row: int, position: int, other: int, sees: bool) -> Divergence:
    why = ""
    if not sees:
        said = f"does not see position {other}"
    elif not bool(setting.real[row, other]):
        said = f"sees position {other}, which is padding"
    elif other > position:
        said = f"sees position {other}, which comes later"
    else:
        said = f"sees position {other}, which the original does not"
    mask = setting.options.get("attention_mask")
    if mask is not None and mask.ndim == 2 and takes(search.pair.port, "position_ids"):
        # Padding that is seen throughout, or instead of the tokens, has a plainer name.
        told = {"position_ids": _counted(setting.real)}
        plain = dataclasses.replace(setting, options={})
        other_way = dataclasses.replace(setting, options={"attention_mask": 1 - mask.long()})
        as_told, unmasked = (_port(search, each, setting.tokens, **told) for each in (setting, plain))
        if distance(as_told, unmasked) <= search.bound and not bool(setting.real.all()):
            why = ": the mask is not used"
        elif distance(
            _port(search, other_way, setting.tokens, **told)[setting.real], _unpadded(search, setting)
        ) <= max(search.bound, FLOAT32_INSIDE_BOUND):
            why = ": the mask is read the other way round"
    return Divergence(module=f"row {row}, position {position}", sentence=f"row {row}: position {position} {said}{why}")


def _across_rows(search: Search, setting: Setting, vocabulary: int) -> Divergence | None:
    tokens = setting.tokens
    if len(tokens) < 2:
        return None
    before = _port(search, setting, tokens)
    for row in range(len(tokens)):
        changed = tokens.clone()
        changed[row] = (changed[row] + 1) % vocabulary
        change = (_port(search, setting, changed) - before).abs().amax(dim=-1)
        change[row] = 0
        change = change.masked_fill(~setting.real, 0)
        if float(change.max()) > 1e-6:
            other, position = (int(index) for index in (change > 1e-6).nonzero()[0])
            said = f"row {other}: position {position} depends on the tokens of row {row}"
            return Divergence(module=f"row {other}, position {position}", sentence=said)
    return None


def _counted(real: torch.Tensor) -> torch.Tensor:
    """Positions (rows, width) that count real tokens alone."""
    return (real.long().cumsum(-1) - 1).clamp(min=0)


def _positions(search: Search, setting: Setting, expected: torch.Tensor) -> Divergence | None:
    """Positions that are counted otherwise, where the port is right once it is told them."""
    real = setting.real
    actual = _port(search, setting, setting.tokens)
    wrong = torch.zeros(real.shape, dtype=torch.bool)
    difference = torch.zeros(real.shape, dtype=torch.float64)
    difference[real] = (actual[real] - expected).double().abs().amax(dim=-1)
    wrong = difference > FLOAT32_INSIDE_BOUND * float(expected.square().mean().sqrt())
    if not bool(wrong.any()):
        return None
    row, place = (int(index) for index in wrong.nonzero()[0])
    width = real.shape[1]
    guesses = {
        "positions count the padding too": torch.arange(width).expand(real.shape),
        "every row gets the positions of row 0": _counted(real)[:1].expand(real.shape),
        "positions are counted from one": _counted(real) + 1,
        "every token gets position 0": torch.zeros_like(real).long(),
    }
    said = f"row {row}: position {place} is the first that differs"
    for words, positions in guesses.items():
        if any(distance(guess, actual[real]) <= search.bound for guess in _at_positions(search, setting, positions)):
            right, used = int(_counted(real)[row, place]), int(positions[row, place])
            said = f"row {row}: the token at {place} gets position {used} instead of {right}: {words}"
            break
    return Divergence(module=f"row {row}, position {place}", sentence=said)


def _at_positions(search: Search, setting: Setting, positions: torch.Tensor) -> Iterator[torch.Tensor]:
    """The original's logits of the rows alone, one of its embeddings looked up at these rows (rows, width) instead."""
    used = operations.used_by(functools.partial(_original, search, setting.tokens[:1]))
    for place in range(len(used.embeddings)):
        pieces = []
        for row, real in enumerate(setting.real):
            look_up = functools.partial(_rows_of, positions[row, real])
            with operations.Rewritten(operations.embedding_rewritten(place, look_up)):
                pieces.append(_original(search, setting.tokens[row, real][None])[0])
        yield torch.cat(pieces)


def _rows_of(ids: torch.Tensor, asked: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return table[ids.clamp(max=len(table) - 1).view_as(asked)]


def _cut(search: Search, setting: Setting, width: int) -> Divergence | None:
    """An additive mask of which only the sign counts."""
    mask = setting.options["attention_mask"]
    if mask.ndim != 4 or width < 2:
        return None
    raised = mask.clone()
    raised[0, 0, -1, 0] += 0.5
    changed = dataclasses.replace(setting, options={"attention_mask": raised})
    before, after = (_port(search, each, setting.tokens) for each in (setting, changed))
    if not torch.equal(before, after):
        return None
    said = f"row 0: +0.5 at position {width - 1} for position 0 changes nothing: only what is hidden counts"
    return Divergence(module=f"row 0, position {width - 1}", sentence=said)


def _told_positions(search: Search) -> Divergence | None:
    """`position_ids` that change nothing, alone or beside a mask."""
    tokens = search.pair.batch.tokens[:, :-1]
    ids = torch.arange(tokens.shape[1]).expand_as(tokens)
    for words, options in (("", {}), (" beside a mask", {"attention_mask": torch.ones_like(tokens)})):
        here, there = (
            port_logits(search.trial, search.pair.port, tokens, position_ids=each, **options) for each in (ids, ids + 1)
        )
        if tokens.shape[1] and torch.equal(here, there):
            return Divergence(module="position_ids", sentence=f"position_ids{words} change nothing")
    return None
