# SPDX-License-Identifier: Apache-2.0
"""Reads requests off a socket: heads and bodies within their limits of size and time, whatever the client does."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import socket
import time
from collections.abc import Iterator

from harness.hub.parsing import bad, request_line
from harness.hub.refusals import Refusal

BUFFER_BYTES = 256 * 1024
RECEIVED_BYTES = 64 * 1024
CHUNK_LINE_BYTES = 256
_BARE_NEWLINE = re.compile(rb"(?<!\r)\n")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What one client may ask of the server.

    connections: at one time. header_bytes: request line and headers together. headers: how many. target_bytes: of the
    request line's target. idle_seconds: how long a connection may be silent, and how long a head may take.
    slow_bytes: what a body must at least move on by in idle_seconds. drain_bytes: how much of a body that the handler
    left is read to keep the connection. linger_seconds: how long the client's bytes are read after the last answer.
    """

    connections: int = 256
    header_bytes: int = 64 * 1024
    headers: int = 100
    target_bytes: int = 8 * 1024
    idle_seconds: float = 75.0
    slow_bytes: int = 1024
    drain_bytes: int = 1024**3
    linger_seconds: float = 5.0


class Stream:
    """What comes from one client. The socket blocks, with a receive timeout of `limits.idle_seconds`."""

    def __init__(self, connection: socket.socket, *, limits: Limits) -> None:
        self._socket = connection
        self._limits = limits
        self._rest = bytearray()

    def head(self) -> bytes | None:
        """The next request's line and headers without the empty line; None where the client is done or silent.

        Raises Refusal as soon as it is clear that no proper head comes.
        """
        rest, seen, deadline = self._rest, 0, 0.0
        may_be_empty = True  # One empty line before a request is none of it: old clients end their bodies so.
        while True:
            if may_be_empty and rest.startswith(b"\r\n"):
                del rest[:2]
                may_be_empty, seen = False, 0
            end = rest.find(b"\r\n\r\n", max(0, seen - 3))
            if 0 <= end <= self._limits.header_bytes:
                head = bytes(rest[:end])
                del rest[: end + 4]
                return head
            if rest:
                self._check_beginning(seen)
                seen = len(rest)
                deadline = deadline or time.monotonic() + self._limits.idle_seconds
                if time.monotonic() > deadline:
                    raise _too_slow("a request's head")
            try:
                more = self._socket.recv(RECEIVED_BYTES)
            except BlockingIOError:
                if not rest:
                    return None
                raise _too_slow("a request's head") from None
            if not more:
                if not rest:
                    return None
                raise bad("The connection ended in the middle of a request's head.")
            rest += more

    def _check_beginning(self, seen: int) -> None:
        """Looks at what came after the first `seen` bytes of a head that is not complete."""
        newline = self._rest.find(b"\r\n", max(0, seen - 1))
        is_first = newline >= 0 and newline == self._rest.find(b"\r\n")
        if is_first or len(self._rest) > self._limits.header_bytes:
            line = bytes(self._rest.partition(b"\r\n")[0])
            request_line(line, target_bytes=self._limits.target_bytes)
        if len(self._rest) > self._limits.header_bytes:
            message = f"Request line and headers are longer than {self._limits.header_bytes} bytes."
            raise Refusal(kind="headers_too_large", message=message)
        if _BARE_NEWLINE.search(self._rest, seen):
            raise bad("A line of the head ends in a newline alone; HTTP's lines end in CR LF.")

    def waiting(self) -> bool:
        """Whether bytes have come that nobody has read."""
        return bool(self._rest)

    def into(self, view: memoryview) -> int:
        """Fills the view as far as possible before the client ends or pauses too long; how many bytes there are.

        Raises Refusal where there are none: "too_slow" or "bad_request".
        """
        if self._rest:
            count = min(len(self._rest), len(view))
            view[:count] = self._rest[:count]
            del self._rest[:count]
            return count
        try:
            count = self._socket.recv_into(view, 0, socket.MSG_WAITALL)
        except BlockingIOError:
            raise _too_slow("a request's body") from None
        except ConnectionError:
            count = 0
        if count == 0:
            raise bad("The connection ended in the middle of a request's body.")
        return count

    def line(self, *, limit: int) -> bytes:
        """The next line without its CR LF. Raises Refusal where it does not come, is too long or takes too long."""
        deadline = time.monotonic() + self._limits.idle_seconds
        while not 0 <= (end := self._rest.find(b"\r\n")) <= limit:
            if len(self._rest) > limit:
                raise bad("A chunked body has a size or trailer line that is too long.")
            try:
                more = self._socket.recv(RECEIVED_BYTES)
            except BlockingIOError:
                raise _too_slow("a request's body") from None
            except ConnectionError:
                more = b""
            if not more:
                raise bad("The connection ended in the middle of a request's body.")
            if time.monotonic() > deadline:
                raise _too_slow("a request's body")
            self._rest += more
        line = bytes(self._rest[:end])
        del self._rest[: end + 2]
        return line

    def discard(self) -> None:
        """Reads what still comes for a moment, so that the client can read its answer before the connection goes."""
        deadline = time.monotonic() + self._limits.linger_seconds
        self._socket.settimeout(self._limits.linger_seconds)
        while time.monotonic() < deadline and self._socket.recv(RECEIVED_BYTES):
            pass


