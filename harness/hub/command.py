# SPDX-License-Identifier: Apache-2.0
"""The `parity hub` command: serves a Hub until it is told to stop, or verifies what one has stored."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from harness.errors import EXIT_FAILED, EXIT_HOLDS, DescriptionError
from harness.hub.accounts import MEMBER_ROLES, TOKEN_ROLES, Organisation, User


def add_hub_parser(commands: Any) -> None:
    """Adds `hub` to the `parity` command line."""
    hub = commands.add_parser(
        "hub",
        help="serve a Hugging Face Hub on loopback",
        description="Serves a Hugging Face Hub on loopback until Ctrl-C. Prints its address when it is ready.",
    )
    hub.add_argument("--root", type=Path, metavar="DIR", help="keep everything there (default: a temporary directory)")
    hub.add_argument("--port", type=int, default=0, metavar="N", help="listen there (default: a free port)")
    hub.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="listen there (default 127.0.0.1)")
    hub.add_argument("--allow-remote", action="store_true", help="take a --host that other machines reach")
    hub.add_argument(
        "--user",
        action="append",
        default=[],
        metavar="NAME:TOKEN[:ROLE]",
        help="somebody with a token to write (default) or read (repeatable; default alice:hf_alice)",
    )
    hub.add_argument(
        "--organisation",
        action="append",
        default=[],
        metavar="NAME:USER[=ROLE],...",
        help="a namespace of several users, each admin, write (default), contributor or read (repeatable)",
    )
    hub.add_argument("--faults", action="store_true", help="take faults at /__hub__/faults, show /__hub__/journal")
    hub.add_argument("--print-env", action="store_true", help="print what to export in a client's shell, too")
    hub.set_defaults(run=run_hub)
    below = hub.add_subparsers(metavar="COMMAND")
    fsck = below.add_parser("fsck", help="verify every file, commit and ref below a root")
    fsck.add_argument("directory", nargs="?", type=Path, metavar="DIR", help="what `parity hub` was given as its root")
    fsck.add_argument("--root", type=Path, default=argparse.SUPPRESS, metavar="DIR", help="the same")
    fsck.set_defaults(run=run_fsck)


def run_hub(arguments: argparse.Namespace) -> int:
    """Serves until Ctrl-C or SIGTERM."""
    from harness.hub.refusals import Refusal
    from harness.hub.server import ALICE, HubServer

    if not 0 <= arguments.port < 1 << 16:
        raise DescriptionError(f"--port {arguments.port}: a port is a number from 1 to 65535, or 0 for a free one")
    users = [user_from(text) for text in arguments.user] or [ALICE]
    organisations = [organisation_from(text) for text in arguments.organisation]
    asked_to_stop = threading.Event()
    with ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, lambda *_: asked_to_stop.set()))
        root = arguments.root or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="parity-hub-")))
        try:
            hub = stack.enter_context(
                HubServer(
                    root,
                    users=users,
                    organisations=organisations,
                    host=arguments.host,
                    port=arguments.port,
                    allow_remote=arguments.allow_remote,
                    faults_over_http=arguments.faults,
                    log=lambda line: print(line, file=sys.stderr, flush=True),
                )
            )
        except Refusal as refusal:
            raise DescriptionError(f"the Hub cannot start: {refusal}") from refusal
        except OSError as error:
            where = f"{arguments.host}, port {arguments.port}"
            raise DescriptionError(f"the Hub cannot start on {where}: {error.strerror or error}") from error
        print(hub.url, flush=True)
        if arguments.print_env:
            for name, value in hub.env().items():
                print(f"export {name}={shlex.quote(value)}", flush=True)
        asked_to_stop.wait()
    return EXIT_HOLDS


def run_fsck(arguments: argparse.Namespace) -> int:
    """Prints what is wrong with a root, one line each. Exit 1 where something is, 2 where there is no Hub."""
    from harness.hub.fsck import fsck

    root = arguments.directory or arguments.root
    if root is None:
        raise DescriptionError("fsck needs the root of a Hub: parity hub fsck DIR")
    if not root.is_dir():
        raise DescriptionError(f"there is no directory {root}")
    problems = fsck(root)
    for problem in problems:
        print(problem)
    print(f"{root}: {len(problems) or 'no'} problem{'' if len(problems) == 1 else 's'}")
    return EXIT_FAILED if problems else EXIT_HOLDS


def user_from(text: str) -> User:
    """`alice:hf_alice` or `bob:hf_bob:read`. Raises DescriptionError."""
    name, *rest = text.split(":")
    if len(rest) not in (1, 2) or not all((name, *rest)) or rest[1:] not in ([], *([role] for role in TOKEN_ROLES)):
        raise DescriptionError(f"--user {text}: expected NAME:TOKEN or NAME:TOKEN:{'|'.join(TOKEN_ROLES)}")
    return User(name=name, token=rest[0], role="read" if rest[1:] == ["read"] else "write")


def organisation_from(text: str) -> Organisation:
    """`acme:alice=admin,bob`. Raises DescriptionError."""
    name, _, listed = text.partition(":")
    members: dict[str, Any] = {}
    for member in listed.split(","):
        user, _, role = member.partition("=")
        members[user] = role or "write"
    if not name or "" in members or not set(members.values()) <= set(MEMBER_ROLES):
        raise DescriptionError(f"--organisation {text}: expected NAME:USER[={'|'.join(MEMBER_ROLES)}],...")
    return Organisation(name=name, members=members)
