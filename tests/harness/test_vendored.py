# SPDX-License-Identifier: Apache-2.0
"""A repository that vendors a port, from `parity init` to a red gate and its replay."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from harness.cli import main

ROOT = Path(__file__).parents[2]
FILES = ("checkpoint", "configuration_nanogpt", "modeling_nanogpt")
FEW = ("config.fields", "weights.values", "forward.blocks", "generation.greedy", "remote_code.files")
BUG = ("self.gelu = nn.GELU()", "self.gelu = nn.GELU(approximate='tanh')")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Done:
    """How a command ended, and all it said."""

    code: int
    output: str


def run(repository: Path, *command: str, stdin: str | None = None) -> Done:
    """Runs `pytest ...` or `parity ...` in a repository, as somebody who has installed the harness would."""
    program = {"pytest": ["-m", "pytest"], "parity": ["-m", "harness.cli"]}[command[0]]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "FORCE_COLOR"))}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *program, *command[1:]],
        cwd=repository,
        env=environment,
        input=stdin or "",
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    return Done(code=done.returncode, output=done.stdout + done.stderr)


@pytest.fixture
def vendoring(tmp_path: Path) -> Path:
    """A repository with a copy of nanoGPT's port, two tests of its own, and strict markers; nothing of parity in it."""
    package = tmp_path / "src" / "mine"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    for name in FILES:
        shutil.copy(ROOT / f"reference_models/nanogpt/{name}.py", package)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_own.py").write_text("def test_one(): pass\n\ndef test_two(): pass\n")
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "mine"\nversion = "1"\n\n[tool.pytest.ini_options]\naddopts = "--strict-markers"\n'
    )
    return tmp_path


@pytest.fixture
def gated(vendoring: Path) -> Path:
    """The same after `parity init --yes`."""
    done = run(vendoring, "parity", "init", "--yes")
    assert done.code == 0, done.output
    return vendoring


def gate_of(repository: Path) -> list[str]:
    """The command of the workflow that `parity init` wrote."""
    workflow = yaml.safe_load((repository / ".github/workflows/parity.yml").read_text())
    (gate,) = [step["run"] for step in workflow["jobs"]["parity"]["steps"] if step.get("name") == "Gate"]
    words = shlex.split(gate)
    assert words[:3] == ["python", "-m", "pytest"]
    return words[2:]


def chosen(*checks: str) -> list[str]:
    return [f"--parity-checks={check}" for check in checks]


def results_of(repository: Path) -> list[dict[str, Any]]:
    report: list[dict[str, Any]] = json.loads((repository / "parity-report/report.json").read_text())["results"]
    return report


def test_a_vendored_port_is_gated_by_what_init_writes(gated: Path) -> None:
    (table,) = tomllib.loads((gated / "pyproject.toml").read_text())["tool"]["parity"]["port"]
    assert table == {
        "name": "nanogpt",
        "family": "nanogpt",
        "model": "src/mine/modeling_nanogpt.py:NanoGPTLMHeadModel",
        "config": "src/mine/configuration_nanogpt.py:NanoGPTConfig",
        "load": "checkpoint:NanoGPTLMHeadModel.from_nanogpt_ckpt",
        "code": [f"src/mine/{name}.py" for name in ("modeling_nanogpt", "configuration_nanogpt", "checkpoint")],
    }
    done = run(gated, *gate_of(gated), *chosen(*FEW), "--parity-backend=torch-cpu")
    assert done.code == 0, done.output
    assert "2 deselected" in done.output
    assert {result["status"] for result in results_of(gated)} == {"passed"}
    assert {result["check"] for result in results_of(gated)} == set(FEW)
    # Who does not ask for it runs the tests that were there before.
    assert "2 passed" in run(gated, "pytest").output


@pytest.mark.slow
def test_the_whole_gate_of_a_vendored_port_is_green(gated: Path) -> None:
    done = run(gated, *gate_of(gated))
    assert done.code == 0, done.output
    assert {result["status"] for result in results_of(gated)} <= {"passed", "skipped"}


