# SPDX-License-Identifier: Apache-2.0
"""What a process that runs foreign code can be asked: functions from JSON values to JSON values."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.cases import case_from_dict
from harness.checks import CATALOGUE
from harness.ports import Port, family_of, load_object, require_classes
from harness.results import as_json

if TYPE_CHECKING:
    from harness.runner import Item, Options, Session

Values = Mapping[str, Any]


def as_values(values: Values) -> dict[str, Any]:
    """Ports, items and options among the values of a question, as JSON."""
    return {name: _as_value(value) for name, value in values.items()}


def _as_value(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {name: _as_value(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_as_value(inner) for inner in value]
    if not dataclasses.is_dataclass(value):
        return value
    # A family is found again by its name, a check by its id: they hold functions.
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.name != "family"}
    if "check" in fields:
        fields["check"] = fields["check"].id
    elif hasattr(value, "family"):
        fields["family"] = value.family
    return _as_value(fields)


def _port(values: Values) -> Port:
    return Port(**{**values, "root": Path(values["root"])})


def _item(values: Values) -> Item:
    from harness.runner import Item

    port = _port(values["port"])
    check = next(check for check in CATALOGUE if check.id == values["check"])
    where = {name: values[name] for name in ("route", "backend", "dtype")}
    return Item(port=port, family=family_of(port), check=check, **where)


def _options(values: Values) -> Options:
    from harness.runner import Options

    return Options(**{**values, "report": values["report"] and Path(values["report"])})


def _run(shared: Session, values: Values) -> dict[str, Any]:
    from harness.runner import run_item

    return as_json(run_item(_item(values["item"]), _options(values["options"]), shared))


def _skip(shared: Session, values: Values) -> dict[str, Any] | None:
    from harness.runner import skipped

    result = skipped(_item(values["item"]))
    return None if result is None else as_json(result)


def _replay(shared: Session, values: Values) -> dict[str, Any]:
    from harness.runner import replay

    case, bundle = case_from_dict(values["case"]), Path(values["bundle"])
    return as_json(replay(_port(values["port"]), case, values["recorded"], bundle, shared))


def _require_classes(shared: Session, values: Values) -> None:
    from harness.runner import contained

    with contained():
        require_classes(_port(values["port"]))


def _configuration_class(shared: Session, values: Values) -> str | None:
    from harness.runner import contained

    root = Path(values["root"])
    with contained():
        found = getattr(load_object(values["model"], root=root), "config_class", None)
    if found is None:
        return None
    file = Path(sys.modules[found.__module__].__file__ or "")
    place = str(file.relative_to(root)) if file.is_relative_to(root) else found.__module__
    return f"{place}:{found.__qualname__}"


def report_end(shared: Session | None, values: Values) -> dict[str, Any]:
    """The result of an item whose process ended without one; with its bundle where there is a session to write it."""
    from harness.runner import ended

    case = case_from_dict(values["case"]) if values["case"] else None
    result = ended(_item(values["item"]), _options(values["options"]), case, values["reason"], shared)
    return as_json(dataclasses.replace(result, seconds=values["seconds"]))


QUESTIONS: Mapping[str, Callable[[Session, Values], Any]] = {
    "skip": _skip,
    "run": _run,
    "replay": _replay,
    "require_classes": _require_classes,
    "configuration_class": _configuration_class,
    "report_end": report_end,
}

HARMLESS = frozenset({"skip"})
"""Questions whose answers need no foreign code."""
