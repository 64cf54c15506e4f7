# SPDX-License-Identifier: Apache-2.0
"""Reads a model's tensors from a directory in whatever form they are there, all of them or none, and writes them.

What a file holds is compared with the configuration before a number of it is read.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import mlx.core as mx
import numpy as np

from .names import NamesError, Shape, Sizes, canonical, original, parameter_shapes
from .quantisation import settings

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
# The first of them that is there is read; a lone .npz of any name comes where model.npz does.
FILES = (
    WEIGHTS,
    "model.safetensors.index.json",
    "pytorch_model.safetensors",
    "weights.npz",
    "model.npz",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.bin",
)

_LONGEST_HEADER = 100_000_000  # bytes; what the safetensors library allows too
_MOST_NAMES = 500  # that a message lists: more than BERT-large has parameters
_FLOATS = ("F64", "F32", "F16", "BF16")
# How numpy reads each type of a safetensors file; it has no bfloat16, of which it takes the bits.
_NUMPY_TYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "|u1",
    "BOOL": "|b1",
}
_MLX_TYPES = {
    mx.float64: "F64",
    mx.float32: "F32",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint32: "U32",
}


class Written(Sizes, Protocol):
    """What is written beside the weights; a BertConfig is one."""

    def to_hf_config(self) -> dict[str, Any]: ...


class WeightsError(ValueError):
    """Weights that are not the model's; `missing` and `unexpected` have the names where tensors lack or are left."""

    def __init__(
        self, path: Path, fault: str, *, missing: tuple[str, ...] = (), unexpected: tuple[str, ...] = ()
    ) -> None:
        super().__init__(f"{path}: {fault}")
        self.missing, self.unexpected = missing, unexpected


@dataclass(frozen=True)
class Checkpoint:
    """What a directory holds of a model.

    tensors: by the name of BertCore's parameter. head: tensors of a task head, by their names in the file, without
    which BertCore is whole. missing: parameters that the file does not have. unexpected: keys that are nothing.
    layout: whose naming it is.
    """

    path: Path
    layout: str
    tensors: Mapping[str, mx.array]
    head: Mapping[str, mx.array]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


@dataclass(frozen=True)
class _Entry:
    """A tensor of a file: `dtype` as safetensors calls it, `start` the byte where it begins, in safetensors only."""

    dtype: str
    shape: Shape
    start: int = 0


@dataclass(frozen=True)
class _Source:
    """A file's tensors by name, and what reads some of them."""

    path: Path
    entries: Mapping[str, _Entry]
    load: Callable[[list[str]], dict[str, mx.array]]


def read(
    directory: str | os.PathLike[str], config: Sizes, *, allow_missing_pooler: bool = False
) -> dict[str, mx.array]:
    """Return every parameter of BertCore by its name, as the file has them: their types are the file's.

    allow_missing_pooler: a model without a pooler will do, as some task models are.

    Raises WeightsError as `read_checkpoint` and `require` do, ImportError as `read_checkpoint` does.
    """
    checkpoint = read_checkpoint(directory, config)
    require(checkpoint, allow_missing_pooler=allow_missing_pooler)
    return dict(checkpoint.tensors)


def require(checkpoint: Checkpoint, *, allow_missing_pooler: bool = False) -> None:
    """Raise WeightsError, with the list, where a checkpoint lacks a parameter or holds a tensor that is nothing."""
    missing, unexpected = checkpoint.missing, checkpoint.unexpected
    if allow_missing_pooler and not any(name.startswith("pooler.") for name in checkpoint.tensors):
        missing = tuple(name for name in missing if not name.startswith("pooler."))
    faults = [
        f"{fault} {_listed(names)}"
        for fault, names in (("lacks", missing), ("has and the model has not", unexpected))
        if names
    ]
    if faults:
        faults.append("expected the tensors of the model that config.json describes, each once")
        raise WeightsError(checkpoint.path, "; ".join(faults), missing=missing, unexpected=unexpected)


