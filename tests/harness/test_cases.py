# SPDX-License-Identifier: Apache-2.0
"""A defect that no drawn case shows is not found: cases are valid, reach the corners, and make every tensor matter."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.cases import Case, case_from_dict, cases, large_cases
from harness.cases.batches import Side, draw_batch, pad
from harness.cases.weights import sensitising_state
from harness.checks import CATALOGUE
from harness.exploration import explore
from harness.families import find_family
from harness.ports import read_ports
from harness.runner import Options, plan, seed_of
from reference_models.nanogpt.original import GPT

ROOT = Path(__file__).parents[2]
FAMILY = find_family("nanogpt")
SIZES: dict[str, Any] = {
    "block_size": 16,
    "vocab_size": 37,
    "n_layer": 2,
    "n_head": 3,
    "n_embd": 12,
    "dropout": 0.0,
    "bias": True,
}
LEAST_EFFECT = 1e-3
"""What the loss of any one tensor moves the logits by at least: a million times the bound of the comparison."""

CORNERS: dict[str, Callable[[Case], bool]] = {
    "exactly the maximum length": lambda case: case.tokens == case.fields["block_size"],
    "less than the maximum length": lambda case: case.tokens < case.fields["block_size"],
    "one token": lambda case: case.tokens == 1,
    "one head": lambda case: case.fields["n_head"] == 1,
    "several heads": lambda case: case.fields["n_head"] > 1,
    "odd head size": lambda case: case.fields["n_embd"] // case.fields["n_head"] % 2 == 1,
    "bias": lambda case: case.fields["bias"],
    "no bias": lambda case: not case.fields["bias"],
    "several layers": lambda case: case.fields["n_layer"] > 1,
    "several rows": lambda case: case.rows > 1,
    "odd vocabulary": lambda case: case.fields["vocab_size"] % 2 == 1,
}

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def gate_cases(check: str) -> tuple[Case, ...]:
    """The cases a check is given in profile `gate`."""
    drawn: list[Case] = []
    options = Options(checks=[check], backends=["torch-cpu"])
    item = plan(read_ports(ROOT), options)[0]
    explore(
        drawn.append,
        cases(FAMILY),
        examples=item.check.examples,
        seed=seed_of(item, options),
        database=None,
        shrink_seconds=0,
    )
    return tuple(drawn)


def original(fields: dict[str, Any]) -> torch.nn.Module:
    return FAMILY.build_original(GPT, fields)


def sensitised(fields: dict[str, Any], seed: int) -> torch.nn.Module:
    module = original(fields)
    module.load_state_dict(sensitising_state(module, gains=FAMILY.gains, seed=seed))
    return module.double()


def logits(module: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return FAMILY.run_original(module, tokens, None)["logits"]


# Configurations


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(cases(FAMILY))
def test_every_case_builds_an_original_and_a_batch_that_fits(case: Case) -> None:
    module = original(dict(case.fields))
    batch = draw_batch(rows=case.rows, tokens=case.tokens, vocabulary=case.fields["vocab_size"], seed=case.seed)

    assert 1 <= case.tokens <= case.fields["block_size"]
    assert logits(module, batch.tokens).shape == (case.rows, case.tokens, case.fields["vocab_size"])
    assert sum(parameter.numel() for parameter in module.parameters()) < 50_000  # a case costs milliseconds


@pytest.mark.parametrize("corner", CORNERS)
def test_the_gate_reaches_the_corner(corner: str) -> None:
    assert any(map(CORNERS[corner], gate_cases("forward.logits")))


@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("group", ["weights", "masks", "loss", "training", "generation", "precision", "backend"])
def test_the_checks_of_a_group_reach_the_corner_together(group: str, corner: str) -> None:
    drawn = [case for check in CATALOGUE if check.id.startswith(f"{group}.") for case in gate_cases(check.id)]
    assert any(map(CORNERS[corner], drawn))


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(cases(FAMILY))
def test_a_case_is_one_line_that_replays(case: Case) -> None:
    line = json.dumps(case.as_dict())
    assert case_from_dict(json.loads(line)) == case
    assert list(case.as_dict())[-3:] == ["rows", "tokens", "seed"]  # the configuration comes first


def test_a_replayed_case_has_the_same_weights_and_batch() -> None:
    case = Case(fields=SIZES, rows=2, tokens=7, seed=11)
    again = case_from_dict(json.loads(json.dumps(case.as_dict())))
    for key, tensor in sensitised(SIZES, case.seed).state_dict().items():
        assert torch.equal(tensor, sensitised(dict(again.fields), again.seed).state_dict()[key]), key
    assert torch.equal(batch_tokens(case), batch_tokens(again))


def batch_tokens(case: Case) -> torch.Tensor:
    return draw_batch(rows=case.rows, tokens=case.tokens, vocabulary=case.fields["vocab_size"], seed=case.seed).tokens


# Weights


def test_every_value_is_exact_in_float32() -> None:
    # A checkpoint holds float32: a route that rounds could not be told from one that does not.
    for key, tensor in sensitising_state(original(SIZES), gains=FAMILY.gains, seed=3).items():
        assert tensor.dtype == torch.float64, key
        assert torch.equal(tensor.float().double(), tensor), key
        assert tensor.isfinite().all(), key


def test_keys_that_share_a_parameter_get_one_tensor() -> None:
    state = sensitising_state(original(SIZES), gains=FAMILY.gains, seed=3)
    for group in FAMILY.tied:
        assert len({state[key].data_ptr() for key in group}) == 1
    untied = {tensor.data_ptr() for tensor in state.values()}
    assert len(untied) == len(state) - sum(len(group) - 1 for group in FAMILY.tied)


def test_buffers_keep_their_values() -> None:
    module = torch.nn.BatchNorm1d(4)
    module.register_buffer("table", torch.arange(6.0).reshape(2, 3))
    state = sensitising_state(module, gains={}, seed=1)
    assert torch.equal(state["table"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(state["running_var"], torch.ones(4)) and state["num_batches_tracked"] == 0
    assert state["table"].data_ptr() != module.get_buffer("table").data_ptr()
    assert not torch.equal(state["weight"].float(), torch.ones(4))


def test_tensors_have_the_scale_of_their_kind() -> None:
    module = torch.nn.ModuleDict({"up": torch.nn.Linear(400, 300), "norm": torch.nn.LayerNorm(5000)})
    state = sensitising_state(module, gains={r"^up\.weight$": 3.0, r"up": 100.0}, seed=0)
    assert float(state["up.weight"].std()) == pytest.approx(3 / math.sqrt(400), rel=0.02)  # the first that matches
    assert float(state["up.bias"].std()) == pytest.approx(25, rel=0.15)
    assert float(state["norm.weight"].mean()) == pytest.approx(1, abs=0.02)
    assert float(state["norm.weight"].std()) == pytest.approx(0.2, rel=0.1)
    assert float(state["norm.bias"].mean()) == pytest.approx(0, abs=0.02)
    assert float(state["norm.bias"].std()) == pytest.approx(0.25, rel=0.1)


def test_weights_come_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = sensitising_state(original(SIZES), gains=FAMILY.gains, seed=5)
    torch.manual_seed(2)
    second = sensitising_state(original(SIZES), gains=FAMILY.gains, seed=5)
    other = sensitising_state(original(SIZES), gains=FAMILY.gains, seed=6)
    for key in first:
        assert torch.equal(first[key], second[key]), key
        assert not torch.equal(first[key], other[key]), key


def test_no_tensor_can_be_lost_unnoticed() -> None:
    # The reason for such weights: with the default ones a bias that is never loaded changes nothing at all.
    for case in gate_cases("forward.logits"):
        module = original(dict(case.fields))
        initial = {key: tensor.double() for key, tensor in module.state_dict().items()}
        state = sensitising_state(module, gains=FAMILY.gains, seed=case.seed)
        tied = {key: group for group in FAMILY.tied for key in group}
        module = module.double()
        module.load_state_dict(state)
        expected = logits(module, batch_tokens(case))
        for key in state:
            module.load_state_dict(state | dict.fromkeys(tied.get(key, (key,)), initial[key]))
            moved = (logits(module, batch_tokens(case)) - expected).abs().max() / expected.square().mean().sqrt()
            assert float(moved) > LEAST_EFFECT, f"{key} of {case.as_dict()}"


def test_logits_have_a_standard_deviation_near_two() -> None:
    spreads = []
    for case in gate_cases("forward.logits"):
        spreads.append(float(logits(sensitised(dict(case.fields), case.seed), batch_tokens(case)).std()))
    assert min(spreads) > 1.0 and max(spreads) < 4.0
    assert sum(spreads) / len(spreads) == pytest.approx(2.0, abs=0.4)


@pytest.mark.parametrize(("heads", "head_size"), [(4, 1), (1, 4), (2, 3), (4, 6)])
def test_attention_has_a_peak(heads: int, head_size: int) -> None:
    fields = SIZES | {"n_head": heads, "n_embd": heads * head_size}
    uniform = 1 / SIZES["block_size"]
    assert mean_peak(original(fields).double()) < 1.1 * uniform
    assert sum(mean_peak(sensitised(fields, seed)) for seed in range(4)) / 4 > 4 * uniform


def mean_peak(module: torch.nn.Module) -> float:
    """The largest attention weight of a full block's last token, averaged over rows, layers and heads."""
    seen: list[tuple[Any, torch.Tensor]] = []
    for layer in module.transformer.h:  # type: ignore[union-attr]
        layer.attn.register_forward_hook(lambda attention, inputs, output: seen.append((attention, inputs[0])))
    logits(module, draw_batch(rows=3, tokens=16, vocabulary=37, seed=0).tokens)
    peaks = []
    for attention, x in seen:
        size = x.shape[-1] // attention.n_head
        query, key, _ = (part.unflatten(-1, (-1, size)) for part in attention.c_attn(x).split(x.shape[-1], dim=-1))
        scores = torch.einsum("bhd,bkhd->bhk", query[:, -1], key) / math.sqrt(size)
        peaks.append(scores.softmax(dim=-1).max(dim=-1).values)
    return float(torch.stack(peaks).detach().mean())


