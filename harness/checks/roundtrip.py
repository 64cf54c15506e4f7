# SPDX-License-Identifier: Apache-2.0
"""Checks of saving and loading: what comes back is what was saved, however it is stored and wherever it lands."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from harness.backends import pytorch
from harness.cases import Case
from harness.checks.untouched import WRITTEN_BY_SAVING, untouched
from harness.errors import Mismatch
from harness.families import dropouts_of, tied_of
from harness.ports import first_line
from harness.routes import carry
from harness.routes.pretrained import load, save
from harness.trial import (
    Trial,
    call_port,
    copied,
    draw,
    original_model,
    place,
    port_class,
    port_config,
    port_field,
    port_logits,
    prepare,
    require_semantics,
)

SHARD_BYTES = 2048
DROPOUT = 0.25


def pretrained(trial: Trial, case: Case) -> dict[str, float]:
    """Saved and loaded, the port has the same tensors bit for bit, the same dtypes, and is in evaluation mode.

    Given other tensors as state_dict, as Trainer and accelerate do, it writes those. Would have caught: names changed
    on the way, a head left out of the file and drawn anew, a dtype taken from the configuration instead of the file,
    options of save_pretrained that are dropped.
    """
    model = carry(trial, case, original_model(trial, case, dtype="float32"))
    directory = trial.workdir / "saved"
    model.save_pretrained(directory)  # type: ignore[operator]
    loaded = load(trial, directory)
    if loaded.training:
        raise Mismatch("from_pretrained returns a model in training mode; it should be in evaluation mode")
    numbers = _same_state(loaded, model, "after save_pretrained and from_pretrained")
    if trial.family.framework != "transformers":
        return numbers
    other = copied(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.neg_()
    directory = trial.workdir / "given"
    try:
        model.save_pretrained(directory, state_dict=other.state_dict())  # type: ignore[operator]
    except TypeError as error:
        raise Mismatch(f"save_pretrained takes no state_dict, which Trainer gives it: {first_line(error)}") from error
    _same_state(load(trial, directory), other, "after save_pretrained with its tensors as state_dict")
    return numbers


def options(trial: Trial, case: Case) -> dict[str, float]:
    """Options of the configuration that from_pretrained is given count: dropout, attention, use_cache.

    What else stands in the configuration's auto_map is saved on. Would have caught: from_pretrained that builds the
    model from the file's configuration alone, so that fine-tuning with dropout=0.1 has none.
    """
    model: Any = carry(trial, case, original_model(trial, case, dtype="float32"))
    of_library = trial.family.framework == "transformers"
    if of_library:
        auto_map = getattr(model.config, "auto_map", None) or {}
        model.config.auto_map = {**auto_map, "AutoTokenizer": ["tokenizer.T", None]}
    directory = trial.workdir / "saved"
    model.save_pretrained(directory)
    saved = json.loads((directory / "config.json").read_text())
    if of_library and "AutoTokenizer" not in saved.get("auto_map", {}):
        raise Mismatch("save_pretrained drops the tokenizer from the configuration's auto_map")
    given: dict[str, Any] = {port_field(trial, type(model.config), name): DROPOUT for name in dropouts_of(trial.family)}
    if hasattr(model.config, "use_cache"):
        given["use_cache"] = not model.config.use_cache
    loaded: Any = load(trial, directory, **given)
    for name, value in given.items():
        if getattr(loaded.config, name) != value:
            raise Mismatch(f"from_pretrained({name}={value!r}) gives a model with {getattr(loaded.config, name)!r}")
    if getattr(model, "_supports_sdpa", False) and hasattr(model, "set_attn_implementation"):
        for attention in ("eager", "sdpa"):
            found = load(trial, directory, attn_implementation=attention).config._attn_implementation  # type: ignore[union-attr]
            if found != attention:
                raise Mismatch(f"from_pretrained(attn_implementation={attention!r}) gives a model with {found!r}")
    return {"options": float(len(given))}


def copies(trial: Trial, case: Case) -> dict[str, float]:
    """A pickled and a deep copy of the port compute the same bits, keep its ties, and share no tensor with it.

    So do processes started for several GPUs, and copies whose weights are averaged in the middle of training. Would
    have caught: a lambda kept in an attribute, which cannot be pickled; a copy whose head is its own; a tensor with its
    graph that is kept from the last forward, which cannot be copied.
    """
    pair = prepare(trial, case)
    expected = port_logits(trial, pair.port, pair.batch.tokens)
    call_port(trial, pair.port, pair.batch.tokens)  # with a graph, of which nothing may be left behind
    try:
        copies = {"deep": copied(pair.port)}
    except RuntimeError as error:
        raise Mismatch(f"the model cannot be copied after a forward with gradients: {first_line(error)}") from error
    try:
        copies["pickled"] = pickle.loads(pickle.dumps(pair.port))
    except Exception as error:  # pickling fails in many ways
        text = str(error)
        # A class that is made on the fly cannot be pickled either, and is counted only: no attribute can be blamed.
        if "<lambda>" in text or "<function" in text:
            raise Mismatch(
                f"the model cannot be pickled: {first_line(error)}; keep functions that have a name of their module"
            ) from error
    for how, other in copies.items():
        owned = {tensor.data_ptr() for tensor in pair.port.state_dict().values()}
        if shared := [name for name, tensor in other.state_dict().items() if tensor.data_ptr() in owned]:
            raise Mismatch(f"a {how} copy of the model shares {shared[0]} with it")
        if len(list(other.parameters())) != len(list(pair.port.parameters())):
            raise Mismatch(f"a {how} copy of the model has other ties than the model")
        if not torch.equal(port_logits(trial, other, pair.batch.tokens), expected):
            raise Mismatch(f"a {how} copy of the model gives other logits")
    return {"copies": float(len(copies))}


def dtype(trial: Trial, case: Case) -> dict[str, float]:
    """Saving a model in half precision leaves it as it was, and dtype="auto" gives the same bits in that dtype back.

    The file holds that dtype too. Would have caught: a config.json that claims float32, so that a checkpoint comes
    back twice as large; a save that casts the live model, and with it a training run that goes on.
    """
    model = place(trial, carry(trial, case, original_model(trial, case, dtype="float32"))).train()
    before = copied(model)
    directory = trial.workdir / "saved"
    with untouched(model, "save_pretrained", besides=WRITTEN_BY_SAVING):
        model.save_pretrained(directory)  # type: ignore[operator]
    held = {tensor.dtype for tensor in before.state_dict().values() if tensor.is_floating_point()}
    for file in sorted(directory.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if tensor.is_floating_point() and tensor.dtype not in held:
                raise Mismatch(f"{name} is {tensor.dtype} in {file.name}, saved from a model in {trial.dtype}")
    written = json.loads((directory / "config.json").read_text())
    claimed = written.get("dtype", written.get("torch_dtype"))
    if claimed is not None and f"torch.{claimed}" not in map(str, held):
        raise Mismatch(f"config.json says {claimed}, saved from a model in {trial.dtype}")
    loaded = load(trial, directory, dtype="auto")
    what = 'after save_pretrained and from_pretrained(dtype="auto")'
    return _same_state(loaded, _widened(before, like=loaded), what)


def _widened(model: torch.nn.Module, *, like: torch.nn.Module) -> torch.nn.Module:
    """The model with float32 where it declares that the library must load some modules so, and the library has."""
    lists = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    kept = {name for each in lists for name in getattr(model, each, None) or ()}
    theirs = like.state_dict()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        declared = any(f".{each}." in f".{name}." for each in kept)
        if declared and name in theirs and theirs[name].dtype == torch.float32:
            tensor.data = tensor.data.float()
    return model


def incomplete(trial: Trial, case: Case) -> dict[str, float]:
    """A saved model whose file lacks tensors is not loaded without a word: the loading names each, or fails.

    Would have caught: `_keys_to_ignore_on_load_missing` that covers weights, which then start at random in silence; a
    pooler that is made anew where the file has none.
    """
    directory = save(trial, case, original_model(trial, case, dtype="float32"))
    (file,) = directory.glob("*.safetensors")
    tensors = load_file(file)
    tied = {
        name.rpartition(".")[0].rpartition(".")[2] for group in tied_of(trial.family, case.fields) for name in group
    }
    kept = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0].rpartition(".")[2] in tied}
    cls: Any = port_class(trial)
    # All of it, and each part: a pooler may be left out in silence where all weights may not.
    parts = sorted({name.partition(".")[0] for name in tensors.keys() - kept.keys()})
    for absent in (parts, *([part] for part in parts)):
        rest = {key: tensor for key, tensor in tensors.items() if key in kept or key.partition(".")[0] not in absent}
        save_file(rest, file, metadata={"format": "pt"})
        try:
            _, information = cls.from_pretrained(directory, output_loading_info=True)
        except Exception:  # a refusal says it louder still
            continue
        silent = sorted(tensors.keys() - rest.keys() - set(information.get("missing_keys", ())))
        if silent:
            raise Mismatch(f"a saved model without {silent[0]} is loaded without a word of it")
    # Half of what each module has: what is drawn for the other half must leave it alone.
    for suffix in (".weight", ".bias"):
        half = {name: tensor for name, tensor in tensors.items() if not name.endswith(suffix)}
        if len(half) in (0, len(tensors)):
            continue
        save_file(half, file, metadata={"format": "pt"})
        try:
            loaded = cls.from_pretrained(directory).state_dict()
        except Exception:  # as above
            continue
        for name, tensor in half.items():
            if name in loaded and not torch.equal(loaded[name], tensor):
                raise Mismatch(f"{name} is drawn anew, though the file has it, where the file lacks tensors beside it")
    return {"missing": float(len(tensors) - len(kept))}


def sharded(trial: Trial, case: Case) -> dict[str, float]:
    """A model saved in many small shards comes back whole.

    Would have caught: a tied tensor that is in no shard, an index that names a file that is not there.
    """
    original = original_model(trial, case, dtype="float32")
    directory = save(trial, case, original, max_shard_size=SHARD_BYTES)
    shards = list(directory.glob("*.safetensors"))
    size = sum(parameter.numel() * parameter.element_size() for parameter in original.parameters())
    if len(shards) < 2 <= size // SHARD_BYTES:
        raise Mismatch(f"{size} bytes of weights were saved to {len(shards)} file under a limit of {SHARD_BYTES}")
    index = directory / "model.safetensors.index.json"
    if index.exists():
        named = set(json.loads(index.read_text())["weight_map"].values())
        if absent := named - {shard.name for shard in shards}:
            raise Mismatch(f"the index names {sorted(absent)[0]}, which is not there")
    _same_state(load(trial, directory), carry(trial, case, original), "after loading from shards")
    return {"shards": float(len(shards))}


def bin(trial: Trial, case: Case) -> dict[str, float]:
    """A directory with `pytorch_model.bin` instead of safetensors loads to the same tensors.

    Would have caught: loading code that knows one file name only.
    """
    original = original_model(trial, case, dtype="float32")
    directory = save(trial, case, original)
    model = carry(trial, case, original)
    write_bin(directory, model)
    return _same_state(load(trial, directory), model, "after loading from pytorch_model.bin")


def write_bin(directory: Path, model: torch.nn.Module) -> None:
    """Puts a model's weights as `pytorch_model.bin` in the place of those that a directory has."""
    for file in directory.glob("*.safetensors"):
        file.unlink()
    torch.save(dict(model.state_dict()), directory / "pytorch_model.bin")


