# SPDX-License-Identifier: Apache-2.0
"""The HTTP server of the Hub: what it understands, what it refuses, and that nothing a client does harms others."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.hub.faults import Fault
from harness.hub.journal import Journal
from harness.hub.messages import FilePart, Request, Response, json_response
from harness.hub.refusals import Refusal
from harness.hub.wire import Limits, reserved_port
from tests.hub.raw import (
    GET,
    LIMIT,
    SECONDS,
    Answer,
    Served,
    answers,
    connected,
    next_answer,
    one_answer,
    received,
    request,
    said,
    serving,
    threads_of,
)

QUICK = Limits(idle_seconds=1.0, linger_seconds=0.2)


@pytest.fixture
def served() -> Iterator[Served]:
    """A server that says what came."""
    with serving() as one:
        yield one


def test_request_parts() -> None:
    seen: list[Request] = []

    def handler(asked: Request) -> Response:
        seen.append(asked)
        return Response()

    target = "//api/models/a/tree/feat%2Fx/caf%C3%A9%20%23.txt?limit=5&path=a%26b+c&path=&path=%2B&&=x"
    with serving(handler) as served:
        said(served, request("GET", target, Accept="a", X_Two=" \tb \t"))
        said(served, b"GET /x HTTP/1.1\r\nHOST: hub\r\naccept: a\r\nAccept: b\r\n\r\n")
        said(served, b"GET http://hub:1/a/b?c=d HTTP/1.1\r\nHost: hub\r\n\r\n")
        said(served, b"OPTIONS * HTTP/1.1\r\nHost: hub\r\n\r\n")
        said(served, b"\r\nGET /../%2e%2e/. HTTP/1.1\r\nHost: hub\r\n\r\n")
    first, second, third, fourth, fifth = seen
    assert first.method == "GET"
    assert first.target == target
    assert first.path == ("api", "models", "a", "tree", "feat/x", "café #.txt")
    assert first.query == {"limit": ("5",), "path": ("a&b c", "", "+")}
    assert first.asked("path") == "a&b c" and first.asked("none", "x") == "x"
    assert first.headers == {"host": "hub", "accept": "a", "x-two": "b"}
    assert second.headers == {"host": "hub", "accept": "a, b"}
    assert (third.path, third.query) == (("a", "b"), {"c": ("d",)})
    assert (fourth.path, fourth.target) == ((), "*")
    assert fifth.path == ("..", "..", ".")  # What a path may be is not for the wire to say.
    assert len({one.id for one in seen}) == len(seen)


def test_answers_on_one_connection(served: Served) -> None:
    with connected(served) as connection:
        for method in ("GET", "HEAD", "GET", "PUT", "DELETE"):
            connection.sendall(request(method, "/x", b"ab" if method == "PUT" else b""))
            answer = next_answer(connection, method=method)
            assert answer.status == 200
            assert "connection" not in answer.headers
            assert int(answer.headers["content-length"]) > 0
    assert {entry.connection for entry in served.journal.entries()} == {1}


def test_head_has_the_length_and_no_content() -> None:
    with serving(lambda asked: Response(headers={"ETag": '"x"'}, content=b"content")) as served:
        data = said(served, request("HEAD", "/x") + request("GET", "/x"))
    head, get = answers(data, methods=("HEAD", "GET"))
    assert head.headers["content-length"] == get.headers["content-length"] == "7"
    assert head.headers["etag"] == '"x"'
    assert (head.content, get.content) == (b"", b"content")


@pytest.mark.parametrize("status", [204, 304])
def test_answers_without_content(status: int) -> None:
    with serving(lambda asked: Response(status=status, content=b"none")) as served:
        first, second = answers(said(served, GET + GET))
    assert (first.status, first.content, "content-length" in first.headers) == (status, b"", False)
    assert second.status == status


@pytest.mark.parametrize(("start", "stop"), [(0, 300_000), (0, 0), (5, 10), (100, 200_000), (299_999, 300_000)])
def test_files(tmp_path: Path, start: int, stop: int) -> None:
    content = random.Random(0).randbytes(300_000)
    (tmp_path / "file").write_bytes(content)
    part = FilePart(path=tmp_path / "file", start=start, stop=stop)
    open_before = len(os.listdir("/dev/fd"))
    with serving(lambda asked: Response(content=part)) as served:
        get, head, again = answers(said(served, GET + request("HEAD", "/") + GET), methods=("GET", "HEAD", "GET"))
    assert get.content == again.content == content[start:stop]
    assert head.headers["content-length"] == str(stop - start)
    assert len(os.listdir("/dev/fd")) <= open_before


@pytest.mark.parametrize(("name", "stop"), [("missing", 1), ("file", 11), ("", 1)])
def test_files_that_are_not_there(tmp_path: Path, name: str, stop: int) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    with serving(lambda asked: Response(content=FilePart(path=tmp_path / name, start=0, stop=stop))) as served:
        first, second = answers(said(served, GET + GET))
    assert (first.status, second.status) == (500, 500)
    assert first.headers["x-request-id"] in served.log[0]


def test_file_that_shrinks_while_it_is_sent(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(50_000_000))
    part = FilePart(path=tmp_path / "file", start=0, stop=50_000_000)
    with serving(lambda asked: Response(content=part)) as served, connected(served) as connection:
        connection.sendall(GET)
        connection.recv(1)
        (tmp_path / "file").write_bytes(b"")
        assert len(received(connection)) < 50_000_000


@pytest.mark.parametrize("size", [0, 1, 2, 300_000, 3_000_000])
@pytest.mark.parametrize("chunk", [None, 1000, 70_000])
@pytest.mark.parametrize("how", ["read", "chunks", "lines"])
def test_bodies(how: str, chunk: int | None, size: int) -> None:
    body = random.Random(0).randbytes(size).replace(b"\n", b"\n\n")
    seen: list[bytes] = []
    lengths: list[int | None] = []

    def handler(asked: Request) -> Response:
        lengths.append(asked.body.length)
        if how == "read":
            seen.append(asked.body.read(limit=LIMIT))
        elif how == "chunks":
            seen.append(b"".join(bytes(one) for one in asked.body.chunks(limit=LIMIT)))
        else:
            seen.append(b"\n".join(asked.body.lines(limit=LIMIT, line_limit=LIMIT)))
        assert asked.body.read(limit=LIMIT) == b""
        return Response()

    with serving(handler) as served:
        data = chunked(body, chunk) if chunk else request("PUT", "/x", body)
        assert [one.status for one in answers(said(served, data + GET))] == [200, 200]
        assert served.journal.entries()[0].received == len(body)
    assert seen[0] == (body.removesuffix(b"\n") if how == "lines" else body)
    assert lengths == [None if chunk else len(body), 0]


def chunked(body: bytes, size: int) -> bytes:
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    chunks = b"".join(b"%x;ext=1\r\n%b\r\n" % (len(part), part) for part in parts)
    return request("PUT", "/x", Transfer_Encoding="chunked").replace(b"Content-Length: 0\r\n", b"") + chunks + END


END = b"0\r\nTrailer: x\r\n\r\n"


def test_a_large_body_comes_in_large_pieces() -> None:
    """However small those are in which it is sent: who stores it works piece by piece."""
    sizes: list[int] = []

    def handler(asked: Request) -> Response:
        sizes.extend(len(chunk) for chunk in asked.body.chunks(limit=LIMIT))
        return Response()

    with serving(handler) as served, connected(served) as connection:
        connection.sendall(request("PUT", "/x", Content_Length="3000000"))
        for _ in range(3000):
            connection.sendall(bytes(1000))
        assert next_answer(connection).status == 200
    assert sum(sizes) == 3_000_000
    assert set(sizes[1:-1]) == {256 * 1024}


@pytest.mark.parametrize("as_chunks", [False, True])
@pytest.mark.parametrize("how", ["read", "chunks", "lines"])
def test_bodies_over_the_limit(how: str, as_chunks: bool) -> None:
    reached: list[int] = []

    def handler(asked: Request) -> Response:
        if how == "read":
            asked.body.read(limit=10)
        elif how == "chunks":
            reached.extend(len(one) for one in asked.body.chunks(limit=10))
        else:
            reached.extend(len(one) for one in asked.body.lines(limit=10, line_limit=10))
        return Response()

    with serving(handler) as served:
        for size, status in ((10, 200), (11, 413)):
            data = chunked(bytes(size), 11) if as_chunks else request("PUT", "/x", bytes(size))
            first, second = answers(said(served, data + request("PUT", "/y", b"")))
            assert (first.status, second.status) == (status, 200)
    assert sum(reached) in (0, 10)


def test_lines_over_their_limit() -> None:
    def handler(asked: Request) -> Response:
        return json_response([line.decode() for line in asked.body.lines(limit=LIMIT, line_limit=5)])

    with serving(handler) as served:
        good, bad = answers(said(served, request("PUT", "/", b"\n12345\n\n1\n") + request("PUT", "/", b"1\n123456")))
    assert json.loads(good.content) == ["", "12345", "", "1"]
    assert bad.status == 413


def head(*lines: str) -> bytes:
    return "".join(f"{line}\r\n" for line in lines).encode("latin-1") + b"\r\n"


CLOSING = {
    "no version (HTTP/0.9)": (b"GET /\r\n", 400),
    "empty request line": (b"\r\n\r\n\r\n", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "lower-case version": (head("GET / http/1.1", "Host: a"), 400),
    "two spaces": (head("GET  / HTTP/1.1", "Host: a"), 400),
    "space in target": (head("GET /a b HTTP/1.1", "Host: a"), 400),
    "raw bytes in target": (head("GET /caf\xe9 HTTP/1.1", "Host: a"), 400),
    "NUL in target": (head("GET /a\0b HTTP/1.1", "Host: a"), 400),
    "quoted NUL": (head("GET /a%00b HTTP/1.1", "Host: a"), 400),
    "quoted NUL in query": (head("GET /a?b=%00 HTTP/1.1", "Host: a"), 400),
    "not UTF-8": (head("GET /%ff%fe HTTP/1.1", "Host: a"), 400),
    "not UTF-8 in query": (head("GET /?a=%c3 HTTP/1.1", "Host: a"), 400),
    "surrogate": (head("GET /%ed%a0%80 HTTP/1.1", "Host: a"), 400),
    "half a percent": (head("GET /%4 HTTP/1.1", "Host: a"), 400),
    "percent of nothing": (head("GET /?a=100% HTTP/1.1", "Host: a"), 400),
    "fragment": (head("GET /a#b HTTP/1.1", "Host: a"), 400),
    "no slash": (head("GET a/b HTTP/1.1", "Host: a"), 400),
    "star": (head("GET * HTTP/1.1", "Host: a"), 400),
    "other scheme": (head("GET ftp://a/b HTTP/1.1", "Host: a"), 400),
    "unknown method": (head("BREW / HTTP/1.1", "Host: a"), 501),
    "CONNECT": (head("CONNECT a:1 HTTP/1.1", "Host: a"), 501),
    "lower-case method": (head("get / HTTP/1.1", "Host: a"), 501),
    "long method": (head("G" * 5000 + " / HTTP/1.1", "Host: a"), 400),
    "long target": (head("GET /" + "a" * 8192 + " HTTP/1.1", "Host: a"), 414),
    "endless target": (b"GET /" + b"a" * 200_000, 414),
    "no host": (head("GET / HTTP/1.1"), 400),
    "two hosts": (head("GET / HTTP/1.1", "Host: a", "Host: a"), 400),
    "header without colon": (head("GET / HTTP/1.1", "Host: a", "nothing"), 400),
    "header without name": (head("GET / HTTP/1.1", "Host: a", ": b"), 400),
    "space before colon": (head("GET / HTTP/1.1", "Host : a"), 400),
    "folded header": (head("GET / HTTP/1.1", "Host: a", "X: b", " c"), 400),
    "carriage return in header": (head("GET / HTTP/1.1", "Host: a", "X: b\rc"), 400),
    "NUL in header": (head("GET / HTTP/1.1", "Host: a", "X: b\0c"), 400),
    "bare newlines": (b"GET / HTTP/1.1\nHost: a\n\n", 400),
    "a bare newline": (b"GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n", 400),
    "huge header": (head("GET / HTTP/1.1", "Host: a", "X: " + "a" * 70_000), 431),
    "endless header": (b"GET / HTTP/1.1\r\nX: " + b"a" * 200_000, 431),
    "too many headers": (head("GET / HTTP/1.1", "Host: a", *(f"X-{n}: a" for n in range(100))), 431),
    "two lengths": (head("PUT / HTTP/1.1", "Host: a", "Content-Length: 1", "Content-Length: 2") + b"ab", 400),
    "the same length twice": (head("PUT / HTTP/1.1", "Host: a", "Content-Length: 1", "content-length: 1") + b"a", 400),
    "a list of lengths": (head("PUT / HTTP/1.1", "Host: a", "Content-Length: 1, 1") + b"a", 400),
    "no length": (head("PUT / HTTP/1.1", "Host: a") + b"ab", 411),
    "negative length": (head("PUT / HTTP/1.1", "Host: a", "Content-Length: -1"), 400),
    "signed length": (head("PUT / HTTP/1.1", "Host: a", "Content-Length: +1") + b"a", 400),
    "length in letters": (head("PUT / HTTP/1.1", "Host: a", "Content-Length: one"), 400),
    "length with underscore": (head("PUT / HTTP/1.1", "Host: a", "Content-Length: 1_0"), 400),
    "length in other digits": (head("PUT / HTTP/1.1", "Host: a", "Content-Length: \xb2"), 400),
    "empty length": (head("PUT / HTTP/1.1", "Host: a", "Content-Length:"), 400),
    "huge length": (head("PUT / HTTP/1.1", "Host: a", "Content-Length: " + "9" * 30), 400),
    "large length": (head("PUT / HTTP/1.1", "Host: a", "Content-Length: " + "9" * 18) + b"abc", 413),
    "length and chunks": (
        head("PUT / HTTP/1.1", "Host: a", "Content-Length: 5", "Transfer-Encoding: chunked") + b"0\r\n\r\n",
        400,
    ),
    "chunks twice": (head("PUT / HTTP/1.1", "Host: a", *["Transfer-Encoding: chunked"] * 2) + b"0\r\n\r\n", 400),
    "gzip and chunks": (head("PUT / HTTP/1.1", "Host: a", "Transfer-Encoding: gzip, chunked") + b"0\r\n\r\n", 501),
    "chunks in HTTP/1.0": (head("PUT / HTTP/1.0", "Transfer-Encoding: chunked") + b"0\r\n\r\n", 400),
    "other expectation": (head("PUT / HTTP/1.1", "Host: a", "Content-Length: 1", "Expect: money") + b"a", 400),
    "head that ends": (b"GET / HTTP/1.1\r\nHost: a\r\n", 400),
    "body that ends": (head("PUT / HTTP/1.1", "Host: a", "Content-Length: 1000") + b"abc", 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n", 400),
}
BEGIN_CHUNKS = head("PUT / HTTP/1.1", "Host: a", "Transfer-Encoding: chunked")
BAD_CHUNKS = {
    "no size": b"\r\nabc\r\n0\r\n\r\n",
    "letters": b"xyz\r\nabc\r\n0\r\n\r\n",
    "negative": b"-3\r\nabc\r\n0\r\n\r\n",
    "0x": b"0x3\r\nabc\r\n0\r\n\r\n",
    "underscore": b"1_0\r\n0123456789abcdef\r\n0\r\n\r\n",
    "size too small": b"2\r\nabc\r\n0\r\n\r\n",
    "size too large": b"4\r\nabc\r\n0\r\n\r\n",
    "huge size": b"f" * 16 + b"\r\nabc\r\n0\r\n\r\n",
    "bare newline": b"3\nabc\n0\n\n",
    "endless size": b"0" * 1000,
    "endless extension": b"3;" + b"a" * 100_000,
    "ends in a size": b"3",
    "ends in a chunk": b"3\r\na",
    "ends before the last": b"3\r\nabc\r\n",
    "ends in the trailers": b"0\r\nX: y\r\n",
}


@pytest.mark.parametrize(("data", "status"), CLOSING.values(), ids=CLOSING.keys())
def test_what_is_no_request(served: Served, data: bytes, status: int) -> None:
    """One answer in JSON, and nothing after it is taken for a request."""
    refused(one_answer(served, data + GET), status)
    assert served.log == []
    assert one_answer(served, GET).status == 200


@pytest.mark.parametrize("data", BAD_CHUNKS.values(), ids=BAD_CHUNKS.keys())
def test_bad_chunks(served: Served, data: bytes) -> None:
    refused(one_answer(served, BEGIN_CHUNKS + data), 400)
    assert one_answer(served, GET).status == 200


def test_too_many_trailers(served: Served) -> None:
    refused(one_answer(served, BEGIN_CHUNKS + b"0\r\n" + b"X: y\r\n" * 200 + b"\r\n" + GET), 431)


def refused(answer: Answer, status: int) -> None:
    assert answer.status == status
    assert answer.headers["connection"] == "close"
    content = json.loads(answer.content)
    assert content["requestId"] == answer.headers["x-request-id"]
    assert content["error"].startswith(answer.headers["x-error-message"][:20])


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\n",
        b"GET /\r\n",
        b"nonsense\r\n",
        b"\x16\x03\x01\r\n",
        BEGIN_CHUNKS + b"0" * 1000,
        BEGIN_CHUNKS + b"3;" + b"a" * 100_000,
        BEGIN_CHUNKS + b"0\r\nX: " + b"a" * 100_000,
    ],
    ids=lambda data: data[-10:],
)
def test_nonsense_is_refused_before_its_end(served: Served, data: bytes) -> None:
    with connected(served) as connection:
        connection.sendall(data)
        assert answers(received(connection))[0].status == 400


def test_http_1_0(served: Served) -> None:
    with connected(served) as connection:
        connection.sendall(head("GET /x HTTP/1.0") + GET)
        (answer,) = answers(received(connection))
    assert (answer.status, answer.headers["connection"]) == (200, "close")


def test_client_that_closes(served: Served) -> None:
    for option in ("close", "Close", "keep-alive, close"):
        with connected(served) as connection:
            connection.sendall(request("GET", "/x", Connection=option) + GET)
            (answer,) = answers(received(connection))
        assert (answer.status, answer.headers["connection"]) == (200, "close")


def test_pipelining(served: Served) -> None:
    data = request("PUT", "/a", b"one") + chunked(b"two", 2) + request("GET", "/b")
    found = answers(said(served, data))
    assert [json.loads(one.content)["body"] for one in found] == ["one", "two", ""]
    with connected(served) as connection:
        connection.sendall(GET + GET[:10])
        assert next_answer(connection).status == 200
        connection.sendall(GET[10:])
        assert next_answer(connection).status == 200


def test_requests_in_two_pieces(served: Served) -> None:
    """Wherever the network cuts them."""
    with connected(served) as connection:
        for data in (b"\r\n" + GET, request("PUT", "/x", b"abc"), chunked(b"abcdef", 4)):
            for cut in range(1, len(data)):
                connection.sendall(data[:cut])
                time.sleep(0.001)
                connection.sendall(data[cut:])
                assert next_answer(connection).status == 200


@pytest.mark.parametrize("begun", [False, True], ids=["unread", "begun"])
@pytest.mark.parametrize("as_chunks", [False, True], ids=["counted", "chunked"])
def test_a_body_left_unread_is_no_request(as_chunks: bool, begun: bool) -> None:
    smuggled = GET.replace(b"/here", b"/smuggled") * 20_000

    def handler(asked: Request) -> Response:
        if begun and asked.method == "PUT":
            next(iter(asked.body.chunks(limit=LIMIT)))
        return Response(status=403)

    with serving(handler) as served:
        data = chunked(smuggled, 50_000) if as_chunks else request("PUT", "/x", smuggled)
        found = answers(said(served, data + GET))
        assert [(one.status, "connection" in one.headers) for one in found] == [(403, False)] * 2
        assert [entry.target for entry in served.journal.entries()] == ["/x", "/here"]
        assert served.journal.entries()[0].received == len(smuggled)


def test_a_body_too_long_to_drain_ends_the_connection() -> None:
    with serving(lambda asked: Response(status=403), limits=Limits(drain_bytes=100_000)) as served:
        (answer,) = answers(said(served, request("PUT", "/x", bytes(100_001)) + GET))
        assert (answer.status, answer.headers["connection"]) == (403, "close")
        (answer,) = answers(said(served, chunked(bytes(1_000_000), 1000) + GET))
        assert (answer.status, answer.headers["connection"]) == (403, "close")
        with connected(served) as connection:  # Which is told at once where the length says so.
            connection.sendall(request("PUT", "/x", Content_Length="100001"))
            (answer,) = answers(received(connection))
        assert (answer.status, answer.headers["connection"]) == (403, "close")


def test_expect_continue(served: Served) -> None:
    with connected(served) as connection:
        connection.sendall(request("PUT", "/x", Expect="100-continue", Content_Length="3"))
        assert next_answer(connection).status == 100
        connection.sendall(b"abc")
        assert json.loads(next_answer(connection).content)["body"] == "abc"
        # A client that does not wait gets no 100 where the body is there already.
        connection.sendall(request("PUT", "/x", b"def", Expect="100-continue"))
        answer = next_answer(connection)
        assert (answer.status, json.loads(answer.content)["body"]) == (200, "def")


def test_expect_continue_of_a_body_that_is_left_in_the_middle() -> None:
    def handler(asked: Request) -> Response:
        next(iter(asked.body.chunks(limit=LIMIT)))
        return Response(status=403)

    with serving(handler) as served, connected(served) as connection:
        for _ in range(2):
            connection.sendall(request("PUT", "/x", Expect="100-continue", Content_Length="1000000"))
            assert next_answer(connection).status == 100
            connection.sendall(bytes(1_000_000))
            assert next_answer(connection).status == 403


def test_expect_continue_of_http_1_0(served: Served) -> None:
    """Which knows no 100."""
    with connected(served) as connection:
        connection.sendall(head("PUT /x HTTP/1.0", "Content-Length: 3", "Expect: 100-continue"))
        assert not answered(connection, 0.05)
        connection.sendall(b"abc")
        assert answers(received(connection))[0].status == 200


def test_expect_continue_that_is_refused() -> None:
    """The client keeps its body, and the connection ends: nobody knows what the next bytes are."""
    with serving(lambda asked: Response(status=403)) as served, connected(served) as connection:
        connection.sendall(request("PUT", "/x", Expect="100-continue", Content_Length="3"))
        (answer,) = answers(received(connection))
    assert (answer.status, answer.headers["connection"]) == (403, "close")


def test_a_handler_that_fails() -> None:
    def handler(asked: Request) -> Response:
        if asked.path == ("refused",):
            raise Refusal(kind="no_entry", message="there is none", headers={"X-Repo-Commit": "c"})
        if asked.path == ("header",):
            return Response(headers={"X-Bad": "a\r\nX-Injected: b"})
        if asked.path == ("letters",):
            return Response(headers={"X-Bad": "\u2028"})
        if asked.path == ("exit",):
            sys.exit("what nobody outside may see")
        raise ValueError("what nobody outside may see")

    with serving(handler) as served, connected(served) as connection:
        for number, target in enumerate(("/boom", "/header", "/letters", "/exit")):
            connection.sendall(request("PUT", target, b"body"))
            answer = next_answer(connection)
            assert answer.status == 500
            assert "nobody" not in answer.content.decode() and "x-injected" not in answer.headers
            assert len(served.log) == number + 1
            assert json.loads(answer.content)["requestId"] == answer.headers["x-request-id"]
            assert answer.headers["x-request-id"] in served.log[-1] and target in served.log[-1]
        assert "what nobody outside may see" in served.log[0] and "Traceback" in served.log[0]
        connection.sendall(request("GET", "/refused"))
        answer = next_answer(connection)
        assert (answer.status, answer.headers["x-error-code"], answer.headers["x-repo-commit"]) == (
            404,
            "EntryNotFound",
            "c",
        )
        assert len(served.log) == 4
        assert {entry.connection for entry in served.journal.entries()} == {1}


def test_what_a_handler_cannot_set() -> None:
    headers = {"content-length": "5", "Connection": "upgrade", "transfer-encoding": "chunked", "x-request-id": "me"}
    with serving(lambda asked: Response(headers=headers, content=b"ab")) as served:
        first, second = answers(said(served, GET + GET))
    assert (first.headers["content-length"], first.content) == ("2", b"ab")
    assert "connection" not in first.headers and "transfer-encoding" not in first.headers
    assert first.headers["x-request-id"] != second.headers["x-request-id"]


def test_a_client_that_goes_in_the_middle_of_its_body() -> None:
    seen: list[str] = []
    done = threading.Event()

    def handler(asked: Request) -> Response:
        if asked.method == "GET":
            return Response()
        for _ in range(2):  # Nobody can take what came for the whole by asking twice.
            try:
                asked.body.read(limit=LIMIT)
            except Refusal as error:
                seen.append(error.kind)
        done.set()
        return Response()

    with serving(handler) as served:
        with connected(served) as connection:
            connection.sendall(request("PUT", "/x", b"abc", Content_Length="10"))
        assert done.wait(SECONDS)
        assert one_answer(served, GET).status == 200
    assert seen == ["bad_request", "bad_request"]


def test_a_client_that_goes_in_the_middle_of_its_answer(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(20_000_000))
    part = FilePart(path=tmp_path / "file", start=0, stop=20_000_000)
    with serving(lambda asked: Response(content=part)) as served:
        for _ in range(3):
            with connected(served) as connection:
                connection.sendall(GET)
                connection.recv(10)
        assert one_answer(served, request("HEAD", "/x"), method="HEAD").status == 200
        assert served.log == []


@pytest.mark.parametrize(
    ("begin", "given"),
    [
        (b"", GET[:-1]),
        (request("PUT", "/x", Content_Length="100000"), b"a"),
        (BEGIN_CHUNKS, b"1\r\na\r\n"),
        (BEGIN_CHUNKS, b"0"),
        (BEGIN_CHUNKS, b"0\r\nX: " + b"y" * 1000),
    ],
    ids=["head", "body", "chunks", "size", "trailer"],
)
def test_a_slow_client_is_dropped_and_harms_nobody(begin: bytes, given: bytes) -> None:
    """A byte at a time, never silent for long."""
    with serving(limits=QUICK) as served, connected(served) as slow:
        slow.sendall(begin)
        with contextlib.suppress(ConnectionError):
            for byte in itertools.cycle(given):
                slow.sendall(bytes((byte,)))
                assert one_answer(served, GET).status == 200
                if answered(slow, 0.02):
                    break
        (answer,) = answers(received(slow))
        assert (answer.status, answer.headers["connection"]) == (408, "close")


def answered(connection: socket.socket, seconds: float) -> bool:
    connection.settimeout(seconds)
    try:
        return bool(connection.recv(1, socket.MSG_PEEK))
    except TimeoutError:
        return False
    finally:
        connection.settimeout(SECONDS)


def test_a_silent_client_is_let_go() -> None:
    with serving(limits=QUICK) as served:
        for data in (b"", GET):
            with connected(served) as connection:
                connection.sendall(data)
                assert len(answers(received(connection))) == (1 if data else 0)
        with connected(served) as connection:
            connection.sendall(request("PUT", "/x", b"abc", Content_Length="10"))
            assert answers(received(connection))[0].status == 408


@pytest.mark.parametrize("kind", ["file", "bytes"])
def test_a_client_that_does_not_read_is_let_go(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_bytes(bytes(20_000_000))
    part = FilePart(path=tmp_path / "file", start=0, stop=20_000_000)
    response = Response(content=part if kind == "file" else bytes(20_000_000))
    limits = Limits(idle_seconds=0.4, linger_seconds=0.2)
    with serving(lambda asked: response, limits=limits) as served, connected(served) as lazy:
        lazy.sendall(GET)
        lazy.recv(1)
        wait_for(lambda: not [name for name in threads_of(served.wire) if "client" in name])
        assert len(received(lazy)) < 20_000_000


def wait_for(condition: object) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_connection_limit() -> None:
    with serving(limits=Limits(connections=3)) as served, contextlib.ExitStack() as opened:
        inside = [opened.enter_context(connected(served)) for _ in range(3)]
        for connection in inside:
            connection.sendall(GET)
            assert next_answer(connection).status == 200
        outside = [opened.enter_context(connected(served)) for _ in range(100)]
        for connection in outside:
            with contextlib.suppress(ConnectionError):
                connection.sendall(GET)
        told = 0
        for connection in outside:
            with contextlib.suppress(ConnectionError):
                (answer,) = answers(received(connection))
                refused(answer, 503)
                told += 1
        assert told >= 50  # Of more than it can look after at a time, some are closed at once.
        inside[0].sendall(GET)
        assert next_answer(inside[0]).status == 200
        inside.pop().close()
        wait_for(lambda: len([name for name in threads_of(served.wire) if "client" in name]) == 2)
        assert one_answer(served, GET).status == 200


def test_a_client_without_a_place_may_finish_what_it_says() -> None:
    """It learns why after its body, as most clients read no sooner."""
    with serving(limits=Limits(connections=1)) as served, connected(served) as inside, connected(served) as outside:
        inside.sendall(GET)
        assert next_answer(inside).status == 200
        outside.sendall(request("PUT", "/x", bytes(5_000_000)))
        refused(answers(received(outside))[0], 503)


def test_the_last_answer_ends_at_once_and_stop_waits_for_nobody() -> None:
    """Not when the time is up in which the client's own end is waited for."""
    with serving(limits=Limits(linger_seconds=3600)) as served, connected(served) as connection:
        connection.sendall(request("GET", "/x", Connection="close"))
        assert len(answers(received(connection))) == 1
        served.wire.stop()


