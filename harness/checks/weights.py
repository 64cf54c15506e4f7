# SPDX-License-Identifier: Apache-2.0
"""Checks of the weights: nothing lost, nothing made up, tied tensors one tensor, and the way back."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import logging
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file

from harness.backends import pytorch
from harness.cases import Case, large_cases
from harness.checks.loss import at_least_two_tokens
from harness.checks.untouched import WRITTEN_BY_SAVING, untouched
from harness.errors import DescriptionError, Mismatch, Skip
from harness.families import dropouts_of, longest_of, tied_of, with_dropout
from harness.layout import layout_of
from harness.numerics import FLOAT32_INSIDE_BOUND, relative_error
from harness.ports import converter_spec, first_line, load_object, shortened
from harness.programs import starts_quickly
from harness.routes import carry, checkpoint
from harness.routes.pretrained import load, save
from harness.trial import (
    Trial,
    copied,
    initial_original,
    is_asked,
    original_model,
    port_class,
    port_config,
    port_field,
    port_logits,
    prepare,
    require_semantics,
    run_original,
    run_port,
    worst,
)

DROPOUT = 0.25

File = TypeVar("File")


def coverage(trial: Trial, case: Case) -> dict[str, float]:
    """Every number of the original is in the port exactly once, and the port holds nothing else but zeros and ones.

    Compared by content, whatever the tensors are called, however they are transposed, split or joined; tied tensors
    count once. Would have caught: a converter whose filter `endswith(".bias")` drops every bias; a head left at its
    random initialisation; a tensor loaded into two places.
    """
    original = original_model(trial, case, dtype="float32")
    port = carry(trial, case, original)
    source, target = _numbers(original), _numbers(port)
    lost = _beyond(source, target)
    made_up = _beyond(target, source)
    made_up = made_up[(made_up != 0) & (made_up != 1)]
    if len(lost):
        raise Mismatch(f"{len(lost)} numbers of the original are not in the port{_owner(lost, original)}")
    if len(made_up):
        raise Mismatch(f"the port holds {len(made_up)} numbers that are not the original's{_owner(made_up, port)}")
    return {"numbers": float(len(source))}


def values(trial: Trial, case: Case) -> dict[str, float]:
    """Every loaded tensor equals the original's of the same name, bit for bit.

    Would have caught: a square matrix loaded without its transpose (no shape complains), q, k and v in another order,
    a tensor written twice, layers shifted by one.
    """
    original = original_model(trial, case, dtype="float32")
    target = carry(trial, case, original).state_dict()
    trained = {name for name, _ in original.named_parameters(remove_duplicate=False)}
    for key, tensor in original.state_dict().items():
        name = trial.family.port_key(key)
        if name not in target:
            if key not in trained:
                continue  # a table that masks, which a port may do without
            raise Skip("the port's tensors have names of their own; weights.coverage compares them by content")
        same_shape = target[name].shape == tensor.shape
        if same_shape and torch.equal(target[name].float(), tensor):
            continue
        if _arranged_on_purpose(trial, case):
            raise Skip("the port's loader arranges tensors otherwise, and the port computes the same from them")
        if not same_shape:
            raise Mismatch(f"{name} has shape {tuple(target[name].shape)}, {tuple(tensor.shape)} in the original")
        raise Mismatch(f"{name} is not the original's {key}", tensors={"actual": target[name], "expected": tensor})
    return {}


def _arranged_on_purpose(trial: Trial, case: Case) -> bool:
    if trial.port.loader == "state_dict":
        return False
    layout = layout_of(trial, case)
    if layout is None or layout.is_plain(trial):
        return False
    pair = prepare(trial, case)
    expected = run_original(trial, pair.original, pair.batch.tokens, pair.batch.targets)["logits"]
    actual = port_logits(trial, pair.port, pair.batch.tokens)
    return actual.shape == expected.shape and relative_error(actual, expected) <= FLOAT32_INSIDE_BOUND


def configuration(trial: Trial, case: Case) -> dict[str, float]:
    """What the port's own converter returns has the configuration of the file, dropout too.

    Fields that change no logit until somebody trains would be missed otherwise. Would have caught: a dropout left out
    of the mapping, an initial range or a padding token that stays at its default.
    """
    if trial.port.loader not in ("checkpoint", "command"):
        raise Skip("the port declares no converter")
    defaults = trial.family.defaults or {}
    # A number that is left out must not be found again in the defaults.
    other = {name: 1.5 * n for name, n in case.fields.items() if isinstance(n, float) and n == defaults.get(name)}
    case = dataclasses.replace(case, fields=with_dropout(trial.family, {**case.fields, **other}, DROPOUT))
    model = checkpoint.load(trial, checkpoint.write(trial, case, original_model(trial, case, dtype="float32")))
    config = getattr(model, "config", None)
    for field, value in case.fields.items() if config is not None else ():
        try:
            name = port_field(trial, type(config), field)
        except Mismatch:
            continue  # config.fields says so
        if (found := getattr(config, name, None)) != value:
            raise Mismatch(f"the converter makes a model with {name}={found!r} of a file with {field}={value!r}")
    return {}


def evaluation_mode(trial: Trial, case: Case) -> dict[str, float]:
    """What the port's own converter returns is in evaluation mode, as what `from_pretrained` returns is.

    Would have caught: a converter without a call of eval(), whose model drops out at random in inference.
    """
    if trial.port.loader not in ("checkpoint", "command"):
        raise Skip("the port declares no converter")
    model = checkpoint.load(trial, checkpoint.write(trial, case, original_model(trial, case, dtype="float32")))
    if any(module.training for module in model.modules()):
        raise Mismatch("the converter returns a model in training mode; expected evaluation mode, as from_pretrained's")
    return {}


def tied(trial: Trial, case: Case) -> dict[str, float]:
    """Tied weights are one tensor: after construction, after loading, and after save and load; others are two.

    Would have caught: `_tied_weights_keys` missing on transformers 5, where head and embedding become two parameters
    with equal values that drift apart in training; a head that 4.57 replaces by the embedding, since nothing in the
    configuration says that they are two.
    """
    original = original_model(trial, case, dtype="float32")
    require = functools.partial(_require_ties, trial, case)
    require(port_class(trial)(port_config(trial, case.fields)), "after construction")
    require(carry(trial, case, original), "after loading")
    loaded: Any = load(trial, save(trial, case, original))
    require(loaded, "after save_pretrained and from_pretrained")
    loaded.set_input_embeddings(copied(loaded.get_input_embeddings()))
    loaded.tie_weights()
    require(loaded, "after set_input_embeddings and tie_weights")
    return {}


def tied_after_resize(trial: Trial, case: Case) -> dict[str, float]:
    """Growing and shrinking the vocabulary keeps the tie, the rows that stay, and their logits; the loss follows.

    Would have caught: a resized head that is drawn anew, or is no longer the embedding; a loss that keeps the
    vocabulary size of construction, so that training fails after `resize_token_embeddings`.
    """
    case = at_least_two_tokens(case)
    pair = prepare(trial, case)
    vocabulary = case.fields[trial.family.vocabulary]
    expected = port_logits(trial, pair.port, pair.batch.tokens)
    numbers = []
    for size in (vocabulary + 3, vocabulary):
        pair.port.resize_token_embeddings(size, mean_resizing=False)  # type: ignore[operator]
        _require_ties(trial, case, pair.port, f"after resize_token_embeddings({size})")
        logits = port_logits(trial, pair.port, pair.batch.tokens)
        if logits.shape[-1] != size:
            raise Mismatch(f"logits have {logits.shape[-1]} columns after resize_token_embeddings({size})")
        kept = logits[..., :vocabulary]
        numbers.append(require_semantics(trial, f"logits after a resize to {size}", kept, expected))
        _require_loss(trial, pair.port, pair.batch.tokens, size)
    return worst(*numbers)


def back_to_original(trial: Trial, case: Case) -> dict[str, float]:
    """The port's weights in the original's format load strictly into the original and are equal bit for bit, with the
    same fields; and writing them leaves the live model as it was.

    A converter named `from_...` has its way back in the model's method `to_...`, or beside a function in the function
    `to_...` that is given the model and the path; `from_pretrained` has it in `save_pretrained`. It writes the
    original's own file.
    Would have caught: a head that is missing from the file, mask buffers written among the weights, a dropout that is
    always written as 0, a model that training goes on with in float32 or in evaluation mode after an export.
    """
    if trial.family.read_checkpoint is None:
        raise Skip(f"family '{trial.family.name}' declares no way to read its checkpoint")
    case = dataclasses.replace(case, fields=with_dropout(trial.family, case.fields, DROPOUT))
    original = original_model(trial, case, dtype="float32")
    port: Any = carry(trial, case, original)
    back = _way_back(trial, port)
    if back is None:
        raise Skip("the port declares no way back: a method to_... beside its converter from_...")
    path = trial.workdir / ("back-" + trial.family.checkpoint_name)
    port.double().train()  # neither is what an export would make of a model
    with untouched(port, "writing the file", besides=WRITTEN_BY_SAVING):
        back(str(path))
    again = copied(original)
    for parameter in again.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    fields, state = trial.family.read_checkpoint(str(path))
    for field, value in case.fields.items():
        if fields.get(field) != value:
            raise Mismatch(f"the file written back says {field}={fields.get(field)!r}, the original had {value!r}")
    try:
        again.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise Mismatch(f"the original does not load the file: {' '.join(str(error).split())[:300]}") from None
    for key, tensor in original.state_dict().items():
        if not torch.equal(again.state_dict()[key], tensor):
            raise Mismatch(f"{key} is not what it was after original -> port -> original")
    if trial.family.resume is not None:
        try:
            trial.family.resume(again, str(path))
        except Exception as error:  # whatever the original's training does not like about the file
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise Mismatch(f"the original's training does not resume from the file: {reason}") from None
    _training_state_travels(trial, back, path)
    _export_keeps_dtype(trial, case, original, path)
    return {}


def _way_back(trial: Trial, model: Any) -> Callable[..., Any] | None:
    """What writes a model of the port to a path in the original's format; None where there is nothing of the name."""
    place, _, name = (converter_spec(trial.port) or "").rpartition(":")
    method = name.rpartition(".")[2]
    if not method.startswith("from_"):
        return None
    # A port that reads the original's own files with from_pretrained writes them with its counterpart.
    back = "save_pretrained" if method == "from_pretrained" else "to_" + method.removeprefix("from_")
    found: Callable[..., Any] | None = getattr(model, back, None)
    if found is None and "." not in name:
        with contextlib.suppress(DescriptionError):
            found = functools.partial(load_object(f"{place}:{back}", root=trial.port.root), model)
    return found


