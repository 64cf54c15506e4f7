# SPDX-License-Identifier: Apache-2.0
"""What a run tells people and machines: a table on the terminal; JSON, JUnit and Markdown files."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from harness.report.files import new_directory, write_atomically
from harness.report.summary import Header, count_line
from harness.report.terminal import make_console, print_table, progress
from harness.results import Result

__all__ = [
    "Header",
    "count_line",
    "make_console",
    "new_directory",
    "print_table",
    "progress",
    "write_atomically",
    "write_reports",
]


def write_reports(directory: str | os.PathLike[str], results: Iterable[Result], *, header: Header) -> None:
    """Writes `report.json`, `junit.xml` and `report.md` into the directory, made if it is missing."""
    from harness.report import json_report, junit, markdown

    kept = list(results)
    # All three are made before the first is written, so that a bad value leaves no half set of reports.
    reports: dict[str, str | bytes] = {
        "report.json": json_report.render(kept, header=header),
        "junit.xml": junit.render(kept, header=header),
        "report.md": markdown.render(kept, header=header),
    }
    for name, data in reports.items():
        write_atomically(Path(directory) / name, data)
