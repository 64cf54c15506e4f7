# SPDX-License-Identifier: Apache-2.0
"""The code blocks of a document, and somebody who types them as they stand."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.ports import parse_ports

ROOT = Path(__file__).parents[2]

# Runs a program as `python FILE` in its directory does, but where this project cannot be imported.
WITHOUT_THIS_PROJECT = (
    "import runpy, sys; sys.modules.update(reference_models=None, harness=None); sys.path.insert(0, '');"
    "runpy.run_path(sys.argv[1], run_name='__main__')"
)


@dataclass(frozen=True)
class Block:
    """A fenced block: section, nearest heading, language, text, and the line of the document it starts in."""

    section: str
    heading: str
    language: str
    text: str
    line: int


def blocks(document: Path) -> list[Block]:
    """Every fenced block of a document, whatever its language."""
    text = document.read_text(encoding="utf-8")
    found = []
    for match in re.finditer(r"^```(.*)\n((?:.*\n)*?)```$", text, flags=re.MULTILINE):
        before = text[: match.start(2)]
        sections = ["", *re.findall(r"^## (.*)$", before, flags=re.MULTILINE)]
        headings = ["", *re.findall(r"^###? (.*)$", before, flags=re.MULTILINE)]
        found.append(Block(sections[-1], headings[-1], match[1], match[2], before.count("\n")))
    return found


def texts(document: Path, language: str, *, section: str | None = None) -> list[str]:
    """The blocks of a language, in the whole document or below one heading of it."""
    return [block.text for block in blocks(document) if block.language == language and section in (None, block.section)]


def rows(document: Path, head: str) -> list[list[str]]:
    """The cells of each row of the table of a document that begins with these cells."""
    table = document.read_text(encoding="utf-8").partition(f"\n| {head}")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in table.splitlines()[2:]]


def quoted(text: str) -> list[str]:
    """What a text has between backticks."""
    return re.findall(r"`([^`]+)`", text)


def every_fence_is_of_a_block(document: Path) -> bool:
    """Whether no fence of a document is left open or indented, where `blocks` would not find it."""
    fences = re.findall(r"^ *```", document.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return len(fences) == 2 * len(blocks(document))


def dead_links(document: Path) -> list[str]:
    """The links of a document that lead to no file beside it, or to no heading in it or in that file."""
    links = re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", document.read_text(encoding="utf-8"))
    files = {file: document.parent / file if file else document for file, _ in links}
    dead = [file for file, path in files.items() if not path.is_file()]
    there = [(files[file], anchor) for file, anchor in links if anchor and file not in dead]
    return dead + [anchor for path, anchor in there if anchor not in _anchors(path)]


def _anchors(document: Path) -> set[str]:
    """What the headings of a document are linked by."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in headings}


@dataclass
class Reader:
    """Somebody who types what a document shows, at the top of a directory of their own.

    `code` is where the files lie that the table of a port names, by their names alone.
    """

    document: Path
    code: Path
    top: Path
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "document"})
    variables: dict[str, str] = field(default_factory=lambda: {"HF_HUB_OFFLINE": "1"})
    hub: subprocess.Popen[str] | None = None
    hub_address: str = ""
    programs: int = 0

    def follow(self, block: Block) -> None:
        steps = {"python": self.python, "console": self.console, "toml": self.table}
        steps[block.language](block)

    def environment(self, **variables: str) -> dict[str, str]:
        """Variables of a shell that has nothing of this project, nor of whoever runs the tests."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTEST_", "PYTHON"))}
        return {**kept, "HF_HOME": str(self.top / "home"), "NO_PROXY": "127.0.0.1", **self.variables, **variables}

    def python(self, block: Block) -> None:
        program = re.match(r"# ((workspace|elsewhere|tools)/\w+\.py)\n", block.text)
        if program is None:
            # As far down as in the document, so that a traceback shows the line.
            exec(compile("\n" * block.line + block.text, self.document, "exec"), self.names)
            return
        file = self.top / program[1]
        file.parent.mkdir(exist_ok=True)
        file.write_text(block.text, encoding="utf-8")
        if program[2] == "tools":
            return  # is called by something that comes later
        done = self.program(file)
        assert done.returncode == 0, done.stdout + done.stderr

    def program(self, file: Path) -> subprocess.CompletedProcess[str]:
        """Run a program in its directory, with caches that nobody has filled."""
        self.programs += 1
        home = str(self.top / f"home-{self.programs}")
        return subprocess.run(
            [sys.executable, "-c", WITHOUT_THIS_PROJECT, file.name],
            cwd=file.parent,
            env=self.environment(HF_HOME=home, HF_MODULES_CACHE=f"{home}/modules"),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def console(self, block: Block) -> None:
        for line in block.text.splitlines():
            words = shlex.split(line)
            if words[0] == "export":
                given = dict(word.split("=", 1) for word in words[1:])
                assert given["HF_ENDPOINT"] == "http://127.0.0.1:8023"
                self.variables = given | {"HF_ENDPOINT": self.hub_address}
            elif words[:2] == ["parity", "hub"]:
                command = [sys.executable, "-m", "harness.cli", *words[1:]]
                command[command.index("--port") + 1] = "0"  # whichever is free
                environment = self.environment(PYTHONPATH=str(ROOT))
                self.hub = subprocess.Popen(
                    command, cwd=self.top, env=environment, stdout=subprocess.PIPE, text=True, bufsize=1
                )
                assert self.hub.stdout is not None
                self.hub_address = self.hub.stdout.readline().strip()
            elif words[0] == "parity":
                command = [sys.executable, "-m", "harness.cli", *words[1:]]
                said = self.run(command, cwd=self.top, env=self.environment(PYTHONPATH=str(ROOT)))
                assert "passed" in said
            else:
                assert words[0] in ("mkdir", "cp"), line
                self.run(words, cwd=self.top, env=self.environment())

    def table(self, block: Block) -> None:
        """Write the table where it belongs, beside the files it names."""
        tables = tomllib.loads(block.text)["tool"]["parity"]
        (port,) = parse_ports(tables, root=self.top, file=self.document.name)
        for name in port.code:
            (self.top / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.code / Path(name).name, self.top / name)
        (self.top / "pyproject.toml").write_text(block.text, encoding="utf-8")

    def run(self, command: list[str], *, cwd: Path, env: dict[str, str]) -> str:
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
        return done.stdout

    def leave(self) -> None:
        """End what is still running."""
        if self.hub is not None:
            self.hub.terminate()
            self.hub.communicate()
