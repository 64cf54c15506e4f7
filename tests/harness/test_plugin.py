# SPDX-License-Identifier: Apache-2.0
"""The pytest plugin as another repository meets it, in runs of its own: what they collect, say and end with."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from harness import Port
from harness.backends import unavailable
from harness.checks import CATALOGUE
from harness.results import Result

pytest_plugins = ["pytester"]

ALL_LACKED = {"*": "nothing to see here"}
TANH = "for block in self.transformer.h:\n    block.mlp.gelu.approximate = 'tanh'"
CHOSEN = ("forward.blocks", "forward.lengths", "forward.causal", "masks.additive")
CAUSAL = "forward.causal[direct-torch-cpu-float64]"

PlainPort = Callable[..., Port]
Describe = Callable[..., None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One run of pytest on three ports: one that is right, one with another GELU, one that cannot be built."""

    code: int
    output: str
    results: dict[str, Result]
    cases: dict[str, ElementTree.Element]
    directory: Path


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, plain_port: PlainPort, describe: Describe) -> Path:
    directory = tmp_path_factory.mktemp("project")
    describe(
        plain_port(
            directory,
            "wrong",
            forward=TANH,
            xfail={"forward.lengths": "issue 12", "forward.causal": "issue 13"},
            lacks={"masks.*": "it was trained without padding"},
        ),
        plain_port(directory, "unbuilt", more="def __init__(self, config):\n    raise RuntimeError('no model today')"),
        plain_port(directory, "right"),
    )
    return directory


