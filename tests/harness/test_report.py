# SPDX-License-Identifier: Apache-2.0
"""Reports say what happened, whatever the results hold; files appear whole or not at all."""

from __future__ import annotations

import io
import json
import math
import os
import pty
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from harness.errors import DescriptionError
from harness.report import (
    Header,
    count_line,
    make_console,
    new_directory,
    print_table,
    progress,
    write_atomically,
    write_reports,
)
from harness.report.json_report import document
from harness.report.markdown import LARGEST
from harness.report.markdown import render as markdown
from harness.report.summary import compact_config, number, rows, scientific, telling_number
from harness.results import Result, as_json

ROOT = Path(__file__).parents[2]
HEADER = Header(
    profile="gate", seed=7, versions={"torch": "2.9", "transformers": "5.1"}, settings={"tf32": False, "threads": 1}
)
CONFIG = {"n_layer": 1, "n_head": 1, "bias": False, "eps": 1e-5, "act": "gelu"}
HOSTILE = "a < b & c ]]> \x00 \x1b[31m | `tick` *bold* [red] \U0001f600 \ud800 \u202e\r\nsecond line"
BUNDLE = "reports/my bundle/nanogpt-forward.logits-direct-torch-cpu-float64"
IMPORT = "cannot import name 'nothing' from 'mypkg.modeling'"


def made(check: str, status: Any = "passed", **fields: Any) -> Result:
    base: dict[str, Any] = {"port": "mine", "family": "nanogpt", "route": "direct", "backend": "torch-cpu"}
    base |= {"dtype": "float64", "seconds": 0.25, "examples": 20}
    return Result(**(base | fields), check=check, status=status)


def mixed() -> list[Result]:
    """Every status, two ports, more than one route."""
    return [
        made("config.roundtrip", metrics={"error": 0.0}),
        made("config.roundtrip", route="pretrained", metrics={"error": 2.5e-14}),
        made(
            "forward.logits",
            "failed",
            reason="logits differ from the original's",
            config=CONFIG,
            metrics={"error": 3.14e-3, "bound": 1e-9},
            first_divergence="transformer.h.0.mlp.act",
            bundle=BUNDLE,
        ),
        made("training.init", "xfailed", reason="upstream issue 12"),
        made("training.gradient_checkpointing", "xpassed", reason="holds, so remove its xfail entry"),
        made("masks.left", "skipped", reason="the family has no masks"),
        made("masks.right", "skipped", reason="the family has no masks"),
        made("loss.value", "error", reason=IMPORT, port="other"),
        made("loss.pure", "error", reason=IMPORT, port="other"),
        made("precision.float16", port="other", dtype="float16", metrics={"iterations": 90, "ratio": 1.25}),
    ]


