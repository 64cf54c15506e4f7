# SPDX-License-Identifier: Apache-2.0
"""Checks of the configuration: it means what the original's means, survives JSON, and hides nothing."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

from harness.cases import Case
from harness.errors import DescriptionError, Mismatch, Skip
from harness.ports import first_line, source_file
from harness.trial import (
    Trial,
    call_port,
    config_class,
    constants,
    draw,
    field_known_by,
    initial_original,
    place,
    port_class,
    port_config,
    port_field,
)

UNKNOWN_KEY = "a_field_that_nobody_declares"

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

LIBRARY_KEYS: Mapping[str, Any] = {
    "_attn_implementation_autoset": True,
    "attn_implementation": "eager",
    "dtype": "float32",
    "gradient_checkpointing": False,
    "is_decoder": True,
    "is_encoder_decoder": False,
    "name_or_path": "",
    "problem_type": None,
    "pruned_heads": {},
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "task_specific_params": None,
    "tokenizer_class": "GPT2TokenizerFast",
    "torch_dtype": "float32",
    "torchscript": False,
    "transformers_version": "4.40.0",
    "use_bfloat16": False,
}
"""What releases of transformers from 4 on, its quantizers and its users' scripts put into any config.json."""

COMMON_NAMES = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
"""What transformers' own tests, its caches, PEFT and serving engines read from every configuration."""

DECODING = (
    "min_length",
    "min_new_tokens",
    "early_stopping",
    "stop_strings",
    "num_beams",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "repetition_penalty",
    "encoder_repetition_penalty",
    "length_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "bad_words_ids",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "suppress_tokens",
    "begin_suppress_tokens",
    "sequence_bias",
    "guidance_scale",
    "watermarking_config",
    "penalty_alpha",
    "num_beam_groups",
    "diversity_penalty",
)
"""Settings of `generate` that change which tokens come out; caches, lengths and what is returned are not among them."""


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
    _special_tokens_travel(trial, case)
    _library_keys_pass(trial, before)
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    if changed:
        key = changed[0]
        raise Mismatch(f"config.json is not a fixed point: {key} was {before.get(key)!r}, then {after.get(key)!r}")
    return {}


def _library_keys_pass(trial: Trial, values: Mapping[str, Any]) -> None:
    """Raises Mismatch when a key that one release or another of the library itself writes to config.json is refused."""
    cls: Any = config_class(trial)
    for key, value in LIBRARY_KEYS.items():
        if key in values:
            continue
        try:
            cls.from_dict({**values, key: value})
        except Exception as error:  # however a configuration refuses
            raise Mismatch(
                f"{key}={value!r} in config.json, where transformers itself writes it, is refused: {first_line(error)}"
            ) from error


def _special_tokens_travel(trial: Trial, case: Case) -> None:
    """Raises Mismatch when a token id, or use_cache, is not what the configuration was given, before and after a file.

    A list of tokens that end a text is asked too, as recent models have it.
    """
    one: dict[str, Any] = dict(zip(SPECIAL_TOKENS, (1, 2, 3), strict=True))
    for number, given in enumerate((one, {**one, "eos_token_id": [2, 4]}, {"use_cache": False})):
        try:
            config = port_config(trial, case.fields, **given)
        except (TypeError, ValueError):
            continue  # a configuration that takes none of these
        directory = trial.workdir / f"tokens-{number}"
        config.save_pretrained(directory)
        model = port_class(trial)(copy.deepcopy(config))
        holders = {
            "": config,
            " after config.json": type(config).from_pretrained(directory),
            " in the generation settings of a model": getattr(model, "generation_config", config),
        }
        for when, found in holders.items():
            for name, value in given.items():
                if getattr(found, name, value) != value:
                    raise Mismatch(f"{name}={value} was given, and is {getattr(found, name)!r}{when}")


def fields(trial: Trial, case: Case) -> dict[str, float]:
    """Every field of the original can be read back, under the port's name and under every alias it accepts.

    Would have caught: `block_size` accepted as a keyword and left at its default; an alias that reads another field.
    """
    config = port_config(trial, case.fields)
    aliases = getattr(type(config), "attribute_map", {})
    refused: dict[str, bool] = {}
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
            if type(value) is int:
                refused[f"{main} and {name}"] = _refuses(type(config), {**others, main: value, name: 2 * value})
    if len(set(refused.values())) > 1:
        yes, no = (next(names for names, answer in refused.items() if answer == wanted) for wanted in (True, False))
        raise Mismatch(f"{yes}, two names of one field, are refused when they disagree, and {no} are not")
    return {}


