# SPDX-License-Identifier: Apache-2.0
"""What one server was asked and how it answered, in order; each entry is written before its answer is sent."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import threading
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One request and its answer.

    number: counts up from 1. method and target are empty where no request line could be read. status: None where no
    answer is sent. range and user_agent: their beginning. authorised: whether a token came, which is not kept.
    content_length: what the answer announces. received: bytes of the request's body that were read. connection: counts
    up from 1. seconds: from the end of the request's headers until the answer was ready. fault: the `match` of the one
    applied.
    """

    number: int
    request_id: str
    method: str
    target: str
    status: int | None
    range: str | None
    authorised: bool
    user_agent: str | None
    content_length: int | None
    received: int
    connection: int
    seconds: float
    fault: str | None


class Journal:
    """The last `capacity` entries of one server; may be used from any thread."""

    def __init__(self, *, capacity: int = 10_000) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._entries: collections.deque[Entry] = collections.deque(maxlen=capacity)

    def record(self, **fields: Any) -> None:
        """Appends an Entry; `fields` are all of its fields but the number."""
        with self._lock:
            self._entries.append(Entry(number=next(self._numbers), **fields))

    def entries(self, *, after: int = 0) -> list[Entry]:
        """The entries there still are with a higher number than `after`, oldest first."""
        with self._lock:
            return [entry for entry in self._entries if entry.number > after]

    def clear(self) -> None:
        """Forgets the entries; the numbers go on."""
        with self._lock:
            self._entries.clear()

    def as_json(self, *, after: int = 0) -> list[dict[str, Any]]:
        """The entries as JSON objects."""
        return [dataclasses.asdict(entry) for entry in self.entries(after=after)]
