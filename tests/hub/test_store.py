# SPDX-License-Identifier: Apache-2.0
"""The store of the Hub: what repositories, refs, commits and contents do, what is refused, and that git agrees."""

from __future__ import annotations

import errno
import hashlib
import os
import sqlite3
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from harness.errors import DescriptionError
from harness.hub import objects
from harness.hub.attributes import ATTRIBUTES
from harness.hub.blobs import Blobs
from harness.hub.database import FILE, LOCK, SCHEMA_VERSION, Database
from harness.hub.records import AddFile, AddLfs, DeleteFile, DeleteFolder, Entry, Operation, Repository
from harness.hub.refusals import Refusal
from harness.hub.store import Store

Put = Callable[..., Any]
NOON = datetime(2024, 2, 29, 12, tzinfo=UTC)
ABSENT = "0" * 64


def paths(store: Store, repository: Repository, revision: str = "main", **how: Any) -> list[str]:
    commit = store.resolve(repository, revision)
    return [entry.path for entry in store.entries(repository, commit, **{"recursive": True, **how})]


def read(store: Store, repository: Repository, path: str, revision: str = "main") -> bytes:
    entry = store.entry(repository, store.resolve(repository, revision), path)
    assert entry is not None and entry.sha256 is not None
    return store.blobs.path(entry.sha256).read_bytes()


def refused(kind: str, run: Callable[[], object]) -> str:
    with pytest.raises(Refusal) as found:
        run()
    assert found.value.kind == kind, found.value.message
    found.value.message.encode()  # It can be sent.
    return found.value.message


# Contents


def test_a_content_is_kept_under_its_hash(store: Store) -> None:
    stored = store.blobs.add([b"a", memoryview(b"bc"), b""])
    assert stored.sha256 == hashlib.sha256(b"abc").hexdigest() and stored.size == 3
    assert store.blobs.path(stored.sha256).read_bytes() == b"abc"
    assert stored.sha256 in store.blobs and ABSENT not in store.blobs and "../x" not in store.blobs
    assert store.blobs.oid(stored.sha256) == "f2ba8f84ab5c1bce84a7b441cb1959cfc7093b7f"  # git hash-object


@pytest.mark.parametrize("length", [1, 1 << 18, (1 << 20) + 1])
def test_pieces_may_come_in_the_same_memory(store: Store, length: int) -> None:
    memory = bytearray(length)

    def pieces() -> Iterator[memoryview]:
        for number in range(20):
            memory[:] = bytes([number]) * length
            yield memoryview(memory)[: length - number % 2]

    whole = b"".join(map(bytes, pieces()))
    stored = store.blobs.add(pieces(), size=len(whole))
    assert stored.sha256 == hashlib.sha256(whole).hexdigest()
    assert store.blobs.path(stored.sha256).read_bytes() == whole