def test_many_clients_at_once(served: Served) -> None:
    wrong: list[object] = []

    def client(number: int) -> None:
        with connected(served) as connection:
            for turn in range(20):
                connection.sendall(request("PUT", f"/{number}/{turn}", b"x" * number))
                content = json.loads(next_answer(connection).content)
                if content != {"method": "PUT", "path": [str(number), str(turn)], "body": "x" * number}:
                    wrong.append(content)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert [entry.number for entry in served.journal.entries()] == list(range(1, 801))


def test_nothing_is_kept_of_clients_that_went(served: Served) -> None:
    for _ in range(50):
        said(served, GET)
    gc.collect()
    kept = [one for one in gc.get_objects() if issubclass(type(one), threading.Thread | Request | Fault)]
    assert len(kept) < 30


def test_stop_ends_everything() -> None:
    """Idle connections, one in the middle of a head, one that is stalled, one delayed, one throttled, one refused."""
    with serving(lambda asked: Response(content=b"x" * 1000), limits=Limits(connections=6)) as served:
        served.faults.add(
            Fault(match="/stall", stall=3), Fault(match="/delay", delay=3600), Fault(match="/slow", throttle=1)
        )
        with contextlib.ExitStack() as opened:
            connections = [opened.enter_context(connected(served)) for _ in range(7)]
            for connection, data in zip(
                connections,
                [GET, b"GET /", *(request("GET", name) for name in ("/stall", "/delay", "/slow")), b"", b""],
                strict=True,
            ):
                connection.sendall(data)
            wait_for(lambda: len(served.journal.entries()) >= 3)
            before = time.monotonic()
            served.wire.stop()
            assert threads_of(served.wire) == []
            assert time.monotonic() - before < SECONDS
            served.wire.stop()