def table(results: list[Result], *, width: int = 120, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    console = Console(file=file, width=width, highlight=False)
    print_table(results, header=HEADER, console=console)
    file.flush()
    return raw.getvalue().decode(encoding)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# What every report says


@pytest.mark.parametrize(
    ("results", "line"),
    [
        ([], "0 checks run"),
        ([made("a.b")], "1 check run: 1 passed"),
        ([made("a.b", "skipped", reason="no")], "0 checks run; 1 skipped"),
        (mixed(), "8 checks run: 3 passed, 1 failed, 2 errors, 1 xfailed, 1 xpassed; 2 skipped"),
    ],
)
def test_count_line(results: list[Result], line: str) -> None:
    assert count_line(results) == line


@pytest.mark.parametrize(
    ("metrics", "shown"),
    [
        ([{}], ""),
        ([{"ratio": 9.0, "error": 3.14e-14}], "3.1e-14"),
        ([{"error": 1e-3}, {"error": math.nan}, {"error": math.inf}], "nan"),
        ([{"error": 0.0}], "0"),
        ([{"iterations": 90, "logits_ratio": 1.0, "loss ratio": 1.5}], "loss ratio 1.5"),
        ([{"generation": 4, "other": 5}, {"generation": 6}, {}], "generation 6"),
    ],
)
def test_telling_number(metrics: list[dict[str, float]], shown: str) -> None:
    assert telling_number([made("a.b", metrics=found) for found in metrics]) == shown


def test_numbers_and_configurations_are_short() -> None:
    assert [scientific(value) for value in (3.14e-14, math.inf, 12345.0)] == ["3.1e-14", "inf", "1.2e+04"]
    values = (3.0, 0.5, 1e-9, 2.5e9, -math.inf, math.nan)
    assert [number(value) for value in values] == ["3", "0.5", "1.0e-09", "2.5e+09", "-inf", "nan"]
    assert compact_config(CONFIG) == "n_layer=1 n_head=1 bias=False eps=1e-05 act=gelu"
    assert compact_config({"a": "two words", "b": [1, 2], "c": None}) == "a='two words' b=[1, 2] c=None"
    assert compact_config(None) == ""


def test_variants_of_a_check_share_a_row_and_failures_come_first() -> None:
    found = [(row.port, row.check, row.status, row.routes, row.seconds) for row in rows(mixed())]
    assert found == [
        ("mine", "forward.logits", "failed", "direct", 0.25),
        ("mine", "training.gradient_checkpointing", "xpassed", "direct", 0.25),
        ("other", "loss.value", "error", "direct", 0.25),
        ("other", "loss.pure", "error", "direct", 0.25),
        ("mine", "config.roundtrip", "passed", "direct pretrained", 0.5),
        ("mine", "training.init", "xfailed", "direct", 0.25),
        ("other", "precision.float16", "passed", "direct", 0.25),
    ]


# JSON


def test_json_parses_back_to_the_same_results(tmp_path: Path) -> None:
    results = [*mixed(), made("a.b", "failed", reason=HOSTILE, config={"a": [1, 2], "b": {"c": None}})]
    write_reports(tmp_path, results, header=HEADER)
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report) == ["versions", "settings", "profile", "seed", "checks_run", "results"]
    assert (report["versions"], report["settings"]) == (HEADER.versions, HEADER.settings)
    assert (report["profile"], report["seed"], report["checks_run"]) == ("gate", 7, 9)
    assert [Result(**fields) for fields in report["results"]] == results


def test_json_has_no_nan_and_takes_any_value() -> None:
    strange = made(
        "a.b",
        "failed",
        reason="x",
        metrics={"error": math.nan, "up": math.inf, "down": -math.inf},
        config={"path": Path("a/b"), "sizes": (1, 2), 3: {"eps": math.nan}},
    )
    text = json.dumps(document([strange], header=HEADER), allow_nan=False)
    fields = json.loads(text)["results"][0]
    assert fields["metrics"] == {"error": "NaN", "up": "Infinity", "down": "-Infinity"}
    assert math.isnan(float(fields["metrics"]["error"])) and float(fields["metrics"]["down"]) == -math.inf
    assert fields["config"] == {"path": "a/b", "sizes": [1, 2], "3": {"eps": "NaN"}}
    assert list(fields) == list(as_json(strange))


# JUnit


def test_junit_has_one_suite_per_port_and_counts(tmp_path: Path) -> None:
    write_reports(tmp_path, mixed(), header=HEADER)
    root = ElementTree.parse(tmp_path / "junit.xml").getroot()
    counts = ("tests", "failures", "errors", "skipped")
    assert [root.get(name) for name in counts] == ["10", "2", "2", "3"]
    mine, other = root.findall("testsuite")
    assert [mine.get(name) for name in ("name", *counts)] == ["mine", "7", "2", "0", "3"]
    assert [other.get(name) for name in ("name", *counts)] == ["other", "3", "0", "2", "0"]
    for suite in (mine, other):
        cases = suite.findall("testcase")
        assert str(len(cases)) == suite.get("tests")
        for count, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert suite.get(count) == str(sum(case.find(tag) is not None for case in cases))
        assert suite.find("properties/property[@name='seed']").get("value") == "7"  # type: ignore[union-attr]


