# SPDX-License-Identifier: Apache-2.0
"""What a Hub should hold, as plain dicts: each change is made or refused with the status that the Hub should send."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from harness.hub.attributes import ATTRIBUTES

TYPES = ("model", "dataset")
ATTRIBUTES_SHA256 = hashlib.sha256(ATTRIBUTES).hexdigest()

Files = dict[str, bytes]
Change = tuple[str, str, bytes]
"""add, delete or delete_folder; a path; the content of what is added."""
Key = tuple[str, str]
"""Type and id of a repository."""


class No(Exception):
    """A change is refused; its argument is the status."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Commit:
    """What a revision holds. `files` is never changed."""

    parent: str | None
    title: str
    files: Files


@dataclasses.dataclass(kw_only=True)
class Repository:
    """A repository. contents: the SHA-256 of everything that it may use without an upload. access: of gated ones.

    read: the commits that were read back, every file of them.
    """

    private: bool
    gated: str | bool = False
    refs: dict[str, str] = dataclasses.field(default_factory=dict)
    commits: dict[str, Commit] = dataclasses.field(default_factory=dict)
    contents: set[str] = dataclasses.field(default_factory=lambda: {ATTRIBUTES_SHA256})
    access: dict[str, str] = dataclasses.field(default_factory=dict)
    read: set[str] = dataclasses.field(default_factory=set)

    def resolve(self, revision: str) -> str:
        """The commit that a revision means."""
        for full in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if full in self.refs:
                return self.refs[full]
        begun = [oid for oid in self.commits if re.fullmatch("[0-9a-f]{7,}", revision) and oid.startswith(revision)]
        if len(begun) != 1:
            raise No(404)
        return begun[0]

    def written(self, revision: str) -> str:
        """The full name of the ref that a commit to a revision moves."""
        full = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
        if full not in self.refs or full.startswith("refs/tags/"):
            raise No(404)
        return full

    def history(self, oid: str | None) -> list[str]:
        """A commit and those before it, newest first."""
        line = []
        while oid is not None:
            line.append(oid)
            oid = self.commits[oid].parent
        return line

    def next_pull_request(self) -> str:
        """The ref that the next one gets."""
        return f"refs/pr/{sum(full.startswith('refs/pr/') for full in self.refs) + 1}"

    def add(self, full: str, oid: str, title: str, changes: Sequence[Change]) -> None:
        """A commit was made on a ref."""
        parent = self.refs[full]
        assert oid not in self.commits, f"commit {oid} was made twice"
        self.commits[oid] = Commit(parent=parent, title=title, files=changed(self.commits[parent].files, changes))
        self.refs[full] = oid
        self.contents |= {sha256(content) for what, _, content in changes if what == "add"}


@dataclasses.dataclass(kw_only=True)
class Holding:
    """All repositories, and where those are now that had other ids before."""

    repositories: dict[Key, Repository] = dataclasses.field(default_factory=dict)
    moved: dict[Key, Repository] = dataclasses.field(default_factory=dict)

    def find(self, key: Key, *, by_old_id: bool = True) -> Repository:
        """The repository of an id, also of one that it had before."""
        found = self.repositories.get(key) or (self.moved.get(key) if by_old_id else None)
        if found is None:
            raise No(404)
        return found

    def key_of(self, repository: Repository) -> Key:
        """Its id now."""
        return next(key for key, one in self.repositories.items() if one is repository)

    def create(self, key: Key, *, private: bool) -> Repository:
        """A new repository; its first commit is not known yet."""
        if key in self.repositories:
            raise No(409)
        self.moved.pop(key, None)
        self.repositories[key] = Repository(private=private)
        return self.repositories[key]

    def delete(self, key: Key) -> None:
        """A repository goes, and its old ids with it."""
        gone = self.find(key, by_old_id=False)
        del self.repositories[key]
        self.moved = {old: one for old, one in self.moved.items() if one is not gone}

    def move(self, key: Key, to: str) -> None:
        """A repository gets another id."""
        repository = self.find(key, by_old_id=False)
        target = (key[0], to)
        if target in self.repositories:
            raise No(409)
        self.moved.pop(target, None)
        del self.repositories[key]
        self.repositories[target] = repository
        self.moved[key] = repository

    def create_ref(self, key: Key, full: str, *, at: str) -> None:
        """A branch or a tag."""
        repository = self.find(key)
        oid = repository.resolve(at)
        if full in repository.refs:
            raise No(409)
        repository.refs[full] = oid

    def delete_ref(self, key: Key, full: str) -> None:
        """A branch or a tag goes; not main."""
        repository = self.find(key)
        if full == "refs/heads/main":
            raise No(403)
        if full not in repository.refs:
            raise No(404)
        del repository.refs[full]

    def shown(self) -> dict[str, Any]:
        """What the Hub says of itself, without its commits."""
        return {
            "repositories": {
                key: {"private": one.private, "gated": one.gated, "refs": one.refs}
                for key, one in self.repositories.items()
            },
            "moved": {key: self.key_of(one)[1] for key, one in self.moved.items()},
        }


def changed(files: Files, changes: Iterable[Change]) -> Files:
    """The files after changes, made one after the other."""
    files = dict(files)
    for what, path, content in changes:
        below = [one for one in files if one.startswith(f"{path}/")]
        if what == "add":
            parts = path.split("/")
            if below or any("/".join(parts[:count]) in files for count in range(1, len(parts))):
                raise No(400)
            files[path] = content
        else:
            gone = below if what == "delete_folder" else [one for one in files if one == path]
            if not gone:
                raise No(404)
            for one in gone:
                del files[one]
    return files


def folders(files: Files) -> set[str]:
    """Every folder that has a file somewhere below it."""
    return {"/".join(parts[:count]) for parts in (path.split("/") for path in files) for count in range(1, len(parts))}


def is_lfs(path: str, content: bytes) -> bool:
    """Whether LFS keeps a file of those that are made here; .gitattributes never."""
    return bool(content) and (path.endswith(".bin") or b"\0" in content[:512])


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def tree(files: Files) -> dict[str, Any]:
    """What a listing of a revision says: git's id, the size, and the SHA-256 of an LFS file."""
    listed: dict[str, Any] = dict.fromkeys(folders(files), "folder")
    for path, content in files.items():
        kept = content
        if is_lfs(path, content):
            text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256(content)}\nsize {len(content)}\n"
            kept = text.encode()
        oid = hashlib.sha1(b"blob %d\0" % len(kept) + kept).hexdigest()
        listed[path] = (oid, len(content), sha256(content) if is_lfs(path, content) else None)
    return listed