def test_stop_in_the_middle_of_a_body_and_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(20_000_000))
    part = FilePart(path=tmp_path / "file", start=0, stop=20_000_000)
    begun = threading.Event()
    kinds: list[str] = []

    def handler(asked: Request) -> Response:
        if asked.method == "GET":
            return Response(content=part)
        begun.set()
        try:
            asked.body.read(limit=LIMIT)
        except Refusal as error:
            kinds.append(error.kind)
            raise
        return Response()

    with serving(handler) as served, connected(served) as first, connected(served) as second:
        first.sendall(request("PUT", "/x", b"abc", Content_Length="10"))
        second.sendall(GET)
        assert begun.wait(SECONDS)
        assert second.recv(1)
        served.wire.stop()
    assert kinds == ["bad_request"]


def test_restart_on_the_same_port(served: Served) -> None:
    port, url = served.wire.port, served.wire.url
    assert url == f"http://127.0.0.1:{port}"
    with connected(served) as connection:
        connection.sendall(GET)
        next_answer(connection)
        served.wire.stop()
        with pytest.raises(ConnectionRefusedError):
            connected(served)
        served.wire.start()
        assert (served.wire.port, served.wire.url) == (port, url)
        assert one_answer(served, GET).status == 200
    with pytest.raises(RuntimeError):
        served.wire.start()


