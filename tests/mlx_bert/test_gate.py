# SPDX-License-Identifier: Apache-2.0
"""BERT on MLX's description for the harness: its planted bugs as data, its golden files, what it needs MLX for."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from harness.checks import CATALOGUE
from harness.golden import verify
from harness.mutants import Mutant, mutants_of, mutated_source
from harness.ports import family_of, read_ports
from reference_models.mlx_bert.family import FAMILY

REPOSITORY = Path(__file__).parents[2]
PORTS = {port.name: port for port in read_ports(REPOSITORY)}
PORT = PORTS["mlx_bert"]
MUTANTS = mutants_of(FAMILY)


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.id for mutant in MUTANTS])
def test_every_planted_bug_matches_its_file_and_is_still_python(mutant: Mutant) -> None:
    ast.parse(mutated_source(mutant, PORT.root))


def test_what_no_other_port_is_asked_has_a_planted_bug() -> None:
    def asked(port: str) -> set[str]:
        family = family_of(PORTS[port])
        return {check.id for check in CATALOGUE if set(check.needs) <= {*family.features, family.framework}}

    expected = {name for mutant in MUTANTS for name in mutant.killers}
    others = set().union(*(asked(name) for name in PORTS if not name.startswith("mlx_")))
    assert asked("mlx_bert") - others == {"forward.further_inputs", "forward.outputs", "precision.quantised"}
    assert expected >= asked("mlx_bert") - others
    assert expected <= asked("mlx_bert")
    assert sum(not mutant.harmless for mutant in MUTANTS) >= 35
    assert sum(mutant.harmless for mutant in MUTANTS) >= 3


def test_the_golden_vectors_are_reproduced_by_the_original() -> None:
    results = verify(REPOSITORY / "fixtures/golden/mlx_bert")
    assert [result.status for result in results] == ["verified"] * 4, [result.reason for result in results]


def test_the_family_is_read_without_mlx_and_without_torch() -> None:
    code = (
        "import sys; import reference_models.mlx_bert.family;"
        " print([name for name in ('mlx', 'torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