def test_junit_failure_holds_what_a_person_needs(tmp_path: Path) -> None:
    write_reports(tmp_path, mixed(), header=HEADER)
    root = ElementTree.parse(tmp_path / "junit.xml").getroot()
    case = root.find(".//testcase[@name='forward.logits[direct-torch-cpu-float64]']")
    assert case is not None
    assert (case.get("classname"), case.get("time")) == ("parity.mine", "0.250")
    properties = {found.get("name"): found.get("value") for found in case.findall("properties/property")}
    assert properties["check"] == "forward.logits"
    failure = case.find("failure")
    assert failure is not None and failure.get("message") == "logits differ from the original's"
    assert failure.text is not None
    assert failure.text.splitlines()[1:] == [
        "config: n_layer=1 n_head=1 bias=False eps=1e-05 act=gelu",
        "numbers: error=3.1e-03 bound=1.0e-09",
        "first at: transformer.h.0.mlp.act",
        f"replay: parity repro '{BUNDLE}'",
    ]
    skipped = root.find(".//testcase[@name='masks.left[direct-torch-cpu-float64]']/skipped")
    assert skipped is not None and skipped.get("message") == "the family has no masks"


def test_hostile_text_survives_junit_and_markdown(tmp_path: Path) -> None:
    hostile = made(
        "forward.logits",
        "failed",
        port=f"p{HOSTILE}",
        reason=HOSTILE,
        config={HOSTILE: HOSTILE},
        metrics={HOSTILE: 1.0},
        first_divergence=HOSTILE,
        bundle=HOSTILE,
    )
    skipped = made("loss.value", "skipped", reason=HOSTILE)
    write_reports(tmp_path, [hostile, skipped], header=Header(profile=HOSTILE, versions={HOSTILE: HOSTILE}))
    root = ElementTree.parse(tmp_path / "junit.xml").getroot()
    failure = root.find(".//failure")
    assert failure is not None
    expected = "a < b & c ]]> \\x00 \\x1b[31m | `tick` *bold* [red] \U0001f600 \\ud800 \\u202e\nsecond line"
    assert failure.get("message") == expected
    assert failure.text is not None and failure.text.startswith(expected)

    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", text)
    assert "<red>" not in text and "a &lt; b &amp; c" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in lines]
    assert widths == [7] * 3 + [7] * 3 + [5] * 3  # no bar of the text ends a cell


# Markdown


def test_markdown_says_the_count_then_failures_then_the_rest() -> None:
    text = markdown(mixed(), header=HEADER)
    places = [
        "**8 checks run: 3 passed, 1 failed, 2 errors",
        "profile gate, seed 7, torch 2.9, transformers 5.1",
        "### Failures",
        "`n_layer=1 n_head=1 bias=False eps=1e-05 act=gelu` | `error=3.1e-03 bound=1.0e-09`",
        "remove its xfail entry",
        "`loss.value`<br>`loss.pure`",
        "### Checks",
        "| mine | `config.roundtrip` | direct pretrained | float64 | passed | 2.5e-14 | 0.50 |",
        "### Skipped and expected to fail",
        "| 1 | xfailed | upstream issue 12 | `training.init` |",
        "| 2 | skipped | the family has no masks | `masks.left masks.right` |",
    ]
    assert [text.find(place) for place in places] == sorted(text.find(place) for place in places)
    assert all(place in text for place in places)


def test_markdown_keeps_a_bar_inside_its_cell() -> None:
    text = markdown([made("a|b", "failed", reason="c|d", config={"act": "e|f"})], header=HEADER)
    assert r"| `a\|b[direct-torch-cpu-float64]` | failed: c\|d | `act='e\|f'` |" in text


def test_markdown_without_failures_has_no_empty_section() -> None:
    assert "###" not in markdown([], header=HEADER)
    assert "Failures" not in markdown([made("a.b")], header=HEADER)


