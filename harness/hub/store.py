# SPDX-License-Identifier: Apache-2.0
"""What a Hub holds: repositories, their branches, tags and pull requests, and every commit, each a commit of git."""

from __future__ import annotations

import contextlib
import dataclasses
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

from harness.hub import names
from harness.hub.attributes import ATTRIBUTES
from harness.hub.blobs import Blobs
from harness.hub.database import Database, Row, locked
from harness.hub.objects import POINTER_BYTES, Child, commit_oid, object_oid, pointer, read_pointer
from harness.hub.records import (
    AddFile,
    AddLfs,
    Commit,
    DeleteFile,
    DeleteFolder,
    Entry,
    Gated,
    Operation,
    Ref,
    Repository,
)
from harness.hub.refusals import Kind, Refusal
from harness.hub.trees import SCHEMA as TREES_SCHEMA
from harness.hub.trees import Draft, Trees, damaged

TYPES = ("model", "dataset", "space")
MAIN = "main"
Clock = Callable[[], datetime]

SCHEMA = """
-- A key is given once: what belonged to a repository that was deleted never belongs to another.
CREATE TABLE IF NOT EXISTS repositories (
    key INTEGER PRIMARY KEY AUTOINCREMENT, type TEXT NOT NULL, owner TEXT NOT NULL, name TEXT NOT NULL,
    private INTEGER NOT NULL, gated TEXT NOT NULL, disabled INTEGER NOT NULL, seconds INTEGER NOT NULL,
    UNIQUE (type, owner, name));
-- Where repositories were before.
CREATE TABLE IF NOT EXISTS moves (
    type TEXT NOT NULL, owner TEXT NOT NULL, name TEXT NOT NULL,
    repository INTEGER NOT NULL REFERENCES repositories (key) ON DELETE CASCADE,
    PRIMARY KEY (type, owner, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS refs (
    repository INTEGER NOT NULL REFERENCES repositories (key) ON DELETE CASCADE, full TEXT NOT NULL, oid TEXT NOT NULL,
    message TEXT NOT NULL, author TEXT NOT NULL, seconds INTEGER NOT NULL,
    PRIMARY KEY (repository, full)) WITHOUT ROWID;
-- Which commits a repository may show. Two that began alike share commits.
CREATE TABLE IF NOT EXISTS histories (
    repository INTEGER NOT NULL REFERENCES repositories (key) ON DELETE CASCADE, oid TEXT NOT NULL,
    PRIMARY KEY (repository, oid)) WITHOUT ROWID;
-- Which contents a repository may use.
CREATE TABLE IF NOT EXISTS contents (
    repository INTEGER NOT NULL REFERENCES repositories (key) ON DELETE CASCADE, sha256 TEXT NOT NULL,
    PRIMARY KEY (repository, sha256)) WITHOUT ROWID;
-- Objects of git: an id has one meaning for all repositories, and rows are never changed.
CREATE TABLE IF NOT EXISTS commits (
    oid TEXT PRIMARY KEY, tree TEXT NOT NULL, parent TEXT, author TEXT NOT NULL, seconds INTEGER NOT NULL,
    text TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS files (
    oid TEXT PRIMARY KEY, sha256 TEXT NOT NULL, size INTEGER NOT NULL, lfs INTEGER NOT NULL) WITHOUT ROWID;
"""


@dataclasses.dataclass(frozen=True)
class _File:
    """What stands under a path: a row of `files`."""

    oid: str
    sha256: str
    size: int
    lfs: bool


