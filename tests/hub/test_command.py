# SPDX-License-Identifier: Apache-2.0
"""`parity hub` in one terminal and the unmodified `hf` in another."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PARITY = [sys.executable, "-m", "harness.cli", "hub"]
HF = str(Path(sys.executable).with_name("hf"))

Served = subprocess.Popen[str]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., tuple[Served, str, dict[str, str]]]]:
    """Starts `parity hub`; gives the process, the address it printed and the variables it printed."""
    running: list[Served] = []

    def start(*options: str, root: Path | None = None) -> tuple[Served, str, dict[str, str]]:
        command = [*PARITY, "--root", str(root or tmp_path / "root"), *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        running.append(process)
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        variables = {}
        while "--print-env" in options and "no_proxy" not in variables:
            name, _, value = process.stdout.readline().strip().removeprefix("export ").partition("=")
            variables[name] = value
        return process, url, variables

    yield start
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.communicate()


def hf(variables: dict[str, str], *arguments: str) -> str:
    """What the `hf` command prints."""
    environment = {**os.environ, **variables, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_COLOR": "1"}
    done = subprocess.run([HF, *arguments], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.hub
def test_hf_creates_uploads_downloads_lists_and_deletes(serve: Callable[..., Any], tmp_path: Path) -> None:
    import huggingface_hub

    _, url, variables = serve("--print-env", "--user", "alice:hf_alice", "--user", "bob:hf_bob:read")
    variables |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": str(tmp_path / "home" / "hub")}
    assert url.startswith("http://127.0.0.1:") and variables["HF_ENDPOINT"] == url
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")
    (tmp_path / "folder" / "model.safetensors").write_bytes(b"0" * 5000)
    is_new = not huggingface_hub.__version__.startswith("0.")
    hf(variables, *(["repos"] if is_new else ["repo"]), "create", "alice/model")
    hf(variables, "upload", "alice/model", str(tmp_path / "folder"))
    hf(variables, "download", "alice/model", "--local-dir", str(tmp_path / "back"))
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == b"0" * 5000
    assert "alice" in hf(variables, "auth", "whoami")
    if is_new:
        assert "alice/model" in hf(variables, "models", "ls", "--author", "alice", "--quiet")
        assert "alice/model" in hf(variables, "repos", "ls", "--quiet")
        hf(variables, "repos", "delete", "alice/model", "--yes")
    else:
        # This line's `hf` lists and deletes no repositories.
        delete = [sys.executable, "-c", "from huggingface_hub import HfApi; HfApi().delete_repo('alice/model')"]
        subprocess.run(delete, env={**os.environ, **variables}, check=True)
    with pytest.raises(urllib.request.HTTPError, match="401"):
        urllib.request.urlopen(f"{url}/api/models/alice/model")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_stops_cleanly_and_what_was_there_is_there_again(
    number: signal.Signals, serve: Callable[..., Any], tmp_path: Path
) -> None:
    process, url, _ = serve()
    body = json.dumps({"name": "model"}).encode()
    request = urllib.request.Request(
        f"{url}/api/repos/create", data=body, headers={"Authorization": "Bearer hf_alice"}, method="POST"
    )
    with urllib.request.urlopen(request) as response:
        assert json.load(response)["name"] == "alice/model"
    process.send_signal(number)
    out, errors = process.communicate(timeout=20)
    assert (process.returncode, out, errors) == (0, "", "")
    _, url, _ = serve("--port", url.rpartition(":")[2])
    with urllib.request.urlopen(f"{url}/api/models/alice/model") as response:
        assert json.load(response)["id"] == "alice/model"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--user", "alice"], "--user alice: expected NAME:TOKEN"),
        (["--user", "alice:t:admin"], "--user alice:t:admin: expected"),
        (["--user", "a/b:t"], "'a/b' cannot be the name"),
        (["--organisation", "team"], "--organisation team: expected"),
        (["--organisation", "team:nobody"], "no user 'nobody'"),
        (["--host", "0.0.0.0"], "0.0.0.0 is not a loopback address"),
        (["--host", "nowhere.invalid"], "not a loopback address"),
        (["--host", "0.0.0.0", "--allow-remote"], "none that a client could be sent to"),
        (["--port", "70000"], "--port 70000: a port is"),
        (["--root", "/dev/null"], "/dev/null cannot be the root of a Hub"),
    ],
)
def test_what_cannot_be_served_is_one_line_and_exit_2(options: list[str], said: str, tmp_path: Path) -> None:
    done = subprocess.run([*PARITY, "--root", str(tmp_path / "root"), *options], capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stderr and len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_a_root_or_port_that_another_has_is_refused(serve: Callable[..., Any], tmp_path: Path) -> None:
    process, url, _ = serve()
    again = subprocess.run([*PARITY, "--root", str(tmp_path / "root")], capture_output=True, text=True)
    assert (again.returncode, f"process {process.pid}" in again.stderr) == (2, True)
    port = url.rpartition(":")[2]
    beside = subprocess.run(
        [*PARITY, "--root", str(tmp_path / "other"), "--port", port], capture_output=True, text=True
    )
    assert beside.returncode == 2 and f"port {port}" in beside.stderr
    assert len(beside.stderr.splitlines()) == 1


def test_fsck_says_what_is_wrong_and_where(serve: Callable[..., Any], tmp_path: Path) -> None:
    root = tmp_path / "root"
    process, url, _ = serve()
    body = json.dumps({"name": "model"}).encode()
    request = urllib.request.Request(
        f"{url}/api/repos/create", data=body, headers={"Authorization": "Bearer hf_alice"}, method="POST"
    )
    urllib.request.urlopen(request).close()
    fsck = [*PARITY, "fsck", str(root)]
    process.terminate()
    process.wait()
    sound = subprocess.run(fsck, capture_output=True, text=True)
    assert (sound.returncode, sound.stdout) == (0, f"{root}: no problems\n")
    (blob,) = [path for path in (root / "blobs").rglob("*") if path.is_file()]
    os.chmod(blob, 0o600)
    blob.write_bytes(b"x" + blob.read_bytes()[1:])
    with contextlib.closing(sqlite3.connect(root / "hub.sqlite")) as database:
        database.execute("UPDATE refs SET oid = ?", ("0" * 40,))
        database.commit()
    broken = subprocess.run(fsck, capture_output=True, text=True)
    assert broken.returncode == 1
    assert blob.name[:12] in broken.stdout and "refs/heads/main" in broken.stdout
    for same in (["--root", str(root), "fsck"], ["fsck", "--root", str(root)]):
        assert subprocess.run([*PARITY, *same], capture_output=True, text=True).stdout == broken.stdout
    nothing = subprocess.run([*PARITY, "fsck"], capture_output=True, text=True)
    assert (nothing.returncode, "fsck needs the root" in nothing.stderr) == (2, True)
    missing = subprocess.run([*PARITY, "fsck", "--root", str(tmp_path / "none")], capture_output=True, text=True)
    assert (missing.returncode, missing.stderr) == (2, f"parity: there is no directory {tmp_path / 'none'}\n")


def test_faults_and_the_journal_are_there_only_when_asked_for(serve: Callable[..., Any], tmp_path: Path) -> None:
    def ask(method: str, target: str, body: Any = None) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(target, data=data, method=method)) as response:
                return response.status, json.load(response)
        except urllib.request.HTTPError as error:
            return error.code, json.load(error)

    _, url, _ = serve(root=tmp_path / "without")
    assert ask("GET", f"{url}/__hub__/faults")[0] == ask("GET", f"{url}/__hub__/journal")[0] == 404
    _, url, _ = serve("--faults")
    fault = {"match": "^GET /api/models", "status": 418, "content": {"error": "tea"}, "times": 1}
    status, answer = ask("POST", f"{url}/__hub__/faults", {"faults": [fault, {"match": "x", "nonsense": 1}]})
    assert status == 400 and "nonsense" in answer["error"]
    assert ask("GET", f"{url}/__hub__/faults") == (200, {"faults": []})
    assert ask("POST", f"{url}/__hub__/faults", {"faults": [fault]})[1]["faults"] == [fault]
    assert ask("PUT", f"{url}/__hub__/faults", {"faults": [fault]})[1]["faults"] == [fault]
    assert [ask("GET", f"{url}/api/models")[0] for _ in range(2)] == [418, 200]
    seen = ask("GET", f"{url}/__hub__/journal")[1]["requests"]
    assert [(entry["target"], entry["status"]) for entry in seen] == [("/api/models", 418), ("/api/models", 200)]
    assert ask("DELETE", f"{url}/__hub__/journal")[0] == ask("DELETE", f"{url}/__hub__/faults")[0] == 200
    assert ask("POST", f"{url}/__hub__/faults", {"faults": [{"match": ".", "reset_before": True}]})[0] == 200
    assert ask("DELETE", f"{url}/__hub__/faults")[0] == 200  # a fault cannot lock one out
