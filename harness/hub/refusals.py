# SPDX-License-Identifier: Apache-2.0
"""Every way the Hub says no, as data: the status, and the code from which a client knows what to raise."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

Kind = Literal[
    "bad_request",
    "bad_token",
    "no_repository",
    "no_repository_for_anonymous",
    "no_revision",
    "no_entry",
    "no_such_page",
    "gated",
    "gated_for_anonymous",
    "disabled",
    "forbidden",
    "exists",
    "stale_parent",
    "method",
    "length_required",
    "too_slow",
    "too_large",
    "target_too_long",
    "bad_range",
    "too_many_requests",
    "headers_too_large",
    "unsupported",
    "failed",
    "busy",
    "version",
]

STATUS: Mapping[Kind, tuple[int, str | None]] = {
    "bad_request": (400, None),
    "bad_token": (401, None),
    "no_repository": (404, "RepoNotFound"),
    "no_repository_for_anonymous": (401, "RepoNotFound"),
    "no_revision": (404, "RevisionNotFound"),
    "no_entry": (404, "EntryNotFound"),
    "no_such_page": (404, None),
    "gated": (403, "GatedRepo"),
    "gated_for_anonymous": (401, "GatedRepo"),
    "disabled": (403, None),
    "forbidden": (403, None),
    "exists": (409, None),
    "stale_parent": (412, None),
    "method": (405, None),
    "length_required": (411, None),
    "too_slow": (408, None),
    "too_large": (413, None),
    "target_too_long": (414, None),
    "bad_range": (416, None),
    "too_many_requests": (429, None),
    "headers_too_large": (431, None),
    "unsupported": (501, None),
    "failed": (500, None),
    "busy": (503, None),
    "version": (505, None),
}
"""Kind -> HTTP status and `X-Error-Code`. Over plain HTTP a client tells a missing repository by the code alone."""


@dataclasses.dataclass(kw_only=True)
class Refusal(Exception):
    """A request that is answered with no. `headers` and `content` go into the answer beside the message."""

    kind: Kind
    message: str
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    content: Mapping[str, object] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return self.message