class Store:
    """The repositories of one root. Any number of threads may use it; every refusal is a Refusal.

    Commits and trees never change, so that what belongs to a commit is read without a lock on anything.
    """

    def __init__(self, root: Path, *, clock: Clock = lambda: datetime.now(UTC)) -> None:
        """Opens or makes a root and holds it until `close`. `clock` gives a time with a time zone.

        Raises DescriptionError where another Hub has the root, a newer version made it, or it is none.
        """
        self.root = root
        self._clock = clock
        self._closing = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(root, make=True))
            self.database = Database(root, schema=SCHEMA + TREES_SCHEMA)
            stack.callback(self.database.close)
            self.blobs = Blobs(root)
            self.blobs.open()
            self._trees = Trees(self.database)
            self._closing = stack.pop_all()

    def close(self) -> None:
        """Gives the root back."""
        self._closing.close()

    # Repositories

    def create_repository(self, type: str, owner: str, name: str, *, private: bool, author: str) -> Repository:
        """A new repository whose main branch has one commit with .gitattributes. Refuses: exists, bad_request."""
        if type not in TYPES:
            raise _refusal("bad_request", f"a repository is one of {', '.join(TYPES)}, not {type!r}")
        owner, name = names.repository_parts(f"{owner}/{name}" if owner else name)
        _check_text("", author)
        stored = self.blobs.add([ATTRIBUTES])
        prepared = self._prepare(None, [AddFile(".gitattributes", stored.sha256)])
        seconds = self._seconds()
        with self.database.transaction() as connection:
            self._free(connection, type, owner, name)
            cursor = connection.execute(
                "INSERT INTO repositories (type, owner, name, private, gated, disabled, seconds)"
                " VALUES (?, ?, ?, ?, '', 0, ?)",
                (type, owner, name, private, seconds),
            )
            key = cast(int, cursor.lastrowid)
            oid = self._add_commit(
                connection, key, None, prepared, author=author, seconds=seconds, text="initial commit"
            )
            _add_ref(connection, key, f"refs/heads/{MAIN}", oid, message="", author=author, seconds=seconds)
            return self._repository(key)

    def find_repository(self, type: str, id: str) -> Repository | None:
        """The repository that is called so now."""
        return self._called("type = ? AND owner = ? AND name = ?", type, id)

    def moved_to(self, type: str, id: str) -> str | None:
        """What a repository is called now that was called so before."""
        known = "key = (SELECT repository FROM moves WHERE type = ? AND owner = ? AND name = ?)"
        found = self._called(known, type, id)
        return None if found is None else found.id

    def _called(self, where: str, type: str, id: str) -> Repository | None:
        owner, slash, name = id.rpartition("/")
        if not names.is_text(id) or (slash and not owner):
            return None
        rows = self.database.read(f"SELECT {_REPOSITORY} FROM repositories WHERE {where}", (type, owner, name))
        return _as_repository(rows[0]) if rows else None

    def repositories(self, type: str, *, owner: str | None = None, search: str | None = None) -> list[Repository]:
        """Those of a type, newest first; of one owner; with a text in their id, in whatever case."""
        rows = self.database.read(
            f"SELECT {_REPOSITORY} FROM repositories WHERE type = ? AND (? IS NULL OR owner = ?)"
            " ORDER BY seconds DESC, key DESC",
            (type, owner, owner) if names.is_text(owner or "") else (type, "/", "/"),
        )
        found = map(_as_repository, rows)
        return [repository for repository in found if (search or "").lower() in repository.id.lower()]

    def delete_repository(self, repository: Repository) -> None:
        """Ends a repository: its refs, its old names and its right to contents."""
        with self._changing(repository) as connection:
            connection.execute("DELETE FROM repositories WHERE key = ?", (repository.key,))

    def move_repository(self, repository: Repository, *, owner: str, name: str) -> Repository:
        """Gives it another id; the old one leads to it until it is given to another. Refuses: exists, bad_request."""
        owner, name = names.repository_parts(f"{owner}/{name}" if owner else name)
        with self._changing(repository) as connection:
            now = self._repository(repository.key)
            self._free(connection, now.type, owner, name)
            connection.execute("UPDATE repositories SET owner = ?, name = ? WHERE key = ?", (owner, name, now.key))
            connection.execute("INSERT INTO moves VALUES (?, ?, ?, ?)", (now.type, now.owner, now.name, now.key))
            return self._repository(now.key)

    def set_repository(
        self,
        repository: Repository,
        *,
        private: bool | None = None,
        gated: Gated | None = None,
        disabled: bool | None = None,
    ) -> Repository:
        """Changes what is not None."""
        with self._changing(repository) as connection:
            connection.execute(
                "UPDATE repositories SET private = coalesce(?, private), gated = coalesce(?, gated),"
                " disabled = coalesce(?, disabled) WHERE key = ?",
                (private, None if gated is None else gated or "", disabled, repository.key),
            )
            return self._repository(repository.key)

    # Refs

    def resolve(self, repository: Repository, revision: str) -> str:
        """The id of the commit that a revision names: a branch, else a tag, else a whole `refs/...`, else the
        beginning (7 digits or more) of the id of one commit that was made in this repository, also where its branch
        is gone since: who pinned it still finds it. Refuses: no_revision.
        """
        if names.is_text(revision):
            for full in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
                oid = self._target(repository.key, full)
                if oid is not None:
                    return oid
        prefix = revision.lower()
        if names.is_commit_prefix(prefix):
            rows = self.database.read(
                "SELECT oid FROM histories WHERE repository = ? AND oid >= ? AND oid < ? LIMIT 2",
                (repository.key, prefix, prefix + "g"),
            )
            if len(rows) > 1:
                raise _refusal("no_revision", f"{repository.id} has several commits that begin with {revision!r}")
            if rows:
                return str(rows[0][0])
        raise _refusal("no_revision", f"{repository.id} has no branch, tag or commit {revision!r}")

    def refs(self, repository: Repository) -> list[Ref]:
        """All of them, sorted by their full name, pull requests by number."""
        rows = self.database.read(
            "SELECT full, oid, message, author, seconds FROM refs WHERE repository = ?"
            " ORDER BY substr(full, 1, 8) <> 'refs/pr/' DESC, CASE WHEN substr(full, 1, 8) = 'refs/pr/'"
            " THEN CAST(substr(full, 9) AS INTEGER) END, full",
            (repository.key,),
        )
        return [
            Ref(
                name=full.removeprefix("refs/heads/").removeprefix("refs/tags/"),
                full=full,
                oid=oid,
                message=message,
                author=author,
                date=_date(seconds),
            )
            for full, oid, message, author, seconds in rows
        ]

    def create_branch(self, repository: Repository, name: str, *, at: str | None, author: str) -> None:
        """A branch at a revision, at main where that is None. Refuses: exists, no_revision, bad_request."""
        self._create_ref(repository, "refs/heads/", name, at=at or MAIN, message="", author=author)

    def set_branch(self, repository: Repository, name: str, *, to: str) -> None:
        """Moves a branch to another revision, as a forced push does. Refuses: no_revision."""
        with self._changing(repository) as connection:
            full = f"refs/heads/{name}"
            if not names.is_text(name) or self._target(repository.key, full) is None:
                raise _refusal("no_revision", f"{repository.id} has no branch {name!r}")
            oid = self.resolve(repository, to)
            connection.execute("UPDATE refs SET oid = ? WHERE repository = ? AND full = ?", (oid, repository.key, full))

    def delete_branch(self, repository: Repository, name: str) -> None:
        """Its commits can still be asked for by their ids. Refuses: no_revision; forbidden for main."""
        if name == MAIN:
            raise _refusal("forbidden", f"the branch {MAIN!r} cannot be deleted")
        self._delete_ref(repository, "refs/heads/", name)

    def create_tag(self, repository: Repository, name: str, *, at: str, message: str = "", author: str = "") -> None:
        """A tag at a revision; it never moves. Refuses: exists, no_revision, bad_request."""
        self._create_ref(repository, "refs/tags/", name, at=at, message=message, author=author)

    def delete_tag(self, repository: Repository, name: str) -> None:
        """Refuses: no_revision."""
        self._delete_ref(repository, "refs/tags/", name)

    def create_pull_request(self, repository: Repository, *, base: str, title: str, author: str) -> int:
        """The number of a new ref `refs/pr/N` at a revision. Refuses: no_revision, bad_request."""
        _check_text(title, author)
        with self._changing(repository) as connection:
            return self._add_pull_request(connection, repository, base=base, title=title, author=author)

    # What commits hold

    def commit_of(self, repository: Repository, oid: str) -> Commit:
        """A commit by its whole id. Refuses: no_revision."""
        commits = self.commits(repository, oid, count=1)
        if not commits:
            raise _refusal("no_revision", f"{repository.id} has no commit {oid!r}")
        return commits[0]

    def commits(self, repository: Repository, oid: str, *, start: int = 0, count: int = 50) -> list[Commit]:
        """A commit and what came before it, newest first, without the first `start`."""
        if not names.is_commit(oid):
            return []
        rows = self.database.read(
            "WITH RECURSIVE line (oid, distance) AS ("
            "  SELECT oid, 0 FROM histories WHERE repository = ? AND oid = ?"
            "  UNION ALL SELECT commits.parent, distance + 1 FROM line JOIN commits USING (oid)"
            "  WHERE commits.parent IS NOT NULL AND distance + 1 < ?)"
            " SELECT oid, parent, text, author, seconds FROM line JOIN commits USING (oid) WHERE distance >= ?"
            " ORDER BY distance LIMIT ?",
            (repository.key, oid, start + count, start, count),
        )
        return [_as_commit(row) for row in rows]

    def entry(self, repository: Repository, commit: str, path: str) -> Entry | None:
        """The file or folder at a path, None where there is none. Refuses: no_revision."""
        tree = self._tree_of(repository, commit)
        found = self._trees.find(tree, path) if path else None
        return self._entries([(path, found)])[0] if found else None

    def entries(
        self,
        repository: Repository,
        commit: str,
        path: str = "",
        *,
        recursive: bool,
        after: str | None = None,
        count: int | None = None,
    ) -> list[Entry]:
        """Files and folders in a folder, sorted by path; with `recursive` also those below.

        `after`: a path; what is not greater is left out. `count`: at most so many.
        Refuses: no_revision; no_entry where the path is no folder.
        """
        tree = self._tree_of(repository, commit)
        if path:
            found = self._trees.find(tree, path)
            if found is None or not found.directory:
                raise _refusal("no_entry", f"{repository.id} has no folder {path!r} at {commit}")
            tree = found.oid
        walk = self._trees.walk(tree, f"{path}/" if path else "", recursive=recursive, after=after or "")
        return self._entries([pair for pair, _ in zip(walk, _up_to(count), strict=False)])

    # Commits

    def commit(
        self,
        repository: Repository,
        ref: str,
        operations: Sequence[Operation],
        *,
        title: str,
        message: str,
        author: str,
        parent: str | None = None,
    ) -> Commit:
        """A commit on a branch (its name) or a pull request (`refs/pr/N`), whole or not at all.

        operations: done one after the other on the tree of the commit before. parent: the id, or its first 7 digits or
        more, of the commit that must be the last one.
        Refuses: no_revision; stale_parent; no_entry where something is deleted that is not there; bad_request with the
        path for what cannot be.
        """
        text = _text(title, message)
        _check_text(text, author)
        prepared = self._prepare(repository, operations)
        with self._changing(repository) as connection:
            full = ref if ref.startswith("refs/") else f"refs/heads/{ref}"
            head = self._target(repository.key, full) if names.is_text(ref) else None
            if head is None or full.startswith("refs/tags/"):
                raise _refusal("no_revision", f"{repository.id} has no branch or pull request {ref!r}")
            return self._advance(
                connection, repository, full, head, prepared, author=author, text=text, expected=parent
            )

    def propose(
        self,
        repository: Repository,
        base: str,
        operations: Sequence[Operation],
        *,
        title: str,
        message: str,
        author: str,
        parent: str | None = None,
    ) -> tuple[int, Commit]:
        """A new pull request at a revision with a commit on it, both or none: its number and the commit.

        Refuses what `commit` and `create_pull_request` refuse.
        """
        text = _text(title, message)
        _check_text(text, author)
        prepared = self._prepare(repository, operations)
        with self._changing(repository) as connection:
            number = self._add_pull_request(connection, repository, base=base, title=title, author=author)
            full = f"refs/pr/{number}"
            head = cast(str, self._target(repository.key, full))
            return number, self._advance(
                connection, repository, full, head, prepared, author=author, text=text, expected=parent
            )

    def has_content(self, repository: Repository, sha256: str) -> bool:
        """Whether this repository may use a content: it was uploaded to it or is in one of its trees, and is here."""
        if sha256 not in self.blobs:
            return False
        where = "repository = ? AND sha256 = ?"
        return bool(self.database.read(f"SELECT 1 FROM contents WHERE {where}", (repository.key, sha256)))

    def note_upload(self, repository: Repository, sha256: str) -> None:
        """Gives a repository the right to a content that somebody who may write to it has sent. Refuses: bad_request
        where the content is not here: it would be another's when it comes."""
        if sha256 not in self.blobs:
            raise _refusal("bad_request", f"there is no content {sha256!r}")
        with self._changing(repository) as connection:
            connection.execute("INSERT OR IGNORE INTO contents VALUES (?, ?)", (repository.key, sha256))

    # Inside

    def _seconds(self) -> int:
        return int(self._clock().timestamp())

    @contextlib.contextmanager
    def _changing(self, repository: Repository) -> Iterator[sqlite3.Connection]:
        """A transaction on a repository that still is there. Refuses: no_repository."""
        with self.database.transaction() as connection:
            self._repository(repository.key)
            yield connection

    def repository_with_key(self, key: int) -> Repository | None:
        """The repository of a key, whatever it is called now."""
        rows = self.database.read(f"SELECT {_REPOSITORY} FROM repositories WHERE key = ?", (key,))
        return _as_repository(rows[0]) if rows else None

    def _repository(self, key: int) -> Repository:
        found = self.repository_with_key(key)
        if found is None:
            raise _refusal("no_repository", "the repository is gone")
        return found

    def _free(self, connection: sqlite3.Connection, type: str, owner: str, name: str) -> None:
        """Makes an id free to be given: no repository has it, and it leads to none. Refuses: exists."""
        id = f"{owner}/{name}" if owner else name
        if self.find_repository(type, id) is not None:
            raise _refusal("exists", f"there already is a {type} {id}")
        connection.execute("DELETE FROM moves WHERE type = ? AND owner = ? AND name = ?", (type, owner, name))

    def _target(self, key: int, full: str) -> str | None:
        rows = self.database.read("SELECT oid FROM refs WHERE repository = ? AND full = ?", (key, full))
        return str(rows[0][0]) if rows else None

    def _create_ref(
        self, repository: Repository, prefix: str, name: str, *, at: str, message: str, author: str
    ) -> None:
        full = prefix + names.check_ref(name)
        _check_text(message, author or "-")
        with self._changing(repository) as connection:
            oid = self.resolve(repository, at)
            if self._target(repository.key, full) is not None:
                raise _refusal("exists", f"{repository.id} already has {full}")
            # As in git, where a ref is a file: a client keeps it so in its cache.
            parts = full.split("/")
            above = ["/".join(parts[:length]) for length in range(3, len(parts))]
            beside = self.database.read(
                "SELECT full FROM refs WHERE repository = ? AND (full IN"
                f" ({', '.join('?' * len(above))}) OR full >= ? AND full < ?) LIMIT 1",
                (repository.key, *above, f"{full}/", f"{full}0"),
            )
            if beside:
                raise _refusal("exists", f"{full} cannot be beside {beside[0][0]}: one would be a folder of the other")
            _add_ref(connection, repository.key, full, oid, message=message, author=author, seconds=self._seconds())

    def _delete_ref(self, repository: Repository, prefix: str, name: str) -> None:
        with self._changing(repository) as connection:
            if not names.is_text(name) or self._target(repository.key, prefix + name) is None:
                raise _refusal("no_revision", f"{repository.id} has no {name!r} to delete")
            connection.execute("DELETE FROM refs WHERE repository = ? AND full = ?", (repository.key, prefix + name))

    def _add_pull_request(
        self, connection: sqlite3.Connection, repository: Repository, *, base: str, title: str, author: str
    ) -> int:
        oid = self.resolve(repository, base)
        rows = self.database.read(
            "SELECT coalesce(max(CAST(substr(full, 9) AS INTEGER)), 0) + 1 FROM refs"
            " WHERE repository = ? AND full >= 'refs/pr/' AND full < 'refs/pr0'",
            (repository.key,),
        )
        number = int(rows[0][0])
        seconds = self._seconds()
        _add_ref(connection, repository.key, f"refs/pr/{number}", oid, message=title, author=author, seconds=seconds)
        return number

    def _prepare(
        self, repository: Repository | None, operations: Sequence[Operation]
    ) -> list[tuple[Operation, _File | None]]:
        """What can be said of operations before the tree is known: names, rights, and ids of files, which takes time.

        A right to a content is never taken back, so that it need not be looked at in the transaction.
        """
        prepared: list[tuple[Operation, _File | None]] = []
        added: set[str] = set()
        for operation in operations:
            if isinstance(operation, DeleteFolder):
                operation = DeleteFolder(operation.path.removesuffix("/"))
            path = names.check_path(operation.path)
            if isinstance(operation, DeleteFile | DeleteFolder):
                prepared.append((operation, None))
                continue
            if path in added:
                raise _refusal("bad_request", f"{path!r} is added twice in one commit")
            added.add(path)
            prepared.append(self._prepared_file(repository, operation))
        return prepared

    def _prepared_file(self, repository: Repository | None, operation: AddFile | AddLfs) -> tuple[Operation, _File]:
        path, sha256 = operation.path, operation.sha256
        if isinstance(operation, AddLfs):
            # What another repository has is spoken of as what is not here at all.
            if repository is None or not self.has_content(repository, sha256):
                raise _refusal("bad_request", f"the LFS content {sha256!r} of {path!r} is not here; upload it first")
            size = self.blobs.size(sha256)
            if operation.size not in (None, size):
                raise _refusal("bad_request", f"{path!r} has {size} bytes; the commit says {operation.size}")
            return operation, _File(object_oid("blob", pointer(sha256, size)), sha256, size, True)
        if sha256 not in self.blobs:
            raise _refusal("bad_request", f"the content {sha256!r} of {path!r} is not here; add it first")
        size = self.blobs.size(sha256)
        if size <= POINTER_BYTES:
            # In git the text of a pointer is the LFS file, so it must not be a way to a content that others have.
            named = read_pointer(self.blobs.path(sha256).read_bytes())
            if named is not None:
                return self._prepared_file(repository, AddLfs(path, *named))
        return operation, _File(self.blobs.oid(sha256), sha256, size, False)

    def _advance(
        self,
        connection: sqlite3.Connection,
        repository: Repository,
        full: str,
        head: str,
        prepared: Sequence[tuple[Operation, _File | None]],
        *,
        author: str,
        text: str,
        expected: str | None,
    ) -> Commit:
        if expected is not None:
            if not names.is_commit_prefix(expected.lower()):
                raise _refusal("bad_request", f"parentCommit is {expected!r}; expected the id of a commit")
            if not head.startswith(expected.lower()):
                raise _refusal(
                    "stale_parent",
                    f"{full} of {repository.id} has moved on: it is at {head}, the commit was made for {expected}",
                )
        oid = self._add_commit(
            connection, repository.key, head, prepared, author=author, seconds=self._seconds(), text=text
        )
        connection.execute("UPDATE refs SET oid = ? WHERE repository = ? AND full = ?", (oid, repository.key, full))
        return self.commit_of(repository, oid)

    def _add_commit(
        self,
        connection: sqlite3.Connection,
        key: int,
        parent: str | None,
        prepared: Sequence[tuple[Operation, _File | None]],
        *,
        author: str,
        seconds: int,
        text: str,
    ) -> str:
        tree = self._tree(key, parent) if parent else None
        if parent and tree is None:
            raise damaged("commit", parent, self.database)
        draft = Draft(self._trees, tree)
        for operation, file in prepared:
            if file is None:
                draft.delete(operation.path, directory=isinstance(operation, DeleteFolder))
            else:
                draft.add(operation.path, file.oid)
                connection.execute("INSERT OR IGNORE INTO files VALUES (?, ?, ?, ?)", dataclasses.astuple(file))
                connection.execute("INSERT OR IGNORE INTO contents VALUES (?, ?)", (key, file.sha256))
        tree = draft.write(connection)
        try:
            oid = commit_oid(tree=tree, parent=parent, author=author, seconds=seconds, text=text)
        except ValueError as error:
            raise _refusal("bad_request", str(error)) from None
        connection.execute(
            "INSERT OR IGNORE INTO commits VALUES (?, ?, ?, ?, ?, ?)", (oid, tree, parent, author, seconds, text)
        )
        connection.execute("INSERT OR IGNORE INTO histories VALUES (?, ?)", (key, oid))
        return oid

    def _tree_of(self, repository: Repository, commit: str) -> str:
        tree = self._tree(repository.key, commit) if names.is_commit(commit) else None
        if tree is None:
            raise _refusal("no_revision", f"{repository.id} has no commit {commit!r}")
        return tree

    def _tree(self, key: int, commit: str) -> str | None:
        rows = self.database.read(
            "SELECT tree FROM histories JOIN commits USING (oid) WHERE repository = ? AND oid = ?", (key, commit)
        )
        return str(rows[0][0]) if rows else None

    def _entries(self, found: Sequence[tuple[str, Child]]) -> list[Entry]:
        wanted = list({child.oid for _, child in found if not child.directory})
        files: dict[str, Row] = {}
        for start in range(0, len(wanted), 500):
            some = wanted[start : start + 500]
            places = ", ".join("?" * len(some))
            rows = self.database.read(f"SELECT oid, sha256, size, lfs FROM files WHERE oid IN ({places})", some)
            files.update((row[0], row) for row in rows)
        entries = []
        for path, child in found:
            if not child.directory and child.oid not in files:
                raise damaged("file", child.oid, self.database)
            _, sha256, size, lfs = ("", None, 0, False) if child.directory else files[child.oid]
            entries.append(
                Entry(path=path, directory=child.directory, oid=child.oid, size=size, sha256=sha256, lfs=bool(lfs))
            )
        return entries


