# SPDX-License-Identifier: Apache-2.0
"""Who may do what: users, their tokens, organisations, and requests for access to gated repositories."""

from __future__ import annotations

import dataclasses
import hashlib
import sqlite3
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from harness.hub.names import is_text, repository_parts
from harness.hub.refusals import Refusal

if TYPE_CHECKING:
    from harness.hub.database import Database
    from harness.hub.records import Repository

TokenRole = Literal["read", "write"]
MemberRole = Literal["admin", "write", "contributor", "read"]
AccessStatus = Literal["pending", "accepted", "rejected"]

TOKEN_ROLES = ("read", "write")
MEMBER_ROLES = ("admin", "write", "contributor", "read")

WRITING_MEMBERS = frozenset({"admin", "write", "contributor"})

SCHEMA = """
CREATE TABLE IF NOT EXISTS owners (name TEXT PRIMARY KEY COLLATE NOCASE, kind TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS tokens (digest TEXT PRIMARY KEY, user TEXT NOT NULL, role TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS members (
    organisation TEXT NOT NULL, user TEXT NOT NULL, role TEXT NOT NULL, PRIMARY KEY (organisation, user)
);
CREATE TABLE IF NOT EXISTS access (
    repository INTEGER NOT NULL, user TEXT NOT NULL, status TEXT NOT NULL, time TEXT NOT NULL,
    PRIMARY KEY (repository, user)
);
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class User:
    """Somebody with a token. role: what the token may do, "write" or "read"."""

    name: str
    token: str
    role: TokenRole = "write"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Organisation:
    """A namespace that several users share. members: user -> "admin", "write", "contributor" or "read"."""

    name: str
    members: Mapping[str, MemberRole]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Account:
    """Who asks: a user, by a token of a role."""

    name: str
    role: TokenRole


@dataclasses.dataclass(frozen=True, kw_only=True)
class AccessRequest:
    """One user's request for access to one gated repository. time: ISO 8601."""

    user: str
    status: AccessStatus
    time: str


