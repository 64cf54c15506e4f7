# SPDX-License-Identifier: Apache-2.0
"""The process that has the frameworks imported already and forks one watched child per job.

It stays single-threaded and never initialises a device, because a fork copies neither threads nor devices. It speaks
JSON lines over one socket with the client that started it, and ends with everything it started when that closes.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import socket
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from harness.processes import ClientGone, adopt_orphans, end_child, end_job, fork_child, requests, send, watch
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
    renew(base, message["fresh_directories"], message["given_directories"])
    child = fork_child(lambda: be_child(message), client=channel, memory_limit_bytes=message["memory_limit_bytes"])
    try:
        send(channel, {"started": child.pid})
        status = watch(child, client=channel, parent=parent, seconds=message["time_limit_seconds"])
        if status == "time":
            end_job(child.pid)
        output, errors = child.said(child.output), child.said(child.errors)
        return {"ended": True, "status": None if status == "time" else status, "output": output, "errors": errors}
    finally:
        end_child(child)


def be_child(message: dict[str, Any]) -> NoReturn:
    """Runs the job here, or in an interpreter that has nothing imported."""
    if message["cold"]:
        command = [sys.executable, *message["interpreter_options"], "-c", COLD, message["harness"]]
        os.execve(sys.executable, [*command, message["job_directory"]], os.environ)
    jobs.run_job(Path(message["job_directory"]))
    jobs.leave(0)


def renew(base: Path, directories: Sequence[str], given: Mapping[str, str]) -> None:
    """Puts empty directories, or the given ones, in place of what the last job left, whatever it did to them."""
    scratch = base / "scratch"
    if scratch.exists() or scratch.is_symlink():
        old = Path(tempfile.mkdtemp(prefix="old-", dir=base))
        # Moved first: a tree that cannot be deleted must not be seen by the next job.
        scratch.rename(old / "scratch")
        jobs.remove_tree(old)
    for directory in directories:
        if os.path.isdir(given.get(directory, "")):
            Path(directory).parent.mkdir(exist_ok=True)
            os.rename(given[directory], directory)
        else:
            Path(directory).mkdir(parents=True)