_REPOSITORY = "key, type, owner, name, private, gated, disabled, seconds"


def _as_repository(row: Row) -> Repository:
    key, type, owner, name, private, gated, disabled, seconds = row
    return Repository(
        key=key,
        type=type,
        owner=owner,
        name=name,
        private=bool(private),
        gated=gated or False,
        disabled=bool(disabled),
        created=_date(seconds),
    )


def _as_commit(row: Row) -> Commit:
    oid, parent, text, author, seconds = row
    title, _, message = text.partition("\n")
    return Commit(oid=oid, parent=parent, title=title, message=message.lstrip("\n"), author=author, date=_date(seconds))


def _date(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def _text(title: str, message: str) -> str:
    return f"{title}\n\n{message}" if message else title


def _up_to(count: int | None) -> Iterator[int]:
    number = 0
    while count is None or number < count:
        yield number
        number += 1


def _refusal(kind: Kind, message: str) -> Refusal:
    return Refusal(kind=kind, message=message)


def _check_text(text: str, author: str) -> None:
    if not names.is_text(text + author):
        raise _refusal("bad_request", f"the text {text!r} of {author!r} is not UTF-8")


def _add_ref(
    connection: sqlite3.Connection, key: int, full: str, oid: str, *, message: str, author: str, seconds: int
) -> None:
    connection.execute("INSERT INTO refs VALUES (?, ?, ?, ?, ?, ?)", (key, full, oid, message, author, seconds))
