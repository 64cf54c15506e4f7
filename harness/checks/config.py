# SPDX-License-Identifier: Apache-2.0
"""Checks of the configuration: it means what the original's means, survives JSON, and hides nothing."""

from __future__ import annotations

import json
import sys
from typing import Any
from unittest import mock

from harness.cases import Case
from harness.errors import Mismatch
from harness.ports import first_line, source_file
from harness.trial import Trial, call_port, config_class, draw, place, port_class, port_config, port_field

UNKNOWN_KEY = "a_field_that_nobody_declares"


def json_round_trip(trial: Trial, case: Case) -> dict[str, float]:
    """A configuration written to config.json and read back equals itself, field by field, and is a fixed point.

    Would have caught: `tie_word_embeddings` absent from the file on transformers 5, where a tied head then comes back
    untied; fields that are set after construction and never saved.
    """
    config = port_config(trial, case.fields)
    first, second = trial.workdir / "first", trial.workdir / "second"
    config.save_pretrained(first)
    loaded = config_class(trial).from_pretrained(first)  # type: ignore[attr-defined]
    loaded.save_pretrained(second)
    for field in case.fields:
        name = port_field(trial, type(config), field)
        if getattr(loaded, name) != getattr(config, name):
            raise Mismatch(f"{name} was {getattr(config, name)!r} and is {getattr(loaded, name)!r} after config.json")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (first, second))
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    if changed:
        key = changed[0]
        raise Mismatch(f"config.json is not a fixed point: {key} was {before.get(key)!r}, then {after.get(key)!r}")
    return {}


def fields(trial: Trial, case: Case) -> dict[str, float]:
    """Every field of the original can be read back, under the port's name and under every alias it accepts.

    Would have caught: `block_size` accepted as a keyword and left at its default; an alias that reads another field.
    """
    config = port_config(trial, case.fields)
    aliases = getattr(type(config), "attribute_map", {})
    for field, value in case.fields.items():
        main = port_field(trial, type(config), field)
        for name in (main, *(alias for alias, target in aliases.items() if target == main)):
            if not hasattr(config, name) or getattr(config, name) != value:
                raise Mismatch(f"config.{name} is {getattr(config, name, 'absent')!r} after {main}={value!r} was given")
        by_alias = [name for name in trial.family.fields.get(field, ()) if name in aliases]
        for name in by_alias:
            others = {port_field(trial, type(config), key): v for key, v in case.fields.items() if key != field}
            if getattr(type(config)(**others, **{name: value}), main) != value:
                raise Mismatch(f"{name}={value!r} was accepted, but config.{main} is not {value!r}")
    return {}


def unknown_keys(trial: Trial, case: Case) -> dict[str, float]:
    """A key nobody declares is refused, or at least kept and written to config.json; it never vanishes.

    Would have caught: `GPTConfig(top_k=4)` that silently trained a model with two experts a token.
    """
    try:
        config = port_config(trial, case.fields, **{UNKNOWN_KEY: 3})
    except (TypeError, ValueError, AttributeError):
        return {"refused": 1.0}
    if config.to_dict().get(UNKNOWN_KEY) != 3:
        raise Mismatch("an unknown key is accepted and then lost; a configuration refuses it, or keeps it")
    return {"refused": 0.0}


def declared(trial: Trial, case: Case) -> dict[str, float]:
    """Every configuration field that the model's code reads is written to config.json.

    Would have caught: fields that live on the class or are set by hand, and so do not travel with a checkpoint;
    fields that transformers 5 no longer gives every configuration (pad_token_id, is_decoder).
    """
    config = port_config(trial, case.fields)
    read = _reads(trial, case, config)
    saved = set(json.loads(config.to_json_string(use_diff=False)))
    aliases = getattr(type(config), "attribute_map", {})
    inherited = {name for base in type(config).__mro__[1:] for name in vars(base)}
    own = {name for name, value in vars(type(config)).items() if callable(value) or isinstance(value, property)}
    lost = sorted(name for name in read - saved - set(aliases) - inherited - own if not name.startswith("_"))
    if lost:
        raise Mismatch(
            f"the model reads config.{lost[0]}, which config.json does not carry", metrics={"lost": len(lost)}
        )
    return {"fields_read": float(len(read))}


def _reads(trial: Trial, case: Case, config: Any) -> set[str]:
    file, cls = str(source_file(trial.port.model, root=trial.port.root)), type(config)
    names: set[str] = set()
    inherited: Any = cls.__getattribute__

    def record(self: Any, name: str) -> Any:
        if sys._getframe(1).f_code.co_filename == file:
            names.add(name)
        return inherited(self, name)

    with mock.patch.object(cls, "__getattribute__", record):
        try:
            call_port(trial, place(trial, port_class(trial)(config)), draw(trial, case).tokens)
        except AttributeError as error:
            raise Mismatch(f"the model reads a field the configuration does not have: {first_line(error)}") from error
    return names
