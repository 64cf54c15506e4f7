# SPDX-License-Identifier: Apache-2.0
"""Endpoints that create, describe, list, move, delete and set up repositories, and hand out access to gated ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, get_args

from harness.hub.accounts import AccessStatus
from harness.hub.api.calls import TYPES, Call, RepositoryCall, pointer_size, repository_url, shown
from harness.hub.api.rights import no_repository, require
from harness.hub.messages import Response, json_response
from harness.hub.names import repository_parts
from harness.hub.records import Entry, Repository
from harness.hub.refusals import Refusal

PAGE = 100
LARGEST_PAGE = 1000

LISTED_BY = frozenset(
    ("author", "cardData", "config", "cursor", "direction", "expand", "full", "gated", "limit", "search", "sort")
)
"""What a listing can be asked for; whoever asks for something else would take what it gets for the answer."""


def create(call: Call) -> Response:
    """Makes a repository with one commit. One that is there is answered with 409 and its address."""
    body = call.json()
    kind, owner, name = _named(call, body)
    repository_parts(f"{owner}/{name}")
    _require_right_to_write(call, owner, kind)
    private = _private(call, body) or False
    known = call.hub.store.find_repository(kind, f"{owner}/{name}")
    if known is None:
        try:
            known = call.hub.store.create_repository(kind, owner, name, private=private, author=call.sender())
        except Refusal as refusal:
            if refusal.kind != "exists":
                raise
            known = call.hub.store.find_repository(kind, f"{owner}/{name}")
            if known is None:
                raise
        else:
            return json_response(_address(call, known))
    # A client that accepts a repository that is there reads the address from this answer.
    raise Refusal(kind="exists", message=f"You already created this {kind} repo", content=_address(call, known))


def delete(call: Call) -> Response:
    """Deletes a repository."""
    kind, owner, name = _named(call, call.json())
    call.hub.store.delete_repository(_own(call, kind, f"{owner}/{name}"))
    return json_response({})


def move(call: Call) -> Response:
    """Gives a repository another id; the old one leads to it from then on."""
    body = call.json()
    kind = call.field(body, "type", str, default="model")
    target = call.required(body, "toRepo", str)
    owner, _, name = target.rpartition("/")
    if not owner:
        raise Refusal(kind="bad_request", message=f"'toRepo' must be namespace/name, not {shown(target)}")
    repository = _own(call, kind, call.required(body, "fromRepo", str))
    repository_parts(target)
    _require_right_to_write(call, owner, kind)
    call.hub.store.move_repository(repository, owner=owner, name=name)
    return json_response({})


def settings(call: RepositoryCall) -> Response:
    """Sets who sees a repository, whether it is gated, and whether it is disabled."""
    body = call.json()
    gated = body.get("gated")
    if gated is not None and gated not in ("auto", "manual") and gated is not False:
        raise Refusal(kind="bad_request", message=f"'gated' must be auto, manual or false, not {shown(gated)}")
    disabled = call.field(body, "disabled", bool)
    private = _private(call, body)
    if gated is None and disabled is None and private is None:
        raise Refusal(kind="bad_request", message="nothing to set; expected 'gated', 'visibility' or 'disabled'")
    call.hub.store.set_repository(call.repository, private=private, gated=gated, disabled=disabled)
    return json_response({})


def info(call: RepositoryCall) -> Response:
    """A repository at a revision: its commit, files and settings. `blobs` adds the size of each file."""
    commit = call.commit()
    found = _described(call, call.repository, commit, files=True)
    return json_response(found, headers={"X-Repo-Commit": commit})


def listing(call: Call, kind: str) -> Response:
    """The repositories of a type that the sender may see, newest first, or changed last first (`sort`), by pages."""
    unknown = sorted(set(call.request.query) - LISTED_BY)
    if unknown:
        names = ", ".join(sorted(LISTED_BY))
        raise Refusal(kind="bad_request", message=f"this Hub does not list by {shown(unknown[0])}; it knows {names}")
    store, searched, gated = call.hub.store, call.request.query.get("search", ()), call.text("gated").lower()
    # By the time and the key of the first one on it, a page is found again whatever came and went meanwhile.
    by_change, cursor = call.text("sort") == "lastModified", call.text("cursor")
    ordered: dict[str, Repository] = {}
    for repository in store.repositories(kind, owner=call.text("author") or None):
        if (
            call.hub.accounts.may_see(repository, call.account)
            and (not gated or bool(repository.gated) == (gated == "true"))
            and all(text.lower() in repository.id.lower() for text in searched)
        ):
            date = repository.created
            if by_change:
                date = store.commit_of(repository, store.resolve(repository, "main")).date
            ordered[f"{date}-{repository.key:012}"] = repository
    places = sorted((place for place in ordered if not cursor or place <= cursor), reverse=True)
    count = call.count("limit", default=PAGE, most=LARGEST_PAGE)
    page = [ordered[place] for place in places[:count]]
    found = [_described(call, one, store.resolve(one, "main"), files=call.flag("full")) for one in page]
    return json_response(found, headers=call.next_page(cursor=places[count]) if places[count:] else {})


def of_user(call: Call) -> Response:
    """Every repository of the sender, with what it stores."""
    if call.account is None:
        raise Refusal(kind="bad_token", message="Invalid username or password.")
    found = []
    for kind in TYPES.values():
        for repository in call.hub.store.repositories(kind, owner=call.account.name):
            commit = call.hub.store.resolve(repository, "main")
            entries = call.hub.store.entries(repository, commit, recursive=True)
            found.append(
                {
                    "id": repository.id,
                    "type": kind,
                    "updatedAt": call.hub.store.commit_of(repository, commit).date,
                    "visibility": "private" if repository.private else "public",
                    "storage": _bytes_of(entries),
                    "storagePercent": 0,
                }
            )
    return json_response(found)


def auth_check(call: RepositoryCall) -> Response:
    """Whether the sender may download, or with /write may write; the refusal says why not."""
    if call.rest not in ((), ("write",)):
        raise Refusal(kind="no_such_page", message=f"auth-check knows 'write' only, not {shown(call.rest[0])}")
    require(call, "write" if call.rest else "download")
    return json_response({})


# Access to gated repositories


def ask_access(call: RepositoryCall) -> Response:
    """The sender asks for access, as with the button on a gated repository's page."""
    if call.account is None:
        raise Refusal(kind="bad_token", message="log in to ask for access")
    _require_gated(call)
    return json_response({"status": call.hub.accounts.request_access(call.repository, call.account.name)})


