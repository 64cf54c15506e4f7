# SPDX-License-Identifier: Apache-2.0
"""What a sender may do with a repository that it sees, and how it is told that it may not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from harness.hub.api.calls import RepositoryCall
from harness.hub.refusals import Refusal

if TYPE_CHECKING:
    from harness.hub.accounts import Account

Access = Literal["see", "download", "propose", "write", "own"]
"""What a sender needs: to see the repository, its files, to open a pull request there (whoever sees it and has a token
to write), to write to it, or to write even where it is disabled."""


def require(call: RepositoryCall, access: Access) -> None:
    """Raises the Refusal that has the client raise what it would against the real Hub."""
    repository, account, accounts = call.repository, call.account, call.hub.accounts
    if repository.disabled and access != "own":
        raise Refusal(kind="disabled", message="Access to this resource is disabled.")
    if access in ("propose", "write", "own"):
        if account is None:
            raise no_repository(None)
        if account.role != "write":
            message = f"the token of {account.name} is for reading; writing to {repository.id} needs a write token"
            raise Refusal(kind="forbidden", message=message)
        if access != "propose" and not accounts.may_write(repository.owner, account):
            raise Refusal(kind="forbidden", message=f"{account.name} has no right to write to {repository.id}")
    if access == "download" and not accounts.may_download(repository, account):
        kind: Literal["gated", "gated_for_anonymous"] = "gated_for_anonymous" if account is None else "gated"
        raise Refusal(
            kind=kind,
            message=f"Access to {repository.type} {repository.id} is restricted: ask for access, and log in",
        )


def no_repository(account: Account | None) -> Refusal:
    """What a repository that is not there, or not for its sender, is answered with: the two cannot be told apart."""
    if account is None:
        return Refusal(kind="no_repository_for_anonymous", message="Invalid username or password.")
    return Refusal(kind="no_repository", message="Repository not found")
