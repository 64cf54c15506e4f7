# SPDX-License-Identifier: Apache-2.0
"""A request as it came over the wire and the answer to it: what the HTTP server and the endpoints hand each other."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from harness.hub.refusals import STATUS, Refusal

HEADER_CHARACTERS = 500
"""How much of a message fits into a header whatever is escaped in it; the content has all of it."""


class Body(Protocol):
    """The bytes of a request, read at most once. `length` is what the client announced, None for a chunked body.

    Each raises Refusal ("too_large") as soon as more than its limit is announced or arrives, and ("bad_request") where
    the client stops in the middle.
    """

    length: int | None

    def read(self, *, limit: int) -> bytes:
        """All of it."""

    def chunks(self, *, limit: int) -> Iterator[memoryview]:
        """All of it in pieces that are valid until the next one is asked for."""

    def lines(self, *, limit: int, line_limit: int) -> Iterator[bytes]:
        """All of it line by line, without the newline."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One request.

    id: unique in this server; stands in every error and in the log.
    target: the request line's target as it came. path: its segments, split at "/" first and then unquoted, so that
    `feat%2Fx` is one segment; no empty ones. query: every value of every name. headers: by their lower-case name.
    """

    id: str
    method: str
    target: str
    path: tuple[str, ...]
    query: Mapping[str, tuple[str, ...]]
    headers: Mapping[str, str]
    body: Body

    def asked(self, name: str, default: str = "") -> str:
        """The first value of a name of the query."""
        return next(iter(self.query.get(name, ())), default)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilePart:
    """A file, or the bytes from `start` to `stop`, as the content of an answer."""

    path: Path
    start: int
    stop: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Response:
    """An answer. Its Content-Length is set by the server; on HEAD the content is not sent."""

    status: int = 200
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    content: bytes | FilePart = b""


Handler = Callable[[Request], Response]
"""Answers a request, or raises Refusal; whatever else it raises becomes a 500 with the request's id."""


def json_response(value: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer in JSON."""
    # Half a surrogate pair, which a client's JSON can bring along, is written as JSON escapes it.
    content = json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace")
    return Response(
        status=status, headers={"Content-Type": "application/json; charset=utf-8", **(headers or {})}, content=content
    )


def refused(refusal: Refusal, *, request_id: str) -> Response:
    """The answer to a request that was refused: always a JSON object, and the message in a header for HEAD."""
    status, code = STATUS[refusal.kind]
    message = " ".join(refusal.message.split())[:HEADER_CHARACTERS]
    headers = {"X-Error-Message": message.encode("ascii", "backslashreplace").decode(), "X-Request-Id": request_id}
    if code is not None:
        headers["X-Error-Code"] = code
    content = {"error": refusal.message, "requestId": request_id, **refusal.content}
    return json_response(content, status=status, headers={**headers, **refusal.headers})
