# SPDX-License-Identifier: Apache-2.0
"""NeoBERT's description for the harness: planted bugs as data, drawn models, golden vectors, dialects of its files."""

from __future__ import annotations

import ast
import dataclasses
import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from harness.cases import Case, cases
from harness.checks import CATALOGUE
from harness.families import padding_of, tied_of
from harness.golden import verify
from harness.mutants import Mutant, mutants_of, mutated_source
from harness.ports import load_object
from reference_models.nanogpt.family import FAMILY as NANOGPT
from reference_models.neobert import original
from reference_models.neobert.configuration_neobert import NeoBERTConfig
from reference_models.neobert.family import FAMILY
from reference_models.neobert.model import NeoBERTLMHead

REPOSITORY = Path(__file__).parents[2]
MUTANTS = mutants_of(FAMILY)
# What nanoGPT is not asked, or is asked of a function only: a mask of the original's own, a program and its tokenizer.
OF_PROGRAMS = {"masks.original", "weights.program", "weights.configuration"}


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.id for mutant in MUTANTS])
def test_every_planted_bug_matches_its_file_and_is_still_python(mutant: Mutant) -> None:
    ast.parse(mutated_source(mutant, REPOSITORY))


def test_every_check_that_only_this_family_is_asked_has_a_planted_bug_that_it_has_to_notice() -> None:
    asked = {check.id for check in CATALOGUE if set(check.needs) <= {*FAMILY.features, FAMILY.framework}}
    own = {
        name for name in asked if not set(_check(name).needs) <= {*NANOGPT.features, NANOGPT.framework}
    } | OF_PROGRAMS
    assert own > OF_PROGRAMS
    expected = {pattern for mutant in MUTANTS for pattern in mutant.killers}
    assert own <= expected
    for pattern in expected:
        assert fnmatch.filter(asked, pattern), pattern
    assert sum(not mutant.harmless for mutant in MUTANTS) >= 60
    assert sum(mutant.harmless for mutant in MUTANTS) >= 2


def _check(name: str) -> Any:
    return next(check for check in CATALOGUE if check.id == name)


def test_the_golden_vectors_are_reproduced() -> None:
    results = verify(REPOSITORY / "fixtures/golden/neobert")
    assert len(results) == 6
    for result in results:
        assert result.status == "verified", result.reason


def test_defaults_are_those_of_the_training_class_and_of_the_exported_one() -> None:
    assert FAMILY.defaults is not None
    defaults = dict(FAMILY.defaults)
    assert defaults == {name: getattr(NeoBERTConfig(), name) for name in defaults}
    trained = {field.name: field.default for field in dataclasses.fields(original.NeoBERTConfig)}
    assert {**defaults, "vocab_size": 32064} == {name: trained[name] for name in defaults}


def test_every_drawn_model_can_be_built_and_has_the_places_that_are_compared() -> None:
    drawn = []

    @settings(max_examples=40, database=None, derandomize=True, deadline=None)
    @given(cases(FAMILY))
    def draw(case: Case) -> None:
        fields = case.fields
        module = FAMILY.build_original(load_object(FAMILY.original, root=REPOSITORY), fields)
        port = NeoBERTLMHead(NeoBERTConfig(**fields))
        assert FAMILY.taps is not None
        for tap in FAMILY.taps(fields):
            module.get_submodule(tap.original)
            port.get_submodule(tap.port)
        state = module.state_dict()
        for first, second in tied_of(FAMILY, fields):
            assert state[first].data_ptr() == state[second].data_ptr()
        drawn.append(fields)

    draw()
    assert {fields["rope"] for fields in drawn} == {fields["tie_word_embeddings"] for fields in drawn} == {True, False}
    assert {padding_of(FAMILY, fields) for fields in drawn} > {None, 0}


def test_the_plainest_model_has_one_of_everything() -> None:
    with torch.random.fork_rng():
        plain = FAMILY.build_original(original.NeoBERTLMHead, {"num_hidden_layers": 1, "hidden_size": 4, **ONE})
    assert sum(tensor.numel() for tensor in plain.state_dict().values()) < 1000


ONE: dict[str, Any] = {"num_attention_heads": 1, "intermediate_size": 9, "vocab_size": 11, "max_length": 4}


@pytest.mark.parametrize("fields", FAMILY.refused, ids=str)
def test_what_is_refused_is_refused_by_both_with_its_name(fields: dict[str, Any]) -> None:
    base = {**ONE, "num_hidden_layers": 1, "hidden_size": 4, "rope": False, "hidden_act": "gelu"}
    for cls in (original.NeoBERTConfig, NeoBERTConfig):
        with pytest.raises(ValueError, match=next(iter(fields))):
            cls(**{**base, **fields})
