# SPDX-License-Identifier: Apache-2.0
"""The first position whose logits differ with a cache, the module in which they do, and what it is as if."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch

from harness.capture import Call, watch
from harness.cases.batches import Side, pad
from harness.errors import ParityError
from harness.families import longest_of, padding_of
from harness.localise.finding import Divergence, Search, distance, require_time, tap_names, while_there_is_time
from harness.localise.visibility import is_seen, is_unseen, listed, visible
from harness.ports import lacks
from harness.trial import call_port, port_logits, takes

CHECKS = ("generation.", "precision.cache", "remote_code.generation")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One way of feeding a sequence: chunk lengths, and a mask (rows, tokens) or None.

    named: id of the check that is about it.
    static: into a StaticCache. asked_back: whether the last call says use_cache=True too.
    """

    named: str
    name: str
    chunks: list[int]
    tokens: torch.Tensor
    mask: torch.Tensor | None = None
    static: bool = False
    asked_back: bool = True


def find(search: Search) -> Divergence | None:
    """The first position that differs with the cache from the same port without; None where none does."""
    if not search.check.startswith(CHECKS) or "generation" not in search.trial.family.features:
        return None
    if not takes(search.pair.port, "past_key_values"):
        return None
    for setting in while_there_is_time(_settings(search), search.until):
        if lacks(search.trial.port, setting.named):
            continue
        try:
            found = _of_setting(search, setting)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError, ParityError):
            continue  # what a port does not take is another check's finding
        if found is not None:
            return found
    return None


def _settings(search: Search) -> Iterator[Setting]:
    tokens = search.pair.batch.tokens
    count = tokens.shape[1]
    plain = [Setting(named="generation.cache", name="one token at a time", chunks=[1] * count, tokens=tokens)]
    if count > 2:
        plain.append(
            Setting(
                named="generation.chunked_prefill",
                name=f"in chunks of 2 and {count - 2}",
                chunks=[2, count - 2],
                tokens=tokens,
            )
        )
    if search.check == "generation.chunked_prefill":
        plain.reverse()
    yield from plain
    if search.check == "generation.static_cache":
        yield Setting(
            named=search.check, name="one token at a time, static", chunks=[1] * count, tokens=tokens, static=True
        )
    family, fields = search.trial.family, search.case.fields
    if count > 1:
        name = "given to a last call with use_cache=False"
        yield Setting(named="generation.cache", name=name, chunks=[count - 1, 1], tokens=tokens, asked_back=False)
    if "masks" not in family.features or not takes(search.pair.port, "attention_mask") or count < 3:
        return
    sides: tuple[Side, ...] = ("left", "right")
    for side in sides:
        padded = pad(
            tokens[:, : count - 1],
            side=side,
            seed=search.case.seed,
            vocabulary=fields[family.vocabulary],
            width=count,
            pad_id=padding_of(family, fields),
        )
        for chunks in ([2, *[1] * (count - 2)], [2, count - 2]):
            name = f"padded on the {side}, in chunks of {' and '.join(map(str, dict.fromkeys(chunks)))}"
            yield Setting(
                named="generation.cache_masked", name=name, chunks=chunks, tokens=padded.tokens, mask=padded.mask.long()
            )


def _stepwise(search: Search, setting: Setting, tokens: torch.Tensor) -> torch.Tensor:
    """Logits (rows, tokens, vocabulary) computed chunk by chunk."""
    return torch.cat([logits for logits, _ in _steps(search, setting, tokens)], dim=1)


def _steps(search: Search, setting: Setting, tokens: torch.Tensor) -> Iterator[tuple[torch.Tensor, list[Call]]]:
    cached = _static(search, tokens) if setting.static else None
    start = 0
    for size in setting.chunks:
        require_time(search)
        last = start + size == tokens.shape[1]
        options: dict[str, Any] = {"past_key_values": cached, "use_cache": setting.asked_back or not last}
        if setting.mask is not None:
            options["attention_mask"] = setting.mask[:, : start + size]
        piece = tokens[:, start : start + size]
        with torch.no_grad():
            output, calls = watch(
                search.pair.port,
                functools.partial(call_port, search.trial, search.pair.port, piece, **options),
            )
        cached = getattr(output, "past_key_values", None)
        if cached is None and not last:
            raise ValueError("no cache came back")
        yield output.logits.cpu(), calls
        start += size


def _static(search: Search, tokens: torch.Tensor) -> Any:
    from transformers.cache_utils import StaticCache

    made: Any = StaticCache
    longest = longest_of(search.trial.family, search.case.fields)
    options: dict[str, Any] = {"config": search.pair.port.config, "max_cache_len": longest}
    try:
        return made(**options)
    except TypeError:
        return made(**options, max_batch_size=len(tokens), dtype=torch.float64)


