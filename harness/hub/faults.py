# SPDX-License-Identifier: Apache-2.0
"""What can go wrong on the way, as data: which requests a fault meets, how often, and what it does to the answer."""

from __future__ import annotations

import dataclasses
import math
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any

from harness.hub.refusals import Refusal

LONGEST_SECONDS = 86_400


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_times(value: object) -> bool:
    return value == -1 or (_is_whole(value) and value != 0)


def _is_status(value: object) -> bool:
    return _is_whole(value) and 200 <= int(str(value)) <= 599


def _is_seconds(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return number and 0 < float(str(value)) <= LONGEST_SECONDS


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_header(name: object, value: object) -> bool:
    return (
        isinstance(name, str)
        and isinstance(value, str)
        and re.fullmatch(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+", name) is not None
        and re.fullmatch(r"[\t\x20-\x7e\x80-\xff]*", value) is not None
    )


def _are_headers(value: object) -> bool:
    return isinstance(value, Mapping) and all(_is_header(name, text) for name, text in value.items())


def _are_changed_headers(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        _is_header(name, "" if text is None else text) for name, text in value.items()
    )


def _is_object(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(name, str) for name in value)


def _are_strings(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(text, str) for pair in value.items() for text in pair)


def _is_pattern(value: object) -> bool:
    if not isinstance(value, str):
        return False
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


_COUNT = (_is_whole, "a whole number, 0 or more")
_FLAG = (_is_flag, "true or false")

FIELDS: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "match": (_is_pattern, 'a regular expression, searched for in "METHOD /path?query" as it came'),
    "skip": _COUNT,
    "times": (_is_times, "a whole number, 1 or more, or -1 for ever"),
    "status": (_is_status, "a status from 200 to 599"),
    "headers": (_are_headers, "an object of header names and values"),
    "content": (_is_object, "a JSON object"),
    "delay": (_is_seconds, f"seconds, more than 0 and at most {LONGEST_SECONDS}"),
    "reset_before": _FLAG,
    "close_before": _FLAG,
    "reset_after": _COUNT,
    "close_after": _COUNT,
    "reset_upload_after": _COUNT,
    "stall": _COUNT,
    "throttle": (lambda value: _is_whole(value) and value != 0, "bytes a second, 1 or more"),
    "ignore_range": _FLAG,
    "flip": _COUNT,
    "length": _COUNT,
    "set_headers": (_are_changed_headers, "an object of header names and values, null to leave the header out"),
    "truncate": _COUNT,
    "apply_then_reset": _FLAG,
    "move": (_are_strings, "an object of strings"),
}
"""Key -> what it may be, as a question and in words."""

_WHERE = ("match", "skip", "times")
_NO_ANSWER = ("reset_before", "close_before", "reset_upload_after", "apply_then_reset")
_NOT_MADE = ("reset_before", "close_before", "reset_upload_after")
_ENDS = ("reset_after", "close_after", "stall")
_LENGTHS = ("length", "truncate")
_ANSWERED_ANYWAY = ("delay", "move")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong with the requests in whose "METHOD /path?query", as it came, `match` is found.

    The first `skip` of them pass, then `times` of them are met, -1 for ever. Bytes are counted in the content of the
    answer, from 0, after its headers.

    status, headers, content: the answer, in place of the handler's. delay: seconds before anything happens.
    reset_before, close_before: no answer, TCP reset or a clean end. reset_after, close_after: the same after so many
    bytes; stall: after so many bytes nothing more comes. reset_upload_after: TCP reset once so many bytes of the
    request's body have come. throttle: bytes a second. ignore_range: the handler sees no Range. flip: the byte there
    has every bit turned. length: what Content-Length says, whatever is sent. truncate: so many bytes are sent, and
    Content-Length agrees. set_headers: replaced, or left out where None. apply_then_reset: the handler does its work,
    then TCP reset instead of the answer. move: handed to the server after the answer is made, before it is sent.

    Raises Refusal ("bad_request") where a field is not what it may be or two contradict each other.
    """

    match: str
    skip: int = 0
    times: int = -1
    status: int | None = None
    headers: Mapping[str, str] | None = None
    content: Mapping[str, Any] | None = None
    delay: float | None = None
    reset_before: bool = False
    close_before: bool = False
    reset_after: int | None = None
    close_after: int | None = None
    reset_upload_after: int | None = None
    stall: int | None = None
    throttle: int | None = None
    ignore_range: bool = False
    flip: int | None = None
    length: int | None = None
    set_headers: Mapping[str, str | None] | None = None
    truncate: int | None = None
    apply_then_reset: bool = False
    move: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        given = [name for name, value in vars(self).items() if value is not None and value is not False]
        for name in {*given, *_WHERE}:
            allowed, words = FIELDS[name]
            if not allowed(getattr(self, name)):
                raise _bad(f"{name} is {getattr(self, name)!r}; it may be {words}")
        actions = [name for name in given if name not in _WHERE]
        if not actions:
            raise _bad(f"it does nothing; give one or more of {', '.join(n for n in FIELDS if n not in _WHERE)}")
        for first, second in _contradictions(actions):
            raise _bad(f"{first} and {second} contradict each other; make two faults of them")
        if self.status is None and (self.headers is not None or self.content is not None):
            raise _bad("headers and content belong to a status; give one, or set_headers to change the handler's")
        if _changes_length(self) and (self.length is not None or self.truncate is not None):
            raise _bad("set_headers sets Content-Length, and so does length or truncate; leave one out")

    def as_json(self) -> dict[str, Any]:
        """The keys that are set; `fault_from_json` makes an equal fault of it."""
        default = {field.name: field.default for field in dataclasses.fields(self)}
        return {name: value for name, value in vars(self).items() if value != default[name]}


def _bad(message: str) -> Refusal:
    return Refusal(kind="bad_request", message=f"This fault cannot be: {message}.")


def _changes_length(fault: Fault) -> bool:
    return any(name.lower() == "content-length" for name in fault.set_headers or ())


def _contradictions(actions: list[str]) -> list[tuple[str, str]]:
    """Pairs that cannot both happen to one answer."""
    found: list[tuple[str, str]] = []
    for group in (_NO_ANSWER, _ENDS, _LENGTHS, ("status", "ignore_range")):
        among = [name for name in actions if name in group]
        if len(among) > 1:
            found.append((among[0], among[1]))
    for name in actions:
        if name in _NO_ANSWER:
            found += [(name, other) for other in actions if other not in (*_NO_ANSWER, *_ANSWERED_ANYWAY)]
        if name in _NOT_MADE and "move" in actions:
            found.append((name, "move"))
    return found


def fault_from_json(value: object) -> Fault:
    """A fault from a JSON object; Refusal ("bad_request") says what is wrong with it and which keys there are."""
    if not isinstance(value, dict):
        raise _bad(f"it is {type(value).__name__}, not an object with the keys {', '.join(FIELDS)}")
    unknown = sorted(str(name) for name in value if name not in FIELDS)
    if unknown:
        raise _bad(f"there is no key {', '.join(unknown)}; there are {', '.join(FIELDS)}")
    if "match" not in value:
        raise _bad(f"match is missing; it is {FIELDS['match'][1]}")
    return Fault(**value)


def faults_from_json(value: object) -> list[Fault]:
    """Faults from a JSON list; see `fault_from_json`."""
    if not isinstance(value, list):
        raise _bad(f"a list of faults is expected, not {type(value).__name__}")
    return [fault_from_json(one) for one in value]


@dataclasses.dataclass
class _Standing:
    fault: Fault
    pattern: re.Pattern[str]
    skip: int
    times: int


class Faults:
    """The faults of one server, in order: the first that matches and is neither skipping nor used up is applied."""

    def __init__(self, *faults: Fault) -> None:
        self._lock = threading.Lock()
        self._standing: list[_Standing] = []
        self.add(*faults)

    def add(self, *faults: Fault) -> None:
        """Puts them after those that are there."""
        new = [_Standing(one, re.compile(one.match), one.skip, one.times) for one in faults]
        with self._lock:
            self._standing = [*self._standing, *new]

    def clear(self) -> None:
        """Forgets all of them; what has begun goes on."""
        with self._lock:
            self._standing = []

    def take(self, method: str, target: str) -> Fault | None:
        """The fault for this request, counted as used."""
        if not self._standing:
            return None
        asked = f"{method} {target}"
        with self._lock:
            for one in self._standing:
                if one.times == 0 or one.pattern.search(asked) is None:
                    continue
                if one.skip > 0:
                    one.skip -= 1
                    continue
                if one.times > 0:
                    one.times -= 1
                return one.fault
        return None

    def as_json(self) -> list[dict[str, Any]]:
        """Those that are not used up, as they were given."""
        with self._lock:
            return [one.fault.as_json() for one in self._standing if one.times != 0]
