# SPDX-License-Identifier: Apache-2.0
"""The store of the Hub without HTTP: opening, commits at once, a folder of 10 000 files, and 500 MB beside a copy."""

from __future__ import annotations

import itertools
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.hub.fsck import fsck
from harness.hub.records import AddFile, Repository
from harness.hub.store import Store

pytestmark = pytest.mark.benchmark(group="Hub store")

FILES = 10_000
LARGE = 500_000_000
PIECE = bytes(range(256)) * 4096


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[tuple[Store, Repository]]:
    store = Store(tmp_path / "root")
    yield store, store.create_repository("model", "alice", "m", private=False, author="alice")
    store.close()


def add(store: Store, repository: Repository, path: str) -> None:
    """A commit of one small file."""
    content = store.blobs.add([path.encode()]).sha256
    store.commit(repository, "main", [AddFile(path, content)], title=path, message="", author="alice")


@pytest.fixture
def folder(opened: tuple[Store, Repository]) -> tuple[Store, Repository]:
    """A repository with all files in one folder."""
    store, repository = opened
    content = store.blobs.add([b"1"]).sha256
    files = [AddFile(f"data/{number:05d}.txt", content) for number in range(FILES)]
    store.commit(repository, "main", files, title="many", message="", author="alice")
    return store, repository


def test_open(benchmark: Any, tmp_path: Path) -> None:
    numbers = itertools.count()
    left: list[Store] = []
    benchmark.extra_info["what"] = "opening a new root"
    benchmark.pedantic(lambda: left.append(Store(tmp_path / f"{next(numbers)}")), rounds=20, warmup_rounds=1)
    for store in left:
        store.close()


def test_commits_at_once(benchmark: Any, opened: tuple[Store, Repository]) -> None:
    numbers = itertools.count()

    def run() -> None:
        turn = next(numbers)
        work = [
            threading.Thread(
                target=lambda worker: [add(*opened, f"{turn}/{worker}/{each}") for each in range(4)], args=(worker,)
            )
            for worker in range(16)
        ]
        for thread in work:
            thread.start()
        for thread in work:
            thread.join()

    benchmark.extra_info["what"] = "64 commits by 16 threads on one branch"
    benchmark.pedantic(run, rounds=10, warmup_rounds=1)


def test_commit_beside_many(benchmark: Any, folder: tuple[Store, Repository]) -> None:
    numbers = itertools.count()
    benchmark.extra_info["what"] = f"a commit of one file into a folder of {FILES}"
    benchmark.pedantic(lambda: add(*folder, f"data/new{next(numbers)}"), rounds=20, warmup_rounds=1)


def test_commit_of_many(benchmark: Any, opened: tuple[Store, Repository]) -> None:
    store, repository = opened
    content = store.blobs.add([b"1"]).sha256
    files = [AddFile(f"{number % 100}/{number}", content) for number in range(FILES)]

    def run() -> None:
        store.commit(repository, "main", files, title="many", message="", author="alice")

    benchmark.extra_info["what"] = f"a commit of {FILES} files"
    benchmark.pedantic(run, rounds=3)


def test_pages(benchmark: Any, folder: tuple[Store, Repository]) -> None:
    store, repository = folder
    head = store.resolve(repository, "main")

    def run() -> int:
        found, after = 0, None
        while page := store.entries(repository, head, recursive=True, after=after, count=1000):
            found, after = found + len(page), page[-1].path
        return found

    benchmark.extra_info["what"] = f"{FILES} entries of a tree by pages of 1000"
    assert benchmark.pedantic(run, rounds=10, warmup_rounds=1) == FILES + 2


def test_lookup(benchmark: Any, folder: tuple[Store, Repository]) -> None:
    """What a HEAD of a file asks."""
    store, _ = folder

    def run() -> None:
        repository = store.find_repository("model", "alice/m")
        assert repository is not None
        assert store.entry(repository, store.resolve(repository, "main"), "data/05000.txt")

    benchmark.extra_info["what"] = f"one file of {FILES} by repository, branch and path"
    benchmark.pedantic(run, rounds=20, iterations=100, warmup_rounds=1)


@pytest.mark.parametrize("way", ["add", "fsck"])
def test_large(against: Callable[..., None], benchmark: Any, opened: tuple[Store, Repository], way: str) -> None:
    """A file of zeros would be cheaper to copy for some file systems."""
    store, repository = opened
    given, copy = store.root.parent / "given", store.root.parent / "copy"
    with given.open("wb") as file:
        for _ in range(LARGE // len(PIECE)):
            file.write(PIECE)

    def pieces() -> Iterator[memoryview]:
        buffer = memoryview(bytearray(1 << 20))
        with given.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                yield buffer[:count]

    if way == "add":
        benchmark.extra_info.update(what="500 MB into the store", baseline="a copy")
        against(lambda: store.blobs.add(pieces()), lambda: shutil.copyfile(given, copy), rounds=3)
        return
    stored = store.blobs.add(pieces())
    store.note_upload(repository, stored.sha256)
    benchmark.extra_info.update(what="fsck of 500 MB", baseline="a copy")
    against(lambda: fsck(store), lambda: shutil.copyfile(given, copy), rounds=3)