def _training_state_travels(trial: Trial, back: Callable[..., Any], path: Path) -> None:
    """Raises Mismatch when what the way back is given beside the weights is not what the original finds in the file."""
    parameters = inspect.signature(back).parameters
    given = {name: value for name, value in trial.family.training_state.items() if name in parameters}
    if not given or trial.family.read_training_state is None:
        return
    back(str(path), **given)
    found = trial.family.read_training_state(str(path))
    for name, value in given.items():
        if name not in found or found[name] != value:
            raise Mismatch(f"{name}={value!r} was given for the file written back, which says {found.get(name)!r}")


def _export_keeps_dtype(trial: Trial, case: Case, original: torch.nn.Module, path: Path) -> None:
    """Raises Mismatch when a model read from a half-precision file is written back as other tensors than it has."""
    assert trial.family.read_checkpoint is not None  # the caller made sure
    half: Any = checkpoint.load(trial, checkpoint.write(trial, case, original, dtype=torch.bfloat16))
    back = _way_back(trial, half)
    assert back is not None  # the model that was written before had one
    back(str(path))
    _, state = trial.family.read_checkpoint(str(path))
    held = {parameter.dtype for parameter in half.parameters()}
    for key, tensor in original.state_dict().items():
        if key in state and state[key].dtype not in held:
            raise Mismatch(f"{key} is {state[key].dtype} in the file written back from a model in {min(held, key=str)}")
        if key in state and not torch.equal(state[key].float(), tensor.to(torch.bfloat16).float()):
            raise Mismatch(f"{key} of a half-precision file is not what it was after file -> port -> file")
    again = checkpoint.load(trial, path)
    for key, tensor in half.state_dict().items():
        found = again.state_dict().get(key)
        if found is None or found.dtype != tensor.dtype or not torch.equal(found, tensor):
            raise Mismatch(f"{key} is another after port -> file -> port")


