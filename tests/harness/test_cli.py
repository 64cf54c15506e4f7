# SPDX-License-Identifier: Apache-2.0
"""The `parity` command: its exit codes, one line for what is wrong, one document where JSON is asked for."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness import Port
from harness.backends import unavailable
from harness.cli import main

CAUSAL = ("--checks", "forward.causal", "--backend", "torch-cpu")
BLOCKS = ("--checks", "forward.blocks", "--backend", "torch-cpu")
TANH = "for block in self.transformer.h:\n    block.mlp.gelu.approximate = 'tanh'"

PlainPort = Callable[..., Port]
Describe = Callable[..., None]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def one_line(error: str) -> str:
    assert error.startswith("parity: ")
    assert error.count("\n") == 1
    return error


def start(directory: Path, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "harness.cli", *arguments]
    return subprocess.Popen(
        command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


# parity check


def test_exit_codes_and_the_table_of_a_run(
    here: Path, plain_port: PlainPort, describe: Describe, capsys: pytest.CaptureFixture[str]
) -> None:
    describe(plain_port(here, "right"), plain_port(here, "wrong", forward=TANH))
    assert main(["check", "--port", "right", *BLOCKS]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"^check +route +dtype +status", out, flags=re.MULTILINE)
    assert re.search(r"^forward.blocks +direct +float64 +passed", out, flags=re.MULTILINE)
    assert out.rstrip().endswith("1 check run: 1 passed")
    assert err == ""
    assert main(["check", *BLOCKS]) == 1
    out, err = capsys.readouterr()
    table = re.findall(r"^(right|wrong) +forward.blocks +direct +float64 +(\w+)", out, flags=re.MULTILINE)
    assert table == [("wrong", "failed"), ("right", "passed")]
    assert re.search(r"^ +config +.*n_layer=1 n_head=1", out, flags=re.MULTILINE)
    assert re.search(r"^ +numbers +error=.* bound=", out, flags=re.MULTILINE)
    assert err == ""


def test_fewer_checks_than_asked_for_exit_with_one(
    here: Path, plain_port: PlainPort, describe: Describe, capsys: pytest.CaptureFixture[str]
) -> None:
    describe(plain_port(here, lacks={"forward.causal": "no"}))
    assert main(["check", *CAUSAL, "--min-checks", "1", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["checks_run"] == 0
    assert one_line(err) == "parity: port 'plain': 0 checks ran, 1 were asked for\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "plian"], "no port 'plian'; did you mean 'plain'"),
        (["--checks", "forward.casual"], "did you mean 'forward.causal'"),
        (["--backend", "cuda"], "no backend 'cuda'"),
        (["--dtype", "float23"], "did you mean 'float32'"),
        (["--profile", "fast"], "no profile 'fast'"),
        (["--require", "torch-cud"], "did you mean 'torch-cuda'"),
        (["--original", "gone.py:GPT"], "no file"),
        (["--model", "plain.py:Port"], "give both"),
        (["--family", "nanogtp", "--model", "plain.py:Port", "--config", "plain.py:Config"], "did you mean 'nanogpt'"),
        (["--family", "nanogpt", "--model", "plain.py:Port"], "no config_class"),
        (["--family", "nanogpt", "--model", "plain.py:Prot", "--config", "plain.py:Config"], "did you mean 'Port'"),
        (["--family", "nanogpt", "--model", "plain.py:Port", "--config", "plain.py:Port"], "not a configuration class"),
        (["--report", "plain.py/below"], "plain.py"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_2(
    here: Path,
    plain_port: PlainPort,
    describe: Describe,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    describe(plain_port(here))
    assert main(["check", *CAUSAL[2:], *([] if "--checks" in arguments else CAUSAL[:2]), *arguments]) == 2
    out, err = capsys.readouterr()
    assert words in one_line(err)
    assert out == ""


@pytest.mark.parametrize("name", ["torch-cuda", "torch-mps", "mlx"])
def test_what_is_required_and_not_here_is_one_line_and_exit_3(
    here: Path, plain_port: PlainPort, describe: Describe, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    if unavailable("mlx-cpu" if name == "mlx" else name) is None:
        pytest.skip(f"{name} is here")
    describe(plain_port(here))
    assert main(["check", *CAUSAL, "--require", name]) == 3
    assert f"(required: {name})" in one_line(capsys.readouterr().err)


def test_a_port_without_a_description(here: Path, plain_port: PlainPort, capsys: pytest.CaptureFixture[str]) -> None:
    plain_port(here, more="config_class = Config")
    assert main(["check", "--family", "nanogpt", "--model", "plain.py:Port", *CAUSAL, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [(result["port"], result["family"], result["status"]) for result in results] == [
        ("Port", "nanogpt", "passed")
    ]


def test_a_port_that_ends_the_process_fails_a_check_and_not_the_run(
    here: Path, plain_port: PlainPort, describe: Describe, capsys: pytest.CaptureFixture[str]
) -> None:
    describe(plain_port(here, "leaving", forward="raise SystemExit(0)"), plain_port(here, "right"))
    assert main(["check", *CAUSAL, "--json"]) == 1
    results = {result["port"]: result for result in json.loads(capsys.readouterr().out)["results"]}
    assert (results["leaving"]["status"], results["right"]["status"]) == ("failed", "passed")
    assert "exit" in results["leaving"]["reason"].lower()


def test_json_is_one_document_whatever_a_port_prints(here: Path, plain_port: PlainPort, describe: Describe) -> None:
    chatter = (
        "import os, sys, warnings, logging\nprint('chat')\nsys.stderr.write('chat')\nsys.__stdout__.write('chat')\n"
        "os.system('echo chat')\nos.write(1, b'chat')\nwarnings.warn('chat')\nlogging.critical('chat')"
    )
    describe(plain_port(here, forward=f"{chatter}\n{TANH}", more="print('chat')"))
    process = start(here, "check", *BLOCKS, "--json")
    out, err = process.communicate(timeout=120)
    assert [result["status"] for result in json.loads(out)["results"]] == ["failed"]
    assert (process.returncode, err) == (1, "")


def test_a_terminal_sees_the_bar_move_while_checks_run(here: Path, plain_port: PlainPort, describe: Describe) -> None:
    describe(plain_port(here, forward="import time; time.sleep(0.03)"))
    terminal, other = pty.openpty()
    command = [sys.executable, "-m", "harness.cli", "check", *CAUSAL, "--checks", "forward.[bdl]*"]
    process = subprocess.Popen(
        command, cwd=here, stdout=subprocess.DEVNULL, stderr=other, env={**os.environ, "TERM": "xterm"}
    )
    os.close(other)
    seen = b""
    while True:
        try:
            seen += os.read(terminal, 4096)
        except OSError:  # the last process that had it open has ended
            break
    os.close(terminal)
    process.wait(timeout=60)
    counts = re.findall(rb"(\d+)/(\d+)", seen)
    assert any(0 < int(done) < int(total) for done, total in counts)
    assert b"checks run" not in seen


@pytest.mark.parametrize("checks", ["forward.*", "remote_code.*"])
def test_an_interrupted_run_ends_with_one_line_and_leaves_nothing(
    tmp_path: Path, plain_port: PlainPort, describe: Describe, checks: str
) -> None:
    if checks == "remote_code.*":  # these have processes of their own
        describe(
            Port(
                name="reference",
                family="nanogpt",
                model="reference_models.nanogpt.modeling_nanogpt:NanoGPTLMHeadModel",
                config="reference_models.nanogpt.configuration_nanogpt:NanoGPTConfig",
                root=tmp_path,
            )
        )
    else:
        describe(plain_port(tmp_path, forward="open('started', 'w').close()\nimport time; time.sleep(60)"))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    environment = {**os.environ, "TMPDIR": str(scratch)}
    process = start(
        tmp_path, "check", "--checks", checks, "--backend", "torch-cpu", env=environment, start_new_session=True
    )
    children: list[psutil.Process] = []
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        children = psutil.Process(process.pid).children(recursive=True)
        if (tmp_path / "started").exists() or len(children) > 1:  # the server of fresh processes, and a job of its
            break
        time.sleep(0.05)
    assert list(scratch.glob("parity-*"))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "parity: interrupted\n")
    assert list(scratch.glob("parity-*")) == []
    assert psutil.wait_procs(children, timeout=10)[1] == []


# parity list


def test_list_names_families_ports_backends_and_checks(
    here: Path, plain_port: PlainPort, describe: Describe, capsys: pytest.CaptureFixture[str]
) -> None:
    describe(plain_port(here, load="checkpoint:Port.read"))
    assert main(["list"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == ""
    assert any(line.startswith("families") and "nanogpt" in line for line in lines)
    assert "port      plain: plain.py:Port (nanogpt, checkpoint:Port.read)" in lines
    assert "backend   torch-cpu: here" in lines
    assert any(line.startswith("check     loss.value (needs loss)") for line in lines)


def test_list_of_a_directory_with_a_wrong_description_is_one_line(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "parity.toml").write_text("[[port]]\nnam = 'x'\n")
    assert main(["list", "--json"]) == 2
    out, err = capsys.readouterr()
    assert "'nam'" in one_line(err)
    assert out == ""


# parity repro


@pytest.fixture
def bundle(here: Path, plain_port: PlainPort, describe: Describe, capsys: pytest.CaptureFixture[str]) -> Path:
    """The bundle of a failure of `wrong.py`, with `right.py` beside it."""
    plain_port(here, "right")
    describe(plain_port(here, "wrong", forward=TANH))
    assert main(["check", *BLOCKS, "--report", "out"]) == 1
    capsys.readouterr()
    (found,) = (here / "out" / "bundles").iterdir()
    return found


def test_a_bundle_gives_the_same_numbers_again_and_none_with_the_repaired_file(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path_factory: Any
) -> None:
    recorded = json.loads((bundle / "failure.json").read_text())["result"]
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert main(["repro", str(bundle), "--json"]) == 1
    replayed = json.loads(capsys.readouterr().out)
    same = ("check", "reason", "config", "metrics", "first_divergence", "status")
    assert {name: replayed[name] for name in same} == {name: recorded[name] for name in same}
    assert main(["repro", str(bundle)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["recorded", "failed:"]
    assert lines[1].split()[:2] == ["now", "failed:"]
    assert main(["repro", str(bundle), "--model", "right.py:Port"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[1].split() == ["now", "passed"]
    assert err == ""


def test_a_bundle_of_another_machine_is_replayed_in_a_checkout_and_with_a_described_port(
    bundle: Path, here: Path, capsys: pytest.CaptureFixture[str], plain_port: PlainPort, describe: Describe
) -> None:
    file = bundle / "failure.json"
    document = json.loads(file.read_text())
    document["port"]["root"] = "/gone"
    document["versions"]["torch"] = "1.0"
    file.write_text(json.dumps(document))
    assert main(["repro", str(bundle)]) == 1
    out, err = capsys.readouterr()
    assert "/gone is not here; the files of 'wrong' are looked for in" in err
    assert "recorded 1.0" in out
    describe(plain_port(here, "right"))
    assert main(["repro", str(bundle), "--port", "right"]) == 0
    assert main(["repro", str(bundle), "--port", "wright"]) == 2
    assert "did you mean 'right'" in capsys.readouterr().err


def test_a_bundle_says_how_to_replay_it(bundle: Path) -> None:
    command = json.loads((bundle / "failure.json").read_text())["replay"].split()
    assert command[:2] == ["parity", "repro"]
    assert main(command[1:]) == 1


@pytest.mark.parametrize("option", ["--model", "--config", "--original"])
def test_a_replay_with_a_class_that_is_not_there_is_one_line(
    bundle: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    assert main(["repro", str(bundle), option, "right.py:Gone"]) == 2
    assert "no 'Gone' in right.py" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    "damage",
    [
        lambda document: None,
        lambda document: [],
        lambda document: {},
        lambda document: {**document, "port": {**document["port"], "nam": "x"}},
        lambda document: {**document, "port": {"root": "/"}},
        lambda document: {**document, "case": {"rows": 1}},
        lambda document: {**document, "result": {"check": "forward.blocks"}},
        lambda document: {**document, "result": {**document["result"], "check": "forward.blokcs"}},
    ],
)
def test_a_damaged_bundle_is_one_line(
    bundle: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Any], Any]
) -> None:
    file = bundle / "failure.json"
    file.write_text(json.dumps(damage(json.loads(file.read_text()))))
    assert main(["repro", str(bundle)]) == 2
    assert one_line(capsys.readouterr().err)


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe", b'{"port": '])
def test_what_is_no_bundle_is_one_line(here: Path, capsys: pytest.CaptureFixture[str], content: bytes | None) -> None:
    if content is not None:
        (here / "failure.json").write_bytes(content)
    assert main(["repro", str(here)]) == 2
    assert str(here) in one_line(capsys.readouterr().err)


# parity golden


def test_golden_files_of_an_own_original(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "model.py").write_text("from reference_models.nanogpt.original import GPT, GPTConfig\n")
    fields = {"block_size": 6, "vocab_size": 13, "n_layer": 1, "n_head": 1, "n_embd": 4, "dropout": 0.0, "bias": True}
    record = ["golden", "record", "--family", "nanogpt", "--original", "model.py:GPT", "--config", json.dumps(fields)]
    assert main([*record, "--out", "one.safetensors"]) == 0
    capsys.readouterr()
    assert main(["golden", "verify", ".", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "one.safetensors" in json.dumps(json.loads(out))
    assert err == ""
    (here / "two.safetensors").write_bytes((here / "one.safetensors").read_bytes()[:-8])
    assert main(["golden", "verify", "."]) == 2
    out, err = capsys.readouterr()
    assert "two.safetensors" in out + err
    assert "Traceback" not in out + err
