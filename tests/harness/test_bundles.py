# SPDX-License-Identifier: Apache-2.0
"""A failure on a machine one cannot reach is useless unless its bundle replays it, whole and without any pickle."""

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness import bundles
from harness.cases import Case
from harness.cases.batches import draw_batch
from harness.cases.weights import sensitising_state
from harness.errors import DescriptionError, Mismatch
from harness.families import find_family
from harness.isolation import gate
from harness.mutants import mutants_of, plant
from harness.numerics import relative_error
from harness.ports import Port, read_ports
from harness.results import Result, as_json
from harness.runner import Options, Session, check_parity, plan, session, trial_of
from harness.trial import Trial, draw
from reference_models.nanogpt.original import GPT

ROOT = Path(__file__).parents[2]
FAMILY = find_family("nanogpt")
PORT = next(port for port in read_ports(ROOT) if port.name == "nanogpt")
CHECK = "forward.lengths"
FIELDS: dict[str, Any] = {
    "block_size": 6,
    "vocab_size": 13,
    "n_layer": 1,
    "n_head": 1,
    "n_embd": 4,
    "dropout": 0.0,
    "bias": True,
}


@dataclasses.dataclass(frozen=True)
class Failed:
    """A failed result, the broken port, and where its bundle is."""

    result: Result
    port: Port
    bundle: Path

    @property
    def document(self) -> dict[str, Any]:
        return json.loads((self.bundle / "failure.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Failed:
    folder = tmp_path_factory.mktemp("failed")
    mutant = next(mutant for mutant in mutants_of(FAMILY) if mutant.id == "gelu-tanh")
    port = plant(mutant, PORT, folder / "port")
    [result] = check_parity(port, checks=[CHECK], backends=["torch-cpu"], report=folder / "report", shrink_seconds=1.0)
    assert result.status == "failed"
    assert result.bundle is not None
    return Failed(result, port, Path(result.bundle))


@pytest.fixture
def copied(failed: Failed, tmp_path: Path) -> Path:
    """A bundle that a test may damage."""
    return Path(shutil.copytree(failed.bundle, tmp_path / "bundle"))


# What is in it


def test_a_bundle_is_json_and_safetensors_and_nothing_else(failed: Failed) -> None:
    names = sorted(path.name for path in failed.bundle.iterdir())
    assert names == ["batch.safetensors", "failure.json", "outputs.safetensors", "weights.safetensors"]
    for path in failed.bundle.glob("*.safetensors"):
        assert load_file(path)  # a pickle or a zip archive of one would not be read


def test_it_stands_where_reports_stand_under_a_name_that_says_what_failed(failed: Failed) -> None:
    assert failed.bundle.parent.name == "bundles"
    assert failed.bundle.name == "nanogpt-forward.lengths-checkpoint-torch-cpu-float64"


def test_the_description_has_result_case_port_versions_and_the_command(failed: Failed) -> None:
    document = failed.document
    recorded = as_json(dataclasses.replace(failed.result, bundle=None))
    assert {**document["result"], "seconds": 0} == {**json.loads(json.dumps(recorded)), "seconds": 0}
    assert document["case"] == document["result"]["config"]
    assert document["replay"] == f"parity repro {failed.bundle}"
    assert document["versions"]["torch"] == torch.__version__
    assert {"python", "platform", "transformers", "safetensors"} <= set(document["versions"])
    assert document["port"]["root"] == str(failed.port.root)


def test_it_reads_back_as_it_was(failed: Failed) -> None:
    port, case, recorded = bundles.read(failed.bundle)
    assert dataclasses.replace(port, code=tuple(port.code)) == dataclasses.replace(
        failed.port, code=tuple(failed.port.code)
    )
    assert case.as_dict() == failed.result.config
    assert recorded["check"] == CHECK
    assert bundles.read(failed.bundle / "failure.json")[1] == case


def test_weights_and_batch_are_those_that_the_case_draws(failed: Failed) -> None:
    _, case, _ = bundles.read(failed.bundle)
    module = FAMILY.build_original(GPT, case.fields)
    expected = sensitising_state(module, gains=FAMILY.gains, seed=case.seed)
    weights = load_file(failed.bundle / "weights.safetensors")

    [tied] = FAMILY.tied
    assert set(expected) - set(weights) == set(tied) - {next(key for key in tied if key in weights)}
    for key, tensor in weights.items():
        assert tensor.dtype == torch.float64, key
        assert torch.equal(tensor, expected[key]), key

    drawn = draw_batch(rows=case.rows, tokens=case.tokens, vocabulary=case.fields["vocab_size"], seed=case.seed)
    batch = load_file(failed.bundle / "batch.safetensors")
    assert set(batch) == {"tokens", "targets"}
    assert torch.equal(batch["tokens"], drawn.tokens) and torch.equal(batch["targets"], drawn.targets)


def test_the_outputs_are_the_two_that_differ_by_what_was_reported(failed: Failed) -> None:
    outputs = load_file(failed.bundle / "outputs.safetensors")
    assert set(outputs) == {"actual", "expected"}
    assert relative_error(outputs["actual"], outputs["expected"]) == failed.result.metrics["error"]


@pytest.fixture(scope="module")
def shared() -> Iterator[Session]:
    with session() as opened:
        yield opened


def test_views_of_one_tensor_and_errors_without_tensors_are_written_too(shared: Session, tmp_path: Path) -> None:
    trial = Trial(
        port=PORT,
        family=FAMILY,
        route="checkpoint",
        backend="torch-cpu",
        dtype="float64",
        workdir=tmp_path,
        sandbox=shared.sandbox,
        hub=shared.hub,
    )
    case = Case(fields=FIELDS, rows=2, tokens=3, seed=1)
    result = Result(
        port="a/b c",
        family="nanogpt",
        check="forward.logits",
        route="direct",
        backend="torch-cpu",
        dtype="float64",
        status="failed",
        reason="-",
    )
    whole = torch.arange(12.0, requires_grad=True).reshape(3, 4)
    error = Mismatch("-", tensors={"actual": whole.T, "expected": whole[1:]})

    first = bundles.write(result, trial, case, error, directory=tmp_path / "bundles")
    assert first.name == "a_b_c-forward.logits-direct-torch-cpu-float64"
    outputs = load_file(first / "outputs.safetensors")
    assert torch.equal(outputs["actual"], whole.T) and torch.equal(outputs["expected"], whole[1:])

    again = bundles.write(result, trial, case, RuntimeError("no tensors"), directory=tmp_path / "bundles")
    assert again == first, "the bundle of a second run replaces that of the first"
    assert not (again / "outputs.safetensors").exists()
    assert [path.name for path in (tmp_path / "bundles").iterdir()] == [first.name]


# Replaying


def replayed(failed: Failed, **changed: Any) -> Result:
    port, case, recorded = bundles.read(failed.bundle)
    with gate() as opened:
        return opened.replay(dataclasses.replace(port, **changed), case, recorded, failed.bundle)


def test_replaying_gives_the_same_numbers(failed: Failed) -> None:
    result = replayed(failed)
    for field in ("status", "reason", "config", "metrics", "first_divergence", "check", "route", "backend", "dtype"):
        assert getattr(result, field) == getattr(failed.result, field), field
    assert result.first_divergence == "block.0.mlp"


def test_replaying_against_the_repaired_port_passes(failed: Failed) -> None:
    assert replayed(failed, root=ROOT).status == "passed"


def test_a_check_that_is_gone_is_named(failed: Failed) -> None:
    port, case, recorded = bundles.read(failed.bundle)
    wrong = pytest.raises(DescriptionError, match=re.escape("there is no check 'forward.logit'; did you mean"))
    with gate() as opened, wrong:
        opened.replay(port, case, {**recorded, "check": "forward.logit"}, failed.bundle)


def test_the_weights_and_the_batch_of_the_bundle_are_used_and_not_drawn_again(
    failed: Failed, copied: Path, shared: Session
) -> None:
    weights, batch = load_file(copied / "weights.safetensors"), load_file(copied / "batch.safetensors")
    save_file({key: tensor * 0.5 for key, tensor in weights.items()}, copied / "weights.safetensors")
    other = replayed(dataclasses.replace(failed, bundle=copied))
    assert other.status == "failed"
    assert other.metrics["error"] != failed.result.metrics["error"]

    save_file({key: (tensor + 1) % 11 for key, tensor in batch.items()}, copied / "batch.safetensors")
    port, case, _ = bundles.read(copied)
    (item,) = plan([port], Options(checks=[CHECK], backends=["torch-cpu"]))
    trial = dataclasses.replace(trial_of(item, shared, shared.root), recorded=bundles.tensors(copied, case))
    assert torch.equal(draw(trial, case).tokens, (batch["tokens"] + 1) % 11)
    longer = dataclasses.replace(case, tokens=case.tokens + 1)
    assert draw(trial, longer).tokens.shape == (case.rows, case.tokens + 1)


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle", b"\xff" * 64])
def test_a_tensor_file_that_is_none_is_a_wrong_description(failed: Failed, copied: Path, content: bytes) -> None:
    (copied / "batch.safetensors").write_bytes(content)
    with pytest.raises(DescriptionError, match=r"batch\.safetensors"):
        replayed(dataclasses.replace(failed, bundle=copied))


# Bundles that are none


def test_a_directory_or_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "nothing" / "failure.json"):
        with pytest.raises(DescriptionError, match=re.escape(f"{path} is not a bundle: ")):
            bundles.read(path)


@pytest.mark.parametrize("kept", [0, 1, 100, -3])
def test_a_truncated_description_is_one_line(copied: Path, kept: int) -> None:
    file = copied / "failure.json"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(DescriptionError, match=re.escape(f"{file} does not describe a failure: ")) as caught:
        bundles.read(copied)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text(copied: Path) -> None:
    (copied / "failure.json").write_bytes(b"\x80\x04\x95pickle\xff\xfe")
    with pytest.raises(DescriptionError, match="does not describe a failure"):
        bundles.read(copied)


@pytest.mark.parametrize("key", ["port", "case", "result"])
def test_a_part_that_is_missing_is_named(copied: Path, failed: Failed, key: str) -> None:
    document = failed.document
    del document[key]
    (copied / "failure.json").write_text(json.dumps(document))
    with pytest.raises(DescriptionError, match=f"does not describe a failure: '{key}'"):
        bundles.read(copied)


@pytest.mark.parametrize(
    "change",
    [
        {"port": None},
        {"port": []},
        {"port": "nanogpt"},
        {"case": None},
        {"case": {}},
        {"case": {"rows": 1, "tokens": 1}},
        {"port.root": 3},
        {"port.root": None},
        {"port.surprise": 1},
        {"port.model": "os.system"},
        {"port.load": "command:rm"},
        {"port.code": "modeling.py"},
        {"port.min_checks": "many"},
        {"case": []},
        {"case": "x"},
        {"case.rows": "many"},
        {"case.seed": None},
        {"result": []},
        {"result": {}},
    ],
    ids=str,
)
def test_a_part_of_another_kind_is_a_wrong_description(copied: Path, failed: Failed, change: dict[str, Any]) -> None:
    document = failed.document
    for place, value in change.items():
        part, _, key = place.partition(".")
        if key:
            document[part][key] = value
        else:
            document[part] = value
    (copied / "failure.json").write_text(json.dumps(document))
    with pytest.raises(DescriptionError):
        bundles.read(copied)


@pytest.mark.parametrize("text", ["null", "3", "[]", '"text"', "{}", "NaN"])
def test_json_of_another_shape(copied: Path, text: str) -> None:
    (copied / "failure.json").write_text(text)
    with pytest.raises(DescriptionError, match="does not describe a failure"):
        bundles.read(copied)


def test_json_that_is_nested_without_end(copied: Path) -> None:
    (copied / "failure.json").write_text("[" * 200_000)
    with pytest.raises(DescriptionError, match="does not describe a failure"):
        bundles.read(copied)
