# SPDX-License-Identifier: Apache-2.0
"""What repositories, files in them, branches and tags may be called; whatever else is asked for is a bad request."""

from __future__ import annotations

import re

from harness.hub.refusals import Refusal

RESERVED_OWNERS = frozenset({"__hub__", "__lfs__", "api", "datasets", "models", "spaces"})
"""First parts of a repository id that would be taken for another part of a URL."""

SEGMENT_BYTES = 255
"""A client writes each segment as the name of a file or folder, and file systems end there."""
PATH_BYTES = 1024
"""What macOS can open; Linux takes four times as much."""
SHORTEST_PREFIX = 7
"""How much of a commit's id names it, as in git."""

_REPOSITORY_PART = re.compile(r"(?![-.])[A-Za-z0-9._-]{1,96}(?<![-.])")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PREFIX = re.compile(rf"[0-9a-f]{{{SHORTEST_PREFIX},40}}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_NOT_IN_REFS = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//")


def repository_parts(repository: str) -> tuple[str, str]:
    """Owner ("" where there is none) and name of `owner/name` or `name`, by the rules of the client.

    Raises Refusal (bad_request).
    """
    parts = repository.split("/")
    if len(parts) > 2:
        raise _bad(f"a repository is called 'owner/name' or 'name', not {repository!r}")
    for part in parts:
        if not _REPOSITORY_PART.fullmatch(part):
            raise _bad(
                f"{repository!r}: owner and name are 1 to 96 of A-Z a-z 0-9 - _ . and neither begin nor end with - or ."
            )
        if "--" in part or ".." in part:
            raise _bad(f"{repository!r}: -- and .. stand in no repository id")
        if part.endswith((".git", ".ipynb")):
            raise _bad(f"{repository!r}: .git and .ipynb end no repository id")
    if parts[0] in RESERVED_OWNERS:
        raise _bad(f"{repository!r}: {parts[0]!r} is a part of the Hub's own addresses; choose another")
    return ("", parts[0]) if len(parts) == 1 else (parts[0], parts[1])


def check_path(path: str) -> str:
    """The path of a file or folder in a repository, as it came. Raises Refusal (bad_request) with the path."""
    reason = _wrong_with_path(path)
    if reason:
        raise _bad(f"the path {path!r} {reason}")
    return path


def check_ref(name: str) -> str:
    """The name of a branch or a tag, by git's rules (`git check-ref-format --branch`) and these: it does not look like
    a commit's id, and `refs/` is left to the server. Raises Refusal (bad_request) with the name."""
    reason = _wrong_with_ref(name)
    if reason:
        raise _bad(f"the name {name!r} of a branch or tag {reason}")
    return name


def is_commit(revision: str) -> bool:
    """Whether it is a whole id of a commit."""
    return _COMMIT.fullmatch(revision) is not None


def is_commit_prefix(revision: str) -> bool:
    """Whether it is long enough to name a commit by the beginning of its id."""
    return _PREFIX.fullmatch(revision) is not None


def is_text(text: str) -> bool:
    """Whether it can be written as UTF-8: JSON can smuggle in halves of surrogate pairs, which cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _bad(message: str) -> Refusal:
    return Refusal(kind="bad_request", message=message)


def _wrong_with_path(path: str) -> str:
    if not path:
        return "is empty"
    if not is_text(path):
        return "is not UTF-8"
    if path.startswith("/"):
        return "is absolute; give it from the top of the repository"
    if path.endswith("/"):
        return "ends with a slash"
    if _CONTROL.search(path):
        return "has a control character in it"
    if "\\" in path:
        return "has a backslash in it, which separates folders on other systems; use /"
    if len(path.encode()) > PATH_BYTES:
        return f"is longer than {PATH_BYTES} bytes"
    for segment in path.split("/"):
        if not segment:
            return "has an empty segment"
        if segment in (".", ".."):
            return f"has the segment {segment!r}, which is not a name"
        if segment.lower() == ".git":
            return "has the segment '.git', which belongs to git"
        if len(segment.encode()) > SEGMENT_BYTES:
            return f"has a segment of more than {SEGMENT_BYTES} bytes"
    return ""


def _wrong_with_ref(name: str) -> str:
    if not name:
        return "is empty"
    if not is_text(name):
        return "is not UTF-8"
    if is_commit(name.lower()):
        return "is that of a commit: 40 hexadecimal digits"
    if name.startswith("refs/"):
        return "begins with 'refs/', which the server gives out"
    if name in ("@", "HEAD"):
        return "has a meaning of its own in git"
    if name.startswith(("-", "/")) or name.endswith(("/", ".")):
        return "begins with - or /, or ends with / or ."
    if _NOT_IN_REFS.search(name):
        return "has a blank, a control character, // or one of ~ ^ : ? * [ \\ .. @{ in it"
    if any(part.startswith(".") or part.endswith(".lock") for part in name.split("/")):
        return "has a part that begins with . or ends with .lock"
    if len(name.encode()) > SEGMENT_BYTES:
        return f"is longer than {SEGMENT_BYTES} bytes"  # A client keeps it in a file of that name.
    return ""