def _of_setting(search: Search, setting: Setting) -> Divergence | None:
    tokens, port, trial = setting.tokens, search.pair.port, search.trial
    steps = list(_steps(search, setting, tokens))
    actual = torch.cat([logits for logits, _ in steps], dim=1)
    expected, calls = watch(port, lambda: port_logits(trial, port, tokens, attention_mask=setting.mask))
    real = torch.ones_like(tokens).bool() if setting.mask is None else setting.mask.bool()
    if actual.shape != expected.shape:
        return None
    size = float(expected[real].double().square().mean().sqrt())
    difference = (actual - expected).double().abs().amax(dim=-1).nan_to_num(nan=float("inf")) / size
    wrong = ((difference > search.bound) & real).T.nonzero()
    if not len(wrong):
        return None
    position, row = (int(index) for index in wrong[0])
    start, own = 0, steps[0][1]
    for (_, calls_of_step), length in zip(steps, setting.chunks, strict=True):
        if position < start + length:
            own = calls_of_step
            break
        start += length
    module = _module(search, calls, own, row, position, start)
    said = f"with the cache, {setting.name}, position {position} of row {row} is the first to differ"
    said += f" (error {difference[row, position]:.1e}{f', from {module} on' if module else ''})"
    why = _why(search, setting, row, position, start, actual)
    place = f"position {position}"
    return Divergence(module=f"{module} at {place}" if module else place, sentence=said + (f": {why}" if why else ""))


def _module(search: Search, whole: list[Call], step: list[Call], row: int, position: int, start: int) -> str | None:
    """The first innermost module that gives something else with the cache, by the family's name for it or its path."""
    names = tap_names(search)
    first = {call.path: call.output for call in reversed(whole)}
    differing = []
    for call in step:
        expected, actual = first.get(call.path), call.output
        if expected is None or actual is None or expected.ndim != 3 or actual.ndim != 3:
            continue
        if row >= len(actual) or position >= expected.shape[1] or position - start >= actual.shape[1]:
            row_of = 0
            if len(actual) != 1 or position - start >= actual.shape[1] or position >= expected.shape[1]:
                continue
        else:
            row_of = row
        left, right = actual[row_of, position - start], expected[min(row_of, len(expected) - 1), position]
        if distance(left.cpu(), right.cpu()) > search.bound:
            differing.append(call.path)
    if not differing:
        return None
    named = [path for path in differing if path in names]
    for path in named or differing:
        if not any(other.startswith(path + ".") for other in (named or differing)):
            return names.get(path, path)
    return None


def _why(search: Search, setting: Setting, row: int, position: int, start: int, actual: torch.Tensor) -> str | None:
    """What a position that differs is as if; each was seen to give the same logits in the port without a cache."""
    tokens, port, trial = setting.tokens, search.pair.port, search.trial

    def fits(logits: torch.Tensor) -> bool:
        return distance(logits, actual[row, position]) <= search.bound

    if takes(port, "position_ids"):
        real = torch.ones_like(tokens) if setting.mask is None else setting.mask
        right = (real.cumsum(-1) - 1).clamp(min=0)
        own = int(right[row, position])
        piece = slice(start, position + 1)
        for guess in dict.fromkeys((0, position - start, own - 1, own + 1, position, *range(own + 2))):
            moved = right.clone()
            moved[row, piece] = right[row, piece] - own + guess
            if guess == own or int(moved.min()) < 0:
                continue
            try:
                logits = port_logits(trial, port, tokens, position_ids=moved, attention_mask=setting.mask)
            except (ValueError, IndexError, RuntimeError):
                continue
            if fits(logits[row, position]):
                return f"as if it stood at position {guess} instead of {own}"
        alone = port_logits(trial, port, tokens[:, piece], position_ids=right[:, piece])
        if start > 1 and fits(alone[row, -1]):  # behind a single token it might be that token alone
            return "as if the cached keys and values were not there"
    vocabulary = search.case.fields[trial.family.vocabulary]
    with_cache = visible(functools.partial(_stepwise, search, setting), tokens, vocabulary)[row, position]
    without = visible(lambda ids: port_logits(trial, port, ids, attention_mask=setting.mask), tokens, vocabulary)[
        row, position
    ]
    missed = (is_unseen(with_cache) & is_seen(without)).nonzero().flatten().tolist()
    added = (is_seen(with_cache) & is_unseen(without)).nonzero().flatten().tolist()
    if missed:
        return f"it does not see {listed(missed)}"
    if added:
        return f"it sees {listed(added)}, which it does not without the cache"
    return None
