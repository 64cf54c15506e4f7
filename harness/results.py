# SPDX-License-Identifier: Apache-2.0
"""What became of one check: the record that every door hands out and every report is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

Status = Literal["passed", "failed", "xfailed", "xpassed", "skipped", "error"]

BAD: frozenset[str] = frozenset({"failed", "xpassed", "error"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What became of one check on one port, route, backend and dtype.

    `config` is the configuration that failed, shrunk, and None when nothing failed; `metrics` holds numbers by
    name (the largest over the examples); `first_divergence` names a module; `bundle` is the path of the directory
    that replays the failure; `examples` counts the cases tried; `seconds` is wall-clock time. A result that is
    skipped, failed or an error always has a one-line `reason`.
    """

    port: str
    family: str
    check: str
    route: str
    backend: str
    dtype: str
    status: Status
    reason: str = ""
    config: Mapping[str, Any] | None = None
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    first_divergence: str | None = None
    bundle: str | None = None
    examples: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.status in ("skipped", "failed", "error") and not self.reason:
            raise ValueError(f"a result that is {self.status} has to say why: {self.check}")


def as_json(result: Result) -> dict[str, Any]:
    """The JSON object of one result: every field under its own name."""
    return dataclasses.asdict(result)


def checks_run(results: Iterable[Result]) -> int:
    """How many results come from a check that ran; a skipped one did not."""
    return sum(result.status != "skipped" for result in results)
