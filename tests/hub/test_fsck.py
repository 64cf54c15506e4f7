# SPDX-License-Identifier: Apache-2.0
"""fsck finds every planted damage, says where it is, changes nothing and is silent about a root that is whole."""

from __future__ import annotations

import dataclasses
import hashlib
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.errors import DescriptionError
from harness.hub.database import FILE
from harness.hub.fsck import Problem, fsck
from harness.hub.objects import Child, object_oid, read_tree, tree_content
from harness.hub.records import AddFile, DeleteFile, Repository
from harness.hub.store import Store

PLAIN, WEIGHTS = b"plain text", b"weights of a model"
ABSENT = "0" * 40


def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclasses.dataclass(frozen=True)
class Damaged:
    """A root with a closed store, and the ids of what can be damaged in it."""

    root: Path
    plain: Path
    weights: Path
    plain_oid: str
    weights_oid: str
    folder: str
    first: str
    head: str

    def run(self, sql: str, *parameters: Any) -> None:
        """Changes rows behind the store's back."""
        connection = sqlite3.connect(self.root / FILE)
        with connection:
            assert connection.execute(sql, parameters).rowcount, "nothing was damaged"
        connection.close()

    def value(self, sql: str, *parameters: Any) -> Any:
        connection = sqlite3.connect(self.root / FILE)
        try:
            return connection.execute(sql, parameters).fetchone()[0]
        finally:
            connection.close()


@pytest.fixture
def whole(store: Store, repository: Repository, put: Callable[..., Any]) -> Damaged:
    """A repository with plain and LFS files, two branches, a tag and a pull request."""
    first = put({"d/a.txt": PLAIN}, lfs={"d/w.bin": WEIGHTS}).oid
    head = put({"b": b"1"}, then=[DeleteFile(".gitattributes")]).oid
    store.create_branch(repository, "feat/x", at=first, author="alice")
    store.create_tag(repository, "v1", at=first)
    store.propose(repository, "main", [], title="t", message="", author="bob")
    entries = {entry.path: entry for entry in store.entries(repository, head, recursive=True)}
    store.close()
    return Damaged(
        root=store.root,
        plain=store.blobs.path(sha256_of(PLAIN)),
        weights=store.blobs.path(sha256_of(WEIGHTS)),
        plain_oid=entries["d/a.txt"].oid,
        weights_oid=entries["d/w.bin"].oid,
        folder=entries["d"].oid,
        first=first,
        head=head,
    )


def contents(root: Path) -> dict[Path, bytes]:
    """Every byte below a root that is not sqlite's or the lock's bookkeeping, and of the metadata every row."""
    found = {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file() and path.parent != root}
    connection = sqlite3.connect(root / FILE)
    found[root / FILE] = "\n".join(connection.iterdump()).encode()
    connection.close()
    return found


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)


def edit_tree(damaged: Damaged, name: str, child: Child | None) -> None:
    content = damaged.value("SELECT content FROM trees WHERE oid = ?", damaged.folder)
    children = read_tree(content)
    if child is None:
        del children[name]
    else:
        children[name] = child
    damaged.run("UPDATE trees SET content = ? WHERE oid = ?", tree_content(children), damaged.folder)


def rename_tree(damaged: Damaged, content: bytes) -> None:
    """A tree whose id is right and whose content is not: only what it names can tell."""
    oid = object_oid("tree", content)
    damaged.run("INSERT INTO trees VALUES (?, ?)", oid, content)


def wreck(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * (path.stat().st_size - 4096))


