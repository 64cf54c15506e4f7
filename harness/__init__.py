# SPDX-License-Identifier: Apache-2.0
"""The public door of the parity harness; names are imported when they are first asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.door import parametrize_with_checks
    from harness.families import Family, LossConvention, Tap, register_family
    from harness.ports import Port
    from harness.results import Result
    from harness.runner import check_parity

__all__ = [
    "Family",
    "LossConvention",
    "Port",
    "Result",
    "Tap",
    "check_parity",
    "parametrize_with_checks",
    "register_family",
]

_HOMES = {
    "Family": "harness.families",
    "LossConvention": "harness.families",
    "Port": "harness.ports",
    "Result": "harness.results",
    "Tap": "harness.families",
    "check_parity": "harness.runner",
    "parametrize_with_checks": "harness.door",
    "register_family": "harness.families",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'harness' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