def test_a_content_that_cannot_be_read_back_is_not_kept(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> int:
        raise OSError("the disk is broken")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(OSError, match="the disk is broken"):
        store.blobs.add([b"x" * (1 << 20)] * 9)
    assert not list(store.blobs.unfinished.iterdir()) and not list(store.blobs.directory.iterdir())


@pytest.mark.parametrize(
    ("announced", "words"),
    [
        ({"sha256": ABSENT}, f"announced was '{ABSENT}'"),
        ({"sha256": "x"}, "announced was 'x'"),
        ({"size": 2}, "longer than the 2 bytes"),
        ({"size": 4}, "has 3 bytes; announced were 4"),
    ],
)
def test_a_content_that_is_not_what_was_announced_is_not_kept(
    store: Store, announced: dict[str, Any], words: str
) -> None:
    assert words in refused("bad_request", lambda: store.blobs.add([b"abc"], **announced))
    assert hashlib.sha256(b"abc").hexdigest() not in store.blobs
    assert not list(store.blobs.unfinished.iterdir())


def test_no_more_is_read_than_was_announced(store: Store) -> None:
    given = []

    def endless() -> Iterator[bytes]:
        while True:
            given.append(b"x" * 10)
            yield given[-1]

    refused("bad_request", lambda: store.blobs.add(endless(), size=25))
    assert len(given) == 3


def test_a_sender_that_breaks_off_leaves_nothing(store: Store) -> None:
    def broken() -> Iterator[bytes]:
        yield b"half"
        raise ConnectionResetError("gone")

    with pytest.raises(ConnectionResetError):
        store.blobs.add(broken())
    assert not list(store.blobs.unfinished.iterdir()) and not list(store.blobs.directory.iterdir())


def test_what_is_added_again_mends_what_is_there(store: Store) -> None:
    stored = store.blobs.add([b"abc"])
    store.blobs.path(stored.sha256).write_bytes(b"abX")
    store.blobs.add([b"abc"])
    assert store.blobs.path(stored.sha256).read_bytes() == b"abc"


@pytest.mark.parametrize("sha256", ["", "x", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 64 + "\n", "/" * 64])
def test_a_path_of_a_content_cannot_leave_its_folder(store: Store, sha256: str) -> None:
    assert repr(sha256) in refused("bad_request", lambda: store.blobs.path(sha256))
    assert sha256 not in store.blobs


# Repositories


def test_a_new_repository_has_one_commit(store: Store, repository: Repository) -> None:
    assert repository == store.find_repository("model", "alice/m")
    assert (repository.id, repository.private, repository.gated, repository.disabled) == (
        "alice/m",
        False,
        False,
        False,
    )
    assert repository.created == "2024-02-29T12:00:00.000Z"
    head = store.resolve(repository, "main")
    assert [commit.oid for commit in store.commits(repository, head)] == [head]
    commit = store.commit_of(repository, head)
    assert (commit.parent, commit.title, commit.author) == (None, "initial commit", "alice")
    assert commit.date == "2024-02-29T12:00:00.000Z"
    assert paths(store, repository) == [".gitattributes"]
    assert read(store, repository, ".gitattributes") == ATTRIBUTES
    assert b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n" in ATTRIBUTES
    assert [(ref.name, ref.full, ref.oid) for ref in store.refs(repository)] == [("main", "refs/heads/main", head)]


def test_revisions_can_be_pinned_where_the_clock_is(repository: Repository, put: Put) -> None:
    assert put({"a.txt": b"1"}).oid == "847da7f59efb7baa6b3920a5d250e6cb746cd21d"


def test_types_have_their_own_names(store: Store, repository: Repository) -> None:
    for type in ("dataset", "space"):
        other = store.create_repository(type, "alice", "m", private=True, author="alice")
        assert other.private and other.key != repository.key
    refused("bad_request", lambda: store.create_repository("kernel", "alice", "m", private=False, author="alice"))


def test_a_repository_without_an_owner(store: Store) -> None:
    made = store.create_repository("model", "", "gpt2", private=False, author="alice")
    assert made.id == "gpt2" and store.find_repository("model", "gpt2") == made
    assert store.find_repository("model", "/gpt2") is None


def test_names_that_cannot_be_are_refused(store: Store, repository: Repository) -> None:
    for owner, name in (("alice", "a b"), ("alice", "../x"), ("", "a/b/c"), ("alice/x", "y"), ("datasets", "x")):
        refused("bad_request", lambda: store.create_repository("model", owner, name, private=False, author="alice"))  # noqa: B023
        refused("bad_request", lambda: store.move_repository(repository, owner=owner, name=name))  # noqa: B023
    for author in ("", " ", "a\nb", "a<b", "\ud800"):
        refused("bad_request", lambda: store.create_repository("model", "alice", "x", private=False, author=author))  # noqa: B023
    assert [found.id for found in store.repositories("model")] == ["alice/m"]


@pytest.mark.parametrize("id", ["", "/", "a/b/c", "alice/\ud800", "alice/m/", "ALICE/m", "alice/m\0"])
def test_what_no_repository_is_called_is_not_found(store: Store, repository: Repository, id: str) -> None:
    assert store.find_repository("model", id) is None
    assert store.moved_to("model", id) is None


def test_a_name_is_given_once(store: Store, repository: Repository) -> None:
    assert "alice/m" in refused(
        "exists", lambda: store.create_repository("model", "alice", "m", private=False, author="bob")
    )


def test_repositories_newest_first(store: Store) -> None:
    for owner, name in (("alice", "b"), ("bob", "a"), ("alice", "Model_x")):
        store.create_repository("model", owner, name, private=False, author=owner)
    store.create_repository("dataset", "alice", "d", private=False, author="alice")

    def ids(**which: str) -> list[str]:
        return [repository.id for repository in store.repositories("model", **which)]

    assert ids() == ["alice/Model_x", "bob/a", "alice/b"]
    assert ids(owner="alice") == ["alice/Model_x", "alice/b"]
    assert ids(search="mOdEl") == ["alice/Model_x"] and ids(search="ALICE/b") == ["alice/b"]
    assert ids(search="_") == ["alice/Model_x"] and ids(search="%") == []
    assert ids(owner="\ud800") == [] and ids(owner="", search="\ud800") == []


def test_settings(store: Store, repository: Repository) -> None:
    store.set_repository(repository, private=True, gated="auto")
    changed = store.set_repository(repository, disabled=True)
    assert (changed.private, changed.gated, changed.disabled) == (True, "auto", True)
    assert store.find_repository("model", "alice/m") == changed
    changed = store.set_repository(repository, gated=False, private=False, disabled=False)
    assert changed == repository


def test_a_repository_that_moves_leaves_its_name_behind(store: Store, repository: Repository, put: Put) -> None:
    head = put({"a": b"1"}).oid
    moved = store.move_repository(repository, owner="org", name="n")
    assert moved.id == "org/n" and moved.key == repository.key
    assert store.find_repository("model", "alice/m") is None
    assert store.moved_to("model", "alice/m") == "org/n" and store.moved_to("dataset", "alice/m") is None
    assert store.resolve(moved, "main") == head and read(store, moved, "a") == b"1"
    again = store.move_repository(moved, owner="org", name="o")
    assert store.moved_to("model", "alice/m") == store.moved_to("model", "org/n") == "org/o"
    back = store.move_repository(again, owner="alice", name="m")
    assert back == repository and store.moved_to("model", "alice/m") is None
    assert store.moved_to("model", "org/n") == "alice/m"


def test_a_name_that_was_left_can_be_given_again(store: Store, repository: Repository) -> None:
    store.move_repository(repository, owner="org", name="n")
    store.create_repository("model", "alice", "m", private=False, author="alice")
    assert store.moved_to("model", "alice/m") is None
    other = store.create_repository("model", "alice", "x", private=False, author="alice")
    store.move_repository(other, owner="alice", name="y")
    store.move_repository(repository, owner="alice", name="x")
    assert store.moved_to("model", "alice/x") is None and store.moved_to("model", "org/n") == "alice/x"


def test_moving_onto_another_is_refused(store: Store, repository: Repository) -> None:
    store.create_repository("model", "bob", "m", private=False, author="bob")
    refused("exists", lambda: store.move_repository(repository, owner="bob", name="m"))
    refused("exists", lambda: store.move_repository(repository, owner="alice", name="m"))


def test_a_deleted_repository_is_gone_with_all_it_had(store: Store, repository: Repository, put: Put) -> None:
    commit = put(lfs={"w.bin": b"weights"})
    sha256 = hashlib.sha256(b"weights").hexdigest()
    moved = store.move_repository(repository, owner="alice", name="old")
    store.delete_repository(moved)
    assert store.find_repository("model", "alice/old") is None and store.moved_to("model", "alice/m") is None
    new = store.create_repository("model", "alice", "old", private=False, author="alice")
    assert not store.has_content(new, sha256) and sha256 in store.blobs
    refused("no_revision", lambda: store.resolve(new, commit.oid))
    refused("no_revision", lambda: store.entries(new, commit.oid, recursive=True))
    for use in (
        lambda: store.commit(repository, "main", [], title="t", message="", author="alice"),
        lambda: store.create_branch(repository, "b", at=None, author="alice"),
        lambda: store.delete_branch(repository, "b"),
        lambda: store.create_pull_request(repository, base="main", title="t", author="alice"),
        lambda: store.set_repository(repository, private=True),
        lambda: store.move_repository(repository, owner="alice", name="z"),
        lambda: store.note_upload(repository, sha256),
        lambda: store.delete_repository(repository),
    ):
        refused("no_repository", use)
    refused("no_revision", lambda: store.resolve(repository, "main"))
    assert store.refs(repository) == []


# Revisions


def test_what_a_revision_names(store: Store, repository: Repository, put: Put) -> None:
    first = store.resolve(repository, "main")
    second = put({"a": b"1"}).oid
    third = put({"a": b"2"}).oid
    store.create_branch(repository, "x", at=first, author="alice")
    store.create_tag(repository, "x", at=second)
    store.create_tag(repository, "v1", at=second)
    store.create_branch(repository, third[:8], at=first, author="alice")
    number = store.create_pull_request(repository, base="v1", title="t", author="bob")
    asked = {
        "main": third,
        "x": first,
        "refs/tags/x": second,
        "refs/heads/x": first,
        "v1": second,
        f"refs/pr/{number}": second,
        second: second,
        second.upper(): second,
        second[:7]: second,
        third[:8]: first,
        third[:9]: third,
    }
    assert {revision: store.resolve(repository, revision) for revision in asked} == asked


@pytest.mark.parametrize("revision", ["", "nope", "refs/heads/nope", "heads/main", "\ud800", "main\0", "0" * 40, "%"])
def test_revisions_that_are_not(store: Store, repository: Repository, revision: str) -> None:
    assert repr(revision) in refused("no_revision", lambda: store.resolve(repository, revision))


def test_six_digits_are_too_few(store: Store, repository: Repository) -> None:
    refused("no_revision", lambda: store.resolve(repository, store.resolve(repository, "main")[:6]))


def test_a_beginning_that_two_commits_have(store: Store, repository: Repository) -> None:
    with store.database.transaction() as connection:
        for digit in "01":
            oid = "abcdef0" + digit * 33
            connection.execute("INSERT INTO commits VALUES (?, '', NULL, 'a', 0, '')", (oid,))
            connection.execute("INSERT INTO histories VALUES (?, ?)", (repository.key, oid))
    assert "several" in refused("no_revision", lambda: store.resolve(repository, "abcdef0"))
    assert store.resolve(repository, "abcdef01") == "abcdef0" + "1" * 33


def test_another_repositorys_commits_are_not_shown(store: Store, repository: Repository, put: Put) -> None:
    other = store.create_repository("model", "bob", "m", private=False, author="bob")
    secret = put({"secret": b"1"}).oid
    refused("no_revision", lambda: store.resolve(other, secret))
    refused("no_revision", lambda: store.resolve(other, secret[:10]))
    refused("no_revision", lambda: store.commit_of(other, secret))
    refused("no_revision", lambda: store.entry(other, secret, "secret"))
    refused("no_revision", lambda: store.entries(other, secret, recursive=True))
    refused("no_revision", lambda: store.create_branch(other, "b", at=secret, author="bob"))
    refused("no_revision", lambda: store.create_tag(other, "b", at=secret))
    assert store.commits(other, secret) == []


def test_branches(store: Store, repository: Repository, put: Put) -> None:
    first = store.resolve(repository, "main")
    second = put({"a": b"1"}).oid
    store.create_branch(repository, "feat/x", at=None, author="alice")
    store.create_branch(repository, "old", at=first, author="alice")
    assert {ref.name: ref.oid for ref in store.refs(repository)} == {"main": second, "feat/x": second, "old": first}
    third = put({"b": b"1"}, ref="feat/x").oid
    assert (store.resolve(repository, "main"), store.resolve(repository, "feat/x")) == (second, third)
    refused("exists", lambda: store.create_branch(repository, "old", at=None, author="alice"))
    refused("no_revision", lambda: store.create_branch(repository, "y", at="nope", author="alice"))
    store.delete_branch(repository, "feat/x")
    refused("no_revision", lambda: store.delete_branch(repository, "feat/x"))
    refused("no_revision", lambda: store.delete_branch(repository, "\ud800"))
    refused("forbidden", lambda: store.delete_branch(repository, "main"))
    assert store.resolve(repository, third) == third  # Who pinned it still finds it.


def test_tags_do_not_move(store: Store, repository: Repository, put: Put) -> None:
    first = store.resolve(repository, "main")
    put({"a": b"1"})
    store.create_tag(repository, "v1", at=first, message="the first", author="bob")
    refused("exists", lambda: store.create_tag(repository, "v1", at="main"))
    refused("no_revision", lambda: put({"b": b"1"}, ref="v1"))
    refused("no_revision", lambda: put({"b": b"1"}, ref="refs/tags/v1"))
    refused("no_revision", lambda: put({"b": b"1"}, ref=first))
    (tag,) = [ref for ref in store.refs(repository) if ref.full == "refs/tags/v1"]
    assert (tag.name, tag.oid, tag.message, tag.author) == ("v1", first, "the first", "bob")
    store.delete_tag(repository, "v1")
    refused("no_revision", lambda: store.delete_tag(repository, "v1"))
    refused("no_revision", lambda: store.delete_tag(repository, "main"))


def test_names_of_refs_that_cannot_be(store: Store, repository: Repository) -> None:
    for name in ("", "a..b", "refs/pr/1", "0" * 40, "\ud800", "a b"):
        refused("bad_request", lambda: store.create_branch(repository, name, at=None, author="alice"))  # noqa: B023
        refused("bad_request", lambda: store.create_tag(repository, name, at="main"))  # noqa: B023


def test_a_ref_is_no_folder_of_another(store: Store, repository: Repository) -> None:
    """A client keeps each in a file of its name."""
    store.create_branch(repository, "a/b", at=None, author="alice")
    for name in ("a", "a/b/c", "main/x"):
        assert "beside" in refused("exists", lambda: store.create_branch(repository, name, at=None, author="alice"))  # noqa: B023
    for name in ("a0", "a/bc", "a/c", "mai"):
        store.create_branch(repository, name, at=None, author="alice")
    store.create_tag(repository, "a", at="main")


def test_pull_requests(store: Store, repository: Repository, put: Put) -> None:
    head = store.resolve(repository, "main")
    numbers = [store.create_pull_request(repository, base="main", title=f"change {i}", author="bob") for i in range(11)]
    assert numbers == list(range(1, 12))
    made = put({"a": b"1"}, ref="refs/pr/2")
    assert made.parent == head and store.resolve(repository, "refs/pr/2") == made.oid
    assert store.resolve(repository, "main") == head
    shown = [(ref.name, ref.message) for ref in store.refs(repository) if ref.full.startswith("refs/pr/")]
    assert shown == [(f"refs/pr/{n}", f"change {n - 1}") for n in numbers]
    refused("no_revision", lambda: put({"a": b"1"}, ref="refs/pr/12"))
    refused("no_revision", lambda: store.create_pull_request(repository, base="nope", title="t", author="bob"))


def test_a_proposal_that_is_refused_opens_no_pull_request(store: Store, repository: Repository) -> None:
    content = store.blobs.add([b"1"]).sha256
    said = {"title": "t", "message": "", "author": "bob"}
    refused("no_entry", lambda: store.propose(repository, "main", [DeleteFile("nope")], **said))
    refused("stale_parent", lambda: store.propose(repository, "main", [], parent="0" * 40, **said))
    assert len(store.refs(repository)) == 1
    number, commit = store.propose(repository, "main", [AddFile("a", content)], **said)
    assert number == 1 and store.resolve(repository, "refs/pr/1") == commit.oid
    assert commit.parent == store.resolve(repository, "main")


# Commits


def test_what_a_commit_says(store: Store, repository: Repository, put: Put) -> None:
    first = put({"a": b"1"}, title="one", message="more\n\nlines\n")
    second = put({"a": b"2"}, title="two\n\nthree")
    assert (first.title, first.message) == ("one", "more\n\nlines\n")
    assert (second.title, second.message, second.parent) == ("two", "three", first.oid)
    assert store.commit_of(repository, second.oid) == second
    line = store.commits(repository, second.oid)
    assert [commit.title for commit in line] == ["two", "one", "initial commit"]
    assert store.commits(repository, second.oid, start=1, count=1) == [first]
    assert store.commits(repository, first.oid, count=1) == [first]
    assert store.commits(repository, second.oid, start=3) == store.commits(repository, second.oid, count=0) == []
    assert store.commits(repository, "main") == []


def test_texts_that_git_cannot_keep(store: Store, repository: Repository, put: Put) -> None:
    for text in ("a\0b", "\ud800"):
        refused("bad_request", lambda: put({"a": b"1"}, title=text))  # noqa: B023
        refused("bad_request", lambda: put({"a": b"1"}, message=text))  # noqa: B023
    refused("bad_request", lambda: store.create_pull_request(repository, base="main", title="\ud800", author="bob"))
    refused("bad_request", lambda: store.create_tag(repository, "x", at="main", message="\ud800"))
    assert len(store.commits(repository, store.resolve(repository, "main"))) == 1


def test_the_same_tree_is_still_a_new_commit(store: Store, repository: Repository, put: Put) -> None:
    first, second, third = put({"a": b"1"}), put({"a": b"1"}), put()
    assert len({first.oid, second.oid, third.oid}) == 3 and third.parent == second.oid


def test_an_old_commit_does_not_change(store: Store, repository: Repository, put: Put) -> None:
    first = put({"d/a": b"1", "b": b"1"}).oid
    put({"d/a": b"2", "c": b"1"}, then=[DeleteFile("b")])
    assert paths(store, repository, first) == [".gitattributes", "b", "d", "d/a"]
    assert read(store, repository, "d/a", first) == b"1" and read(store, repository, "d/a") == b"2"
    assert paths(store, repository) == [".gitattributes", "c", "d", "d/a"]


def test_entries_of_files_and_folders(store: Store, repository: Repository, put: Put) -> None:
    commit = put({"d/a.txt": b"abc"}, lfs={"d/w.bin": b"weights"}).oid
    sha256 = hashlib.sha256(b"weights").hexdigest()
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize 7\n".encode()
    folder, plain, large = store.entries(repository, commit, recursive=True)[1:]
    assert plain == Entry(
        path="d/a.txt",
        directory=False,
        oid="f2ba8f84ab5c1bce84a7b441cb1959cfc7093b7f",
        size=3,
        sha256=hashlib.sha256(b"abc").hexdigest(),
        lfs=False,
    )
    assert large == Entry(
        path="d/w.bin", directory=False, oid=objects.object_oid("blob", text), size=7, sha256=sha256, lfs=True
    )
    assert (folder.path, folder.directory, folder.size, folder.sha256) == ("d", True, 0, None)
    for entry in (folder, plain, large):
        assert store.entry(repository, commit, entry.path) == entry
    for path in ("", "nope", "d/nope", "d/a.txt/x", "d/", "/d", "d//a.txt", "../d", "\ud800", "d\0"):
        assert store.entry(repository, commit, path) is None
    refused("no_revision", lambda: store.entry(repository, "main", "d"))


def test_entries_of_one_folder(store: Store, repository: Repository, put: Put) -> None:
    put({"a/b/c": b"1", "a/d": b"1", "ab": b"1"})
    assert paths(store, repository, recursive=False) == [".gitattributes", "a", "ab"]
    assert paths(store, repository, path="a", recursive=False) == ["a/b", "a/d"]
    assert paths(store, repository, path="a") == ["a/b", "a/b/c", "a/d"]
    for path in ("ab", "nope", "a/d/x", "a/", "\ud800"):
        refused("no_entry", lambda: paths(store, repository, path=path))  # noqa: B023


@pytest.mark.parametrize("recursive", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3, 1000])
def test_pages_have_every_path_once_in_order(
    store: Store, repository: Repository, put: Put, recursive: bool, count: int
) -> None:
    names = ["a", "a-b", "a.txt", "a b", "aa", "a0", "b/a", "b/a.b", "b.c", "b-", "é/é", "é.x", "文/x/y/z", "Z"]
    files = {f"x/{name}/f" if i % 2 else f"x/{name}": b"1" for i, name in enumerate(names)}
    put({**files, "x/a!": b"1", "x/a~": b"1", "y": b"1", "w/x": b"1"})
    whole = paths(store, repository, recursive=recursive)
    assert whole == sorted(whole) and len(whole) == len(set(whole))
    if recursive:
        above = {"/".join(path.split("/")[:n]) for path in whole for n in range(1, path.count("/") + 1)}
        assert set(whole) >= above and {path for path in whole if path not in above} >= set(files)
    found: list[str] = []
    while page := paths(store, repository, recursive=recursive, after=found[-1] if found else None, count=count):
        assert len(page) <= count and (not found or page[0] > found[-1])
        found += page
    assert found == whole
    # Also from a path that is not there.
    assert paths(store, repository, recursive=recursive, after="x/a-zz") == [p for p in whole if p > "x/a-zz"]
    assert (
        paths(store, repository, path="x", recursive=recursive, after="x/b/a", count=2)
        == [p for p in paths(store, repository, path="x", recursive=recursive) if p > "x/b/a"][:2]
    )


