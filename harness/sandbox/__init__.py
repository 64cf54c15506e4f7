# SPDX-License-Identifier: Apache-2.0
"""Fresh processes: runs a saved model directory where its code was never imported, in a fraction of a second.

    with Sandbox(tmp_path) as sandbox:
        answer = sandbox.run("load_and_run", {"directory": "saved"}, tensors={"input_ids": ids}, hidden_paths=[tree])
        answer.tensors["output.logits"]

A server process imports torch and transformers once and forks one child per job (`server.py`); the child cuts itself
off from the source tree and the network and answers with JSON and safetensors (`jobs.py`); this module is the client,
and believes nothing a child wrote.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from harness.errors import Mismatch, NotHere, ParityError, says_out_of_memory
from harness.hub.environment import client_environment
from harness.sandbox import jobs

if TYPE_CHECKING:
    import torch

__all__ = ["Answer", "Sandbox", "SandboxFailure"]

SERVER = "import sys; sys.path.append(sys.argv[1]); from harness.sandbox.server import main; sys.path.pop(); main()"
INTERPRETER_OPTIONS = ("-P", "-s")  # Neither the working directory nor the user's own packages.

KEPT_VARIABLES = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ")
"""All that a child sees of its user's environment: enough to find libraries, no tokens."""

IN_WORDS = {
    "load_and_run": "loading and running it",
    "load_two": "loading two models",
    "run_program": "running the converter",
    "push": "pushing it to the Hub",
    "pull": "loading it from the Hub",
}
"""What a failure calls a job."""

START_SECONDS = 180.0
GRACE_SECONDS = 20.0
ANSWER_BYTES = 16 << 20
SHOWN_CHARACTERS = 300

