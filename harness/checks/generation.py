# SPDX-License-Identifier: Apache-2.0
"""Checks of generation: the same tokens as the original, whatever is cached, padded or searched."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch

from harness.backends import pytorch
from harness.cases import Case, large_cases
from harness.cases.batches import draw_batch
from harness.checks.masks import padded_batch, unpadded_logits
from harness.errors import Mismatch, Skip
from harness.families import longest_of
from harness.numerics import FLOAT32_INSIDE_BOUND, first_difference, require_close, top_two_gap
from harness.ports import first_line
from harness.trial import (
    Pair,
    Trial,
    call_port,
    each_attention,
    is_asked,
    original_model,
    port_logits,
    prepare,
    require_semantics,
    run_original,
    run_port,
    takes,
    worst,
)

BEAMS, BEAM_STEPS = 4, 6

FAR = 24
"""Tokens past the longest position, more than any drawn case generates there."""


def greedy(trial: Trial, case: Case) -> dict[str, float]:
    """Greedy tokens equal the original's, with the port's default settings, and so do the logits behind each.

    At the first different token the two best logits must be closer than the bound, or it is a failure. Would have
    caught: sampling by default, a stop token of another model, a cache that is off by one.
    """
    pair, prompt, count = prompted(trial, case)
    return continues(trial, pair, prompt, count)


def past_maximum(trial: Trial, case: Case) -> dict[str, float]:
    """Past the longest position the port follows the original's moving window without a cache, or refuses clearly.

    With a cache the request cannot be met. A refusal is a ValueError that names the maximum. Would have caught: an
    IndexError in the middle of a generation, positions that stop counting.
    """
    pair, prompt, _ = prompted(trial, case)
    maximum = longest_of(trial.family, case.fields)
    count = maximum - prompt.shape[1] + 4
    try:
        numbers = continues(trial, pair, prompt, count, use_cache=False)
        if "masks" in trial.family.features and prompt.shape[1] > 1:
            numbers = worst(
                numbers, _continues_padded(trial, pair, prompt, case, max_new_tokens=count, use_cache=False)
            )
    except ValueError as error:
        _require_named(maximum, error)
        numbers = {"refused": 1.0}
    try:
        cached = _generate(trial, pair.port, prompt, max_new_tokens=count, use_cache=True)
    except ValueError as error:
        _require_named(maximum, error)
        return numbers
    except Exception as error:  # whatever else it raises is the finding
        raise Mismatch(
            f"generation past {maximum} tokens with a cache ends in {type(error).__name__}: {first_line(error)};"
            f" expected a ValueError that names {maximum}"
        ) from None
    if not torch.equal(cached.tokens, greedy_tokens(trial, pair.original, prompt, count)):
        raise Mismatch(f"generation past {maximum} tokens with a cache gives other tokens than the original")
    return numbers


def large(trial: Trial, case: Case) -> dict[str, float]:
    """With the family's large models a cache gives the original's logits, and the window moves on as the original's.

    Would have caught: a cache that is cut at a fixed number of tokens, layers beyond the tenth without one, a window
    that moves once and then stands still.
    """
    sizes = list(large_cases(trial.family, case))
    if not sizes:
        raise Skip(f"family '{trial.family.name}' declares no large sizes")
    numbers = []
    for size, big in sizes:
        try:
            numbers.append(_large(trial, prepare(trial, big), big))
        except Mismatch as error:
            raise Mismatch(f"{error} ({size})", metrics=error.metrics, tensors=error.tensors) from error
    return worst(*numbers)


def _large(trial: Trial, pair: Pair, case: Case) -> dict[str, float]:
    maximum = longest_of(trial.family, case.fields)
    half = maximum // 2
    numbers = _incremental(trial, pair, [half, 1, 1, maximum - half - 2])
    if not is_asked(trial, "learned_positions", "generation.past_maximum"):
        return numbers
    # Every step is a pass over the whole window, so that only a short one moves far.
    steps = FAR if maximum <= FAR else 1
    prompt = pair.batch.tokens[:, 1:]
    try:
        return worst(numbers, continues(trial, pair, prompt, 1 + steps, use_cache=False))
    except ValueError as error:
        _require_named(maximum, error)
        return numbers


def _require_named(maximum: int, error: ValueError) -> None:
    if str(maximum) not in str(error):
        raise Mismatch(f"refused without naming the maximum {maximum}: {first_line(error)}") from None


def cache(trial: Trial, case: Case) -> dict[str, float]:
    """Logits of one token at a time with a cache equal those of the whole sequence at once.

    With eager attention too. A cache that is given is used when none is asked back, and `config.use_cache` counts where
    the argument is not given. Would have caught: cached keys in the wrong place, positions that restart at zero with
    every call.
    """
    pair = prepare(trial, case)
    chunks = [1] * pair.batch.tokens.shape[1]
    numbers = worst(*(_incremental(trial, pair, chunks, attention) for attention in each_attention(pair.port)))
    _use_cache_of_configuration(trial, pair)
    if pair.batch.tokens.shape[1] < 2:
        return numbers
    return worst(numbers, _last_without_asking_back(trial, pair))


def _use_cache_of_configuration(trial: Trial, pair: Pair) -> None:
    config: Any = getattr(pair.port, "config", None)
    if not hasattr(config, "use_cache"):
        return
    before = config.use_cache
    for wanted in (False, True):
        config.use_cache = wanted
        with torch.no_grad():
            output = call_port(trial, pair.port, pair.batch.tokens)
        if (getattr(output, "past_key_values", None) is not None) != wanted:
            raise Mismatch(
                f"config.use_cache = {wanted} is ignored: forward returns {'no' if wanted else 'a'} cache; without the"
                " argument use_cache the configuration counts"
            )
    config.use_cache = before


def _last_without_asking_back(trial: Trial, pair: Pair) -> dict[str, float]:
    tokens = pair.batch.tokens
    expected = run_original(trial, pair.original, tokens, pair.batch.targets)["logits"][:, -1:]
    with torch.no_grad():
        cached = call_port(trial, pair.port, tokens[:, :-1], use_cache=True).past_key_values
        output = call_port(trial, pair.port, tokens[:, -1:], past_key_values=cached, use_cache=False)
    what = "logits of the last token with a cache given and use_cache=False"
    return require_semantics(trial, what, output.logits.cpu(), expected)


def cache_masked(trial: Trial, case: Case) -> dict[str, float]:
    """Padded rows fed in pieces with a cache and a growing mask, without positions, get the logits they get alone.

    Would have caught: positions of new tokens taken from the front of the mask, a mask that forgets the past.
    """
    case = dataclasses.replace(case, tokens=max(case.tokens, 3))
    pair = prepare(trial, case)
    numbers = []
    for side in ("left", "right"):
        padded = padded_batch(trial, case, pair, side)
        width = padded.tokens.shape[1]
        first = 1 + case.seed % (width - 1)
        for chunks in ([first, *[1] * (width - first)], [first, width - first]):
            actual = incremental_logits(trial, pair.port, padded.tokens, chunks, mask=padded.mask.long())
            expected = unpadded_logits(trial, pair.original, padded)
            what = f"logits of {side}-padded rows with a cache and a mask, in chunks of {_listed_counts(chunks)}"
            numbers.append(require_semantics(trial, what, actual[padded.mask], expected))
    return worst(*numbers)


def _listed_counts(chunks: list[int]) -> str:
    return " and ".join(map(str, dict.fromkeys(chunks)))


def chunked_prefill(trial: Trial, case: Case) -> dict[str, float]:
    """Logits of a sequence given in chunks of several tokens with a cache equal those of the whole at once.

    Would have caught: a causal mask for a chunk that forgets the past, or that is aligned to its other end.
    """
    pair = prepare(trial, dataclasses.replace(case, tokens=max(case.tokens, 4)))
    count = pair.batch.tokens.shape[1]
    first = 1 + case.seed % (count - 2)
    chunks = [first, count - first]
    return worst(*(_incremental(trial, pair, chunks, attention) for attention in each_attention(pair.port)))


def sampled(trial: Trial, case: Case) -> dict[str, float]:
    """Sampled tokens equal the original's under the same seed, temperature and top_k, in float32 on the CPU.

    Would have caught: a default top_k of 50 that nobody asked for, temperature applied after the cut.
    """
    trial = dataclasses.replace(trial, dtype="float32")
    pair, prompt, count = prompted(trial, case)
    original = original_model(trial, case, dtype="float32")
    numbers: dict[str, float] = {}
    for temperature, top_k in ((0.8, 5), (1.3, None)):
        torch.manual_seed(case.seed)
        with torch.no_grad():
            expected = _native(trial)(original, prompt, max_new_tokens=count, temperature=temperature, top_k=top_k)
        torch.manual_seed(case.seed)
        options = {"do_sample": True, "temperature": temperature, "top_k": top_k or 0, "top_p": 1.0}
        actual = _generate(trial, pair.port, prompt, max_new_tokens=count, **options).tokens
        if actual.shape != expected.shape:
            raise Mismatch(
                f"sampling ends with tokens of shape {tuple(actual.shape)}, the original's {tuple(expected.shape)}"
            )
        different = first_difference(actual, expected)
        if different:
            raise Mismatch(
                f"sampling with temperature {temperature} and top_k {top_k}: row {different[0]} differs from token"
                f" {different[1]} on ({int(actual[different])} instead of {int(expected[different])})"
            )
    return numbers


def batch(trial: Trial, case: Case) -> dict[str, float]:
    """Rows generated together are the rows that the original generates alone.

    Would have caught: one row's finished flag or cache used for all.
    """
    pair, prompt, count = prompted(trial, dataclasses.replace(case, rows=3))
    together = _generate(trial, pair.port, prompt, max_new_tokens=count)
    return worst(*(_follows(trial, pair, together.row(row), prompt.shape[1], count) for row in range(3)))


def left_padded(trial: Trial, case: Case) -> dict[str, float]:
    """A left-padded prompt in a batch continues as the original continues it alone, with a cache and without.

    Would have caught: positions counted over padding at the first step, or at every one after it.
    """
    pair, prompt, count = prompted(trial, dataclasses.replace(case, rows=2, tokens=max(case.tokens, 2)))
    return worst(
        *(
            _continues_padded(trial, pair, prompt, case, max_new_tokens=count, use_cache=use_cache)
            for use_cache in (True, False)
        )
    )


def _continues_padded(trial: Trial, pair: Pair, prompt: torch.Tensor, case: Case, **options: Any) -> dict[str, float]:
    """Generates with padding on the left of the last row, and compares every row with the original alone."""
    rows, width = prompt.shape
    paddings = [0] * (rows - 1) + [1 + case.seed % (width - 1)]
    mask = torch.ones_like(prompt)
    mask[-1, : paddings[-1]] = 0
    together = _generate(trial, pair.port, prompt, attention_mask=mask, **options)
    count = options["max_new_tokens"]
    return worst(
        *(
            _follows(trial, pair, together.row(row, padding), width - padding, count)
            for row, padding in enumerate(paddings)
        )
    )


def beam(trial: Trial, case: Case) -> dict[str, float]:
    """Beam search ends with the beams that a plain beam search over the original's probabilities ends with.

    Would have caught: a cache that is not reordered with its beams.
    """
    maximum = longest_of(trial.family, case.fields)
    short = max(1, maximum - BEAM_STEPS)
    pair, prompt, count = prompted(trial, dataclasses.replace(case, rows=1, tokens=min(case.tokens, short)))
    steps = min(count, BEAM_STEPS)
    options = {"max_new_tokens": steps, "num_beams": BEAMS, "num_return_sequences": BEAMS}
    actual = _generate(trial, pair.port, prompt, **options).tokens
    found = sorted(_score(trial, pair.original, row[None], prompt.shape[1]) for row in actual)
    expected = sorted(_best_beams(trial, pair.original, prompt, steps))
    gap = max(abs(left - right) for left, right in zip(found, expected, strict=True))
    if gap > 1e-5:
        raise Mismatch(
            f"beams end at log probabilities {_listed(found)}, expected {_listed(expected)}", metrics={"gap": gap}
        )
    return {"gap": gap}


def static_cache(trial: Trial, case: Case) -> dict[str, float]:
    """Logits with a static cache, by itself and in generate(), equal the original's.

    Would have caught: a mask as long as the sequence where the cache is longer, positions read from the cache's size.
    """
    pair, prompt, count = prompted(trial, case)
    numbers = continues(trial, pair, prompt, count, cache_implementation="static", disable_compile=True)
    if not getattr(pair.port, "_can_compile_fullgraph", False):
        return numbers  # a port may leave it to generate() to make the mask that such a cache needs
    tokens = pair.batch.tokens
    made = _static_cache(pair.port, rows=tokens.shape[0], length=longest_of(trial.family, case.fields))
    first = -(-tokens.shape[1] // 2)
    chunks = [first, *[1] * (tokens.shape[1] - first)]
    actual = incremental_logits(trial, pair.port, tokens, chunks, cached=made)
    expected = run_original(trial, pair.original, tokens, pair.batch.targets)["logits"]
    return worst(numbers, require_semantics(trial, "logits with a StaticCache of one's own", actual, expected))


def _static_cache(model: Any, *, rows: int, length: int) -> Any:
    from transformers import StaticCache

    if "max_batch_size" not in inspect.signature(StaticCache.__init__).parameters:
        return StaticCache(config=model.config, max_cache_len=length)
    parameter = next(model.parameters())
    return StaticCache(
        config=model.config,
        max_batch_size=rows,
        max_cache_len=length,
        device=parameter.device,
        dtype=parameter.dtype,
    )


def inputs_embeds(trial: Trial, case: Case) -> dict[str, float]:
    """A prompt given as `inputs_embeds` continues as the same prompt given as token ids.

    Would have caught: embeddings used at every step, or dropped after the first without their positions.
    """
    pair, prompt, count = prompted(trial, case)
    embedding: Any = pair.port.get_input_embeddings()  # type: ignore[operator]
    embeds = embedding(prompt.to(embedding.weight.device)).detach()
    made = _generate(trial, pair.port, None, inputs_embeds=embeds, max_new_tokens=count)
    whole = dataclasses.replace(made, tokens=torch.cat([prompt, made.tokens], dim=1))
    return _follows(trial, pair, whole, prompt.shape[1], count)


def given(trial: Trial, case: Case) -> dict[str, float]:
    """What generate() is given beside ids and mask reaches forward, with a cache and without: positions, outputs.

    A cache of all tokens but the last is gone on from.
    Would have caught: a prepare_inputs_for_generation that passes on only what its author needed.
    """
    pair, prompt, _ = prompted(trial, dataclasses.replace(case, tokens=max(case.tokens, 2)))
    if not takes(pair.port, "position_ids"):
        raise Skip("forward takes no position_ids")
    # One place further on: positions that do not rise would be read as several texts in one row.
    mask, ids = torch.ones_like(prompt), torch.arange(1, prompt.shape[1] + 1).expand_as(prompt).contiguous()
    expected = port_logits(trial, pair.port, prompt, position_ids=ids, attention_mask=mask)[:, -1]
    numbers = []
    model: Any = pair.port
    for use_cache in (True, False):
        made = model.generate(
            **_moved(trial, {"input_ids": prompt, "attention_mask": mask, "position_ids": ids}),
            max_new_tokens=1,
            do_sample=False,
            use_cache=use_cache,
            output_logits=True,
            output_hidden_states=True,
            return_dict_in_generate=True,
        )
        how = f"with use_cache={use_cache}"
        what = f"logits of generate({how.removeprefix('with ')}) with position_ids"
        numbers.append({"error": require_close(what, made.logits[0].cpu(), expected, bound=_logits_bound(trial))})
        states = getattr(made, "hidden_states", None)
        if _gives_hidden_states(trial, pair) and (not states or not states[0]):
            raise Mismatch(f"generate(output_hidden_states=True) gives none {how}, though forward does")
    with torch.no_grad():
        cached = call_port(trial, pair.port, prompt[:, :-1], use_cache=True).past_key_values
    return worst(*numbers, continues(trial, pair, prompt, 2, past_key_values=cached))


def _gives_hidden_states(trial: Trial, pair: Pair) -> bool:
    if not takes(pair.port, "output_hidden_states", by_keywords=True):
        return False
    output = run_port(trial, pair.port, pair.batch.tokens, output_hidden_states=True)
    return bool(output.get("hidden_states"))


def _moved(trial: Trial, options: Mapping[str, Any]) -> dict[str, Any]:
    device = pytorch.device_of(trial.backend)
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}


def incremental_logits(
    trial: Trial,
    model: torch.nn.Module,
    tokens: torch.Tensor,
    chunks: list[int],
    *,
    cached: Any = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits (rows, tokens, vocabulary) computed chunk by chunk with the port's cache, or a given one, on the CPU.

    mask: (rows, tokens); every call gets it as far as its tokens reach.
    """
    pieces, start = [], 0
    with torch.no_grad():
        for size in chunks:
            options = {} if mask is None else {"attention_mask": mask[:, : start + size]}
            piece = tokens[:, start : start + size]
            output = call_port(trial, model, piece, past_key_values=cached, use_cache=True, **options)
            cached = getattr(output, "past_key_values", None)
            if cached is None:
                raise Mismatch("forward with use_cache=True returned no past_key_values")
            pieces.append(output.logits.cpu())
            start += size
    return torch.cat(pieces, dim=1)


