# SPDX-License-Identifier: Apache-2.0
"""Each check in a process of its own, so that nothing a port does reaches the run or the next check.

    with gate(items) as opened:
        result = opened.run(item, options)

A server, forked from the process of the run, imports the frameworks and forks a child that runs foreign code within its
limits and answers with JSON. The child of a port goes on to the next check as long as all is well; the first that fails
takes it along. Where a process cannot be forked safely, the questions are answered in the process of the run: on
systems other than Linux, on a device, and on MLX where the run has computed with it before.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import faulthandler
import gc
import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from harness import families, processes
from harness.checks import fresh_processes
from harness.errors import DescriptionError, NotHere, OutOfTime, ParityError
from harness.guards import refuse_trespass, torch_kept
from harness.ports import Port, places_of_code
from harness.questions import HARMLESS, QUESTIONS, as_values, report_end
from harness.results import Result
from harness.sandbox import jobs, last_line, read_bounded, signal_name

if TYPE_CHECKING:
    from harness.cases import Case
    from harness.runner import Item, Options, Session
    from harness.sandbox import Sandbox

SANDBOXES = ("sandbox", "hub")
"""Fields of a Session: servers of fresh processes, see `harness.checks.fresh_processes`."""

CASE = "case.json"
ANSWER_BYTES = 16 << 20

MEMORY_BYTES = 4 << 30
"""Private memory of one check, what it inherits included."""

PREPARE_SECONDS = 180.0
"""How long importing the frameworks may take."""

GRACE_SECONDS = 5.0
"""How long after the end of its time a check may take to say so, before it is killed."""

LESS_TIME = ((10, 2.0), (3, 4.0), (1, 10.0))
"""Seconds a check gets at most, once so many of its port ran out of time: a port that sleeps would take an hour."""

VARIABLES = {"TOKENIZERS_PARALLELISM": "false"}
"""Of the server: no threads before a fork."""


@contextlib.contextmanager
def gate(items: Iterable[Item] = ()) -> Iterator[Gate]:
    """Where the items of one run are answered. What needs fresh processes gets ready in the background, if one does."""
    with tempfile.TemporaryDirectory(prefix="parity-") as directory:
        warm = frozenset().union(*(fresh_processes(item.check.id, item.route, item.port.load) for item in items))
        opened = Gate(Path(directory).resolve(), warm=warm)
        try:
            yield opened
        finally:
            opened.close()


class Gate:
    """Answers questions about ports, each in a process of its own. Open while its `gate` is."""

    def __init__(self, root: Path, *, warm: Collection[str]) -> None:
        self._root, self._warm = root, warm
        self._server: int | None = None
        self._channel: socket.socket | None = None
        self._families: Mapping[str, families.Family] = {}
        self._ran_out: collections.Counter[tuple[str, Path]] = collections.Counter()
        self._looked_at: set[tuple[str, Path]] = set()
        self._here = contextlib.ExitStack()
        self._shared: Session | None = None
        self._mlx_is_lost = False

    def run(self, item: Item, options: Options) -> Result:
        """What becomes of an item. Never raises for what a port or a check does."""
        seconds = seconds_for(options, ran_out=self._ran_out[item.port.name, item.port.root])
        values = {"item": item, "options": options}
        # The server looks for a device, so that the frameworks are imported here only where there is one.
        skipped = self._ask("skip", values, seconds=PREPARE_SECONDS)["value"]
        if skipped is not None:
            return Result(**skipped)
        answer = self._ask("run", values, seconds=seconds, backend=item.backend)
        self._ran_out[item.port.name, item.port.root] += can_fork(item.backend) and answer["seconds"] >= seconds
        if "ended" in answer:
            values |= {"reason": answer["ended"], "case": answer["case"], "seconds": answer["seconds"]}
            told = self._ask("report_end", values, seconds=seconds, backend=item.backend)
            return Result(**(told["value"] if "value" in told else report_end(None, as_values(values))))
        return Result(**answer["value"])

    def replay(self, port: Port, case: Case, recorded: Mapping[str, Any], bundle: Path) -> Result:
        """What becomes of the one case of a bundle's failure now. Raises NotHere where its device is not here."""
        values = {"port": port, "case": case.as_dict(), "recorded": recorded, "bundle": bundle}
        answer = self._ask("replay", values, seconds=PREPARE_SECONDS, backend=recorded["backend"])
        if "ended" in answer:
            raise ParityError(answer["ended"])
        return Result(**answer["value"])

    def require_classes(self, port: Port) -> None:
        """Raises DescriptionError when what a description names is not what it should be; see `harness.ports`."""
        if (port.name, port.root) not in self._looked_at:
            self._ask("require_classes", {"port": port}, seconds=PREPARE_SECONDS)  # a crash is what checks report
            self._looked_at.add((port.name, port.root))

    def configuration_class(self, model: str, root: Path) -> str | None:
        """The spec of a model's `config_class`, if it names one."""
        answer = self._ask("configuration_class", {"model": model, "root": str(root)}, seconds=PREPARE_SECONDS)
        if "ended" in answer:
            raise ParityError(f"{model} cannot be imported: {answer['ended']}")
        found: str | None = answer["value"]
        return found

    def close(self) -> None:
        """Ends the server with everything it started."""
        self._stop()
        self._here.close()

    # Asking

    def _ask(
        self, question: str, values: Mapping[str, Any], *, seconds: float, backend: str = "torch-cpu"
    ) -> dict[str, Any]:
        """The answer as `value`, or as `ended` how the process that should have given it ended."""
        started = time.perf_counter()
        if can_fork(backend):
            if self._channel is not None and families.registered() != self._families:
                self._stop()  # it was forked before they were registered
            if self._channel is None:
                self._start()
        if not can_fork(backend) or (backend.startswith("mlx-") and self._mlx_is_lost):
            value = QUESTIONS[question](self._session_here(), as_values(values))
            return {"value": value, "seconds": time.perf_counter() - started}
        message = {"question": question, "values": as_values(values), "seconds": seconds}
        try:
            answer = self._converse(message, timeout=seconds + GRACE_SECONDS + PREPARE_SECONDS)
        except OSError as error:
            if isinstance(error, TimeoutError):
                raise ParityError("the process that runs checks gave no sign of life") from error
            self._stop()
            answer = {"ended": "the port ended the process that watches it", "case": None}
        except BaseException:
            self._stop()  # half a conversation cannot go on, after a Ctrl-C neither
            raise
        if "failure" in answer:
            raise ParityError(f"checks cannot be run: {answer['failure']}")
        if "error" in answer:
            raise {"DescriptionError": DescriptionError, "NotHere": NotHere}[answer["error"]](answer["message"])
        return {**answer, "seconds": time.perf_counter() - started}

    def _converse(self, message: Mapping[str, Any], *, timeout: float) -> dict[str, Any]:
        assert self._channel is not None
        self._channel.settimeout(timeout)
        self._channel.sendall(json.dumps(message).encode() + b"\n")
        received = b""
        while not received.endswith(b"\n"):
            part = self._channel.recv(1 << 16)
            if not part:
                raise ConnectionResetError
            received += part
        return dict(json.loads(received))

    def _session_here(self) -> Session:
        from harness.runner import session

        if self._shared is None:
            opened = self._here.enter_context(session())
            self._shared = dataclasses.replace(opened, complaints=[torch_kept()])
        return self._shared

    # The server

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        self._families = families.registered()
        self._mlx_is_lost = mlx_has_threads()
        parent = os.getpid()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, OSError, ValueError):  # none, or a closed one
                stream.flush()
        with warnings.catch_warnings():
            # Later releases of Python warn where there are threads; the server uses nothing that they may hold.
            warnings.simplefilter("ignore", DeprecationWarning)
            server = os.fork()
        if server == 0:
            try:
                ours.close()
                _serve(theirs, self._root, parent, warm=self._warm)
            finally:
                os._exit(70)
        theirs.close()
        self._server, self._channel = server, ours

    def _stop(self) -> None:
        """Closes the socket, on which the server ends with its children, and kills it if it does not."""
        if self._channel is not None:
            self._channel.close()
        if self._server is not None:
            _wait(self._server, seconds=PREPARE_SECONDS)
        self._server, self._channel = None, None


