# SPDX-License-Identifier: Apache-2.0
"""Verifies a Hub: every content, tree and commit is what its id says, and every ref leads to a commit that is whole."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import sqlite3
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from harness.errors import DescriptionError
from harness.hub.blobs import Blobs
from harness.hub.database import FILE, check_schema, locked
from harness.hub.names import check_ref
from harness.hub.objects import Child, commit_oid, object_oid, pointer, read_tree
from harness.hub.refusals import Refusal
from harness.hub.store import MAIN, Store

NOTHING = "nothing"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that is not as it was written: what it is, where, what should be there and what is."""

    what: str
    where: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.what}: {self.where}: expected {self.expected}, found {self.found}"


class _Commit(NamedTuple):
    tree: str
    parent: str | None


class _File(NamedTuple):
    sha256: str
    size: int
    lfs: bool


def fsck(where: Path | Store, *, note: Callable[[str], None] = lambda line: None) -> list[Problem]:
    """All problems of a root that no server has, or of a store of this process. Changes nothing.

    note: is told, line by line, what is no problem but is of no use: what deleted repositories and killed servers left.
    Raises DescriptionError where the path holds no Hub, another process has it, or a newer version made it.
    """
    if isinstance(where, Store):
        return _verify(where.root, note)
    if not (where / FILE).is_file():
        raise DescriptionError(f"{where} holds no Hub: there is no {FILE}; give the root that a Hub was started with")
    with locked(where):
        return _verify(where, note)


def _verify(root: Path, note: Callable[[str], None]) -> list[Problem]:
    path = (root / FILE).resolve()
    problems: list[Problem] = []
    # One read transaction: what a running store adds meanwhile is not looked at.
    with contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as connection:
        check_schema(connection, path)
        connection.isolation_level = None
        connection.execute("BEGIN")
        try:
            _rows(connection, problems)
            commits = _commits(connection, problems)
            trees = _trees(connection, problems)
            files = _files(connection, problems)
            _links(commits, trees, files, problems)
            _repositories(connection, commits, problems)
            contents = {sha256 for (sha256,) in connection.execute("SELECT DISTINCT sha256 FROM contents")}
            held = {oid for (oid,) in connection.execute("SELECT DISTINCT oid FROM histories")}
        except sqlite3.DatabaseError as error:
            return [
                *problems,
                Problem(what="database", where=str(path), expected="one that can be read", found=str(error)),
            ]
    kept = _blobs(Blobs(root), files, contents, problems, note)
    _orphans(commits, trees, files, kept - contents, held, note)
    return problems


def _recomputed(make: Callable[..., str], *arguments: object, **keywords: object) -> str:
    """The id of a row that can hold anything by now."""
    try:
        return make(*arguments, **keywords)
    except (ValueError, TypeError, AttributeError) as error:
        return f"a row of which there is none: {error}"


def _rows(connection: sqlite3.Connection, problems: list[Problem]) -> None:
    for (line,) in connection.execute("PRAGMA integrity_check"):
        if line != "ok":
            problems.append(Problem(what="database", where=FILE, expected="ok", found=str(line)))
    for table, _, parent, _ in connection.execute("PRAGMA foreign_key_check"):
        problems.append(Problem(what="row", where=table, expected=f"one of {parent} that it belongs to", found=NOTHING))


def _commits(connection: sqlite3.Connection, problems: list[Problem]) -> dict[str, _Commit]:
    """Tree and parent of every commit."""
    commits = {}
    for oid, tree, parent, author, seconds, text in connection.execute(
        "SELECT oid, tree, parent, author, seconds, text FROM commits ORDER BY oid"
    ):
        commits[oid] = _Commit(tree, parent)
        found = _recomputed(commit_oid, tree=tree, parent=parent, author=author, seconds=seconds, text=text)
        if found != oid:
            problems.append(Problem(what="commit", where=oid, expected=oid, found=found))
    return commits


def _trees(connection: sqlite3.Connection, problems: list[Problem]) -> dict[str, Mapping[str, Child]]:
    trees: dict[str, Mapping[str, Child]] = {}
    for oid, content in connection.execute("SELECT oid, content FROM trees ORDER BY oid"):
        found = _recomputed(object_oid, "tree", content)
        if found != oid:
            problems.append(Problem(what="tree", where=oid, expected=oid, found=found))
        try:
            trees[oid] = read_tree(content)
        except (ValueError, TypeError) as error:
            trees[oid] = {}
            problems.append(Problem(what="tree", where=oid, expected="a list of files and folders", found=str(error)))
    return trees


def _files(connection: sqlite3.Connection, problems: list[Problem]) -> dict[str, _File]:
    """Every file by its id, which of an LFS file is that of its pointer. Those of the others need their content."""
    files = {}
    for oid, sha256, size, lfs in connection.execute("SELECT oid, sha256, size, lfs FROM files ORDER BY oid"):
        files[oid] = _File(sha256, size, bool(lfs))
        found = _recomputed(lambda sha256, size: object_oid("blob", pointer(sha256, size)), sha256, size)
        if lfs and found != oid:
            problems.append(Problem(what="LFS file", where=oid, expected=oid, found=found))
    return files


