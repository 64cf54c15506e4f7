# SPDX-License-Identifier: Apache-2.0
"""What a Hub keeps, as data: repositories, their files, commits and refs, and the operations of a commit."""

from __future__ import annotations

import dataclasses
from typing import Literal

Gated = Literal["auto", "manual", False]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repository:
    """A repository as it was when it was asked for. `key` stays when it moves."""

    key: int
    type: str
    owner: str
    name: str
    private: bool
    gated: Gated
    disabled: bool
    created: str

    @property
    def id(self) -> str:
        """`owner/name`, or `name` where there is no owner."""
        return f"{self.owner}/{self.name}" if self.owner else self.name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A file or folder. `oid`: git's id, of an LFS file that of its pointer; `sha256` is None for folders."""

    path: str
    directory: bool
    oid: str
    size: int
    sha256: str | None
    lfs: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Commit:
    """A commit. `title` is the first line of its text and `message` what follows; `date` is ISO 8601 in UTC."""

    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ref:
    """A branch, tag or pull request: `full` is refs/heads/x, refs/tags/x or refs/pr/1, `name` its end.

    `message`, `author` and `date` are those of whoever made it; `message` is the title of a pull request.
    """

    name: str
    full: str
    oid: str
    message: str
    author: str
    date: str


@dataclasses.dataclass(frozen=True)
class AddFile:
    """A file whose content was added to the blobs; the caller has it from whoever commits."""

    path: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class AddLfs:
    """An LFS file whose content this repository has. `size` is compared unless it is None."""

    path: str
    sha256: str
    size: int | None = None


@dataclasses.dataclass(frozen=True)
class DeleteFile:
    """A file that goes."""

    path: str


@dataclasses.dataclass(frozen=True)
class DeleteFolder:
    """A folder that goes with all that is in it; clients write its path with or without a slash at the end."""

    path: str


Operation = AddFile | AddLfs | DeleteFile | DeleteFolder
