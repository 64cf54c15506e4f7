# SPDX-License-Identifier: Apache-2.0
"""Golden files: what an original once gave, stored to tell whether an implementation still is that original.

The layout is described in fixtures/golden/README.md. Nothing here imports torch before it is called.
"""

from harness.capture import capture
from harness.golden.command import add_golden_parser, run_golden
from harness.golden.file import Golden, read_golden
from harness.golden.recording import record
from harness.golden.reproduction import build, gradients, reproduce, without_downcast
from harness.golden.verification import BOUNDS, GoldenResult, verify

__all__ = [
    "BOUNDS",
    "Golden",
    "GoldenResult",
    "add_golden_parser",
    "build",
    "capture",
    "gradients",
    "read_golden",
    "record",
    "reproduce",
    "run_golden",
    "verify",
    "without_downcast",
]