def test_a_port_that_is_taken(served: Served) -> None:
    with pytest.raises(OSError, match="in use"), serving(port=served.wire.port):
        pass
    assert len(threads_of(served.wire)) == 1


def test_a_port_that_is_kept() -> None:
    with reserved_port() as keeper:
        port = keeper.getsockname()[1]
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        with pytest.raises(OSError, match="in use"), serving(port=port):
            pass
        for _ in range(2):
            with serving(port=port, share_port=True) as served:
                for _ in range(20):
                    assert one_answer(served, GET).status == 200
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port))


def test_a_thread_that_cannot_start(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        refused(one_answer(served, GET), 503)
    assert one_answer(served, GET).status == 200


CROWDED = """
import contextlib, os, resource
from tests.hub.raw import GET, connected, next_answer, one_answer, serving
with serving() as served, contextlib.ExitStack() as opened:
    first = opened.enter_context(connected(served))
    first.sendall(GET)
    assert next_answer(first).status == 200
    free = os.open("/dev/null", os.O_RDONLY)
    os.close(free)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Room for the client's end of this connection and not for the server's.
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, before[1]))
    second = opened.enter_context(connected(served))
    second.sendall(GET)
    for _ in range(100):
        first.sendall(GET)
        assert next_answer(first).status == 200
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert next_answer(second).status == 200
    print("served")
"""


def test_no_file_descriptor_left() -> None:
    """Those who are connected are served meanwhile, and the others afterwards."""
    assert printed_by(CROWDED) == "served\n"


def printed_by(program: str) -> str:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


LIGHT = """
import sys
import harness.hub.wire
print(sorted({"torch", "transformers", "huggingface_hub", "numpy", "http.server", "email"} & set(sys.modules)))
"""


def test_nothing_heavy_is_imported() -> None:
    assert printed_by(LIGHT) == "[]\n"


FORKED = """
import os, socket, sys
from tests.hub.raw import GET, connected, one_answer, serving
with serving() as served:
    with connected(served) as connection:
        one_answer(served, GET)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
        served.wire.stop()
        assert connection.recv(1) == b""
        try:
            connected(served)
        except ConnectionRefusedError:
            print("refused")
        os.close(writer)
        os.waitpid(child, 0)
"""


def test_stop_holds_also_where_a_forked_process_has_the_sockets() -> None:
    assert printed_by(FORKED) == "refused\n"


def test_half_closed_client(served: Served) -> None:
    with connected(served) as connection:
        connection.sendall(GET)
        connection.shutdown(socket.SHUT_WR)
        assert len(answers(received(connection))) == 1


def test_journal(served: Served) -> None:
    """An entry is there as soon as the client has the answer, and no token is in it."""
    said(served, request("GET", "/a?b=c", Authorization="Bearer hf_secret", Range="bytes=1-", User_Agent="me"))
    (entry,) = served.journal.entries()
    (shown,) = served.journal.as_json()
    assert "hf_secret" not in json.dumps(shown) and shown["request_id"] == entry.request_id
    assert (entry.number, entry.method, entry.target, entry.status) == (1, "GET", "/a?b=c", 200)
    assert (entry.range, entry.authorised, entry.user_agent, entry.fault) == ("bytes=1-", True, "me", None)
    assert entry.content_length is not None and entry.content_length > 0 and entry.seconds > 0
    said(served, request("PUT", "/a", b"12345"))
    said(served, b"nonsense\r\n\r\n")
    _, put, nonsense = served.journal.entries()
    assert (put.received, put.authorised, put.connection) == (5, False, 2)
    assert (nonsense.method, nonsense.target, nonsense.status) == ("", "", 400)
    assert [one.number for one in served.journal.entries(after=1)] == [2, 3]
    served.journal.clear()
    said(served, GET)
    assert [one.number for one in served.journal.entries()] == [4]
    said(served, request("GET", "/", User_Agent="a" * 60_000, Range="b" * 500))
    assert len(served.journal.entries()[1].user_agent or "") == len(served.journal.entries()[1].range or "") == 200


def test_the_journal_keeps_the_last() -> None:
    journal = Journal(capacity=2)
    with serving(journal=journal) as served:
        said(served, GET * 5)
    assert [entry.number for entry in journal.entries()] == [4, 5]


def test_the_journal_is_written_before_the_answer_is_sent(served: Served) -> None:
    with connected(served) as connection:
        for number in range(300):
            connection.sendall(GET)
            connection.recv(65536)
            assert len(served.journal.entries()) == number + 1


REQUESTS = [
    GET,
    request("HEAD", "/a/b?c=d", Range="bytes=1-2"),
    request("PUT", "/x", b"body of it"),
    chunked(b"chunks of it", 5),
    request("POST", "/%41", b"x", Expect="100-continue", Connection="close"),
]
PIECES = [b"\r\n", b"\n", b"\r\n\r\n", b"\0", b" ", b":", b"%", b"0", b"-1", b"chunked", b"\xff", b"a" * 9000]
PIECES += [b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"HTTP/1.0", b"HEAD ", b"Host: b\r\n"]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Valid requests with some of their bytes cut out, put in or changed."""
    data = b"".join(draw(st.lists(st.sampled_from(REQUESTS), min_size=1, max_size=3)))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        stop = min(len(data), start + draw(st.integers(0, 20)))
        data = data[:start] + draw(st.sampled_from(PIECES) | st.binary(max_size=5)) + data[stop:]
    return data


@pytest.fixture(scope="module")
def lasting() -> Iterator[Served]:
    """One server for all examples."""
    with serving(limits=Limits(idle_seconds=5)) as one:
        yield one


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200) | mutated(), cuts=st.lists(st.integers(0, 300), max_size=3), ended=st.booleans())
def test_any_bytes(lasting: Served, data: bytes, cuts: list[int], ended: bool) -> None:
    """Whatever comes, in whatever pieces: every answer is HTTP, none is a failure, and the next client is served."""
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    with connected(lasting) as connection:
        with contextlib.suppress(ConnectionError):
            for start, stop in itertools.pairwise(edges):
                connection.sendall(data[start:stop])
            if ended:
                connection.shutdown(socket.SHUT_WR)
        if ended:
            got = received(connection)
            assert re.match(rb"HTTP/1\.1 |\Z", got)
            asked = {entry.request_id: entry.method for entry in lasting.journal.entries()}
            methods = tuple(asked[one.decode()] for one in re.findall(rb"\r\nX-Request-Id: (\S+)\r\n", got))
            found = answers(got, methods=methods) if got else []
            assert all((one.whole and one.status in range(100, 500)) or one.status in (501, 505) for one in found)
    assert one_answer(lasting, GET).status == 200
    assert lasting.log == []