DAMAGES: dict[str, tuple[Callable[[Damaged], object], str, Callable[[Damaged], str]]] = {
    "a flipped byte": (lambda d: flip(d.plain), "content", lambda d: str(d.plain)),
    "a flipped byte of an LFS file": (lambda d: flip(d.weights), "content", lambda d: str(d.weights)),
    "a truncated content": (lambda d: d.plain.write_bytes(PLAIN[:-1]), "size", lambda d: d.plain_oid),
    "a truncated LFS content": (lambda d: d.weights.write_bytes(b""), "size", lambda d: d.weights_oid),
    "a content that grew": (lambda d: d.weights.write_bytes(WEIGHTS + b"x"), "size", lambda d: d.weights_oid),
    "a missing content": (lambda d: d.plain.unlink(), "content", lambda d: d.plain_oid),
    "a missing LFS content": (lambda d: d.weights.unlink(), "content", lambda d: d.weights_oid),
    "a content that is a folder": (
        lambda d: (d.plain.unlink(), d.plain.mkdir()),
        "content",
        lambda d: d.plain_oid,
    ),
    "a tree with a changed entry": (
        lambda d: edit_tree(d, "a.txt", Child(d.weights_oid, False)),
        "tree",
        lambda d: d.folder,
    ),
    "a tree with an entry less": (lambda d: edit_tree(d, "a.txt", None), "tree", lambda d: d.folder),
    "a tree that names a missing file": (
        lambda d: rename_tree(d, tree_content({"x": Child(ABSENT, False)})),
        "file in a tree",
        lambda d: "'x'",
    ),
    "a tree that names a missing folder": (
        lambda d: rename_tree(d, tree_content({"x": Child(ABSENT, True)})),
        "folder in a tree",
        lambda d: "'x'",
    ),
    "a tree that is none": (lambda d: rename_tree(d, b"nonsense"), "tree", lambda d: object_oid("tree", b"nonsense")),
    "a tree that is text": (
        lambda d: d.run("UPDATE trees SET content = 'text' WHERE oid = ?", d.folder),
        "tree",
        lambda d: d.folder,
    ),
    "a missing tree": (
        lambda d: d.run("DELETE FROM trees WHERE oid = ?", d.folder),
        "folder in a tree",
        lambda d: "'d'",
    ),
    "a missing tree of a commit": (
        lambda d: d.run("DELETE FROM trees WHERE oid = (SELECT tree FROM commits WHERE oid = ?)", d.head),
        "tree of a commit",
        lambda d: d.head,
    ),
    "a commit with another text": (
        lambda d: d.run("UPDATE commits SET text = 'other' WHERE oid = ?", d.head),
        "commit",
        lambda d: d.head,
    ),
    "a commit with another date": (
        lambda d: d.run("UPDATE commits SET seconds = seconds + 1 WHERE oid = ?", d.head),
        "commit",
        lambda d: d.head,
    ),
    "a commit with an author that cannot be": (
        lambda d: d.run("UPDATE commits SET author = x'00ff' WHERE oid = ?", d.head),
        "commit",
        lambda d: d.head,
    ),
    "a commit with another tree": (
        lambda d: d.run("UPDATE commits SET tree = ? WHERE oid = ?", d.folder, d.head),
        "commit",
        lambda d: d.head,
    ),
    "a commit without its parent": (
        lambda d: d.run("UPDATE commits SET parent = NULL WHERE oid = ?", d.head),
        "commit",
        lambda d: d.head,
    ),
    "a missing parent": (
        lambda d: d.run("DELETE FROM commits WHERE oid = ?", d.first),
        "parent of a commit",
        lambda d: d.head,
    ),
    "a commit that is no longer the repository's": (
        lambda d: d.run("DELETE FROM histories WHERE oid = ?", d.first),
        "commit before",
        lambda d: d.head,
    ),
    "a ref to nothing": (
        lambda d: d.run("UPDATE refs SET oid = ? WHERE full = 'refs/tags/v1'", ABSENT),
        "ref",
        lambda d: "refs/tags/v1 of model alice/m",
    ),
    "a ref to a tree": (
        lambda d: d.run("UPDATE refs SET oid = ? WHERE full = 'refs/heads/feat/x'", d.folder),
        "ref",
        lambda d: "refs/heads/feat/x",
    ),
    "a ref with a name that cannot be": (
        lambda d: d.run("UPDATE refs SET full = 'refs/heads/a..b' WHERE full = 'refs/heads/feat/x'"),
        "ref",
        lambda d: "refs/heads/a..b",
    ),
    "a ref of another kind": (
        lambda d: d.run("UPDATE refs SET full = 'refs/notes/x' WHERE full = 'refs/heads/feat/x'"),
        "ref",
        lambda d: "refs/notes/x",
    ),
    "a missing main": (
        lambda d: d.run("DELETE FROM refs WHERE full = 'refs/heads/main'"),
        "repository",
        lambda d: "model alice/m",
    ),
    "a ref of no repository": (
        lambda d: d.run("INSERT INTO refs VALUES (99, 'refs/heads/main', ?, '', '', 0)", d.head),
        "row",
        lambda d: "refs",
    ),
    "a file with another size": (
        lambda d: d.run("UPDATE files SET size = 3 WHERE oid = ?", d.plain_oid),
        "size",
        lambda d: d.plain_oid,
    ),
    "an LFS file with another size": (
        lambda d: d.run("UPDATE files SET size = 3 WHERE oid = ?", d.weights_oid),
        "LFS file",
        lambda d: d.weights_oid,
    ),
    "an LFS file with another content": (
        lambda d: d.run("UPDATE files SET sha256 = ? WHERE oid = ?", sha256_of(PLAIN), d.weights_oid),
        "LFS file",
        lambda d: d.weights_oid,
    ),
    "a file with another content": (
        lambda d: d.run("UPDATE files SET sha256 = ? WHERE oid = ?", sha256_of(WEIGHTS), d.plain_oid),
        "id in git",
        lambda d: str(d.weights),
    ),
    "a plain file that became an LFS file": (
        lambda d: d.run("UPDATE files SET lfs = 1 WHERE oid = ?", d.plain_oid),
        "LFS file",
        lambda d: d.plain_oid,
    ),
    "a missing file": (
        lambda d: d.run("DELETE FROM files WHERE oid = ?", d.plain_oid),
        "file in a tree",
        lambda d: "'a.txt'",
    ),
    "a right to a content that is not here": (
        lambda d: d.run("INSERT INTO contents VALUES (1, ?)", "0" * 64),
        "content",
        lambda d: "an upload",
    ),
    "a database full of something else": (lambda d: wreck(d.root / FILE), "database", lambda d: ""),
}