def read_again(trial: Trial, case: Case) -> dict[str, float]:
    """A file that is written anew at the same path is read anew, and stays as it is; a model does without its file.

    Would have caught: a converter that remembers by path what it has read, as two runs that each write ckpt.pt show;
    tensors that are still in the file when it is gone.
    """
    if trial.port.loader != "checkpoint":
        raise Skip("the port's load is not a function that could remember what it has read")
    other = dataclasses.replace(case, seed=case.seed + 1)
    path = checkpoint.write(trial, case, original_model(trial, case, dtype="float32"))
    content = checkpoint.content_of(path)
    first = checkpoint.load(trial, path)
    if checkpoint.content_of(path) != content:
        raise Mismatch("the converter writes into the file that it reads")
    before = {key: tensor.clone() for key, tensor in first.state_dict().items()}
    path.rename(path.with_name("away-" + path.name))
    again = checkpoint.write(trial, other, original_model(trial, other, dtype="float32"))
    second = checkpoint.load(trial, again)
    if changed := [key for key, tensor in first.state_dict().items() if not torch.equal(tensor, before[key])]:
        raise Mismatch(f"{changed[0]} of a model changes when the file that it was read from is written anew")
    fresh = again.with_name("fresh-" + again.name)
    again.rename(fresh)
    _require_same_model(
        trial, other, "a file written anew at a path read before", second, checkpoint.load(trial, fresh)
    )
    return {}