def fixed_point(trial: Trial, case: Case) -> dict[str, float]:
    """Saving what was loaded writes the same files again: tensors, configuration, code.

    Would have caught: a field added at every save, a tensor stored under another name the second time; the names of a
    classifier's labels, which the model has no use for, lost in the second file.
    """
    first = save(trial, case, original_model(trial, case, dtype="float32"))
    second = trial.workdir / "again"
    load(trial, first).save_pretrained(second)  # type: ignore[operator]
    names = [{path.relative_to(folder) for path in _files(folder)} for folder in (first, second)]
    if names[0] != names[1]:
        raise Mismatch(f"the second save differs in which files it writes: {sorted(map(str, names[0] ^ names[1]))[0]}")
    for name in sorted(names[0]):
        if (first / name).read_bytes() != (second / name).read_bytes():
            raise Mismatch(f"{name} is not the same after load and save")
    if not trial.family.heads:
        return {"files": float(len(names[0]))}
    config = json.loads((first / "config.json").read_text())
    named = {"id2label": {"0": "no", "1": "perhaps", "2": "yes"}, "label2id": {"no": 0, "perhaps": 1, "yes": 2}}
    (first / "config.json").write_text(json.dumps({**config, **named}))
    load(trial, first).save_pretrained(second)  # type: ignore[operator]
    config = json.loads((second / "config.json").read_text())
    if lost := [name for name, value in named.items() if config.get(name) != value]:
        raise Mismatch(f"{lost[0]} of a config.json is not the same after load and save")
    return {"files": float(len(names[0]))}


