# SPDX-License-Identifier: Apache-2.0
"""Endpoints that write: how each file of a commit shall be sent, and the commit itself."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from harness.hub.api.calls import RepositoryCall, json_object, shown
from harness.hub.attributes import is_lfs
from harness.hub.messages import Response, json_response
from harness.hub.names import check_path, is_text
from harness.hub.records import AddFile, AddLfs, DeleteFile, DeleteFolder, Operation
from harness.hub.refusals import Refusal

MOST_FILES = 256
"""Files that one /preupload/ request may ask about."""

LINE_BYTES = 64 << 20


def preupload(call: RepositoryCall) -> Response:
    """For each file: whether it goes through LFS, whether .gitignore leaves it out, and what is there already."""
    body = call.json()
    requested = call.required(body, "files", list)
    if len(requested) > MOST_FILES:
        raise Refusal(kind="bad_request", message=f"{len(requested)} files in one request, at most {MOST_FILES}")
    commit = call.commit()
    ignored = _ignored(call, commit, call.field(body, "gitIgnore", str))
    found = []
    for file in requested:
        if not isinstance(file, dict):
            raise Refusal(kind="bad_request", message=f"a file must be an object, not {shown(file)}")
        path = check_path(call.required(file, "path", str))
        size = call.required(file, "size", int)
        sample = _decoded(call.field(file, "sample", str, default=""), what=f"the sample of {path}")
        entry = call.hub.store.entry(call.repository, commit, path)
        found.append(
            {
                "path": path,
                "uploadMode": "lfs" if is_lfs(path, size, sample, limit=call.hub.sizes.regular) else "regular",
                "shouldIgnore": ignored(path),
                **({"oid": entry.sha256 if entry.lfs else entry.oid} if entry and not entry.directory else {}),
            }
        )
    return json_response({"files": found, "commitOid": commit})


def _ignored(call: RepositoryCall, commit: str, patterns: str | None) -> Callable[[str], bool]:
    """A function that says whether .gitignore leaves a path out: the one sent along, else the one at the commit."""
    if patterns is None:
        entry = call.hub.store.entry(call.repository, commit, ".gitignore")
        if entry is None or entry.directory or entry.lfs or entry.sha256 is None:
            return lambda path: False
        patterns = call.hub.store.blobs.path(entry.sha256).read_text(encoding="utf-8", errors="replace")
    import pathspec  # not needed by a Hub that nobody sends a .gitignore

    try:
        return pathspec.GitIgnoreSpec.from_lines(patterns.splitlines()).match_file
    except ValueError as error:
        raise Refusal(kind="bad_request", message=f".gitignore cannot be read: {error}") from None


def commit(call: RepositoryCall) -> Response:
    """Commits the operations of a body in JSON lines: to a branch, a pull request's ref, or a new pull request."""
    store, repository = call.hub.store, call.repository
    call.commit()  # a branch that is not there is said before the body is read
    lines = _lines(call)
    header = next(lines, None)
    if header is None or header[0] != "header":
        raise Refusal(kind="bad_request", message="the first line of a commit must have the key 'header'")
    summary = call.required(header[1], "summary", str)
    description = call.field(header[1], "description", str, default="")
    parent = call.field(header[1], "parentCommit", str)
    operations = [_operation(call, key, value) for key, value in lines]
    written = {
        "title": summary,
        "message": description,
        "author": call.sender(),
        "parent": parent,
    }
    if call.flag("create_pr"):
        number, made = store.propose(repository, call.revision(), operations, **written)
        address = {"pullRequestUrl": f"{call.page_url()}/discussions/{number}"}
    else:
        made, address = store.commit(repository, call.revision(), operations, **written), {}
    return json_response(
        {
            "success": True,
            "commitOid": made.oid,
            "commitUrl": f"{call.page_url()}/commit/{made.oid}",
            "hookOutput": "",
            **address,
        }
    )


def _lines(call: RepositoryCall) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Key and value of every line of a commit's body."""
    body = call.request.body.lines(limit=call.hub.sizes.commit, line_limit=LINE_BYTES)
    for number, line in enumerate(body, start=1):
        if not line.strip():
            continue
        content = json_object(line, what=f"line {number} of the commit")
        key, value = content.get("key"), content.get("value")
        if not isinstance(key, str) or not isinstance(value, dict):
            raise Refusal(
                kind="bad_request", message=f"line {number} of the commit needs a 'key' and an object 'value'"
            )
        yield key, value


def _operation(call: RepositoryCall, key: str, value: Mapping[str, Any]) -> Operation:
    """What a line asks for. The content of a file is stored at once; without the commit it is an orphan."""
    path = call.required(value, "path", str)
    if key == "file":
        encoding, text = call.field(value, "encoding", str, default="utf-8"), call.required(value, "content", str)
        if encoding not in ("base64", "utf-8") or not is_text(text):
            message = f"the content of {shown(path)} must be text, in base64 or as it is; its encoding is"
            raise Refusal(kind="bad_request", message=f"{message} {shown(encoding)}")
        content = _decoded(text, what=f"the content of {shown(path)}") if encoding == "base64" else text.encode()
        return AddFile(path=check_path(path), sha256=call.hub.store.blobs.add([content]).sha256)
    if key == "lfsFile":
        if call.field(value, "algo", str, default="sha256") != "sha256":
            raise Refusal(kind="bad_request", message=f"LFS files are named by sha256, not {shown(value['algo'])}")
        return AddLfs(
            path=check_path(path), sha256=call.required(value, "oid", str), size=call.field(value, "size", int)
        )
    if key == "deletedFile":
        return DeleteFile(path=check_path(path))
    if key == "deletedFolder":
        return DeleteFolder(path=check_path(path.rstrip("/")))
    raise Refusal(
        kind="bad_request",
        message=f"a commit has no lines with the key {shown(key)}; known: file, lfsFile, deletedFile, deletedFolder",
    )


def _decoded(content: str, *, what: str) -> bytes:
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refusal(kind="bad_request", message=f"{what} is not base64: {error}") from None
