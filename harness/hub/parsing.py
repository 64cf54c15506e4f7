# SPDX-License-Identifier: Apache-2.0
"""From the bytes of a request's head to its parts; strict, so that nobody can read another request out of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from urllib.parse import unquote_to_bytes

from harness.hub.refusals import Refusal

METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS")
WITH_BODY = ("POST", "PUT", "PATCH")

_REQUEST_LINE = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]{1,32}) ([!-~]+) HTTP/([0-9])\.([0-9])")
_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
_BARE_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_ABSOLUTE = re.compile(r"https?://[^/?]*", re.IGNORECASE)
_LENGTH = re.compile(r"[0-9]{1,18}")
_ONCE = frozenset(
    ("authorization", "content-length", "content-type", "expect", "host", "range", "transfer-encoding", "user-agent")
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestLine:
    """The first line. `target` is as it came; `modern` is HTTP/1.1, not 1.0."""

    method: str
    target: str
    modern: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Framing:
    """Where the body ends and whether another request may follow. `length` is None for a chunked body."""

    length: int | None
    expects_continue: bool
    keep_alive: bool


def bad(message: str) -> Refusal:
    """The answer to what is no proper request."""
    return Refusal(kind="bad_request", message=message)


def request_line(line: bytes, *, target_bytes: int) -> RequestLine:
    """The parts of the first line, without its end.

    Raises Refusal: "bad_request", "target_too_long", "version" (not 1.x), "unsupported" (method).
    """
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        if len(line) > target_bytes:
            raise too_long(target_bytes)
        raise bad(f"The request line is not METHOD TARGET HTTP/1.1 in ASCII: {line[:100]!r}")
    method, target, major, minor = match.groups()
    if major != b"1":
        raise Refusal(kind="version", message="This server speaks HTTP/1.1 and HTTP/1.0.")
    if len(target) > target_bytes:
        raise too_long(target_bytes)
    name = method.decode()
    if name not in METHODS:
        raise Refusal(kind="unsupported", message=f"There is no method {name} here; there are {', '.join(METHODS)}.")
    return RequestLine(method=name, target=target.decode(), modern=minor != b"0")


def too_long(target_bytes: int) -> Refusal:
    """The answer to a target over the limit."""
    return Refusal(kind="target_too_long", message=f"The target is longer than {target_bytes} bytes.")


def header_fields(lines: list[bytes], *, limit: int) -> dict[str, str]:
    """The headers by lower-case name; those that may stand more than once are joined by commas.

    Raises Refusal: "bad_request", "headers_too_large" (more than `limit`).
    """
    if len(lines) > limit:
        raise Refusal(kind="headers_too_large", message=f"There are {len(lines)} headers; {limit} are allowed.")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or _NAME.fullmatch(name) is None or _VALUE.fullmatch(value) is None:
            raise bad(f"This is no header, which is NAME: VALUE on one line: {line[:100]!r}")
        key, text = name.decode().lower(), value.strip(b" \t").decode("latin-1")
        if key in headers:
            if key in _ONCE:
                raise bad(f"The header {key} stands there more than once.")
            text = f"{headers[key]}, {text}"
        headers[key] = text
    return headers


def framing(line: RequestLine, headers: Mapping[str, str]) -> Framing:
    """Where the body ends.

    Raises Refusal: "bad_request" where that can be read in two ways, "unsupported" (Transfer-Encoding),
    "length_required" (a method with a body, and neither header).
    """
    if line.modern and not headers.get("host"):
        raise bad("An HTTP/1.1 request has a Host header.")
    options = {option.strip() for option in headers.get("connection", "").lower().split(",")}
    expected = headers.get("expect", "").lower()
    if expected not in ("", "100-continue"):
        raise bad("Expect can only be 100-continue.")
    return Framing(
        length=_length(line, headers),
        expects_continue=line.modern and expected != "",
        keep_alive=line.modern and "close" not in options,
    )


def _length(line: RequestLine, headers: Mapping[str, str]) -> int | None:
    coding, length = headers.get("transfer-encoding"), headers.get("content-length")
    if coding is not None:
        if length is not None:
            raise bad("Content-Length and Transfer-Encoding contradict each other; send one.")
        if not line.modern:
            raise bad("HTTP/1.0 has no Transfer-Encoding.")
        if coding.lower() != "chunked":
            raise Refusal(kind="unsupported", message="The only Transfer-Encoding understood is chunked.")
        return None
    if length is not None:
        if _LENGTH.fullmatch(length) is None:
            raise bad(f"Content-Length is a whole number of at most 18 digits, not {length[:40]!r}.")
        return int(length)
    if line.method in WITH_BODY:
        raise Refusal(kind="length_required", message=f"{line.method} needs a Content-Length, 0 for no body.")
    return 0


def target_parts(line: RequestLine) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """The path's segments, split before they are unquoted, and every value of every name of the query.

    Raises Refusal ("bad_request"): no path, percent signs that quote no byte, bytes that are not UTF-8, NUL.
    """
    target = line.target
    if target[0] != "/":
        if target == "*" and line.method == "OPTIONS":
            return (), {}
        match = _ABSOLUTE.match(target)
        if match is None:
            raise bad("The target is a path that begins with /.")
        target = target[match.end() :]
    if "#" in target:
        raise bad("The target has a fragment (#), which is not for servers; quote it as %23.")
    path, _, query = target.partition("?")
    segments = [segment for segment in path.split("/") if segment]
    if "%" in path:
        segments = [_unquoted(segment) for segment in segments]
    return tuple(segments), _query(query) if query else {}


def _query(query: str) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for pair in query.split("&"):
        name, _, value = pair.replace("+", " ").partition("=")
        if name:
            found.setdefault(_unquoted(name), []).append(_unquoted(value))
    return {name: tuple(values) for name, values in found.items()}


def _unquoted(text: str) -> str:
    if "%" not in text:
        return text
    if _BARE_PERCENT.search(text):
        raise bad("The target has a % that is not followed by two hexadecimal digits; quote it as %25.")
    try:
        plain = unquote_to_bytes(text).decode()
    except UnicodeDecodeError:
        raise bad("The target's percent-encoding is not UTF-8.") from None
    if "\0" in plain:
        raise bad("The target has a NUL (%00).")
    return plain
