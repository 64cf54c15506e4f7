# SPDX-License-Identifier: Apache-2.0
"""Endpoints about branches, tags, pull requests and the history of commits."""

from __future__ import annotations

from html import escape
from typing import Any

from harness.hub.api.calls import RepositoryCall, shown
from harness.hub.messages import Response, json_response
from harness.hub.records import Ref
from harness.hub.refusals import Refusal

PAGE = 50
LARGEST_PAGE = 1000


def refs(call: RepositoryCall) -> Response:
    """Branches, tags, and with `include_prs` pull requests, each with its commit."""
    found = call.hub.store.refs(call.repository)

    def those(folder: str) -> list[dict[str, str]]:
        return [
            {"name": ref.name, "ref": ref.full, "targetCommit": ref.oid} for ref in found if ref.full.startswith(folder)
        ]

    content: dict[str, Any] = {"branches": those("refs/heads/"), "tags": those("refs/tags/"), "converts": []}
    if call.flag("include_prs"):
        content["pullRequests"] = those("refs/pr/")
    return json_response(content)


def history(call: RepositoryCall) -> Response:
    """The commits that led to a revision, newest first, by pages; `limit`, `p`, `expand[]=formatted`."""
    formatted = "formatted" in call.request.query.get("expand[]", ())
    count = call.count("limit", default=PAGE, most=LARGEST_PAGE)
    page = call.count("p", default=1, most=10**9) if call.text("p") not in ("", "0") else 0
    found = call.hub.store.commits(call.repository, call.commit(), start=page * count, count=count + 1)
    content = [
        {
            "id": commit.oid,
            "title": commit.title,
            "message": commit.message,
            "authors": [{"user": commit.author}],
            "date": commit.date,
            **({"formatted": {"title": escape(commit.title), "message": escape(commit.message)}} if formatted else {}),
        }
        for commit in found[:count]
    ]
    return json_response(content, headers=call.next_page(p=str(page + 1)) if len(found) > count else {})


def create_branch(call: RepositoryCall) -> Response:
    """Makes a branch at `startingPoint`, a revision; at main without one."""
    start = call.field(call.json(), "startingPoint", str, default="main")
    at = call.hub.store.resolve(call.repository, start)
    call.hub.store.create_branch(call.repository, "/".join(call.rest), at=at, author=call.sender())
    return json_response({})


def delete_branch(call: RepositoryCall) -> Response:
    """Deletes a branch."""
    call.hub.store.delete_branch(call.repository, "/".join(call.rest))
    return json_response({})


def create_tag(call: RepositoryCall) -> Response:
    """Makes a tag at the revision of the address."""
    body = call.json()
    name = call.required(body, "tag", str)
    message = call.field(body, "message", str, default="")
    call.hub.store.create_tag(call.repository, name, at=call.commit(), message=message)
    return json_response({})


def delete_tag(call: RepositoryCall) -> Response:
    """Deletes a tag."""
    call.hub.store.delete_tag(call.repository, "/".join(call.rest))
    return json_response({})


# Pull requests, as far as clients need them to push to one


def discussions(call: RepositoryCall) -> Response:
    """The pull requests as a page of discussions, or one of them in detail."""
    pull_requests = [ref for ref in call.hub.store.refs(call.repository) if ref.full.startswith("refs/pr/")]
    if not call.rest:
        found = [_discussion(call, ref) for ref in pull_requests]
        return json_response({"discussions": found, "count": len(found), "start": 0})
    ref = next((ref for ref in pull_requests if ref.full == f"refs/pr/{call.rest[0]}"), None)
    if ref is None:
        raise Refusal(kind="no_such_page", message=f"there is no discussion {shown(call.rest[0])}")
    details = {"events": [], "changes": {"base": "refs/heads/main"}, "filesWithConflicts": [], "diff": ""}
    return json_response({**_discussion(call, ref), **details})


def open_pull_request(call: RepositoryCall) -> Response:
    """Opens a pull request without changes; they are committed to its ref. Discussions are not kept."""
    body = call.json()
    title = call.required(body, "title", str)
    if not call.field(body, "pullRequest", bool, default=False):
        raise Refusal(kind="unsupported", message="this Hub keeps pull requests, and no discussions")
    base = call.hub.store.resolve(call.repository, "main")
    number = call.hub.store.create_pull_request(call.repository, base=base, title=title, author=call.sender())
    return json_response({"num": number, "url": f"{call.page_url()}/discussions/{number}", "pullRequest": True})


def _discussion(call: RepositoryCall, ref: Ref) -> dict[str, Any]:
    return {
        "num": int(ref.full.rpartition("/")[2]),
        "title": ref.message,
        "author": {"name": ref.author},
        "createdAt": ref.date,
        "status": "open",
        "isPullRequest": True,
        "repo": {"name": call.repository.id, "type": call.repository.type},
    }
