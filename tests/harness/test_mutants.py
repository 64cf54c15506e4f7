# SPDX-License-Identifier: Apache-2.0
"""Whoever tests the gate has to be right: a bug that was not planted, or not judged, must not count as noticed."""

import dataclasses
import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from harness.checks import check_ids
from harness.errors import DescriptionError
from harness.families import find_family
from harness.mutants import Mutant, Trapped, groups, mutants_of, mutated_source, plant, score, selftest, table
from harness.ports import Port, read_ports

ROOT = Path(__file__).parents[2]
FAMILY = find_family("nanogpt")
PORT = next(port for port in read_ports(ROOT) if port.name == "nanogpt")
KEPT = ("config.fields", "forward.lengths", "loss.value")
PATIENCE = 3.0


def mutant(name: str = "m", find: str = "b", replace: str = "x", **values: Any) -> Mutant:
    return Mutant(**{"id": name, "file": "a.py", "find": find, "replace": replace, "bug": f"bug {name}", **values})


def port_of(root: Path, **files: str) -> Port:
    for name, text in files.items():
        (root / f"{name}.py").write_text(text)
    code = [f"{name}.py" for name in files]
    return Port(name="p", family="nanogpt", model="a.py:Model", config="a.py:Config", code=code, root=root)


# Planting


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"find": "z"}, "mutant 'm': its text occurs 0 times in a.py, expected 1"),
        ({"find": "a"}, "mutant 'm': its text occurs 2 times in a.py, expected 1"),
        ({"find": "a", "times": 3}, "mutant 'm': its text occurs 2 times in a.py, expected 3"),
        ({"file": "none.py"}, "mutant 'm': there is no file {root}/none.py"),
    ],
)
def test_an_edit_that_does_not_match_is_refused_before_anything_runs(
    edit: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_process(method: str) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(multiprocessing, "get_context", no_process)
    port = port_of(tmp_path, a="a b a\n")
    message = message.format(root=tmp_path)
    with pytest.raises(DescriptionError) as caught:
        mutated_source(mutant(**edit), tmp_path)
    assert str(caught.value) == message
    with pytest.raises(DescriptionError) as caught:
        list(selftest(port, [mutant(), mutant(**edit)]))
    assert str(caught.value) == message


def test_every_occurrence_is_edited(tmp_path: Path) -> None:
    port_of(tmp_path, a="a b a\n")
    assert mutated_source(mutant(find="a", replace="aa", times=2), tmp_path) == "aa b aa\n"


def test_plant_copies_the_code_alone_and_edits_one_file(tmp_path: Path) -> None:
    root, planted = tmp_path / "root", tmp_path / "planted"
    (root / "deep").mkdir(parents=True)
    port = port_of(root, a="a b a\n", c="b\n")
    (root / "secrets.py").write_text("not code\n")
    (root / "deep" / "d.py").write_text("d\n")
    port = dataclasses.replace(port, code=(*port.code, "deep/d.py"))

    copy = plant(mutant(), port, planted)

    found = {str(path.relative_to(planted)): path.read_text() for path in planted.rglob("*") if path.is_file()}
    assert found == {"a.py": "a x a\n", "c.py": "b\n", "deep/d.py": "d\n"}
    assert copy == dataclasses.replace(port, root=planted)
    assert (root / "a.py").read_text() == "a b a\n"


def test_a_port_that_does_not_say_what_it_consists_of_cannot_be_planted_in(tmp_path: Path) -> None:
    port = dataclasses.replace(port_of(tmp_path, a="a b a\n"), code=())
    with pytest.raises(DescriptionError, match="port 'p': selftest needs `code`"):
        plant(mutant(), port, tmp_path / "planted")


def test_two_mutants_of_one_id_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "twice.py").write_text(
        "from harness.mutants import Mutant\n"
        "one = Mutant(id='same', file='a.py', find='a', replace='b', bug='-')\n"
        "MUTANTS = (one, one)\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DescriptionError, match="family 'nanogpt' has two mutants 'same'"):
        mutants_of(dataclasses.replace(FAMILY, mutants="twice.py:MUTANTS"))
    with pytest.raises(DescriptionError, match="family 'nanogpt' has no mutants"):
        mutants_of(dataclasses.replace(FAMILY, mutants=None))


# Judging

MODEL = "reference_models/nanogpt/modeling_nanogpt.py"
AT_IMPORT = "LAYER_NORM_EPSILON = 1e-5\n"


def in_model(name: str, find: str, replace: str, killers: Sequence[str] = ()) -> Mutant:
    return mutant(name, find, replace, file=MODEL, killers=tuple(killers))


def at_import(name: str, statement: str, killers: Sequence[str] = ("loss.value",)) -> Mutant:
    return in_model(name, AT_IMPORT, f"{statement}\n{AT_IMPORT}", killers)


PLANTED = (
    in_model("killed", "nn.GELU()", "nn.ReLU()", ["forward.*", "config.fields"]),
    in_model("survived", "self.gelu = nn.GELU()", "self.gelu = nn.GELU()  # the same", ["loss.value"]),
    in_model("green", "self.gelu = nn.GELU()", "self.gelu = nn.GELU()  # the same"),
    in_model("red", "nn.GELU()", "nn.ReLU()"),
    at_import("exits", "import os; os.kill(os.getpid(), 9)"),
    at_import("raises", "raise RuntimeError('at import')"),
    at_import("ends", "raise SystemExit(0)"),
    at_import("hangs", "import time; time.sleep(1000)"),
    at_import("exits-harmless", "import os; os.kill(os.getpid(), 9)", ()),
    at_import("interrupts", "raise KeyboardInterrupt"),
    in_model("next", "nn.GELU()", "nn.ReLU()", ["loss.value"]),
    in_model("again", "nn.GELU()", "nn.ReLU()", ["forward.*", "config.fields"]),
    in_model("other order", "nn.GELU()", "nn.ReLU()", ["config.fields", "forward.*"]),
)


@pytest.fixture(scope="module")
def verdicts() -> dict[str, Trapped]:
    """What becomes of PLANTED with three checks and little patience."""
    lacks = {check: "only a few checks are asked here" for check in check_ids() if check not in KEPT}
    port = dataclasses.replace(PORT, lacks=lacks, min_checks=0)
    entries = list(selftest(port, PLANTED, jobs=1, time_limit=PATIENCE))
    assert [entry.mutant for entry in entries] == [each.id for each in PLANTED]
    return {entry.mutant: entry for entry in entries}


@pytest.mark.parametrize(
    ("name", "verdict", "killers", "missed"),
    [
        # Checks expected to notice run first, each at least once; those that did not are named, the rest is not asked.
        ("killed", "killed", ["forward.lengths"], ["config.fields"]),
        ("survived", "survived", [], ["loss.value"]),
        ("green", "green", [], []),
        ("red", "red", ["forward.lengths"], []),
        ("raises", "killed", ["loss.value"], []),
        ("exits", "killed", ["loss.value"], []),
        ("ends", "killed", ["loss.value"], []),
        ("hangs", "killed", ["loss.value"], []),
        ("interrupts", "killed", ["loss.value"], []),
        ("exits-harmless", "red", ["forward.lengths"], []),
        ("next", "killed", ["loss.value"], []),
        ("again", "killed", ["forward.lengths"], []),
        ("other order", "killed", ["forward.lengths"], ["config.fields"]),
    ],
)
def test_what_becomes_of_a_mutant(
    name: str, verdict: str, killers: list[str], missed: list[str], verdicts: dict[str, Trapped]
) -> None:
    trapped = verdicts[name]
    assert trapped.verdict == verdict
    assert list(trapped.killers) == killers
    assert list(trapped.missed) == missed
    assert trapped.harmless == (name in ("green", "red", "exits-harmless"))
    assert trapped.good == (verdict in ("killed", "green"))


def test_the_reason_is_that_of_the_first_check_that_failed(verdicts: dict[str, Trapped]) -> None:
    assert "logits of " in verdicts["killed"].reason
    assert "RuntimeError: at import" in verdicts["raises"].reason
    assert verdicts["green"].reason == verdicts["survived"].reason == ""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("exits", "the port crashed the process it ran in: SIGKILL"),
        ("hangs", f"the port did not end within {PATIENCE:g} s"),
        ("interrupts", "KeyboardInterrupt"),
        ("exits-harmless", "the port crashed the process it ran in: SIGKILL"),
    ],
)
def test_a_port_that_ends_or_keeps_its_process_is_noticed(name: str, words: str, verdicts: dict[str, Trapped]) -> None:
    assert words in verdicts[name].reason


