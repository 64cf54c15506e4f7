# SPDX-License-Identifier: Apache-2.0
"""What a port may not do to its process and its machine: noticed and named, and refused where it can be."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import sys
import sysconfig
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from harness.sandbox.jobs import hidden_rule, installed_paths
from harness.surroundings import changes, torch_functions

TOOLS = ("torch", "numpy", "safetensors", "transformers", "huggingface_hub", "requests", "urllib3", "httpx", "httpcore")
HARNESS = os.path.dirname(os.path.abspath(__file__))
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("remove", "rename", "rmdir", "mkdir", "link", "symlink", "truncate", "chmod")
CHANGES_OF_FILES = frozenset(f"os.{name}" for name in CHANGES)

Complaint = Callable[[], str | None]
"""Says in one line what a port has done that it may not, as often as it is asked; None when it has done nothing."""


def torch_kept() -> Complaint:
    """Notices functions of torch that are replaced from now on: the original computes with them as well."""
    before = torch_functions()

    def complaint() -> str | None:
        found = changes(before, torch_functions())
        if not found:
            return None
        return f"{found[0]} for the whole process, and the original computes with it too; a port leaves torch as it is"

    return complaint


def refuse_trespass(*, code: Sequence[str], writable: Sequence[str]) -> Complaint:
    """Has code below the paths of `code` write below `writable` alone, use no network and fork no process.

    Installed packages are not meant, also where that code imports them: they keep caches of their own. What is refused
    raises PermissionError there, and is told. For the rest of this process: an audit hook cannot be taken back. Stops
    what a careless port does; it is no jail against a deliberate attack.
    """
    is_code = hidden_rule(code, [*installed_paths(), HARNESS])
    is_passed_through = hidden_rule(_tools(), [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    is_writable = hidden_rule([*writable, os.devnull], [])
    known: dict[str, bool | None] = {}
    found: list[str] = []

    def asks(file: str) -> bool | None:
        """Whether what happens is the doing of a file's code; None where that only does what its caller asks."""
        real = os.path.realpath(file)
        if is_code(real):
            return True
        return None if not os.path.isabs(file) or is_passed_through(real) else False

    def is_asked_by_code() -> bool:
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            file = frame.f_code.co_filename
            if file not in known:
                known[file] = asks(file)
            asked = known[file]
            if asked is not None:
                return asked
            frame = frame.f_back
        return False

    def trespass(event: str, arguments: tuple[Any, ...]) -> str | None:
        if event == "open":
            path, mode, flags = arguments
            writes = flags & WRITING if isinstance(flags, int) else set(mode or "") & set("wxa+")
            return f"writes to {_shown(path)}" if writes and _is_outside(path) else None
        if event in CHANGES_OF_FILES:
            return next((f"changes {_shown(path)}" for path in arguments[:2] if _is_outside(path)), None)
        if event in ("socket.connect", "socket.bind", "socket.sendto"):
            address = arguments[1]
            return f"opens a socket to {address[0]}" if isinstance(address, tuple) else None
        if event == "socket.getaddrinfo":
            return f"looks up {arguments[0]}" if _is_name(arguments[0]) else None
        return "forks a process" if event in ("os.fork", "os.forkpty") else None

    def _is_outside(path: Any) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        real = os.path.realpath(os.fsdecode(path))
        return not is_writable(real) and "__pycache__" not in real.split(os.sep)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" or event in CHANGES_OF_FILES or event.startswith(("socket.", "os.fork")):
            what = trespass(event, arguments)
            if what and is_asked_by_code():
                found.append(what)
                raise PermissionError(f"refused: the port {what}")

    sys.addaudithook(audit)
    return lambda: (
        f"the port {found[0]}; a port reads and writes only what it is told to, and talks to nobody" if found else None
    )


def _tools() -> list[str]:
    """Where the standard library is, and the packages that write what and where they are told to."""
    found = [importlib.util.find_spec(name) for name in TOOLS]
    places = [place for spec in found if spec for place in spec.submodule_search_locations or ()]
    return [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), *places]


def _is_name(host: Any) -> bool:
    """Whether a host is one that some other machine has to be asked about."""
    try:
        ipaddress.ip_address(host or "::")
    except ValueError:
        return bool(host != "localhost")
    return False


def _shown(path: Any) -> str:
    return os.fsdecode(path)
