# SPDX-License-Identifier: Apache-2.0
"""A failure that names the wrong module costs an afternoon: a bug planted in a module is found in that module."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from harness.capture import capture
from harness.cases import Case
from harness.errors import Mismatch
from harness.families import Family, Tap, find_family
from harness.localise import compare_taps, first_divergence
from harness.mutants import Mutant, mutants_of, plant
from harness.ports import Port, read_ports
from harness.runner import Session, session
from harness.trial import Trial, prepare

ROOT = Path(__file__).parents[2]
FAMILY = find_family("nanogpt")
PORT = next(port for port in read_ports(ROOT) if port.name == "nanogpt")
MUTANTS = {mutant.id: mutant for mutant in mutants_of(FAMILY)}
CASE = Case(
    fields={
        "block_size": 8,
        "vocab_size": 13,
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 8,
        "dropout": 0.0,
        "bias": True,
    },
    rows=2,
    tokens=6,
    seed=5,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shared() -> Iterator[Session]:
    with session() as opened:
        yield opened


def trial_of(
    port: Port, shared: Session, workdir: Path, *, family: Family = FAMILY, route: str = "checkpoint"
) -> Trial:
    return Trial(
        port=port,
        family=family,
        route=route,
        backend="torch-cpu",
        dtype="float64",
        workdir=workdir,
        sandbox=shared.sandbox,
    )


@pytest.mark.parametrize(
    ("mutant", "tap"),
    [
        ("gelu-tanh", "block.0.mlp"),
        ("scale-missing", "block.0.attn"),
        ("not-causal", "block.0.attn"),
        ("last-norm-missing", "logits"),  # it runs, and its output is dropped behind its tap
        ("epsilon-of-last-norm", "final_norm"),
        ("position-from-one", "embedding"),
        ("embedding-scaled", "embedding"),
        ("attention-residual-dropped", "block.0.ln_2"),
        ("mlp-residual-dropped", "block.0"),
        ("converter-repeats-a-layer", "block.1.ln_1"),
        ("logits-scaled", "logits"),
    ],
)
def test_a_planted_bug_is_found_where_it_is(mutant: str, tap: str | None, shared: Session, tmp_path: Path) -> None:
    planted = plant(MUTANTS[mutant], PORT, tmp_path / "port")
    assert first_divergence(trial_of(planted, shared, tmp_path), CASE) == tap


def test_a_correct_port_diverges_nowhere(shared: Session, tmp_path: Path) -> None:
    assert first_divergence(trial_of(PORT, shared, tmp_path), CASE) is None


def test_a_harmless_rewrite_diverges_nowhere(shared: Session, tmp_path: Path) -> None:
    planted = plant(MUTANTS["harmless-three-projections"], PORT, tmp_path / "port")
    assert first_divergence(trial_of(planted, shared, tmp_path), CASE) is None


def test_a_failure_in_a_fresh_process_is_looked_for_in_this_one(shared: Session, tmp_path: Path) -> None:
    planted = plant(MUTANTS["gelu-tanh"], PORT, tmp_path / "port")
    assert first_divergence(trial_of(planted, shared, tmp_path, route="remote_code"), CASE) == "block.0.mlp"


def test_rounding_is_no_divergence(shared: Session, tmp_path: Path) -> None:
    trial = dataclasses.replace(trial_of(PORT, shared, tmp_path), dtype="bfloat16")
    assert first_divergence(trial, CASE) is None


def test_a_port_that_cannot_run_is_nowhere_rather_than_an_error(shared: Session, tmp_path: Path) -> None:
    broken = Mutant(
        id="raises",
        file=MUTANTS["gelu-tanh"].file,
        find="self.gelu = nn.GELU()",
        replace="raise RuntimeError('no')",
        bug="cannot be built",
        killers=("*",),
    )
    planted = plant(broken, PORT, tmp_path / "port")
    assert first_divergence(trial_of(planted, shared, tmp_path), CASE) is None


def test_taps_are_compared_in_the_order_data_passes(shared: Session, tmp_path: Path) -> None:
    trial = trial_of(PORT, shared, tmp_path)
    found = compare_taps(trial, CASE, prepare(trial, CASE))
    parts = ("ln_1", "attn", "ln_2", "mlp")
    blocks = [name for layer in (0, 1) for name in (*(f"block.{layer}.{part}" for part in parts), f"block.{layer}")]
    assert [name for name, _, _ in found] == ["embedding", *blocks, "final_norm"]
    for name, ours, theirs in found:
        assert ours.shape == theirs.shape == (2, 6, 8), name
        assert ours.dtype == theirs.dtype == torch.float64, name


def test_taps_that_a_port_has_not_are_left_out(shared: Session, tmp_path: Path) -> None:
    def taps(fields: object) -> list[Tap]:
        return [
            Tap(name="elsewhere", original="transformer.drop", port="model.dropout"),
            Tap(name="final_norm", original="transformer.ln_f", port="transformer.ln_f"),
        ]

    trial = trial_of(PORT, shared, tmp_path, family=dataclasses.replace(FAMILY, taps=taps))
    assert [name for name, _, _ in compare_taps(trial, CASE, prepare(trial, CASE))] == ["final_norm"]
    untapped = dataclasses.replace(trial, family=dataclasses.replace(FAMILY, taps=None))
    assert compare_taps(untapped, CASE, prepare(untapped, CASE)) == []
    assert first_divergence(untapped, CASE) is None
    planted = plant(MUTANTS["gelu-tanh"], PORT, tmp_path / "port")
    assert first_divergence(dataclasses.replace(untapped, port=planted), CASE) == "logits"


class Twofold(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
        return x + 1, "weights"


def test_capture_takes_the_first_of_a_tuple_and_leaves_no_hooks_behind() -> None:
    model = torch.nn.Sequential(torch.nn.Identity(), Twofold())
    result, seen = capture(model, {"first": "0", "second": "1"}, lambda: model(torch.zeros(2)))
    assert result[1] == "weights"
    assert seen["first"].tolist() == [0, 0]
    assert seen["second"].tolist() == [1, 1]
    with pytest.raises(ZeroDivisionError):
        capture(model, {"first": "0"}, lambda: 1 / 0)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_module_that_is_not_there_or_does_not_run_is_named() -> None:
    model = torch.nn.Sequential(torch.nn.Identity(), Twofold())
    with pytest.raises(Mismatch, match="Sequential has no submodule '2', for 'third'"):
        capture(model, {"third": "2"}, lambda: model(torch.zeros(2)))
    with pytest.raises(Mismatch, match="Sequential did not run the submodules of second"):
        capture(model, {"first": "0", "second": "1"}, lambda: model[0](torch.zeros(2)))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_module_whose_parts_are_called_one_by_one_may_be_left_out() -> None:
    inner = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity())
    model = torch.nn.ModuleDict({"parts": inner, "whole": torch.nn.Identity(), "idle": torch.nn.Identity()})
    places = {"parts": "parts", "whole": "whole"}

    def call() -> object:
        return model["whole"](inner[1](inner[0](torch.zeros(2))))

    assert list(capture(model, places, call, in_parts=True)[1]) == ["whole"]
    with pytest.raises(Mismatch, match="did not run the submodules of parts"):
        capture(model, places, call)
    with pytest.raises(Mismatch, match="did not run the submodules of idle"):
        capture(model, {**places, "idle": "idle"}, call, in_parts=True)


def test_a_module_that_returns_no_tensor_is_named() -> None:
    model = torch.nn.Sequential(torch.nn.Identity())
    with pytest.raises(Mismatch, match="submodule '0' returns NoneType, expected a tensor first"):
        capture(model, {"first": "0"}, lambda: model(None))


def test_a_sum_in_place_is_no_divergence(shared: Session, tmp_path: Path) -> None:
    harmless = Mutant(
        id="in-place",
        file=MUTANTS["gelu-tanh"].file,
        find="        hidden_states = hidden_states + attended\n",
        replace="        hidden_states += attended\n",
        bug="the residual sum in place",
    )
    planted = plant(harmless, PORT, tmp_path / "port")
    assert first_divergence(trial_of(planted, shared, tmp_path), CASE) is None
