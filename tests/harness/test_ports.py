# SPDX-License-Identifier: Apache-2.0
"""A wrong description is one line before anything runs; a right one means the class that it names."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import Port, check_parity
from harness.errors import DescriptionError, Mismatch
from harness.ports import MEANINGS, load_object, read_ports, select_ports, source_file

PORT = "[[tool.parity.port]]\nname = 'mine'\nfamily = 'nanogpt'\nmodel = 'a.py:A'\nconfig = 'a.py:C'\n"
CHECK = {"checks": ["forward.causal"], "backends": ["torch-cpu"]}


@pytest.fixture(autouse=True)
def _own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


# Reading


def test_a_description_is_read_as_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        PORT
        + "load = 'checkpoint:A.read'\ncode = ['a.py', 'b.py']\nconfig_map = { block_size = 'n_ctx' }\n"
        + "original = 'vendor/model.py:GPT'\nlabels = 'preshifted'\nignore_index = -7\nmin_checks = 40\n"
        + "lacks = { 'generation.*' = 'no cache' }\nxfail = { 'training.dropout' = 'issue 12' }\n"
    )
    assert read_ports(tmp_path) == (
        Port(
            name="mine",
            family="nanogpt",
            model="a.py:A",
            config="a.py:C",
            load="checkpoint:A.read",
            code=["a.py", "b.py"],
            config_map={"block_size": "n_ctx"},
            original="vendor/model.py:GPT",
            labels="preshifted",
            ignore_index=-7,
            lacks={"generation.*": "no cache"},
            xfail={"training.dropout": "issue 12"},
            min_checks=40,
            root=tmp_path,
        ),
    )


@pytest.mark.parametrize(
    ("more", "ignored"), [("", -100), ("labels = 'preshifted'", -1), ("labels = 'preshifted'\nignore_index = 0", 0)]
)
def test_the_ignored_label_follows_the_convention_unless_it_is_given(tmp_path: Path, more: str, ignored: int) -> None:
    (tmp_path / "pyproject.toml").write_text(PORT + more)
    assert read_ports(tmp_path)[0].ignored_label == ignored


def test_parity_toml_comes_first_and_may_leave_out_the_table_name(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(PORT)
    (tmp_path / "parity.toml").write_text(PORT.replace("tool.parity.", "").replace("mine", "other"))
    assert [port.name for port in read_ports(tmp_path)] == ["other"]
    (tmp_path / "parity.toml").write_text(PORT.replace("mine", "third"))
    assert [port.name for port in read_ports(tmp_path)] == ["third"]


@pytest.mark.parametrize("text", [None, "", "[project]\nname = 'x'\n", "tool = 3\n", "[tool.other]\nparity = 1\n"])
def test_a_directory_without_a_port_is_refused_by_name(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "pyproject.toml").write_text(text)
    assert read_ports(tmp_path) == ()
    with pytest.raises(DescriptionError, match=r"describes no port; write a \[\[tool\.parity\.port\]\]") as caught:
        select_ports([], [], directory=tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_ports_are_chosen_by_name_in_the_order_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("".join(PORT.replace("mine", name) for name in ("one", "two", "three")))
    ports = read_ports(tmp_path)
    assert [port.name for port in select_ports(ports, ["three", "one"], directory=tmp_path)] == ["one", "three"]
    assert select_ports(ports, [], directory=tmp_path) == list(ports)
    with pytest.raises(DescriptionError, match=r"no port 'tow'; did you mean 'two'"):
        select_ports(ports, ["one", "tow"], directory=tmp_path)


# Wrong keys and values


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("lod = 'x'", ["'lod'", "did you mean 'load'"]),
        ("root = '/'", ["no key 'root'"]),
        ("load = 3", ["load must be", "3"]),
        ("load = 'stat_dict'", ["did you mean 'state_dict'"]),
        ("load = 'checkpoint:'", ["after the colon"]),
        ("load = 'command:convert {out}'", ["{checkpoint} and {out}"]),
        ("load = 'command:convert {checkpoint} {out} {config}'", ["load", "{config}"]),
        ("load = 'command:convert {checkpoint} {out} {'", ["load", "{"]),
        ("original = 3", ["original = 3"]),
        ("original = 'model.py'", ["original = 'model.py'", "file.py:Class"]),
        ("code = 3", ["code must be a list"]),
        ("code = ['a.py', 3]", ["code must be a list"]),
        ("config_map = { block_size = 3 }", ["config_map", "'block_size' needs a field of the port", "not 3"]),
        ("xfail = 'all of it'", ["xfail must be a table"]),
        ("lacks = { 'masks.*' = '' }", ["lacks", "'masks.*' needs a reason"]),
        ("load = 'state_dict:read'", ["'state_dict' takes nothing after a colon"]),
        ("load = 'command:convert {checkpoint.name} {out}'", ["nothing else in braces"]),
        ('load = "command:convert \'{checkpoint} {out}"', ["every quotation mark closed"]),
        ("labels = ['hf']", ["labels must be"]),
        ("ignore_index = 1.5", ["ignore_index must be"]),
        ("ignore_index = true", ["ignore_index must be"]),
        ("min_checks = -1", ["min_checks must be"]),
        ("min_checks = true", ["min_checks must be", "how many checks have to run"]),
        ("labels = 'preshited'", ["did you mean 'preshifted'", "who shifts the labels"]),
        ("load = 'chekpoint:A.read'", ["did you mean 'checkpoint'", "how the original's weights get into the port"]),
    ],
)
def test_a_wrong_key_or_value_is_one_line_with_file_port_and_key(tmp_path: Path, more: str, words: list[str]) -> None:
    (tmp_path / "pyproject.toml").write_text(PORT + more)
    with pytest.raises(DescriptionError) as caught:
        read_ports(tmp_path)
    line = str(caught.value)
    assert line.startswith("pyproject.toml: port 'mine': ")
    assert "\n" not in line
    for word in words:
        assert word in line


@pytest.mark.parametrize("key", ["name", "family", "model", "config"])
@pytest.mark.parametrize("value", [None, "''", "3", "['a.py:A']"])
def test_what_every_port_needs_is_there_and_a_string(tmp_path: Path, key: str, value: str | None) -> None:
    lines = [line for line in PORT.splitlines() if not line.startswith(key)]
    (tmp_path / "pyproject.toml").write_text("\n".join(lines + ([f"{key} = {value}"] if value else [])))
    with pytest.raises(DescriptionError, match=rf"^pyproject\.toml: port.*\b{key}\b.*{MEANINGS[key]}") as caught:
        read_ports(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[tool]\nparity = 3", "tool.parity"),
        ("[tool.parity]\nports = []", "did you mean 'port'"),
        ("[tool.parity]\nport = 'mine'", "[[tool.parity.port]]"),
        ("[tool.parity.port]\nname = 'mine'", "[[tool.parity.port]]"),
        ("[tool.parity", "not valid TOML"),
        ("name = '\udcff'", "not valid TOML"),
    ],
)
def test_a_file_that_cannot_be_meant_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "pyproject.toml").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DescriptionError) as caught:
        read_ports(tmp_path)
    assert str(caught.value).startswith("pyproject.toml")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# Finding what is named


def test_a_file_of_a_package_is_imported_as_the_module_it_is(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "src/ports_pkg/__init__.py": "WIDTH = 5\n",
            "src/ports_pkg/inner/__init__.py": "",
            "src/ports_pkg/inner/model.py": "from .. import WIDTH\n\nclass Model:\n    width = WIDTH\n",
        },
    )
    found = load_object("src/ports_pkg/inner/model.py:Model", root=tmp_path)
    assert (found.width, found.__module__) == (5, "ports_pkg.inner.model")


def test_a_package_of_a_name_that_is_imported_from_elsewhere_does_not_stand_in_for_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = [tmp_path / name for name in ("first", "second")]
    for place in copies:
        sibling = f"NAME = {place.name!r}\n"
        files = {"ports_copied/__init__.py": "", "ports_copied/sibling.py": sibling}
        write(place, {**files, "ports_copied/model.py": "from .sibling import NAME\n\nclass Model:\n    name = NAME\n"})
    monkeypatch.setattr(sys, "path", [str(copies[0]), *sys.path])
    found = [load_object("ports_copied/model.py:Model", root=place) for place in (*copies, *copies)]
    assert [model.name for model in found] == ["first", "second", "first", "second"]


def test_a_module_below_the_root_and_a_dotted_name_in_it(tmp_path: Path) -> None:
    write(tmp_path, {"ports_module.py": "class Outer:\n    class Inner:\n        def read(self): ...\n"})
    assert load_object("ports_module:Outer.Inner.read", root=tmp_path).__qualname__ == "Outer.Inner.read"
    assert source_file("ports_module:Outer", root=tmp_path) == (tmp_path / "ports_module.py").resolve()
    assert source_file("ports_module.py:Outer", root=tmp_path) == (tmp_path / "ports_module.py").resolve()


def test_files_of_one_name_in_two_directories_are_two_modules(tmp_path: Path) -> None:
    for name in ("one", "two"):
        text = f"NAME = '{name}'\n"
        write(tmp_path, {f"{name}/sibling.py": text, f"{name}/model.py": "from .sibling import NAME\n"})
    assert [load_object(f"{name}/model.py:NAME", root=tmp_path) for name in ("one", "two")] == ["one", "two"]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("gone.py:Model", "no file"),
        ("no_such_package:Model", "no module 'no_such_package'"),
        ("no_such_package.inner:Model", "no module 'no_such_package'"),
        ("here.py:Model.missing", "no 'missing' in here.py"),
        ("here.py:Modell", "did you mean 'Model'"),
    ],
)
def test_what_is_not_there_is_one_line_that_quotes_the_description(tmp_path: Path, spec: str, words: str) -> None:
    write(tmp_path, {"here.py": "class Model: ...\n"})
    with pytest.raises(DescriptionError) as caught:
        load_object(spec, root=tmp_path)
    assert str(caught.value).startswith(f"'{spec}': ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def (", "SyntaxError"),
        ("raise RuntimeError('first\\nsecond')", "RuntimeError: first"),
        ("import sys\nsys.exit(4)", "SystemExit: 4"),
        ("import package_that_nobody_has", "ModuleNotFoundError"),
        ("class Shy(Exception):\n    def __str__(self): raise self\n\nraise Shy", "Shy"),
    ],
)
def test_code_that_ends_its_own_import_is_a_finding_of_one_line(tmp_path: Path, text: str, words: str) -> None:
    write(tmp_path, {"raising.py": text})
    with pytest.raises(Mismatch, match=r"^'raising\.py:Model' cannot be imported: ") as caught:
        load_object("raising.py:Model", root=tmp_path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# Descriptions that name the wrong thing


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model": "gone.py:Port"}, ["model", "no file"]),
        ({"model": "plain.py:Prot"}, ["model", "did you mean 'Port'"]),
        ({"model": "plain.py:torch"}, ["model", "not a class"]),
        ({"config": "plain.py:Confgi"}, ["config", "no 'Confgi'"]),
        ({"config": "plain.py:Port"}, ["config", "not a configuration class"]),
        ({"original": "vendor/model.py:GPT"}, ["original", "no file", "there is no directory"]),
        ({"model": "plian.py:Port"}, ["model", "no file", "did you mean 'plain.py'"]),
        ({"code": ["plain.py", "plainn.py"]}, ["code names plainn.py", "did you mean 'plain.py'"]),
        ({"load": "checkpoint:Port.reed", "more": "def read(path): ..."}, ["load = ", "Port", "did you mean 'read'"]),
        ({"load": "checkpoint:Prot.read"}, ["load = ", "did you mean 'Port'"]),
    ],
)
def test_a_wrong_name_ends_the_run_before_a_check_does(
    tmp_path: Path, plain_port: Callable[..., Port], fields: dict[str, str], words: list[str]
) -> None:
    with pytest.raises(DescriptionError) as caught:
        check_parity(plain_port(tmp_path, **fields), **CHECK)
    for word in ("port 'plain'", *words):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_port_that_cannot_be_imported_fails_its_checks(tmp_path: Path, plain_port: Callable[..., Port]) -> None:
    write(tmp_path, {"old.py": "from transformers import a_name_of_an_older_release\n\nclass Port: pass\n"})
    results = check_parity(plain_port(tmp_path, model="old.py:Port"), **CHECK)
    assert [result.status for result in results] == ["failed"]
    assert "'old.py:Port' cannot be imported: ImportError" in results[0].reason


def test_a_port_is_gated_against_the_original_that_it_names(tmp_path: Path, plain_port: Callable[..., Port]) -> None:
    write(
        tmp_path,
        {
            "vendor/model.py": "from reference_models.nanogpt.original import GPT as Ours, GPTConfig\n\n"
            "class GPT(Ours):\n    def forward(self, idx, targets=None):\n"
            "        logits, loss = super().forward(idx, targets)\n        return logits + 1, loss\n"
        },
    )
    results = {}
    for name, forward in (("same", "return {'logits': super().forward(input_ids, input_ids)[0] + 1}"), ("plain", "")):
        port = plain_port(tmp_path, name, forward=forward or "pass", original="vendor/model.py:GPT")
        results[name] = check_parity(port, checks=["forward.lengths"], backends=["torch-cpu"])[0]
    assert results["same"].status == "passed"
    assert results["plain"].status == "failed"
    assert "logits" in results["plain"].reason
