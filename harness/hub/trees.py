# SPDX-License-Identifier: Apache-2.0
"""The folders of commits: found, walked in the order of paths, and changed without touching what stays."""

from __future__ import annotations

import collections
import dataclasses
import sqlite3
import threading
from collections.abc import Iterator, Mapping

from harness.hub.database import Database
from harness.hub.objects import Child, object_oid, read_tree, tree_content
from harness.hub.refusals import Kind, Refusal

SCHEMA = """
-- Each folder as git keeps it, once, whatever commits it is in.
CREATE TABLE IF NOT EXISTS trees (oid TEXT PRIMARY KEY, content BLOB NOT NULL);
"""
KEPT_ENTRIES = 50_000
"""How many entries of folders are kept in memory, about 300 bytes each."""


class Trees:
    """The trees of a database. They never change, so that those asked for last are kept in memory."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._kept: collections.OrderedDict[str, dict[str, Child]] = collections.OrderedDict()
        self._entries = 0

    def children(self, oid: str) -> Mapping[str, Child]:
        """What is in a folder, by name. Raises RuntimeError where the database has lost or damaged it."""
        with self._lock:
            if oid in self._kept:
                self._kept.move_to_end(oid)
                return self._kept[oid]
        rows = self._database.read("SELECT content FROM trees WHERE oid = ?", (oid,))
        try:
            children = read_tree(rows[0][0])
        except (IndexError, ValueError):
            raise damaged("tree", oid, self._database) from None
        with self._lock:
            if oid not in self._kept:
                self._kept[oid] = children
                self._entries += len(children) + 1
            while self._entries > KEPT_ENTRIES and len(self._kept) > 1:
                self._entries -= len(self._kept.popitem(last=False)[1]) + 1
        return children

    def find(self, tree: str, path: str) -> Child | None:
        """What is at a path below a tree; the tree itself at the empty one."""
        found = Child(tree, True)
        for segment in path.split("/") if path else ():
            child = self.children(found.oid).get(segment) if found.directory else None
            if child is None:
                return None
            found = child
        return found

    def walk(self, tree: str, prefix: str, *, recursive: bool, after: str) -> Iterator[tuple[str, Child]]:
        """Files and folders with their paths, which begin with `prefix` and are greater than `after`, in the order of
        paths: `a.txt` stands between `a` and `a/b`."""
        children = self.children(tree)
        # A folder stands twice: as itself, and where what is in it begins.
        places = [(path, child, False) for name, child in children.items() if (path := prefix + name) > after]
        if recursive:
            folders = [(f"{prefix}{name}/", child, True) for name, child in children.items() if child.directory]
            places += [folder for folder in folders if folder[0] > after or after.startswith(folder[0])]
        for path, child, inside in sorted(places):
            if inside:
                yield from self.walk(child.oid, path, recursive=True, after=after)
            else:
                yield path, child


@dataclasses.dataclass
class _Folder:
    """A folder that is being changed, and those in it that are."""

    children: dict[str, Child]
    opened: dict[str, _Folder] = dataclasses.field(default_factory=dict)


class Draft:
    """The tree of a commit to be: that of the commit before, and changes. Only the folders on their way are read."""

    def __init__(self, trees: Trees, tree: str | None) -> None:
        self._trees = trees
        self._root = self._open(tree)

    def add(self, path: str, oid: str) -> None:
        """A file, in the place of another one or new. Refuses (bad_request) where a file and a folder would meet."""
        *above, name = path.split("/")
        folder = self._root
        for index, segment in enumerate(above):
            child = folder.children.setdefault(segment, Child("", True))
            if not child.directory:
                place = "/".join(above[: index + 1])
                raise _refusal("bad_request", f"{path!r} cannot be added: {place!r} is a file")
            folder = self._below(folder, segment, child)
        if name in folder.children and folder.children[name].directory:
            raise _refusal("bad_request", f"{path!r} cannot be added: a folder has that name")
        folder.children[name] = Child(oid, False)

    def delete(self, path: str, *, directory: bool) -> None:
        """A file goes, or a folder with all that is in it, and folders that are empty then, which git does not have.

        Refuses (no_entry) where there is none.
        """
        *above, name = path.split("/")
        way = [self._root]
        for segment in above:
            child = way[-1].children.get(segment)
            if child is None or not child.directory:
                raise _missing(path)
            way.append(self._below(way[-1], segment, child))
        if name not in way[-1].children or way[-1].children[name].directory != directory:
            raise _missing(path)
        _remove(way.pop(), name)
        for folder, segment in zip(reversed(way), reversed(above), strict=True):
            if not folder.opened[segment].children:
                _remove(folder, segment)

    def write(self, connection: sqlite3.Connection) -> str:
        """Keeps what was changed; gives the id of the whole."""
        return _write(connection, self._root)

    def _open(self, tree: str | None) -> _Folder:
        return _Folder(dict(self._trees.children(tree)) if tree else {})

    def _below(self, folder: _Folder, name: str, child: Child) -> _Folder:
        if name not in folder.opened:
            folder.opened[name] = self._open(child.oid or None)
        return folder.opened[name]


def _remove(folder: _Folder, name: str) -> None:
    del folder.children[name]
    folder.opened.pop(name, None)


def _write(connection: sqlite3.Connection, folder: _Folder) -> str:
    for name, opened in folder.opened.items():
        folder.children[name] = Child(_write(connection, opened), True)
    content = tree_content(folder.children)
    oid = object_oid("tree", content)
    connection.execute("INSERT OR IGNORE INTO trees VALUES (?, ?)", (oid, content))
    return oid


def damaged(what: str, oid: str, database: Database) -> RuntimeError:
    """To be raised where something is not there that must be: no request can be the cause."""
    return RuntimeError(f"the {what} {oid} is missing from {database.path} or damaged; run parity hub fsck")


def _refusal(kind: Kind, message: str) -> Refusal:
    return Refusal(kind=kind, message=message)


def _missing(path: str) -> Refusal:
    return _refusal("no_entry", f"A file with this name doesn't exist: {path!r}")
