# SPDX-License-Identifier: Apache-2.0
"""Downloads that can be trusted: the client's snapshot, tried again where the client gives up, every file verified."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from harness.errors import ParityError
from harness.hub.names import is_commit
from harness.hub.objects import blob_oid

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

Found = TypeVar("Found")

PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses that another try may not meet again."""

TRANSPORTS = frozenset({"httpx", "httpx2", "httpcore", "requests", "urllib3"})
"""Libraries below the client: whatever they raise without an answer of the Hub is trouble on the way."""

LONGEST_WAIT = 60.0
CHUNK_BYTES = 1 << 20


class DownloadFailed(ParityError):
    """A snapshot could not be had, or what arrived is not what the Hub lists."""


def verified_snapshot(
    repo_id: str,
    revision: str | None = None,
    *,
    repo_type: str | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    cache_dir: str | Path | None = None,
    allow_patterns: str | Sequence[str] | None = None,
    ignore_patterns: str | Sequence[str] | None = None,
    attempts: int = 5,
    first_wait: float = 0.5,
) -> Path:
    """The directory of a snapshot in the client's cache, after every file in it was compared with the Hub's list.

    Both client lines give up on what passes (a 503 on GET with 2.x, on a listing with 0.36; a 429; a reset), and
    believe a file of the right size. Here each step is tried `attempts` times, waiting `first_wait` seconds and then
    twice as long each time, or what Retry-After says; and each file must have the SHA-256 (LFS) or the git object id
    (others) that the tree of the commit lists. A file that has another is removed from the cache and fetched anew, and
    so is one in the directory that is not listed, or that other patterns left there, without being fetched.

    The revision is resolved once, so that all files are of one commit. The Hub must be reachable: a cache alone has
    nothing to be compared with.
    Raises DownloadFailed when the attempts are used up; what the client raises for a repository or revision that is
    not there, not allowed or disabled goes through as it is.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

    api = HfApi(endpoint=endpoint, token=token)
    what = f"{repo_id} at {revision or 'main'}"

    def patiently(step: Callable[[], Found]) -> Found:
        return _patiently(step, what=what, attempts=attempts, first_wait=first_wait)

    commit = patiently(lambda: api.repo_info(repo_id, revision=revision, repo_type=repo_type)).sha
    if commit is None or not is_commit(commit):
        raise DownloadFailed(f"{what}: the Hub says that its commit is {commit!r}, which is none")
    tree = patiently(lambda: list(api.list_repo_tree(repo_id, recursive=True, revision=commit, repo_type=repo_type)))
    listed: Mapping[str, RepoFile] = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    for name in listed:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DownloadFailed(f"{what}: the Hub lists {name!r}, which is outside of the snapshot")
    chosen = filter_repo_objects(
        listed, allow_patterns=_as_list(allow_patterns), ignore_patterns=_as_list(ignore_patterns)
    )
    expected = set(chosen)
    for _ in range(attempts):
        folder = Path(
            patiently(
                lambda: snapshot_download(
                    repo_id,
                    revision=commit,
                    repo_type=repo_type,
                    token=token,
                    endpoint=endpoint,
                    cache_dir=cache_dir,
                    allow_patterns=_as_list(allow_patterns),
                    ignore_patterns=_as_list(ignore_patterns),
                )
            )
        )
        there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
        wrong = {
            name: found
            for name in sorted(expected | there)
            if (found := _difference(folder / name, listed.get(name))) is not None
        }
        if not wrong:
            return folder
        for name in wrong:
            _forget(folder, name, listed.get(name))
    name, found = next(iter(wrong.items()))
    raise DownloadFailed(
        f"{what}: {name} {found}, {attempts} times in a row; the copies were removed from the cache. Something between"
        " here and the Hub changes what is sent"
    )


def _patiently(step: Callable[[], Found], *, what: str, attempts: int, first_wait: float) -> Found:
    """What a step gives, tried again while its failure may pass."""
    wait = first_wait
    for attempt in range(1, attempts + 1):
        try:
            return step()
        except Exception as error:
            if not may_pass(error):
                raise
            if attempt == attempts:
                words = " ".join(str(error).split())[:300] or "without a message"
                raise DownloadFailed(
                    f"{what}: given up after {attempts} attempts; the last ended with {type(error).__name__}: {words}"
                ) from error
            time.sleep(min(_asked_to_wait(error) or wait, LONGEST_WAIT))
            wait *= 2
    raise AssertionError("attempts must be at least 1")


def may_pass(error: BaseException) -> bool:
    """Whether a failure of the client may be another one, or none, at the next try."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in PASSING_STATUS
    if type(error).__name__ in ("LocalEntryNotFoundError", "OfflineModeIsEnabled"):
        # What the client could not ask the Hub about; the trouble that it had is the cause, if there was any.
        return error.__cause__ is not None and may_pass(error.__cause__)
    if type(error).__module__.partition(".")[0] in TRANSPORTS:
        return True
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):  # a listing that came in part
        return True
    return isinstance(error, OSError) and "Consistency check failed" in str(error)


def _asked_to_wait(error: BaseException) -> float | None:
    """Seconds that the Hub asks for, where it does."""
    headers: Mapping[str, Any] = getattr(getattr(error, "response", None), "headers", None) or {}
    value = str(headers.get("Retry-After", ""))
    return float(value) if value.isdecimal() else None


def _difference(path: Path, listed: RepoFile | None) -> str | None:
    """What is wrong with a file that was downloaded; None where it is the one that is listed."""
    if listed is None:
        return "is in the snapshot and the Hub does not list it"
    if not path.is_file():
        return "is not in the snapshot"
    size = path.stat().st_size
    if size != listed.size:
        return f"has {size} bytes, listed with {listed.size}"
    with open(path, "rb") as file:
        if listed.lfs:
            found, expected = hashlib.file_digest(file, "sha256").hexdigest(), listed.lfs.sha256
        else:
            found, expected = blob_oid(iter(lambda: file.read(CHUNK_BYTES), b""), size=size), listed.blob_id
    return None if found == expected else f"has the digest {found}, listed with {expected}"


def _forget(folder: Path, name: str, listed: RepoFile | None) -> None:
    """Takes a file out of the cache, and the blob behind it: the client would take that again."""
    blobs = []
    if listed is not None:
        # Without links the client copies the blob of that name, where there is one.
        digest = listed.lfs.sha256 if listed.lfs else listed.blob_id
        blobs = [(folder / name).resolve(), folder.parents[1] / "blobs" / digest]
    for path in (folder / name, *blobs):
        path.unlink(missing_ok=True)


def _as_list(patterns: str | Sequence[str] | None) -> list[str] | None:
    return [patterns] if isinstance(patterns, str) else None if patterns is None else list(patterns)