def test_a_planted_bug_is_red_with_the_module_and_a_bundle_that_replays(gated: Path) -> None:
    model = gated / "src/mine/modeling_nanogpt.py"
    right = model.read_text()
    assert right.count(BUG[0]) == 1
    model.write_text(right.replace(*BUG))
    done = run(gated, *gate_of(gated), *chosen("forward.blocks"), "--parity-backend=torch-cpu")
    assert done.code == 1, done.output
    (result,) = results_of(gated)
    assert (result["status"], result["first_divergence"]) == ("failed", "block.0.mlp")
    assert (result["config"]["n_layer"], result["config"]["n_head"]) == (1, 1)
    for words in ("first at  block.0.mlp", "n_layer=1 n_head=1", f"replay    parity repro {result['bundle']}"):
        assert words in done.output
    case = next(ElementTree.parse(gated / "parity-report/pytest.xml").iter("testcase"))
    properties = {item.get("name"): item.get("value") for item in case.iter("property")}
    assert properties["check"] == "forward.blocks"
    assert json.loads(properties["config"] or "") == result["config"]

    replayed = run(gated, "parity", "repro", result["bundle"], "--json")
    assert replayed.code == 1, replayed.output
    again = json.loads(replayed.output)
    same = ("check", "status", "reason", "config", "metrics", "first_divergence")
    assert {name: again[name] for name in same} == {name: result[name] for name in same}

    model.with_name("modeling_fixed.py").write_text(right)
    fix = "src/mine/modeling_fixed.py:NanoGPTLMHeadModel"
    tried = run(gated, "parity", "repro", result["bundle"], "--model", fix)
    assert tried.code == 0, tried.output
    assert tried.output.splitlines()[1].split() == ["now", "passed"]


def test_two_workers_say_the_same_of_a_vendored_port(gated: Path) -> None:
    told: list[dict[str, tuple[str, str]]] = []
    for workers in ("0", "2"):
        options = [
            *chosen("config.fields", "weights.values", "forward.lengths"),
            "--parity-backend=torch-cpu",
            "-n",
            workers,
        ]
        done = run(gated, *gate_of(gated), *options)
        assert done.code == 0, done.output
        cases = ElementTree.parse(gated / "parity-report/pytest.xml").iter("testcase")
        told.append({f"{case.get('classname')}::{case.get('name')}": ("", "") for case in cases})
        told[-1] |= {f"{r['check']} {r['route']} {r['dtype']}": (r["status"], r["reason"]) for r in results_of(gated)}
    assert told[0] == told[1]


# The four kinds of load


CONVERT = """
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from port_of_{number}.modeling_nanogpt import NanoGPTLMHeadModel
"""
READ = "\ndef read(path):\n    return NanoGPTLMHeadModel.from_nanogpt_ckpt(path)\n"
PROGRAM = """
import argparse

parser = argparse.ArgumentParser()
parser.add_argument("checkpoint")
parser.add_argument("--out")
given = parser.parse_args()
NanoGPTLMHeadModel.from_nanogpt_ckpt(given.checkpoint).save_pretrained(given.out)
"""
HALVED = ("        model.eval()\n", "        model.eval().lm_head.weight.data.mul_(0.5)\n")
LOADS = {
    "state_dict": ("", ("self.lm_head = nn.Linear(", "self.other_head = nn.Linear(")),
    "checkpoint:NanoGPTLMHeadModel.from_nanogpt_ckpt": ("", HALVED),
    "checkpoint:convert.py:read": (READ, HALVED),
    "pretrained": (
        "",
        (
            "        return super().save_pretrained(",
            "        self.lm_head.weight.data.mul_(0.5)\n        return super().save_pretrained(",
        ),
    ),
    "command:python convert.py --out {out} {checkpoint}": (PROGRAM, HALVED),
}


@pytest.mark.parametrize("load", LOADS)
def test_each_kind_of_load_brings_the_weights_and_no_other_way_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], load: str
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    convert, edit = LOADS[load]
    for code in (0, 1):
        directory = tmp_path / f"repository{code}"
        package = directory / f"port_of_{number_of(load)}{code}"
        package.mkdir(parents=True)
        for name in FILES:
            text = (ROOT / f"reference_models/nanogpt/{name}.py").read_text()
            if code and name == "modeling_nanogpt":
                assert text.count(edit[0]) == 1
                text = text.replace(*edit)
            (package / f"{name}.py").write_text(text)
        (directory / "convert.py").write_text(CONVERT.format(number=f"{number_of(load)}{code}") + convert)
        (directory / "parity.toml").write_text(
            f'[[port]]\nname = "mine"\nfamily = "nanogpt"\nload = {json.dumps(load)}\n'
            f'model = "{package.name}.modeling_nanogpt:NanoGPTLMHeadModel"\n'
            f'config = "{package.name}.configuration_nanogpt:NanoGPTConfig"\n'
        )
        monkeypatch.chdir(directory)
        assert main(["check", "--checks", "forward.lengths", "--backend", "torch-cpu"]) == code, capfd.readouterr().out


def number_of(load: str) -> int:
    return list(LOADS).index(load)
