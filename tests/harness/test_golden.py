# SPDX-License-Identifier: Apache-2.0
"""Golden files: sound ones verify, every defect is named, and a record is whole or absent."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from harness import families
from harness.errors import DescriptionError, Mismatch
from harness.golden import (
    Golden,
    GoldenResult,
    add_golden_parser,
    build,
    capture,
    read_golden,
    record,
    reproduce,
    run_golden,
    verify,
    without_downcast,
)

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors, dict[str, str]], object]

FIELDS = {"tokens": 11, "places": 6, "width": 4, "layers": 2}

ORIGINAL = """
import torch
from torch import nn


class Tiny(nn.Module):
    def __init__(self, tokens, places, width, layers):
        super().__init__()
        print("originals talk")
        self.places = places
        self.embed = nn.Embedding(tokens, width)
        self.position = nn.Embedding(places, width)
        self.drop = nn.Dropout(0.0)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, tokens, bias=False)
        self.head.weight = self.embed.weight
        self.shift = nn.Parameter(torch.zeros(1))  # the loss does not depend on it
        self.register_buffer("scale", torch.tensor(3.0))

    def forward(self, idx, targets=None):
        x = self.drop(self.embed(idx) + self.position(torch.arange(idx.shape[1])))
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        logits = self.head(self.norm(x)) * self.scale.float().to(x.dtype) / 3 + self.shift
        if targets is None:
            return logits, None
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


class Other(Tiny):
    def forward(self, idx, targets=None):
        logits, loss = super().forward(idx, targets)
        return logits * (1 + 1e-6), loss


class Raising(Tiny):
    def forward(self, idx, targets=None):
        raise RuntimeError("no such\\nkernel")


class Untied(Tiny):
    def __init__(self, **fields):
        super().__init__(**fields)
        self.head.weight = nn.Parameter(self.embed.weight.detach().clone())


NOT_A_CLASS = 1
"""


def _run_original(module: Any, idx: torch.Tensor, targets: torch.Tensor | None) -> Tensors:
    logits, loss = module(idx, targets)
    return {"logits": logits} if loss is None else {"logits": logits, "loss": loss}


@torch.no_grad()
def _generate(module: Any, ids: torch.Tensor, *, max_new_tokens: int, temperature: float, top_k: int) -> torch.Tensor:
    for _ in range(max_new_tokens):
        logits = module(ids[:, -module.places :])[0][:, -1] / temperature
        logits[logits < logits.topk(top_k).values[:, -1:]] = -torch.inf
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1)], 1)
    return ids


def _parameter_groups(module: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for parameter in module.parameters():
        groups[parameter.ndim >= 2].append(parameter)
    return [
        {"params": groups[True], "weight_decay": weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]


def _golden(golden: Golden) -> Mapping[str, torch.Tensor]:
    blocks = {f"block.{index}": f"blocks.{index}" for index in range(golden.fields["layers"])}
    return reproduce(golden, places={"embedding": "drop", **blocks, "final_norm": "norm"})


def _family(original: str) -> families.Family:
    return families.Family(
        name="tiny",
        golden_names=("tiny_ancestor",),
        features=frozenset({"logits", "loss", "generation"}),
        configurations=lambda: pytest.fail("a golden file needs no drawn configuration"),
        original=original,
        build_original=lambda kind, fields: kind(**fields).eval(),
        run_original=_run_original,
        maximum_length="places",
        vocabulary="tokens",
        loss=families.LossConvention(labels="preshifted", ignore_index=-1),
        generate_original=_generate,
        parameter_groups=_parameter_groups,
        golden=_golden,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with the original's source and one recorded file, sound.safetensors; the family is registered."""
    place = tmp_path_factory.mktemp("golden")
    (place / "tiny.py").write_text(ORIGINAL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "_registered", {})
        families.register_family(_family(f"{place / 'tiny.py'}:Tiny"))
        spec = f"{place / 'tiny.py'}:Tiny"
        record(spec, place / "sound.safetensors", fields=FIELDS, family="tiny", generate=9, adamw_steps=2)
        yield place


def _edited(place: Path, out: Path, change: Change) -> Path:
    with safe_open(place / "sound.safetensors", framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, out, metadata=metadata)
    return out


