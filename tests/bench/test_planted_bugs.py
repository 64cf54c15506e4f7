# SPDX-License-Identifier: Apache-2.0
"""Planted bugs found per minute: by the gate, and in the same run by transformers' own model tests.

These tests are no part of the installed package. PARITY_BENCH_TRANSFORMERS names an unpacked source distribution of the
installed version; without it pip fetches one, and `parameterized` where that is missing. The benchmark is skipped where
neither works.

The source distribution has `tests/test_modeling_common.py` (ModelTesterMixin) and `tests/test_training_mixin.py`, but
nothing below `tests/`: the generation tests, the export tests and the tests of configurations (which need a file from
there) are missing. Empty stand-ins take the place of the first two, which ModelTesterMixin cannot be imported without.
`extra_info` lists them, and the tests left out because the port as it stands does not pass them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from harness.mutants import Mutant, Trapped
    from harness.ports import Port

PORT = "nanogpt"
SOURCE = "PARITY_BENCH_TRANSFORMERS"
PARAMETERIZED = "parameterized==0.9.0"
STAND_INS = {"GenerationTesterMixin": "generation/test_utils.py", "ExportTesterMixin": "exporters/test_export.py"}
MODULE = "test_port.py"
TIME_LIMIT = 120.0
BLOCK = 6

# The 14 bugs that ModelTesterMixin was once measured on in GPT-2, where it killed 4, as this port has them.
# Only the norms' epsilon is off by less here.
KNOWN = [
    "gelu-relu",
    "scale-doubled",
    "epsilon-1e-6",
    "position-from-one",
    "query-key-swapped",
    "mlp-residual-dropped",
    "last-norm-missing",
    "not-causal",
    "positions-missing",
    "mask-ignored",
    "position-restarts",
    "loss-not-shifted",
    "tie-undeclared",
    "norms-exchanged",
]
# One each of saving, resizing, the interface and converting.
FURTHER = ["buffer-not-saved", "tie-lost-by-resize", "return-dict-ignored", "converter-transposes"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Library:
    """transformers' model tests, ready to run: where they lie, what else is imported from, what is missing."""

    directory: Path
    paths: Sequence[Path]
    missing: Sequence[str]


@dataclasses.dataclass
class Count:
    """What one way of looking for bugs has found so far: by which check or test, or None, and in how many seconds."""

    what: str
    found: dict[str, str | None] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    def add(self, run: Callable[[], dict[str, str | None]]) -> None:
        """Counts what `run` finds, and its time."""
        started = time.perf_counter()
        self.found |= run()
        self.seconds += time.perf_counter() - started

    def killed(self, mutants: Sequence[str]) -> int:
        """How many of `mutants` it has found."""
        return sum(self.found[mutant] is not None for mutant in mutants)

    def row(self) -> dict[str, Any]:
        """For `extra_info`."""
        killed = self.killed(list(self.found))
        return {
            "what": self.what,
            "killed": killed,
            "planted": len(self.found),
            "killed_of_known": self.killed(KNOWN),
            "known": len(KNOWN),
            "seconds": self.seconds,
            "killed_per_minute": 60 * killed / self.seconds,
            "found": self.found,
        }


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        pytest.skip(f"pip {arguments[0]} failed ({last}); name an unpacked source of transformers in {SOURCE}")


def source_of_transformers(version: str, directory: Path) -> Path:
    """The unpacked source distribution: the one that SOURCE names, or else one that pip fetches."""
    if given := os.environ.get(SOURCE):
        about = Path(given) / "PKG-INFO"
        if not about.is_file() or f"\nVersion: {version}\n" not in about.read_text(encoding="utf-8"):
            pytest.skip(f"{SOURCE}={given} is no unpacked source distribution of transformers {version}")
        return Path(given)
    pip("download", "--no-deps", "--no-binary", ":all:", "--dest", str(directory), f"transformers=={version}")
    with tarfile.open(directory / f"transformers-{version}.tar.gz") as archive:
        archive.extractall(directory, filter="data")
    return directory / f"transformers-{version}"


