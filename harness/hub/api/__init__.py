# SPDX-License-Identifier: Apache-2.0
"""The Hub's HTTP interface: which endpoint answers a request, and whether its sender may use it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from urllib.parse import quote

from harness.hub.accounts import Account
from harness.hub.api import admin, commits, files, identity, lfs, refs, repositories, trees
from harness.hub.api.calls import PREFIXES, TYPES, Call, Hub, RepositoryCall
from harness.hub.api.rights import Access, no_repository, require
from harness.hub.messages import Handler, Request, Response
from harness.hub.records import Repository
from harness.hub.refusals import Refusal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A function and what one needs to call it. rest: how many segments may follow its name, at least and at most."""

    run: Callable[[RepositoryCall], Response]
    access: Access = "see"
    rest: tuple[int, float] = (0, 0)


ANY = float("inf")

GLOBAL: Mapping[tuple[str, str], Callable[[Call], Response]] = {
    ("GET", "whoami-v2"): identity.whoami,
    ("POST", "repos/create"): repositories.create,
    ("DELETE", "repos/delete"): repositories.delete,
    ("POST", "repos/move"): repositories.move,
    ("POST", "validate-yaml"): identity.validate_yaml,
    ("GET", "settings/repositories"): repositories.of_user,
}
"""Endpoints below /api/ that are about no repository of their path."""

REPOSITORY: Mapping[tuple[str, str], Endpoint] = {
    ("GET", ""): Endpoint(run=repositories.info),
    ("GET", "revision"): Endpoint(run=repositories.info, rest=(1, 1)),
    ("PUT", "settings"): Endpoint(run=repositories.settings, access="own"),
    ("GET", "auth-check"): Endpoint(run=repositories.auth_check, rest=(0, 1)),
    ("GET", "user-access-request"): Endpoint(run=repositories.access_requests, access="write", rest=(1, 1)),
    ("POST", "user-access-request"): Endpoint(run=repositories.decide_access, access="write", rest=(1, 1)),
    ("GET", "tree"): Endpoint(run=trees.tree, rest=(1, ANY)),
    ("POST", "paths-info"): Endpoint(run=trees.paths_info, rest=(1, 1)),
    ("GET", "refs"): Endpoint(run=refs.refs),
    ("GET", "commits"): Endpoint(run=refs.history, rest=(1, 1)),
    ("POST", "branch"): Endpoint(run=refs.create_branch, access="write", rest=(1, ANY)),
    ("DELETE", "branch"): Endpoint(run=refs.delete_branch, access="write", rest=(1, ANY)),
    ("POST", "tag"): Endpoint(run=refs.create_tag, access="write", rest=(1, 1)),
    ("DELETE", "tag"): Endpoint(run=refs.delete_tag, access="write", rest=(1, ANY)),
    ("GET", "discussions"): Endpoint(run=refs.discussions, rest=(0, 1)),
    ("POST", "discussions"): Endpoint(run=refs.open_pull_request, access="propose"),
    ("POST", "preupload"): Endpoint(run=commits.preupload, access="write", rest=(1, 1)),
    ("POST", "commit"): Endpoint(run=commits.commit, access="write", rest=(1, 1)),
    ("GET", "xet-read-token"): Endpoint(run=lfs.refuse_xet, rest=(0, 1)),
    ("GET", "xet-write-token"): Endpoint(run=lfs.refuse_xet, rest=(0, 1)),
}
"""Endpoints below /api/{type}/{id}/."""

FILES: Mapping[tuple[str, str], Endpoint] = {
    ("GET", "resolve"): Endpoint(run=files.resolve, access="download", rest=(2, ANY)),
    ("HEAD", "resolve"): Endpoint(run=files.resolve, access="download", rest=(2, ANY)),
    ("GET", "raw"): Endpoint(run=files.resolve, access="download", rest=(2, ANY)),
    ("HEAD", "raw"): Endpoint(run=files.resolve, access="download", rest=(2, ANY)),
    ("POST", "ask-access"): Endpoint(run=repositories.ask_access),
    ("POST", "info"): Endpoint(run=lfs.batch, access="propose", rest=(3, 3)),
}
"""Endpoints below /{id}/; git's LFS interface is at /{id}.git/info/lfs/."""

PROPOSING = frozenset({"commit", "preupload"})
"""Endpoints that write to a branch, or to a pull request, which others may open and then add to their own."""


def handler(hub: Hub) -> Handler:
    """The function that answers every request to a Hub."""

    def answer(request: Request) -> Response:
        if request.path[:1] == (admin.ROOT,):
            return admin.answer(hub, request)
        if request.path[:1] == (lfs.ROOT,):
            return lfs.upload(hub, request)
        account = hub.accounts.account_of(request.headers.get("authorization", ""))
        if request.path[:1] == ("api",):
            return _api(hub, request, account)
        kind = next((kind for kind, prefix in PREFIXES.items() if prefix[:-1] in request.path[:1]), "model")
        return _repository(hub, request, account, kind, request.path[kind != "model" :], FILES)

    return answer