def _incremental(trial: Trial, pair: Pair, chunks: list[int], attention: str = "its own") -> dict[str, float]:
    tokens = pair.batch.tokens
    expected = run_original(trial, pair.original, tokens, pair.batch.targets)["logits"]
    actual = incremental_logits(trial, pair.port, tokens, chunks)
    what = f"logits with a cache, in chunks of {_listed_counts(chunks)} (attention: {attention})"
    return require_semantics(trial, what, actual, expected)


def prompted(trial: Trial, case: Case) -> tuple[Pair, torch.Tensor, int]:
    """The pair, a prompt (rows, tokens), and how many tokens fit behind it: the last one is never fed back."""
    maximum = longest_of(trial.family, case.fields)
    length = max(1, min(case.tokens, maximum - 2))
    pair = prepare(trial, case)
    prompt = draw_batch(
        rows=case.rows, tokens=length, vocabulary=case.fields[trial.family.vocabulary], seed=case.seed
    ).tokens
    return pair, prompt, maximum - length + 1


def _native(trial: Trial) -> Any:
    assert trial.family.generate_original is not None  # the checks need generation
    return trial.family.generate_original


def greedy_tokens(trial: Trial, original: torch.nn.Module, prompt: torch.Tensor, count: int) -> torch.Tensor:
    """The original's greedy continuation by its own loop: prompt and `count` new tokens, (rows, tokens)."""
    with torch.no_grad():
        tokens: torch.Tensor = _native(trial)(original, prompt, max_new_tokens=count, temperature=1.0, top_k=1)
    return tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generated:
    """Prompt and new tokens (rows, tokens), and the raw logits (rows, new tokens, vocabulary) behind each of these.

    A port whose generate gives no logits has None.
    """

    tokens: torch.Tensor
    logits: torch.Tensor | None

    def row(self, number: int, start: int = 0) -> Generated:
        """One row, without its first `start` tokens."""
        part = slice(number, number + 1)
        return Generated(tokens=self.tokens[part, start:], logits=None if self.logits is None else self.logits[part])