Kind = Literal["exception", "exit", "signal", "time", "answer", "server"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What a job answered: plain values, tensors by name, and the wall-clock seconds from request to answer."""

    values: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    seconds: float


class SandboxFailure(Mismatch):
    """A job ended without an answer. The message is one line; the rest is for a bundle.

    kind: how it ended: `exception` (raised in the job), `exit` (a status), `signal`, `time` (the limit), `answer`
        (something written that is no answer), `server` (the server died with it).
    exception: the name of the exception's type, empty for the other kinds.
    output: the end of standard output, standard error and traceback, as text.
    """

    def __init__(self, message: str, *, kind: Kind, exception: str = "", output: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.exception = exception
        self.output = output


class Sandbox:
    """Runs jobs in processes that have seen nothing; one at a time, each with empty folders and an empty cache.

    root: an existing folder; everything is written below it, in a folder of this sandbox that goes when it closes.
    time_limit_seconds, memory_limit_bytes: bounds of one job; memory counts private data, about 0.4 GB from the start.
    preload: further modules every job finds imported; never the code under test.
    endpoint: the Hub on this machine that jobs talk to; without it they are offline.
    """

    def __init__(
        self,
        root: Path,
        *,
        time_limit_seconds: float = 60,
        memory_limit_bytes: int = 4 << 30,
        preload: Sequence[str] = (),
        endpoint: str | None = None,
    ) -> None:
        self.root = Path(root)
        self.time_limit_seconds = time_limit_seconds
        self.memory_limit_bytes = memory_limit_bytes
        self.preload = tuple(preload)
        self.endpoint = endpoint
        self._base: Path | None = None
        self._server: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()
        self._channel: socket.socket | None = None
        self._preload: Literal["none", "asked", "done"] = "none"

    def __enter__(self) -> Self:
        if not hasattr(os, "fork"):
            raise NotHere("fresh processes need os.fork, which this system lacks; run on Linux or macOS")
        self._base = Path(tempfile.mkdtemp(prefix="sandbox-", dir=self.root)).resolve()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop()
        if self._base is not None:
            jobs.remove_tree(self._base)
            self._base = None

    def run(
        self,
        job: str,
        request: Mapping[str, Any],
        *,
        tensors: Mapping[str, torch.Tensor] | None = None,
        hidden_paths: Sequence[str | Path] = (),
        poisoned_memory: bool = False,
        cache: Path | None = None,
    ) -> Answer:
        """Runs a job of `harness.sandbox.jobs.JOBS` in a forked child and returns its answer.

        hidden_paths: trees the child can neither read nor import from; packages installed below them stay visible.
        poisoned_memory: torch fills memory that nobody wrote to with NaN.
        cache: a folder of the same file system that the job has as its HF_HOME, and that is made if need be; it may go
            from one sandbox to another. Without it the job's is empty, and goes with it.
        Raises SandboxFailure when the job ends without an answer, ParityError when no server can be started.
        """
        self.warm_up()
        return self._run(job, request, tensors or {}, hidden_paths, poisoned_memory, cache=cache)

    def run_cold(
        self,
        job: str,
        request: Mapping[str, Any],
        *,
        tensors: Mapping[str, torch.Tensor] | None = None,
        hidden_paths: Sequence[str | Path] = (),
        poisoned_memory: bool = False,
    ) -> Answer:
        """As `run`, in a new interpreter that imports everything itself: keeps the short cut of `run` honest."""
        return self._run(job, request, tensors or {}, hidden_paths, poisoned_memory, cold=True)

    def _run(
        self,
        job: str,
        request: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor],
        hidden_paths: Sequence[str | Path],
        poisoned_memory: bool,
        *,
        cold: bool = False,
        cache: Path | None = None,
    ) -> Answer:
        if job not in jobs.JOBS:
            raise ValueError(f"there is no job '{job}'; known: {', '.join(jobs.JOBS)}")
        self._start()
        base = self._folder()
        hub = base / "scratch" / "hub"
        start = time.perf_counter()
        (base / "jobs").mkdir(exist_ok=True)
        directory = Path(tempfile.mkdtemp(dir=base / "jobs"))
        try:
            absolute = with_absolute_paths(request)
            content = {
                "job": job,
                "request": absolute,
                "hidden_paths": [os.path.abspath(path) for path in hidden_paths],
                "visible_paths": [str(base), *named_paths(absolute)],
                "poisoned_memory": poisoned_memory,
                "working_directory": str(base / "scratch" / "work"),
            }
            (directory / jobs.REQUEST).write_text(json.dumps(content))
            jobs.write_tensors(directory / jobs.REQUEST_TENSORS, dict(tensors))
            message = {
                "do": "run",
                "job_directory": str(directory),
                "fresh_directories": fresh_directories(base),
                "given_directories": {} if cache is None else {str(hub): str(cache.absolute())},
                "time_limit_seconds": self.time_limit_seconds,
                "memory_limit_bytes": self.memory_limit_bytes,
                "cold": cold,
                "harness": str(harness_parent()),
                "interpreter_options": INTERPRETER_OPTIONS,
            }
            end = self._ask(message, timeout=self.time_limit_seconds + GRACE_SECONDS)
            name = f"{IN_WORDS.get(job, job)} in a {'cold' if cold else 'fresh'} process"
            values, answered = read_answer(directory, end, name=name, sandbox=self)
            return Answer(values=values, tensors=answered, seconds=time.perf_counter() - start)
        finally:
            if cache is not None and hub.is_dir() and not cache.exists():
                hub.rename(cache)
            jobs.remove_tree(directory)

    @property
    def process(self) -> int | None:
        """The server's process, where one was started and not stopped since."""
        return None if self._server is None else self._server.pid

    # The server

    def _folder(self) -> Path:
        if self._base is None:
            raise RuntimeError("a Sandbox is open only inside its with statement")
        return self._base

    def _start(self) -> None:
        if self._server is not None and (self._owner != os.getpid() or self._server.poll() is None):
            return  # a process forked from the one that started it cannot ask after it, and the socket will tell
        self._stop()
        self._owner = os.getpid()
        base = self._folder()
        for directory in fresh_directories(base):
            Path(directory).mkdir(parents=True, exist_ok=True)
        ours, theirs = socket.socketpair()
        with theirs, open(base / "server.log", "wb") as log:
            command = [sys.executable, *INTERPRETER_OPTIONS, "-c", SERVER, str(harness_parent())]
            self._server = subprocess.Popen(
                [*command, str(theirs.fileno()), str(base)],
                cwd=base,
                env=environment(base / "scratch", os.environ, self.endpoint),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # A Ctrl-C is for the client, which then closes the socket.
            )
        self._channel = ours

    def begin_warm_up(self) -> None:
        """Starts the server and has it import what every job needs, without waiting for it."""
        self._start()
        if self._preload == "none":
            self._converse({"do": "preload", "modules": self.preload}, timeout=None)
            self._preload = "asked"

    def warm_up(self) -> None:
        """As `begin_warm_up`, and waits; otherwise the first job waits for that."""
        self.begin_warm_up()
        if self._preload == "asked":
            self._converse(None, timeout=START_SECONDS)
            self._preload = "done"

    def _ask(self, message: Mapping[str, Any], *, timeout: float) -> dict[str, Any]:
        """Sends one message and returns the last line of the answer."""
        if self._preload == "asked":
            self.warm_up()  # answers come in the order of the questions
        return self._converse(message, timeout=timeout)

    def _converse(self, message: Mapping[str, Any] | None, *, timeout: float | None) -> dict[str, Any]:
        """Sends a message if there is one, reads an answer if there is time for it; a failure ends the server."""
        assert self._channel is not None
        child: int | None = None
        try:
            self._channel.settimeout(timeout or START_SECONDS)
            if message is not None:
                self._channel.sendall(json.dumps(message).encode() + b"\n")
            if timeout is None:
                return {}
            pending = b""
            while True:
                received = self._channel.recv(65536)
                if not received:
                    raise ConnectionResetError("the socket closed")
                *lines, pending = (pending + received).split(b"\n")
                for answer in map(json.loads, lines):
                    if "failure" in answer:
                        raise ParityError(
                            f"the server of fresh processes could not start: {one_line(answer['failure'])}"
                        )
                    if "started" not in answer:
                        return dict(answer)
                    child = answer["started"]
        except OSError as error:
            log = last_line(self._log())
            self._stop(child)
            what = "gave no sign of life" if isinstance(error, TimeoutError) else "died"
            message_text = f"the server of fresh processes {what}; its last line: {log or 'none'}"
            if child is None:
                raise ParityError(message_text) from error
            raise SandboxFailure(
                f"{message_text} (while a job ran; the next job gets a new server)", kind="server"
            ) from error
        except BaseException:
            # Half a conversation cannot go on, after a Ctrl-C neither.
            self._stop(child)
            raise

    def _log(self) -> str:
        with open(self._folder() / "server.log", "rb") as log:
            log.seek(-min(jobs.KEPT_OUTPUT, log.seek(0, os.SEEK_END)), os.SEEK_END)
            return log.read().decode(errors="replace")

    def restart(self) -> None:
        """Ends the server, whatever it is doing; the next job gets a new one."""
        self._stop()

    def _stop(self, child: int | None = None) -> None:
        """Closes the socket, on which the server ends with its child, and kills them if they do not."""
        if self._channel is not None:
            self._channel.close()
        if self._server is not None and self._owner == os.getpid():
            try:
                self._server.wait(timeout=GRACE_SECONDS if child is None else 1)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait()
                if child is not None:
                    kill_group(child)
        self._server, self._channel, self._preload = None, None, "none"


def fresh_directories(base: Path) -> list[str]:
    """The folders that every job finds empty: working directory, HOME, HF_HOME, module cache, temporary files."""
    return [str(base / "scratch" / name) for name in ("work", "home", "hub", "modules", "tmp")]


def environment(scratch: Path, user: Mapping[str, str], endpoint: str | None = None) -> dict[str, str]:
    """The variables of the server and its children: all folders below `scratch`, no tokens, one thread.

    The Hub's client is offline, or talks to `endpoint`; it reads that when it is imported.
    """
    kept = {name: user[name] for name in KEPT_VARIABLES if name in user}
    hub = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if endpoint is not None:
        hub = client_environment(endpoint, token=None, home=scratch / "hub", user=kept)
    return (
        kept
        | hub
        | {
            "HOME": str(scratch / "home"),
            "HF_HOME": str(scratch / "hub"),
            "HF_HUB_CACHE": str(scratch / "hub" / "hub"),
            "HF_MODULES_CACHE": str(scratch / "modules"),
            "TMPDIR": str(scratch / "tmp"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "VECLIB_MAXIMUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONHASHSEED": "0",
            "PYTHONUNBUFFERED": "1",
            # Asking whether CUDA is there must not initialise it in the process that forks.
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
            "OBJC_DISABLE_INITIALIZE_FORK_SAFETY": "YES",
        }
    )


def harness_parent() -> Path:
    """The folder `harness` is imported from, installed or not."""
    return Path(__file__).resolve().parents[2]


def named_paths(request: Mapping[str, Any]) -> list[str]:
    """The directories a request names; they stay readable even below a hidden path."""
    found = [request.get(key) or [] for key in jobs.PATH_KEYS]
    return [path for value in found for path in ([value] if isinstance(value, str) else value)]


def with_absolute_paths(request: Mapping[str, Any]) -> dict[str, Any]:
    """The request for a process with another working directory."""

    def absolute(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [os.path.abspath(path) for path in value]
        return value and os.path.abspath(value)

    return {key: absolute(value) if key in jobs.PATH_KEYS else value for key, value in request.items()}


def kill_group(process: int) -> None:
    """Kills a process and its group if they are still there."""
    try:
        os.killpg(process, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


# Reading what a child left


def read_answer(
    directory: Path, end: Mapping[str, Any], *, name: str, sandbox: Sandbox
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Values and tensors of a finished job. Raises SandboxFailure that says how it ended when it has none."""
    output = "\n".join(part for part in (end["output"], end["errors"]) if part)
    last = last_line(end["errors"])
    said = f"; last line of its standard error: {last}" if last else "; it wrote nothing to standard error"

    def failure(what: str, kind: Kind) -> SandboxFailure:
        return SandboxFailure(f"{name} {what}{said}", kind=kind, output=output)

    status = end["status"]
    if status is None:
        raise failure(f"was killed: it exceeded {sandbox.time_limit_seconds:g} s", "time")
    if status < 0:
        raise failure(f"was killed by {signal_name(-status)}", "signal")
    if status > 0:
        raise failure(f"exited with status {status}", "exit")
    try:
        content = read_bounded(directory / jobs.ANSWER, ANSWER_BYTES)
        if content is None:
            raise failure("exited with status 0 and wrote no answer", "exit")
        answer = json.loads(content)
        if not isinstance(answer, dict) or not isinstance(answer.get("error", answer.get("values")), dict):
            raise ValueError(f"neither values nor an error in {jobs.ANSWER}")
        if "error" in answer:
            raise raised(answer["error"], name=name, output=output, memory_limit_bytes=sandbox.memory_limit_bytes)
        tensors = read_bounded(directory / jobs.ANSWER_TENSORS, sandbox.memory_limit_bytes)
        return answer["values"], parse_tensors(tensors) if tensors is not None else {}
    except SandboxFailure:
        raise
    except (ValueError, OSError, RecursionError) as error:
        raise failure(f"wrote an answer that cannot be read: {one_line(str(error))}", "answer") from error


def raised(error: Mapping[str, Any], *, name: str, output: str, memory_limit_bytes: int) -> SandboxFailure:
    """The failure for an exception that a job reported."""
    kind, message, where, trace = (str(error.get(key, "")) for key in ("type", "message", "where", "traceback"))
    text = f"{name} raised {one_line(kind)}: {one_line(message) or 'without a message'}"
    if where:
        text += f" ({one_line(where)})"
    if says_out_of_memory(kind, message):
        text += f"; the memory limit is {memory_limit_bytes / (1 << 30):.2g} GiB"
    return SandboxFailure(text, kind="exception", exception=one_line(kind), output=f"{output}\n{trace}".strip())


def read_bounded(path: Path, limit: int) -> bytes | None:
    """A regular file of at most `limit` bytes, None where there is none. Raises ValueError for anything else."""
    try:
        # A link could lead out, and opening a pipe without a writer would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path.name} is not a regular file")
        if status.st_size > limit:
            raise ValueError(f"{path.name} has {status.st_size} bytes, more than the {limit} allowed")
        return file.read(status.st_size)  # read(limit) would make room for all of it


def parse_tensors(content: bytes) -> dict[str, torch.Tensor]:
    """The tensors of safetensors bytes, whose header is checked before anything is allocated."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(content)
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{jobs.ANSWER_TENSORS}: {error}") from error


def signal_name(number: int) -> str:
    """SIGKILL for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def last_line(text: str) -> str:
    """The last line that has something in it, fit to print."""
    lines = [line for line in text.splitlines() if line.strip()]
    return one_line(lines[-1]) if lines else ""


def one_line(text: str) -> str:
    """Text of a child as one short line that cannot steer a terminal."""
    clean = "".join(" " if unicodedata.category(character)[0] in "CZ" else character for character in text)
    words = " ".join(clean.split())
    return words if len(words) <= SHOWN_CHARACTERS else words[: SHOWN_CHARACTERS - 1] + "…"
