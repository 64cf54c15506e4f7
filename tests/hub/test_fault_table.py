# SPDX-License-Identifier: Apache-2.0
"""docs/hub.md says of every fault what the real client makes of it: it is asked again, on the line installed here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.hub
@pytest.mark.slow
def test_the_document_says_what_the_real_client_does() -> None:
    script = Path(__file__).with_name("fault_table.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
