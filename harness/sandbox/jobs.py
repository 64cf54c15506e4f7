# SPDX-License-Identifier: Apache-2.0
"""What a fresh process can do: cut itself off from the source tree and the network, then run one job and answer.

Runs inside the child only. Imports of the harness only its neighbours and what needs nothing else of it, and these at
once, because the harness may lie in the tree that gets hidden; no framework until a job asks for it, because the table
of jobs is read by processes that need none.
The guards stop code that reaches for what a user would not have; they are not a jail against deliberate attack.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import os
import runpy
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from harness.hub.environment import is_loopback
from harness.sandbox.hub_jobs import pull, push
from harness.sandbox.models import (
    describe_model,
    describe_process,
    files_below,
    flatten,
    forward,
    generation_inputs,
    inputs_for,
    is_importable,
    load,
)

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]

Values = dict[str, Any]

REQUEST, REQUEST_TENSORS = "request.json", "request.safetensors"
ANSWER, ANSWER_TENSORS = "answer.json", "answer.safetensors"
KEPT_OUTPUT = 8192
PATH_KEYS = ("directory", "directories", "resave")


# The jobs


def load_and_run(request: Mapping[str, Any], tensors: Tensors) -> tuple[Values, Tensors]:
    """Loads `directory` through `auto_class`, runs it on the tensors, and says what was loaded.

    Request: `directory`; `auto_class` (AutoModelForCausalLM), `dtype` (float32), `trust_remote_code` (true), `load`
    (further keywords of from_pretrained), `forward` (further keywords of the call), `generate` (keywords, or null),
    `resave` (a directory to save to, or null), `tied` (groups of names), `return_state`, `seed`, `hidden_modules`
    (names that should not be importable). Tensors named `generate.*` go to generate instead of the forward's own.
    Answer: tensors `output.*`, `generated.*`, and with `return_state` `state.*` and `buffer.*` (those not saved).
    """
    import torch

    values: Values = {"process": describe_process()}
    torch.manual_seed(int(request.get("seed", 0)))
    model, values["loading"] = load(request["directory"], request)
    values |= describe_model(model, request.get("tied", ()))
    answer: Tensors = {}

    if request.get("return_state"):
        saved = model.state_dict()
        answer |= {f"state.{name}": tensor for name, tensor in saved.items()}
        answer |= {f"buffer.{name}": tensor for name, tensor in model.named_buffers() if name not in saved}

    values["outputs"], outputs = forward(model, request, tensors)
    answer |= flatten("output", outputs)

    if request.get("generate") is not None:
        torch.manual_seed(int(request.get("seed", 0)))
        generated = model.generate(**generation_inputs(tensors), **request["generate"])
        answer |= flatten("generated.sequences" if torch.is_tensor(generated) else "generated", generated)

    if request.get("resave"):
        model.save_pretrained(request["resave"])
        values["resaved"] = files_below(Path(request["resave"]))

    # Last, because importing runs code.
    values["importable"] = [name for name in request.get("hidden_modules", ()) if is_importable(name)]
    return values, answer


def load_two(request: Mapping[str, Any], tensors: Tensors) -> tuple[Values, Tensors]:
    """Loads two directories in one process, then runs both: neither may disturb the other.

    Request: `directories` (two), the rest as in `load_and_run`; with `both_orders` the two are loaded once more, the
    second first, and the answers are named `reversed.*`. Tensors named `first.*` or `second.*` are for that model
    alone. Answer: tensors `first.output.*` and `second.output.*`, values under `first` and `second`; their `file` tells
    whose code ran. transformers 5.x takes that of the first for both where the directories have the same last name and
    the same configuration file.
    """
    values: Values = {"process": describe_process()}
    answer: Tensors = {}
    names = ("first", "second")
    rounds = [("", names)] + ([("reversed.", names[::-1])] if request.get("both_orders") else [])
    directories = dict(zip(names, request["directories"], strict=True))
    for prefix, order in rounds:
        # All are loaded before any runs: the defect sought is a load that changes code already in use.
        loaded = {name: load(directories[name], request) for name in order}
        for name, (model, loading) in loaded.items():
            values[prefix + name] = {"loading": loading, **describe_model(model, request.get("tied", ()))}
            keys, outputs = forward(model, request, inputs_for(name, names, tensors))
            values[prefix + name]["outputs"] = keys
            answer |= flatten(f"{prefix}{name}.output", outputs)
    return values, answer


def run_program(request: Mapping[str, Any], tensors: Tensors) -> tuple[Values, Tensors]:
    """Runs a Python program in the directory `root` as an interpreter would: `module` or `file`, `arguments`.

    Answer: `status`, the ends of what it printed as `output` and `errors`.
    """
    os.chdir(request["root"])
    file = os.path.abspath(request["file"]) if request["file"] else ""
    sys.path.insert(0, os.path.dirname(file) if file else request["root"])
    sys.argv = [request["file"] or request["module"], *request["arguments"]]
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            if file:
                runpy.run_path(file, run_name="__main__")
            else:
                runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
            status = 0
        except SystemExit as end:
            status = exit_status(end)
        except BaseException:
            traceback.print_exc()
            status = 1
    return {"status": status, "output": _end(output), "errors": _end(errors)}, {}


def exit_status(end: SystemExit) -> int:
    """What an interpreter makes of sys.exit: its number, 0 for None, else 1 with the rest printed."""
    if isinstance(end.code, int):
        return end.code
    if end.code is not None:
        print(end.code, file=sys.stderr)
    return int(end.code is not None)


def _end(stream: io.StringIO) -> str:
    return stream.getvalue()[-KEPT_OUTPUT:]


JOBS: Mapping[str, Callable[[Mapping[str, Any], Any], tuple[Values, Any]]] = {
    "load_and_run": load_and_run,
    "load_two": load_two,
    "run_program": run_program,
    "push": push,
    "pull": pull,
}


# The guards


def hidden_rule(hidden: Sequence[str], visible: Sequence[str]) -> Callable[[str], bool]:
    """A function that says whether a real path is hidden: the longest prefix decides, `hidden` where both are equal."""
    marked = [(os.path.realpath(path), False) for path in visible] + [(os.path.realpath(path), True) for path in hidden]
    rules = [(path, os.path.join(path, ""), verdict) for path, verdict in sorted(marked, key=lambda rule: len(rule[0]))]
    rules.reverse()

    def is_hidden(path: str) -> bool:
        return next((verdict for exact, below, verdict in rules if path == exact or path.startswith(below)), False)

    return is_hidden


def installed_paths() -> list[str]:
    """Where Python and its packages live: a virtual environment inside a hidden tree must stay readable."""
    import sysconfig

    paths = sysconfig.get_paths()
    known = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return [*known, sys.prefix, sys.base_prefix, sys.exec_prefix]


def forget_hidden(is_hidden: Callable[[str], bool]) -> None:
    """Takes the hidden tree off every way an import goes, modules that are already here included."""
    real_folder = functools.cache(os.path.realpath)  # Thousands of modules lie in few folders.

    def hides(path: str) -> bool:
        folder, name = os.path.split(os.path.abspath(path))
        return is_hidden(os.path.join(real_folder(folder), name))

    sys.path[:] = [entry for entry in sys.path if entry not in ("", ".") and not hides(entry)]
    sys.meta_path[:] = [finder for finder in sys.meta_path if not any(map(hides, mapped_paths(finder)))]
    for entry in [entry for entry in sys.path_importer_cache if hides(entry)]:
        del sys.path_importer_cache[entry]
    for name, module in list(sys.modules.items()):
        # This module is forgotten too: it stays in memory, and what is not on record cannot be imported.
        if name != "__main__" and any(map(hides, module_paths(module))):
            del sys.modules[name]
    importlib.invalidate_caches()


def mapped_paths(finder: object) -> list[str]:
    """The places an editable install's import finder leads to (setuptools writes `MAPPING` beside the finder)."""
    module = sys.modules.get(getattr(finder, "__module__", None) or type(finder).__module__)
    mapping = getattr(module, "MAPPING", None)
    return [str(path) for path in mapping.values()] if isinstance(mapping, dict) else []