def program(trial: Trial, case: Case) -> dict[str, float]:
    """The converter program makes the same model whether it is started from a shell or forked as the gate forks it.

    Where it writes the weights in two formats, both hold the same. Would have caught: a program that works only where
    somebody has imported the frameworks before it; a pytorch_model.bin that is not what model.safetensors is.
    """
    if trial.port.loader != "command":
        raise Skip("the port's load is not a program")
    plain = checkpoint.write(trial, case, original_model(trial, case, dtype="float32"))
    forked, started = checkpoint.converted(trial, plain), checkpoint.converted(trial, plain, cold=True)
    names = [sorted(str(f.relative_to(place)) for f in place.rglob("*") if f.is_file()) for place in (forked, started)]
    if odd := sorted(set(names[0]) ^ set(names[1])):
        raise Mismatch(f"the converter writes {odd[0]} in one process and not in another")
    cls: Any = port_class(trial)
    what = "the converter started from a shell"
    model = cls.from_pretrained(forked)
    _require_same_model(trial, case, what, cls.from_pretrained(started), model)
    if {"model.safetensors", "pytorch_model.bin"} <= set(names[0]):
        other = cls.from_pretrained(forked, use_safetensors=False)
        _require_same_model(trial, case, "the pytorch_model.bin of the converter", other, model)
    return {"files": float(len(names[0]))}


def dtypes(trial: Trial, case: Case) -> dict[str, float]:
    """Files in float64, bfloat16 and float16, which the original reads, give their very numbers.

    They all keep their dtype, or all become the original's float32; one tensor in bfloat16 takes no other along. Would
    have caught: half precision refused, bits of bfloat16 taken for float16, one dtype that is widened where the others
    are kept, the first tensor's dtype taken for that of all.
    """
    if trial.port.loader not in ("checkpoint", "command"):
        raise Skip(f"the port declares no converter: its load is {trial.port.load!r}")
    kept: dict[str, bool] = {}
    for name, dtype in _affordable(trial, case, {name: pytorch.DTYPES[name] for name in trial.family.file_dtypes}):
        original = original_model(trial, case, dtype="float32").to(dtype)
        path = checkpoint.write(trial, case, original, dtype=dtype)
        if not _original_reads(trial, path):
            continue
        actual = _loaded(trial, path, f"a file in {name}")
        expected = checkpoint.load(trial, checkpoint.write(trial, case, original))
        _require_same_numbers(actual, expected, f"a file in {name}")
        held = {parameter.dtype for parameter in actual.parameters()}
        if not held <= {dtype, *(parameter.dtype for parameter in expected.parameters())} or len(held) > 1:
            raise Mismatch(f"a file in {name} gives a model in {', '.join(sorted(map(str, held)))}")
        kept[name] = held == {dtype}
    if len(set(kept.values())) > 1:
        names = {answer: next(name for name, found in kept.items() if found == answer) for answer in (True, False)}
        raise Mismatch(
            f"a file in {names[True]} keeps its dtype and one in {names[False]} does not; a converter keeps all of"
            " them, or widens all as the original does"
        )
    return {"dtypes": float(len(kept) + _reads_mixed(trial, case))}


def _reads_mixed(trial: Trial, case: Case) -> bool:
    """Whether the original reads a float32 file whose first tensor is in bfloat16; the port then has its numbers."""
    original = original_model(trial, case, dtype="float32")
    first = next(original.parameters())
    first.data = first.data.bfloat16()
    path = checkpoint.write(trial, case, original, dtype=None)
    if not _original_reads(trial, path):
        return False
    what = "a file in float32 whose first tensor is in bfloat16"
    actual = _loaded(trial, path, what)
    _require_same_numbers(actual, checkpoint.load(trial, checkpoint.write(trial, case, original)), what)
    return True


