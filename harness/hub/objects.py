# SPDX-License-Identifier: Apache-2.0
"""The objects of git and their ids: files, pointers to LFS files, trees and commits are what git would make of them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
_POINTER_PATTERN = re.compile(_POINTER.format(sha256="([0-9a-f]{64})", size="(0|[1-9][0-9]{0,18})").encode())
POINTER_BYTES = 160
"""No pointer is longer."""

_TREE_ENTRY = re.compile(rb"(100644|40000) ([^\0/]+)\0(.{20})", re.DOTALL)


class Child(NamedTuple):
    """What stands under a name in a tree: the id of a blob or of another tree."""

    oid: str
    directory: bool


def object_oid(kind: str, content: bytes) -> str:
    """The id (40 hexadecimal digits) of an object of git: `kind` is blob, tree or commit."""
    return hashlib.sha1(b"%s %d\0%s" % (kind.encode(), len(content), content), usedforsecurity=False).hexdigest()


def blob_oid(chunks: Iterable[bytes | memoryview], *, size: int) -> str:
    """The id of a file that comes in pieces, of `size` bytes together."""
    digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    """The text that stands in git for an LFS file."""
    return _POINTER.format(sha256=sha256, size=size).encode()


def read_pointer(content: bytes) -> tuple[str, int] | None:
    """The sha256 and size that a pointer names; None for a text that is not exactly what `pointer` writes."""
    found = _POINTER_PATTERN.fullmatch(content)
    return (found[1].decode(), int(found[2])) if found else None


def tree_content(children: Mapping[str, Child]) -> bytes:
    """A tree as git keeps it. Files are neither executable nor links."""
    entries = [
        (name.encode() + (b"/" if directory else b""), b"40000" if directory else b"100644", name.encode(), oid)
        for name, (oid, directory) in children.items()
    ]
    entries.sort()  # In git a folder stands where its name with a slash would.
    return b"".join([b"%s %s\0%s" % (mode, name, bytes.fromhex(oid)) for _, mode, name, oid in entries])


def read_tree(content: bytes) -> dict[str, Child]:
    """The children of a tree in git's order. Raises ValueError for what `tree_content` would not write."""
    found = _TREE_ENTRY.findall(content)
    if sum(len(mode) + len(name) + 22 for mode, name, _ in found) != len(content):
        raise ValueError(f"a tree of {len(content)} bytes that is no list of files and folders")
    return {name.decode(): Child(oid.hex(), mode == b"40000") for mode, name, oid in found}


def commit_content(*, tree: str, parent: str | None, author: str, seconds: int, text: str) -> bytes:
    """A commit as git keeps it. `seconds` since 1970, in UTC; `text` is its whole message.

    Raises ValueError where an author or text would make another commit of it: control characters, < or > in the name.
    """
    if not author.strip() or re.search(r"[\x00-\x1f<>]", author) or "\0" in text:
        raise ValueError(f"the author {author!r} or the text of the commit has characters that git keeps for itself")
    who = f"{author} <{author}@localhost> {seconds} +0000"
    lines = [f"tree {tree}", *([f"parent {parent}"] if parent else []), f"author {who}", f"committer {who}"]
    return ("\n".join(lines) + f"\n\n{text}\n").encode()


def commit_oid(*, tree: str, parent: str | None, author: str, seconds: int, text: str) -> str:
    """The id of a commit, which is its revision."""
    content = commit_content(tree=tree, parent=parent, author=author, seconds=seconds, text=text)
    return object_oid("commit", content)
