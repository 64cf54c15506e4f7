# SPDX-License-Identifier: Apache-2.0
"""Checks of generation: the same tokens as the original, whatever is cached, padded or searched."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from harness.backends import pytorch
from harness.cases import Case
from harness.cases.batches import draw_batch
from harness.errors import Mismatch
from harness.numerics import SEMANTICS_BOUND, first_difference, top_two_gap
from harness.ports import first_line
from harness.trial import (
    Pair,
    Trial,
    call_port,
    original_model,
    prepare,
    require_semantics,
    run_original,
    worst,
)


def greedy(trial: Trial, case: Case) -> dict[str, float]:
    """Greedy tokens equal the original's, with the port's default settings.

    At the first different token the two best logits must be closer than the bound, or it is a failure. Would have
    caught: sampling by default, a stop token of another model, a cache that is off by one.
    """
    pair, prompt, count = _prompted(trial, case)
    actual = _generate(trial, pair.port, prompt, max_new_tokens=count)
    return _same_tokens(trial, pair, actual, greedy_tokens(trial, pair.original, prompt, count))


def past_maximum(trial: Trial, case: Case) -> dict[str, float]:
    """Past the longest position the port follows the original's moving window without a cache, or refuses clearly.

    With a cache the request cannot be met, and a ValueError names the maximum. Would have caught: an IndexError in
    the middle of a generation, positions that stop counting.
    """
    pair, prompt, _ = _prompted(trial, case)
    maximum = case.fields[trial.family.maximum_length]
    count = maximum - prompt.shape[1] + 4
    actual = _generate(trial, pair.port, prompt, max_new_tokens=count, use_cache=False)
    numbers = _same_tokens(trial, pair, actual, greedy_tokens(trial, pair.original, prompt, count))
    try:
        cached = _generate(trial, pair.port, prompt, max_new_tokens=count, use_cache=True)
    except ValueError as error:
        if str(maximum) not in str(error):
            raise Mismatch(f"refused without naming the maximum {maximum}: {first_line(error)}") from None
        return numbers
    except Exception as error:  # whatever else it raises is the finding
        raise Mismatch(
            f"generation past {maximum} tokens with a cache ends in {type(error).__name__}: {first_line(error)};"
            f" expected a ValueError that names {maximum}"
        ) from None
    if not torch.equal(cached, actual):
        raise Mismatch(f"generation past {maximum} tokens gives other tokens with a cache than without")
    return numbers


def cache(trial: Trial, case: Case) -> dict[str, float]:
    """Logits of one token at a time with a cache equal those of the whole sequence at once.

    Would have caught: cached keys in the wrong place, positions that restart at zero with every call.
    """
    pair = prepare(trial, case)
    return _incremental(trial, pair, [1] * pair.batch.tokens.shape[1])


def chunked_prefill(trial: Trial, case: Case) -> dict[str, float]:
    """Logits of a sequence given in chunks of several tokens with a cache equal those of the whole at once.

    Would have caught: a causal mask for a chunk that forgets the past, or that is aligned to its other end.
    """
    pair = prepare(trial, dataclasses.replace(case, tokens=max(case.tokens, 4)))
    count = pair.batch.tokens.shape[1]
    first = 1 + case.seed % (count - 2)
    return _incremental(trial, pair, [first, count - first])


def sampled(trial: Trial, case: Case) -> dict[str, float]:
    """Sampled tokens equal the original's under the same seed, temperature and top_k, in float32 on the CPU.

    Would have caught: a default top_k of 50 that nobody asked for, temperature applied after the cut.
    """
    trial = dataclasses.replace(trial, dtype="float32")
    pair, prompt, count = _prompted(trial, case)
    original = original_model(trial, case, dtype="float32")
    numbers: dict[str, float] = {}
    for temperature, top_k in ((0.8, 5), (1.3, None)):
        torch.manual_seed(case.seed)
        with torch.no_grad():
            expected = _native(trial)(original, prompt, max_new_tokens=count, temperature=temperature, top_k=top_k)
        torch.manual_seed(case.seed)
        options = {"do_sample": True, "temperature": temperature, "top_k": top_k or 0, "top_p": 1.0}
        actual = _generate(trial, pair.port, prompt, max_new_tokens=count, **options)
        different = first_difference(actual, expected)
        if different:
            raise Mismatch(
                f"sampling with temperature {temperature} and top_k {top_k}: row {different[0]} differs from token"
                f" {different[1]} on ({int(actual[different])} instead of {int(expected[different])})"
            )
    return numbers


def batch(trial: Trial, case: Case) -> dict[str, float]:
    """Rows generated together are the rows generated alone.

    Would have caught: one row's finished flag or cache used for all.
    """
    pair, prompt, count = _prompted(trial, dataclasses.replace(case, rows=3))
    together = _generate(trial, pair.port, prompt, max_new_tokens=count)
    for row in range(3):
        alone = _generate(trial, pair.port, prompt[row : row + 1], max_new_tokens=count)
        _same_tokens(trial, pair, together[row : row + 1], alone)
    return {}


def left_padded(trial: Trial, case: Case) -> dict[str, float]:
    """A left-padded prompt in a batch continues as it does alone.

    Would have caught: positions counted over padding at the first step, or at every one after it.
    """
    pair, prompt, count = _prompted(trial, dataclasses.replace(case, rows=2))
    width = prompt.shape[1]
    padding = min(case.seed % 3 + 1, width - 1)
    if not padding:
        padding, prompt = 1, torch.cat([prompt, prompt], dim=1)
        count = max(1, min(count, case.fields[trial.family.maximum_length] - prompt.shape[1]))
    tokens, mask = prompt.clone(), torch.ones_like(prompt)
    mask[1, :padding] = 0
    together = _generate(trial, pair.port, tokens, max_new_tokens=count, attention_mask=mask)
    expected = greedy_tokens(trial, pair.original, prompt[1:, padding:], count)
    _same_tokens(trial, pair, together[1:, padding:], expected)
    return _same_tokens(trial, pair, together[:1], greedy_tokens(trial, pair.original, prompt[:1], count))


def beam(trial: Trial, case: Case) -> dict[str, float]:
    """Beam search as wide as the vocabulary finds the most probable pair of next tokens that the original knows.

    Over two steps such a beam leaves nothing out, so the original's probabilities of all pairs are the oracle. Would
    have caught: a cache that is not reordered with its beams.
    """
    pair, prompt, _ = _prompted(trial, dataclasses.replace(case, rows=1))
    prompt = prompt[:, : case.fields[trial.family.maximum_length] - 2]
    vocabulary = case.fields[trial.family.vocabulary]
    first = _log_probabilities(trial, pair.original, prompt)[0]
    continued = torch.cat([prompt.expand(vocabulary, -1), torch.arange(vocabulary)[:, None]], dim=1)
    pairs = first[:, None] + _log_probabilities(trial, pair.original, continued)
    actual = _generate(trial, pair.port, prompt, max_new_tokens=2, num_beams=vocabulary)
    found = pairs[int(actual[0, -2]), int(actual[0, -1])]
    gap = float(pairs.max() - found)
    if gap > 1e-6:
        raise Mismatch(f"beam search ends {gap:.2g} below the most probable pair of tokens", metrics={"gap": gap})
    return {"gap": gap}


def static_cache(trial: Trial, case: Case) -> dict[str, float]:
    """Greedy tokens with a static cache equal the original's.

    Would have caught: a mask as long as the sequence where the cache is longer, positions read from the cache's size.
    """
    pair, prompt, count = _prompted(trial, case)
    actual = _generate(
        trial, pair.port, prompt, max_new_tokens=count, cache_implementation="static", disable_compile=True
    )
    return _same_tokens(trial, pair, actual, greedy_tokens(trial, pair.original, prompt, count))


def inputs_embeds(trial: Trial, case: Case) -> dict[str, float]:
    """A prompt given as `inputs_embeds` continues as the same prompt given as token ids.

    Would have caught: embeddings used at every step, or dropped after the first without their positions.
    """
    pair, prompt, count = _prompted(trial, case)
    embedding: Any = pair.port.get_input_embeddings()  # type: ignore[operator]
    embeds = embedding(prompt.to(embedding.weight.device)).detach()
    actual = _generate(trial, pair.port, None, inputs_embeds=embeds, max_new_tokens=count)
    expected = greedy_tokens(trial, pair.original, prompt, count)
    return _same_tokens(trial, pair, torch.cat([prompt, actual], dim=1), expected)


def incremental_logits(trial: Trial, model: torch.nn.Module, tokens: torch.Tensor, chunks: list[int]) -> torch.Tensor:
    """Logits (rows, tokens, vocabulary) computed chunk by chunk with the port's cache, on the CPU."""
    pieces, cached, start = [], None, 0
    with torch.no_grad():
        for size in chunks:
            output = call_port(trial, model, tokens[:, start : start + size], past_key_values=cached, use_cache=True)
            cached = getattr(output, "past_key_values", None)
            if cached is None:
                raise Mismatch("forward with use_cache=True returned no past_key_values")
            pieces.append(output.logits.cpu())
            start += size
    return torch.cat(pieces, dim=1)


