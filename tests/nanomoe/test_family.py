# SPDX-License-Identifier: Apache-2.0
"""nanoMoE's descriptions for the harness: planted bugs as data, taps, and models without drops or choices."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from harness.cases import Case, cases
from harness.checks import CATALOGUE
from harness.families import Family
from harness.golden import verify
from harness.mutants import Mutant, mutants_of, mutated_source
from harness.ports import load_object
from harness.routing import watch_layers
from reference_models.nanogpt.family import FAMILY as NANOGPT
from reference_models.nanomoe.configuration_nanomoe_gpt import GPTConfig
from reference_models.nanomoe.family import ANCESTOR, FAMILY
from reference_models.nanomoe.modeling_nanomoe_gpt import GPT

REPOSITORY = Path(__file__).parents[2]
FAMILIES = [FAMILY, ANCESTOR]
MUTANTS = [mutant for family in FAMILIES for mutant in mutants_of(family)]

families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.id for mutant in MUTANTS])
def test_every_planted_bug_matches_its_file_and_is_still_python(mutant: Mutant) -> None:
    ast.parse(mutated_source(mutant, REPOSITORY))


def test_every_check_that_nanogpt_is_not_asked_has_a_planted_bug_that_it_has_to_notice() -> None:
    expected = {name for mutant in mutants_of(FAMILY) for name in mutant.killers}
    asked = {check.id for check in CATALOGUE if set(check.needs) <= {*FAMILY.features, FAMILY.framework}}
    asked -= {check.id for check in CATALOGUE if set(check.needs) <= {*NANOGPT.features, NANOGPT.framework}}
    assert {name.partition(".")[0] for name in asked} == {"routing", "api"}
    assert asked <= expected
    assert sum(not mutant.harmless for mutant in mutants_of(FAMILY)) >= 60
    assert sum(mutant.harmless for mutant in mutants_of(FAMILY)) >= 2


def test_the_golden_vectors_are_reproduced() -> None:
    results = verify(REPOSITORY / "fixtures/golden/nanomoe")
    assert len(results) == 9
    for result in results:
        assert result.status == "verified", result.reason


def test_defaults_are_those_of_the_originals() -> None:
    for family in FAMILIES:
        cls = load_object(f"{family.original.partition(':')[0]}:GPTConfig", root=REPOSITORY)
        assert family.defaults == {name: p.default for name, p in inspect.signature(cls).parameters.items()}


def both(family: Family, fields: Any) -> tuple[Any, Any]:
    original = family.build_original(load_object(family.original, root=REPOSITORY), fields)
    torch.manual_seed(0)
    return original, GPT(GPTConfig(**fields, **family.port_fields)).eval()


@families
def test_every_drawn_model_can_be_built_and_has_the_places_that_are_compared(family: Family) -> None:
    drawn = []

    @settings(max_examples=25, database=None, derandomize=True, deadline=None)
    @given(cases(family, "routed"))
    def draw(case: Case) -> None:
        original, port = both(family, case.fields)
        assert family.taps is not None and family.routing is not None
        layers = family.routing.layers(case.fields)
        for tap in [*family.taps(case.fields), *(place for layer in layers for place in vars(layer).values())]:
            original.get_submodule(tap.original)
            port.get_submodule(tap.port)
        drawn.append(layers)

    draw()
    assert any(len(layers) > 1 for layers in drawn)


@families
def test_where_tokens_are_independent_nothing_is_dropped(family: Family) -> None:
    dropped = []

    @settings(max_examples=25, database=None, derandomize=True, deadline=None)
    @given(cases(family, "routed"))
    def draw(case: Case) -> None:
        assert family.routing is not None and family.independent is not None and family.continuous is not None
        for near in (family.independent(case.fields), family.continuous(case.fields)):
            for tokens in (1, 2, 7, 48, 300):
                assert family.routing.capacity(near, tokens, True) >= tokens
                assert family.routing.capacity(near, tokens, False) >= tokens
        assert family.continuous(case.fields)["top_k"] == case.fields["n_exp"]
        crowded = family.routing.crowded(case.fields)
        dropped.append(family.routing.capacity(crowded, 1000, False) * crowded["n_exp"] < 1000 * crowded["top_k"])

    draw()
    assert all(dropped)


@families
def test_routers_expose_what_the_closed_form_decides(family: Family) -> None:
    routing: Any = family.routing
    fields = {**dict(family.defaults or {}), "block_size": 12, "vocab_size": 17, "n_layer": 2, "n_head": 2, "n_embd": 8}
    fields |= {"n_exp": 4, "top_k": 2, "eval_capacity": 0.5, "min_capacity": 1, "stride": 1}
    original, port = both(family, fields)
    tokens = torch.randint(0, 17, (3, 12), generator=torch.Generator().manual_seed(0))
    layers = routing.layers(fields)
    for side, model in (("original", original), ("port", port)):
        _, seen = watch_layers(model, layers, side, lambda model=model: model(tokens))
        assert len(seen) == 2
        for there in seen.values():
            decision, said = routing.decide(there.logits, fields, False), routing.exposed(there.router)
            assert not bool(decision.keep.all())
            for name in ("indices", "ranks", "keep"):
                assert torch.equal(said[name], getattr(decision, name))
    assert routing.exposed(torch.zeros(2, 2)) is None
