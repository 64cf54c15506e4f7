# SPDX-License-Identifier: Apache-2.0
"""Endpoints that list the files of a revision."""

from __future__ import annotations

from urllib.parse import parse_qs

from harness.hub.api.calls import JSON_BYTES, RepositoryCall, described, json_object
from harness.hub.messages import Response, json_response
from harness.hub.refusals import Refusal

PAGE = 1000


def tree(call: RepositoryCall) -> Response:
    """Files and directories below a path, sorted by path, by pages; `recursive`, `limit`, `cursor`."""
    commit = call.commit()
    count = call.count("limit", default=PAGE, most=PAGE)
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
    return json_response([described(entry) for entry in page], headers={"X-Repo-Commit": commit, **headers})


def paths_info(call: RepositoryCall) -> Response:
    """The files and directories among the paths of a form, or of a JSON body; what is not there is left out."""
    commit = call.commit()
    content = call.request.body.read(limit=JSON_BYTES)
    if "json" in call.request.headers.get("content-type", ""):
        paths = json_object(content, what="the body").get("paths", [])
    else:
        try:
            paths = parse_qs(content.decode(), max_num_fields=10_000).get("paths", [])
        except ValueError as error:
            raise Refusal(kind="bad_request", message=f"the body is not a form: {error}") from None
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise Refusal(kind="bad_request", message="'paths' must be a list of strings")
    found = [call.hub.store.entry(call.repository, commit, path.strip("/")) for path in paths]
    return json_response([described(entry) for entry in found if entry is not None])