@pytest.fixture
def library(tmp_path: Path) -> Library:
    """The tests beside stand-ins for what they import and the source distribution lacks."""
    import transformers

    source = source_of_transformers(transformers.__version__, tmp_path)
    directory = tmp_path / "library"
    tests = directory / "tests"
    tests.mkdir(parents=True)
    for file in source.glob("tests/*.py"):
        shutil.copyfile(file, tests / file.name)
    (tests / "__init__.py").touch()
    asked = (tests / "test_modeling_common.py").read_text(encoding="utf-8")
    missing = [file for mixin, file in STAND_INS.items() if mixin in asked]
    for mixin, file in STAND_INS.items():
        (tests / file).parent.mkdir()
        (tests / file).with_name("__init__.py").touch()
        (tests / file).write_text(f"class {mixin}:\n    pass\n", encoding="utf-8")
    shutil.copyfile(Path(__file__).with_name("model_tests.py"), directory / MODULE)
    (directory / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    paths = [directory]
    if importlib.util.find_spec("parameterized") is None:
        paths.append(tmp_path / "site")
        pip("install", "--no-deps", "--target", str(paths[-1]), PARAMETERIZED)
    return Library(directory=directory, paths=paths, missing=missing)


def run_model_tests(library: Library, root: Path, *options: str) -> str:
    """What transformers' tests print for the port below `root`, from a fresh process without plugins."""
    arguments = ["-q", "-p", "no:cacheprovider", "-W", "ignore", "--tb=no", MODULE, *options]
    environment = {
        "PYTHONPATH": os.pathsep.join(map(str, [*library.paths, root])),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "HF_HUB_OFFLINE": "1",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *arguments],
            cwd=library.directory,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"FAILED {MODULE} - took more than {TIME_LIMIT:g} s"
    return done.stdout + done.stderr


def failures(output: str) -> list[str]:
    """The tests that failed, subtests by the name of their test; the module itself where it could not be imported."""
    found = re.findall(rf"^(?:ERROR|FAILED|SUBFAILED)\b.*?({re.escape(MODULE)}\S*)", output, re.MULTILINE)
    return list(dict.fromkeys(found))


def blocks(mutants: Sequence[Mutant]) -> Iterator[Sequence[Mutant]]:
    for start in range(0, len(mutants), BLOCK):
        yield mutants[start : start + BLOCK]


@pytest.mark.benchmark(group="planted bugs")
def test_planted_bugs(benchmark: Any, repository: Path, library: Library, tmp_path: Path) -> None:
    """One block of bugs by each of the three, then the next block, one gate or one process at work at a time."""
    from harness.mutants import mutants_of, plant, selftest
    from harness.ports import family_of, read_ports, select_ports

    port = select_ports(read_ports(repository), [PORT], directory=repository)[0]
    known = {mutant.id: mutant for mutant in mutants_of(family_of(port))}
    mutants = [known[name] for name in (*KNOWN, *FURTHER)]

    left_out = failures(run_model_tests(library, repository))
    if MODULE in left_out:
        pytest.skip("transformers' model tests cannot be imported for the port as it stands")
    options = [option for test in left_out for option in ("--deselect", test)]
    green = run_model_tests(library, repository, *options)
    assert not failures(green), green
    ran = green.strip().splitlines()[-1]

    told = Count(what="parity selftest, expected checks first")
    untold = Count(what="the gate in its own order, up to the first failure")
    theirs = Count(what="transformers' model tests, up to the first failure")

    def by_gate(planted: Sequence[Mutant]) -> dict[str, str | None]:
        verdicts: list[Trapped] = list(selftest(port, planted, jobs=1))
        return {one.mutant: one.killers[0] if one.verdict == "killed" else None for one in verdicts}

    def by_model_tests(planted: Sequence[Mutant]) -> dict[str, str | None]:
        found: dict[str, str | None] = {}
        for mutant in planted:
            root = tmp_path / mutant.id
            plant(mutant, port, root)
            importable(port, root)
            failed = failures(run_model_tests(library, root, "-x", *options))
            found[mutant.id] = failed[0].rpartition("::")[2] if failed else None
        return found

    turns = blocks(mutants)

    def others_first() -> tuple[tuple[Sequence[Mutant]], dict[str, Any]]:
        turn = next(turns)
        theirs.add(lambda: by_model_tests(turn))
        # A pattern that fits no check tells the gate nothing about where to look.
        untold.add(lambda: by_gate([dataclasses.replace(mutant, killers=("none",)) for mutant in turn]))
        return (turn,), {}

    benchmark.pedantic(
        lambda turn: told.add(lambda: by_gate(turn)), setup=others_first, rounds=len(list(blocks(mutants)))
    )
    benchmark.extra_info.update(
        what=f"{BLOCK} planted bugs, parity selftest",
        planted_bugs=[count.row() for count in (told, untold, theirs)],
        model_tests=ran,
        missing=list(library.missing),
        left_out=left_out,
    )
    for count in (told, untold):
        survivors = [name for name, check in count.found.items() if check is None]
        assert not survivors, f"{count.what}: {', '.join(survivors)} survived"


def importable(port: Port, root: Path) -> None:
    """Makes the planted copy a package, for otherwise the one that is installed would be imported."""
    for file in port.code:
        for directory in Path(file).parents:
            if directory != Path("."):
                (root / directory / "__init__.py").touch()
