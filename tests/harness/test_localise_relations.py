# SPDX-License-Identifier: Apache-2.0
"""A relation that is named wrongly sends its reader astray: each is found where it holds, and nowhere else."""

import pytest
import torch

from harness.localise.relations import describe_order, number, order_between, relation_of_outputs
from harness.localise.tensors import edits
from harness.localise.weights import relation_of_tensors

GENERATOR = torch.Generator().manual_seed(11)
EXPECTED = torch.randn(2, 5, 6, generator=GENERATOR, dtype=torch.float64)
GIVEN = torch.randn(2, 5, 6, generator=GENERATOR, dtype=torch.float64)
BIAS = torch.randn(6, generator=GENERATOR, dtype=torch.float64)


def relation(actual: torch.Tensor, expected: torch.Tensor = EXPECTED) -> str | None:
    return relation_of_outputs(actual, expected, GIVEN, error=1.0, bound=1e-9, vectors={"c_proj.bias": BIAS})


@pytest.mark.parametrize(
    ("actual", "words"),
    [
        (EXPECTED * 0, "is zero"),
        (GIVEN, "is its input, as if it were not there"),
        (EXPECTED + GIVEN, "has its input added"),
        (EXPECTED - GIVEN, "lacks its input, which the original adds"),
        (4 * EXPECTED, "is 4x the original's"),
        (EXPECTED / 3, "is 0.3333x the original's"),
        (-EXPECTED, "is the original's with the opposite sign"),
        (EXPECTED - BIAS, "is the original's without c_proj.bias"),
        (EXPECTED + BIAS, "is the original's with c_proj.bias once too often"),
        (EXPECTED + 0.5, "is the original's plus 0.5"),
        (EXPECTED + GIVEN[0, 0], "differs from the original's by the same vector at every position"),
        (EXPECTED.roll(1, dims=1), "is the original's, one position too late"),
        (EXPECTED.roll(-1, dims=1), "is the original's, one position too early"),
        (EXPECTED[..., [1, 0, 3, 2, 5, 4]], "has channels in another order"),
        (EXPECTED[..., [3, 4, 5, 0, 1, 2]], "has its 2 heads in reverse"),
        (EXPECTED[..., [0, 2, 4, 1, 3, 5]], "has channels dealt to 2 heads in turn instead of in blocks"),
        (EXPECTED[..., [0, 3, 1, 4, 2, 5]], "has channels dealt to 3 heads in turn instead of in blocks"),
        (EXPECTED[..., [2, 3, 0, 1, 4, 5]], "has q and k exchanged"),
        (EXPECTED[..., [5, 0, 1, 2, 3, 4]], "has channels shifted by one"),
        (EXPECTED[..., [5, 1, 3, 2, 0, 4]], "has channels in another order"),
        (EXPECTED.transpose(0, 1), "is the original's with axes 0 and 1 exchanged"),
        (EXPECTED[:, -1:], "has the last position alone"),
    ],
)
def test_a_simple_relation_of_outputs_is_found(actual: torch.Tensor, words: str) -> None:
    assert relation(actual) == words


def test_nothing_is_said_of_tensors_that_have_nothing_to_do_with_each_other() -> None:
    assert relation(torch.randn(2, 5, 6, generator=GENERATOR, dtype=torch.float64)) is None
    assert relation(4 * EXPECTED + 1e-6 * GIVEN) is None
    assert relation(torch.full_like(EXPECTED, float("nan"))) is None
    assert relation(EXPECTED[:, :, :3]) is None


def test_two_positions_are_too_few_to_call_a_difference_constant() -> None:
    one = torch.tensor([[[1.0, 2.0, 4.0]]], dtype=torch.float64)
    assert relation_of_outputs(one + torch.tensor([0.1, 0.5, 0.2]), one, error=1.0, bound=1e-9) is None


def test_what_a_bound_allows_is_no_explanation_of_a_difference_as_small() -> None:
    actual = EXPECTED * (1 + 3e-5) + 2e-6 * GIVEN
    assert relation_of_outputs(actual, EXPECTED, error=3e-5, bound=1e-5) is None