def _loaded(trial: Trial, path: Path, what: str) -> torch.nn.Module:
    """What the converter makes of a file that the original reads. Raises Mismatch when it refuses."""
    try:
        return checkpoint.load(trial, path)
    except DescriptionError:
        raise
    except Exception as error:
        raise Mismatch(f"the converter refuses {what}: {_in_one_line(error)}") from error


def _require_same_numbers(actual: torch.nn.Module, expected: torch.nn.Module, what: str) -> None:
    theirs = expected.state_dict()
    for key, tensor in actual.state_dict().items():
        if key not in theirs or not torch.equal(tensor.float(), theirs[key].float()):
            raise Mismatch(f"{key} of {what} has other numbers than the file")


def dialects(trial: Trial, case: Case) -> dict[str, float]:
    """Every way in which the original writes a file that it reads today gives the same model as the plain file.

    Would have caught: the prefix that a compiled model puts before every name; a file without `bias` taken for a model
    without biases; entries that the model does not need and the converter insists on.
    """
    return _same_from_dialects(trial, case, read_today=True)


def older_dialects(trial: Trial, case: Case) -> dict[str, float]:
    """Files that only earlier revisions of the original wrote give the same model as the plain file, or are refused.

    Would have caught: causal masks among the weights taken for biases; a vocabulary of 50257 put in for one that the
    file does not name.
    """
    return _same_from_dialects(trial, case, read_today=False)


def large(trial: Trial, case: Case) -> dict[str, float]:
    """Files of the family's first large model travel as small ones do: every dialect, and the way back.

    Would have caught: mask buffers told by a pattern that knows layers of one digit, tensors sorted by name.
    """
    size, big = next(large_cases(trial.family, case), ("", case))
    if not size:
        raise Skip(f"family '{trial.family.name}' declares no large sizes")
    done = 0
    for travel in (dialects, older_dialects, back_to_original):
        directory = trial.workdir / travel.__name__
        directory.mkdir()
        try:
            travel(dataclasses.replace(trial, workdir=directory), big)
        except Mismatch as error:
            raise Mismatch(f"{error} ({size})", metrics=error.metrics, tensors=error.tensors) from error
        except Skip as skip:
            if travel is older_dialects and not _is_skipped(travel, trial, case):
                raise Mismatch(f"{skip}; those of smaller models are read ({size})") from skip
            continue
        done += 1
    if not done:
        raise Skip("the port declares no converter, nor a way back")
    return {"files": float(done)}


def _is_skipped(check: Callable[[Trial, Case], object], trial: Trial, case: Case) -> bool:
    directory = trial.workdir / "small"
    directory.mkdir()
    try:
        check(dataclasses.replace(trial, workdir=directory), case)
    except Skip:
        return True
    return False


def _same_from_dialects(trial: Trial, case: Case, *, read_today: bool) -> dict[str, float]:
    if trial.family.checkpoint_dialects is None:
        raise Skip(f"family '{trial.family.name}' declares no dialects of its checkpoint")
    original = original_model(trial, case, dtype="float32")
    expected = checkpoint.load(trial, checkpoint.write(trial, case, original))
    directory = trial.workdir / "dialects"
    directory.mkdir(exist_ok=True)
    files = trial.family.checkpoint_dialects(copied(original), case.fields, directory)
    files = {name: path for name, path in files.items() if _original_reads(trial, path) == read_today}
    if not files:
        raise Skip("the family declares no such file for this configuration")
    refusals: list[str] = []
    compared = 0
    for name, path in _affordable(trial, case, files):
        try:
            actual = checkpoint.load(trial, path)
        except (DescriptionError, Skip):
            raise
        except Exception as error:
            refusals.append(f"the converter refuses a file with {name}: {_in_one_line(error)}")
            if read_today:
                raise Mismatch(refusals[0]) from error
            continue
        _require_same_model(trial, case, f"a file with {name}", actual, expected)
        compared += 1
    if refusals:
        raise Skip(f"{refusals[0]}; so does the original of today")
    return {"dialects": float(compared)}


