# SPDX-License-Identifier: Apache-2.0
"""Hostile ports: the gate says what happened in one line, goes on with the next check, and stays what it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import Result
from harness.backends import pytorch
from harness.families import find_family, register_family
from harness.isolation import gate, seconds_for
from harness.ports import Port
from harness.runner import Options, check_parity, plan, run_ports
from tests.harness.conftest import PlainPort

CAUSAL: dict[str, Any] = {"checks": ["forward.causal"], "backends": ["torch-cpu"]}
NOTHING_STOPS_IT = "import time\nwhile True:\n    try: time.sleep(1000)\n    except BaseException: pass"


def both(rude: Port, polite: Port, **options: Any) -> tuple[Result, Result]:
    """What becomes of one check on a rude port, and on a polite one after it."""
    first, second = run_ports([rude, polite], Options(**CAUSAL, **options))
    return first, second


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"forward": "import ctypes\nctypes.CDLL(None)._exit(0)"}, "ended the process it ran in, with status 0"),
        ({"forward": "import ctypes\nctypes.CDLL(None)._exit(5)"}, "ended the process it ran in, with status 5"),
        ({"forward": "import ctypes\nctypes.string_at(0)"}, "crashed the process it ran in: SIGSEGV"),
        ({"forward": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"}, "crashed the process it ran in: SIGK"),
        ({"more": "import os\nos.abort()"}, "crashed the process it ran in: SIGABRT"),
        ({"forward": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)"}, "ended the process that watches it"),
        ({"forward": "raise KeyboardInterrupt"}, "the port raised KeyboardInterrupt"),
        ({"forward": "held = []\nwhile True: held.append(bytearray(1 << 28))"}, "ran out of memory"),
        ({"forward": "held = []\nwhile True: held.append(torch.zeros(1 << 26))"}, "ran out of memory"),
        ({"forward": "import os\nif os.fork() == 0: os._exit(0)"}, "the port forks a process"),
        ({"forward": "open('../outside.txt', 'w').write('here')"}, "the port writes to ../outside.txt"),
        ({"more": "import pathlib\npathlib.Path.home().joinpath('.rude').mkdir()"}, "the port changes "),
        ({"forward": "import socket\nsocket.create_connection(('192.0.2.1', 80), 1)"}, "the port opens a socket"),
        ({"forward": "import socket\nsocket.socket().bind(('127.0.0.1', 0))"}, "the port opens a socket to 127.0.0.1"),
        ({"forward": "import socket\nsocket.getaddrinfo('example.org', 80)"}, "the port looks up example.org"),
        ({"more": "torch.nn.functional.gelu = lambda x: x"}, "torch.nn.functional.gelu is replaced"),
        ({"forward": "torch.Tensor.softmax = None"}, "torch.Tensor.softmax is replaced"),
        ({"forward": "torch.nn.Linear.forward = lambda self, x: x"}, "torch.nn.Linear.forward is replaced"),
    ],
)  # fmt: skip
def test_what_a_port_does_to_its_process_is_told_and_goes_no_further(
    tmp_path: Path, plain_port: PlainPort, body: dict[str, str], words: str
) -> None:
    ports = [plain_port(tmp_path, "rude", **body), plain_port(tmp_path, "polite")]
    rude, polite = both(*ports)
    assert (rude.status, polite.status) == ("failed", "passed"), polite.reason
    assert words in rude.reason
    assert "\n" not in rude.reason
    assert rude.config is not None or "watches" in words


def test_what_a_port_replaces_when_it_is_imported_is_told_of_a_port_alone(
    tmp_path: Path, plain_port: PlainPort
) -> None:
    rude = plain_port(tmp_path, more="torch.nn.functional.gelu = lambda x: x")
    (result,) = check_parity(rude, **CAUSAL)  # its class is looked at before its first check
    assert (result.status, "torch.nn.functional.gelu is replaced" in result.reason) == ("failed", True)


@pytest.mark.parametrize(
    "swallowed",
    [
        "open('../outside.txt', 'w')",
        "__import__('socket').create_connection(('192.0.2.1', 80))",
        "__import__('os').fork()",
    ],
)
def test_what_is_refused_is_told_also_when_the_port_hides_it(
    tmp_path: Path, plain_port: PlainPort, swallowed: str
) -> None:
    rude = plain_port(tmp_path, "rude", forward=f"try: {swallowed}\nexcept Exception: pass")
    (result,) = check_parity(rude, **CAUSAL)
    assert result.status == "failed"
    assert "the port " in result.reason
    assert not (tmp_path.parent / "outside.txt").exists()


@pytest.mark.parametrize("allowed", ["open('debug.log', 'a').write('.')", "__import__('tempfile').mkdtemp()"])
def test_a_port_may_write_below_its_root_and_to_temporary_files(
    tmp_path: Path, plain_port: PlainPort, allowed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (result,) = check_parity(plain_port(tmp_path, forward=allowed), **CAUSAL)
    assert result.status == "passed", result.reason


def test_a_package_that_a_port_imports_may_keep_its_caches(
    tmp_path: Path, plain_port: PlainPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, cache = tmp_path / "site", tmp_path / "cache"
    (site / "cached").mkdir(parents=True)
    cache.mkdir()
    (site / "cached/__init__.py").write_text(f"open({str(cache / 'fonts')!r}, 'w').write('here')\n")
    monkeypatch.syspath_prepend(str(site))
    (tmp_path / "repository").mkdir()
    (result,) = check_parity(plain_port(tmp_path / "repository", more="import cached"), **CAUSAL)
    assert result.status == "passed", result.reason
    assert (cache / "fonts").exists()


ELSEWHERE = """
import sys
from pathlib import Path
from harness import Port, check_parity
Path("p.py").write_text("class Port:\\n    state_dict = 1\\nclass Config:\\n    to_dict = 1\\n")
port = Port(name="p", family="nanogpt", model="p.py:Port", config="p.py:Config", root=Path.cwd())
(result,) = check_parity(port, checks=["forward.causal"], backends=["torch-mps"])
print(result.status, "torch" in sys.modules)
"""


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is a Metal device")
def test_a_device_that_is_not_here_is_found_out_without_a_framework_in_this_process(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", ELSEWHERE], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["skipped", "False"], done.stderr


def test_a_port_that_sleeps_is_told_with_its_case_and_its_bundle(tmp_path: Path, plain_port: PlainPort) -> None:
    ports = [plain_port(tmp_path, "rude", forward="import time\ntime.sleep(1000)"), plain_port(tmp_path, "polite")]
    rude, polite = both(*ports, time_limit=2.0, report=tmp_path / "report")
    assert polite.status == "passed"
    assert rude.reason == "the port did not end within 2 s"
    assert rude.config is not None
    assert Path(rude.bundle or "").is_dir()
    assert rude.seconds < 100


def test_a_port_that_cannot_be_interrupted_is_killed(tmp_path: Path, plain_port: PlainPort) -> None:
    ports = [plain_port(tmp_path, "rude", forward=NOTHING_STOPS_IT), plain_port(tmp_path, "polite")]
    rude, polite = both(*ports, time_limit=5.0, report=tmp_path / "report")
    assert polite.status == "passed"
    assert rude.reason == "the port did not end within 5 s, and nothing but its end could stop it"
    assert rude.config is not None
    assert Path(rude.bundle or "").is_dir()


def test_a_port_that_keeps_running_out_of_time_gets_less_of_it() -> None:
    options = Options(time_limit=60.0)
    assert [seconds_for(options, ran_out=count) for count in (0, 1, 2, 3, 9, 10)] == [60, 10, 10, 4, 4, 2]
    assert seconds_for(Options(time_limit=60.0, profile="thorough"), ran_out=0) == 360


def test_what_a_port_leaves_running_ends_with_its_check(tmp_path: Path, plain_port: PlainPort) -> None:
    left = """
    import subprocess, sys
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
    open("left", "a").write(f"{child.pid} ")
    """
    port = plain_port(tmp_path, forward=textwrap.dedent(left).replace('"left"', repr(str(tmp_path / "left"))))
    (result,) = check_parity(port, **CAUSAL)
    assert result.status == "passed", result.reason
    pids = [int(word) for word in (tmp_path / "left").read_text().split()]
    assert pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_megabytes_of_print_are_not_kept(
    tmp_path: Path, plain_port: PlainPort, capfd: pytest.CaptureFixture[str]
) -> None:
    chatty = "import os, sys\nprint('x' * (1 << 24))\nprint('y' * (1 << 24), file=sys.stderr)\nos.write(1, b'z' * 4096)"
    (result,) = check_parity(plain_port(tmp_path, forward=chatty), **CAUSAL)
    assert result.status == "passed"
    assert capfd.readouterr() == ("", "")


def test_a_check_after_a_crash_gets_a_process_that_saw_nothing(tmp_path: Path, plain_port: PlainPort) -> None:
    forward = "if input_ids.shape[1] == 1: __import__('ctypes').CDLL(None)._exit(3)"
    options = {"checks": ["forward.lengths", "forward.causal", "forward.deterministic"], "backends": ["torch-cpu"]}
    results = check_parity(plain_port(tmp_path, forward=forward), **options)
    assert [result.check for result in results] == options["checks"]
    assert all("with status 3" in result.reason or result.status == "passed" for result in results)


RUDE = """
import atexit, os, signal, sys, threading, warnings
os.environ["RUDE"] = "1"
os.chdir("/")
sys.path.insert(0, "/rude")
sys.setrecursionlimit(5000)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
threading.Thread(target=lambda: threading.Event().wait(), daemon=False).start()
atexit.register(lambda: threading.Event().wait())
warnings.simplefilter("error")
torch.set_default_dtype(torch.float16)
torch.manual_seed(7)
torch.nn.functional.linear = None
sys.stdout.close()
"""


def process_state() -> dict[str, Any]:
    return {
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "path": list(sys.path),
        "modules": {name for name in sys.modules if "parity_port" in name or name.startswith("rude")},
        "recursion": sys.getrecursionlimit(),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)],
        "threads": threading.enumerate(),
        "torch": pytorch.settings(),
        "random": torch.initial_seed(),
        "linear": torch.nn.functional.linear,
        "stdout": sys.stdout.closed,
        "descriptors": sorted(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else [],
    }


def test_the_process_of_the_run_is_what_it_was(tmp_path: Path, plain_port: PlainPort) -> None:
    rude, polite = plain_port(tmp_path, "rude", more=RUDE), plain_port(tmp_path, "polite")
    check_parity(polite, **CAUSAL)  # what the harness itself imports
    before = process_state()
    results = both(rude, polite)
    assert process_state() == before
    assert results[1].status == "passed", results[1].reason


def test_a_gate_leaves_no_process_and_no_file_behind(
    tmp_path: Path, plain_port: PlainPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    options = Options(**CAUSAL)
    items = plan([plain_port(tmp_path)], options)
    with gate(items) as opened:
        assert opened.run(items[0], options).status == "passed"
        server = opened._server
    assert server is not None
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)
    assert list(scratch.iterdir()) == []


def test_a_family_registered_after_the_first_check_is_known(tmp_path: Path, plain_port: PlainPort) -> None:
    import dataclasses

    options = Options(**CAUSAL)
    port = plain_port(tmp_path)
    with gate() as opened:
        assert opened.run(plan([port], options)[0], options).status == "passed"
        register_family(dataclasses.replace(find_family("nanogpt"), name="late-nanogpt"))
        (item,) = plan([dataclasses.replace(port, family="late-nanogpt")], options)
        assert opened.run(item, options).family == "late-nanogpt"


INTERRUPTED = """
import sys
from pathlib import Path
from harness import Port, check_parity
port = Port(name="p", family="nanogpt", model="rude.py:Port", config="rude.py:Config", root=Path.cwd())
check_parity(port, checks=["forward.causal"], backends=["torch-cpu"], time_limit=500)
"""


def test_an_interrupted_run_ends_at_once_with_all_it_started(tmp_path: Path, plain_port: PlainPort) -> None:
    plain_port(tmp_path, "rude", forward=f"open('pid', 'w').write(str(__import__('os').getpid()))\n{NOTHING_STOPS_IT}")
    run = subprocess.Popen([sys.executable, "-c", INTERRUPTED], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in run.communicate(timeout=60)[1]
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
