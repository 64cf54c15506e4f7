# SPDX-License-Identifier: Apache-2.0
"""What the tests of the Hub share."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from harness.hub.store import AddFile, AddLfs, Commit, Operation, Repository, Store

NOON = datetime(2024, 2, 29, 12, tzinfo=UTC)

Put = Callable[..., Commit]


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
