# SPDX-License-Identifier: Apache-2.0
"""The text of the tables and of the workflow, and putting them where they belong without touching what is there."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tomllib
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from harness.errors import DescriptionError
from harness.init.proposal import Proposal
from harness.ports import parse_ports, require_named
from harness.report.files import write_atomically

WORKFLOW = Path(".github", "workflows", "parity.yml")

STEPS = """\
# Gates the ports that {file} describes: each pull request says whether they still compute what their originals do.
name: parity

on:
  pull_request:
  push:
    branches: [main, master]

permissions:
  contents: read

env:
  # Where pip installs the parity harness from, for example git+https://HOST/OWNER/parity-harness@REVISION
  PARITY_HARNESS: {harness}

jobs:
  parity:
    runs-on: ubuntu-latest
    timeout-minutes: 20
{defaults}\
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with:
          python-version: "{python}"
      - name: Install torch for the CPU
        run: python -m pip install torch --index-url https://download.pytorch.org/whl/cpu
      - name: Install the parity harness
        run: python -m pip install "${{PARITY_HARNESS:?set PARITY_HARNESS at the top of the workflow}}"
{install}\
      - name: Gate
        run: python -m pytest -m parity --parity-report=parity-report --junitxml=parity-report/pytest.xml
      - name: Keep the report and the bundles of failures
        if: ${{{{ !cancelled() }}}}
        uses: actions/upload-artifact@v4
        with:
          name: parity-report
          path: {prefix}parity-report
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """A file to write: its path, its whole new content, what of that is new, and the content it had (None: no file)."""

    path: Path
    content: bytes
    added: str
    before: bytes | None


def tables_text(proposals: Sequence[Proposal], *, heading: str) -> str:
    """The tables of several ports."""
    return "\n".join(table_text(proposal, heading=heading) for proposal in proposals)


def table_text(proposal: Proposal, *, heading: str) -> str:
    """A port's table as TOML, with comments that say what was seen where it was guessed."""
    lines = [f"[[{heading}]]"]
    for key, value in proposal.values.items():
        if key == "config_map" and "guessed" in proposal.reasons.get(key, ""):
            lines.append(f"# {proposal.reasons[key]}")
        lines.append(f"{key} = {toml(value)}")
    lines.append("# min_checks = 0  # after a green run: the number of checks that ran, so that none falls silent")
    if proposal.lacking:
        lines.append(
            "# What the port seems to do without. The gate asks for it until it is declared: uncomment what is meant."
        )
        lines.append(f"# [{heading}.lacks]")
        lines += [f"# {toml(pattern)} = {toml(reason)}" for pattern, reason in proposal.lacking.items()]
    return "\n".join(lines) + "\n"


def toml(value: Any) -> str:
    """A text, number, list of texts or table of texts as one line of TOML."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{toml_key(key)} = {toml(each)}" for key, each in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(toml(each) for each in value) + "]"
    return json.dumps(value, ensure_ascii=False)


def toml_key(key: str) -> str:
    """A key, quoted where it has to be."""
    return key if key.isidentifier() and key.isascii() else json.dumps(key)


def description_change(directory: Path, proposals: Sequence[Proposal]) -> Change:
    """The tables, appended to parity.toml or pyproject.toml, or in a new parity.toml where there is neither.

    Raises DescriptionError where a table cannot follow what the file already says, or does not mean a port.
    """
    path = next((directory / n for n in ("parity.toml", "pyproject.toml") if (directory / n).is_file()), None)
    path = (path or directory / "parity.toml").resolve()
    before = path.read_bytes() if path.is_file() else None
    old = (before or b"").decode("utf-8-sig")
    known = tomllib.loads(old)
    heading = "port" if path.name == "parity.toml" and "port" in known else "tool.parity.port"
    end = "\r\n" if "\r\n" in old else "\n"
    text = tables_text(proposals, heading=heading)
    gap = "" if not old.strip() else "\n" if old.endswith("\n") else "\n\n"
    added = (gap + text).replace("\n", end)
    try:
        document = tomllib.loads(old + added)
    except tomllib.TOMLDecodeError as error:
        raise DescriptionError(
            f"a table cannot be appended to {path.name} as it is: {error}; write it there by hand"
        ) from None
    table = document if heading == "port" else document["tool"]["parity"]
    wanted = {str(proposal.values["name"]) for proposal in proposals}
    for port in parse_ports(table, root=directory, file=path.name):
        if port.name in wanted:
            require_named(port)
    return Change(path=path, content=(before or b"") + added.encode(), added=text, before=before)


def workflow_change(directory: Path, *, harness: str | None, file: str) -> Change:
    """The workflow, in the repository's own `.github` where the directory is below one. Changes nothing yet."""
    root = repository_root(directory)
    below = directory.resolve().relative_to(root)
    nested = below != Path()
    text = STEPS.format(
        file=(below / file).as_posix(),
        harness=json.dumps(harness if harness is not None else harness_requirement()),
        defaults=f"    defaults:\n      run:\n        working-directory: {json.dumps(below.as_posix())}\n"
        if nested
        else "",
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
        install=install_step(directory),
        prefix=f"{below.as_posix()}/" if nested else "",
    )
    path = root / WORKFLOW
    return Change(path=path, content=text.encode(), added=text, before=path.read_bytes() if path.is_file() else None)


def repository_root(directory: Path) -> Path:
    """The nearest directory upwards with a `.git`, or the directory itself."""
    here = directory.resolve()
    return next((folder for folder in (here, *here.parents) if (folder / ".git").exists()), here)


def install_step(directory: Path) -> str:
    """How the workflow installs what the port itself needs."""
    lines = []
    if (directory / "requirements.txt").is_file():
        lines.append("python -m pip install -r requirements.txt")
    pyproject = directory / "pyproject.toml"
    if (directory / "setup.py").is_file() or (pyproject.is_file() and b"[project]" in pyproject.read_bytes()):
        lines.append("python -m pip install -e .")
    if not lines:
        return ""
    commands = "".join(f"          {line}\n" for line in lines)
    return f"      - name: Install what the port needs\n        run: |\n{commands}"


def harness_requirement() -> str:
    """Where this harness was installed from, when pip wrote that down and others can reach it; empty otherwise."""
    try:
        written = metadata.distribution("parity-harness").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return ""
    source = json.loads(written or "{}")
    version_control = source.get("vcs_info", {})
    if version_control.get("vcs") != "git" or not str(source.get("url", "")).startswith("https://"):
        return ""
    return f"git+{source['url']}@{version_control['commit_id']}"


def write(change: Change) -> None:
    """Writes a change whole or not at all. Raises DescriptionError when the file is no longer what was read."""
    now = change.path.read_bytes() if change.path.is_file() else None
    if now != change.before:
        raise DescriptionError(f"{change.path} has changed while it was shown; nothing was written to it")
    mode = os.stat(change.path).st_mode if now is not None else None
    write_atomically(change.path, change.content)
    if mode is not None:
        os.chmod(change.path, mode & 0o7777)
