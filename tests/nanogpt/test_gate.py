# SPDX-License-Identifier: Apache-2.0
"""nanoGPT's description for the harness: its planted bugs as data, its golden vectors, its own functions."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from harness.checks import CATALOGUE
from harness.golden import verify
from harness.mutants import Mutant, mutants_of, mutated_source
from harness.ports import family_of, read_ports
from reference_models.nanogpt.family import FAMILY, read_checkpoint, write_checkpoint
from reference_models.nanogpt.original import GPT

REPOSITORY = Path(__file__).parents[2]
PORT = read_ports(REPOSITORY)[0]
MUTANTS = mutants_of(family_of(PORT))
FIELDS = {"block_size": 6, "vocab_size": 13, "n_layer": 2, "n_head": 2, "n_embd": 8, "dropout": 0.0, "bias": True}


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.id for mutant in MUTANTS])
def test_every_planted_bug_matches_its_file_and_is_still_python(mutant: Mutant) -> None:
    ast.parse(mutated_source(mutant, PORT.root))


def test_every_check_has_a_planted_bug_that_it_has_to_notice() -> None:
    expected = {name for mutant in MUTANTS for name in mutant.killers}
    asked = {check.id for check in CATALOGUE if set(check.needs) <= {*FAMILY.features, FAMILY.framework}}
    # The original takes no mask, and the port's converter is no program: tests/neobert looks after those.
    assert expected == asked - {"masks.original", "weights.program"}
    assert sum(not mutant.harmless for mutant in MUTANTS) >= 100
    assert sum(mutant.harmless for mutant in MUTANTS) >= 5


def test_the_golden_vectors_are_reproduced_to_1e_12() -> None:
    results = verify(REPOSITORY / "fixtures/golden/nanogpt")
    assert len(results) == 4
    for result in results:
        assert result.status == "verified", result.reason
        # float32 outputs come from one machine's kernels; the statement is about float64.
        assert max(error for name, error in result.errors.items() if "f64" in name) <= 1e-12


def test_taps_lead_to_modules_of_both_models() -> None:
    from reference_models.nanogpt.configuration_nanogpt import NanoGPTConfig
    from reference_models.nanogpt.modeling_nanogpt import NanoGPTLMHeadModel

    assert FAMILY.taps is not None
    original, port = FAMILY.build_original(GPT, FIELDS), NanoGPTLMHeadModel(NanoGPTConfig(**FIELDS))
    for tap in FAMILY.taps(FIELDS):
        original.get_submodule(tap.original)
        port.get_submodule(tap.port)


def test_the_original_resumes_from_its_own_file(tmp_path: Path) -> None:
    original = FAMILY.build_original(GPT, FIELDS)
    write_checkpoint(original, FIELDS, tmp_path / "ckpt.pt")
    fields, state = read_checkpoint(str(tmp_path / "ckpt.pt"))
    assert fields == FIELDS
    again = FAMILY.build_original(GPT, fields)
    again.load_state_dict(state, strict=True)
    for name, tensor in original.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_parameter_groups_cover_every_parameter_once() -> None:
    assert FAMILY.parameter_groups is not None
    original = FAMILY.build_original(GPT, FIELDS)
    grouped = [id(p) for group in FAMILY.parameter_groups(original, 0.1) for p in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in original.parameters())