def _links(
    commits: Mapping[str, _Commit],
    trees: Mapping[str, Mapping[str, Child]],
    files: Mapping[str, _File],
    problems: list[Problem],
) -> None:
    """What commits and trees name is there."""
    for oid, commit in commits.items():
        if commit.tree not in trees:
            problems.append(Problem(what="tree of a commit", where=oid, expected=commit.tree, found=NOTHING))
        if commit.parent is not None and commit.parent not in commits:
            problems.append(Problem(what="parent of a commit", where=oid, expected=commit.parent, found=NOTHING))
    for oid, children in trees.items():
        for name, child in children.items():
            if child.oid not in (trees if child.directory else files):
                what = "folder in a tree" if child.directory else "file in a tree"
                problems.append(Problem(what=what, where=f"{name!r} in {oid}", expected=child.oid, found=NOTHING))


def _repositories(connection: sqlite3.Connection, commits: Mapping[str, _Commit], problems: list[Problem]) -> None:
    """Every repository has a main branch; its refs lead to commits of its own, and so does each of its commits."""
    ids = {
        key: f"{type} {owner}/{name}"
        for key, type, owner, name in connection.execute("SELECT key, type, owner, name FROM repositories")
    }
    histories = set(connection.execute("SELECT repository, oid FROM histories").fetchall())
    refs = connection.execute("SELECT repository, full, oid FROM refs ORDER BY repository, full").fetchall()
    for key, full, oid in refs:
        where = f"{full} of {ids.get(key, key)}"
        if oid not in commits or (key, oid) not in histories:
            problems.append(Problem(what="ref", where=where, expected="a commit of the repository", found=str(oid)))
        if not _is_ref(full):
            problems.append(Problem(what="ref", where=where, expected="a name that a ref can have", found=repr(full)))
    for key in sorted(set(ids) - {key for key, full, _ in refs if full == f"refs/heads/{MAIN}"}):
        problems.append(Problem(what="repository", where=ids[key], expected=f"a branch {MAIN}", found=NOTHING))
    for key, oid in sorted(histories):
        where = f"{oid} of {ids.get(key, key)}"
        if oid not in commits:
            problems.append(Problem(what="commit", where=where, expected=oid, found=NOTHING))
        elif (parent := commits[oid].parent) is not None and (key, parent) not in histories:
            problems.append(Problem(what="commit before", where=where, expected=parent, found=NOTHING))


def _is_ref(full: str) -> bool:
    kind, _, name = full.removeprefix("refs/").partition("/")
    if kind == "pr":
        return name.isdecimal()
    try:
        return full.startswith("refs/") and kind in ("heads", "tags") and bool(check_ref(name))
    except Refusal:
        return False


def _blobs(
    blobs: Blobs,
    files: Mapping[str, _File],
    contents: Set[str],
    problems: list[Problem],
    note: Callable[[str], None],
) -> set[str]:
    """Every content is read once. Gives the SHA-256 of all that are there."""
    used: dict[str, list[str]] = {sha256: [] for sha256 in contents}
    for oid, file in files.items():
        used.setdefault(file.sha256, []).append(oid)
    kept = set()
    for path in sorted(path for path in blobs.directory.rglob("*") if not path.is_dir()):
        if path.name not in blobs or blobs.path(path.name) != path:
            note(f"{path} is no content and is not used")
            continue
        kept.add(path.name)
        oids = used.get(path.name, [])
        size = blobs.size(path.name)
        sha256 = hashlib.sha256()
        sha1 = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        plain = any(not files[oid].lfs for oid in oids)
        for piece in blobs.pieces(path.name):
            sha256.update(piece)
            if plain:
                sha1.update(piece)
        if sha256.hexdigest() != path.name:
            problems.append(Problem(what="content", where=str(path), expected=path.name, found=sha256.hexdigest()))
        for oid in oids:
            file = files[oid]
            if size != file.size:
                problems.append(
                    Problem(what="size", where=f"{path} of {oid}", expected=str(file.size), found=str(size))
                )
            if not file.lfs and sha1.hexdigest() != oid:
                problems.append(Problem(what="id in git", where=str(path), expected=oid, found=sha1.hexdigest()))
    for name in sorted(set(used) - kept):
        where = ", ".join(used[name]) or "an upload"
        problems.append(Problem(what="content", where=f"of {where}", expected=name, found=NOTHING))
    if unfinished := list(blobs.unfinished.glob("*")):
        note(f"{len(unfinished)} unfinished uploads; the next Hub that opens the root removes them")
    return kept


def _orphans(
    commits: Mapping[str, _Commit],
    trees: Mapping[str, Mapping[str, Child]],
    files: Mapping[str, _File],
    blobs: Set[str],
    held: Set[str],
    note: Callable[[str], None],
) -> None:
    """Notes what belongs to no repository. `blobs`: contents that no repository has a right to by an upload."""
    waiting = [commits[oid].tree for oid in held if oid in commits]
    used_trees: set[str] = set()
    used_files: set[str] = set()
    while waiting:
        tree = waiting.pop()
        if tree in used_trees or tree not in trees:
            continue
        used_trees.add(tree)
        for child in trees[tree].values():
            if child.directory:
                waiting.append(child.oid)
            else:
                used_files.add(child.oid)
    used_blobs = {files[oid].sha256 for oid in used_files if oid in files}
    for what, orphans in (
        ("commits", set(commits) - held),
        ("trees", set(trees) - used_trees),
        ("files", set(files) - used_files),
        ("contents", blobs - used_blobs),
    ):
        if orphans:
            note(f"{len(orphans)} {what} belong to no repository: {', '.join(sorted(orphans)[:3])}, ...")