def _incremental(trial: Trial, pair: Pair, chunks: list[int]) -> dict[str, float]:
    tokens = pair.batch.tokens
    expected = run_original(trial, pair.original, tokens, pair.batch.targets)["logits"]
    actual = incremental_logits(trial, pair.port, tokens, chunks)
    what = f"logits with a cache, in chunks of {' and '.join(map(str, sorted(set(chunks))))}"
    return worst(
        require_semantics(
            trial, what, actual, expected, run=lambda: incremental_logits(trial, pair.port, tokens, chunks)
        )
    )


def _prompted(trial: Trial, case: Case) -> tuple[Pair, torch.Tensor, int]:
    """The pair, a prompt (rows, tokens) that leaves room, and how many tokens to generate: at least one, within it."""
    maximum = case.fields[trial.family.maximum_length]
    length = max(1, min(case.tokens, maximum - 2))
    pair = prepare(trial, case)
    prompt = draw_batch(
        rows=case.rows, tokens=length, vocabulary=case.fields[trial.family.vocabulary], seed=case.seed
    ).tokens
    return pair, prompt, maximum - length


def _native(trial: Trial) -> Any:
    assert trial.family.generate_original is not None  # the checks need generation
    return trial.family.generate_original


def greedy_tokens(trial: Trial, original: torch.nn.Module, prompt: torch.Tensor, count: int) -> torch.Tensor:
    """The original's greedy continuation by its own loop: prompt and `count` new tokens, (rows, tokens)."""
    with torch.no_grad():
        tokens: torch.Tensor = _native(trial)(original, prompt, max_new_tokens=count, temperature=1.0, top_k=1)
    return tokens


