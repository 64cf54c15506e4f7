# SPDX-License-Identifier: Apache-2.0
"""What the tests of the Hub share: an empty store, and the real client in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from harness.hub import HubServer
from harness.hub.records import AddFile, AddLfs, Commit, Operation, Repository
from harness.hub.store import Store

NOON = datetime(2024, 2, 29, 12, tzinfo=UTC)

Put = Callable[..., Commit]

PRELUDE = """
import json, os, pathlib, sys
from huggingface_hub import (
    CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
)

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


@pytest.fixture(scope="session")
def git() -> str:
    """The program; what it says is only asked for where it is installed."""
    found = shutil.which("git")
    if found is None:
        pytest.skip("git is not installed")
    return found


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """An empty store in which it is always noon."""
    opened = Store(tmp_path / "root", clock=lambda: NOON)
    yield opened
    opened.close()


@pytest.fixture
def repository(store: Store) -> Repository:
    return store.create_repository("model", "alice", "m", private=False, author="alice")


@pytest.fixture
def put(store: Store, repository: Repository) -> Put:
    """`put({"a": b"content"}, lfs={"b": b"content"}, then=[DeleteFile("c")])` is a commit."""

    def commit(
        files: dict[str, bytes] | None = None,
        *,
        lfs: dict[str, bytes] | None = None,
        then: list[Operation] | None = None,
        ref: str = "main",
        parent: str | None = None,
        title: str = "change",
        message: str = "",
    ) -> Commit:
        operations: list[Operation] = []
        for path, content in (files or {}).items():
            operations.append(AddFile(path, store.blobs.add([content]).sha256))
        for path, content in (lfs or {}).items():
            stored = store.blobs.add([content])
            store.note_upload(repository, stored.sha256)
            operations.append(AddLfs(path, stored.sha256, stored.size))
        operations += then or []
        return store.commit(repository, ref, operations, title=title, message=message, author="alice", parent=parent)

    return commit


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