def read_checkpoint(directory: str | os.PathLike[str], config: Sizes) -> Checkpoint:
    """Return what a directory holds of the model that `config` describes, without asking for all of it.

    Safetensors are read when their numbers are used: a file that is replaced later does not matter, one that is
    written into does. Of a .bin and an .npz the numbers are read now. A .bin warns, and runs nothing of the file.

    Raises:
        WeightsError: no weights, a file or shard that is missing, damaged or hostile, names of another model type,
            one parameter under two names, and a tensor of another shape or type than the model's.
        ImportError: a .bin, and torch is not installed.
    """
    path, sources = _sources(Path(directory))
    where = {key: source for source in sources for key in source.entries}
    entries = {key: source.entries[key] for key, source in where.items()}
    try:
        names = canonical(entries, config.model_type)
    except NamesError as error:
        raise WeightsError(path, str(error)) from None
    found = {parameter: entries[key] for key, parameter in names.parameters.items()}
    keys = {parameter: key for key, parameter in names.parameters.items()}
    missing, left = _compared(path, found, keys, config)
    parameters = {key: parameter for key, parameter in names.parameters.items() if parameter not in left}
    _check_buffers(path, {key: entries[key] for key in names.dropped}, config)

    def load(wanted: Iterable[str]) -> dict[str, mx.array]:
        tensors: dict[str, mx.array] = {}
        for source in sources:
            tensors |= source.load([key for key in wanted if where[key] is source])
        return tensors

    for key, buffer in load(names.dropped).items():
        is_count = key.endswith("position_ids")
        if buffer.reshape(-1).tolist() != (list(range(buffer.size)) if is_count else [0] * buffer.size):
            expected = "0, 1, 2 and so on" if is_count else "zeros"
            raise WeightsError(path, f"{key} has numbers of its own; expected {expected}, which BERT has")
    numbers = load(parameters)
    return Checkpoint(
        path=path,
        layout=names.layout,
        tensors={parameter: numbers[key] for key, parameter in parameters.items()},
        head=load(names.head),
        missing=missing,
        unexpected=(*names.unexpected, *(keys[parameter] for parameter in left)),
    )


def read_file(path: str | os.PathLike[str]) -> dict[str, mx.array]:
    """Return the tensors of a safetensors file by name, to be read when they are used.

    Raises WeightsError when it is missing or damaged.
    """
    source = _safetensors(Path(path))
    return source.load(list(source.entries))


def write(
    directory: str | os.PathLike[str],
    tensors: Mapping[str, mx.array],
    config: Written,
    *,
    head: Mapping[str, mx.array] | None = None,
) -> Path:
    """Write model.safetensors, in the names of transformers' model of `config.model_type`, and config.json.

    Both are on the disk before either takes its place. A model without a pooler is written without one. Returns the
    directory.

    tensors: the parameters of a BertCore by name, quantised or not. head: of a task model, by their names in the file;
    the names of the body then begin with the model type.

    Raises WeightsError where they are not exactly the model's, OSError where they cannot be written.
    """
    path = Path(directory) / WEIGHTS
    found = {name: _Entry(_mlx_type(path, name, tensor), tuple(tensor.shape)) for name, tensor in tensors.items()}
    missing, left = _compared(path, found, {name: name for name in found}, config)
    require(Checkpoint(path, "", tensors, {}, missing, left), allow_missing_pooler=True)
    prefix = "" if head is None else f"{config.model_type}."
    named = {prefix + original(name, config.model_type): tensor for name, tensor in tensors.items()} | dict(head or {})
    settled = json.dumps(config.to_hf_config(), indent=2, sort_keys=True) + "\n"
    with _replacing(path, path.with_name(CONFIG)) as (weights_file, config_file):
        _write_tensors(weights_file, path, named, {"format": "mlx" if config.quantization else "pt"})
        config_file.write(settled.encode())
    return path.parent


