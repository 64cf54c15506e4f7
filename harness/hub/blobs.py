# SPDX-License-Identifier: Apache-2.0
"""The contents of files, each kept once under its SHA-256: written under another name first, never changed."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import itertools
import os
import queue
import re
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from harness.hub.objects import blob_oid
from harness.hub.refusals import Refusal

_SHA256 = re.compile(r"[0-9a-f]{64}")
_PIECE = 1 << 20
_STRIDE = 4 << 20
"""A content that is longer is hashed by a thread of its own, which reads behind the one that writes, so many bytes at a
time: hashing and writing in turn would take the time of both."""


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
            with path.open("x+b", buffering=0) as file, _Hashing(file, digest) as hashing:
                for chunk in chunks:
                    length += len(chunk)
                    if size is not None and length > size:
                        raise Refusal(
                            kind="bad_request", message=f"the content is longer than the {size} bytes announced"
                        )
                    _write(file, chunk)
                    hashing.follow(chunk, length)
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


def _write(file: io.FileIO, chunk: bytes | memoryview) -> None:
    """Writes all of a piece, however little the system takes at once."""
    rest = memoryview(chunk)
    while rest:
        rest = rest[file.write(rest) :]


class _Hashing:
    """Hashes a file while it is written: its beginning at once, what is behind `_STRIDE` in a thread."""

    def __init__(self, file: io.FileIO, digest: hashlib._Hash) -> None:
        self._file, self._digest = file, digest
        self._written: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._asked, self._length = 0, 0
        self._error: OSError | None = None

    def __enter__(self) -> Self:
        return self

    def follow(self, chunk: bytes | memoryview, length: int) -> None:
        """Takes note of a piece after which `length` bytes are written."""
        self._length = length
        if self._thread is None:
            self._digest.update(chunk)
            self._asked = length
            if length >= _STRIDE:
                self._thread = threading.Thread(target=self._read_behind, args=(length,))
                self._thread.start()
        elif length - self._asked >= _STRIDE:
            self._written.put(length)
            self._asked = length

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Waits until everything is hashed. Raises OSError where what was written cannot be read."""
        if self._thread is not None:
            if kind is None:
                self._written.put(self._length)
            self._written.put(None)
            self._thread.join()
            if self._error is not None and kind is None:
                raise self._error

    def _read_behind(self, position: int) -> None:
        buffer = memoryview(bytearray(_PIECE))
        try:
            while (written := self._written.get()) is not None:
                while position < written:
                    count = os.preadv(self._file.fileno(), [buffer[: written - position]], position)
                    self._digest.update(buffer[:count])
                    position += count
        except OSError as error:
            self._error = error