def run(project: Path, *options: str) -> Run:
    name = f"report{len(list(project.glob('report*')))}"
    command = [sys.executable, "-m", "pytest", "-m", "parity", "--strict-markers", *options]
    command += ["--parity-backend", "torch-cpu", *(f"--parity-checks={check}" for check in CHOSEN)]
    command += ["--parity-report", name, f"--junitxml={name}.xml", "-p", "no:cacheprovider"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "FORCE_COLOR"))}
    done = subprocess.run(
        command, cwd=project, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    report = json.loads((project / name / "report.json").read_text())
    results = [Result(**values) for values in report["results"]]
    cases = ElementTree.parse(project / f"{name}.xml").iter("testcase")
    return Run(
        code=done.returncode,
        output=done.stdout + done.stderr,
        results={f"{r.port}::{r.check}[{r.route}-{r.backend}-{r.dtype}]": r for r in results},
        cases={f"{(case.get('classname') or '').rpartition('.')[2]}::{case.get('name')}": case for case in cases},
        directory=project / name,
    )


@pytest.fixture(scope="module")
def alone(project: Path) -> Run:
    return run(project, "-v")


# One run, and what it says


def test_a_run_with_failures_ends_with_one_and_counts_every_check(alone: Run) -> None:
    assert alone.code == 1
    assert len(alone.results) == len(alone.cases) == 3 * len(CHOSEN)
    assert "11 checks run: 4 passed, 5 failed, 1 xfailed, 1 xpassed; 1 skipped" in alone.output


def test_the_ids_shown_can_be_given_back(alone: Run) -> None:
    shown = re.findall(r"^(parity::\S+) [A-Z]", alone.output, flags=re.MULTILINE)
    assert sorted(shown) == sorted(f"parity::{name}" for name in alone.results)


def test_a_port_that_cannot_be_built_fails_each_of_its_checks_and_no_other(alone: Run) -> None:
    unbuilt = [result for result in alone.results.values() if result.port == "unbuilt"]
    assert {result.status for result in unbuilt} == {"failed"}
    assert {"RuntimeError: no model today" in result.reason for result in unbuilt} == {True}
    assert {result.status for result in alone.results.values() if result.port == "right"} == {"passed"}


def test_xfail_is_strict_and_lacks_is_skipped_with_its_reason(alone: Run) -> None:
    expected, passing = alone.cases["wrong::forward.lengths[direct-torch-cpu-float64]"], alone.cases[f"wrong::{CAUSAL}"]
    assert [child.get("type") for child in expected if child.tag == "skipped"] == ["pytest.xfail"]
    assert [child.tag for child in passing if child.tag != "properties"] == ["failure"]
    assert "issue 13" in alone.results[f"wrong::{CAUSAL}"].reason
    skipped = alone.cases["wrong::masks.additive[direct-torch-cpu-float64]"].find("skipped")
    assert skipped is not None
    assert "it was trained without padding" in (skipped.get("message") or "")


def test_a_failure_shows_reason_configuration_and_numbers_and_no_traceback(alone: Run) -> None:
    section = alone.output.partition("wrong: forward.blocks[")[2] or alone.output.partition("wrong::forward.blocks[")[2]
    for words in ("relative error", "n_layer=1 n_head=1", "error=", "bound=1e-09", "block.0.mlp"):
        assert words in section.partition("\n___")[0]
    for words in ("Traceback", "runner.py:", "exploration.py", "def forward"):
        assert words not in alone.output


def test_junit_carries_the_check_and_the_configuration_that_failed(alone: Run) -> None:
    case = alone.cases["wrong::forward.blocks[direct-torch-cpu-float64]"]
    properties = {item.get("name"): item.get("value") or "" for item in case.iter("property")}
    assert properties["check"] == "forward.blocks"
    assert {key: json.loads(properties["config"])[key] for key in ("n_layer", "n_head")} == {"n_layer": 1, "n_head": 1}


def test_reports_and_a_bundle_for_each_failure_are_written(alone: Run) -> None:
    assert {path.name for path in alone.directory.iterdir()} == {"bundles", "junit.xml", "report.json", "report.md"}
    failed = [result for result in alone.results.values() if result.status in ("failed", "xfailed")]
    bundles = {Path(result.bundle or "") for result in failed}
    assert bundles == set((alone.directory / "bundles").iterdir())
    assert len(bundles) == len(failed)


def test_two_workers_give_the_same_results(project: Path, alone: Run) -> None:
    several = run(project, "-n", "2")
    assert several.code == alone.code

    def told(results: dict[str, Result]) -> dict[str, Result]:
        # Numbers depend on the order of sums, hence on the number of threads.
        return {
            name: dataclasses.replace(result, seconds=0, bundle=None, metrics={}, reason=result.reason[:20])
            for name, result in results.items()
        }

    assert told(several.results) == told(alone.results)


# What is collected


@pytest.fixture
def nothing(pytester: pytest.Pytester, plain_port: PlainPort, describe: Describe) -> pytest.Pytester:
    """A port that lacks everything: its checks are collected and skipped, without a framework."""
    describe(plain_port(pytester.path, "nothing", lacks=ALL_LACKED), plain_port(pytester.path, "other"))
    return pytester


@pytest.mark.parametrize("options", [["--parity", "--strict-markers"], ["-m", "parity and not cuda"], []])
def test_collecting_imports_no_framework_and_runs_beside_other_tests(
    nothing: pytest.Pytester, options: list[str]
) -> None:
    nothing.makepyfile("def test_own(): pass")
    nothing.makeconftest(
        "import sys\n\ndef pytest_collection_finish(session):\n"
        "    found = {'torch', 'transformers', 'mlx', 'jax'} & set(sys.modules)\n"
        "    assert not found, found\n"
    )
    listed = nothing.runpytest_subprocess("--collect-only", "-q", *options)
    assert listed.ret == 0
    lines = listed.outlines
    ids = [line for line in lines if line.startswith("parity::")]
    assert ("test_own" in "".join(lines)) is ("-m" not in options)
    assert bool(ids) is bool(options)
    for line in ids:
        assert re.fullmatch(r"parity::(nothing|other)::[a-z_]+\.[a-z_0-9]+\[[a-z_]+-torch-[a-z]+-[a-z0-9]+\]", line)
    assert any("torch-cuda" in line for line in ids) is ("--parity" in options)


@pytest.mark.parametrize(
    ("chosen", "count"),
    [
        ([f"parity::other::{CAUSAL}"], 1),
        (["parity::other::forward.causal"], 3),
        (["parity::other::forward.causal", f"parity::nothing::{CAUSAL}"], 4),
        (["-m", "parity", "-k", "nothing and causal and torch-cpu"], 1),
        (["-m", "parity and cuda", "--parity-port", "other", "--parity-checks", "*.causal"], 1),
    ],
)
def test_checks_are_selected_by_id_keyword_and_marker(nothing: pytest.Pytester, chosen: list[str], count: int) -> None:
    nothing.makepyfile("def test_own(): pass")
    listed = nothing.runpytest_subprocess("--collect-only", "-q", *chosen)
    assert len([line for line in listed.outlines if line.startswith("parity::")]) == count
    assert listed.ret == 0


def test_the_marker_hub_selects_what_talks_to_a_hub(nothing: pytest.Pytester) -> None:
    listed = nothing.runpytest_subprocess("--collect-only", "-q", "-m", "parity and hub", "--parity-port", "other")
    found = {line.partition("[")[0].rpartition("::")[2] for line in listed.outlines if line.startswith("parity::")}
    group = {check.id for check in CATALOGUE if check.id.startswith("hub.")}
    assert len(group) >= 13
    assert found == {"forward.logits", *group}
    routes = [line for line in listed.outlines if "forward.logits" in line]
    assert [line.partition("[")[2] for line in routes] == ["hub-torch-cpu-float64]"]


def test_the_markers_are_registered(pytester: pytest.Pytester) -> None:
    listed = pytester.runpytest_subprocess("--markers").stdout.str()
    for name in ("parity", "cuda", "metal", "mlx", "hub", "slow"):
        assert f"@pytest.mark.{name}: " in listed


# How a run ends


def test_a_description_asks_for_checks_that_run_unless_some_are_selected(
    pytester: pytest.Pytester, plain_port: PlainPort, describe: Describe
) -> None:
    describe(plain_port(pytester.path, "nothing", lacks=ALL_LACKED, min_checks=75))
    whole = pytester.runpytest_subprocess("-m", "parity")
    assert whole.ret == 1
    whole.stdout.fnmatch_lines(["*port 'nothing': 0 checks ran, 75 were asked for*"])
    assert pytester.runpytest_subprocess("-m", "parity", "-k", "weights").ret == 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["-m", "parity", "--parity-port", "ohter", "-n", "2"], 2, "no port 'ohter'; did you mean 'other'"),
        (["-m", "parity", "--parity-require", "torch-cuda", "-n", "2"], 3, "no CUDA device"),
        ([f"parity::other::{CAUSAL}", "parity::other::forwd.causal"], 2, "'parity::other::forwd.causal'"),
    ],
)
def test_wrong_requests_end_with_one_line_also_before_workers_start(
    nothing: pytest.Pytester, arguments: list[str], code: int, words: str
) -> None:
    if code == 3 and unavailable("torch-cuda") is None:
        pytest.skip("there is a CUDA device here")
    done = nothing.runpytest_subprocess(*arguments)
    assert done.ret == code
    text = done.stdout.str() + done.stderr.str()
    assert len({line.strip("! ") for line in text.splitlines() if words in line and "_pytest" in line}) == 1
    assert "Traceback" not in text and "node down" not in text