def whole_numbers(trial: Trial, case: Case) -> dict[str, float]:
    """A file that says dropout=0, a whole number, gives the model of one that says 0.0.

    Not asked of a port whose configuration takes no whole number there. Would have caught: isinstance(dropout, float)
    in a converter, on files of training configurations that say `dropout = 0`.
    """
    if trial.port.loader not in ("checkpoint", "command"):
        raise Skip("the port declares no converter")
    fields = with_dropout(trial.family, case.fields, 0)
    said = " and ".join(f"{name}=0" for name in dropouts_of(trial.family))
    try:
        port_config(trial, fields)
    except Exception as error:  # types may be part of what a configuration promises
        raise Skip(f"the configuration takes no {said}: {first_line(error)}") from None
    original = original_model(trial, case, dtype="float32")
    expected = checkpoint.load(trial, checkpoint.write(trial, case, original))
    path = checkpoint.write(trial, dataclasses.replace(case, fields=fields), original)
    try:
        actual = checkpoint.load(trial, path)
    except DescriptionError:
        raise
    except Exception as error:
        what = f"a file with {said}"
        raise Mismatch(f"the converter refuses {what}, which its configuration takes: {_in_one_line(error)}") from error
    _require_same_model(trial, case, f"a file with {said}", actual, expected)
    return {}


def damaged(trial: Trial, case: Case) -> dict[str, float]:
    """The converter refuses a file that is truncated, or whose tensors are not the model's; and runs no code from it.

    Refusing is raising, or a non-zero exit of a program. A left-over tensor may also be named in a warning; tied
    tensors that differ are refused, or taken as the original takes them. Would have caught: `strict=False`, after which
    a missing tensor stays as it was drawn; `torch.load(weights_only=False)` on a file from the net.
    """
    original = original_model(trial, case, dtype="float32")
    plain = checkpoint.write(trial, case, original)
    if trial.port.loader not in ("checkpoint", "command"):
        raise Skip(f"the port declares no converter: its load is {trial.port.load!r}")
    names = {name for name, _ in original.named_parameters()}
    if not _tensors(_contents(weights_in(trial, plain)), names):
        raise Skip("the file is not one of torch's or of safetensors, with the original's tensors under their names")
    damages = {name: spoil for name, spoil in _DAMAGES.items() if name != "missing file" or plain.is_dir()}
    tried = list(_affordable(trial, case, damages))
    for _, spoil in tried:
        spoil(trial, case, original, plain)
    return {"damages": float(len(tried))}


