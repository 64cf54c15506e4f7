# SPDX-License-Identifier: Apache-2.0
"""Writes model.safetensors and pytorch_model.bin one tensor at a time; torch.save and save_file need all at once."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
Write = Callable[[str, Tensor], None]

_SAFETENSORS_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_STORAGE_TYPES = {
    torch.float64: "DoubleStorage",
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
}
_ALIGNMENT = 64  # torch.save's own
_PIECE = 1 << 16  # ext4 takes more at once at a third of the speed: it looks for memory in large pages
_ROOT = "pytorch_model"


@contextmanager
def safetensors_file(path: Path, layout: Layout) -> Iterator[Write]:
    """Give a function that writes one tensor of `layout`, in any order; afterwards the file is on the disk.

    layout: dtype and shape of every tensor.

    Raises OSError when it cannot be written.
    """
    # The widest first, as the library writes them: so every number is aligned.
    order = sorted(layout, key=lambda name: (-layout[name][0].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name in order:
        dtype, shape = layout[name]
        end = begin + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)

        def write(name: str, tensor: Tensor) -> None:
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            _write_in_pieces(file, _bytes(tensor))

        yield write
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def torch_file(path: Path, layout: Layout) -> Iterator[Write]:
    """Give a function that writes one tensor of `layout`, in any order; torch.load reads the file as a state dict.

    layout: dtype and shape of every tensor.

    Raises OSError when it cannot be written.
    """
    keys = {name: str(number) for number, name in enumerate(layout)}
    with open(path, "xb") as file:
        # Torch's reader knows archives of any size; the format with large offsets is taken only where it is needed.
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            _member(archive, "data.pkl", _pickled(layout))
            _member(archive, "byteorder", b"little")

            def write(name: str, tensor: Tensor) -> None:
                _member(archive, f"data/{keys[name]}", _bytes(tensor))

            yield write
            _member(archive, "version", b"3\n")
        file.flush()
        os.fsync(file.fileno())


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _member(archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    """Append a file whose data starts at a multiple of 64 bytes, as torch.load with mmap=True likes it."""
    member = zipfile.ZipInfo(f"{_ROOT}/{name}")
    is_large = len(content) >= 1 << 31
    # An extra field of id "FB", torch's own, fills up; the one of a large member comes before it.
    start = archive.fp.tell() + 30 + len(member.filename) + 4 + (20 if is_large else 0)  # type: ignore[union-attr]
    padding = -start % _ALIGNMENT
    member.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    member.file_size = len(content)
    with archive.open(member, "w", force_zip64=is_large) as file:
        _write_in_pieces(file, content)


def _write_in_pieces(file: IO[bytes], content: bytes | memoryview) -> None:
    for begin in range(0, len(content), _PIECE):
        file.write(content[begin : begin + _PIECE])


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype
    count: int


def _pickled(layout: Layout) -> bytes:
    """The pickle that torch.save would write of a state dict."""
    state_dict: OrderedDict[str, _Entry] = OrderedDict()
    for number, (name, (dtype, shape)) in enumerate(layout.items()):
        state_dict[name] = _Entry(_Storage(str(number), dtype, math.prod(shape)), shape)
    stream = io.BytesIO()
    _StateDictPickler(stream, protocol=2).dump(state_dict)
    return stream.getvalue()


@dataclass(frozen=True)
class _Entry:
    storage: _Storage
    shape: tuple[int, ...]


class _StateDictPickler(pickle.Pickler):
    """Describes tensors as torch.save does: how to rebuild each, and which storage it is made of."""

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Storage):
            return ("storage", getattr(torch, _STORAGE_TYPES[obj.dtype]), obj.key, "cpu", obj.count)
        return None

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, _Entry):
            return NotImplemented
        stride = torch.empty(obj.shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (obj.storage, 0, obj.shape, stride, False, OrderedDict())
