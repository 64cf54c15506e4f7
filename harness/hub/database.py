# SPDX-License-Identifier: Apache-2.0
"""The metadata of a Hub in one sqlite file, and the lock by which a directory belongs to one server at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from harness.errors import DescriptionError

FILE = "hub.sqlite"
LOCK = "lock"
SCHEMA_VERSION = 1
APPLICATION = 0x48756221  # Stands in the file, so that no other sqlite file is taken for a Hub's.

Row = tuple[Any, ...]


class Database:
    """One connection, used by one thread at a time.

    Whatever is written is written by `transaction`, whole or not at all.
    """

    def __init__(self, root: Path, *, schema: str) -> None:
        """Opens or makes the metadata of `root`, which the caller has locked, with the tables of `schema`.

        Raises DescriptionError where the file is no Hub's or was made by a newer version of it.
        """
        self.path = root / FILE
        self._lock = threading.RLock()
        self._connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        try:
            if not check_schema(self._connection, self.path):
                self._connection.execute("PRAGMA synchronous = OFF")  # There is nothing yet that could be lost.
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA foreign_keys = ON")
            self.execute_script(
                f"PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {SCHEMA_VERSION}; {schema}"
            )
            # A commit is in the write-ahead log when it is acknowledged, so that a killed process loses none. The log
            # is not forced to the disk each time: after a power loss the last commits can be gone, but each whole.
            self._connection.execute("PRAGMA synchronous = NORMAL")
        except BaseException:
            self._connection.close()
            raise

    def execute_script(self, script: str) -> None:
        """Runs several statements in one transaction: `CREATE TABLE IF NOT EXISTS ...`."""
        with self._lock:
            try:
                self._connection.executescript(f"BEGIN IMMEDIATE; {script}; COMMIT;")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.rollback()
                raise

    def read(self, sql: str, parameters: Sequence[Any] = ()) -> list[Row]:
        """All rows of a query."""
        with self._lock:
            return self._connection.execute(sql, parameters).fetchall()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """A connection whose statements are kept together, at the end, or not at all where the block raises.

        `read` in the same thread sees what was written so far. Not to be nested.
        """
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Ends it; the file can be copied then."""
        with self._lock:
            self._connection.close()


def check_schema(connection: sqlite3.Connection, path: Path) -> bool:
    """Whether there is something in the file. Raises DescriptionError unless it is a Hub's that this version reads."""
    try:
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        tables = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
    except sqlite3.DatabaseError as error:
        raise DescriptionError(f"{path} cannot be read as the metadata of a Hub ({error}); give another root") from None
    if application != APPLICATION and (application or version or tables):
        raise DescriptionError(f"{path} is a database of another program; give another root")
    if version > SCHEMA_VERSION:
        raise DescriptionError(
            f"{path} was made by a newer version: its schema is {version}, this one reads up to {SCHEMA_VERSION}; "
            "update parity-harness or give another root"
        )
    return bool(application)


@contextlib.contextmanager
def locked(root: Path, *, make: bool = False) -> Iterator[None]:
    """Holds the directory for this process; with `make` it need not be there.

    Raises DescriptionError where another process has it, with that one's id, or where it is no directory to write in.
    """
    try:
        if make:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)  # What is private is so on the disk.
        descriptor = os.open(root / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise DescriptionError(f"{root} cannot be the root of a Hub ({error.strerror}); give another root") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise DescriptionError(
                f"{root} is in use by another Hub (process {holder}); stop that one or give another root"
            ) from None
        except OSError as error:
            raise DescriptionError(f"{root} cannot be locked ({error.strerror}); give a root on a local disk") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        try:
            yield
        finally:
            os.ftruncate(descriptor, 0)
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # Also for a forked child, which has the descriptor too.
    finally:
        os.close(descriptor)  # The file stays: whoever removed it would let two others lock two files of that name.