def _result(place: Path, out: Path, change: Change) -> GoldenResult:
    (result,) = verify(_edited(place, out / "edited.safetensors", change))
    assert "\n" not in result.reason
    assert str(out) not in result.reason
    return result


def _shell(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_golden_parser(parser.add_subparsers())
    return run_golden(parser.parse_args(["golden", *words]))


def _add(name: str, amount: float) -> Change:
    def change(tensors: Tensors, _metadata: dict[str, str]) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[0] += amount

    return change


def _rename(old: str, new: str) -> Change:
    return lambda tensors, _metadata: tensors.update({new: tensors.pop(old)})


def _cast(name: str, dtype: torch.dtype) -> Change:
    return lambda tensors, _metadata: tensors.update({name: tensors[name].to(dtype)})


def _tensor(name: str, value: torch.Tensor) -> Change:
    return lambda tensors, _metadata: tensors.update({name: value})


def _metadata(**values: Any) -> Change:
    """Strings as they are, None to leave a key out, an object's keys merged into the JSON that is there."""

    def change(_tensors: Tensors, metadata: dict[str, str]) -> None:
        for key, value in values.items():
            if value is None:
                del metadata[key]
            elif isinstance(value, dict):
                metadata[key] = json.dumps({**json.loads(metadata[key]), **value})
            else:
                metadata[key] = value

    return change


# A sound file


def test_recorded_file_verifies_with_every_part_of_the_layout(place: Path) -> None:
    (result,) = verify(place)
    assert (result.status, result.file, result.family, result.reason) == (
        "verified", "sound.safetensors", "tiny", "",
    )  # fmt: skip
    assert set(result.errors.values()) == {0.0}
    parameters = {"embed.weight", "position.weight", "norm.weight", "norm.bias", "shift"}
    parameters |= {f"blocks.{index}.{kind}" for index in range(2) for kind in ("weight", "bias")}
    outputs = {"logits", "loss", "embedding", "block.0", "block.1", "final_norm"}
    assert set(result.errors) == {
        *(f"outputs_{dtype}/{name}" for dtype in ("f64", "f32") for name in outputs),
        *(f"{section}/{name}" for section in ("grads_f64", "adamw2_f64") for name in parameters),
        "outputs_f64/adamw_losses", "outputs_f32/generate.greedy", "outputs_f32/generate.sampled",
    }  # fmt: skip


def test_recorded_file_holds_the_layout_and_nothing_of_the_machine(place: Path) -> None:
    golden = read_golden(place / "sound.safetensors")
    assert golden.tie_aliases == {"head.weight": "embed.weight"}
    assert golden.fields == FIELDS
    assert golden.inputs["adamw_idx"].shape == (2, 2, 6)
    assert golden.metadata["generation"]["max_new_tokens"] == 9
    assert golden.metadata["conventions"]["ignore_index"] == -1
    assert golden.weights["scale"] == 3.0, "a buffer is not a weight to draw"
    assert all(torch.equal(value, value.float().double()) for value in golden.weights.values())
    assert str(place) not in json.dumps(golden.metadata)


def test_the_file_decides_not_the_settings_of_the_process(place: Path) -> None:
    torch.manual_seed(5)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    with torch.no_grad():
        torch.set_default_dtype(torch.float64)
        try:
            assert verify(place)[0].status == "verified"
            assert torch.get_default_dtype() == torch.float64
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_gradients_that_are_zero_by_construction_are_measured_on_the_scale_of_all(place: Path, tmp_path: Path) -> None:
    assert _result(place, tmp_path, _add("grads_f64/shift", 1e-13)).status == "verified"
    failed = _result(place, tmp_path, _add("grads_f64/shift", 1e-6))
    assert failed.status == "failed"
    assert "grads_f64/shift" in failed.reason
    (unused,) = verify(place)
    assert unused.errors["grads_f64/position.weight"] == 0.0


# Originals that are not the original, files that say something else


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_add("weights/blocks.1.weight", 1e-3), "outputs_f64/logits"),
        (_add("outputs_f64/logits", 1e-8), "outputs_f64/logits"),
        (_add("outputs_f32/block.1", 1e-2), "outputs_f32/block.1"),
        (_add("adamw2_f64/blocks.0.bias", 1e-7), "adamw2_f64/blocks.0.bias"),
        (_add("outputs_f64/adamw_losses", 1e-7), "outputs_f64/adamw_losses"),
        (_add("outputs_f32/generate.greedy", 1), "outputs_f32/generate.greedy differs in 1 elements"),
        (_rename("outputs_f64/block.1", "outputs_f64/block.7"), "the original gives no outputs_f64/block.7"),
        (_tensor("elsewhere/x", torch.zeros(2).double()), "the original gives no elsewhere/x"),
        (_metadata(generation={"seed": 4}), "generate.sampled"),
        (_metadata(adamw={"lr": 0.01}), "adamw2_f64/"),
    ],
)
def test_failed(place: Path, tmp_path: Path, change: Change, named: str) -> None:
    result = _result(place, tmp_path, change)
    assert result.status == "failed"
    over = {name for name, error in result.errors.items() if not error <= result.bounds[name]}
    assert named in result.reason or any(named in name for name in over)


