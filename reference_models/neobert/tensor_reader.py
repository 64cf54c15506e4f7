# SPDX-License-Identifier: Apache-2.0
"""Reads the tensors of state_dict.pt and model.safetensors one at a time, with plain reads and running nothing.

A file that is mapped into memory counts as memory used, and torch.load of a state dict needs room for all of it.
"""

from __future__ import annotations

import collections
import io
import json
import math
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from reference_models.nanogpt.checkpoint import CheckpointError, open_archive, reading

_CHUNK = 1 << 22  # bytes that are read, checked and summed while they are in the processor's cache
_LONGEST_HEADER = 100_000_000  # what the safetensors library allows too
_STORAGE_TYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_SAFETENSORS_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# What torch.save writes for tensors and plain values. Others could ask for memory that the file does not fill.
_OPCODES = (
    pickle.PROTO, pickle.STOP, pickle.MARK, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT,
    pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT, pickle.BINUNICODE, pickle.SHORT_BINUNICODE,
    pickle.SHORT_BINSTRING, pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1,
    pickle.TUPLE2, pickle.TUPLE3, pickle.APPEND, pickle.APPENDS, pickle.SETITEM, pickle.SETITEMS, pickle.BINPUT,
    pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET, pickle.GLOBAL, pickle.BINPERSID, pickle.REDUCE,
    pickle.BUILD,
)  # fmt: skip


@dataclass(frozen=True)
class Storage:
    """Bytes of a file that one tensor or several are made of; `checksum` is their CRC-32 where the file has it."""

    offset: int
    size: int
    checksum: int | None


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file: `start` and `stride` count elements of its storage."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int
    storage: Storage


@dataclass(frozen=True)
class TensorFile:
    """The tensors of a file by name, in the order of the file; equal entries are one tensor under two names."""

    path: Path
    identity: tuple[int, ...]
    tensors: Mapping[str, StoredTensor]


def open_tensors(path: Path) -> TensorFile:
    """Return what tensors a file holds, without their numbers.

    Raises CheckpointError for a file that is missing, damaged, or holds anything but a flat dictionary of tensors.
    """
    with reading(path) as file:
        identity = _identity(file)
        read = _safetensors_layout if path.suffix == ".safetensors" else _archive_layout
        return TensorFile(path, identity, read(path, file))


