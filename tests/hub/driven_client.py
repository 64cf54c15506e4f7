# SPDX-License-Identifier: Apache-2.0
"""The real client, driven: reads a call as one line of JSON, answers what became of it as one line, and so on."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.utils._http as transport
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download

api = HfApi()


def commit(type: str, id: str, revision: str, operations: list[Any], title: str, parent: Any, create_pr: bool) -> Any:
    made = []
    for what, path, content in operations:
        if what == "add":
            made.append(CommitOperationAdd(path, base64.b64decode(content)))
        else:
            made.append(CommitOperationDelete(path, is_folder=what == "delete_folder"))
    info = api.create_commit(
        id,
        made,
        repo_type=type,
        revision=revision,
        commit_message=title,
        parent_commit=parent,
        create_pr=create_pr,
    )
    return [info.oid, info.pr_num]


def download(type: str, id: str, revision: str, path: str) -> str:
    with tempfile.TemporaryDirectory() as cache:
        file = hf_hub_download(id, path, repo_type=type, revision=revision, cache_dir=cache)
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def snapshot(type: str, id: str, revision: str) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as cache:
        folder = Path(snapshot_download(id, repo_type=type, revision=revision, cache_dir=cache))
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def reconnect() -> None:
    """Forgets connections to a server that is gone."""
    forget = getattr(transport, "close_session", None) or transport.reset_sessions
    forget()


CALLS: dict[str, Callable[..., Any]] = {
    "create": lambda type, id, private: str(api.create_repo(id, repo_type=type, private=private)),
    "delete": lambda type, id: api.delete_repo(id, repo_type=type),
    "move": lambda type, id, to: api.move_repo(id, to, repo_type=type),
    "settings": lambda type, id, **values: api.update_repo_settings(id, repo_type=type, **values),
    "branch": lambda type, id, name, at: api.create_branch(id, repo_type=type, branch=name, revision=at),
    "delete_branch": lambda type, id, name: api.delete_branch(id, repo_type=type, branch=name),
    "tag": lambda type, id, name, at: api.create_tag(id, repo_type=type, tag=name, revision=at),
    "delete_tag": lambda type, id, name: api.delete_tag(id, repo_type=type, tag=name),
    "commit": commit,
    "download": download,
    "snapshot": snapshot,
    "reconnect": reconnect,
}


def main() -> None:
    for line in sys.stdin:
        name, given = json.loads(line)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                answer = [200, CALLS[name](**given)]
        except Exception as error:
            response = getattr(error, "response", None)
            answer = [getattr(response, "status_code", 0), f"{type(error).__name__}: {error}"]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