@pytest.mark.parametrize(
    ("description", "words"),
    [
        ("[[port]]\nnam = 'x'\n", "'nam'; did you mean 'name'"),
        ("[[port]]\nname = 'x'\nfamily = 'nanogpt'\nmodel = 'a.py:A'\nconfig = 'a.py:C'\n", "no file"),
    ],
)
def test_a_wrong_description_ends_with_two_and_one_line(
    pytester: pytest.Pytester, description: str, words: str
) -> None:
    (pytester.path / "parity.toml").write_text(description)
    done = pytester.runpytest_subprocess("-m", "parity", "--parity-checks", "config.fields")
    assert done.ret == 2
    lines = [line for line in done.outlines if words in line]
    assert len(lines) == 1
    assert "Traceback" not in done.stdout.str()


def test_a_wrong_description_does_not_concern_who_did_not_ask(pytester: pytest.Pytester) -> None:
    (pytester.path / "parity.toml").write_text("[[port]]\nnam = 'x'\n")
    pytester.makepyfile("def test_own(): pass")
    assert pytester.runpytest_subprocess().parseoutcomes() == {"passed": 1}


# parametrize_with_checks


DOOR = """
from pathlib import Path
from harness import Port, parametrize_with_checks

def described(name, **more):
    return Port(name=name, family="nanogpt", model=f"{name}.py:Port", config=f"{name}.py:Config",
                root=Path(__file__).parent, lacks={"masks.*": "no masks"}, **more)
"""