def test_operations_are_done_one_after_the_other(store: Store, repository: Repository, put: Put) -> None:
    put({"a": b"1", "d/x": b"1", "d/y": b"1", "e/f/g": b"1"})
    content = store.blobs.add([b"2"]).sha256
    put(then=[DeleteFile("a"), AddFile("a/b", content)])  # A folder where a file was.
    put(then=[DeleteFolder("d/"), AddFile("d", content)])  # A file where a folder was.
    put(then=[AddFile("e/f/h", content), DeleteFolder("e/f"), AddFile("e/i", content)])
    put(then=[AddFile("n/o", content), DeleteFile("n/o")])
    assert paths(store, repository) == [".gitattributes", "a", "a/b", "d", "e", "e/i"]


def test_a_folder_with_nothing_in_it_is_gone(store: Store, repository: Repository, put: Put) -> None:
    put({"a/b/c/d": b"1", "a/x": b"1"})
    put(then=[DeleteFile("a/b/c/d")])
    assert paths(store, repository) == [".gitattributes", "a", "a/x"]
    put(then=[DeleteFile("a/x"), DeleteFile(".gitattributes")])
    assert paths(store, repository) == []
    put({"again/and/again": b"1"})
    content = store.blobs.add([b"2"]).sha256
    put(then=[DeleteFile("again/and/again"), AddFile("again", content)])  # Also for what follows in the same commit.
    assert paths(store, repository) == ["again"]