def test_another_original_is_told_apart(place: Path) -> None:
    (result,) = verify(place, original_override={"tiny": f"{place / 'tiny.py'}:Other"})
    assert result.status == "failed"
    assert "logits" in result.reason
    (result,) = verify(place, original_override={"tiny": f"{place / 'tiny.py'}:Raising"})
    assert result.status == "failed"
    assert result.reason == "the original raised RuntimeError: no such kernel"
    (result,) = verify(place, original_override={"tiny": f"{place / 'tiny.py'}:Untied"})
    assert result.status == "failed"
    assert "does not tie head.weight to embed.weight" in result.reason


@pytest.mark.parametrize("spec", ["tiny.py:Absent", "absent.py:Tiny", "tiny.py:NOT_A_CLASS"])
def test_an_override_that_cannot_be_loaded_is_no_result(place: Path, spec: str) -> None:
    with pytest.raises(DescriptionError):
        verify(place, original_override={"tiny": f"{place / spec}"})
    with pytest.raises(DescriptionError, match="did you mean 'tiny'"):
        verify(place, original_override={"tinny": f"{place / 'tiny.py'}:Tiny"})


def test_bounds_of_the_family_come_first(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = dataclasses.replace(families.find_family("tiny"), golden_bounds={"outputs_f64/block.*": 1e-7})
    monkeypatch.setitem(families._registered, "tiny", family)
    assert _result(place, tmp_path, _add("outputs_f64/block.0", 1e-8)).status == "verified"
    assert _result(place, tmp_path, _add("outputs_f64/loss", 1e-8)).status == "failed"


def test_bounds_may_depend_on_the_file(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bounds(golden: Golden) -> Mapping[str, float]:
        return {"outputs_f64/block.0": 1e-7, "*_f64/*": 1e-12} if golden.mode == "eval" else {}

    family = dataclasses.replace(families.find_family("tiny"), golden_bounds=bounds)
    monkeypatch.setitem(families._registered, "tiny", family)
    assert _result(place, tmp_path, _add("outputs_f64/block.0", 1e-8)).status == "verified"
    assert _result(place, tmp_path, _add("outputs_f64/block.1", 1e-10)).status == "failed"

    def train(tensors: Tensors, metadata: dict[str, str]) -> None:
        metadata["mode"] = "train"
        tensors["outputs_f64/block.1"][0, 0, 0] += 1e-10

    assert _result(place, tmp_path, train).status == "verified"


# Broken files


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_rename("weights/norm.bias", "weights/norm.offset"), "weights lack norm.bias and hold norm.offset too many"),
        (_tensor("weights/extra", torch.ones(1).double()), "weights hold extra"),
        (_tensor("weights/norm.bias", torch.ones(5).double()), "has shape (5,), Tiny expects (4,)"),
        (_cast("weights/norm.bias", torch.float32), "weights/norm.bias is float32, expected float64"),
        (_cast("weights/norm.bias", torch.int64), "weights/norm.bias is int64, Tiny expects float"),
        (_cast("outputs_f64/logits", torch.float32), "outputs_f64/logits is float32, expected float64"),
        (_cast("outputs_f64/logits", torch.int64), "outputs_f64/logits is stored as int64"),
        (_cast("outputs_f32/logits", torch.float64), "outputs_f32/logits is float64, expected float32"),
        (_tensor("outputs_f64/logits", torch.ones(2, 2).double()), "the original gives (2, 6, 11)"),
        (_tensor("outputs_f64/loss", torch.tensor(torch.nan).double()), "outputs_f64/loss holds 1 values"),
        (_tensor("weights/shift", torch.tensor([torch.inf]).double()), "weights/shift holds 1 values"),
        (lambda tensors, metadata: tensors.clear(), "holds no weights"),
        (lambda tensors, metadata: metadata.clear(), "metadata lacks family, implementation, config"),
        (_metadata(config=None), "metadata lacks config"),
        (_metadata(config="{"), "metadata 'config' is not JSON"),
        (_metadata(config="[1]"), "metadata 'config' is a JSON list"),
        (_metadata(config="{}"), "its config lacks layers"),
        (_metadata(config={"depth": 2}), "its config does not build Tiny: TypeError"),
        (_metadata(config={"tokens": 10**15}), "weights/embed.weight has shape (11, 4), Tiny expects"),
        (_metadata(config={"tokens": -1}), "its config does not build Tiny"),
        (_metadata(config={"layers": 3}), "weights lack blocks.2.bias, blocks.2.weight"),
        (_metadata(mode="fast"), "mode is 'fast', expected 'eval' or 'train'"),
        (_metadata(format_version="2"), "format_version is '2', expected '1'"),
        (_metadata(tie_aliases='{"head.weight": "absent"}'), "tie_aliases says head.weight is absent"),
        (_metadata(tie_aliases="{}"), "weights lack head.weight"),
        (_metadata(adamw=None), "metadata lacks adamw"),
        (_metadata(adamw={"steps": 3}), "inputs/adamw_idx has shape (2, 2, 6), expected 3 steps"),
        (_metadata(adamw={"betas": 1}), "adamw: betas is 1, expected two numbers"),
        (_metadata(adamw={"lr": "fast"}), "adamw: lr is 'fast', expected a number"),
        (_metadata(generation={"max_new_tokens": 10**9}), "generate.greedy has shape (2, 13), expected"),
        (_metadata(generation={"seed": True}), "generation: seed is True, expected an integer"),
        (_metadata(generation={"top_k": "all"}), "generation: top_k is 'all'"),
        (_rename("inputs/prompt", "inputs/start"), "there is no two-dimensional inputs/prompt"),
        (_rename("inputs/idx", "inputs/ids"), "it holds no inputs/idx"),
        (_rename("inputs/targets", "inputs/labels"), "it stores gradients, but its inputs give no 'loss'"),
    ],
)  # fmt: skip
def test_broken(place: Path, tmp_path: Path, change: Change, reason: str) -> None:
    result = _result(place, tmp_path, change)
    assert result.status == "broken"
    assert reason in result.reason


