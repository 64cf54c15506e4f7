# SPDX-License-Identifier: Apache-2.0
"""What a process needs that talks to this machine alone: the variables of a Hub's client, and which hosts are this one.

Cheap to import, for those who start such a process; imports nothing else of the harness.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

OLD_CACHES = ("TRANSFORMERS_CACHE", "PYTORCH_TRANSFORMERS_CACHE", "PYTORCH_PRETRAINED_BERT_CACHE")
"""Where these are set transformers 4 prefers them; where they are not they would have it warn."""


def client_environment(
    url: str, *, token: str | None, home: Path, user: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """The variables with which a client process talks to the Hub at `url` and to no other, by caches of its own.

    They must be set before huggingface_hub or transformers is imported. An empty HF_TOKEN is none.
    user: what the process has besides; its exceptions from a proxy stay.
    """
    home = home.absolute()
    around = [user.get(name, "") for name in ("NO_PROXY", "no_proxy")]
    direct = ",".join(
        dict.fromkeys(part for part in [*around, "127.0.0.1", "localhost", urlsplit(url).hostname] if part)
    )
    return {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_MODULES_CACHE": str(home / "modules"),
        "HF_TOKEN": token or "",
        "HF_TOKEN_PATH": str(home / "token"),
        "HUGGING_FACE_HUB_TOKEN": "",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
        "HF_HUB_OFFLINE": "0",
        "TRANSFORMERS_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DISABLE_SAFETENSORS_CONVERSION": "true",  # it would look for a service elsewhere
        "NO_PROXY": direct,
        "no_proxy": direct,
        **{name: str(home / "hub") for name in OLD_CACHES if name in user},
    }


def is_loopback(host: object) -> bool:
    """Whether a host name or address means this machine."""
    name = host.decode(errors="replace") if isinstance(host, bytes) else str(host)
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