def read_tensor(source: TensorFile, name: str, *, stored: StoredTensor | None = None) -> Tensor:
    """Return a tensor of the file, contiguous, with memory of its own.

    stored: a part of it, see `rows`; the whole by default.

    Raises CheckpointError when it is damaged, not finite, or the file has been written anew.
    """
    stored = stored or source.tensors[name]
    count, width = math.prod(stored.shape), stored.dtype.itemsize
    is_dense = stored.stride == _row_major(stored.shape)
    span = count if is_dense else 1 + sum((n - 1) * step for n, step in zip(stored.shape, stored.stride, strict=True))
    span = span if count else 0
    numbers = torch.empty(span, dtype=stored.dtype)
    content = numbers.view(torch.uint8).numpy().data
    checksum, is_finite = 0, True
    with reading(source.path) as file:
        if _identity(file) != source.identity:
            raise CheckpointError(source.path, "was written anew while it was read; expected a file that nobody writes")
        file.seek(stored.storage.offset + stored.start * width)
        for begin in range(0, len(content), _CHUNK):
            chunk = content[begin : begin + _CHUNK]
            if file.readinto(chunk) != len(chunk):  # type: ignore[attr-defined]
                raise CheckpointError(source.path, f"is truncated: {name} ends early")
            if stored.storage.checksum is not None:
                checksum = zlib.crc32(chunk, checksum)
            if is_dense and stored.dtype.is_floating_point:
                is_finite = is_finite and _is_finite(numbers[begin // width : (begin + len(chunk)) // width])
    is_whole = len(content) == stored.storage.size
    if is_whole and stored.storage.checksum is not None and checksum != stored.storage.checksum:
        raise CheckpointError(source.path, f"is damaged: {name} does not have the checksum it was written with")
    if is_dense:
        tensor = numbers.view(stored.shape)
    else:
        tensor = numbers.as_strided(stored.shape, stored.stride).contiguous()
        is_finite = _is_finite(tensor)
    if not is_finite:
        raise CheckpointError(source.path, f"{name} contains NaN or infinite values, expected finite weights")
    return tensor


def rows(stored: StoredTensor, begin: int, end: int) -> StoredTensor:
    """Return the part of a tensor with these rows of its first axis."""
    return replace(stored, shape=(end - begin, *stored.shape[1:]), start=stored.start + begin * stored.stride[0])


def check_shared_storages(source: TensorFile, tensors: Iterable[StoredTensor]) -> None:
    """Raise CheckpointError for damage in storages that no single tensor reads as a whole, so that nothing else does.

    Reads them once.
    """
    tensors = list(tensors)
    wholes = {
        stored.storage
        for stored in tensors
        if stored.stride == _row_major(stored.shape)
        and math.prod(stored.shape) * stored.dtype.itemsize == stored.storage.size
    }
    for storage in dict.fromkeys(stored.storage for stored in tensors if stored.storage not in wholes):
        if storage.checksum is None:
            continue
        with reading(source.path) as file:
            file.seek(storage.offset)
            checksum, left = 0, storage.size
            while left and (chunk := file.read(min(_CHUNK, left))):
                checksum, left = zlib.crc32(chunk, checksum), left - len(chunk)
        if checksum != storage.checksum:
            raise CheckpointError(source.path, "is damaged: a storage does not have the checksum it was written with")


def _is_finite(numbers: Tensor) -> bool:
    # A sum is NaN or infinite if a number is; it can overflow without one.
    return bool(numbers.sum().isfinite()) or bool(numbers.isfinite().all())


def _identity(file: BinaryIO) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    strides = [1]
    for n in reversed(shape[1:]):
        strides.append(strides[-1] * n)
    return tuple(reversed(strides)) if shape else ()


def _safetensors_layout(path: Path, file: BinaryIO) -> dict[str, StoredTensor]:
    size = os.fstat(file.fileno()).st_size
    head = file.read(8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > min(_LONGEST_HEADER, size - 8):
        raise CheckpointError(path, "is damaged or truncated: expected the header of a safetensors file")
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError):
        raise CheckpointError(path, "is damaged: its header is not JSON") from None
    if not isinstance(header, dict):
        raise CheckpointError(path, "is damaged: its header is not an object")
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            is_sound = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        except (KeyError, TypeError, ValueError):
            is_sound = False
        if not is_sound or not begin <= end <= size - 8 - length:
            raise CheckpointError(path, f"is damaged or truncated: {name} has no place in it")
        if dtype not in _SAFETENSORS_TYPES:
            raise CheckpointError(path, f"{name} is of type {dtype}, expected one of {', '.join(_SAFETENSORS_TYPES)}")
        kind = _SAFETENSORS_TYPES[dtype]
        if math.prod(shape) * kind.itemsize != end - begin:
            raise CheckpointError(path, f"is damaged: {name} of shape {shape} does not fill its {end - begin} bytes")
        storage = Storage(8 + length + begin, end - begin, None)
        tensors[name] = StoredTensor(kind, shape, _row_major(shape), 0, storage)
    return tensors


@dataclass(frozen=True)
class _Reference:
    """A storage as the pickle names it."""

    dtype: torch.dtype
    key: str


def _archive_layout(path: Path, file: BinaryIO) -> dict[str, StoredTensor]:
    with open_archive(path, file) as archive:
        members = {member.filename: member for member in archive.infolist()}
        pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError(path, "is a zip archive without data.pkl; expected a file that torch.save wrote")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in members and archive.read(f"{root}byteorder") != b"little":
            raise CheckpointError(path, "was written on a big-endian machine; save it again on a little-endian one")
        content = archive.read(pickles[0])
    state_dict = _unpickled(content)
    if not isinstance(state_dict, Mapping):
        raise CheckpointError(path, f"holds a {type(state_dict).__name__}, expected a dictionary of tensors")
    if not state_dict:
        raise CheckpointError(path, "holds an empty dictionary, expected the tensors of a model")
    places: dict[str, Storage] = {}
    tensors = {}
    for name, entry in state_dict.items():
        if not isinstance(name, str) or not isinstance(entry, tuple) or not isinstance(entry[0], _Reference):
            raise CheckpointError(path, f"{name} is a {type(entry).__name__}, expected a tensor")
        reference, start, shape, stride = entry
        if reference.key not in places:
            member = members.get(f"{root}data/{reference.key}")
            if member is None:
                raise CheckpointError(path, f"is damaged: it has no data for {name}")
            places[reference.key] = _place(path, file, member)
        storage, width = places[reference.key], reference.dtype.itemsize
        last = start + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if 0 not in shape and (last >= storage.size // width or math.prod(shape) > storage.size // width):
            raise CheckpointError(path, f"{name} is larger than its data, expected all numbers in the file")
        tensors[name] = StoredTensor(reference.dtype, shape, stride, start, storage)
    return tensors


def _place(path: Path, file: BinaryIO, member: zipfile.ZipInfo) -> Storage:
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        raise CheckpointError(path, f"{member.filename} is packed; expected plain data, as torch.save writes it")
    file.seek(member.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\3\4":
        raise CheckpointError(path, f"is damaged: {member.filename} is not where its directory says")
    name_length, extra_length = struct.unpack("<HH", header[26:])
    offset = member.header_offset + 30 + name_length + extra_length
    if offset + member.file_size > os.fstat(file.fileno()).st_size:
        raise CheckpointError(path, f"is truncated: {member.filename} ends early")
    return Storage(offset, member.file_size, member.CRC)


def _unpickled(content: bytes) -> Any:
    """What the pickle of torch.save describes: a tensor is a tuple of reference, start, shape and stride."""
    return _LayoutUnpickler(io.BytesIO(content)).load()


class _LayoutUnpickler(pickle._Unpickler):
    """Makes descriptions of tensors and plain values; the names that it resolves are the few below."""

    dispatch = {code[0]: pickle._Unpickler.dispatch[code[0]] for code in _OPCODES}  # noqa: RUF012 as its parent has it

    def find_class(self, module: str, name: str) -> Any:
        known: dict[str, Callable[..., Any] | torch.dtype] = {
            "torch._utils._rebuild_tensor_v2": _tensor,
            "torch._utils._rebuild_parameter": _parameter,
            "collections.OrderedDict": collections.OrderedDict,
        }
        known |= {f"torch.{storage}": dtype for storage, dtype in _STORAGE_TYPES.items()}
        if f"{module}.{name}" not in known:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return known[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> _Reference:
        kind, dtype, key, _, _ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise ValueError("a storage is described in an unknown way")
        return _Reference(dtype, key)


def _tensor(
    reference: _Reference, start: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> tuple[_Reference, int, tuple[int, ...], tuple[int, ...]]:
    numbers = (start, *shape, *stride)
    if len(shape) != len(stride) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError("a tensor is described in an unknown way")
    return reference, start, shape, stride


def _parameter(tensor: Any, *_: Any) -> Any:
    return tensor