def _truncated(trial: Trial, case: Case, original: torch.nn.Module, plain: Path) -> None:
    content = weights_in(trial, plain).read_bytes()
    path = _copy(plain, "truncated")
    weights_in(trial, path).write_bytes(content[: len(content) * 2 // 3])
    _require_refused(trial, path, "a truncated file")


def _file_missing(trial: Trial, case: Case, original: torch.nn.Module, plain: Path) -> None:
    path = _copy(plain, "incomplete")
    weights_in(trial, path).unlink()
    _require_refused(trial, path, f"a directory without {trial.family.weights_file}")


def weights_in(trial: Trial, path: Path) -> Path:
    """The file of a checkpoint that holds its tensors."""
    return path / trial.family.weights_file if path.is_dir() else path


def _copy(plain: Path, word: str) -> Path:
    """A copy of a checkpoint, file or directory, beside it."""
    path = plain.with_name(f"{word}-{plain.name}")
    if plain.is_dir():
        shutil.copytree(plain, path, dirs_exist_ok=True)
    else:
        shutil.copyfile(plain, path)
    return path


def _tensor_missing(trial: Trial, case: Case, original: torch.nn.Module, plain: Path) -> None:
    name = _untied(trial, case, original)
    path = _rewritten(trial, plain, original, lambda tensors: tensors.pop(name))
    _require_refused(trial, path, f"a file without {name}")


def _tensor_left_over(trial: Trial, case: Case, original: torch.nn.Module, plain: Path) -> None:
    name = _untied(trial, case, original)
    left = f"{name}_left_over"
    path = _rewritten(trial, plain, original, lambda tensors: tensors.update({left: tensors[name].clone()}))
    if trial.port.loader == "command":
        return  # what a program says of it cannot be told
    with said() as messages:
        error = _refusal(trial, path)
    if error is None and not any(left in message for message in messages):
        raise Mismatch(f"the converter says nothing of the tensor {left}, which is no part of the model")


@contextlib.contextmanager
def said() -> Iterator[list[str]]:
    """What is warned and logged, inside, whichever logger or filter is in force."""
    messages: list[str] = []
    factory, disabled = logging.getLogRecordFactory(), logging.root.manager.disable

    def note(*arguments: Any, **options: Any) -> logging.LogRecord:
        record = factory(*arguments, **options)
        messages.append(record.getMessage())
        return record

    logging.disable(logging.NOTSET)
    logging.setLogRecordFactory(note)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield messages
            messages.extend(str(warning.message) for warning in warned)
    finally:
        logging.setLogRecordFactory(factory)
        logging.disable(disabled)


def _tensor_misshapen(trial: Trial, case: Case, original: torch.nn.Module, plain: Path) -> None:
    # Rows that count positions or tokens are also how a converter may learn of their number.
    numbers = {longest_of(trial.family, case.fields), case.fields[trial.family.vocabulary]}
    name = _untied(trial, case, original, besides=numbers)

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        # A row less rather than one more: slices of what is too long are right.
        tensor = tensors[name]
        tensors[name] = tensor[:-1].clone() if len(tensor) > 1 else torch.cat((tensor, tensor))

    _require_refused(trial, _rewritten(trial, plain, original, cut), f"a file whose {name} is a row too short")


def _ties_differ(trial: Trial, case: Case, original: torch.nn.Module, plain: Path) -> None:
    read = trial.family.read_checkpoint
    groups = tied_of(trial.family, case.fields)
    if read is None or not groups:
        return
    first = groups[0][0]
    path = _rewritten(trial, plain, original, lambda tensors: tensors.update({first: tensors[first] + 1}))
    if not _original_reads(trial, path):
        return
    fields, state = read(str(path))
    as_read = initial_original(trial, fields)
    as_read.load_state_dict(state)
    expected = checkpoint.load(trial, checkpoint.write(trial, case, as_read))
    try:
        actual = checkpoint.load(trial, path)
    except DescriptionError:
        raise
    except Exception:
        return
    what = f"a file in which {' and '.join(groups[0])} differ, which the original reads,"
    _require_same_model(trial, case, what, actual, expected)


def _code(trial: Trial, case: Case, original: torch.nn.Module, plain: Path) -> None:
    for kind, is_zip in (("zip", True), ("legacy", False)):
        sentinel = plain.with_name(f"code-of-a-{kind}-file-has-run")
        path = _copy(plain, kind)
        contents = {**_contents(weights_in(trial, plain)), "code": _Code(sentinel)}
        torch.save(contents, weights_in(trial, path), _use_new_zipfile_serialization=is_zip)
        _refusal(trial, path)
        if sentinel.exists():
            raise Mismatch(
                "the converter runs code that stands in a checkpoint's pickle; read files with weights_only=True"
            )


class _Code:
    """Makes a directory when it is unpickled."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.directory),)


_DAMAGES: Mapping[str, Callable[[Trial, Case, torch.nn.Module, Path], None]] = {
    "code": _code,  # first, because the first case of a program tries this one
    "missing": _tensor_missing,
    "misshapen": _tensor_misshapen,
    "left over": _tensor_left_over,
    "truncated": _truncated,
    "missing file": _file_missing,
    "ties": _ties_differ,
}


def _require_refused(trial: Trial, path: Path, what: str) -> None:
    if _refusal(trial, path) is None:
        raise Mismatch(f"the converter takes {what} and makes a model of it; it has to refuse with an error")


def _refusal(trial: Trial, path: Path) -> Exception | None:
    try:
        checkpoint.load(trial, path)
    except DescriptionError:
        raise
    except Exception as error:
        return error
    return None


def _in_one_line(error: Exception) -> str:
    first = first_line(error)
    return shortened(" ".join(str(error).split())) if first.endswith(":") else first  # as load_state_dict writes


def _affordable(trial: Trial, case: Case, files: Mapping[str, File]) -> Iterator[tuple[str, File]]:
    """All of them, or one that the case's seed chooses where each costs the seconds that a program takes to start."""
    chosen = list(files.items())
    if trial.port.loader == "command" and not starts_quickly(trial.port):
        chosen = [chosen[case.seed % len(chosen)]]
    yield from chosen


def _original_reads(trial: Trial, path: Path) -> bool:
    if trial.family.read_checkpoint is None:
        return True
    try:
        fields, state = trial.family.read_checkpoint(str(path))
        initial_original(trial, fields).load_state_dict(state)
    except Exception:  # whatever it does not like about the file
        return False
    return True


def _contents(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # another format
        return None


def _tensors(contents: Any, names: set[str]) -> dict[str, torch.Tensor] | None:
    """The mapping inside of a file's contents that has the original's tensors under their names."""
    if not isinstance(contents, dict):
        return None
    if names <= contents.keys():
        return contents
    return next((found for entry in contents.values() if (found := _tensors(entry, names))), None)


def _rewritten(
    trial: Trial, plain: Path, original: torch.nn.Module, edit: Callable[[dict[str, torch.Tensor]], Any]
) -> Path:
    contents = _contents(weights_in(trial, plain))
    tensors = _tensors(contents, {name for name, _ in original.named_parameters()})
    assert tensors is not None  # the caller made sure
    edit(tensors)
    path = _copy(plain, "rewritten")
    file = weights_in(trial, path)
    if file.suffix == ".safetensors":  # a pickle of that name would be refused whatever is in it
        save_file(contents, file, metadata={"format": "pt"})
    else:
        torch.save(contents, file)
    return path


def _untied(trial: Trial, case: Case, original: torch.nn.Module, *, besides: Iterable[int] = ()) -> str:
    """A parameter that has no twin which could stand in for it, and none of those numbers of rows."""
    twins = {name for group in tied_of(trial.family, case.fields) for name in group}
    alone = {name: len(tensor) for name, tensor in original.named_parameters() if name not in twins and tensor.ndim}
    names = [name for name, rows in alone.items() if rows not in besides] or list(alone)
    return names[case.seed % len(names)]


def _require_same_model(
    trial: Trial, case: Case, what: str, actual: torch.nn.Module, expected: torch.nn.Module
) -> None:
    left, right = actual.state_dict(), expected.state_dict()
    if odd := sorted(left.keys() ^ right.keys()):
        raise Mismatch(f"{what} gives another model than the plain file: {odd[0]} is in one of the two only")
    for key, tensor in right.items():
        if left[key].dtype != tensor.dtype or not torch.equal(left[key], tensor):
            raise Mismatch(
                f"{what} gives another {key} than the plain file", tensors={"actual": left[key], "expected": tensor}
            )
    for name in _declared(trial, case, getattr(expected, "config", None)):
        mine, plain = getattr(actual.config, name, None), getattr(expected.config, name, None)
        if mine != plain:
            raise Mismatch(f"{what} gives config.{name}={mine!r}, the plain file {plain!r}")


def _declared(trial: Trial, case: Case, config: Any) -> Iterator[str]:
    for field in case.fields if config is not None else ():
        try:
            yield port_field(trial, type(config), field)
        except Mismatch:
            continue  # config.fields says so


def _require_loss(trial: Trial, port: Any, tokens: torch.Tensor, vocabulary: int) -> None:
    """Raises Mismatch unless the loss takes the last token of a resized vocabulary for a label."""
    if not is_asked(trial, "loss", "loss.value"):
        return
    labels = torch.full_like(tokens, vocabulary - 1)
    try:
        loss = run_port(trial, port, tokens, labels=labels).get("loss")
    except (RuntimeError, IndexError, ValueError) as error:
        raise Mismatch(
            f"the loss fails after resize_token_embeddings({vocabulary}): {first_line(error)}; it has to be over the"
            " logits that there are now"
        ) from error
    if isinstance(loss, torch.Tensor) and not torch.isfinite(loss):
        raise Mismatch(f"the loss is {float(loss)} after resize_token_embeddings({vocabulary})")


def _numbers(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().cpu().float().flatten() for parameter in module.parameters()]).sort().values


def _beyond(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Numbers that occur more often in one sorted vector than in another."""
    there = Counter(right.tolist())
    return torch.tensor(list((Counter(left.tolist()) - there).elements()))


def _owner(numbers: torch.Tensor, module: torch.nn.Module) -> str:
    shares = {
        name: float(torch.isin(parameter.detach().cpu().float().flatten(), numbers).float().mean())
        for name, parameter in module.named_parameters()
    }
    name = max(shares, key=lambda key: shares[key])
    return f", most of them in {name}"


def _require_ties(trial: Trial, case: Case, model: Any, when: str) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or head is None:
        raise Mismatch("get_input_embeddings and get_output_embeddings must give the embedding and the head")
    are_tied = bool(tied_of(trial.family, case.fields))
    if are_tied and head.weight is not embedding.weight:
        raise Mismatch(f"head and embedding are two tensors {when}; the original has one")
    if not are_tied and head.weight is embedding.weight:
        raise Mismatch(f"head and embedding are one tensor {when}; the original of this configuration has two")