def _api(hub: Hub, request: Request, account: Account | None) -> Response:
    below = request.path[1:]
    if below[:1] == ("telemetry",):
        return Response()
    if below and below[0] in TYPES:
        if len(below) == 1 and request.method == "GET":
            return repositories.listing(Call(hub=hub, request=request, account=account), TYPES[below[0]])
        return _repository(hub, request, account, TYPES[below[0]], below[1:], REPOSITORY)
    name = "/".join(below)
    run = GLOBAL.get((request.method, name))
    if run is None:
        known = sorted(method for method, other in GLOBAL if other == name)
        raise _no_endpoint(request, known)
    return run(Call(hub=hub, request=request, account=account))


def _repository(
    hub: Hub,
    request: Request,
    account: Account | None,
    kind: str,
    segments: tuple[str, ...],
    table: Mapping[tuple[str, str], Endpoint],
) -> Response:
    readings = tuple(_readings(segments))
    found = (reading for reading in (_found(hub, kind, one, account) for one in readings) if reading is not None)
    reading = next(found, None)
    if reading is None:
        # Before anything else is said, which would tell a private repository from one that is not there.
        if any(verb == behind[0] for _, verb in table for _, behind in readings):
            raise no_repository(account)
        raise _no_endpoint(request, [])
    repository, identifier, (verb, *rest) = reading
    if repository.id != identifier:
        return _redirect(request, kind, identifier, repository.id)
    known = [method for method, other in table if other == verb]
    endpoint = table.get((request.method, verb))
    if not known or (endpoint is not None and not endpoint.rest[0] <= len(rest) <= endpoint.rest[1]):
        raise _no_endpoint(request, [])
    if endpoint is None:
        raise _no_endpoint(request, known)
    call = RepositoryCall(hub=hub, request=request, account=account, repository=repository, rest=tuple(rest))
    proposes = verb in PROPOSING and (call.flag("create_pr") or _is_own_pull_request(call))
    require(call, "propose" if proposes else endpoint.access)
    return endpoint.run(call)


def _found(
    hub: Hub, kind: str, reading: tuple[str, tuple[str, ...]], account: Account | None
) -> tuple[Repository, str, tuple[str, ...]] | None:
    """The repository of a reading, also one that was called so before; None where the sender sees none."""
    identifier, behind = reading
    repository = hub.store.find_repository(kind, identifier)
    if repository is None and (moved := hub.store.moved_to(kind, identifier)) is not None:
        repository = hub.store.find_repository(kind, moved)
    if repository is None or not hub.accounts.may_see(repository, account):
        return None
    return repository, identifier, behind


def _readings(segments: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What can be the id of a repository, with a namespace and without, each with the segments behind it, an empty one
    where none are: `alice/tree` is a repository of alice, or the tree of one that is called so."""
    for length in (2, 1):
        if len(segments) >= length and not any("/" in segment for segment in segments[:length]):
            identifier, rest = "/".join(segments[:length]), segments[length:]
            if rest[:2] == ("info", "lfs"):
                identifier = identifier.removesuffix(".git")
            yield identifier, rest or ("",)


def _is_own_pull_request(call: RepositoryCall) -> bool:
    """Whether the revision is a pull request that the sender has opened."""
    if call.account is None or not call.revision().startswith("refs/pr/"):
        return False
    refs = call.hub.store.refs(call.repository)
    return any(ref.full == call.revision() and ref.author == call.account.name for ref in refs)


def _redirect(request: Request, kind: str, identifier: str, moved: str) -> Response:
    """Leads from a repository's old id to its new one, at the same endpoint."""
    start = 2 if request.path[:1] == ("api",) else int(kind != "model")
    end = start + len(identifier.split("/"))
    _, _, query = request.target.partition("?")
    suffix = ".git" if request.path[end - 1].endswith(".git") and not identifier.endswith(".git") else ""
    path = [*request.path[:start], *(moved + suffix).split("/"), *request.path[end:]]
    # Relative: the older client line follows no other on HEAD.
    location = "/" + "/".join(quote(segment, safe="") for segment in path)
    return Response(status=307, headers={"Location": location + (f"?{query}" if query else "")})


def _no_endpoint(request: Request, methods: list[str]) -> Refusal:
    path = request.target.partition("?")[0]
    if methods:
        allowed = ", ".join(sorted(methods))
        return Refusal(
            kind="method", message=f"{path} does not take {request.method}, only {allowed}", headers={"Allow": allowed}
        )
    return Refusal(kind="no_such_page", message=f"there is nothing at {request.method} {path}")
