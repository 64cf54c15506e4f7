# SPDX-License-Identifier: Apache-2.0
"""Files and directories that appear whole or not at all, whatever interrupts their writing."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from harness.errors import DescriptionError


def write_atomically(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Writes a file under a temporary name beside `path` and moves it into place; text becomes UTF-8.

    Missing parent directories are made. Whatever goes wrong, an old file at `path` stays as it was and no
    temporary file stays behind. Raises DescriptionError when the operating system refuses.
    """
    target = Path(path)
    content = data.encode() if isinstance(data, str) else data
    _make_parent(target)
    temporary = _beside(target)
    try:
        # The name is new and the mode follows the umask, as for any file; tempfile's files are private.
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise DescriptionError(f"cannot write {target}: {_why(error, temporary)}") from error
        raise


@contextlib.contextmanager
def new_directory(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """Yields an empty directory beside `path` to fill, and moves it to `path` at the end.

    If the block raises, nothing new stays behind and an old directory stays as it was; an OSError in the
    block becomes a DescriptionError. A directory at `path` with something in it is refused unless `replace`.
    """
    target = Path(path)
    _make_parent(target)
    temporary = _beside(target)
    try:
        _refuse_taken(target, replace=replace)  # before the work, not only after it
        temporary.mkdir()
        yield temporary
        _flush(temporary)
        _refuse_taken(target, replace=replace)
        _move_directory(temporary, target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise DescriptionError(f"cannot write directory {target}: {_why(error, temporary)}") from error
        raise


def _make_parent(target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        taken = next((folder for folder in target.parents if folder.is_file()), target.parent)
        raise DescriptionError(f"cannot write {target}: {taken} is a file, expected a directory") from error
    except OSError as error:
        raise DescriptionError(f"cannot write {target}: {_why(error, target)}") from error


def _beside(target: Path) -> Path:
    """A name that nothing has yet, on the same file system, so that the last step is one rename."""
    if target.name in ("", ".."):
        raise DescriptionError(f"cannot write {target}: expected a path that ends in a name")
    # Cut, so that a target whose name is as long as the file system allows still has a temporary name.
    return target.with_name(f".{target.name[:40]}.{secrets.token_hex(6)}.tmp")


def _refuse_taken(target: Path, *, replace: bool) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise DescriptionError(f"cannot write directory {target}: there is something else of that name")
    if not replace and target.is_dir() and any(target.iterdir()):
        raise DescriptionError(f"cannot write directory {target}: it is not empty; remove it or name another")


def _flush(directory: Path) -> None:
    for folder, _, names in os.walk(directory):
        for name in names:
            file = Path(folder, name)
            if not file.is_symlink():
                descriptor = os.open(file, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)


def _move_directory(temporary: Path, target: Path) -> None:
    """Renames; an old directory is set aside first and put back if the second rename does not happen."""
    if not target.is_dir():
        os.rename(temporary, target)
        return
    aside = _beside(target)
    try:
        os.rename(target, aside)
        os.rename(temporary, target)
    except BaseException:
        if aside.exists() and not target.exists():
            os.rename(aside, target)
        raise
    finally:
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)


def _why(error: OSError, known: Path) -> str:
    """What the operating system said, and of which file where it is not about the one being written."""
    why = error.strerror or str(error) or type(error).__name__
    name = os.fspath(error.filename) if isinstance(error.filename, str | os.PathLike) else ""
    return f"{why}: {name}" if name and not name.startswith(str(known)) else why
