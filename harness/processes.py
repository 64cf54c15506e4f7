# SPDX-License-Identifier: Apache-2.0
"""Servers that fork: what they hear and say, and how they watch a child to its end and leave nothing of it behind.

Imports nothing of the harness but the jobs of fresh processes, and no framework: it is loaded where there must be none.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

from harness.sandbox import jobs

WAIT_SECONDS = 1.0  # How late the loss of a parent is noticed where the socket does not tell.
POLL_SECONDS = 0.005  # How late the end of a child is noticed where there is no pidfd.
PIPE_BYTES, READ_BYTES = 1 << 20, 1 << 16


class ClientGone(Exception):
    """Nobody is left to answer to."""


# What is said over the socket


def requests(channel: socket.socket, parent: int) -> Iterator[dict[str, Any]]:
    """The messages of the client; ends when it is gone."""
    channel.settimeout(WAIT_SECONDS)
    pending = b""
    while os.getppid() == parent:
        try:
            received = channel.recv(READ_BYTES)
        except TimeoutError:
            continue
        except ConnectionError:
            return
        if not received:
            return
        pending += received
        while b"\n" in pending:
            line, pending = pending.split(b"\n", 1)
            yield json.loads(line)


def send(channel: socket.socket, message: dict[str, Any]) -> None:
    """One JSON line to the client."""
    try:
        channel.sendall(json.dumps(message).encode() + b"\n")
    except OSError as error:
        raise ClientGone from error


# One child


@dataclasses.dataclass(frozen=True, kw_only=True)
class Child:
    """A forked process that is watched: kept has the end of what it wrote, by its standard output and error."""

    pid: int
    output: int
    errors: int
    kept: Mapping[int, bytearray]

    def said(self, pipe: int) -> str:
        """The end of what it wrote to one of the two, once it was watched to its end."""
        # What a dead child left fits the pipe; a descendant that escaped must not keep us here.
        for _ in range(PIPE_BYTES // READ_BYTES):
            if not keep_end(pipe, self.kept[pipe]):
                break
        return bytes(self.kept[pipe]).decode(errors="replace")


def fork_child(run: Callable[[], NoReturn], *, client: socket.socket, memory_limit_bytes: int) -> Child:
    """Forks a process that calls `run` with a session, streams and limits of its own, and nothing after it."""
    output_read, output_write = os.pipe()
    errors_read, errors_write = os.pipe()
    server = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(output_read)
            os.close(errors_read)
            client.close()
            become_child(server, output_write, errors_write, memory_limit_bytes)
            run()
        finally:
            os._exit(70)
    os.close(output_write)
    os.close(errors_write)
    for pipe in (output_read, errors_read):
        os.set_blocking(pipe, False)
    kept = {pipe: bytearray() for pipe in (output_read, errors_read)}
    return Child(pid=pid, output=output_read, errors=errors_read, kept=kept)


def become_child(server: int, output: int, errors: int, memory_bytes: int) -> None:
    """Gives the forked process a session, streams and limits of its own."""
    os.setsid()
    die_with_parent(server)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (errors, 2)):
        os.dup2(source, target)
        os.close(source)
    jobs.set_limits(memory_bytes)


def watch(
    child: Child, *, client: socket.socket, parent: int, seconds: float, answers: int | None = None
) -> int | Literal["time", "answer"]:
    """Waits for the end of a child (its status, negative for a signal), of its time, or for something on `answers`.

    Keeps the end of what it prints meanwhile. Raises ClientGone.
    """
    deadline = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as opened:
        for descriptor in (*child.kept, client.fileno()):
            selector.register(descriptor, selectors.EVENT_READ)
        patience = POLL_SECONDS
        exit_descriptor = open_exit_descriptor(child.pid)
        if exit_descriptor is not None:
            opened.callback(os.close, exit_descriptor)
            selector.register(exit_descriptor, selectors.EVENT_READ)
            patience = WAIT_SECONDS
        if answers is not None:
            selector.register(answers, selectors.EVENT_READ)
        while time.monotonic() < deadline:
            ready = [key.fd for key, _ in selector.select(min(patience, max(deadline - time.monotonic(), 0)))]
            if client.fileno() in ready:
                raise ClientGone  # The client says nothing while a child works: it is closed.
            for pipe in child.kept:
                if pipe in ready and not keep_end(pipe, child.kept[pipe]):
                    selector.unregister(pipe)
            if os.getppid() != parent:
                raise ClientGone
            if answers in ready:
                return "answer"
            ended, code = os.waitpid(child.pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(code)
    return "time"


def end_child(child: Child, spare: Collection[int] = ()) -> None:
    """Kills what is left of a child and of what it started, but `spare`, and closes its streams."""
    end_job(child.pid, spare)
    os.close(child.output)
    os.close(child.errors)


def keep_end(pipe: int, kept: bytearray) -> bool:
    """Reads once and keeps the last part; false when there is nothing more to read now."""
    try:
        read = os.read(pipe, READ_BYTES)
    except BlockingIOError:
        return False
    kept += read
    del kept[: -jobs.KEPT_OUTPUT]
    return bool(read)


def open_exit_descriptor(pid: int) -> int | None:
    """A descriptor that becomes readable when the process ends, where the system has such a thing."""
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def end_job(pid: int, spare: Collection[int] = ()) -> None:
    """Kills a child, its group, and descendants that left the group, but `spare`; returns when they are gone."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        others = [child for child in children() if child not in spare]
        for kill, target in [(os.killpg, pid), *((os.kill, child) for child in others)]:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(target, signal.SIGKILL)
        if not _reap({pid, *others}, spare):
            return
        time.sleep(0.001)


def _reap(processes: Collection[int], spare: Collection[int]) -> bool:
    """Collects those that have ended; whether some are still there."""
    there = False
    for process in processes:
        try:
            there |= os.waitpid(process, os.WNOHANG)[0] == 0
        except ChildProcessError:
            continue
    return there or any(child not in spare for child in children())


def children() -> list[int]:
    """Processes whose parent is this one, as far as the system tells."""
    try:
        return [int(child) for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    except OSError:
        return []


def adopt_orphans() -> None:
    """Makes grandchildren whose parent ends children of this process, so that none outlives its job."""
    process_control(36, 1)  # PR_SET_CHILD_SUBREAPER


def die_with_parent(parent: int) -> None:
    """Has the system kill this process when the server dies, however that happens."""
    process_control(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(70)


def process_control(option: int, value: int) -> None:
    """prctl, on Linux; elsewhere the process group is all there is."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), 0, 0, 0)
