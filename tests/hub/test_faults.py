# SPDX-License-Identifier: Apache-2.0
"""Faults: what they do on the wire, whom they meet, and that a description that cannot be is refused in words."""

from __future__ import annotations

import json
import random
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.hub.faults import FIELDS, Fault, Faults, fault_from_json, faults_from_json
from harness.hub.messages import FilePart, Request, Response
from harness.hub.refusals import Refusal
from harness.hub.wire import Limits
from tests.hub.raw import (
    GET,
    LIMIT,
    Served,
    answers,
    connected,
    next_answer,
    one_answer,
    request,
    said,
    serving,
)

CONTENT = random.Random(0).randbytes(3_000_000)
END, RESET = "a clean end", "a reset"
EVERY = Fault(
    match="^GET /x",
    skip=1,
    times=2,
    status=503,
    headers={"Retry-After": "1"},
    content={"error": "later"},
    delay=0.5,
    close_after=3,
    throttle=10,
    flip=1,
    length=7,
    set_headers={"ETag": None, "X-A": "b"},
    move={"ref": "main"},
)


@pytest.fixture(params=["bytes", "file"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    """A server of 3 MB, from memory or a file, that counts what it did and reads every body."""
    (tmp_path / "file").write_bytes(CONTENT)
    part = FilePart(path=tmp_path / "file", start=0, stop=len(CONTENT))

    def handler(asked: Request) -> Response:
        asked.body.read(limit=LIMIT)
        if "range" in asked.headers:
            return Response(status=206, content=b"part")
        headers = {"ETag": '"e"', "X-Repo-Commit": "c"}
        return Response(headers=headers, content=CONTENT if request.param == "bytes" else part)

    with serving(handler) as one:
        yield one


def heard(connection: socket.socket) -> tuple[bytes, str]:
    """All that comes, and how it ends."""
    got = bytearray()
    while True:
        try:
            more = connection.recv(65536)
        except ConnectionResetError:
            return bytes(got), RESET
        if not more:
            return bytes(got), END
        got += more


def asked(served: Served, data: bytes, fault: Fault) -> tuple[bytes, str]:
    served.faults.add(fault)
    with connected(served) as connection:
        connection.sendall(data)
        return heard(connection)


@pytest.mark.parametrize(("end", "how"), [("reset_before", RESET), ("close_before", END), ("apply_then_reset", RESET)])
@pytest.mark.parametrize("data", [GET, request("PUT", "/here", b"x" * 1000)], ids=["GET", "PUT"])
def test_no_answer(end: str, how: str, data: bytes) -> None:
    done: list[str] = []

    def handler(one: Request) -> Response:
        done.append(one.method)
        return Response()

    with serving(handler) as served:
        fault = fault_from_json({"match": "/here", end: True})
        assert asked(served, data, fault) == (b"", how)
        assert bool(done) == (end == "apply_then_reset")
        (entry,) = served.journal.entries()
        assert (entry.status, entry.content_length, entry.fault) == (None, None, "/here")


def test_a_clean_end_before_the_answer_is_clean_after_an_upload_too() -> None:
    """All of the body is taken first: what is left unread when a connection ends makes a reset of it."""
    with serving(limits=Limits(linger_seconds=0.001)) as served:
        assert asked(served, request("PUT", "/x", bytes(20_000_000)), Fault(match="", close_before=True)) == (b"", END)


@pytest.mark.parametrize("count", [0, 1, 1_000_000, len(CONTENT) - 1, len(CONTENT), len(CONTENT) + 1])
@pytest.mark.parametrize(("end", "how"), [("reset_after", RESET), ("close_after", END)])
def test_ends_in_the_middle(served: Served, end: str, how: str, count: int) -> None:
    """Exactly so many bytes arrive, and the length that was announced is that of the whole."""
    data, ended = asked(served, GET, fault_from_json({"match": "/here", end: count}))
    (answer,) = answers(data)
    assert ended == how
    assert answer.content == CONTENT[:count]
    assert answer.headers["content-length"] == str(len(CONTENT))
    assert "connection" not in answer.headers


@pytest.mark.parametrize("count", [0, 1, 100_000, 999_999])
@pytest.mark.parametrize("waits", [False, True], ids=["", "expects 100"])
def test_reset_in_the_middle_of_an_upload(served: Served, count: int, waits: bool) -> None:
    served.faults.add(Fault(match="PUT", reset_upload_after=count))
    with connected(served) as connection:
        headers = {"Expect": "100-continue"} if waits else {}
        connection.sendall(request("PUT", "/x", Content_Length="1000000", **headers))
        if waits and count:
            assert next_answer(connection).status == 100
        if count:
            connection.sendall(bytes(count))
        assert heard(connection) == (b"", RESET)
    (entry,) = served.journal.entries()
    assert (entry.status, entry.received, entry.fault) == (None, count, "PUT")


def test_reset_of_an_upload_nobody_reads() -> None:
    """Also where the handler says no at once; and one that ends before is not met."""
    with serving(lambda one: Response(status=403)) as served:
        fault = Fault(match="PUT", reset_upload_after=500)
        assert asked(served, request("PUT", "/x", bytes(1000)), fault) == (b"", RESET)
        assert one_answer(served, request("PUT", "/x", bytes(499))).status == 403


def test_a_handler_that_swallows_the_reset_of_an_upload() -> None:
    def handler(one: Request) -> Response:
        try:
            one.body.read(limit=LIMIT)
        except Refusal:
            return Response(status=200)
        raise AssertionError

    with serving(handler) as served:
        assert asked(served, request("PUT", "/x", bytes(1000)), Fault(match="", reset_upload_after=5)) == (b"", RESET)


@pytest.mark.parametrize("count", [0, 1_000_000])
def test_stall(served: Served, count: int) -> None:
    """Then nothing comes, other clients are served, and the thread goes when the client does."""
    served.faults.add(Fault(match="/here", stall=count, times=1))
    with connected(served) as connection:
        connection.sendall(GET)
        got = b""
        while b"\r\n\r\n" not in got or len(got.partition(b"\r\n\r\n")[2]) < count:
            got += connection.recv(65536)
        connection.settimeout(0.05)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        assert one_answer(served, GET).content == CONTENT
    (answer,) = answers(got)
    assert (answer.content, answer.headers["content-length"]) == (CONTENT[:count], str(len(CONTENT)))


def test_throttle() -> None:
    with serving(lambda one: Response(content=CONTENT[:1000])) as served:
        served.faults.add(Fault(match="/here", throttle=5000))
        before = time.monotonic()
        first, second = answers(said(served, GET + request("GET", "/other")))
        assert time.monotonic() - before >= 0.2
    assert first.content == second.content == CONTENT[:1000]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_status(served: Served, method: str) -> None:
    """In place of the handler; the connection stays, with the body of the request out of the way."""
    headers = {"Retry-After": "1", "X-Error-Code": "RepoNotFound"}
    served.faults.add(Fault(match=f"{method} /x", status=503, headers=headers, content={"error": "later"}, times=1))
    data = request(method, "/x", b"body") + request("GET", "/x", Range="bytes=1-")
    first, second = answers(said(served, data), methods=(method, "GET"))
    assert (first.status, first.headers["retry-after"], first.headers["x-error-code"]) == (503, "1", "RepoNotFound")
    assert first.content == (b"" if method == "HEAD" else b'{"error": "later"}')
    assert first.headers["content-length"] == "18"
    assert (second.status, second.content) == (206, b"part")
    assert served.journal.entries()[0].status == 503


def test_status_alone(served: Served) -> None:
    served.faults.add(Fault(match="", status=418))
    answer = one_answer(served, GET)
    assert (answer.status, answer.content, answer.headers["content-length"]) == (418, b"", "0")


def test_a_status_without_a_name(served: Served) -> None:
    served.faults.add(Fault(match="", status=599))
    assert one_answer(served, GET).status == 599


def test_ignored_range(served: Served) -> None:
    data = request("GET", "/x", Range="bytes=1-")
    assert one_answer(served, data).status == 206
    served.faults.add(Fault(match="/x", ignore_range=True))
    answer = one_answer(served, data)
    assert (answer.status, answer.content) == (200, CONTENT)
    assert served.journal.entries()[1].range == "bytes=1-"


@pytest.mark.parametrize("at", [0, 1_500_000, len(CONTENT) - 1])
def test_flipped_byte(served: Served, at: int) -> None:
    served.faults.add(Fault(match="", flip=at))
    first, second = answers(said(served, GET + GET))
    for answer in (first, second):
        assert answer.content[at] == 255 - CONTENT[at]
        assert answer.content[:at] + CONTENT[at : at + 1] + answer.content[at + 1 :] == CONTENT


def test_flipped_byte_that_is_not_there(served: Served) -> None:
    served.faults.add(Fault(match="", flip=len(CONTENT)))
    assert one_answer(served, GET).content == CONTENT
    assert one_answer(served, request("HEAD", "/"), method="HEAD").content == b""


@pytest.mark.parametrize("count", [0, 2_000_000, len(CONTENT), len(CONTENT) + 5])
def test_truncated(served: Served, count: int) -> None:
    """A whole answer that is too short: the connection stays."""
    served.faults.add(Fault(match="", truncate=count))
    data = said(served, GET + request("HEAD", "/") + GET)
    for answer in answers(data, methods=("GET", "HEAD", "GET")):
        assert answer.headers["content-length"] == str(min(count, len(CONTENT)))
        assert "connection" not in answer.headers
        assert answer.content in (b"", CONTENT[:count])


@pytest.mark.parametrize("difference", [-1, 1, 1_000_000])
@pytest.mark.parametrize("how", ["length", "set_headers"])
def test_wrong_length(served: Served, how: str, difference: int) -> None:
    """The connection ends after it, as nobody could tell where the next answer begins."""
    wrong = len(CONTENT) + difference
    value: Any = wrong if how == "length" else {"content-length": str(wrong)}
    data, ended = asked(served, GET + GET, fault_from_json({"match": "", how: value}))
    head, _, content = data.partition(b"\r\n\r\n")
    assert ended == END
    assert content == CONTENT
    assert f"content-length: {wrong}" in head.decode().lower() and b"Connection: close" in head
    assert served.journal.entries()[0].content_length == wrong
    answer = one_answer(served, request("HEAD", "/"), method="HEAD")
    assert answer.headers["content-length"] == str(wrong)


def test_changed_headers(served: Served) -> None:
    changes = {"x-repo-commit": None, "ETAG": '"other"', "X-Linked-Size": "5", "X-Absent": None}
    served.faults.add(Fault(match="", set_headers=changes))
    first, second = answers(said(served, GET + GET))
    for answer in (first, second):
        assert set(answer.headers) == {"content-length", "etag", "x-linked-size", "x-request-id"}
        assert (answer.headers["etag"], answer.headers["x-linked-size"]) == ('"other"', "5")
        assert answer.content == CONTENT


def test_no_length_at_all(served: Served) -> None:
    data, ended = asked(served, GET + GET, Fault(match="", set_headers={"Content-Length": None}))
    (answer,) = answers(data)
    assert (answer.content, ended, answer.headers["connection"]) == (CONTENT, END, "close")
    assert "content-length" not in answer.headers
    assert served.journal.entries()[0].content_length is None


def test_a_length_that_is_no_number(served: Served) -> None:
    data, ended = asked(served, GET + GET, Fault(match="", set_headers={"Content-Length": "many"}))
    head, _, content = data.partition(b"\r\n\r\n")
    assert b"Content-Length: many" in head
    assert (content, ended) == (CONTENT, END)
    assert served.log == []


def test_delay(served: Served) -> None:
    served.faults.add(Fault(match="/here", delay=0.2))
    before = time.monotonic()
    answer = one_answer(served, GET)
    assert time.monotonic() - before >= 0.2
    assert (answer.status, answer.content) == (200, CONTENT)
    assert served.journal.entries()[0].seconds >= 0.2


def test_move_between_the_answer_and_its_sending() -> None:
    """What a HEAD says is what was there before; what the next GET sees is what was moved to."""
    state = {"commit": "old"}

    def handler(one: Request) -> Response:
        return Response(headers={"X-Repo-Commit": state["commit"]})

    with serving(handler, move=lambda mapping: state.update(commit=mapping["to"])) as served:
        served.faults.add(Fault(match="^HEAD", move={"repository": "a/b", "to": "new"}))
        first, second = answers(said(served, request("HEAD", "/") + GET), methods=("HEAD", "GET"))
    assert (first.headers["x-repo-commit"], second.headers["x-repo-commit"]) == ("old", "new")


def test_move_that_fails() -> None:
    def move(mapping: object) -> None:
        raise Refusal(kind="no_repository", message="there is none to move")

    with serving(move=move) as served:
        served.faults.add(Fault(match="", move={"a": "b"}))
        answer = one_answer(served, GET)
    assert (answer.status, answer.headers["x-error-code"]) == (404, "RepoNotFound")


def test_several_actions_at_once(served: Served) -> None:
    fault = Fault(match="", delay=0.05, flip=0, close_after=10, set_headers={"ETag": None}, throttle=10**6)
    data, ended = asked(served, GET, fault)
    (answer,) = answers(data)
    assert ended == END and "etag" not in answer.headers
    assert answer.content == bytes((255 - CONTENT[0],)) + CONTENT[1:10]


def test_a_request_that_is_refused_is_no_faults_business(served: Served) -> None:
    served.faults.add(Fault(match="", status=503, times=1))
    assert one_answer(served, b"nonsense\r\n\r\n").status == 400
    assert one_answer(served, GET).status == 503


def test_which_requests_are_met() -> None:
    """Searched in the method and the target as it came; each counts for itself and the first wins."""
    faults = Faults(
        Fault(match="^GET /a%2Fb", status=501, skip=1, times=2),
        Fault(match="revision=main$", status=502, times=1),
        Fault(match="/a", status=503),
    )

    def status(method: str, target: str) -> int | None:
        fault = faults.take(method, target)
        return None if fault is None else fault.status

    assert status("GET", "/b") is None
    assert [status("GET", "/a%2Fb?x=1") for _ in range(4)] == [503, 501, 501, 503]
    assert [status("HEAD", "/a%2Fb?revision=main") for _ in range(2)] == [502, 503]
    assert [fault["status"] for fault in faults.as_json()] == [503]
    faults.clear()
    assert status("GET", "/a") is None
    assert faults.as_json() == []


def test_times_are_counted_once_each_among_threads() -> None:
    faults = Faults(Fault(match="", status=503, skip=1000, times=1500))
    taken: list[Fault] = []

    def take() -> None:
        for _ in range(500):
            fault = faults.take("GET", "/")
            if fault is not None:
                taken.append(fault)

    threads = [threading.Thread(target=take) for _ in range(8)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert len(taken) == 1500


def test_there_and_back_through_json() -> None:
    faults = [
        EVERY,
        Fault(match="a", reset_before=True),
        Fault(match="", stall=0, truncate=0),
        Fault(match="", ignore_range=True),
        Fault(match="", reset_upload_after=0, delay=1),
        Fault(match="x", apply_then_reset=True, move={}),
    ]
    assert faults_from_json(json.loads(json.dumps([fault.as_json() for fault in faults]))) == faults
    assert Faults(*faults).as_json() == [fault.as_json() for fault in faults]
    assert fault_from_json({"match": "a", "stall": None, "reset_before": False, "delay": 1}) == Fault(
        match="a", delay=1
    )
    assert set(FIELDS) == set(Fault.__dataclass_fields__)


WRONG = [
    ({"match": "("}, "match is '('"),
    ({"match": 5, "delay": 1}, "match is 5"),
    ({"match": "", "delay": 1, "skip": -1}, "skip is -1"),
    ({"match": "", "delay": 1, "skip": True}, "skip is True"),
    ({"match": "", "delay": 1, "skip": None}, "skip is None"),
    ({"match": "", "delay": 1, "times": 0}, "times is 0"),
    ({"match": "", "delay": 1, "times": -2}, "times is -2"),
    ({"match": "", "delay": 1, "times": 1.5}, "times is 1.5"),
    ({"match": "", "delay": 1, "times": "1"}, "times is '1'"),
    ({"match": "", "status": 199}, "status is 199"),
    ({"match": "", "status": 600}, "status is 600"),
    ({"match": "", "status": "503"}, "status is '503'"),
    ({"match": "", "status": 503, "headers": {"A": 1}}, "headers is"),
    ({"match": "", "status": 503, "headers": {"A": None}}, "headers is"),
    ({"match": "", "status": 503, "headers": {"A B": "c"}}, "headers is"),
    ({"match": "", "status": 503, "headers": {"A": "b\r\nC: d"}}, "headers is"),
    ({"match": "", "status": 503, "headers": {"A": "\u2028"}}, "headers is"),
    ({"match": "", "status": 503, "headers": ["A"]}, "headers is"),
    ({"match": "", "status": 503, "content": "text"}, "content is 'text'"),
    ({"match": "", "headers": {"A": "b"}}, "headers and content belong to a status"),
    ({"match": "", "content": {}}, "headers and content belong to a status"),
    ({"match": "", "delay": 0}, "delay is 0"),
    ({"match": "", "delay": -1}, "delay is -1"),
    ({"match": "", "delay": float("nan")}, "delay is nan"),
    ({"match": "", "delay": 1e9}, "delay is 1000000000.0"),
    ({"match": "", "delay": "1"}, "delay is '1'"),
    ({"match": "", "reset_before": 1}, "reset_before is 1"),
    ({"match": "", "reset_after": -1}, "reset_after is -1"),
    ({"match": "", "reset_after": True}, "reset_after is True"),
    ({"match": "", "throttle": 0}, "throttle is 0"),
    ({"match": "", "flip": 1.0}, "flip is 1.0"),
    ({"match": "", "set_headers": {"A": 1}}, "set_headers is"),
    ({"match": "", "set_headers": {"": "a"}}, "set_headers is"),
    ({"match": "", "set_headers": {"A": "b\n"}}, "set_headers is"),
    ({"match": "", "move": {"a": 1}}, "move is"),
    ({"match": "", "move": "a"}, "move is"),
    ({"match": ""}, "it does nothing"),
    ({"match": "", "delay": None, "reset_before": False}, "it does nothing"),
    ({"match": "", "reset_before": True, "close_before": True}, "reset_before and close_before contradict"),
    ({"match": "", "reset_before": True, "status": 503}, "reset_before and status contradict"),
    ({"match": "", "reset_before": True, "move": {}}, "reset_before and move contradict"),
    ({"match": "", "apply_then_reset": True, "flip": 0}, "apply_then_reset and flip contradict"),
    ({"match": "", "apply_then_reset": True, "reset_upload_after": 0}, "contradict"),
    ({"match": "", "reset_after": 0, "close_after": 0}, "reset_after and close_after contradict"),
    ({"match": "", "stall": 0, "close_after": 0}, "close_after and stall contradict"),
    ({"match": "", "length": 0, "truncate": 0}, "length and truncate contradict"),
    ({"match": "", "length": 0, "set_headers": {"Content-length": "1"}}, "set_headers sets Content-Length"),
    ({"match": "", "truncate": 0, "set_headers": {"Content-length": None}}, "set_headers sets Content-Length"),
    ({"match": "", "status": 503, "ignore_range": True}, "status and ignore_range contradict"),
    ({"match": "", "corrupt": 5}, "there is no key corrupt; there are match, skip, times, status"),
    ({"delay": 1}, "match is missing"),
    ({}, "match is missing"),
    ([], "it is list, not an object with the keys match, skip"),
    (None, "it is NoneType"),
]


@pytest.mark.parametrize(("value", "words"), WRONG, ids=[words for _, words in WRONG])
def test_descriptions_that_cannot_be(value: object, words: str) -> None:
    with pytest.raises(Refusal) as caught:
        faults_from_json([value])
    assert caught.value.kind == "bad_request"
    assert caught.value.message.startswith("This fault cannot be: ") and words in caught.value.message
    if isinstance(value, dict) and set(value) <= set(FIELDS) and "match" in value:
        with pytest.raises(Refusal):
            Fault(**value)


@pytest.mark.parametrize("value", [{}, None, "x", 5])
def test_what_is_no_list_of_faults(value: object) -> None:
    with pytest.raises(Refusal, match="a list of faults is expected"):
        faults_from_json(value)


def test_faults_of_one_server_do_not_meet_another() -> None:
    with serving() as first, serving() as second:
        first.faults.add(Fault(match="", status=503))
        assert one_answer(first, GET).status == 503
        assert one_answer(second, GET).status == 200
