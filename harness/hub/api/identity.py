# SPDX-License-Identifier: Apache-2.0
"""Endpoints about who asks, and the two that clients call on the way and that need no answer of weight."""

from __future__ import annotations

from harness.hub.api.calls import Call
from harness.hub.messages import Response, json_response
from harness.hub.refusals import Refusal


def whoami(call: Call) -> Response:
    """The user behind a token, with organisations and the token's role."""
    account = call.account
    if account is None:
        raise Refusal(kind="bad_token", message="Invalid username or password.")
    organisations = call.hub.accounts.organisations_of(account.name)
    return json_response(
        {
            "type": "user",
            "id": account.name,
            "name": account.name,
            "fullname": account.name,
            "email": f"{account.name}@hub.invalid",
            "emailVerified": True,
            "isPro": False,
            "avatarUrl": "",
            "orgs": [
                {"type": "org", "id": name, "name": name, "fullname": name, "roleInOrg": role}
                for name, role in organisations.items()
            ],
            "auth": {
                "type": "access_token",
                "accessToken": {"displayName": f"{account.name}'s token", "role": account.role},
            },
        }
    )


def validate_yaml(call: Call) -> Response:
    """What a client asks before it commits a README: the card's metadata is taken as it is."""
    call.required(call.json(), "content", str)
    return json_response({"errors": [], "warnings": []})