@pytest.fixture
def door(pytester: pytest.Pytester, plain_port: PlainPort) -> Iterator[pytest.Pytester]:
    plain_port(pytester.path, "right")
    plain_port(pytester.path, "wrong", forward=TANH)
    return pytester


def test_a_test_file_runs_checks_with_their_outcome_and_nothing_of_the_plugin(door: pytest.Pytester) -> None:
    door.makepyfile(
        DOOR
        + """
CHOSEN = {"checks": ["forward.blocks", "masks.additive"], "backends": ["torch-cpu"]}

@parametrize_with_checks([described("right"), described("wrong")], **CHOSEN)
def test_alone(check):
    assert check().status == "passed"

@parametrize_with_checks([described("wrong", xfail={"forward.*": "issue 12"})], **CHOSEN)
def test_with_port(port, check):
    check(port)
    raise AssertionError("not reached")
"""
    )
    done = door.runpytest_subprocess("-v")
    assert done.parseoutcomes() == {"passed": 1, "failed": 1, "xfailed": 1, "skipped": 3}
    done.stdout.fnmatch_lines(
        [
            "*::test_alone[[]right-forward.blocks[[]direct-torch-cpu-float64[]][]] PASSED*",
            "*::test_alone[[]wrong-forward.blocks[[]direct-torch-cpu-float64[]][]] FAILED*",
            "E *CheckFailed: failed: *relative error*",
            "E *config*n_layer=1 n_head=1*",
        ]
    )
    assert "harness/plugin.py" not in done.stdout.str()
    assert "def settle" not in done.stdout.str()


def test_the_results_of_a_test_file_reach_the_reports(door: pytest.Pytester) -> None:
    door.makepyfile(
        DOOR
        + """
@parametrize_with_checks([described("wrong")], checks=["forward.blocks", "masks.additive"], backends=["torch-cpu"])
def test_wrong(check):
    check()
"""
    )
    done = door.runpytest_subprocess("--parity-report", "reports", "--junit-xml", "own.xml", "-n", "1")
    assert done.parseoutcomes() == {"failed": 1, "skipped": 1}
    report = json.loads((door.path / "reports/report.json").read_text())
    assert [(r["check"], r["status"]) for r in report["results"]] == [
        ("forward.blocks", "failed"),
        ("masks.additive", "skipped"),
    ]
    assert Path(report["results"][0]["bundle"]).is_dir()
    assert '<property name="check" value="forward.blocks"' in (door.path / "own.xml").read_text()
    done.stdout.fnmatch_lines(["1 check run: 1 failed; 1 skipped"])


def test_a_wrong_description_in_a_test_file_is_an_error_of_collection(door: pytest.Pytester) -> None:
    door.makepyfile(
        DOOR + "\n@parametrize_with_checks([described('right')], checks=['forward.logit'])\ndef test(check): check()\n"
    )
    done = door.runpytest_subprocess()
    assert done.parseoutcomes() == {"errors": 1}
    assert done.ret == 2
    done.stdout.fnmatch_lines(["E *DescriptionError: no check matches 'forward.logit'; did you mean*"])