def _refuses(cls: type, values: Mapping[str, Any]) -> bool:
    try:
        cls(**values)
    except (TypeError, ValueError):
        return True
    return False


def unknown_keys(trial: Trial, case: Case) -> dict[str, float]:
    """A key nobody declares is refused, or at least kept and written to config.json; it never vanishes.

    A field's name in the original, where old files and scripts have it, is taken for that field, or refused.
    Would have caught: `GPTConfig(top_k=4)` that silently trained a model with two experts a token.
    """
    try:
        config = port_config(trial, case.fields, **{UNKNOWN_KEY: 3})
    except (TypeError, ValueError, AttributeError):
        config = None
    if config is not None and config.to_dict().get(UNKNOWN_KEY) != 3:
        raise Mismatch("an unknown key is accepted and then lost; a configuration refuses it, or keeps it")
    for field in trial.family.own_names:
        _own_name_counts(trial, case, field)
    return {"refused": float(config is None)}


def _own_name_counts(trial: Trial, case: Case, field: str) -> None:
    """Raises Mismatch when a field given by its name in the original is accepted, and the port's stays as it was."""
    cls = config_class(trial)
    name = port_field(trial, cls, field)
    others = {port_field(trial, cls, key): value for key, value in case.fields.items() if key != field}
    try:
        config = cls(**others, **{field: case.fields[field]})
    except (TypeError, ValueError, AttributeError):
        return
    if getattr(config, name) != case.fields[field]:
        raise Mismatch(
            f"{cls.__name__}({field}={case.fields[field]!r}) is accepted and leaves {name}={getattr(config, name)!r};"
            f" {field} is what the original and its files call it: a configuration takes it, or refuses it"
        )


def declared(trial: Trial, case: Case) -> dict[str, float]:
    """Every configuration field that the model's code reads is written to config.json.

    Would have caught: fields that live on the class or are set by hand, and so do not travel with a checkpoint;
    fields that transformers 5 no longer gives every configuration (pad_token_id, is_decoder).
    """
    config = port_config(trial, case.fields)
    if not hasattr(config, "to_json_string"):
        raise Skip(f"{type(config).__name__} is not a transformers configuration")
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


def defaults(trial: Trial, case: Case) -> dict[str, float]:
    """What is not said means what it means in the original: its fields' defaults, no special tokens, no settings for
    generation.

    Would have caught: a port whose vocabulary is GPT-2's 50257 where the original has 50304, or without the biases the
    original has by default; an `eos_token_id` taken over from GPT-2, at which generation stops and the original's goes
    on; a temperature that nobody asked for.
    """
    if trial.family.defaults is None:
        raise Skip(f"family '{trial.family.name}' declares no defaults")
    cls = config_class(trial)
    if cls.__module__.startswith("transformers."):
        raise Skip(f"{cls.__name__} is transformers' own, with the defaults of another model")
    try:
        config = cls(**constants(trial, cls))
    except Exception as error:  # to demand every field is a port's right
        raise Skip(f"{cls.__name__}() without arguments raises {type(error).__name__}") from None
    for field, value in trial.family.defaults.items():
        try:
            name = port_field(trial, cls, field)
        except Mismatch:
            continue  # config.fields says so
        found = getattr(config, name, value)
        if name not in trial.family.port_fields and found != value:
            raise Mismatch(f"{cls.__name__}() has {name}={found!r}; the original's default is {value!r}")
    tokens = {name: trial.family.special_tokens.get(name) for name in SPECIAL_TOKENS}
    _require_special_tokens(f"{cls.__name__}()", config, tokens)
    model = port_class(trial)(_config(trial, case))
    generation = getattr(model, "generation_config", None)
    if generation is None:
        return {}
    given = {name: trial.family.port_fields.get(name, value) for name, value in tokens.items()}
    _require_special_tokens("a new model's generation_config", generation, given)
    unasked = _generation_defaults(type(generation))
    for name in DECODING:
        found = getattr(generation, name, None)
        if found and found != unasked.get(name):  # what is empty or zero is off
            raise Mismatch(
                f"a new model's generation_config has {name}={found!r}; a port leaves it at {unasked.get(name)!r},"
                " because the original generates as it is asked to"
            )
    return {}


