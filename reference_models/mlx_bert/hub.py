# SPDX-License-Identifier: Apache-2.0
"""Makes a directory of what from_pretrained is given: a path that is there, or a model of the Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import ModuleType

# What a Hub's ids are made of; the end of the text, and not of a line, has to follow.
_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
_HUB_ID = re.compile(rf"(?P<repository>{_NAME}/{_NAME})(?:@(?P<revision>[A-Za-z0-9_.-]+))?")
_FILES = ("*.json", "*.safetensors", "*.npz", "*.txt")
_WEIGHTS = ("*.safetensors", "*.npz")
_TORCH_FILES = ("*.bin",)
_FORM = "a Hub id is organisation/name or organisation/name@revision"


class HubError(OSError):
    """A model could not be had: it is not there, may not be read, or nothing could be reached."""


class NotFoundError(HubError, FileNotFoundError):
    """Neither a path that is there nor a Hub id."""


def _is_hub_model_id(id_or_path: str) -> bool:
    """Return whether a text names a model of the Hub: `organisation/name`, with `@revision` or without.

    A path that is there is a path, from the current directory as from the root; nothing else is guessed.
    """
    return bool(_HUB_ID.fullmatch(id_or_path)) and not os.path.lexists(id_or_path)


def resolve(
    id_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
) -> Path:
    """Return the directory of a model: the path given, or what the Hub's client downloaded or had already.

    Of the Hub come the files that end in .json, .safetensors, .npz and .txt, and where no weights are among them .bin.

    id_or_path: a path that is there wins; a PathLike is never an id. revision: branch, tag or commit.
    cache_dir, token: as the client takes them; its own by default.

    Raises:
        NotFoundError: neither a path that is there nor a Hub id.
        HubError: a path that is no directory; the repository, its revision or its files are not there or may not be
            read, or the Hub cannot be reached and the cache does not have them.
        ImportError: a Hub id, and huggingface_hub is not installed.
        ValueError: two revisions, an empty one, or one for a path.
    """
    name = os.fspath(id_or_path)
    if revision == "":
        raise ValueError(f"revision of {name!r} is empty; expected a branch, a tag or a commit, or None")
    if not (isinstance(id_or_path, str) and _is_hub_model_id(id_or_path)):
        return _local(name, revision)
    found = _HUB_ID.fullmatch(name)
    assert found is not None
    if revision and found["revision"] and revision != found["revision"]:
        raise ValueError(f"{name!r} names a revision and revision={revision!r} another; expected one of the two")
    return _downloaded(found["repository"], revision or found["revision"], cache_dir, token)


def _local(name: str, revision: str | None) -> Path:
    if not os.path.exists(name):
        fault = "a symbolic link to nothing" if os.path.lexists(name) else "no path that is there, and no Hub id"
        raise NotFoundError(f"{name!r} is {fault}: {_FORM}, and a path has to exist")
    if revision is not None:
        raise ValueError(f"{name!r} is a path here and has no revision {revision!r}; expected revision=None with it")
    if not os.path.isdir(name):
        raise HubError(f"{name!r} is a file; expected the directory that a model's files lie in")
    return Path(name)


def _downloaded(
    repository: str, revision: str | None, cache_dir: str | os.PathLike[str] | None, token: str | bool | None
) -> Path:
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise ImportError(
            f"{repository} is on the Hub and huggingface_hub cannot be imported; run: pip install huggingface_hub"
        ) from error
    where = f"{repository}@{revision}" if revision else repository

    def download(patterns: tuple[str, ...]) -> Path:
        place = None if cache_dir is None else os.fspath(cache_dir)
        return Path(
            snapshot_download(
                repository, revision=revision, cache_dir=place, token=token, allow_patterns=list(patterns)
            )
        )

    try:
        directory = download(_FILES)
        if not _any(directory, _WEIGHTS):
            directory = download(_TORCH_FILES)
    # The client lets the exceptions of two libraries for HTTP through, which have nothing in common.
    except Exception as error:
        raise HubError(f"{where}: {_fault(error, errors, revision)}") from error
    if not _any(directory, (*_FILES, *_TORCH_FILES)):
        raise HubError(
            f"{where}: has none of the files of a model; expected config.json and model.safetensors, or other weights"
        )
    return directory


def _any(directory: Path, patterns: tuple[str, ...]) -> bool:
    return any(path.is_file() for pattern in patterns for path in directory.glob(f"**/{pattern}"))


def _fault(error: Exception, errors: ModuleType, revision: str | None) -> str:
    """Returns what went wrong and what to do, in one line; `errors` is the client's module of them."""
    said = " ".join(str(error).split())
    # A repository that is gated is, to the client, one kind of a repository that is not found.
    known = {
        "GatedRepoError": "is gated; accept its conditions on its page, and give a token of who did",
        "DisabledRepoError": "is disabled by the Hub",
        "RevisionNotFoundError": f"has no revision {revision or 'main'!r}; expected a branch, a tag or a commit of it",
        "RepositoryNotFoundError": "is not on the Hub, or is private and the token given does not open it",
        "HFValidationError": f"is no id that the Hub has: {said}",
        "OfflineModeIsEnabled": "is not in the cache and the client is offline; unset HF_HUB_OFFLINE or download it",
        "IncompleteSnapshotError": "is not whole in the cache and the Hub was not reached; connect and try again",
    }
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    for name, fault in known.items():
        kind = getattr(errors, name, None)
        if kind is not None and any(isinstance(one, kind) for one in chain):
            return fault
    if isinstance(error, getattr(errors, "LocalEntryNotFoundError", ())):
        return f"is not in the cache and the Hub could not be reached: {said}"
    return f"could not be downloaded: {type(error).__name__}: {said}"
