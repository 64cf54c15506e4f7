# SPDX-License-Identifier: Apache-2.0
"""The ways a run can end that are not a result: each has its exit code and its one line for the user."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EXIT_HOLDS, EXIT_FAILED, EXIT_DESCRIPTION, EXIT_NOT_HERE = 0, 1, 2, 3


class ParityError(Exception):
    """Base of what the harness tells its user in one line; `exit_code` is what a shell gets."""

    exit_code = EXIT_FAILED


class DescriptionError(ParityError):
    """The description of a port, an option or an input file is wrong (exit 2)."""

    exit_code = EXIT_DESCRIPTION


class NotHere(ParityError):
    """Something asked for is not on this machine: a device, a framework (exit 3)."""

    exit_code = EXIT_NOT_HERE


class Mismatch(ParityError):
    """A property does not hold. Raised by checks; never escapes the runner.

    `metrics` are the numbers behind the sentence; `tensors` (float, any shape) go into the bundle.
    """

    def __init__(
        self,
        message: str,
        *,
        metrics: Mapping[str, float] | None = None,
        tensors: Mapping[str, Any] | None = None,
        first_divergence: str | None = None,
    ) -> None:
        super().__init__(message)
        self.metrics = dict(metrics or {})
        self.tensors = dict(tensors or {})
        self.first_divergence = first_divergence


class OutOfTime(Mismatch):
    """A check's time is up. Raised in the middle of whatever is running; there is none left to shrink or to look."""


def says_out_of_memory(kind: str, message: str) -> bool:
    """Whether an exception of that type and text means that there was no memory left: torch raises RuntimeError."""
    return kind == "MemoryError" or "allocate memory" in message or "not enough memory" in message


class Skip(ParityError):
    """A check cannot say anything here; the message says why. Raised by checks; becomes a skipped result."""