class Accounts:
    """The users of one Hub, kept in its database; tokens only as SHA-256 digests."""

    def __init__(self, database: Database, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._database = database
        self._clock = clock
        database.execute_script(SCHEMA)

    def add_user(self, user: User) -> None:
        """Makes a user known, or gives one a further token. Raises Refusal for a name that cannot be one, and for a
        token that another user has."""
        check_owner(user.name)
        if user.role not in TOKEN_ROLES:
            raise Refusal(
                kind="bad_request", message=f"a token's role is {' or '.join(TOKEN_ROLES)}, not {user.role!r}"
            )
        if not user.token or not user.token.isascii() or not user.token.isprintable() or " " in user.token:
            raise Refusal(
                kind="bad_request", message=f"the token of {user.name} must be printable ASCII without spaces"
            )
        with self._database.transaction() as connection:
            self._add_owner(connection, user.name, "user")
            known = connection.execute("SELECT user FROM tokens WHERE digest = ?", (digest(user.token),)).fetchall()
            if known not in ([], [(user.name,)]):
                raise Refusal(kind="exists", message=f"the token of {user.name} is that of {known[0][0]} already")
            connection.execute(
                "INSERT INTO tokens VALUES (?, ?, ?) ON CONFLICT (digest) DO UPDATE SET role = ?3",
                (digest(user.token), user.name, user.role),
            )

    def add_organisation(self, organisation: Organisation) -> None:
        """Makes an organisation known with exactly these members. Raises Refusal for unknown users and roles."""
        check_owner(organisation.name)
        with self._database.transaction() as connection:
            self._add_owner(connection, organisation.name, "organisation")
            connection.execute("DELETE FROM members WHERE organisation = ?", (organisation.name,))
            for user, role in organisation.members.items():
                if role not in MEMBER_ROLES:
                    raise Refusal(
                        kind="bad_request", message=f"a member's role is one of {', '.join(MEMBER_ROLES)}, not {role!r}"
                    )
                if not self.has_user(user):
                    raise Refusal(kind="bad_request", message=f"organisation {organisation.name}: no user '{user}'")
                connection.execute("INSERT INTO members VALUES (?, ?, ?)", (organisation.name, user, role))

    def _add_owner(self, connection: sqlite3.Connection, name: str, kind: str) -> None:
        connection.execute("INSERT OR IGNORE INTO owners VALUES (?, ?)", (name, kind))
        (row,) = connection.execute("SELECT name, kind FROM owners WHERE name = ?", (name,)).fetchall()
        if row != (name, kind):
            raise Refusal(kind="exists", message=f"'{row[0]}' is the name of a {row[1]} already")

    def remove_token(self, token: str) -> None:
        """Makes a token invalid from now on, as one that has expired."""
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM tokens WHERE digest = ?", (digest(token),))

    def account_of(self, authorization: str) -> Account | None:
        """Who sends an Authorization header; None for an empty one. Raises Refusal ("bad_token")."""
        if not authorization:
            return None
        scheme, _, token = authorization.partition(" ")
        rows = self._database.read("SELECT user, role FROM tokens WHERE digest = ?", (digest(token.strip()),))
        if scheme.lower() != "bearer" or not rows:
            raise Refusal(kind="bad_token", message="Invalid credentials in Authorization header")
        return Account(name=rows[0][0], role=rows[0][1])

    def has_user(self, name: str) -> bool:
        """Whether a user of that name is known."""
        sql = "SELECT 1 FROM owners WHERE name = ? AND kind = 'user'"
        return is_text(name) and bool(self._database.read(sql, (name,)))

    def organisations_of(self, user: str) -> Mapping[str, MemberRole]:
        """The organisations of a user, and the role in each."""
        rows = self._database.read("SELECT organisation, role FROM members WHERE user = ? ORDER BY 1", (user,))
        return {row[0]: row[1] for row in rows}

    def role_in(self, owner: str, account: Account | None) -> MemberRole | None:
        """What somebody is in a namespace: "admin" in one's own, None in a stranger's."""
        if account is None:
            return None
        return "admin" if owner == account.name else self.organisations_of(account.name).get(owner)

    def may_see(self, repository: Repository, account: Account | None) -> bool:
        """Whether a repository is there at all for somebody."""
        return not repository.private or self.role_in(repository.owner, account) is not None

    def may_write(self, owner: str, account: Account | None) -> bool:
        """Whether somebody's token may write in a namespace."""
        return account is not None and account.role == "write" and self.role_in(owner, account) in WRITING_MEMBERS

    def may_download(self, repository: Repository, account: Account | None) -> bool:
        """Whether somebody who sees a repository gets its files: a gated one's only once access was given."""
        if not repository.gated or self.role_in(repository.owner, account) is not None:
            return True
        return account is not None and self.access_of(repository, account.name) == "accepted"

    # Access to gated repositories

    def request_access(self, repository: Repository, user: str) -> AccessStatus:
        """Asks for access; a repository gated "auto" gives it at once. A decision that was taken stands."""
        known = self.access_of(repository, user)
        if known is not None and known != "pending":
            return known
        status: AccessStatus = "accepted" if repository.gated == "auto" else "pending"
        self.set_access(repository, user, status)
        return status

    def set_access(self, repository: Repository, user: str, status: AccessStatus) -> None:
        """Decides on a user's access. Raises Refusal where the repository is not gated or the user not known."""
        if not repository.gated:
            raise Refusal(kind="bad_request", message=f"{repository.id} is not gated")
        if not self.has_user(user):
            raise Refusal(kind="no_such_page", message=f"there is no user '{user}'")
        time = self._clock().isoformat().replace("+00:00", "Z")
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT INTO access VALUES (?, ?, ?, ?)"
                " ON CONFLICT (repository, user) DO UPDATE SET status = ?3, time = ?4",
                (repository.key, user, status, time),
            )

    def access_requests(self, repository: Repository, status: AccessStatus) -> list[AccessRequest]:
        """The requests of one status, oldest first."""
        rows = self._database.read(
            "SELECT user, status, time FROM access WHERE repository = ? AND status = ? ORDER BY time, user",
            (repository.key, status),
        )
        return [AccessRequest(user=row[0], status=row[1], time=row[2]) for row in rows]

    def access_of(self, repository: Repository, user: str) -> AccessStatus | None:
        """Where a user's request stands; None where there is none."""
        if not is_text(user):
            return None
        rows = self._database.read(
            "SELECT status FROM access WHERE repository = ? AND user = ?", (repository.key, user)
        )
        return rows[0][0] if rows else None


def check_owner(name: str) -> None:
    """Raises Refusal for a name that cannot stand before a repository's."""
    if "/" in name or repository_parts(f"{name}/any")[0] != name:
        raise Refusal(kind="bad_request", message=f"{name!r} cannot be the name of a user or an organisation")


def digest(token: str) -> str:
    """What is stored of a token."""
    return hashlib.sha256(token.encode()).hexdigest()
