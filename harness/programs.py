# SPDX-License-Identifier: Apache-2.0
"""The converter programs of `load = "command:..."`: started as their users do, or in a fresh process.

A Python program spends seconds on importing frameworks; forked from the server of fresh processes it finds them there.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import Mismatch

if TYPE_CHECKING:
    from harness.ports import Port
    from harness.sandbox import Sandbox

CONVERTER_SECONDS = 300


@dataclasses.dataclass(frozen=True, kw_only=True)
class PythonProgram:
    """A command that is `python -m module arguments` (`module` set) or `python file.py arguments` (`file` set)."""

    module: str = ""
    file: str = ""
    arguments: Sequence[str] = ()

    def sources(self, root: Path) -> list[Path]:
        """The Python files below a repository that belong to the program, relative to it: its package's, or those
        beside its file."""
        top = root / (self.module.partition(".")[0] if self.module else Path(self.file).parent)
        if self.module and not top.is_dir():
            return [path.relative_to(root) for path in [top.with_suffix(".py")] if path.is_file()]
        return sorted(path.relative_to(root) for path in top.rglob("*.py"))


def command_of(port: Port, *, checkpoint: Path | str, out: Path | str) -> list[str]:
    """The words of the port's command line for a checkpoint and the directory to write."""
    template = port.load.partition(":")[2]
    return [part.format(checkpoint=checkpoint, out=out) for part in shlex.split(template)]


def python_program(command: Sequence[str]) -> PythonProgram | None:
    """The program of a command line that starts the Python of the gate without options; None for any other."""
    interpreter, *rest = command
    if interpreter not in ("python", "python3", sys.executable):
        return None
    if len(rest) > 1 and rest[0] == "-m":
        return PythonProgram(module=rest[1], arguments=rest[2:])
    if rest and rest[0].endswith(".py"):
        return PythonProgram(file=rest[0], arguments=rest[1:])
    return None


def starts_quickly(port: Port) -> bool:
    """Whether the port's program can be forked from a process that has the frameworks imported."""
    return hasattr(os, "fork") and python_program(command_of(port, checkpoint="in", out="out")) is not None


def run(command: Sequence[str], *, root: Path, sandbox: Sandbox, cold: bool = False) -> None:
    """Runs a converter in its repository; `cold` as its user does, in an interpreter of its own.

    Raises Mismatch when it cannot be started, ends with another status than 0, or does not end.
    """
    program = python_program(command)
    if program is None or cold or not hasattr(os, "fork"):
        _start(command, root)
        return
    request = {**dataclasses.asdict(program), "root": str(root)}
    answer = sandbox.run("run_program", request)
    _require_success(answer.values["status"], answer.values["errors"] or answer.values["output"])


def _start(command: Sequence[str], root: Path) -> None:
    # `python` is the one that runs the gate, also where its environment is not activated.
    places = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
    try:
        done = subprocess.run(
            command,
            cwd=root,
            env={**os.environ, "PATH": places},
            capture_output=True,
            text=True,
            timeout=CONVERTER_SECONDS,
            check=False,
        )
    except OSError as error:
        raise Mismatch(f"the converter cannot be started: {error}") from None
    except subprocess.TimeoutExpired:
        raise Mismatch(f"the converter did not end within {CONVERTER_SECONDS} s: {shlex.join(command)}") from None
    _require_success(done.returncode, done.stderr.strip() or done.stdout)


def _require_success(status: int, said: str) -> None:
    if status:
        last = (said.strip() or "it printed nothing").splitlines()[-1]
        raise Mismatch(f"the converter ended with status {status}: {last}")