def access_requests(call: RepositoryCall) -> Response:
    """The requests of a status."""
    status = _status(call.rest[0])
    _require_gated(call)
    requests = call.hub.accounts.access_requests(call.repository, status)
    return json_response(
        [
            {
                "requestId": f"{call.repository.key}-{request.user}",
                "status": request.status,
                "timestamp": request.time,
                "user": {
                    "user": request.user,
                    "fullname": request.user,
                    "email": f"{request.user}@hub.invalid",
                },
            }
            for request in requests
        ]
    )


def decide_access(call: RepositoryCall) -> Response:
    """Handles a request (`handle`), or gives access unasked (`grant`)."""
    body = call.json()
    requested = call.field(body, "requestId", str)
    user = requested.partition("-")[2] if requested else call.required(body, "user", str)
    if call.rest[0] == "grant":
        status: AccessStatus = "accepted"
    elif call.rest[0] == "handle":
        status = _status(call.required(body, "status", str))
    else:
        raise Refusal(kind="no_such_page", message=f"expected handle or grant, not {shown(call.rest[0])}")
    _require_gated(call)
    accounts = call.hub.accounts
    known = accounts.access_of(call.repository, user)
    if known == status:
        raise Refusal(kind="bad_request", message=f"the request of {user} is {status} already")
    if known is None and call.rest[0] == "handle":
        raise Refusal(kind="no_such_page", message=f"{shown(user)} has not asked for access to {call.repository.id}")
    accounts.set_access(call.repository, user, status)
    return json_response({})