# Batches


def test_targets_are_the_tokens_shifted_by_one() -> None:
    batch = draw_batch(rows=3, tokens=6, vocabulary=50, seed=2)
    assert batch.tokens.shape == batch.targets.shape == (3, 6)
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert torch.equal(batch.targets[:, :-1], batch.tokens[:, 1:])
    # The last target is a token that was not shown.
    assert not torch.equal(batch.targets[:, -1], batch.tokens[:, -1])


def test_batches_use_the_whole_vocabulary_and_come_from_the_seed() -> None:
    first = draw_batch(rows=3, tokens=200, vocabulary=11, seed=2)
    assert first.tokens.unique().tolist() == list(range(11))
    assert torch.equal(first.tokens, draw_batch(rows=3, tokens=200, vocabulary=11, seed=2).tokens)
    assert not torch.equal(first.tokens, draw_batch(rows=3, tokens=200, vocabulary=11, seed=3).tokens)


SIDES = ("left", "right", "interior")
shapes = st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(0, 6), st.integers(0, 999))


@pytest.mark.parametrize("side", SIDES)
@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(shape=shapes)
def test_padding_keeps_the_first_tokens_of_every_row(side: Side, shape: tuple[int, int, int, int]) -> None:
    rows, count, more, seed = shape
    width = count + more
    tokens = torch.arange(rows * count).reshape(rows, count) + 100  # no pad content looks like one of these
    padded = pad(tokens, side=side, seed=seed, vocabulary=50, width=width)

    assert padded.tokens.shape == padded.mask.shape == (rows, width)
    assert padded.mask.dtype == torch.bool
    assert bool((padded.tokens[~padded.mask] < 50).all())
    for row in range(rows):
        real = padded.tokens[row][padded.mask[row]]
        assert len(real) >= 1
        assert torch.equal(real, tokens[row, : len(real)])
    if width > 1:
        assert not bool(padded.mask[0].all()), "the first row has a pad"


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(shape=shapes)
def test_padding_stands_on_its_side(shape: tuple[int, int, int, int]) -> None:
    rows, count, more, seed = shape
    tokens = torch.zeros(rows, count, dtype=torch.long)
    for side in ("left", "right"):
        steps = pad(tokens, side=side, seed=seed, vocabulary=50, width=count + more).mask.long().diff(dim=1)
        assert bool((steps >= 0).all() if side == "left" else (steps <= 0).all())
    mask = pad(tokens, side="interior", seed=seed, vocabulary=50, width=count + more).mask
    for row in mask:
        assert row[0]
        assert row[-1] or int(row.sum()) == 1