def test_markdown_fits_in_a_job_summary() -> None:
    many = [made(f"a.c{i}", "failed", reason=f"{i}" + "é" * 5000, config={"a": i}) for i in range(2000)]
    text = markdown(many, header=HEADER)
    assert len(text.encode()) < LARGEST + 1000
    assert text.startswith("**2000 checks run: 2000 failed**")
    assert "report.json has everything" in text.splitlines()[-1]


# Terminal


@pytest.mark.parametrize("width", [60, 80, 200])
def test_table_at_any_width(width: int) -> None:
    text = table(mixed(), width=width)
    commands = [line for line in text.splitlines() if "parity repro" in line]
    assert commands == [f"  replay       parity repro '{BUNDLE}'"]
    assert all(len(line) <= width for line in text.splitlines() if line not in commands)
    flat = " ".join(text.split())
    for check in (
        "config.roundtrip",
        "forward.logits",
        "training.gradient_checkpointing",
        "loss.pure",
        "precision.float16",
    ):
        assert check in text
    assert text.index("forward.logits") < text.index("config.roundtrip")
    assert "seconds" in text and text.count("0.25") == 6
    assert "n_layer=1 n_head=1 bias=False eps=1e-05 act=gelu" in flat
    assert "numbers error=3.1e-03 bound=1.0e-09" in flat
    assert "first at transformer.h.0.mlp.act" in flat
    assert "1 xfailed upstream issue 12 (training.init)" in flat
    assert "2 skipped the family has no masks (masks.left, masks.right)" in flat
    assert flat.endswith("8 checks run: 3 passed, 1 failed, 2 errors, 1 xfailed, 1 xpassed; 2 skipped")


def test_table_shows_ports_and_backends_only_where_they_differ() -> None:
    def columns(*results: Result) -> list[str]:
        return table(list(results)).splitlines()[2].split()

    one = ["check", "route", "dtype", "status", "error", "seconds"]
    cuda = made("a.b", backend="torch-cuda")
    assert columns(made("a.b")) == one
    assert columns(made("a.b"), made("a.b", "skipped", port="other", backend="mlx-cpu", reason="no")) == one
    assert columns(made("a.b"), cuda) == [*one[:2], "backend", *one[2:]]
    assert columns(made("a.b"), made("a.b", port="other"), cuda) == ["port", *one[:2], "backend", *one[2:]]


def test_a_reason_is_printed_once_and_every_check_is_listed() -> None:
    broken = [
        made(f"group.check{i}", "error", reason=IMPORT, route=route, bundle=f"out/{i}{route}")
        for i in range(60)
        for route in ("direct", "checkpoint")
    ]
    text = table(broken)
    assert text.count(IMPORT) == 1
    head, below = text.split(IMPORT)
    for part in (head, below):
        assert set(re.findall(r"group\.check\d+", part)) == {f"group.check{i}" for i in range(60)}
    assert below.count("parity repro") == 3 and "and 117 more bundles" in below
    assert len(text.splitlines()) < 100


def test_one_reason_with_two_configurations_shows_both() -> None:
    failed = [
        made("a.b", "failed", reason="differ", config={"n_layer": layers}, route=route, bundle=f"out/{route}")
        for layers, route in ((1, "direct"), (2, "checkpoint"))
    ]
    text = table(failed)
    assert text.count("differ") == 1
    parts = ["n_layer=1", "parity repro out/direct", "n_layer=2", "parity repro out/checkpoint"]
    assert sorted(text.index(part) for part in parts) == [text.index(part) for part in parts]


def test_a_run_of_skips_and_an_empty_run_have_no_table() -> None:
    assert "status" not in table([made("a.b", "skipped", reason="no")])
    assert table([]).splitlines()[-1] == "0 checks run"


