# SPDX-License-Identifier: Apache-2.0
"""Plain sockets for the tests of the wire: a server around a handler, and HTTP read back byte by byte."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from harness.hub.faults import Faults
from harness.hub.journal import Journal
from harness.hub.messages import Handler, Request, Response, json_response
from harness.hub.wire import Wire

GET = b"GET /here HTTP/1.1\r\nHost: hub\r\n\r\n"
LIMIT = 2**30
SECONDS = 20.0


def echo(request: Request) -> Response:
    """Says what came."""
    body = request.body.read(limit=LIMIT)
    return json_response({"method": request.method, "path": request.path, "body": body.decode("latin-1")})


@dataclasses.dataclass(frozen=True)
class Served:
    """A server that runs, and what it was told."""

    wire: Wire
    faults: Faults
    journal: Journal
    log: list[str]


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer; headers by lower-case name. `whole` is False where it ended before its length."""

    status: int
    headers: Mapping[str, str]
    content: bytes
    whole: bool = True


def threads_of(wire: Wire) -> list[str]:
    """The threads of one server, by name."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(f"hub {wire.port} ")]


@contextlib.contextmanager
def serving(handler: Handler = echo, **options: Any) -> Iterator[Served]:
    """A server on a port of its own; leaves no thread."""
    log: list[str] = []
    faults, journal = Faults(), options.pop("journal", Journal())
    wire = Wire(handler, faults=faults, journal=journal, log=log.append, **{"move": log.append, **options})
    wire.start()
    try:
        yield Served(wire, faults, journal, log)
    finally:
        wire.stop()
    assert threads_of(wire) == []


def connected(served: Served) -> socket.socket:
    """A connection to it."""
    connection = socket.create_connection(("127.0.0.1", served.wire.port), timeout=SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def received(connection: socket.socket) -> bytes:
    """Everything until the server ends the connection; ConnectionResetError where it does so by reset."""
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def said(served: Served, data: bytes) -> bytes:
    """Everything the server answers to these bytes on a connection that ends after them."""
    with connected(served) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        return received(connection)


def answers(data: bytes, *, methods: tuple[str, ...] = ()) -> list[Answer]:
    """All answers in the bytes, read strictly; AssertionError where they are no HTTP. `methods` are those asked."""
    found: list[Answer] = []
    while data:
        head, end, data = data.partition(b"\r\n\r\n")
        assert end, head
        first, *lines = head.split(b"\r\n")
        status = re.fullmatch(rb"HTTP/1\.1 ([1-5][0-9][0-9]) [A-Z][A-Za-z '-]+", first)
        assert status, first
        headers: dict[str, str] = {}
        for line in lines:
            name, colon, value = line.decode("latin-1").partition(": ")
            assert colon and re.fullmatch(r"[A-Za-z-]+", name) and name.lower() not in headers, line
            headers[name.lower()] = value
        number = len([answer for answer in found if answer.status >= 200])
        bare = methods[number : number + 1] == ("HEAD",) or int(status[1]) < 200 or int(status[1]) in (204, 304)
        length = 0 if bare else int(headers.get("content-length", len(data)))
        found.append(Answer(int(status[1]), headers, data[:length], len(data) >= length))
        data = data[length:]
    return found


def one_answer(served: Served, data: bytes, *, method: str = "GET") -> Answer:
    """The only answer to these bytes."""
    (answer,) = answers(said(served, data), methods=(method,))
    return answer


def next_answer(connection: socket.socket, *, method: str = "GET") -> Answer:
    """One answer of a connection that stays."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = connection.recv(1)
        assert more, data
        data += more
    (answer,) = answers(data, methods=("HEAD",))
    length = 0 if method == "HEAD" or answer.status < 200 else int(answer.headers["content-length"])
    content = b""
    while len(content) < length:
        more = connection.recv(length - len(content))
        assert more, content
        content += more
    return dataclasses.replace(answer, content=content)


def request(method: str, target: str, body: bytes = b"", **headers: str) -> bytes:
    """A request with a Host, and a Content-Length where it has a body."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    lines = {
        "Host": "hub",
        **({"Content-Length": str(len(body))} if body or method in ("PUT", "POST") else {}),
        **named,
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {target} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body
