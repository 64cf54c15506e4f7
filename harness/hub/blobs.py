# SPDX-License-Identifier: Apache-2.0
"""The contents of files, each kept once under its SHA-256: written under another name first, never changed."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import os
import re
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from harness.hub.objects import blob_oid
from harness.hub.refusals import Refusal

_SHA256 = re.compile(r"[0-9a-f]{64}")
_PIECE = 1 << 20
_LARGE_PIECE = 1 << 18
"""From here on a piece is hashed by one thread while another writes it, which takes half the time of both in turn."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
    """A content that is kept: its SHA-256 (64 hexadecimal digits) and its number of bytes."""

    sha256: str
    size: int


class Blobs:
    """The blobs below a root; any number of threads may add and read."""

    def __init__(self, root: Path) -> None:
        self.directory = root / "blobs" / "sha256"
        self.unfinished = root / "unfinished"
        self._numbers = itertools.count()

    def open(self) -> None:
        """Makes the folders, and removes what writers that were killed have left. Nobody may be writing."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.unfinished.mkdir(exist_ok=True)
        for left in self.unfinished.iterdir():
            left.unlink()

    def add(
        self, chunks: Iterable[bytes | memoryview], *, sha256: str | None = None, size: int | None = None
    ) -> Stored:
        """Keeps a content that comes in pieces; memory is needed for one of them.

        Raises Refusal (bad_request) if it is not of the SHA-256 or size that was announced; nothing is kept then.
        """
        path = self.unfinished / f"{os.getpid()}-{next(self._numbers)}"
        digest, length = hashlib.sha256(), 0
        try:
            with path.open("xb") as file:
                for chunk in chunks:
                    length += len(chunk)
                    if size is not None and length > size:
                        raise Refusal(
                            kind="bad_request", message=f"the content is longer than the {size} bytes announced"
                        )
                    if len(chunk) < _LARGE_PIECE:
                        digest.update(chunk)
                        file.write(chunk)
                    else:
                        hashing = threading.Thread(target=digest.update, args=(chunk,))
                        hashing.start()
                        try:
                            file.write(chunk)
                        finally:
                            hashing.join()  # The next piece may be in the same memory.
            found = digest.hexdigest()
            if size is not None and length != size:
                raise Refusal(kind="bad_request", message=f"the content has {length} bytes; announced were {size}")
            if sha256 is not None and found != sha256:
                raise Refusal(kind="bad_request", message=f"the content has SHA-256 {found}; announced was {sha256!r}")
            # Not forced to the disk: a killed process loses nothing, a power loss may, which fsck tells.
            # What is there already is replaced by the same, which also mends a blob that was damaged on disk.
            self._move(path, self.path(found))
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            raise
        return Stored(sha256=found, size=length)

    def path(self, sha256: str) -> Path:
        """Where a content is, or would be. Raises Refusal (bad_request) for what is no SHA-256."""
        if not _SHA256.fullmatch(sha256):
            raise Refusal(kind="bad_request", message=f"{sha256!r} is no SHA-256: expected 64 of 0-9 a-f")
        return self.directory.joinpath(sha256[:2], sha256)

    def __contains__(self, sha256: str) -> bool:
        return _SHA256.fullmatch(sha256) is not None and self.path(sha256).is_file()

    def size(self, sha256: str) -> int:
        """The number of bytes of a content. Raises FileNotFoundError."""
        return self.path(sha256).stat().st_size

    def oid(self, sha256: str) -> str:
        """The id that git gives a content. LFS files, the large ones, never need it. Raises FileNotFoundError."""
        return blob_oid(self.pieces(sha256), size=self.size(sha256))

    def pieces(self, sha256: str) -> Iterator[bytes]:
        """A content in pieces of at most a MiB. Raises FileNotFoundError."""
        with self.path(sha256).open("rb") as file:
            while piece := file.read(_PIECE):
                yield piece

    @staticmethod
    def _move(source: Path, target: Path) -> None:
        try:
            os.replace(source, target)
        except FileNotFoundError:
            target.parent.mkdir(exist_ok=True)
            os.replace(source, target)