def module_paths(module: ModuleType | None) -> list[str]:
    """Where a loaded module comes from; a namespace package has no file but places."""
    # Read without getattr: a lazy module would import its contents.
    namespace = getattr(module, "__dict__", {})
    file, places = namespace.get("__file__"), namespace.get("__path__")
    if isinstance(file, str):
        return [file]
    try:
        return [str(place) for place in places or ()]
    except Exception:
        return []  # A namespace package whose parent is gone cannot say.


def install_guards(is_hidden: Callable[[str], bool]) -> None:
    """Refuses for the rest of this process to read below hidden paths, to leave loopback, to signal other jobs."""

    def refuse_path(path: object) -> None:
        if isinstance(path, str | bytes | os.PathLike) and is_hidden(os.path.realpath(os.fsdecode(path))):
            raise PermissionError(
                f"'{os.fsdecode(path)}' lies in the hidden source tree; the saved directory has to carry what it needs"
            )

    def refuse_code(file: str) -> None:
        if os.path.isabs(file):  # Code made from text names no file.
            refuse_path(file)

    def refuse_host(host: object) -> None:
        if host and not is_loopback(host):
            raise PermissionError(f"network access to {host!r} refused; a fresh process may use loopback only")

    def refuse_address(address: object) -> None:
        if isinstance(address, tuple):  # A string is a socket of this machine.
            refuse_host(address[0])

    def refuse_signal(process: object) -> None:
        if isinstance(process, int) and (process < 0 or (process > 0 and os.getpgid(process) != os.getpgrp())):
            raise PermissionError(f"signal to process {process} refused; a fresh process may signal its children only")

    guards: dict[str, Callable[[tuple[Any, ...]], None]] = {
        "open": lambda arguments: refuse_path(arguments[0]),
        "os.listdir": lambda arguments: refuse_path(arguments[0]),
        "os.scandir": lambda arguments: refuse_path(arguments[0]),
        "os.chdir": lambda arguments: refuse_path(arguments[0]),
        # Extension modules and byte code kept elsewhere are not opened below the hidden path.
        "import": lambda arguments: refuse_path(arguments[1]),
        "ctypes.dlopen": lambda arguments: refuse_path(arguments[0]),
        "exec": lambda arguments: refuse_code(arguments[0].co_filename),
        "socket.connect": lambda arguments: refuse_address(arguments[1]),
        "socket.sendto": lambda arguments: refuse_address(arguments[1]),
        "socket.sendmsg": lambda arguments: refuse_address(arguments[1]),
        "socket.getaddrinfo": lambda arguments: refuse_host(arguments[0]),
        "socket.gethostbyname": lambda arguments: refuse_host(arguments[0]),
        "os.kill": lambda arguments: refuse_signal(arguments[0]),
        "os.killpg": lambda arguments: refuse_signal(arguments[0]),
    }

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        guard = guards.get(event)
        if guard is not None:
            guard(arguments)

    sys.addaudithook(audit)