def _generate(trial: Trial, model: Any, prompt: torch.Tensor | None, **options: Any) -> torch.Tensor:
    device = pytorch.device_of(trial.backend)
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    inputs = {"input_ids": prompt.to(device)} if prompt is not None else {}
    if not hasattr(model, "generate"):
        raise Mismatch("the port has no generate(); from transformers 4.50 on a model must inherit GenerationMixin")
    tokens: torch.Tensor = model.generate(**inputs, **moved)
    return tokens.cpu()


def _same_tokens(trial: Trial, pair: Pair, actual: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    if actual.shape != expected.shape:
        raise Mismatch(f"generated {tuple(actual.shape)} tokens, expected {tuple(expected.shape)}")
    different = first_difference(actual, expected)
    if different is None:
        return {}
    row, position = different
    window = expected[row : row + 1, :position][:, -_maximum(trial, pair) :]
    gap = top_two_gap(run_original(trial, pair.original, window, torch.zeros_like(window))["logits"][0, -1])
    bound = SEMANTICS_BOUND if trial.dtype == "float64" else 1000 * pytorch.epsilon(trial.dtype)
    if gap > bound:
        raise Mismatch(
            f"row {row} differs from token {position} on: {int(actual[row, position])} instead of"
            f" {int(expected[row, position])}, though the two best logits are {gap:.1e} apart",
            metrics={"position": float(position), "gap": gap},
            tensors={"actual": actual, "expected": expected},
        )
    return {"near_ties": 1.0}


def _maximum(trial: Trial, pair: Pair) -> int:
    config = getattr(pair.original, "config", None)
    maximum = getattr(config, trial.family.maximum_length, None)
    return int(maximum) if maximum else 1 << 30


def _log_probabilities(trial: Trial, original: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return run_original(trial, original, tokens, torch.zeros_like(tokens))["logits"][:, -1].log_softmax(dim=-1)
