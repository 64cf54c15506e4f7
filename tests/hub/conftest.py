# SPDX-License-Identifier: Apache-2.0
"""The real client for tests of the Hub: an unmodified huggingface_hub in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.hub import HubServer

PRELUDE = """
import json, os, pathlib, sys
from huggingface_hub import *
from huggingface_hub import HfApi, hf_hub_download, snapshot_download

api = HfApi()
given = json.loads(sys.argv[2])
answer = None


def tried(call):
    "What becomes of a call: 'ok', or the name of the exception and the status."
    try:
        call()
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        return type(error).__name__ + (f" {status}" if status else "")
    return "ok"

"""

Client = Callable[..., Any]


@pytest.fixture
def client(tmp_path: Path) -> Client:
    """Runs lines of Python with the client imported, `api` an HfApi and `given` the keywords; returns its `answer`.

    token and home are those of `HubServer.env`; without a home each run has an empty cache.
    """

    def run(
        hub: HubServer, script: str, *, token: str | None = "hf_alice", home: Path | None = None, **given: Any
    ) -> Any:
        directory = Path(tempfile.mkdtemp(dir=tmp_path))
        source = PRELUDE + textwrap.dedent(script) + "\npathlib.Path(sys.argv[1]).write_text(json.dumps(answer))\n"
        command = [sys.executable, "-c", source, str(directory / "answer.json"), json.dumps(given)]
        environment = {**os.environ, **hub.env(token=token, home=home or directory / "home")}
        environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=directory)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads((directory / "answer.json").read_text())

    return run