REFUSED: list[tuple[str, list[Operation], str]] = [
    ("no_entry", [DeleteFile("nope")], "A file with this name doesn't exist"),
    ("no_entry", [DeleteFile("d/nope")], "A file with this name doesn't exist"),
    ("no_entry", [DeleteFile("f/nope")], "A file with this name doesn't exist"),
    ("no_entry", [DeleteFile("nope/nope")], "A file with this name doesn't exist"),
    ("no_entry", [DeleteFile("d")], "A file with this name doesn't exist"),
    ("no_entry", [DeleteFolder("f")], "A file with this name doesn't exist"),
    ("no_entry", [DeleteFolder("nope/")], "A file with this name doesn't exist"),
    ("no_entry", [DeleteFile("f"), DeleteFile("f")], "A file with this name doesn't exist"),
    ("no_entry", [DeleteFile("d/x"), DeleteFolder("d")], "A file with this name doesn't exist"),
    ("no_entry", [DeleteFolder("d"), DeleteFile("d/x")], "A file with this name doesn't exist"),
    ("bad_request", [AddFile("f/x", "1")], "'f' is a file"),
    ("bad_request", [AddFile("d/x/y/z", "1")], "'d/x' is a file"),
    ("bad_request", [AddFile("d", "1")], "a folder has that name"),
    ("bad_request", [AddFile("n", "1"), AddFile("n/o", "1")], "'n' is a file"),
    ("bad_request", [AddFile("n/o", "1"), AddFile("n", "1")], "a folder has that name"),
    ("bad_request", [AddFile("f/x", "1"), DeleteFile("f")], "'f' is a file"),
    ("bad_request", [AddFile("n", "1"), AddFile("n", "1")], "added twice"),
    ("bad_request", [AddFile("n", "1"), DeleteFile("n"), AddFile("n", "1")], "added twice"),
    ("bad_request", [AddFile("n", ABSENT)], "is not here"),
    ("bad_request", [AddFile("n", "../x")], "is not here"),
    ("bad_request", [AddLfs("n", ABSENT, 1)], "is not here"),
    ("bad_request", [AddLfs("n", "1", 1)], "is not here"),  # It is, but nobody uploaded it to this repository.
    ("bad_request", [AddLfs("n", "lfs", 8)], "has 7 bytes; the commit says 8"),
    ("bad_request", [AddFile("../x", "1")], "'../x'"),
    ("bad_request", [AddFile("/x", "1")], "'/x'"),
    ("bad_request", [AddFile("x/", "1")], "'x/'"),
    ("bad_request", [AddFile("\ud800", "1")], "UTF-8"),
    ("bad_request", [AddLfs(".git/config", "lfs", 7)], "'.git'"),
    ("bad_request", [DeleteFile("")], "empty"),
    ("bad_request", [DeleteFolder("/")], "empty"),
    ("bad_request", [DeleteFolder("a//")], "slash"),
]