def set_limits(memory_bytes: int) -> None:
    """Bounds memory and file size of this process, and leaves no core file."""
    import resource

    # Not RLIMIT_AS: torch reserves far more addresses than it uses, a CUDA build tens of gigabytes.
    for limit, value in (
        (resource.RLIMIT_DATA, memory_bytes),
        (resource.RLIMIT_FSIZE, memory_bytes),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(limit)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(limit, (value, value))
        except (OSError, ValueError):
            continue  # A system that has no such limit still has the time limit.


def poison_memory() -> None:
    """Has torch fill memory nobody wrote to with NaN, so that reading it shows."""
    import torch

    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)


# One job from request to answer


def run_job(job_directory: Path) -> None:
    """Reads the request, cuts the process off, runs the job, writes its answer or the exception it ended with."""
    request = json.loads((job_directory / REQUEST).read_text())
    os.chdir(request["working_directory"])
    tempfile.tempdir = None  # Decided anew from TMPDIR: the server's own may be gone.
    try:
        is_hidden = hidden_rule(request["hidden_paths"], [*request["visible_paths"], *installed_paths()])
        forget_hidden(is_hidden)
        install_guards(is_hidden)
        if request["poisoned_memory"]:
            poison_memory()
        values, tensors = JOBS[request["job"]](request["request"], read_tensors(job_directory / REQUEST_TENSORS))
        write_tensors(job_directory / ANSWER_TENSORS, tensors)
        answer: Values = {"values": values}
    except BaseException as error:  # A sys.exit of foreign code is an answer too.
        answer = {"error": describe_error(error)}
    write_whole(job_directory / ANSWER, json.dumps(answer, default=str).encode())


def run_cold() -> NoReturn:
    """Entry point of a cold interpreter: the job directory is the last argument."""
    run_job(Path(sys.argv[-1]))
    leave(0)


def leave(status: int) -> NoReturn:
    """Ends the process without the clean-up of Python, which foreign code can hook into."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:
            continue
    os._exit(status)


def describe_error(error: BaseException) -> Values:
    """An exception as data: type, text, traceback, and the last line of remote code it went through."""
    try:
        message = str(error)
    except Exception:
        message = "(its text cannot be shown)"
    cache = os.path.join(os.environ.get("HF_MODULES_CACHE", ""), "")
    message = ": ".join([*getattr(error, "__notes__", ()), message])
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    remote = [(file, line) for file, line in frames if file.startswith(cache)]
    return {
        "type": type(error).__name__,
        "message": message[:KEPT_OUTPUT],
        "where": f"{os.path.basename(remote[-1][0])}, line {remote[-1][1]}" if remote else "",
        "traceback": "".join(traceback.format_exception(error))[-KEPT_OUTPUT:],
    }


def read_tensors(path: Path) -> Tensors:
    """The tensors of a safetensors file, none where there is no file."""
    if not path.exists():
        return {}
    from safetensors.torch import load_file

    return load_file(path)


def write_tensors(path: Path, tensors: Tensors) -> None:
    """Writes tensors as safetensors, shared and strided ones as copies; no file for none."""
    if not tensors:
        return
    from safetensors.torch import save

    write_whole(path, save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}))


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that it is either complete or not there."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_bytes(content)
    unfinished.replace(path)


def remove_tree(path: Path) -> None:
    """Deletes a tree as far as it can be, one whose folders a job has locked too."""
    for folder, names, _ in os.walk(path):
        for name in names:
            inner = os.path.join(folder, name)
            if not os.path.islink(inner):  # What a link leads to is not ours.
                os.chmod(inner, 0o700)
    shutil.rmtree(path, ignore_errors=True)