def poisoned_memory(trial: Trial, case: Case) -> dict[str, float]:
    """Loaded while fresh memory is filled with NaN, the port still gives the original's logits.

    Would have caught: buffers that no file holds and nobody fills again after loading: finite, wrong, and silent.
    """
    original, batch = original_model(trial, case), draw(trial, case)
    expected = port_logits(trial, place(trial, carry(trial, case, original)), batch.tokens)
    directory = save(trial, case, original.float())
    with poison():
        loaded = load(trial, directory)
    for name, tensor in [*loaded.named_parameters(), *loaded.named_buffers()]:
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise Mismatch(f"{name} is memory that nobody filled after from_pretrained")
    actual = port_logits(trial, place(trial, loaded), batch.tokens)
    # Not bit for bit: kernels round by where in memory a tensor begins.
    return require_semantics(trial, "logits of a model loaded while fresh memory was NaN", actual, expected)


def meta_device(trial: Trial, case: Case) -> dict[str, float]:
    """The port can be built without memory on the meta device, and takes its tensors there.

    Would have caught: tensors made in a constructor (`.item()`, numpy), which fail or are lost on the meta device.
    """
    original, batch = original_model(trial, case), draw(trial, case)
    model = carry(trial, case, original)
    try:
        with torch.device("meta"):
            empty: Any = port_class(trial)(port_config(trial, case.fields))
    except Exception as error:  # whatever a constructor does on the meta device is the finding
        raise Mismatch(f"cannot be built on the meta device: {type(error).__name__}: {first_line(error)}") from None
    real = [name for name, tensor in empty.named_parameters() if tensor.device.type != "meta"]
    if real:
        raise Mismatch(f"{real[0]} is not on the meta device though the model was built there")
    empty.load_state_dict(model.state_dict(), assign=True, strict=True)
    empty.tie_weights()
    actual = port_logits(trial, place(trial, empty), batch.tokens)
    expected = port_logits(trial, place(trial, model), batch.tokens)
    return require_semantics(trial, "logits of a model that was built on the meta device", actual, expected)


