# SPDX-License-Identifier: Apache-2.0
"""What README and docs/hub.md show about the Hub is done as it stands there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from harness.hub import HubServer
from harness.hub.environment import OLD_CACHES
from tests.docs.blocks import ROOT, texts

GUIDE = ROOT / "docs/hub.md"
PROGRAMS = str(Path(sys.executable).parent)

pytestmark = pytest.mark.hub


def typed(block: str) -> list[str]:
    """The lines of a terminal that somebody types."""
    return [line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ ")]


@pytest.mark.skipif(metadata.version("huggingface_hub").startswith("0."), reason="its `hf` has other commands")
@pytest.mark.parametrize(("document", "heading"), [("README.md", "A Hub on loopback"), ("docs/hub.md", "From a shell")])
def test_two_terminals(document: str, heading: str, tmp_path: Path) -> None:
    one, two = (typed(block) for block in texts(ROOT / document, "console", section=heading)[:2])
    (tmp_path / "my-model").mkdir()
    (tmp_path / "my-model" / "config.json").write_text("{}")
    environment = {**os.environ, "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}"}
    (served,) = [line.replace(".venv/bin/", "").replace("--port 8023", "--port 0") for line in one]
    hub = subprocess.Popen(
        f"exec {served}", shell=True, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert hub.stdout is not None
        url = hub.stdout.readline().strip()
        script = "\n".join(["set -e", *two]).replace(".venv/bin/", "")
        script = script.replace("http://127.0.0.1:8023", url).replace("/tmp/hf-home", str(tmp_path / "home"))
        done = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "model" in done.stdout
    finally:
        hub.terminate()
        hub.communicate()


def test_a_test_with_the_fixture(tmp_path: Path) -> None:
    (block,) = texts(GUIDE, "python", section="In a test")
    (tmp_path / "test_it.py").write_text(block)
    (tmp_path / "publish.py").write_text(
        "import sys\nfrom huggingface_hub import HfApi\nHfApi().create_repo(sys.argv[1])\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "test_it.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_a_fault_from_python_and_from_a_shell(tmp_path: Path) -> None:
    (python,) = texts(GUIDE, "python", section="Faults")
    (shell,) = texts(GUIDE, "console", section="Faults")
    with HubServer(tmp_path / "hub", faults_over_http=True) as hub:
        exec(python, {"hub": hub})
        assert [fault["close_after"] for fault in hub.faults.as_json()] == [1000]
        add, look, clear = (line.replace("http://127.0.0.1:8023", hub.url) for line in typed(shell))
        said = [
            json.loads(subprocess.run(["bash", "-c", line], capture_output=True, check=True).stdout)
            for line in (add, look)
        ]
        assert (len(said[0]["faults"]), said[1]) == (2, {"requests": []})
        subprocess.run(["bash", "-c", clear], capture_output=True, check=True)
        assert hub.faults.as_json() == []


def test_a_verified_snapshot(tmp_path: Path) -> None:
    (block,) = texts(GUIDE, "python", section="Downloads that can be trusted")
    with HubServer(tmp_path / "hub") as hub:
        repository = hub.store.create_repository("model", "alice", "model", private=False, author="alice")
        hub.store.create_tag(repository, "v1", at="main")
        done = subprocess.run(
            [sys.executable, "-c", f"{block}\nprint(sorted(p.name for p in folder.iterdir()))"],
            env={**os.environ, **hub.env()},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.stdout == "['.gitattributes']\n", done.stderr


def test_every_variable_of_a_client_is_explained(tmp_path: Path) -> None:
    text = GUIDE.read_text(encoding="utf-8")
    explained = set(
        re.findall(r"`([A-Z_]+)[=`]", text.partition("## What the variables are for")[2].partition("\n## ")[0])
    )
    with HubServer(tmp_path / "hub") as hub:
        assert {name.upper() for name in hub.env()} - set(OLD_CACHES) == explained
