# SPDX-License-Identifier: Apache-2.0
"""Cases: what is drawn for one example of a check, small enough to be written on one line."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from harness.families import Family, longest_of

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


Kind = Literal["drawn", "routed", "independent", "continuous"]
"""Which models of a family a check is about: any, those with experts, or what that function makes of any."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One drawn configuration, its weights and its batch, as a few numbers that replay anywhere.

    fields: configuration in the original's own names. rows, tokens: the batch's shape. seed: draws weights and batch.
    """

    fields: Mapping[str, Any]
    rows: int
    tokens: int
    seed: int

    def as_dict(self) -> dict[str, Any]:
        """Everything needed to draw the same case again, as JSON values; the configuration first."""
        return {**self.fields, "rows": self.rows, "tokens": self.tokens, "seed": self.seed}


def case_from_dict(values: Mapping[str, Any]) -> Case:
    """The case that `as_dict` described."""
    fields = {key: value for key, value in values.items() if key not in ("rows", "tokens", "seed")}
    return Case(fields=fields, rows=values["rows"], tokens=values["tokens"], seed=values["seed"])


def large_cases(family: Family, case: Case) -> Iterator[tuple[str, Case]]:
    """The case with each of the family's large sizes: what sets it apart in words, and one row of its full length."""
    for overrides in family.large:
        fields = {**case.fields, **overrides}
        described = ", ".join(f"{name}={value!r}" for name, value in overrides.items())
        yield described, dataclasses.replace(case, fields=fields, rows=1, tokens=longest_of(family, fields))


def cases(family: Family, kind: Kind = "drawn") -> SearchStrategy[Case]:
    """A strategy of cases of a family. Lengths favour the corners: one token, and exactly the maximum."""
    from hypothesis import strategies as st

    nearby = {"independent": family.independent, "continuous": family.continuous}.get(kind)
    configurations, routing = family.configurations(), family.routing
    if kind == "routed" and routing is not None:
        configurations = configurations.filter(lambda fields: bool(routing.layers(fields)))

    @st.composite
    def draw_case(draw: st.DrawFn) -> Case:
        fields = draw(configurations)
        fields = dict(nearby(fields)) if nearby else fields
        maximum = longest_of(family, fields)
        # The same choices for every kind, so that a length that does not matter shrinks to the shortest.
        kind, length = draw(st.sampled_from(("any", "maximum", "one"))), draw(st.integers(2, maximum))
        tokens = {"any": length, "maximum": maximum, "one": 1}[kind]
        return Case(fields=fields, rows=draw(st.integers(1, 3)), tokens=tokens, seed=draw(st.integers(0, 999)))

    return draw_case()