def cast(trial: Trial, case: Case) -> dict[str, float]:
    """Loaded in a dtype, cast after loading, and cast after a forward pass: the same bits, and buffers keep theirs.

    Would have caught: tables cached at the first forward in the wrong dtype, buffers that lose float32 in a cast.
    """
    original, batch = original_model(trial, case, dtype="float32"), draw(trial, case)
    directory = save(trial, case, original)
    dtype = pytorch.DTYPES[trial.dtype]
    single = dataclasses.replace(trial, dtype="float32")
    after_forward = load(trial, directory)
    port_logits(single, place(single, after_forward), batch.tokens)
    results = {
        # A copy, as kernels round by where in memory a tensor begins, and what is loaded lies where it lay in the file.
        "loaded in that dtype": port_logits(trial, copied(load(trial, directory, dtype=dtype)).eval(), batch.tokens),
        "cast after a forward pass": port_logits(trial, place(trial, after_forward), batch.tokens),
    }
    expected = port_logits(trial, place(trial, load(trial, directory)), batch.tokens)
    for how, actual in results.items():
        if not torch.equal(actual, expected):
            raise Mismatch(f"{trial.dtype} logits of a model {how} differ from those of one cast after loading")
    return {}


@contextlib.contextmanager
def poison() -> Iterator[None]:
    """Fills memory that torch hands out unwritten with NaN, inside."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic: Any = torch.utils.deterministic
    fill = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        deterministic.fill_uninitialized_memory = fill


def _same_state(actual: torch.nn.Module, expected: torch.nn.Module, when: str) -> dict[str, float]:
    ours, theirs = actual.state_dict(), expected.state_dict()
    if ours.keys() != theirs.keys():
        raise Mismatch(f"{sorted(ours.keys() ^ theirs.keys())[0]} is in one model only {when}")
    for name, tensor in theirs.items():
        if ours[name].dtype != tensor.dtype:
            raise Mismatch(f"{name} is {ours[name].dtype} {when}, was {tensor.dtype}")
        if not torch.equal(ours[name], tensor):
            raise Mismatch(f"{name} has other values {when}", tensors={"actual": ours[name], "expected": tensor})
    return {"tensors": float(len(theirs))}


def _files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]
