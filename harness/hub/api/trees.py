# SPDX-License-Identifier: Apache-2.0
"""Endpoints that list the files of a revision."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs

from harness.hub.api.calls import JSON_BYTES, RepositoryCall, described, json_object
from harness.hub.messages import Response, json_response
from harness.hub.records import Entry
from harness.hub.refusals import Refusal

PAGE = 1000
EXPANDED_PAGE = 50
COMMITS = 100
"""Commits of a history that are looked at in one go."""


def tree(call: RepositoryCall) -> Response:
    """Files and directories below a path, sorted by path, by pages; `recursive`, `expand`, `limit`, `cursor`."""
    commit = call.commit()
    most = EXPANDED_PAGE if call.flag("expand") else PAGE
    count = call.count("limit", default=most, most=most)
    found = call.hub.store.entries(
        call.repository,
        commit,
        call.path(),
        recursive=call.flag("recursive"),
        after=call.text("cursor") or None,
        count=count + 1,
    )
    page = found[:count]
    headers = call.next_page(cursor=page[-1].path) if len(found) > count else {}
    content = _described(call, commit, page, changes=call.flag("expand"))
    return json_response(content, headers={"X-Repo-Commit": commit, **headers})


def paths_info(call: RepositoryCall) -> Response:
    """The files and directories among the paths of a form, or of a JSON body; what is not there is left out."""
    commit = call.commit()
    content = call.request.body.read(limit=JSON_BYTES)
    expand: object
    if "json" in call.request.headers.get("content-type", ""):
        body = json_object(content, what="the body")
        paths, expand = body.get("paths", []), body.get("expand")
    else:
        try:
            form = parse_qs(content.decode(), max_num_fields=10_000)
            paths, expand = form.get("paths", []), form.get("expand", [""])[0]
        except ValueError as error:
            raise Refusal(kind="bad_request", message=f"the body is not a form: {error}") from None
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise Refusal(kind="bad_request", message="'paths' must be a list of strings")
    found = [call.hub.store.entry(call.repository, commit, path.strip("/")) for path in paths]
    entries = [entry for entry in found if entry is not None]
    return json_response(_described(call, commit, entries, changes=str(expand).lower() == "true"))


def _described(call: RepositoryCall, commit: str, entries: list[Entry], *, changes: bool) -> list[dict[str, Any]]:
    """The entries of a commit, with `changes` each beside the last commit that changed it."""
    content = [described(entry) for entry in entries]
    missing = {entry.path: (entry.oid, told) for entry, told in zip(entries, content, strict=True)}
    start = 0
    while (
        changes and missing and (commits := call.hub.store.commits(call.repository, commit, start=start, count=COMMITS))
    ):
        # Each commit beside the one before it: what differs, or was not there, it has changed.
        for now in commits:
            for path, (oid, told) in list(missing.items()):
                before = call.hub.store.entry(call.repository, now.parent, path) if now.parent else None
                if before is None or before.oid != oid:
                    told["lastCommit"] = {"id": now.oid, "title": now.title, "date": now.date}
                    del missing[path]
        start += COMMITS
    return content
