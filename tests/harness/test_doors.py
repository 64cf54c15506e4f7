# SPDX-License-Identifier: Apache-2.0
"""The doors as a user meets them: descriptions, the pytest plugin, the command line, a script."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from harness import Port, check_parity
from harness.backends import unavailable
from harness.errors import DescriptionError, Mismatch
from harness.mutants import Mutant, mutants_of, plant
from harness.ports import family_of, load_object, read_ports
from harness.runner import Options, plan, seed_of

pytest_plugins = ["pytester"]

REPOSITORY = Path(__file__).parents[2]
MODULE = "reference_models.nanogpt.modeling_nanogpt"
DESCRIPTION = """
[[tool.parity.port]]
name = "mine"
family = "nanogpt"
model = "reference_models.nanogpt.modeling_nanogpt:NanoGPTLMHeadModel"
config = "reference_models.nanogpt.configuration_nanogpt:NanoGPTConfig"
"""
FAST = ("--parity-checks", "config.fields", "--parity-checks", "forward.logits", "--parity-backend", "torch-cpu")


def reference_port() -> Port:
    return read_ports(REPOSITORY)[0]


def broken_port(directory: Path, name: str = "gelu-tanh") -> Port:
    mutant = next(mutant for mutant in mutants_of(family_of(reference_port())) if mutant.id == name)
    # Below a folder of its own: a folder `reference_models` in the working directory would hide the installed package.
    return plant(mutant, reference_port(), directory / "planted")


def describe(port: Port, directory: Path, **more: Any) -> None:
    """Writes a description of a planted port beside its files."""
    values = {"name": "broken", "family": port.family, "load": port.load}
    values |= {"model": f"planted/{port.model}", "config": f"planted/{port.config}"}
    lines = [f"{key} = {json.dumps(value)}" for key, value in {**values, **more}.items()]
    (directory / "parity.toml").write_text("[[port]]\n" + "\n".join(lines) + "\n")


def parity(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "harness.cli", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


# Descriptions


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[port]]\nnam = 'x'", ["port number 1", "'nam'", "did you mean 'name'"]),
        ("[[port]]\nname = 'x'\nfamily = 'nanogpt'\nmodel = 'm:M'", ["'x'", "'config' is missing"]),
        ("[[port]]\nname='x'\nfamily='nanogpt'\nmodel='nonsense'\nconfig='m:C'", ["'x'", "model = 'nonsense'"]),
        (
            "[[port]]\nname='x'\nfamily='f'\nmodel='m:M'\nconfig='m:C'\nload='chekpoint:f'",
            ["did you mean 'checkpoint'"],
        ),
        ("[[port]]\nname='x'\nfamily='f'\nmodel='m:M'\nconfig='m:C'\nload='checkpoint'", ["after the colon"]),
        ("[[port]]\nname='x'\nfamily='f'\nmodel='m:M'\nconfig='m:C'\nload='command:run {checkpoint}'", ["{out}"]),
        ("[[port]]\nname='x'\nfamily='f'\nmodel='m:M'\nconfig='m:C'\nlabels='shifted'", ["'hf' or 'preshifted'"]),
        ("[[port]]\nname='x'\nfamily='f'\nmodel='m:M'\nconfig='m:C'\nmin_checks='many'", ["min_checks", "count"]),
        ("[[port]]\nname='x'\nfamily='f'\nmodel='m:M'\nconfig='m:C'\nlacks={'a.b'=3}", ["lacks", "reason"]),
        ("[[port]]\nname='x'\nfamily='f'\nmodel='m:M'\nconfig='m:C'\ncode='one.py'", ["code", "list"]),
        ("ports = 3", ["'ports'", "did you mean 'port'"]),
        ("[[port]\n", ["parity.toml", "not valid TOML"]),
    ],
)
def test_a_wrong_description_is_one_line_that_names_the_key(tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "parity.toml").write_text(text)
    with pytest.raises(DescriptionError) as caught:
        read_ports(tmp_path)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_two_ports_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(DESCRIPTION * 2)
    with pytest.raises(DescriptionError, match=r"'mine'.*twice"):
        read_ports(tmp_path)


@pytest.mark.parametrize("key", ["lacks", "xfail"])
def test_a_pattern_that_matches_no_check_is_an_error(key: str) -> None:
    port = dataclasses.replace(reference_port(), **{key: {"forward.logit": "typo"}})
    with pytest.raises(DescriptionError, match=r"forward\.logit.*did you mean 'forward\.logits'"):
        plan([port], Options())


def test_an_unknown_family_names_the_nearest() -> None:
    with pytest.raises(DescriptionError, match=r"'nanogtp'.*did you mean 'nanogpt'"):
        plan([dataclasses.replace(reference_port(), family="nanogtp")], Options())


def test_a_lone_file_may_import_its_siblings_relatively(tmp_path: Path) -> None:
    (tmp_path / "sibling.py").write_text("WIDTH = 7\n")
    (tmp_path / "model.py").write_text("from .sibling import WIDTH\n\n\nclass Model:\n    width = WIDTH\n")
    assert load_object("model.py:Model", root=tmp_path).width == 7


def test_a_missing_class_names_those_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text("class Model:\n    pass\n")
    with pytest.raises(DescriptionError, match=r"no 'Modle' in other.py.*'Model'"):
        load_object("other.py:Modle", root=tmp_path)


def test_code_that_cannot_be_imported_is_a_finding_about_that_code(tmp_path: Path) -> None:
    (tmp_path / "old.py").write_text("from transformers.modeling_utils import find_pruneable_heads_and_indices_x\n")
    with pytest.raises(Mismatch, match="ImportError"):
        load_object("old.py:Model", root=tmp_path)


# A script


def test_check_parity_gives_results_and_gates_against_ones_own_original(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(
        "from reference_models.nanogpt.original import GPT as Ours, GPTConfig\n\n\nclass GPT(Ours):\n    pass\n"
    )
    port = dataclasses.replace(reference_port(), original=f"{tmp_path / 'model.py'}:GPT")
    results = check_parity(port, checks=["forward.logits", "loss.value"], backends=["torch-cpu"])
    assert {result.status for result in results} == {"passed"}
    (tmp_path / "other.py").write_text(
        "from reference_models.nanogpt.original import GPT as Ours, GPTConfig\n\n\nclass GPT(Ours):\n"
        "    def forward(self, idx, targets=None):\n"
        "        logits, loss = super().forward(idx, targets)\n        return 2 * logits, loss\n"
    )
    other = dataclasses.replace(port, original=f"{tmp_path / 'other.py'}:GPT")
    assert {r.status for r in check_parity(other, checks=["forward.lengths"], backends=["torch-cpu"])} == {"failed"}


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ("def __init__(self, config):\n        raise RuntimeError('no constructor today')", "no constructor today"),
        ("def forward(self, *a, **k):\n        raise KeyError('gone')", "KeyError"),
        ("def forward(self, *a, **k):\n        return 'nothing'", "without logits"),
        (
            "def __repr__(self):\n        raise RuntimeError('shy')\n\n"
            "    def forward(self, *a, **k):\n        return self",
            "",
        ),
    ],
)
def test_a_broken_port_gives_failed_results_and_never_raises(tmp_path: Path, body: str, word: str) -> None:
    (tmp_path / "bad.py").write_text(
        f"from {MODULE} import NanoGPTLMHeadModel\n\n\nclass Bad(NanoGPTLMHeadModel):\n    {body}\n"
    )
    port = dataclasses.replace(reference_port(), model=f"{tmp_path / 'bad.py'}:Bad", load="state_dict")
    results = check_parity(port, checks=["forward.lengths", "config.fields"], backends=["torch-cpu"])
    status = {result.check: result for result in results}
    assert status["config.fields"].status == "passed"
    assert status["forward.lengths"].status == "failed"
    assert word in status["forward.lengths"].reason
    assert "\n" not in status["forward.lengths"].reason


def test_a_planted_bug_shrinks_to_one_layer_one_head_and_names_its_module(tmp_path: Path) -> None:
    results = check_parity(broken_port(tmp_path), checks=["forward.logits"], backends=["torch-cpu"])
    failed = [result for result in results if result.status == "failed"]
    assert failed
    for result in failed:
        assert result.config is not None
        assert (result.config["n_layer"], result.config["n_head"]) == (1, 1)
        assert result.first_divergence == "block.0.mlp"
        assert result.metrics["error"] > 1e-9


def test_what_a_chatty_port_prints_stays_away_from_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "chatty.py").write_text(
        f"import warnings\nfrom {MODULE} import NanoGPTLMHeadModel\n\n\nclass Chatty(NanoGPTLMHeadModel):\n"
        "    def forward(self, *a, **k):\n        print('hello')\n        warnings.warn('careful')\n"
        "        return super().forward(*a, **k)\n"
    )
    port = dataclasses.replace(reference_port(), model=f"{tmp_path / 'chatty.py'}:Chatty", load="state_dict")
    check_parity(port, checks=["forward.lengths"], backends=["torch-cpu"])
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_the_gate_draws_the_same_cases_on_every_run_and_a_seed_others() -> None:
    item = plan([reference_port()], Options(checks=["forward.logits"]))[0]
    assert seed_of(item, Options()) == seed_of(item, Options())
    assert seed_of(item, Options()) != seed_of(item, Options(seed=1))
    assert seed_of(item, Options(profile="nightly")) is None


@pytest.mark.parametrize(
    "wrong", [{"backends": ["torch-cup"]}, {"dtypes": ["float65"]}, {"profile": "gat"}, {"checks": ["nothing.*"]}]
)
def test_options_that_do_not_exist_are_refused(wrong: Mapping[str, Any]) -> None:
    with pytest.raises(DescriptionError):
        Options(**wrong)


def test_lacks_skips_with_its_reason_and_xfail_is_strict(tmp_path: Path) -> None:
    port = dataclasses.replace(
        broken_port(tmp_path),
        lacks={"config.*": "no time"},
        xfail={"forward.lengths": "issue 12", "api.output_type": "issue 13"},
    )
    checks = ["config.fields", "forward.lengths", "api.output_type"]
    results = {r.check: r for r in check_parity(port, checks=checks, backends=["torch-cpu"])}
    assert (results["config.fields"].status, "no time" in results["config.fields"].reason) == ("skipped", True)
    assert (results["forward.lengths"].status, "issue 12" in results["forward.lengths"].reason) == ("xfailed", True)
    assert results["api.output_type"].status == "xpassed"


# pytest


def test_plain_pytest_leaves_the_checks_out_and_the_marker_brings_them(pytester: pytest.Pytester) -> None:
    pytester.makepyprojecttoml(DESCRIPTION)
    pytester.makepyfile("def test_own():\n    pass\n")
    assert pytester.runpytest_subprocess("--strict-markers").parseoutcomes() == {"passed": 1}
    listed = pytester.runpytest_subprocess("-m", "parity", "--collect-only", "-q", *FAST)
    listed.stdout.fnmatch_lines(["parity::mine::config.fields[[]direct-torch-cpu-float64[]]"])
    outcome = pytester.runpytest_subprocess("--parity", *FAST[:2], "--parity-backend", "torch-cpu").parseoutcomes()
    assert outcome == {"passed": 2}
    one = pytester.runpytest_subprocess("parity::mine::config.fields[direct-torch-cpu-float64]")
    assert one.parseoutcomes()["passed"] == 1


def test_collection_imports_no_framework(pytester: pytest.Pytester) -> None:
    pytester.makepyprojecttoml(DESCRIPTION)
    pytester.makeconftest(
        "import sys\n\ndef pytest_collection_finish(session):\n    assert session.items\n"
        "    assert not {'torch', 'transformers', 'mlx'} & set(sys.modules)\n"
    )
    assert pytester.runpytest_subprocess("-m", "parity", "--collect-only", "-q").ret == 0


def test_a_failure_under_pytest_and_its_reports(pytester: pytest.Pytester) -> None:
    port = broken_port(pytester.path)
    describe(port, pytester.path)
    run = pytester.runpytest_subprocess(
        "-m", "parity", *FAST, "-n", "2", "--junitxml=own.xml", "--parity-report=out", "-p", "no:cacheprovider"
    )
    assert run.ret == 1
    run.stdout.fnmatch_lines(["*logits: relative error*", "*n_layer=1 n_head=1*", "*first at*block.0.mlp*"])
    assert "Traceback" not in run.stdout.str()
    report = json.loads((pytester.path / "out/report.json").read_text())
    statuses = {(r["check"], r["route"]): r["status"] for r in report["results"]}
    assert statuses["config.fields", "checkpoint"] == "passed"
    assert statuses["forward.logits", "checkpoint"] == "failed"
    bundle = Path(next(r["bundle"] for r in report["results"] if r["bundle"]))
    assert {"failure.json", "weights.safetensors", "batch.safetensors"} <= {f.name for f in bundle.iterdir()}
    own = ElementTree.parse(pytester.path / "own.xml").getroot()
    named = {(p.get("name"), p.get("value")) for p in own.iter("property")}
    assert ("check", "forward.logits") in named
    assert any(name == "config" and json.loads(value or "")["n_layer"] == 1 for name, value in named)
    assert (pytester.path / "out/junit.xml").exists() and (pytester.path / "out/report.md").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--parity-port", "mnie"], 2, "no port 'mnie'; did you mean 'mine'"),
        (["--parity-checks", "forward.logit"], 2, "did you mean 'forward.logits'"),
        (["--parity-backend", "cuda"], 2, "there is no backend 'cuda'"),
        (["--parity-require", "torch-cuda"], 3, "there is no CUDA device"),
    ],
)
def test_wrong_requests_end_pytest_with_one_line(
    pytester: pytest.Pytester, arguments: list[str], code: int, words: str
) -> None:
    if code == 3 and unavailable("torch-cuda") is None:
        pytest.skip("there is a CUDA device here")
    pytester.makepyprojecttoml(DESCRIPTION)
    run = pytester.runpytest_subprocess("-m", "parity", *arguments)
    assert run.ret == code
    assert words in run.stdout.str() + run.stderr.str()
    assert "Traceback" not in run.stdout.str() + run.stderr.str()


def test_fewer_checks_than_asked_for_fail_the_run(pytester: pytest.Pytester) -> None:
    pytester.makepyprojecttoml(DESCRIPTION)
    run = pytester.runpytest_subprocess("-m", "parity", *FAST[:2], "--parity-min-checks", "3")
    assert run.ret == 1
    run.stdout.fnmatch_lines(["*port 'mine': 1 checks ran, 3 were asked for*"])


def test_parametrize_with_checks_in_a_test_file(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        textwrap.dedent(
            """
            from harness import Port, parametrize_with_checks

            PORT = Port(
                name="mine",
                family="nanogpt",
                model="reference_models.nanogpt.modeling_nanogpt:NanoGPTLMHeadModel",
                config="reference_models.nanogpt.configuration_nanogpt:NanoGPTConfig",
            )

            @parametrize_with_checks([PORT], checks=["config.fields", "forward.lengths"], backends=["torch-cpu"])
            def test_alone(check):
                assert check().status == "passed"

            @parametrize_with_checks([PORT], checks=["config.fields"])
            def test_with_port(port, check):
                assert check(port).port == port.name
            """
        )
    )
    assert pytester.runpytest_subprocess().parseoutcomes() == {"passed": 3}


# The command line


def test_check_prints_a_table_or_one_json_document(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(DESCRIPTION)
    plain = parity("check", "--checks", "config.fields", cwd=tmp_path)
    assert (plain.returncode, plain.stderr) == (0, "")
    assert "1 check run: 1 passed" in plain.stdout
    machine = parity("check", "--checks", "config.fields", "--json", cwd=tmp_path)
    assert json.loads(machine.stdout)["checks_run"] == 1
    undescribed = parity(
        "check",
        "--family",
        "nanogpt",
        "--model",
        f"{MODULE}:NanoGPTLMHeadModel",
        "--checks",
        "config.fields",
        cwd=tmp_path,
    )
    assert undescribed.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["check", "--port", "x"], 2, "describes no port"),
        (["check", "--family", "nanogpt"], 2, "--family and --model"),
        (["check", "--family", "nanogpt", "--model", "gone.py:M"], 2, "no file"),
        (["repro", "nowhere"], 2, "not a bundle"),
        (["golden", "verify", "nowhere"], 2, "nowhere"),
        (["selftest", "--family", "nanogtp"], 2, "did you mean 'nanogpt'"),
    ],
)
def test_bad_requests_get_one_line_and_their_exit_code(
    tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    done = parity(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_required_device_that_is_not_here_ends_with_exit_3(tmp_path: Path) -> None:
    if unavailable("torch-cuda") is None:
        pytest.skip("there is a CUDA device here")
    (tmp_path / "pyproject.toml").write_text(DESCRIPTION)
    done = parity("check", "--require", "torch-cuda", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (3, "parity: there is no CUDA device (required: torch-cuda)\n")


def test_list_says_what_is_here(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(DESCRIPTION)
    document = json.loads(parity("list", "--json", cwd=tmp_path).stdout)
    assert "nanogpt" in document["families"]
    assert document["ports"][0]["name"] == "mine"
    assert document["backends"]["torch-cpu"] == "here"
    assert any(check["id"] == "forward.logits" for check in document["checks"])


def test_a_bundle_replays_with_the_same_numbers_and_passes_with_the_repaired_file(tmp_path: Path) -> None:
    port = broken_port(tmp_path)
    describe(port, tmp_path)
    failed = parity("check", "--checks", "forward.lengths", "--backend", "torch-cpu", "--report", "out", cwd=tmp_path)
    assert failed.returncode == 1
    result = json.loads((tmp_path / "out/report.json").read_text())["results"][0]
    replayed = parity("repro", result["bundle"], "--json", cwd=tmp_path)
    assert replayed.returncode == 1
    assert json.loads(replayed.stdout)["metrics"] == result["metrics"]
    repaired = parity("repro", result["bundle"], "--model", f"{MODULE}:NanoGPTLMHeadModel", cwd=tmp_path)
    assert repaired.returncode == 0, repaired.stdout + repaired.stderr
    (Path(result["bundle"]) / "failure.json").write_text("{}")
    assert parity("repro", result["bundle"], cwd=tmp_path).returncode == 2


# Planted bugs


def test_an_edit_that_does_not_match_is_an_error_before_anything_runs(tmp_path: Path) -> None:
    file = reference_port().code[0]
    mutant = Mutant(id="stale", file=file, find="no such text", replace="", bug="-", killers=("forward.logits",))
    with pytest.raises(DescriptionError, match=r"'stale'.*0 times.*expected 1"):
        plant(mutant, reference_port(), tmp_path)


def test_selftest_says_killed_survived_and_green(tmp_path: Path) -> None:
    done = parity("selftest", "--mutants", "gelu-relu", "--mutants", "hidden-states-*", "--json", cwd=REPOSITORY)
    verdicts = {entry["mutant"]: entry for entry in json.loads(done.stdout)}
    assert done.returncode == 0
    assert verdicts["gelu-relu"]["verdict"] == "killed"
    assert "forward.logits" in verdicts["gelu-relu"]["killers"]
    assert verdicts["hidden-states-not-normed"]["killers"] == ["api.hidden_states"]