# Telling


def trapped(name: str, verdict: Any, seconds: float = 1.0, **values: Any) -> Trapped:
    given = {"bug": f"bug {name}", "harmless": verdict in ("green", "red"), "killers": [], "missed": [], "reason": ""}
    return Trapped(mutant=name, verdict=verdict, seconds=seconds, **(given | values))


def test_the_table_names_who_noticed_and_who_did_not() -> None:
    lines = table(
        [
            trapped("one", "killed", 2.0, killers=["loss.value"], missed=["api.*"]),
            trapped("two", "survived", missed=["loss.value"]),
        ]
    ).splitlines()
    assert lines[0].split() == ["killed", "2.0", "s", "one", "loss.value", "(not", "by", "api.*)"]
    assert lines[1].split() == ["survived", "1.0", "s", "two", "bug", "two"]


def test_the_groups_count_bugs_by_who_noticed_first() -> None:
    found = [
        trapped("a", "killed", 1.0, killers=["loss.value", "forward.logits"]),
        trapped("b", "killed", 3.0, killers=["forward.logits"]),
        trapped("c", "killed", 2.0, killers=["forward.lengths", "loss.value"]),
        trapped("d", "survived"),
        trapped("e", "red", killers=["forward.logits"]),
    ]
    assert [line.split() for line in groups(found).splitlines()] == [
        ["forward", "2", "median", "3.0", "s"],
        ["loss", "1", "median", "1.0", "s"],
    ]


def test_the_score_counts_bugs_and_harmless_rewrites_apart() -> None:
    found = [
        trapped("a", "killed", 1.0),
        trapped("b", "killed", 3.0),
        trapped("c", "survived", 90.0),
        trapped("d", "green", 50.0),
        trapped("e", "red", 70.0),
    ]
    assert score(found) == "2 of 3 planted bugs killed, in a median of 3.0 s; 1 of 2 harmless rewrites green"
    assert score([]) == "0 of 0 planted bugs killed, in a median of 0.0 s; 0 of 0 harmless rewrites green"
