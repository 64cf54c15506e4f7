# SPDX-License-Identifier: Apache-2.0
"""The endpoint that serves the content of a file at a revision, whole or from a byte on."""

from __future__ import annotations

import re

from harness.hub.api.calls import RepositoryCall
from harness.hub.messages import FilePart, Response
from harness.hub.names import check_path
from harness.hub.refusals import Refusal

RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


def resolve(call: RepositoryCall) -> Response:
    """A file. A client takes its version from X-Repo-Commit and the name it has in the cache from ETag."""
    store, commit = call.hub.store, call.commit()
    path = check_path(call.path())
    entry = store.entry(call.repository, commit, path)
    if entry is None or entry.directory or entry.sha256 is None:
        # A client notes the commit, and does not ask again for what is not there.
        raise Refusal(kind="no_entry", message=f"Entry not found: {path}", headers={"X-Repo-Commit": commit})
    tag = entry.sha256 if entry.lfs else entry.oid
    headers = {
        "X-Repo-Commit": commit,
        "ETag": f'"{tag}"',
        "Accept-Ranges": "bytes",
        "Content-Type": "application/octet-stream" if entry.lfs else "text/plain; charset=utf-8",
        "X-Content-Type-Options": "nosniff",
    }
    if entry.lfs:
        headers |= {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": str(entry.size)}
    if call.request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status=304, headers=headers)
    file = store.blobs.path(entry.sha256)
    asked = _range(call.request.headers.get("range", ""), entry.size)
    if asked is None:
        return Response(headers=headers, content=FilePart(path=file, start=0, stop=entry.size))
    start, stop = asked
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{entry.size}"
    return Response(status=206, headers=headers, content=FilePart(path=file, start=start, stop=stop))


def _range(header: str, size: int) -> tuple[int, int] | None:
    """First byte and the one behind the last that a Range header asks for; None for one that is to be ignored.

    RFC 9110, section 14.2. Raises Refusal ("bad_range") for a range that begins behind the end.
    """
    match = RANGE.fullmatch(header.strip())
    if match is None or match[1] == match[2] == "":
        return None
    if match[1] == "":
        start, stop = max(0, size - int(match[2])), size
    else:
        start, stop = int(match[1]), min(size, int(match[2] or size) + 1)
        if match[2] and int(match[2]) < start:
            return None
    if start >= size:
        raise Refusal(
            kind="bad_range",
            message=f"the file has {size} bytes, and the range begins at {start}",
            headers={"Content-Range": f"bytes */{size}"},
        )
    return start, stop
