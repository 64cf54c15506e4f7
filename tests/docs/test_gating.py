# SPDX-License-Identifier: Apache-2.0
"""The guide for somebody else's repository keeps its word: commands parse, tables mean ports, the example runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from harness.checks import CATALOGUE
from harness.cli import parser
from harness.ports import check_patterns, parse_ports
from harness.runner import PROFILES
from tests.docs.blocks import ROOT, dead_links, texts

GUIDE = ROOT / "docs/gating.md"
EXAMPLE = ROOT / "docs/example"


COMMANDS = [line for block in texts(GUIDE, "console") for line in block.splitlines()]


# The text


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_one_that_exists(line: str, pytestconfig: pytest.Config) -> None:
    words = shlex.split(line)
    if words[0] == "parity":
        parser().parse_args(words[1:])
    elif words[:3] == ["python", "-m", "pytest"]:
        known, unknown = pytestconfig._parser.parse_known_and_unknown_args(words[3:])
        assert not unknown
        if known.parity_profile:
            assert known.parity_profile in PROFILES
    else:
        assert words[:4] == ["python", "-m", "pip", "install"]


def test_every_table_of_a_port_is_one_that_is_accepted() -> None:
    tables = [tomllib.loads(block) for block in texts(GUIDE, "toml")]
    ports = [
        port
        for table in tables
        if "tool" in table
        for port in parse_ports(table["tool"]["parity"], root=ROOT, file="gating.md")
    ]
    assert [port.name for port in ports] == ["nanogpt", "small"]
    check_patterns(ports, [check.id for check in CATALOGUE])


def test_the_table_of_load_names_every_kind_in_a_form_that_is_accepted() -> None:
    loads = re.findall(r'^\| `"(.*?)"` \|', GUIDE.read_text(), flags=re.MULTILINE)
    assert {load.partition(":")[0] for load in loads} == {"state_dict", "checkpoint", "pretrained", "command"}
    for load in loads:
        values = {"name": "x", "family": "nanogpt", "model": "m.py:M", "config": "m.py:C", "load": load}
        parse_ports({"port": [values]}, root=ROOT, file="gating.md")


def test_profiles_are_those_of_the_runner() -> None:
    named = re.findall(r"^\| `(\w+)` \| (?:the same|(\w+) times)", GUIDE.read_text(), flags=re.MULTILINE)
    words = {"": 1, "six": 6, "thirty": 30}
    assert {name: words[times] for name, times in named} == PROFILES


def test_links_lead_to_files() -> None:
    assert dead_links(GUIDE) == []
    assert "docs/gating.md" in (ROOT / "README.md").read_text()


def test_the_failure_in_the_text_is_one_that_the_gate_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from harness.cli import main

    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")  # a worker of xdist has another width
    for file in (ROOT / "reference_models/nanogpt").glob("[cm][a-z]*_nanogpt.py"):
        shutil.copy(file, tmp_path)
    shutil.copy(ROOT / "reference_models/nanogpt/checkpoint.py", tmp_path)
    model = tmp_path / "modeling_nanogpt.py"
    model.write_text(model.read_text().replace("nn.GELU()", 'nn.GELU(approximate="tanh")'))
    assert main(["init", "--yes"]) == 0
    capsys.readouterr()
    arguments = ["--checks", "forward.blocks", "--backend", "torch-cpu", "--report", "parity-report"]
    assert main(["check", *arguments]) == 1
    printed = capsys.readouterr().out
    (shown,) = [block for block in texts(GUIDE, "text") if block.startswith("failed")]
    for line in shown.splitlines():
        label, value = line[:15].strip(), line[15:].strip()
        if label in ("in", "config", "first at"):
            assert re.search(rf"^ +{label} +{re.escape(value)}$", printed, flags=re.MULTILINE), line
        elif label == "replay":
            assert f"{tmp_path}/{value.rpartition(' ')[2]}" in printed
    # Numbers depend on the order of sums.
    assert shown.split(":")[1].strip() in printed


# The example


def gate(directory: Path, *command: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "FORCE_COLOR"))}
    places = [str(ROOT), *([str(path)] if path else []), environment.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_the_example_is_short_and_the_guide_shows_its_files() -> None:
    assert len((EXAMPLE / "bag_family.py").read_text().splitlines()) < 80
    (shown,) = texts(GUIDE, "python")
    assert shown in (EXAMPLE / "conftest.py").read_text()


def test_the_example_is_gated_by_pytest_with_its_conftest(tmp_path: Path) -> None:
    shutil.copytree(EXAMPLE, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    report = ["--parity-report", "report", "--parity-backend", "torch-cpu"]
    done = gate(tmp_path, "pytest", "-m", "parity", "--strict-markers", "-p", "no:cacheprovider", *report)
    assert done.returncode == 0, done.stdout + done.stderr
    results: list[dict[str, Any]] = json.loads((tmp_path / "report/report.json").read_text())["results"]
    assert {result["status"] for result in results} == {"passed", "skipped"}
    passed = {result["check"].partition(".")[0] for result in results if result["status"] == "passed"}
    assert passed >= {
        "config",
        "weights",
        "forward",
        "loss",
        "training",
        "roundtrip",
        "remote_code",
        "hub",
        "precision",
        "api",
    }


def test_the_example_is_gated_by_the_command_with_an_entry_point_and_a_bug_is_placed(tmp_path: Path) -> None:
    package, repository = tmp_path / "installed", tmp_path / "repository"
    information = package / "bag-1.dist-info"
    information.mkdir(parents=True)
    repository.mkdir()
    (declared,) = [block for block in texts(GUIDE, "toml") if "entry-points" in block]
    group = tomllib.loads(declared)["project"]["entry-points"]
    lines = [f"[{name}]\n" + "".join(f"{key} = {value}\n" for key, value in group[name].items()) for name in group]
    (information / "entry_points.txt").write_text("".join(lines))
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: bag\nVersion: 1\n")
    shutil.copy(EXAMPLE / "bag_family.py", package)
    for name in ("modeling_bag.py", "parity.toml"):
        shutil.copy(EXAMPLE / name, repository)
    model = repository / "modeling_bag.py"
    model.write_text(model.read_text().replace("torch.tanh(layer(x))", "torch.tanh(layer(x * 1.01))"))
    chosen = ["--checks", "forward.blocks", "--backend", "torch-cpu", "--report", "report", "--json"]
    done = gate(repository, "harness.cli", "check", *chosen, path=package)
    assert done.returncode == 1, done.stdout + done.stderr
    (result,) = json.loads(done.stdout)["results"]
    assert (result["family"], result["status"], result["first_divergence"]) == ("bag", "failed", "mlp.0")
    assert {key: result["config"][key] for key in ("vocab_size", "width", "depth", "context")} == {
        "vocab_size": 7,
        "width": 4,
        "depth": 1,
        "context": 4,
    }
    replayed = gate(repository, "harness.cli", "repro", result["bundle"], "--json", path=package)
    assert replayed.returncode == 1, replayed.stdout + replayed.stderr
    assert json.loads(replayed.stdout)["metrics"] == result["metrics"]