def test_a_whole_root_has_no_problem_and_stays_as_it_is(whole: Damaged) -> None:
    before = contents(whole.root)
    notes: list[str] = []
    assert fsck(whole.root, note=notes.append) == [] and notes == []
    assert contents(whole.root) == before
    Store(whole.root).close()  # It was given back.


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_is_found(whole: Damaged, damage: str) -> None:
    plant, what, where = DAMAGES[damage]
    plant(whole)
    problems = fsck(whole.root)
    assert [problem for problem in problems if problem.what == what and where(whole) in problem.where], problems
    for problem in problems:
        assert problem.expected != problem.found and str(problem).count("\n") == 0


def test_a_problem_says_what_it_expected(whole: Damaged) -> None:
    flip(whole.plain)
    assert fsck(whole.root) == [
        Problem(
            what="content",
            where=str(whole.plain),
            expected=sha256_of(PLAIN),
            found=sha256_of(whole.plain.read_bytes()),
        ),
        Problem(
            what="id in git",
            where=str(whole.plain),
            expected=whole.plain_oid,
            found=object_oid("blob", whole.plain.read_bytes()),
        ),
    ]


def test_a_store_that_is_open_can_be_verified(store: Store, repository: Repository, put: Callable[..., Any]) -> None:
    put({"a": PLAIN})
    assert fsck(store) == []
    flip(store.blobs.path(sha256_of(PLAIN)))
    assert [problem.what for problem in fsck(store)] == ["content", "id in git"]
    put({"a": PLAIN})  # Mends it.
    assert fsck(store) == []


def test_a_store_can_be_verified_while_commits_land(
    store: Store, repository: Repository, put: Callable[..., Any]
) -> None:
    started, found = threading.Event(), []

    def work() -> None:
        for number in range(60):
            put({f"d{number % 5}/{number}": b"%d" % number}, lfs={"w": b"%d" % number})
            started.set()

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    while thread.is_alive():
        found += fsck(store)
    thread.join()
    assert found == [] == fsck(store)


def test_what_nobody_has_is_noted(store: Store, repository: Repository, put: Callable[..., Any]) -> None:
    other = store.create_repository("model", "alice", "gone", private=False, author="alice")
    content = store.blobs.add([b"only there"]).sha256
    store.commit(other, "main", [AddFile("d/x", content)], title="t", message="", author="alice")
    store.delete_repository(other)
    unused = store.blobs.add([b"never committed"]).sha256
    store.note_upload(repository, store.blobs.add([b"uploaded"]).sha256)
    (store.blobs.unfinished / "1-1").write_bytes(b"half")
    (store.blobs.directory / "stray.txt").write_bytes(b"?")
    (store.blobs.directory / "ab").mkdir(exist_ok=True)
    (store.blobs.directory / "ab" / unused).write_bytes(b"at the wrong place")
    notes: list[str] = []
    assert fsck(store, note=notes.append) == []
    counts = {line.split(" belong")[0] for line in notes if " belong" in line}
    assert counts == {"1 commits", "2 trees", "1 files", "2 contents"}
    assert any("unfinished" in line for line in notes)
    assert any("stray.txt" in line for line in notes) and any(f"ab/{unused}" in line for line in notes)


def test_what_is_no_root_is_refused(tmp_path: Path, store: Store) -> None:
    with pytest.raises(DescriptionError, match="holds no Hub: there is no"):
        fsck(tmp_path)
    with pytest.raises(DescriptionError, match="in use by another Hub"):
        fsck(store.root)
    (tmp_path / FILE).write_bytes(b"no database" * 1000)
    with pytest.raises(DescriptionError, match="cannot be read"):
        fsck(tmp_path)
    assert list(tmp_path.glob("*.sqlite")) == [tmp_path / FILE]
