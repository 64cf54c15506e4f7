# SPDX-License-Identifier: Apache-2.0
"""What an endpoint is given: the request, who sent it, which repository it is about, and the Hub behind it all."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from harness.hub import store
from harness.hub.messages import Request
from harness.hub.refusals import Refusal

if TYPE_CHECKING:
    from harness.hub.accounts import Account, Accounts
    from harness.hub.faults import Faults
    from harness.hub.journal import Journal
    from harness.hub.records import Entry, Repository
    from harness.hub.store import Store

JSON_BYTES = 4 << 20
"""Largest body of an endpoint that takes JSON or a form; those with files in them have limits of their own."""

TYPES: Mapping[str, str] = {f"{type}s": type for type in store.TYPES}
"""As repositories stand in /api/ URLs -> their type."""

PREFIXES: Mapping[str, str] = {"model": "", "dataset": "datasets/", "space": "spaces/"}
"""Type -> what stands before a repository's id in the URLs of its files."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bounds on what is sent, in bytes.

    multipart, part: LFS files larger than the first are uploaded in parts of the second. regular: larger files are LFS.
    file, commit: the largest LFS file and the largest body of a commit that is taken.
    """

    multipart: int = 1 << 30
    part: int = 128 << 20
    regular: int = 10 << 20
    file: int = 64 << 30
    commit: int = 4 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hub:
    """Everything endpoints work on.

    uploads: a directory for the parts of multipart uploads. secret: signs upload addresses, so that they need no token.
    """

    store: Store
    accounts: Accounts
    url: Callable[[], str]
    faults: Faults
    journal: Journal
    uploads: Path
    secret: bytes
    faults_over_http: bool
    sizes: Sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """One request to one endpoint. rest: the segments of the path behind the endpoint's own."""

    hub: Hub
    request: Request
    account: Account | None
    rest: tuple[str, ...] = ()

    def sender(self) -> str:
        """Who sent it, at an endpoint that is for those with a token."""
        assert self.account is not None
        return self.account.name

    def text(self, name: str, default: str = "") -> str:
        """The first value of a name of the query."""
        return self.request.asked(name, default)

    def flag(self, name: str) -> bool:
        """Whether a name of the query says yes: clients write true, True and 1."""
        return self.text(name).lower() in ("true", "1")

    def count(self, name: str, *, default: int, most: int) -> int:
        """A whole number of the query between 1 and `most`. Raises Refusal for anything else."""
        value = self.text(name) or str(default)
        if not value.isdecimal() or not value.isascii() or len(value) > 9 or int(value) < 1:
            raise Refusal(kind="bad_request", message=f"'{name}' must be a whole number above 0, not {value!r}")
        return min(int(value), most)

    def json(self) -> dict[str, Any]:
        """The body as a JSON object. Raises Refusal."""
        return json_object(self.request.body.read(limit=JSON_BYTES), what="the body")

    def field(self, body: Mapping[str, Any], name: str, kind: type, *, default: Any = None) -> Any:
        """A field of a JSON body, checked to be of a type; `default` where it is absent or null."""
        value = body.get(name)
        if value is None:
            return default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise Refusal(kind="bad_request", message=f"'{name}' must be {WORDS[kind]}, not {shown(value)}")
        return value

    def required(self, body: Mapping[str, Any], name: str, kind: type) -> Any:
        """As `field`, where the endpoint cannot do without."""
        value = self.field(body, name, kind)
        if value is None:
            raise Refusal(kind="bad_request", message=f"the body has no '{name}'; expected {WORDS[kind]}")
        return value

    def next_page(self, **query: str) -> dict[str, str]:
        """The Link header that leads to the next page: this address with some values of the query replaced."""
        values = {name: value for name, value in self.request.query.items() if name not in query}
        target = self.request.target.partition("?")[0]
        return {"Link": f'<{self.hub.url()}{target}?{urlencode({**values, **query}, doseq=True)}>; rel="next"'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepositoryCall(Call):
    """A request about a repository that its sender may see."""

    repository: Repository

    def revision(self) -> str:
        """The revision that follows the endpoint's name, `main` where none does."""
        return self.rest[0] if self.rest else "main"

    def commit(self) -> str:
        """The commit that the revision means. Raises Refusal ("no_revision")."""
        return self.hub.store.resolve(self.repository, self.revision())

    def path(self) -> str:
        """The path in the repository that follows the revision."""
        return "/".join(self.rest[1:])

    def page_url(self) -> str:
        """The address of the repository."""
        return repository_url(self.hub, self.repository)


WORDS: Mapping[type, str] = {
    str: "a string",
    int: "a whole number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def repository_url(hub: Hub, repository: Repository) -> str:
    """The address of a repository, as clients show it and read its id back from."""
    return f"{hub.url()}/{PREFIXES[repository.type]}{quote(repository.id)}"


def json_object(content: bytes, *, what: str) -> dict[str, Any]:
    """A JSON object. Raises Refusal ("bad_request") that names `what` was read."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Refusal(kind="bad_request", message=f"{what} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Refusal(kind="bad_request", message=f"{what} must be a JSON object, not {shown(value)}")
    return value


def shown(value: object) -> str:
    """A value of a client in a message, cut short."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def described(entry: Entry) -> dict[str, Any]:
    """A file or directory as /tree/ and /paths-info/ list it."""
    found: dict[str, Any] = {
        "type": "directory" if entry.directory else "file",
        "path": entry.path,
        "oid": entry.oid,
        "size": entry.size,
    }
    if entry.lfs:
        found["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": pointer_size(entry)}
    return found


def pointer_size(entry: Entry) -> int:
    """Bytes of the pointer that git keeps in place of an LFS file."""
    from harness.hub.objects import pointer

    assert entry.sha256 is not None
    return len(pointer(entry.sha256, entry.size))