@pytest.mark.parametrize("side", SIDES)
def test_rows_are_padded_differently(side: Side) -> None:
    tokens = torch.zeros(8, 6, dtype=torch.long)
    masks = pad(tokens, side=side, seed=4, vocabulary=50, width=8).mask
    assert len(masks.sum(dim=1).unique()) > 2


@pytest.mark.parametrize("side", SIDES)
def test_pad_content_is_random(side: Side) -> None:
    # A constant pad id would hide a model that treats one id as padding without being told.
    padded = pad(torch.zeros(4, 4, dtype=torch.long), side=side, seed=4, vocabulary=50, width=12)
    assert len(padded.tokens[~padded.mask].unique()) > 5


def test_a_row_of_one_position_cannot_be_padded() -> None:
    padded = pad(torch.tensor([[7]]), side="left", seed=0, vocabulary=50, width=1)
    assert padded.tokens.tolist() == [[7]]
    assert padded.mask.tolist() == [[True]]


def test_large_cases_are_one_row_of_the_full_length_beyond_anything_that_is_drawn() -> None:
    drawn = [case for check in ("forward.logits", "forward.blocks") for case in gate_cases(check)]
    large = [big for _, big in large_cases(FAMILY, drawn[0])]
    assert {(case.rows, case.tokens - case.fields["block_size"]) for case in large} == {(1, 0)}
    for name, least in (("n_layer", 11), ("block_size", 2050), ("vocab_size", 1 << 15), ("n_head", 9)):
        assert max(case.fields[name] for case in large) >= least > max(case.fields[name] for case in drawn)
    assert max(case.fields["n_embd"] // case.fields["n_head"] for case in large) > 64
    assert {case.fields["bias"] for case in large} == {True, False}


def test_a_family_without_large_sizes_has_no_large_cases() -> None:
    family = dataclasses.replace(FAMILY, large=())
    assert list(large_cases(family, gate_cases("forward.logits")[0])) == []
