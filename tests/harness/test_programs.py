# SPDX-License-Identifier: Apache-2.0
"""Converter programs: what their command line says, and the same end whether they are forked or started."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.errors import Mismatch
from harness.ports import Port
from harness.programs import PythonProgram, command_of, python_program, run, starts_quickly
from harness.sandbox import Sandbox

PROGRAM = """
import json, os, sys

if __name__ == "__main__":
    said = {"name": sys.argv[0], "arguments": sys.argv[1:], "where": os.getcwd(), "process": os.getpid()}
    with open("said.json", "w") as file:
        json.dump(said, file)
"""


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    with Sandbox(tmp_path_factory.mktemp("programs")) as found:
        yield found


def port(load: str, root: Path = Path()) -> Port:
    return Port(name="own", family="nanogpt", model="m.py:M", config="m.py:C", load=load, root=root)


def test_places_are_filled_in_word_by_word() -> None:
    found = command_of(port("command:convert 'a b' {checkpoint} --out={out}"), checkpoint="in it", out=Path("there"))
    assert found == ["convert", "a b", "in it", "--out=there"]


@pytest.mark.parametrize(
    ("command", "program"),
    [
        (["python", "-m", "pkg.convert", "a", "-b"], PythonProgram(module="pkg.convert", arguments=["a", "-b"])),
        (["python3", "tools/convert.py", "a"], PythonProgram(file="tools/convert.py", arguments=["a"])),
        ([sys.executable, "convert.py"], PythonProgram(file="convert.py")),
        (["python", "-O", "convert.py"], None),  # an option that a forked process cannot have
        (["python", "-m"], None),
        (["python", "-c", "pass"], None),
        (["python"], None),
        (["/other/python", "convert.py"], None),
        (["convert", "a"], None),
    ],
)
def test_a_command_line_that_starts_this_python_is_a_program(command: list[str], program: PythonProgram | None) -> None:
    found = python_program(command)
    assert (found and (found.module, found.file, list(found.arguments))) == (
        program and (program.module, program.file, list(program.arguments))
    )


@pytest.mark.parametrize(("words", "quickly"), [("python convert.py", True), ("convert", False)])
def test_a_python_program_is_forked_and_starts_quickly(words: str, quickly: bool) -> None:
    assert starts_quickly(port(f"command:{words} {{checkpoint}} {{out}}")) is quickly


def test_the_sources_of_a_program_are_its_package_or_the_folder_of_its_file(tmp_path: Path) -> None:
    for name in (
        "pkg/__init__.py",
        "pkg/deep/convert.py",
        "tools/convert.py",
        "tools/helper.py",
        "lone.py",
        "pkg/data",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def sources(**given: str) -> list[str]:
        return [str(path) for path in PythonProgram(**given).sources(tmp_path)]

    assert sources(module="pkg.deep.convert") == ["pkg/__init__.py", "pkg/deep/convert.py"]
    assert sources(file="tools/convert.py") == ["tools/convert.py", "tools/helper.py"]
    assert sources(module="lone") == ["lone.py"]
    assert sources(module="installed.elsewhere") == []


@pytest.mark.parametrize("cold", [False, True], ids=["forked", "started"])
@pytest.mark.parametrize("words", [["-m", "tools.convert"], ["tools/convert.py"]], ids=["module", "file"])
def test_a_program_is_given_its_words_in_its_repository(
    tmp_path: Path, sandbox: Sandbox, words: list[str], cold: bool
) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/convert.py").write_text(PROGRAM)
    run(["python", *words, "a b", "--c"], root=tmp_path, sandbox=sandbox, cold=cold)
    said = json.loads((tmp_path / "said.json").read_text())
    assert said["arguments"] == ["a b", "--c"]
    assert said["name"].endswith("convert.py")
    assert said["where"] == str(tmp_path.resolve())
    assert said["process"] != os.getpid()


@pytest.mark.parametrize("cold", [False, True], ids=["forked", "started"])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import sys; sys.exit(0)", ""),
        ("import sys; sys.exit()", ""),
        ("import sys; print('first', file=sys.stderr); sys.exit('no such file')", "status 1: no such file"),
        ("import sys; print('reason', file=sys.stderr); sys.exit(2)", "status 2: reason"),
        ("import sys; print('said on the way'); sys.exit(3)", "status 3: said on the way"),
        ("import sys; sys.exit(3)", "status 3: it printed nothing"),
        ("raise ValueError('wrong width')", "status 1: ValueError: wrong width"),
        ("def (", "status 1: SyntaxError"),
        ("raise KeyboardInterrupt", "status"),
    ],
)
def test_a_program_ends_the_same_whether_it_is_forked_or_started(
    tmp_path: Path, sandbox: Sandbox, text: str, words: str, cold: bool
) -> None:
    (tmp_path / "convert.py").write_text(text)
    if not words:
        run(["python", "convert.py"], root=tmp_path, sandbox=sandbox, cold=cold)
        return
    with pytest.raises(Mismatch, match="the converter ended with ") as caught:
        run(["python", "convert.py"], root=tmp_path, sandbox=sandbox, cold=cold)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("words", [["-m", "tools.gone"], ["gone.py"]], ids=["module", "file"])
def test_a_program_that_is_not_there_is_one_line(tmp_path: Path, sandbox: Sandbox, words: list[str]) -> None:
    for cold in (False, True):
        with pytest.raises(Mismatch, match="gone"):
            run(["python", *words], root=tmp_path, sandbox=sandbox, cold=cold)


def test_a_command_that_cannot_be_started_is_one_line(tmp_path: Path, sandbox: Sandbox) -> None:
    with pytest.raises(Mismatch, match="cannot be started"):
        run(["no-such-program-anywhere"], root=tmp_path, sandbox=sandbox)


def test_modules_of_two_repositories_do_not_meet(tmp_path: Path, sandbox: Sandbox) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "helper.py").write_text(f"NAME = {name!r}\n")
        text = "import helper\nopen('found', 'w').write(helper.NAME)\n"
        (tmp_path / name / "convert.py").write_text(text)
        run(["python", "convert.py"], root=tmp_path / name, sandbox=sandbox)
    assert [(tmp_path / name / "found").read_text() for name in ("one", "two")] == ["one", "two"]
