# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face Hub on loopback: the real, unmodified client pushes to it and loads from it. This is its door."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.hub.accounts import Organisation, User
    from harness.hub.api.calls import Sizes
    from harness.hub.download import DownloadFailed, verified_snapshot
    from harness.hub.environment import client_environment
    from harness.hub.faults import Fault
    from harness.hub.receiving import Limits
    from harness.hub.server import HubServer

__all__ = [
    "DownloadFailed",
    "Fault",
    "HubServer",
    "Limits",
    "Organisation",
    "Sizes",
    "User",
    "client_environment",
    "verified_snapshot",
]

_PLACES = {
    "DownloadFailed": "download",
    "Fault": "faults",
    "HubServer": "server",
    "Limits": "receiving",
    "Organisation": "accounts",
    "Sizes": "api.calls",
    "User": "accounts",
    "client_environment": "environment",
    "verified_snapshot": "download",
}


def __getattr__(name: str) -> Any:
    """Imports a name when it is asked for: the command line and downloads need no server."""
    if name not in _PLACES:
        raise AttributeError(f"module 'harness.hub' has no attribute '{name}'")
    return getattr(importlib.import_module(f"harness.hub.{_PLACES[name]}"), name)