@pytest.mark.parametrize(("kind", "operations", "words"), REFUSED, ids=lambda value: str(value)[:60])
def test_a_commit_that_is_refused_changes_nothing(
    store: Store, repository: Repository, put: Put, kind: str, operations: list[Operation], words: str
) -> None:
    put({"f": b"1", "d/x": b"1"})
    contents = {"1": store.blobs.add([b"2"]).sha256, "lfs": store.blobs.add([b"weights"]).sha256}
    store.note_upload(repository, contents["lfs"])
    before = [store.database.read(f"SELECT * FROM {table}") for table in ("refs", "commits", "trees", "files")]
    asked: list[Operation] = [AddFile("fine", contents["1"])]
    for operation in operations:
        if isinstance(operation, AddFile):
            asked.append(AddFile(operation.path, contents.get(operation.sha256, operation.sha256)))
        elif isinstance(operation, AddLfs):
            sha256 = contents.get(operation.sha256, operation.sha256)
            asked.append(AddLfs(operation.path, sha256, operation.size))
        else:
            asked.append(operation)
    assert words in refused(kind, lambda: put(then=asked))
    assert before == [store.database.read(f"SELECT * FROM {table}") for table in ("refs", "commits", "trees", "files")]


def test_the_parent_is_compared(store: Store, repository: Repository, put: Put) -> None:
    first = store.resolve(repository, "main")
    second = put({"a": b"1"}, parent=first).oid
    said = refused("stale_parent", lambda: put({"a": b"2"}, parent=first))
    assert first in said and second in said
    refused("stale_parent", lambda: put({"a": b"2"}, parent=first[:7]))
    for wrong in ("", "main", second[:6], "\ud800", second + "0"):
        refused("bad_request", lambda: put({"a": b"2"}, parent=wrong))  # noqa: B023
    third = put({"a": b"2"}, parent=second[:7]).oid
    put({"a": b"3"}, parent=third.upper())