def _require_special_tokens(where: str, holder: Any, tokens: dict[str, int | None]) -> None:
    for name, value in tokens.items():
        found = getattr(holder, name, None)
        if found != value:
            original = "knows no such token" if value is None else f"has {value}"
            raise Mismatch(f"{where} has {name}={found!r}; the original {original}")


def _generation_defaults(cls: Any) -> dict[str, Any]:
    # transformers 5 leaves everything None until generate fills it in; 4 has no such method.
    filled_in: Callable[[], dict[str, Any]] = getattr(cls, "_get_default_generation_params", dict)
    return {**cls().to_dict(), **filled_in()}


def refused(trial: Trial, case: Case) -> dict[str, float]:
    """A configuration that the original refuses is refused by the port: by its configuration, when the model is built,
    or at the latest by its first forward.

    Would have caught: ten channels for four heads, accepted and computed with five heads.
    """
    tokens = draw(trial, case).tokens
    # Both take the case as it was drawn, so that what they refuse below are the overrides.
    initial_original(trial, case.fields)
    call_port(trial, place(trial, port_class(trial)(_config(trial, case))), tokens)
    count = 0
    for overrides in trial.family.refused:
        fields = {**case.fields, **overrides}
        try:
            initial_original(trial, fields)
        except Exception:  # asserts, or raises what it likes
            count += 1
        else:
            continue
        try:
            call_port(trial, place(trial, port_class(trial)(port_config(trial, fields))), tokens)
        except DescriptionError:
            raise
        except Exception:
            continue
        described = ", ".join(f"{name}={value!r}" for name, value in overrides.items())
        raise Mismatch(f"the port builds and runs a model with {described}, which the original refuses")
    if not count:
        raise Skip("there is no configuration that the original is known to refuse")
    return {"refused": float(count)}


def common_names(trial: Trial, case: Case) -> dict[str, float]:
    """The names that every transformers configuration has (hidden_size, num_attention_heads, num_hidden_layers,
    vocab_size) read and set the original's fields.

    Caches, PEFT, quantizers and serving engines read them. Would have caught: a configuration without `hidden_size`,
    on which DeepSpeed's automatic settings fail; one that takes `hidden_size=64` and builds a model of 768 channels.
    """
    from transformers import PretrainedConfig

    config = _config(trial, case)
    if not isinstance(config, PretrainedConfig):
        raise Skip(f"{type(config).__name__} is not a transformers configuration")
    others = [common for common in COMMON_NAMES if common not in case.fields]
    if others and not any(hasattr(config, common) for common in others):
        raise Skip("the configuration has names of its own alone (an attribute_map would add the common ones)")
    for common in COMMON_NAMES:
        field = field_known_by(trial, case.fields, common)
        if field is None:
            continue
        value, name = case.fields[field], port_field(trial, type(config), field)
        if getattr(config, common, None) != value:
            found = f"is {getattr(config, common)!r}" if hasattr(config, common) else "does not exist"
            raise Mismatch(
                f"config.{common} {found} after {name}={value!r} was given; libraries read that name from every"
                " configuration (attribute_map gives a field a second name)"
            )
        others = {port_field(trial, type(config), f): v for f, v in case.fields.items() if f != field}
        try:
            by_alias = type(config)(**others, **{common: value})
        except (TypeError, ValueError, AttributeError):
            continue  # refused in so many words, so nobody is misled
        if getattr(by_alias, name) != value:
            raise Mismatch(f"{common}={value!r} was accepted, but config.{name} is {getattr(by_alias, name)!r}")
    return {}


def _config(trial: Trial, case: Case) -> Any:
    """The case's configuration. Raises Skip where a field has no place in it, which `config.fields` reports."""
    for field in case.fields:
        try:
            port_field(trial, config_class(trial), field)
        except Mismatch as error:
            raise Skip(f"{error} (config.fields)") from None
    return port_config(trial, case.fields)


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
            if error.obj is not config:
                raise
            raise Mismatch(f"the model reads a field the configuration does not have: {first_line(error)}") from error
    return names