def _truncated(data: bytes) -> bytes:
    return data[:-7]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_truncated, "is truncated"),
        (lambda data: data[:20], "is truncated"),
        (lambda data: b"", "is empty"),
        (lambda data: bytes(range(200, 256)) * 40, "not safetensors"),
        (lambda data: data + b"more", "not safetensors"),
        (lambda data: data.replace(b'"F64"', b'"Q64"'), "not safetensors"),
    ],
)
def test_bytes_that_are_no_safetensors(
    place: Path, tmp_path: Path, change: Callable[[bytes], bytes], reason: str
) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(change((place / "sound.safetensors").read_bytes()))
    (result,) = verify(tmp_path)
    assert result.status == "broken"
    assert reason in result.reason
    assert "\n" not in result.reason
    with pytest.raises(DescriptionError, match=r"^[^\n]*bad\.safetensors: [^\n]*$"):
        read_golden(bad)


def test_a_broken_file_hides_no_other(place: Path, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").mkdir()
    (tmp_path / "b.safetensors").write_bytes(b"")
    _edited(place, tmp_path / "c.safetensors", _add("outputs_f64/logits", 1))
    _edited(place, tmp_path / "d.safetensors", _metadata(family="unheard"))
    _edited(place, tmp_path / "e.safetensors", _metadata(family="tiny_ancestor"))
    assert [result.status for result in verify(tmp_path)] == [
        "broken",
        "broken",
        "failed",
        "skipped",
        "verified",
    ]


def test_skipped_says_why(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = _result(place, tmp_path, _metadata(family="unheard"))
    assert (result.status, result.reason) == ("skipped", "there is no original of 'unheard' here")
    without = dataclasses.replace(families.find_family("tiny"), golden=None)
    monkeypatch.setitem(families._registered, "tiny", without)
    (result,) = verify(place)
    assert result.status == "skipped"
    assert "cannot reproduce" in result.reason


def test_nothing_to_verify(tmp_path: Path) -> None:
    with pytest.raises(DescriptionError, match=r"holds no \.safetensors files"):
        verify(tmp_path)
    with pytest.raises(DescriptionError, match="no such file or directory"):
        verify(tmp_path / "absent")


def test_manifest(place: Path, tmp_path: Path) -> None:
    data = (place / "sound.safetensors").read_bytes()
    entries = []
    for name, digest in {"a": hashlib.sha256(data).hexdigest(), "b": "0" * 64, "c": "0" * 64}.items():
        entries.append({"file": f"{name}.safetensors", "sha256": digest})
    (tmp_path / "manifest.json").write_text(json.dumps(entries))
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(data)
    sound, different, absent = verify(tmp_path)
    assert sound.status == "verified"
    assert different.status == "broken"
    assert "differs from manifest.json" in different.reason
    assert absent.status == "broken"
    assert "listed in manifest.json but absent" in absent.reason
    (tmp_path / "manifest.json").write_text('{"file": 1}')
    assert [result.status for result in verify(tmp_path)] == ["verified", "verified", "broken"]


# The command line


def test_exit_codes_and_table(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _shell("verify", str(place)) == 0
    header, line, counts = capsys.readouterr().out.splitlines()
    assert " ".join(header.split()) == "status file logits loss blocks grads adamw float32 generation"
    assert " ".join(line.split()) == "verified sound.safetensors 0 0 0 0 0 0 exact"
    assert counts == "1 verified"
    _edited(place, tmp_path / "off.safetensors", _add("outputs_f64/logits", 1e-3))
    assert _shell("verify", str(tmp_path)) == 1
    assert "outputs_f64/logits differs by" in capsys.readouterr().out
    (tmp_path / "empty.safetensors").touch()
    assert _shell("verify", str(tmp_path)) == 2
    assert "is empty" in capsys.readouterr().out
    assert _shell("verify", str(tmp_path / "absent")) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1


def test_json_is_the_only_thing_on_standard_output(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _edited(place, tmp_path / "off.safetensors", _add("outputs_f64/logits", 1e-3))
    (tmp_path / "empty.safetensors").touch()
    assert _shell("verify", str(tmp_path), "--json") == 2
    out, err = capsys.readouterr()
    empty, off = json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert (empty["status"], off["status"]) == ("broken", "failed")
    assert off["errors"]["outputs_f64/logits"] > off["bounds"]["outputs_f64/logits"] == 1e-9
    assert "originals talk" in err


def test_original_of_the_command_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _shell("verify", str(place), "--original", f"tiny={place / 'tiny.py'}:Other") == 1
    assert _shell("verify", str(place), "--original", f"{place / 'tiny.py'}:Other") == 2
    assert "expected FAMILY=" in capsys.readouterr().err


def test_record_by_the_command_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["record", "--original", f"{place / 'tiny.py'}:Tiny", "--family", "tiny", "--mode", "train"]
    words += ["--config", json.dumps(FIELDS), "--out", str(tmp_path / "new.safetensors"), "--length", "3"]
    assert _shell(*words) == 0
    assert capsys.readouterr().out == f"recorded {tmp_path / 'new.safetensors'}\n"
    (result,) = verify(tmp_path)
    assert result.status == "verified"
    assert _shell(*words, "--config", "{") == 2
    assert "--config is not JSON" in capsys.readouterr().err


def test_importing_does_not_import_torch() -> None:
    code = "import sys, harness.golden; sys.exit('torch' in sys.modules or 'safetensors' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Recording


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"out": "x.pt"}, r"ends in \.safetensors"),
        ({"out": "absent/x.safetensors"}, "there is no directory"),
        ({"family": "unheard"}, "there is no family 'unheard'"),
        ({"fields": {"tokens": 11}}, "the config does not build"),
        ({"fields": {**FIELDS, "places": 0}}, "places=0"),
        ({"length": 7}, "length is 7, expected 1 to places=6"),
        ({"batch": 0}, "batch has to be at least 1"),
        ({"original": "Raising"}, "the original raised RuntimeError: no such kernel"),
        ({"original": "NOT_A_CLASS"}, "is a int, expected a class"),
        ({"original": "Absent"}, "Absent"),
    ],
)
def test_record_refuses(place: Path, tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    options = {"fields": FIELDS, "family": "tiny", "out": "x.safetensors", "original": "Tiny", **options}
    spec, out = f"{place / 'tiny.py'}:{options.pop('original')}", tmp_path / options.pop("out")
    with pytest.raises(DescriptionError, match=reason):
        record(spec, out, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cause", [KeyboardInterrupt, OSError("no space left on device")])
def test_an_interrupted_record_leaves_what_was_there(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: Any
) -> None:
    out = tmp_path / "x.safetensors"
    out.write_text("older")

    def interrupted(*_arguments: Any) -> None:
        raise cause

    monkeypatch.setattr("harness.golden.file.os.replace", interrupted)
    with pytest.raises((KeyboardInterrupt, DescriptionError)):
        record(f"{place / 'tiny.py'}:Tiny", out, fields=FIELDS, family="tiny")
    assert list(tmp_path.iterdir()) == [out]
    assert out.read_text() == "older"


def test_record_refuses_generation_on_a_near_tie(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.golden.recording.DISTURBANCE", 1.0)
    with pytest.raises(DescriptionError, match="near tie"):
        record(f"{place / 'tiny.py'}:Tiny", tmp_path / "x.safetensors", fields=FIELDS, family="tiny", generate=20)


# Helpers of the families


def test_capture_takes_the_first_of_a_tuple_or_what_is_picked() -> None:
    module = torch.nn.ModuleDict({"lstm": torch.nn.LSTM(2, 3), "idle": torch.nn.Identity()})
    data = torch.ones(4, 1, 2)

    def call() -> Tensors:
        return {"out": module["lstm"](data)[0]}

    outputs, seen = capture(module, {"all": "lstm", "last": "lstm"}, call, pick={"last": lambda value: value[1][0]})
    assert torch.equal(seen["all"], outputs["out"])
    assert torch.equal(seen["last"][0], outputs["out"][-1])
    for path, reason in {"absent": "no submodule 'absent'", "idle": "did not run"}.items():
        with pytest.raises(Mismatch, match=reason):
            capture(module, {"x": path}, call)
    assert not module["lstm"]._forward_hooks


def test_nocast_sections_run_without_the_downcast(place: Path) -> None:
    golden = read_golden(place / "sound.safetensors")
    # A scale that float32 cannot hold makes the downcast visible.
    golden = dataclasses.replace(
        golden,
        weights={**golden.weights, "scale": torch.tensor(3.0 + 1e-8, dtype=torch.float64)},
        sections=frozenset({"outputs_f64", "outputs_f64_nocast", "grads_f64_nocast"}),
    )
    produced = _golden(golden)
    change = (produced["outputs_f64_nocast/logits"] / produced["outputs_f64/logits"] - 1).abs().max()
    assert 1e-10 < float(change) < 1e-6
    assert "grads_f64_nocast/shift" in produced
    assert "grads_f64/shift" not in produced
    with without_downcast(), without_downcast():
        assert torch.ones(1).float().dtype == torch.float64
    assert torch.ones(1).float().dtype == torch.float32


def test_build_takes_another_original_and_the_mode_of_the_file(place: Path) -> None:
    golden = dataclasses.replace(read_golden(place / "sound.safetensors"), mode="train")
    module = build(golden, torch.float32)
    assert module.training
    assert module.get_parameter("shift").dtype == torch.float32
    other = type("Mine", (type(module),), {})
    assert type(build(dataclasses.replace(golden, original=other), torch.float64)).__name__ == "Mine"
