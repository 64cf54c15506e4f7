# SPDX-License-Identifier: Apache-2.0
"""Turns an answer into bytes on a socket, files by sendfile, and does to them what a fault asks for."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import socket
import struct
import termios
import threading
import time
from collections.abc import Iterator, Mapping
from http import HTTPStatus

from harness.hub.faults import Fault
from harness.hub.messages import FilePart, Response

INLINE_BYTES = 64 * 1024
SENT_AT_ONCE = 2**30
DELIVERED_SECONDS = 2.0
_PHRASES = {status.value: status.phrase for status in HTTPStatus}
_FRAMING = ("content-length", "transfer-encoding", "connection", "x-request-id")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
    """The bytes of an open file from `start` to `stop`."""

    file: int
    start: int
    stop: int


Piece = bytes | Span


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What goes onto the socket. content_length: as announced. last: the connection ends after it."""

    head: bytes
    pieces: tuple[Piece, ...]
    content_length: int | None
    last: bool


@contextlib.contextmanager
def opened(content: bytes | FilePart) -> Iterator[tuple[Piece, ...]]:
    """The content in pieces; a small file is read, a large one stays open meanwhile.

    Raises OSError where the file cannot be read, ValueError where it has no such bytes.
    """
    if isinstance(content, bytes):
        yield (content,) if content else ()
        return
    file = os.open(content.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(file).st_size
        if not 0 <= content.start <= content.stop <= size:
            raise ValueError(f"{content.path} has {size} bytes, not those from {content.start} to {content.stop}")
        span = Span(file=file, start=content.start, stop=content.stop)
        yield (_bytes_of(span),) if _size(span) <= INLINE_BYTES else (span,)
    finally:
        os.close(file)


def _bytes_of(span: Span) -> bytes:
    return os.pread(span.file, span.stop - span.start, span.start)


def _size(piece: Piece) -> int:
    return len(piece) if isinstance(piece, bytes) else piece.stop - piece.start


def _slice(piece: Piece, start: int, stop: int) -> Piece:
    if isinstance(piece, bytes):
        return piece[start:stop]
    return Span(file=piece.file, start=piece.start + start, stop=piece.start + stop)


def _first(pieces: tuple[Piece, ...], count: int) -> tuple[Piece, ...]:
    kept: list[Piece] = []
    for piece in pieces:
        size = min(_size(piece), count)
        if size:
            kept.append(_slice(piece, 0, size))
        count -= size
    return tuple(kept)


def _flipped(pieces: tuple[Piece, ...], offset: int) -> tuple[Piece, ...]:
    """With every bit turned of the byte at `offset`; there is one piece at most."""
    if not pieces or offset >= _size(pieces[0]):
        return pieces
    piece = pieces[0]
    one = _slice(piece, offset, offset + 1)
    wrong = bytes((255 - (one if isinstance(one, bytes) else _bytes_of(one))[0],))
    parts = (_slice(piece, 0, offset), wrong, _slice(piece, offset + 1, _size(piece)))
    return tuple(part for part in parts if _size(part))


def answer_to(
    method: str,
    response: Response,
    pieces: tuple[Piece, ...],
    *,
    request_id: str,
    keep_alive: bool,
    fault: Fault | None = None,
) -> Answer:
    """The answer's bytes. Its length, the connection's fate and the request's id are set here, for every answer.

    Raises ValueError where a header cannot be sent.
    """
    bare = response.status in (204, 304)
    if bare:
        pieces = ()
    if fault is not None and fault.truncate is not None:
        pieces = _first(pieces, fault.truncate)
    if fault is not None and fault.flip is not None:
        pieces = _flipped(pieces, fault.flip)
    size = sum(_size(piece) for piece in pieces)
    headers = {name: value for name, value in response.headers.items() if name.lower() not in _FRAMING}
    if not bare:
        headers["Content-Length"] = str(size)
    headers["X-Request-Id"] = request_id
    if fault is not None and fault.length is not None:
        headers["Content-Length"] = str(fault.length)
    if fault is not None and fault.set_headers is not None:
        headers = changed(headers, fault.set_headers)
    announced = next((value for name, value in headers.items() if name.lower() == "content-length"), None)
    length = int(announced) if announced is not None and announced.isdecimal() else None
    if method == "HEAD":
        pieces = ()
    elif not bare:
        keep_alive = keep_alive and length == size
    if not keep_alive:
        headers = {"Connection": "close", **headers}
    return Answer(head=_head(response.status, headers), pieces=pieces, content_length=length, last=not keep_alive)


def changed(headers: Mapping[str, str], changes: Mapping[str, str | None]) -> dict[str, str]:
    """The headers with some replaced, added, or left out where None; names are compared without case."""
    lowered = {name.lower() for name in changes}
    kept = {name: value for name, value in headers.items() if name.lower() not in lowered}
    return {**kept, **{name: value for name, value in changes.items() if value is not None}}


def _head(status: int, headers: Mapping[str, str]) -> bytes:
    lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
    text = "".join(lines)
    if text.count("\n") != len(lines) or text.count("\r") != len(lines) or "\0" in text:
        raise ValueError(f"a header has a line break or a NUL: {headers!r}")
    return f"HTTP/1.1 {status} {_PHRASES.get(status, 'Unknown')}\r\n{text}\r\n".encode("latin-1")


def send(connection: socket.socket, answer: Answer, fault: Fault | None, *, stopping: threading.Event) -> bool:
    """Sends it as the fault allows; whether the connection may be used on.

    Raises OSError where the client is gone or reads too slowly: the socket has a send timeout.
    """
    limit = _cut_at(fault)
    if limit is None and (fault is None or fault.throttle is None):
        _send_all(connection, answer.head, answer.pieces)
        return not answer.last
    pieces = answer.pieces if limit is None else _first(answer.pieces, limit)
    if fault is not None and fault.throttle is not None:
        connection.sendall(answer.head)
        _send_slowly(connection, pieces, bytes_per_second=fault.throttle, stopping=stopping)
    else:
        _send_all(connection, answer.head, pieces)
    if fault is None or limit is None:
        return not answer.last
    if fault.reset_after is not None:
        _wait_until_delivered(connection, stopping)
        reset(connection)
    elif fault.stall is not None:
        _stall(connection)
    return False


def _cut_at(fault: Fault | None) -> int | None:
    if fault is None:
        return None
    return next((at for at in (fault.reset_after, fault.close_after, fault.stall) if at is not None), None)


def _send_all(connection: socket.socket, head: bytes, pieces: tuple[Piece, ...]) -> None:
    begin = head
    for piece in pieces:
        if isinstance(piece, bytes) and len(begin) + len(piece) <= 2 * INLINE_BYTES:
            begin += piece
            continue
        connection.sendall(begin)
        begin = b""
        _send_piece(connection, piece)
    if begin:
        connection.sendall(begin)


def _send_piece(connection: socket.socket, piece: Piece) -> None:
    if isinstance(piece, bytes):
        # sendall's time is for the whole of it, so a large one goes in parts.
        view = memoryview(piece)
        for start in range(0, len(view), INLINE_BYTES):
            connection.sendall(view[start : start + INLINE_BYTES])
        return
    at = piece.start
    while at < piece.stop:
        count = os.sendfile(connection.fileno(), piece.file, at, min(piece.stop - at, SENT_AT_ONCE))
        if count == 0:
            raise OSError(f"the file ended at {at}, in the middle of what was announced")
        at += count


def _send_slowly(
    connection: socket.socket, pieces: tuple[Piece, ...], *, bytes_per_second: int, stopping: threading.Event
) -> None:
    step = max(1, min(bytes_per_second // 20, INLINE_BYTES))
    began, sent = time.monotonic(), 0
    for piece in pieces:
        for start in range(0, _size(piece), step):
            part = _slice(piece, start, min(start + step, _size(piece)))
            sent += _size(part)
            if stopping.wait(max(0.0, began + sent / bytes_per_second - time.monotonic())):
                raise OSError("the server stops")
            _send_piece(connection, part)


def _stall(connection: socket.socket) -> None:
    """Until the client goes or the server stops, which shuts the connection down."""
    scratch = bytearray(INLINE_BYTES)
    while True:
        with contextlib.suppress(BlockingIOError):
            if not connection.recv_into(scratch):
                return


def _wait_until_delivered(connection: socket.socket, stopping: threading.Event) -> None:
    """A reset throws away what was not delivered yet; so the client gets the bytes it is to get, if it reads them."""
    deadline = time.monotonic() + DELIVERED_SECONDS
    # Where the system does not say what is still on its way, all of that time is given.
    with contextlib.suppress(OSError):
        while time.monotonic() < deadline:
            waiting = struct.unpack("i", fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4)))[0]
            if waiting == 0 or stopping.wait(0.001):
                return
    stopping.wait(deadline - time.monotonic())


def reset(connection: socket.socket) -> None:
    """Ends the connection by TCP reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
