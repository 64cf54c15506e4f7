# SPDX-License-Identifier: Apache-2.0
"""The process that has the frameworks imported already and forks one watched child per job.

It stays single-threaded and never initialises a device, because a fork copies neither threads nor devices. It speaks
JSON lines over one socket with the client that started it, and ends with everything it started when that closes.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from harness.sandbox import jobs

PRELOAD = (
    "torch",
    "safetensors.torch",
    "transformers.models.auto.configuration_auto",
    "transformers.models.auto.modeling_auto",
    "transformers.modeling_utils",
    "transformers.generation",
    "transformers.generation.utils",
    "transformers.cache_utils",
    "transformers.masking_utils",
    "transformers.modeling_rope_utils",
    "transformers.modeling_layers",
    "transformers.modeling_outputs",
    "transformers.activations",
    "transformers.pytorch_utils",
    "transformers.dynamic_module_utils",
    "transformers.integrations",
)
"""What children find imported. Besides the obvious, what transformers would import on the first load or generate."""

COLD = "import sys; sys.path.append(sys.argv[1]); from harness.sandbox.jobs import run_cold; sys.path.pop(); run_cold()"

WAIT_SECONDS = 1.0  # How late the loss of a parent is noticed where the socket does not tell.
POLL_SECONDS = 0.005  # How late the end of a child is noticed where there is no pidfd.
PIPE_BYTES, READ_BYTES = 1 << 20, 1 << 16


class ClientGone(Exception):
    """Nobody is left to answer to."""


def main() -> None:
    """Entry point: `socket descriptor`, then the folder this server may write to, after the path of the harness."""
    channel, base = socket.socket(fileno=int(sys.argv[2])), Path(sys.argv[3])
    adopt_orphans()
    with contextlib.suppress(ClientGone):
        serve(channel, base, os.getppid())
    jobs.leave(0)  # Tidying up gigabytes of modules would keep the client waiting.


def serve(channel: socket.socket, base: Path, parent: int) -> None:
    """Answers one request after the other until the client is gone."""
    for message in requests(channel, parent):
        if message["do"] == "preload":
            answer = preload([*PRELOAD, *message["modules"]])
        else:
            answer = run_child(message, channel, base, parent)
        send(channel, answer)


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


def preload(modules: Sequence[str]) -> dict[str, Any]:
    """Imports what children need, and makes sure that forking is still safe."""
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            return {"failure": f"cannot preload module '{name}': {error}"}
    fill_caches()
    threads = thread_count()
    if threads != 1:
        return {"failure": f"preloading {', '.join(modules)} started {threads - 1} threads; a fork would lose them"}
    if sys.modules["torch"].cuda.is_initialized():
        return {"failure": f"preloading {', '.join(modules)} initialised CUDA; a forked process could not use it"}
    # What is here stays: the children's collector then neither walks nor copies it.
    gc.collect()
    gc.freeze()
    return {"ready": True}


def fill_caches() -> None:
    """Has transformers build once what every load would build anew: 5.x compiles a thousand patterns to rename keys."""
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ImportError:
        return  # 4.x
    get_checkpoint_conversion_mapping("gpt2")


def thread_count() -> int:
    """Threads of this process, those of libraries too where the system lists them."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return threading.active_count()


# One child


def run_child(message: dict[str, Any], channel: socket.socket, base: Path, parent: int) -> dict[str, Any]:
    """Forks a child for one job, watches it to its end, ends what it left behind, and says how it ended."""
    renew(base, message["fresh_directories"])
    output_read, output_write = os.pipe()
    errors_read, errors_write = os.pipe()
    server = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(output_read)
            os.close(errors_read)
            channel.close()
            become_child(server, output_write, errors_write, message["memory_limit_bytes"])
            be_child(message)
        finally:
            os._exit(70)
    os.close(output_write)
    os.close(errors_write)
    try:
        send(channel, {"started": pid})
        return watch(pid, (output_read, errors_read), channel, parent, message["time_limit_seconds"])
    finally:
        end_job(pid)
        os.close(output_read)
        os.close(errors_read)


def become_child(server: int, output: int, errors: int, memory_bytes: int) -> None:
    """Gives the forked process a session, streams and limits of its own."""
    os.setsid()
    die_with_parent(server)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (errors, 2)):
        os.dup2(source, target)
        os.close(source)
    jobs.set_limits(memory_bytes)


def be_child(message: dict[str, Any]) -> NoReturn:
    """Runs the job here, or in an interpreter that has nothing imported."""
    if message["cold"]:
        command = [sys.executable, *message["interpreter_options"], "-c", COLD, message["harness"]]
        os.execve(sys.executable, [*command, message["job_directory"]], os.environ)
    jobs.run_job(Path(message["job_directory"]))
    jobs.leave(0)


def watch(
    pid: int, pipes: tuple[int, int], channel: socket.socket, parent: int, time_limit_seconds: float
) -> dict[str, Any]:
    """Waits for the end of a child or of its time, and keeps the end of what it prints."""
    kept: dict[int, bytearray] = {pipe: bytearray() for pipe in pipes}
    deadline = time.monotonic() + time_limit_seconds
    status: int | None = None
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as opened:
        for pipe in pipes:
            os.set_blocking(pipe, False)
            selector.register(pipe, selectors.EVENT_READ)
        selector.register(channel, selectors.EVENT_READ)
        patience = POLL_SECONDS
        exit_descriptor = open_exit_descriptor(pid)
        if exit_descriptor is not None:
            opened.callback(os.close, exit_descriptor)
            selector.register(exit_descriptor, selectors.EVENT_READ)
            patience = WAIT_SECONDS
        while status is None and time.monotonic() < deadline:
            for key, _ in selector.select(min(patience, max(deadline - time.monotonic(), 0))):
                if key.fileobj is channel:
                    raise ClientGone  # The client says nothing while a job runs: it is closed.
                if key.fd in kept and not keep_end(key.fd, kept[key.fd]):
                    selector.unregister(key.fd)
            if os.getppid() != parent:
                raise ClientGone
            ended, code = os.waitpid(pid, os.WNOHANG)
            status = os.waitstatus_to_exitcode(code) if ended else None
    if status is None:
        end_job(pid)
    for pipe in pipes:
        # What a dead child left fits the pipe; a descendant that escaped must not keep us here.
        for _ in range(PIPE_BYTES // READ_BYTES):
            if not keep_end(pipe, kept[pipe]):
                break
    output, errors = (bytes(kept[pipe]).decode(errors="replace") for pipe in pipes)
    return {"ended": True, "status": status, "output": output, "errors": errors}


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


def end_job(pid: int) -> None:
    """Kills the child, its group, and descendants that left the group; returns when they are gone."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        for kill, target in [(os.killpg, pid), *((os.kill, child) for child in children())]:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(target, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)


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


def renew(base: Path, directories: Sequence[str]) -> None:
    """Puts empty directories in place of what the last job left, whatever it did to them."""
    scratch = base / "scratch"
    if scratch.exists() or scratch.is_symlink():
        old = Path(tempfile.mkdtemp(prefix="old-", dir=base))
        # Moved first: a tree that cannot be deleted must not be seen by the next job.
        scratch.rename(old / "scratch")
        jobs.remove_tree(old)
    for directory in directories:
        Path(directory).mkdir(parents=True)