def test_long_names_on_a_narrow_ascii_page() -> None:
    long = made("c" * 70, port="p" * 50, metrics={"m" * 80: 1.0})
    text = table([long, made("a.b", "failed", reason="x")], width=40, encoding="ascii")
    assert all(len(line) <= 40 for line in text.splitlines())
    assert text.endswith("2 checks run: 1 passed, 1 failed\n")


def test_output_is_deterministic() -> None:
    assert table(mixed()) == table(mixed())


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_hostile_text_cannot_steer_the_terminal(encoding: str) -> None:
    hostile = made("a.b", "failed", port=HOSTILE, reason=HOSTILE, config={HOSTILE: 1}, bundle=HOSTILE)
    text = table([hostile, made("a.c", "skipped", reason=HOSTILE)], encoding=encoding)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert "[red]" in text  # not taken for markup
    assert ("\U0001f600" if encoding == "utf-8" else "\\U0001f600") in "".join(text.split())


def test_a_log_gets_plain_ascii() -> None:
    text = table(mixed())
    assert text.isascii() and "\x1b" not in text


def on_terminal(act: Callable[[io.TextIOWrapper], None]) -> str:
    """What a pseudo-terminal receives while `act` writes to it."""
    ours, theirs = pty.openpty()
    reader = os.fdopen(ours, "rb", buffering=0)
    with os.fdopen(theirs, "w", encoding="utf-8") as file:
        act(file)
        file.write("END")
        file.flush()
        received = b""
        while not received.endswith(b"END"):
            received += reader.read(65536)
    reader.close()
    return received.decode().removesuffix("END")