def _generate(trial: Trial, model: Any, prompt: torch.Tensor | None, **options: Any) -> Generated:
    if not hasattr(model, "generate"):
        raise Mismatch("the port has no generate(); from transformers 4.50 on a model must inherit GenerationMixin")
    inputs = {"input_ids": prompt} if prompt is not None else {}
    made = model.generate(**_moved(trial, {**inputs, **options}), return_dict_in_generate=True, output_logits=True)
    if isinstance(made, torch.Tensor):
        return Generated(tokens=made.cpu(), logits=None)
    logits = torch.stack(made.logits, dim=1).cpu() if made.logits and "num_beams" not in options else None
    return Generated(tokens=made.sequences.cpu(), logits=logits)


def continues(trial: Trial, pair: Pair, prompt: torch.Tensor, count: int, **options: Any) -> dict[str, float]:
    """Generates greedily with the port, and compares with the original."""
    made = _generate(trial, pair.port, prompt, max_new_tokens=count, **options)
    expected = greedy_tokens(trial, pair.original, prompt, count)
    return worst(_same_tokens(trial, pair, made.tokens, expected), _follows(trial, pair, made, prompt.shape[1], count))


def _follows(trial: Trial, pair: Pair, made: Generated, start: int, count: int) -> dict[str, float]:
    """Checks every generated token, and the logits behind it, against the original on the same tokens before it.

    There have to be `count` of them: the original stops nowhere.
    """
    if made.tokens.shape[1] - start != count:
        raise Mismatch(f"generated {made.tokens.shape[1] - start} tokens behind the prompt, expected {count}")
    maximum = _maximum(trial, pair)
    errors, ties = [0.0], 0.0
    for step in range(made.tokens.shape[1] - start):
        window = made.tokens[:, : start + step][:, -maximum:]
        expected = run_original(trial, pair.original, window, torch.zeros_like(window))["logits"][:, -1]
        if made.logits is not None:
            what = f"logits behind generated token {step}"
            errors.append(require_close(what, made.logits[:, step], expected, bound=_logits_bound(trial)))
        chosen = made.tokens[:, start + step]
        for row in (chosen != expected.argmax(dim=-1)).nonzero().flatten().tolist():
            gap = float(expected[row].max() - expected[row, chosen[row]]) / float(expected.square().mean().sqrt())
            ties += 1.0
            if gap > _tie_bound(trial):
                raise Mismatch(
                    f"generated token {step} of row {row} is {int(chosen[row])}, the original's best is"
                    f" {int(expected[row].argmax())}, ahead by {gap:.1e}",
                    metrics={"gap": gap},
                )
    return {"error": max(errors), **({"near_ties": ties} if ties else {})}


