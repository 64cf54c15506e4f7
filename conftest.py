# SPDX-License-Identifier: Apache-2.0
"""Keeps a run of parity checks alone from importing the tests of the harness itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves tests/ out when the marker expression asks for `parity`: no test there is a parity check."""
    expression = config.getoption("markexpr") or ""
    if re.search(r"\bparity\b", expression) and "not parity" not in expression:
        return collection_path.is_relative_to(config.rootpath / "tests") or None
    return None