def write_file(
    path: str | os.PathLike[str], tensors: Mapping[str, mx.array], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a safetensors file, with the directories it lies in, so that it is whole or as it was.

    Raises WeightsError for a type that no weights have, OSError where it cannot be written.
    """
    with _replacing(Path(path)) as (file,):
        _write_tensors(file, Path(path), tensors, metadata or {"format": "mlx"})


@contextmanager
def _replacing(*paths: Path) -> Iterator[list[BinaryIO]]:
    """Gives a file for each path, all of which take their places once all are on the disk, and none before."""
    unfinished = [path.with_name(f".{path.name}.{secrets.token_hex(4)}") for path in paths]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    try:
        with ExitStack() as stack:
            files: list[BinaryIO] = [stack.enter_context(open(path, "xb")) for path in unfinished]
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        for path, place in zip(unfinished, paths, strict=True):
            os.replace(path, place)
    finally:
        for path in unfinished:
            path.unlink(missing_ok=True)


def _write_tensors(file: BinaryIO, path: Path, tensors: Mapping[str, mx.array], metadata: Mapping[str, str]) -> None:
    kinds = {name: _mlx_type(path, name, tensor) for name, tensor in tensors.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    begin = 0
    # The widest first, so that every number lies at a multiple of its size.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.size, name))
    for name in order:
        end = begin + tensors[name].nbytes
        header[name] = {"dtype": kinds[name], "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        tensor = tensors[name]
        bits = tensor.view(mx.uint16) if tensor.dtype == mx.bfloat16 else tensor
        file.write(np.ascontiguousarray(np.asarray(bits)).data)


def _compared(
    path: Path, found: Mapping[str, _Entry], keys: Mapping[str, str], config: Sizes
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the parameters that lack and those that are too many; raises for one of another shape or type."""
    expected: dict[str, tuple[tuple[str, ...], Shape]]
    expected = {name: (_FLOATS, shape) for name, shape in parameter_shapes(config).items()}
    quantised = [name.removesuffix(".scales") for name in found if name.endswith(".scales")]
    if bool(quantised) != bool(config.quantization):
        says = f"says quantization {config.quantization}" if config.quantization else "has no quantization"
        fault = f"{_shown(keys[f'{quantised[0]}.scales'])} is quantised" if quantised else "no tensor is quantised"
        raise WeightsError(path, f"{fault}, and config.json {says}; expected both or neither")
    if config.quantization:
        try:
            chosen = settings(config.quantization)
        except ValueError as error:
            raise WeightsError(path, str(error)) from None
        for module in quantised:
            kinds, shape = expected.get(f"{module}.weight", ((), ()))
            # What has no rows to quantise is left over, and listed as such.
            if len(shape) == 2 and shape[1] % chosen.group_size == 0:
                rows, width = shape
                expected[f"{module}.weight"] = (("U32",), (rows, width * chosen.bits // 32))
                for tail in ("scales", "biases"):
                    expected[f"{module}.{tail}"] = (_FLOATS, (rows, width // chosen.group_size))
    for name, entry in found.items():
        if name not in expected:
            continue
        kinds, shape = expected[name]
        if entry.dtype not in kinds:
            raise WeightsError(path, f"{_shown(keys[name])} is of type {entry.dtype}, expected {' or '.join(kinds)}")
        if entry.shape != shape:
            raise WeightsError(path, f"{_shown(keys[name])} has shape {entry.shape}, expected {shape}")
    missing = tuple(name for name in expected if name not in found)
    return missing, tuple(name for name in found if name not in expected)


def _check_buffers(path: Path, entries: Mapping[str, _Entry], config: Sizes) -> None:
    for key, entry in entries.items():
        if math.prod(entry.shape) != config.max_position_embeddings:
            raise WeightsError(
                path, f"{key} has shape {entry.shape}, expected {config.max_position_embeddings} positions"
            )


def _sources(directory: Path) -> tuple[Path, list[_Source]]:
    """Returns the file that is read, or the index of several, and what of it is read."""
    if not directory.is_dir():
        fault = "is a file" if directory.exists() else "is not there"
        raise WeightsError(directory, f"{fault}; expected a directory with {WEIGHTS} or other weights")
    there = sorted(os.listdir(directory))
    archives = [name for name in there if name.endswith(".npz") and not name.startswith(".")]
    for name in FILES:
        if name in there:
            return directory / name, _opened(directory / name)
        if name == "model.npz" and archives:
            if len(archives) > 1:
                raise WeightsError(directory, f"has {_listed(archives)}; expected one of them, or one weights.npz")
            return directory / archives[0], _opened(directory / archives[0])
    holds = f"only {_listed(there)}" if there else "nothing"
    raise WeightsError(directory, f"holds {holds}; expected one of {', '.join(FILES)}, or one other .npz")


def _opened(path: Path) -> list[_Source]:
    if path.suffix == ".json":
        return _shards(path)
    kinds = {".safetensors": _safetensors, ".npz": _archive, ".bin": _torch_file}
    return [kinds[path.suffix](path)]


def _shards(path: Path) -> list[_Source]:
    """What the files of an index hold; each tensor has to be in the one that the index says, and nothing else."""
    suffix = path.name.removesuffix(".index.json").rpartition(".")[2]
    with _reading(path):
        index = _json(path, path.read_bytes())
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise WeightsError(path, "has no weight_map; expected the file of each tensor")
    for key, name in places.items():
        is_name = isinstance(name, str) and name.endswith(f".{suffix}") and name.isprintable()
        if not is_name or "/" in name or "\\" in name or ":" in name:
            raise WeightsError(
                path, f"{_shown(key)} is in {_shown(name)}; expected the name of a .{suffix} file beside the index"
            )
    sources = []
    for name in dict.fromkeys(places.values()):
        shard = path.with_name(name)
        if not shard.is_file():
            raise WeightsError(shard, f"is not there; {path.name} expects tensors in it")
        (source,) = _opened(shard)
        named = [key for key, place in places.items() if place == name]
        absent = tuple(key for key in named if key not in source.entries)
        others = tuple(key for key in source.entries if key not in places or places[key] != name)
        if absent or others:
            fault = f"lacks {_listed(absent)}" if absent else f"has {_listed(others)}"
            fault += f"; expected exactly the tensors that {path.name} says are in it"
            raise WeightsError(shard, fault, missing=absent, unexpected=others)
        sources.append(source)
    return sources


def _safetensors(path: Path) -> _Source:
    with _reading(path), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(_LONGEST_HEADER, size - 8):
            raise WeightsError(path, "is damaged or truncated; expected the header of a safetensors file")
        header = _json(path, file.read(length))
    header.pop("__metadata__", None)
    entries = {}
    spans = []
    for name, entry in header.items():
        try:
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            is_sound = all(type(n) is int and n >= 0 for n in (*shape, begin, end)) and len(entry) == 3
        except (KeyError, TypeError, ValueError):
            is_sound = False
        if not is_sound:
            raise WeightsError(path, f"is damaged: {_shown(name)} has no dtype, shape and data_offsets")
        if not isinstance(dtype, str) or dtype not in _NUMPY_TYPES:
            raise WeightsError(path, f"{_shown(name)} is of type {_shown(dtype)}, expected {' or '.join(_FLOATS)}")
        if math.prod(shape) * np.dtype(_NUMPY_TYPES[dtype]).itemsize != end - begin:
            raise WeightsError(path, f"is damaged: {_shown(name)} of shape {shape} is not its {end - begin} bytes")
        spans.append((begin, end, name))
        entries[name] = _Entry(dtype, shape, 8 + length + begin)
    last = 0
    for begin, end, name in sorted(spans):
        if begin != last:
            raise WeightsError(path, f"is damaged: {_shown(name)} does not begin where the tensor before it ends")
        last = end
    if last != size - 8 - length:
        fault = "truncated" if last > size - 8 - length else "damaged"
        raise WeightsError(path, f"is {fault}: its tensors end at byte {8 + length + last} and it has {size}")

    def load(names: list[str]) -> dict[str, mx.array]:
        # MLX reads no file in which a tensor is float64.
        if any(entry.dtype == "F64" for entry in entries.values()):
            return {name: _plain(path, entries[name]) for name in names}
        if not names:
            return {}
        with _reading(path):
            tensors = mx.load(str(path), format="safetensors")
            return {name: tensors[name] for name in names}

    return _Source(path, entries, load)


def _plain(path: Path, entry: _Entry) -> mx.array:
    numbers = np.fromfile(path, _NUMPY_TYPES[entry.dtype], math.prod(entry.shape), offset=entry.start)
    return _array(numbers.reshape(entry.shape), entry.dtype)


def _array(numbers: Any, dtype: str) -> mx.array:
    if dtype == "BF16":
        return mx.array(numbers.view(np.uint16)).view(mx.bfloat16)
    # Otherwise MLX makes float32 of float64.
    return mx.array(numbers, dtype=mx.float64) if dtype == "F64" else mx.array(numbers)


def _archive(path: Path) -> _Source:
    """The arrays of an .npz; none of Python's objects are read."""
    kinds = {kind: name for name, kind in _NUMPY_TYPES.items() if name != "BF16"} | {"|V2": "BF16"}
    entries = {}
    with _reading(path), zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name == member.filename or name in entries:
                fault = "twice" if name in entries else "which is no array"
                raise WeightsError(path, f"has {_shown(member.filename)} {fault}; expected the arrays of a model")
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                if version == (1, 0):
                    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                else:
                    shape, _, dtype = np.lib.format.read_array_header_2_0(file)
                start = file.tell()
            if dtype.str not in kinds:
                kind = "Python objects" if dtype.hasobject else f"type {dtype}"
                raise WeightsError(path, f"{_shown(name)} is of {kind}, expected numbers, {' or '.join(_FLOATS)}")
            if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != member.file_size - start:
                raise WeightsError(path, f"is damaged: {_shown(name)} of shape {shape} is not its bytes")
            entries[name] = _Entry(kinds[dtype.str], tuple(shape))

    def load(names: list[str]) -> dict[str, mx.array]:
        tensors = {}
        with _reading(path), zipfile.ZipFile(path) as archive:
            for name in names:
                with archive.open(f"{name}.npy") as file:
                    numbers = np.lib.format.read_array(file, allow_pickle=False)
                tensors[name] = _array(numbers, entries[name].dtype)
        return tensors

    return _Source(path, entries, load)


def _torch_file(path: Path) -> _Source:
    """The tensors of a file that torch.save wrote, which only its safe loader reads."""
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"{path}: torch reads this file and cannot be imported; run: pip install torch") from error
    warnings.warn(
        f"{path}: is a pickle of torch's, read by torch.load(weights_only=True); save_pretrained writes {WEIGHTS}",
        stacklevel=2,
    )
    with _reading(path):
        # A file of before torch 1.6 is no archive, and cannot be mapped into memory.
        state_dict = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if not isinstance(state_dict, Mapping):
        raise WeightsError(path, f"holds a {type(state_dict).__name__}, expected a dictionary of tensors")
    kinds = {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }
    entries = {}
    for name, tensor in state_dict.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise WeightsError(path, f"{_shown(name)} is a {type(tensor).__name__}, expected a tensor")
        if tensor.layout != torch.strided or tensor.dtype not in kinds:
            raise WeightsError(path, f"{_shown(name)} is of type {tensor.dtype}, expected {' or '.join(_FLOATS)}")
        # Strides of zero make any size of a few bytes.
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise WeightsError(path, f"{_shown(name)} is larger than its data, expected all numbers in the file")
        entries[name] = _Entry(kinds[tensor.dtype], tuple(tensor.shape))

    def load(names: list[str]) -> dict[str, mx.array]:
        tensors = {}
        for name in names:
            tensor = state_dict[name].detach().contiguous()
            bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
            tensors[name] = _array(bits.numpy(), entries[name].dtype)
        return tensors

    return _Source(path, entries, load)


def _mlx_type(path: Path, name: str, tensor: mx.array) -> str:
    if tensor.dtype not in _MLX_TYPES:
        raise WeightsError(path, f"{_shown(name)} is of type {tensor.dtype}, expected one of {_listed(_FLOATS)}")
    return _MLX_TYPES[tensor.dtype]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Makes one error, of one line, of all that a damaged or hostile file makes a reader raise."""
    try:
        yield
    except WeightsError:
        raise
    except OSError as error:
        raise WeightsError(path, f"cannot be read: {error.strerror or _shown(str(error))}") from None
    # Pickles and archives raise whatever they like.
    except Exception as error:
        said = str(error).strip().partition("\n")[0]
        fault = f"{type(error).__name__}: {said}" if said else type(error).__name__
        raise WeightsError(
            path, f"is damaged, or holds more than tensors: {_shown(fault)}; expected the weights of a model"
        ) from None


def _json(path: Path, content: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            raise WeightsError(path, "is damaged: it has a name twice")
        return made

    try:
        found = json.loads(content, object_pairs_hook=once)
    except WeightsError:
        raise
    except (ValueError, RecursionError):
        raise WeightsError(path, "is damaged: its header is not JSON") from None
    if not isinstance(found, dict):
        raise WeightsError(path, "is damaged: its header is not an object")
    return found


def _shown(name: Any) -> str:
    text = str(name)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 300 else f"{text[:300]}..."


def _listed(names: Iterable[str]) -> str:
    every = [_shown(name) for name in names]
    more = f" and {len(every) - _MOST_NAMES} more" if len(every) > _MOST_NAMES else ""
    return ", ".join(every[:_MOST_NAMES]) + more