def _logits_bound(trial: Trial) -> float:
    """generate() gives its logits in float32, whatever the model computes in."""
    return max(FLOAT32_INSIDE_BOUND, 1000 * pytorch.epsilon(trial.dtype))


def _tie_bound(trial: Trial) -> float:
    return FLOAT32_INSIDE_BOUND if trial.dtype == "float64" else 1000 * pytorch.epsilon(trial.dtype)


def _same_tokens(trial: Trial, pair: Pair, actual: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    if actual.shape != expected.shape:
        raise Mismatch(f"generated {tuple(actual.shape)} tokens, expected {tuple(expected.shape)}")
    different = first_difference(actual, expected)
    if different is None:
        return {}
    row, position = different
    window = expected[row : row + 1, :position][:, -_maximum(trial, pair) :]
    gap = top_two_gap(run_original(trial, pair.original, window, torch.zeros_like(window))["logits"][0, -1])
    if gap > _tie_bound(trial):
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


def _listed(numbers: list[float]) -> str:
    return ", ".join(f"{number:.5g}" for number in numbers)


def _score(trial: Trial, original: torch.nn.Module, tokens: torch.Tensor, start: int) -> float:
    """Sum of the original's log probabilities of the tokens from `start` on, for one row."""
    steps = range(start, tokens.shape[1])
    return sum(float(_log_probabilities(trial, original, tokens[:, :end])[0, tokens[0, end]]) for end in steps)


def _best_beams(trial: Trial, original: torch.nn.Module, prompt: torch.Tensor, steps: int) -> list[float]:
    """The log probabilities at which a beam search of width `BEAMS` without a stop token ends."""
    beams, scores = prompt, torch.zeros(1, dtype=torch.float64)
    for _ in range(steps):
        candidates = scores[:, None] + _log_probabilities(trial, original, beams)
        best = candidates.flatten().topk(min(BEAMS, candidates.numel()))
        parents, chosen = best.indices // candidates.shape[1], best.indices % candidates.shape[1]
        beams, scores = torch.cat([beams[parents], chosen[:, None]], dim=1), best.values
    numbers: list[float] = scores.tolist()
    return numbers


def _log_probabilities(trial: Trial, original: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return run_original(trial, original, tokens, torch.zeros_like(tokens))["logits"][:, -1].log_softmax(dim=-1)