def test_a_deep_path(store: Store, repository: Repository, put: Put) -> None:
    path = "/".join("d" * 512)
    put({path: b"1"})
    assert len(paths(store, repository)) == 513 and paths(store, repository)[-1] == path
    put(then=[DeleteFile(path)])
    assert paths(store, repository) == [".gitattributes"]


def test_a_commit_of_one_file_rewrites_its_folders_alone(store: Store, repository: Repository) -> None:
    content = store.blobs.add([b"1"]).sha256
    files = [AddFile(f"d{i % 100}/f{i}", content) for i in range(10_000)]
    store.commit(repository, "main", files, title="t", message="", author="alice")
    counts = "SELECT (SELECT count(*) FROM trees), (SELECT count(*) FROM files), (SELECT count(*) FROM contents)"
    trees, *rest = store.database.read(counts)[0]
    store.commit(repository, "main", [AddFile("d7/new", content)], title="t", message="", author="alice")
    assert store.database.read(counts)[0] == (trees + 2, *rest)


def test_what_is_kept_of_trees_in_memory_has_an_end(
    store: Store, repository: Repository, put: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.hub.trees.KEPT_ENTRIES", 10)
    files = {f"d{i}/f{j}": b"%d" % i for i in range(20) for j in range(3)}
    put(files)
    assert len([path for path in paths(store, repository) if path in files]) == len(files)
    kept = store._trees._kept
    assert sum(len(children) + 1 for children in kept.values()) == store._trees._entries <= 10


@pytest.mark.parametrize("sql", ["DELETE FROM trees", "UPDATE trees SET content = x'00'", "DELETE FROM files"])
def test_what_the_database_has_lost_is_said(store: Store, repository: Repository, sql: str) -> None:
    with store.database.transaction() as connection:
        connection.execute(sql)
    with pytest.raises(RuntimeError, match=r"missing from .* or damaged; run parity hub fsck"):
        paths(store, repository)


def test_no_commit_is_made_on_one_that_is_lost(store: Store, repository: Repository, put: Put) -> None:
    with store.database.transaction() as connection:
        connection.execute("DELETE FROM commits")
    with pytest.raises(RuntimeError, match=r"the commit .* is missing"):
        put({"a": b"1"})


# Contents of repositories


def test_a_content_is_used_by_those_who_have_it(store: Store, repository: Repository, put: Put) -> None:
    sha256 = store.blobs.add([b"secret weights"]).sha256
    other = store.create_repository("model", "bob", "m", private=False, author="bob")
    store.note_upload(repository, sha256)
    store.note_upload(repository, sha256)
    assert store.has_content(repository, sha256) and not store.has_content(other, sha256)
    taken: list[list[Operation]] = [[AddLfs("w", sha256, 14)], [AddLfs("w", sha256)], [AddLfs("w", sha256, 1)]]
    said = {
        refused("bad_request", lambda: store.commit(other, "main", asked, title="t", message="", author="bob"))  # noqa: B023
        for asked in taken
    }
    (words,) = said  # Neither that it is here nor its size can be told from the answer.
    unknown: list[Operation] = [AddLfs("w", ABSENT, 14)]
    absent = refused("bad_request", lambda: store.commit(other, "main", unknown, title="t", message="", author="bob"))
    assert absent == words.replace(sha256, ABSENT)


def test_what_is_in_a_tree_can_be_used_again(store: Store, repository: Repository, put: Put) -> None:
    put({"a": b"plain"}, lfs={"w": b"weights"})
    put(then=[DeleteFile("a"), DeleteFile("w")])
    for content in (b"plain", b"weights"):
        assert store.has_content(repository, hashlib.sha256(content).hexdigest())
    put(then=[AddLfs("copy", hashlib.sha256(b"weights").hexdigest())])
    assert read(store, repository, "copy") == b"weights"


def test_a_content_that_is_lost_cannot_be_used(store: Store, repository: Repository, put: Put) -> None:
    put(lfs={"w": b"weights"})
    sha256 = hashlib.sha256(b"weights").hexdigest()
    store.blobs.path(sha256).unlink()
    assert not store.has_content(repository, sha256)
    refused("bad_request", lambda: put(then=[AddLfs("w2", sha256)]))


def test_a_right_to_what_is_not_here_yet_cannot_be_had(store: Store, repository: Repository) -> None:
    refused("bad_request", lambda: store.note_upload(repository, ABSENT))


def test_the_text_of_a_pointer_is_the_lfs_file(store: Store, repository: Repository, put: Put) -> None:
    """In git both are one blob; as a plain file it would be a way to the content of others."""
    sha256 = store.blobs.add([b"weights"]).sha256
    text = objects.pointer(sha256, 7)
    assert "upload it first" in refused("bad_request", lambda: put({"w": text}))
    store.note_upload(repository, sha256)
    assert "has 7 bytes" in refused("bad_request", lambda: put({"w": objects.pointer(sha256, 8)}))
    commit = put({"w": text, "almost": text + b"\n"}).oid
    entry = store.entry(repository, commit, "w")
    assert entry is not None and entry.lfs and entry.sha256 == sha256
    almost = store.entry(repository, commit, "almost")
    assert almost is not None and not almost.lfs and almost.size == len(text) + 1


def test_the_same_content_as_a_plain_and_as_an_lfs_file(store: Store, repository: Repository, put: Put) -> None:
    commit = put({"plain": b"x"}, lfs={"large": b"x"}).oid
    plain, large = (store.entry(repository, commit, path) for path in ("plain", "large"))
    assert plain is not None and large is not None
    assert plain.sha256 == large.sha256 and plain.oid != large.oid and (plain.lfs, large.lfs) == (False, True)


# Many at once


def test_commits_at_once_stand_in_one_line(store: Store, repository: Repository, put: Put) -> None:
    landed: list[str] = []

    def work(worker: int) -> None:
        for turn in range(4):
            landed.append(put({f"d{worker % 3}/{worker}-{turn}": b"%d" % worker}).oid)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    line = [commit.oid for commit in store.commits(repository, store.resolve(repository, "main"), count=1000)]
    assert len(line) == 65 and set(line[:-1]) == set(landed)
    assert len([path for path in paths(store, repository) if "-" in path]) == 64


def test_of_commits_on_the_same_parent_one_lands(store: Store, repository: Repository, put: Put) -> None:
    head = store.resolve(repository, "main")
    ends: list[str] = []

    def work(worker: int) -> None:
        try:
            put({f"{worker}": b"1"}, parent=head)
        except Refusal as refusal:
            ends.append(refusal.kind)
        else:
            ends.append("landed")

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ends) == ["landed"] + ["stale_parent"] * 15