def _too_slow(what: str) -> Refusal:
    return Refusal(kind="too_slow", message=f"The client took too long to send {what}.")


class IncomingBody:
    """The body of one request, as messages.Body describes it.

    received: bytes that have come. complete: all of it was read. cut: a fault ended it.
    """

    def __init__(
        self,
        stream: Stream,
        connection: socket.socket,
        *,
        length: int | None,
        expects_continue: bool,
        limits: Limits,
        cut_after: int | None = None,
    ) -> None:
        self.length = length
        self.received = 0
        self.complete = length == 0
        self.cut = cut_after == 0 and not self.complete
        self._stream = stream
        self._socket = connection
        self._expects_continue = expects_continue
        self._limits = limits
        self._cut_after = cut_after
        self._source: Iterator[memoryview] = iter(()) if self.complete else self._pieces()

    def read(self, *, limit: int) -> bytes:
        if self.complete:
            return b""
        whole = bytearray()
        for chunk in self.chunks(limit=limit):
            whole += chunk
        return bytes(whole)

    def chunks(self, *, limit: int) -> Iterator[memoryview]:
        if self.length is not None and self.length > limit:
            raise _too_large(limit)
        for chunk in self._source:
            if self.received > limit:
                raise _too_large(limit)
            yield chunk
        if not self.complete:
            raise bad("The request's body cannot be read on: it ended in the middle.")

    def lines(self, *, limit: int, line_limit: int) -> Iterator[bytes]:
        begun = bytearray()
        for chunk in self.chunks(limit=limit):
            for index, part in enumerate(bytes(chunk).split(b"\n")):
                if index:
                    yield bytes(begun)
                    begun.clear()
                begun += part
                if len(begun) > line_limit:
                    raise Refusal(kind="too_large", message=f"A line of the body is longer than {line_limit} bytes.")
        if begun:
            yield bytes(begun)

    def drain(self) -> None:
        """Reads what the handler left, unless it is too much or the client waits to be asked for it."""
        most = self.received + self._limits.drain_bytes
        unasked = self._expects_continue and not self._stream.waiting()
        if self.complete or unasked or (self.length is not None and self.length > most):
            return
        with contextlib.suppress(Refusal):
            for _ in self._source:
                if self.received > most:
                    return

    def _pieces(self) -> Iterator[memoryview]:
        if self._expects_continue and not self._stream.waiting():
            self._socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._expects_continue = False
        buffer = memoryview(bytearray(BUFFER_BYTES if self.length is None else min(self.length, BUFFER_BYTES)))
        waited, before, asked = 0.0, 0, time.monotonic()
        for piece in self._chunked(buffer) if self.length is None else self._counted(buffer, self.length):
            self.received += len(piece)
            if self._cut_after is not None and self.received >= self._cut_after:
                self.cut = True
                raise bad("The connection was reset in the middle of the body, by a fault.")
            waited += time.monotonic() - asked
            if waited > self._limits.idle_seconds:
                if self.received - before < self._limits.slow_bytes:
                    raise _too_slow("a request's body")
                waited, before = 0.0, self.received
            yield piece
            asked = time.monotonic()
        self.complete = True

    def _counted(self, buffer: memoryview, left: int) -> Iterator[memoryview]:
        while left:
            count = self._stream.into(buffer[: self._room(min(left, len(buffer)))])
            left -= count
            yield buffer[:count]

    def _chunked(self, buffer: memoryview) -> Iterator[memoryview]:
        while True:
            size = _CHUNK_SIZE.fullmatch(self._stream.line(limit=CHUNK_LINE_BYTES))
            if size is None:
                raise bad("A chunk of the body does not begin with its size in hexadecimal digits.")
            if int(size[1], 16) == 0:
                break
            yield from self._counted(buffer, int(size[1], 16))
            if self._stream.line(limit=CHUNK_LINE_BYTES):
                raise bad("A chunk of the body is longer than its size says.")
        for _ in range(self._limits.headers + 1):
            if not self._stream.line(limit=self._limits.target_bytes):
                return
        raise Refusal(kind="headers_too_large", message=f"There are more than {self._limits.headers} trailers.")

    def _room(self, most: int) -> int:
        """No more than a fault lets through."""
        return most if self._cut_after is None else max(1, min(most, self._cut_after - self.received))


def _too_large(limit: int) -> Refusal:
    return Refusal(kind="too_large", message=f"The body is longer than {limit} bytes.")