def can_fork(backend: str) -> bool:
    """Whether a check on a backend can have a process of its own, forked from one that has everything imported."""
    # A fork loses what the libraries of other systems hold, and what those of a device do.
    return sys.platform == "linux" and backend.endswith("-cpu")


def mlx_has_threads() -> bool:
    """Whether MLX may have begun to compute in this process: a fork loses its threads, and then waits for them."""
    if "mlx.core" not in sys.modules or sys.platform != "linux":
        return False
    return len(os.listdir("/proc/self/task")) > threading.active_count()


def seconds_for(options: Options, *, ran_out: int) -> float:
    """How long a check may take, when so many of its port ran out of time before."""
    from harness.runner import PROFILES

    less = next((less for least, less in LESS_TIME if ran_out >= least), options.time_limit)
    return min(options.time_limit, less) * PROFILES[options.profile]


def _wait(server: int, *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(server, os.WNOHANG)[0] == 0:
            if time.monotonic() > deadline:
                os.kill(server, signal.SIGKILL)
                os.waitpid(server, 0)
                return
            time.sleep(0.002)


# In the server


def sandbox_of(shared: Session, name: str) -> Sandbox:
    """The server of fresh processes by its name, see `SANDBOXES`."""
    found: Sandbox = getattr(shared, name)
    return found


def _serve(channel: socket.socket, root: Path, parent: int, *, warm: Collection[str]) -> NoReturn:
    """Answers one question after the other until the client is gone."""
    from harness.runner import session

    os.setsid()  # a Ctrl-C is for the client, which then closes the socket
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    processes.die_with_parent(parent)
    processes.adopt_orphans()
    faulthandler.disable()
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    multiprocessing.set_start_method("fork", force=True)  # another one leaves locks behind that somebody has to tidy up
    os.environ.update(VARIABLES, HF_MODULES_CACHE=str(root / "modules"), TORCHINDUCTOR_CACHE_DIR=str(root / "compiled"))
    tempfile.tempdir = str(root)
    with contextlib.suppress(processes.ClientGone), session() as shared, contextlib.ExitStack() as at_end:
        for sandbox in [sandbox_of(shared, name) for name in SANDBOXES if name in warm]:
            sandbox.begin_warm_up()
        failure = _prepare()
        answerer = Answerer(channel, parent, shared, root)
        at_end.callback(answerer.end)
        for message in processes.requests(channel, parent):
            processes.send(channel, {"failure": failure} if failure else answerer.answer(message))
    jobs.leave(0)


def import_all() -> None:
    """Imports what checks need; a process that opens many gates does it once, before them."""
    from harness.checks import CATALOGUE, function_of
    from harness.sandbox.server import PRELOAD, fill_caches

    for name in (*PRELOAD, "harness.bundles", "harness.exploration", "harness.localise", "harness.trial"):
        importlib.import_module(name)
    for check in CATALOGUE:
        function_of(check)
    fill_caches()


def _prepare() -> str | None:
    """Gets ready for children, so that none of them pays for it; what went wrong, if anything did."""
    try:
        import_all()
        import torch

        torch.set_num_threads(1)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    gc.collect()
    gc.freeze()  # children then neither walk nor copy what is here
    return None


class Answerer:
    """Has children answer: one for all questions about a port as long as all is well, then another."""

    def __init__(self, client: socket.socket, parent: int, shared: Session, root: Path) -> None:
        self._client, self._parent, self._shared, self._root = client, parent, shared, root
        self._child: processes.Child | None = None
        self._channel: socket.socket | None = None
        self._directory = shared.root
        self._about: Any = None
        self._knows: frozenset[str] = frozenset()

    def answer(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a question as `value` or `error`, or as `ended` how the process ended without one."""
        values = message["values"]
        if message["question"] in HARMLESS:
            return {"value": QUESTIONS[message["question"]](self._shared, values)}
        asked = values.get("item") or values.get("recorded")
        port = _port_of(values)
        fresh = fresh_processes(asked["check"], asked["route"], port["load"]) if asked else frozenset()
        if not fresh <= self._knows:
            self.end()
        about = [port, values.get("options", {}).get("report")]
        if self._child is None or about != self._about:
            self.end()
            self._start(about, fresh)
        answer = self._answered(message)
        if not answer.pop("is_well", False):
            self.end()
        for name in fresh.difference(answer.pop("sandboxes", ())):
            self.end()
            self._knows -= {name}
            lost = sandbox_of(self._shared, name)
            lost.restart()  # an answer to the child may still be on its way
            lost.begin_warm_up()
        return answer

    def end(self) -> None:
        """Ends the child with everything it started."""
        if self._child is None or self._channel is None:
            return
        self._channel.close()
        spare = [sandbox_of(self._shared, name).process for name in SANDBOXES]
        processes.end_child(self._child, [process for process in spare if process is not None])
        jobs.remove_tree(self._directory)
        self._child = self._channel = None

    def _start(self, about: Any, fresh: frozenset[str]) -> None:
        self._knows |= fresh
        for name in self._knows:
            sandbox_of(self._shared, name).warm_up()  # here, so that it outlives the child
        ours, theirs = socket.socketpair()
        self._directory = Path(tempfile.mkdtemp(dir=self._shared.root))
        port, report = about
        writable = [str(path) for path in (self._root, port and port["root"], report) if path]
        self._child = processes.fork_child(
            lambda: _be_child(theirs, port, writable, self._shared, self._directory),
            client=self._client,
            memory_limit_bytes=MEMORY_BYTES,
        )
        theirs.close()
        self._channel, self._about = ours, about

    def _answered(self, message: Mapping[str, Any]) -> dict[str, Any]:
        assert self._child is not None and self._channel is not None
        (self._directory / CASE).unlink(missing_ok=True)
        self._channel.settimeout(GRACE_SECONDS)
        received = b""
        with contextlib.suppress(OSError):
            self._channel.sendall(json.dumps(message).encode() + b"\n")
        deadline = time.monotonic() + message["seconds"] + GRACE_SECONDS
        while not received.endswith(b"\n"):
            status = processes.watch(
                self._child,
                client=self._client,
                parent=self._parent,
                seconds=max(deadline - time.monotonic(), 0),
                answers=self._channel.fileno(),
            )
            part = b""
            with contextlib.suppress(OSError):
                part = self._channel.recv(1 << 16) if status == "answer" else b""
            received += part
            if not part and status == "answer":  # it closed its end, and is about to die
                status = processes.watch(self._child, client=self._client, parent=self._parent, seconds=GRACE_SECONDS)
            if not part or len(received) > ANSWER_BYTES:
                return self._how_it_ended(status, message["seconds"])
        return dict(json.loads(received))

    def _how_it_ended(self, status: int | str, seconds: float) -> dict[str, Any]:
        assert self._child is not None
        last = last_line(self._child.said(self._child.errors))
        case = None
        with contextlib.suppress(ValueError, OSError):
            case = json.loads(read_bounded(self._directory / CASE, ANSWER_BYTES) or b"null")
        if isinstance(status, str):
            how = f"the port did not end within {seconds:g} s, and nothing but its end could stop it"
        elif status < 0:
            how = f"the port crashed the process it ran in: {signal_name(-status)}" + (f"; {last}" if last else "")
        else:
            how = f"the port ended the process it ran in, with status {status}" + (f"; {last}" if last else "")
        return {"ended": how, "case": case}


def _port_of(values: Mapping[str, Any]) -> Any:
    return values.get("port") or values.get("item", {}).get("port")


# In a child


def _be_child(
    channel: socket.socket, port: Mapping[str, Any] | None, writable: Sequence[str], shared: Session, directory: Path
) -> NoReturn:
    """Answers questions until nobody asks, or until one shows that something is not well."""
    os.environ["TMPDIR"] = tempfile.tempdir = str(directory)
    refusal = refuse_trespass(code=[] if port is None else places_of_code(port), writable=writable)
    # Before anything of the port is imported: from then on the original would compute with what it replaces.
    shared = dataclasses.replace(shared, complaints=[torch_kept(), refusal], case_file=directory / CASE, alone=True)
    is_well = True
    with channel.makefile("rwb") as lines:
        while is_well and (line := lines.readline()):
            answer = _within_time(json.loads(line), shared)
            is_well = answer["is_well"]
            answer["sandboxes"] = [name for name in SANDBOXES if sandbox_of(shared, name).process is not None]
            lines.write(json.dumps(answer).encode() + b"\n")
            lines.flush()
    jobs.leave(0)


def _within_time(message: Mapping[str, Any], shared: Session) -> dict[str, Any]:
    seconds = message["seconds"]

    def out_of_time(number: int, frame: FrameType | None) -> NoReturn:
        raise OutOfTime(f"the port did not end within {seconds:g} s")

    signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        value = QUESTIONS[message["question"]](shared, message["values"])
    except (DescriptionError, NotHere) as error:
        return {"error": type(error).__name__, "message": str(error), "is_well": False}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    is_well = not isinstance(value, dict) or value.get("status") in (None, "passed", "skipped")
    return {"value": value, "is_well": is_well}