def test_of_creations_at_once_one_lands(store: Store) -> None:
    ends: list[str] = []

    def work() -> None:
        try:
            store.create_repository("model", "alice", "same", private=False, author="alice")
        except Refusal as refusal:
            ends.append(refusal.kind)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends == ["exists"] * 7


# The root


def test_a_store_that_is_opened_again_has_everything(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "root with space#?"
    store = Store(root)
    made = store.create_repository("model", "alice", "m", private=True, author="alice")
    content = store.blobs.add([b"1"]).sha256
    commit = store.commit(made, "main", [AddFile("a", content)], title="t", message="", author="alice")
    store.close()
    store.close()
    again = Store(root)
    assert again.find_repository("model", "alice/m") == made
    assert again.resolve(made, "main") == commit.oid and read(again, made, "a") == b"1"
    again.close()


def test_two_stores_on_one_root_refuse_each_other(tmp_path: Path) -> None:
    root = tmp_path / "root"
    store = Store(root)
    with pytest.raises(DescriptionError, match=f"in use by another Hub .process {os.getpid()}.; stop that one"):
        Store(root)
    program = "import sys; from pathlib import Path; from harness.hub.store import Store; Store(Path(sys.argv[1]))"
    other = subprocess.run([sys.executable, "-c", program, str(root)], capture_output=True, text=True)
    assert other.returncode != 0 and f"process {os.getpid()}" in other.stderr.splitlines()[-1]
    store.close()
    Store(root).close()


def test_a_child_that_lives_on_does_not_keep_the_root(tmp_path: Path) -> None:
    program = """
    import os, sys, time
    from pathlib import Path
    from harness.hub.store import Store
    store = Store(Path(sys.argv[1]))
    child = os.fork()
    if child == 0:
        time.sleep(600)
    try:
        store.close()
        Store(Path(sys.argv[1])).close()
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "root")], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_a_root_that_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("harness.hub.database.fcntl.flock", refuse)
    with pytest.raises(DescriptionError, match=r"cannot be locked .No locks available.; give a root on a local disk"):
        Store(tmp_path / "root")


def test_others_on_the_machine_cannot_look_into_a_root(store: Store) -> None:
    assert store.root.stat().st_mode & 0o077 == 0


def test_what_a_killed_writer_left_is_swept(tmp_path: Path) -> None:
    root = tmp_path / "root"
    Store(root).close()
    (root / "unfinished" / "99-0").write_bytes(b"half")
    Store(root).close()
    assert not list((root / "unfinished").iterdir())


def test_roots_that_are_none(tmp_path: Path) -> None:
    newer = tmp_path / "newer"
    Store(newer).close()
    with sqlite3.connect(newer / FILE) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    connection.close()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    with sqlite3.connect(foreign / FILE) as connection:
        connection.execute("CREATE TABLE x (y)")
    connection.close()
    garbage = tmp_path / "garbage"
    garbage.mkdir()
    (garbage / FILE).write_bytes(b"no database" * 1000)
    file = tmp_path / "file"
    file.write_bytes(b"")
    for root, words in (
        (newer, f"schema is {SCHEMA_VERSION + 1}, this one reads up to {SCHEMA_VERSION}; update"),
        (foreign, "another program"),
        (garbage, "cannot be read"),
        (file, "cannot be the root"),
        (file / "below", "cannot be the root"),
    ):
        for _ in range(2):  # The lock is given back each time.
            with pytest.raises(DescriptionError, match=words) as said:
                Store(root)
            assert "\n" not in str(said.value) and str(root) in str(said.value)


def test_others_keep_their_tables_beside(store: Store, repository: Repository) -> None:
    database: Database = store.database
    database.execute_script("CREATE TABLE IF NOT EXISTS grants (repository INTEGER, user TEXT); SELECT 1")
    database.execute_script("CREATE TABLE IF NOT EXISTS grants (repository INTEGER, user TEXT)")
    with database.transaction() as connection:
        connection.execute("INSERT INTO grants VALUES (?, ?)", (repository.key, "bob"))
        assert database.read("SELECT user FROM grants") == [("bob",)]
    with pytest.raises(ZeroDivisionError), database.transaction() as connection:
        connection.execute("INSERT INTO grants VALUES (?, ?)", (repository.key, "carol"))
        raise ZeroDivisionError
    assert database.read("SELECT user FROM grants") == [("bob",)]
    with pytest.raises(sqlite3.OperationalError):
        database.execute_script("CREATE TABLE half (x); CREATE nonsense")
    assert database.read("SELECT name FROM sqlite_schema WHERE name = 'half'") == []
    with database.transaction() as connection:  # Nothing is left open.
        connection.execute("DELETE FROM grants")


def test_nothing_heavy_is_imported() -> None:
    heavy = "{'torch', 'transformers', 'huggingface_hub', 'numpy'}"
    program = f"import sys, harness.hub.fsck; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "set()\n"


# Git


def git_run(git: str, where: Path, *arguments: str, given: bytes = b"", **environment: str) -> str:
    done = subprocess.run(
        [git, *arguments],
        cwd=where,
        input=given,
        capture_output=True,
        env={"PATH": os.environ["PATH"], "HOME": str(where), "GIT_CONFIG_NOSYSTEM": "1", **environment},
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def test_git_gives_the_same_ids(store: Store, repository: Repository, put: Put, git: str, tmp_path: Path) -> None:
    put({"a.txt": b"1", "a/b": b"2", "a-b": b"", "a/é x/#?": b"3", "z/y/x": b"4"}, lfs={"w.bin": b"weights"})
    put({"new": b"5"}, then=[DeleteFolder("z")], title="Größe", message="with\n\nlines\n")
    put(then=[DeleteFile("new")])
    there = tmp_path / "git"
    there.mkdir()
    git_run(git, there, "init", "-q", "--bare", ".")
    for sha256 in sorted(path.name for path in store.blobs.directory.rglob("?" * 64)):
        given = store.blobs.path(sha256).read_bytes()
        assert git_run(git, there, "hash-object", "-w", "--stdin", given=given).strip() == store.blobs.oid(sha256)
    for oid, sha256, size in store.database.read("SELECT oid, sha256, size FROM files WHERE lfs"):
        given = objects.pointer(sha256, size)
        assert git_run(git, there, "hash-object", "-w", "--stdin", given=given).strip() == oid
    for oid, content in store.database.read("SELECT oid, content FROM trees"):
        listed = "".join(
            f"{'040000 tree' if child.directory else '100644 blob'} {child.oid}\t{name}\0"
            for name, child in reversed(objects.read_tree(content).items())
        )
        assert git_run(git, there, "mktree", "-z", "--missing", given=listed.encode()).strip() == oid
    head = store.resolve(repository, "main")
    for commit in reversed(store.commits(repository, head)):
        row = store.database.read(
            "SELECT tree, parent, author, seconds, text FROM commits WHERE oid = ?", (commit.oid,)
        )
        tree, parent, author, seconds, text = row[0]
        who = {}
        for role in ("AUTHOR", "COMMITTER"):
            who[f"GIT_{role}_NAME"], who[f"GIT_{role}_EMAIL"] = author, f"{author}@localhost"
            who[f"GIT_{role}_DATE"] = f"{seconds} +0000"
        before = ["-p", parent] if parent else []
        given = f"{text}\n".encode()
        assert git_run(git, there, "commit-tree", tree, *before, given=given, **who).strip() == commit.oid
    git_run(git, there, "fsck", "--strict", "--full")
    listed = git_run(git, there, "ls-tree", "-r", "-t", "-z", "--full-tree", head)
    theirs = {line.split("\t")[1]: line.split("\t")[0].split()[2] for line in listed.split("\0") if line}
    ours = {entry.path: entry.oid for entry in store.entries(repository, head, recursive=True)}
    assert ours == theirs


def test_a_tree_that_is_none_is_not_read() -> None:
    good = objects.tree_content({"a": objects.Child("0" * 40, False)})
    assert objects.read_tree(good) == {"a": objects.Child("0" * 40, False)}
    for bad in (b"x", good[:-1], good + b"x", good.replace(b"100644", b"120000"), good.replace(b"a\0", b"a/b\0")):
        with pytest.raises(ValueError, match="no list of files"):
            objects.read_tree(bad)


def test_blobs_are_looked_at_without_being_made(tmp_path: Path) -> None:
    assert ABSENT not in Blobs(tmp_path) and not list(tmp_path.iterdir())
    assert LOCK not in os.listdir(tmp_path)