def test_orders_are_described_as_people_call_them() -> None:
    assert describe_order(torch.tensor([4, 0, 1, 2, 3]), "rows") == "rows shifted by one"
    assert describe_order(torch.tensor([4, 3, 2, 1, 0]), "rows") == "rows in reverse"
    assert describe_order(torch.tensor([0, 1, 4, 5, 2, 3]), "rows") == "k and v exchanged"
    assert describe_order(torch.tensor([2, 3, 4, 5, 0, 1]), "rows") == "q, k, v taken as k, v, q"
    assert describe_order(torch.tensor([0, 3, 2, 1]), "rows") == "rows in another order"
    blocks = torch.arange(8).view(4, 2)[[2, 0, 3, 1]].flatten()
    assert describe_order(blocks, "rows") == "rows in another order, in 4 blocks (2, 0, 3, 1)"


def test_an_order_is_only_one_where_every_column_has_a_partner() -> None:
    assert order_between(EXPECTED, EXPECTED) is None
    doubled = EXPECTED[..., [0, 0, 2, 3, 4, 5]]
    assert order_between(doubled, EXPECTED) is None


@pytest.mark.parametrize(("value", "text"), [(4.0, "4"), (0.3333333, "0.3333"), (-0.5, "-0.5"), (1.0001, "1.0001")])
def test_factors_are_written_as_people_write_them(value: float, text: str) -> None:
    assert number(value) == text


SQUARE = torch.randn(6, 6, generator=GENERATOR)
TABLE = torch.randn(6, 3, generator=GENERATOR)
GAIN = torch.randn(6, generator=GENERATOR)
OTHER = torch.randn(6, 6, generator=GENERATOR)


@pytest.mark.parametrize(
    ("actual", "expected", "words"),
    [
        (OTHER, SQUARE, "holds the original's other"),
        (SQUARE.T, SQUARE, "is the original's own transposed"),
        (TABLE.T, TABLE, "is the original's own transposed"),
        (SQUARE / 8, SQUARE, "is 0.125x the original's own"),
        (0 * SQUARE, SQUARE, "is zero, and not the original's own"),
        (torch.ones(6), GAIN, "is one throughout, and not the original's own"),
        (SQUARE.bfloat16().float(), SQUARE, "is the original's own rounded to bfloat16"),
        (SQUARE.half().float(), SQUARE, "is the original's own rounded to float16"),
        (TABLE.roll(1, 0), TABLE, "is the original's own with rows shifted by one"),
        (torch.cat([TABLE[:1], TABLE[:-1]]), TABLE, "is the original's own with rows shifted by one"),
        (TABLE[[2, 3, 0, 1, 4, 5]], TABLE, "is the original's own with q and k exchanged"),
        (TABLE[[3, 4, 5, 0, 1, 2]], TABLE, "is the original's own with its 2 heads in reverse"),
        (SQUARE[:, [0, 2, 4, 1, 3, 5]], SQUARE, "is the original's own with channels dealt to 2 heads"),
        (GAIN[[2, 3, 0, 1, 4, 5]], GAIN, "is the original's own with q and k exchanged"),
        (torch.cat([TABLE[:4], 0 * TABLE[4:]]), TABLE, "is the original's own but for 2 of 6 rows, from row 4 on"),
    ],
)
def test_a_simple_relation_of_tensors_is_found(actual: torch.Tensor, expected: torch.Tensor, words: str) -> None:
    found = relation_of_tensors("own", "own", {"own": expected, "other": OTHER}, {"own": actual}, {"own": "own"})
    assert found is not None
    assert found.startswith(words)


def test_tensors_that_changed_places_are_named_both() -> None:
    names = {"a": "a", "b": "b"}
    words = relation_of_tensors("a", "a", {"a": SQUARE, "b": OTHER}, {"a": OTHER, "b": SQUARE}, names)
    assert words == "holds the original's b, and b holds a: they have changed places"


def test_nothing_is_said_of_a_tensor_that_was_drawn_anew() -> None:
    assert relation_of_tensors("a", "a", {"a": SQUARE}, {"a": OTHER}, {"a": "a"}) is None


def test_what_if_edits_change_what_they_say() -> None:
    linear = torch.nn.Linear(6, 6)
    said = dict(edits(linear, others={"elsewhere": torch.zeros(6)}))
    assert torch.equal(said["as if its weight were transposed"]["weight"], linear.weight.T)
    assert torch.equal(said["as if its bias were zero"]["bias"], torch.zeros(6))
    assert torch.equal(said["as if elsewhere stood in the place of its bias"]["bias"], torch.zeros(6))
    exchanged = said["it has q and k exchanged"]
    assert torch.equal(exchanged["weight"], linear.weight[[2, 3, 0, 1, 4, 5]])
    assert torch.equal(exchanged["bias"], linear.bias[[2, 3, 0, 1, 4, 5]])
