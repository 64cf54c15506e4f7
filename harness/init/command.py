# SPDX-License-Identifier: Apache-2.0
"""`parity init`: looks, shows what it would write, and writes it after a yes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.errors import EXIT_HOLDS, DescriptionError
from harness.families import family_names

LOOKED_FOR = """\
A port is recognised by a class that inherits from PreTrainedModel (or is a module of torch or MLX built from one
configuration), with a configuration class whose fields are those of an installed family: {families}.

To describe a port by hand, write this into pyproject.toml, or parity.toml:

[[tool.parity.port]]
name = "my-port"
family = "{family}"
model = "path/to/modeling_file.py:ModelClass"
config = "path/to/configuration_file.py:ConfigClass"
load = "state_dict"  # or "checkpoint:CALLABLE", "pretrained", "command:program {{checkpoint}} {{out}}"
"""


def add_init_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `init`; `run_init` runs what was parsed."""
    init = commands.add_parser("init", help="propose the description of a port and a CI workflow for this directory")
    init.add_argument("--yes", "--write", action="store_true", dest="yes", help="write what is shown without asking")
    init.add_argument("--family", metavar="NAME", help="the family, where it cannot be guessed")
    init.add_argument("--model", metavar="SPEC", help="the port, where it cannot be guessed: file.py:Class")
    init.add_argument("--harness", metavar="REQUIREMENT", help="where the workflow lets pip install the harness from")
    init.set_defaults(run=run_init)


def run_init(arguments: argparse.Namespace) -> int:
    """Runs a parsed `init` in the current directory. Returns 0; raises DescriptionError when nothing can be done."""
    from harness.init.proposal import propose
    from harness.init.sources import read_repository
    from harness.init.writing import Change, description_change, tables_text, workflow_change, write
    from harness.ports import read_ports

    directory = Path.cwd()
    described = read_ports(directory)
    repository = read_repository(directory)
    looked = propose(repository, family=arguments.family, model=arguments.model, described=described)
    print(f"looked at {len(repository.sources)} Python files in {directory}")
    for line in repository.unread[:5]:
        print(f"  not read: {line}")
    for port in described:
        print(f"port '{port.name}' ({port.model}) is described already and is left as it is")
    proposals = looked.proposals
    for number, proposal in enumerate(proposals, start=1):
        print(f"\nport {number} of {len(proposals)}: {proposal.values['model']}")
        for key, reason in proposal.reasons.items():
            print(f"  {key:<10} {proposal.values.get(key, DEFAULTS.get(key, ''))}  ({reason})")
    for line in looked.remarks:
        print(f"\nnote: {line}")
    if not proposals and not described:
        families = family_names()
        print("\n" + LOOKED_FOR.format(families=", ".join(families) or "none", family=(families or ["nanogpt"])[0]))
        raise DescriptionError(f"no port was found in {directory}; what is looked for, and what to write, stands above")
    changes: list[Change] = []
    if proposals:
        try:
            changes.append(description_change(directory, proposals))
        except DescriptionError:
            print("\n" + tables_text(proposals, heading="tool.parity.port"))
            raise
    file = changes[0].path.name if changes else next(n for n in FILES if (directory / n).is_file())
    workflow = workflow_change(directory, harness=arguments.harness, file=file)
    if workflow.before is None:
        changes.append(workflow)
    else:
        print(f"\n{workflow.path} is there already and is left as it is")
    if not changes:
        raise DescriptionError("there is nothing to write: the ports are described and the workflow is there")
    for change in changes:
        print(f"\n{'added to' if change.before is not None else 'new file'} {change.path}:\n")
        print(change.added)
    if not arguments.yes and not _agreed(changes):
        return EXIT_HOLDS
    for change in changes:
        write(change)
        print(f"written: {change.path}")
    print("\nnext: parity check")
    if workflow in changes and 'PARITY_HARNESS: ""' in workflow.added:
        print(f"      then say in {workflow.path.name}, at PARITY_HARNESS, where pip installs the harness from")
    return EXIT_HOLDS


FILES = ("parity.toml", "pyproject.toml")
DEFAULTS = {"load": "state_dict", "labels": "hf"}


def at_a_terminal() -> bool:
    """Whether somebody can be asked."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def _agreed(changes: Sequence[object]) -> bool:
    """Asks at a terminal; says how to go on where there is none."""
    if not at_a_terminal():
        print("nothing is written; to write it: parity init --yes")
        return False
    try:
        answer = input("write this? [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        print("nothing is written")
        return False
    return True