def _require_gated(call: RepositoryCall) -> None:
    if not call.repository.gated:
        raise Refusal(kind="bad_request", message=f"{call.repository.id} is not gated")


def _status(word: str) -> AccessStatus:
    for status in get_args(AccessStatus):
        if word == status:
            return status  # type: ignore[no-any-return]
    raise Refusal(
        kind="bad_request", message=f"a request is {', '.join(get_args(AccessStatus))}; there is no {shown(word)}"
    )


# What several need


def _named(call: Call, body: Mapping[str, Any]) -> tuple[str, str, str]:
    """Type, owner and name that a body asks for; without an organisation the owner is the sender."""
    kind = call.field(body, "type", str, default="model")
    if kind not in TYPES.values():
        raise Refusal(
            kind="bad_request", message=f"'type' must be one of {', '.join(TYPES.values())}, not {shown(kind)}"
        )
    owner = call.field(body, "organization", str) or (call.account.name if call.account else "")
    return kind, owner, call.required(body, "name", str)


def _own(call: Call, kind: str, identifier: str) -> Repository:
    """A repository that the sender may write to."""
    repository = call.hub.store.find_repository(kind, identifier)
    if repository is None or not call.hub.accounts.may_see(repository, call.account):
        raise no_repository(call.account)
    _require_right_to_write(call, repository.owner, kind)
    return repository


def _require_right_to_write(call: Call, owner: str, kind: str) -> None:
    if call.account is None:
        raise Refusal(kind="bad_token", message="Invalid username or password.")
    if not call.hub.accounts.may_write(owner, call.account):
        raise Refusal(
            kind="forbidden",
            message=f'You don\'t have the rights to create or change a {kind} under the namespace "{owner}"',
        )


def _private(call: Call, body: Mapping[str, Any]) -> bool | None:
    """Whether a body asks for a private repository; clients of 2.x say `visibility`, older ones `private`."""
    visibility = call.field(body, "visibility", str)
    if visibility is None:
        private: bool | None = call.field(body, "private", bool)
        return private
    if visibility not in ("public", "private"):
        raise Refusal(kind="bad_request", message=f"'visibility' must be public or private, not {shown(visibility)}")
    return bool(visibility == "private")


def _address(call: Call, repository: Repository) -> dict[str, Any]:
    return {"url": repository_url(call.hub, repository), "name": repository.id, "id": repository.id}


def _described(call: Call, repository: Repository, commit: str, *, files: bool) -> dict[str, Any]:
    """What is told of a repository: with its files or without, or the parts that `expand` asks for."""
    names = call.request.query.get("expand")
    found: dict[str, Any] = {
        "_id": f"{repository.key:024x}",
        "id": repository.id,
        **({"modelId": repository.id} if repository.type == "model" else {}),
        "author": repository.owner,
        "sha": commit,
        "lastModified": call.hub.store.commit_of(repository, commit).date,
        "createdAt": repository.created,
        "private": repository.private,
        "gated": repository.gated,
        "disabled": repository.disabled,
        "downloads": 0,
        "likes": 0,
        "tags": [],
    }
    if files if names is None else {"siblings", "usedStorage"} & set(names):
        entries = call.hub.store.entries(repository, commit, recursive=True)
        found["siblings"] = [
            {"rfilename": entry.path} | (_blob(entry) if call.flag("blobs") else {})
            for entry in entries
            if not entry.directory
        ]
        found["usedStorage"] = _bytes_of(entries)
    return {name: value for name, value in found.items() if names is None or name in ("_id", "id", *names)}


def _bytes_of(entries: Iterable[Entry]) -> int:
    return sum(entry.size for entry in entries if not entry.directory)


def _blob(entry: Any) -> dict[str, Any]:
    found = {"size": entry.size, "blobId": entry.oid}
    if entry.lfs:
        found["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": pointer_size(entry)}
    return found
