# SPDX-License-Identifier: Apache-2.0
"""The results as one JSON document, for machines: `report.json` and what `--json` prints.

JSON has no NaN and no infinity: they are the strings "NaN", "Infinity" and "-Infinity", which `float()` of
Python and `Number()` of JavaScript turn back into the number; null would make them one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from harness.report.summary import Header
from harness.results import Result, as_json, checks_run


def document(results: Iterable[Result], *, header: Header) -> dict[str, Any]:
    """The report as JSON values: versions, settings, profile, seed, checks_run, results."""
    kept = list(results)
    return {
        "versions": plain(header.versions),
        "settings": plain(header.settings),
        "profile": header.profile,
        "seed": header.seed,
        "checks_run": checks_run(kept),
        "results": [plain(as_json(result)) for result in kept],
    }


def render(results: Iterable[Result], *, header: Header) -> str:
    """The document as text: pure ASCII, so that neither an encoding nor a lone surrogate can break it."""
    return json.dumps(document(results, header=header), indent=2, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """Values JSON has; what it does not know (a dtype, a path) becomes its text."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value)
