# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face Hub on loopback: the real, unmodified client pushes to it and loads from it. This is its door."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.hub.accounts import Organisation, User
from harness.hub.api.calls import Sizes
from harness.hub.faults import Fault
from harness.hub.server import HubServer, client_environment
from harness.hub.wire import Limits

if TYPE_CHECKING:
    from harness.hub.download import DownloadFailed, verified_snapshot

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


def __getattr__(name: str) -> Any:
    """Imports what a server does not need when it is asked for."""
    if name in ("DownloadFailed", "verified_snapshot"):
        from harness.hub import download

        return getattr(download, name)
    raise AttributeError(f"module 'harness.hub' has no attribute '{name}'")