@pytest.fixture
def colour_terminal(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    return monkeypatch


def test_colours_on_a_terminal_only_and_not_with_no_color(colour_terminal: pytest.MonkeyPatch) -> None:
    def show(file: io.TextIOWrapper) -> None:
        colour_terminal.setattr(sys, "stdout", file)
        print_table([made("a.b")], header=HEADER)
        colour_terminal.setattr(sys, "stdout", sys.__stdout__)

    colour = re.compile(r"\x1b\[(\d+;)*3\d")
    assert colour.search(on_terminal(show))
    colour_terminal.setenv("NO_COLOR", "1")
    assert not colour.search(on_terminal(show))
    pipe = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    show(pipe)
    pipe.seek(0)
    assert "\x1b" not in pipe.read()


def test_progress_shows_on_a_terminal_and_leaves_nothing(colour_terminal: pytest.MonkeyPatch) -> None:
    def show(file: io.TextIOWrapper) -> None:
        with progress(2, Console(file=file, width=80)) as advance:
            advance("forward.logits")
            advance("[red]loss.value")

    text = on_terminal(show)
    assert "[red]loss.value" in text and "2/2" in text
    assert text.rstrip().endswith("\x1b[2K")  # the last thing it does is to erase its line


def test_progress_is_silent_elsewhere(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as CI services set it
    with progress(3) as advance:
        advance("forward.logits")
    assert capsys.readouterr() == ("", "")


def test_a_pipe_gets_a_wide_table_unless_columns_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert make_console().width == 120
    monkeypatch.setenv("COLUMNS", "66")
    assert make_console(stderr=True).width == 66


def test_rich_is_imported_only_when_something_is_printed() -> None:
    code = "import sys, harness.report; sys.exit(any(name.split('.')[0] == 'rich' for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# Files


@pytest.mark.parametrize("data", ["grün\n", b"\x00\xff", "", b"x" * 1_000_000])
def test_write_atomically(tmp_path: Path, data: str | bytes) -> None:
    path = tmp_path / "new" / "folder" / "file"
    write_atomically(path, "old")
    write_atomically(str(path), data)
    assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert names(path.parent) == ["file"]
    untouched = tmp_path / "plain"
    untouched.touch()
    assert path.stat().st_mode == untouched.stat().st_mode


def limited(code: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Runs code in a child that cannot write files larger than 4096 bytes, as if the disk were full."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    prelude = "import sys; from harness.report import new_directory, write_atomically\n"
    return subprocess.run(
        [sys.executable, "-B", "-c", prelude + code, str(directory)],
        preexec_fn=limit,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    code = "write_atomically(sys.argv[1] + '/file', 'x' * 10_000)"
    child = limited(code, tmp_path)
    assert f"DescriptionError: cannot write {tmp_path / 'file'}: File too large" in child.stderr
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"


def test_a_full_disk_leaves_the_old_directory(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "old").touch()
    code = """
with new_directory(sys.argv[1] + '/bundle', replace=True) as temporary:
    (temporary / 'small').write_text('x')
    (temporary / 'large').write_text('x' * 10_000)
"""
    child = limited(code, tmp_path)
    assert f"DescriptionError: cannot write directory {tmp_path / 'bundle'}: File too large" in child.stderr
    assert names(tmp_path) == ["bundle"] and names(tmp_path / "bundle") == ["old"]


def test_where_files_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "report.json", tmp_path / "file" / "deeper" / "report.json"):
        with pytest.raises(DescriptionError, match=re.escape(f"{tmp_path / 'file'} is a file, expected a")):
            write_atomically(path, "x")
        with pytest.raises(DescriptionError, match="is a file, expected a"), new_directory(path):
            pass
    with pytest.raises(DescriptionError, match=re.escape(f"cannot write {tmp_path}: Is a directory")):
        write_atomically(tmp_path, "x")
    with pytest.raises(DescriptionError, match="expected a path that ends in a name"):
        write_atomically("", "x")
    with pytest.raises(DescriptionError, match="there is something else"), new_directory(tmp_path / "file"):
        pass
    with pytest.raises(DescriptionError, match="is a file"):
        write_reports(tmp_path / "file", [], header=HEADER)
    assert names(tmp_path) == ["file"]
    assert sorted(path.name for path in tmp_path.parent.glob(".*.tmp")) == []


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_interruption_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new")
    assert names(tmp_path) == ["file"] and path.read_text() == "old"


def test_new_directory(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "bundle"
    with new_directory(target) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "file").write_text("new")
        assert not target.exists()
    assert (target / "sub" / "file").read_text() == "new"
    with pytest.raises(DescriptionError, match="it is not empty"), new_directory(target):
        pytest.fail("the block must not start")
    with new_directory(target, replace=True) as temporary:
        (temporary / "other").touch()
    assert names(target) == ["other"] and names(target.parent) == ["bundle"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_interruption_leaves_the_old_directory(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "bundle"
    for replace in (False, True):
        before = names(tmp_path)
        with pytest.raises(error), new_directory(target, replace=replace) as temporary:
            (temporary / "half").write_text("x")
            raise error
        assert names(tmp_path) == before
        target.mkdir(exist_ok=True)
        (target / "old").touch()
    assert names(target) == ["old"]


@pytest.mark.parametrize("refused", [1, 2])
def test_a_refused_rename_puts_the_old_directory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: int
) -> None:
    target = tmp_path / "bundle"
    with new_directory(target) as temporary:
        (temporary / "old").touch()
    calls = 0
    rename = os.rename

    def refuse(source: Path, destination: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == refused:
            raise PermissionError(13, "Permission denied", source)
        rename(source, destination)

    monkeypatch.setattr(os, "rename", refuse)
    refusal = pytest.raises(DescriptionError, match="Permission denied")
    with refusal, new_directory(target, replace=True) as temporary:
        (temporary / "new").touch()
    assert names(tmp_path) == ["bundle"] and names(target) == ["old"]


def test_reports_are_complete_and_replace_older_ones(tmp_path: Path) -> None:
    for results in (mixed(), []):
        write_reports(tmp_path / "report", results, header=HEADER)
        assert names(tmp_path / "report") == ["junit.xml", "report.json", "report.md"]
    assert json.loads((tmp_path / "report" / "report.json").read_text())["results"] == []
