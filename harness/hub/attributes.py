# SPDX-License-Identifier: Apache-2.0
"""Which files of a repository LFS keeps: by name, as its .gitattributes says, by size, or because they are no text."""

from __future__ import annotations

import fnmatch
import posixpath

LFS_SUFFIXES = (
    *("7z", "arrow", "bin", "bz2", "ckpt", "ftz", "gz", "h5", "joblib", "lfs.*", "mlmodel", "model", "msgpack"),
    *("npy", "npz", "onnx", "ot", "parquet", "pb", "pickle", "pkl", "pt", "pth", "rar", "safetensors", "tar.*", "tar"),
    *("tflite", "tgz", "wasm", "xz", "zip", "zst"),
)
LFS_PATTERNS = (*(f"*.{suffix}" for suffix in LFS_SUFFIXES), "saved_model/**/*", "*tfevents*")
"""Which files of a new repository are LFS files whatever their size, as .gitattributes says it."""
ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()


def is_lfs(path: str, size: int, sample: bytes, *, limit: int) -> bool:
    """Whether a file is kept by LFS: by its name, because it is large, or because it is no text. Empty ones never."""
    if size <= 0:
        return False
    names = (path, posixpath.basename(path))
    named = any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in LFS_PATTERNS)
    return named or size > limit or b"\0" in sample
