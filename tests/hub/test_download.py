# SPDX-License-Identifier: Apache-2.0
"""verified_snapshot: what passes is tried again, what is wrong is never believed, by both client lines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.hub import Fault, HubServer

pytestmark = pytest.mark.hub

Client = Callable[..., Any]

GET = r"^GET .*/resolve/.*/"
HEAD = r"^HEAD .*/resolve/"

SNAPSHOT = """
from harness.hub import verified_snapshot

options = given.get("options", {})
try:
    folder = verified_snapshot("alice/model", first_wait=0.01, **options)
    answer = {
        str(p.relative_to(folder)): p.read_bytes().decode("latin-1") for p in folder.rglob("*") if p.is_file()
    }
except Exception as error:
    answer = f"{type(error).__name__}: {error}"
"""

CONTENT = {"a.txt": "text" * 100, "w.bin": "\xff" * 1000, "deep/er/x.py": "x = 1\n", "empty": ""}


@pytest.fixture
def published(hub: HubServer, client: Client) -> HubServer:
    """A Hub with a model of one LFS file, three others, and an older revision `v1`."""
    client(
        hub,
        """
        api.create_repo("alice/model")


        def put(content, **options):
            operations = [CommitOperationAdd(name, text.encode("latin-1")) for name, text in content.items()]
            api.create_commit("alice/model", operations, commit_message="content", **options)


        put({"old.txt": "old"})
        api.create_tag("alice/model", tag="v1")
        put(given["content"])
        api.delete_file("old.txt", "alice/model")
        api.delete_file(".gitattributes", "alice/model")
        """,
        content=CONTENT,
    )
    hub.journal.clear()
    return hub


def test_a_snapshot_is_every_file_of_the_revision(published: HubServer, client: Client) -> None:
    assert client(published, SNAPSHOT) == CONTENT
    assert client(published, SNAPSHOT, options={"revision": "v1"})["old.txt"] == "old"
    some = client(published, SNAPSHOT, options={"allow_patterns": "*.txt"})
    assert some == {"a.txt": CONTENT["a.txt"]}


@pytest.mark.parametrize(
    "fault",
    [
        Fault(match=GET, status=503, times=2),
        Fault(match=GET, status=429, headers={"Retry-After": "1"}, times=1),
        Fault(match="/tree/|/revision/|^GET /api/models/alice/model$", status=502, times=2),
        Fault(match=GET + "a.txt", reset_before=True, times=2),
        Fault(match=GET + "w.bin", reset_after=10, times=2),
        Fault(match=GET + "w.bin", close_after=10, times=1),
        Fault(match=HEAD, reset_before=True, times=2),
        Fault(match=GET + "w.bin", truncate=10, times=1),
        Fault(match="^GET /api/models/alice/model/tree/", truncate=50, times=1),
    ],
    ids=lambda fault: str(fault.as_json()),
)
def test_what_passes_does_not_fail_a_snapshot(fault: Fault, published: HubServer, client: Client) -> None:
    published.inject(fault)
    assert client(published, SNAPSHOT) == CONTENT


@pytest.mark.parametrize("name", ["w.bin", "a.txt"])
def test_a_flipped_byte_is_not_believed_and_fetched_anew(name: str, published: HubServer, client: Client) -> None:
    published.inject(Fault(match=GET + name, flip=7, times=2))
    assert client(published, SNAPSHOT) == CONTENT


@pytest.mark.parametrize("name", ["w.bin", "a.txt"])
def test_a_byte_that_is_always_flipped_is_told_and_not_left_in_the_cache(
    name: str, published: HubServer, client: Client, tmp_path: Path
) -> None:
    published.inject(Fault(match=GET + name, flip=7))
    answer = client(published, SNAPSHOT, home=tmp_path / "home", options={"attempts": 2})
    assert answer.startswith(f"DownloadFailed: alice/model at main: {name} has the digest ")
    assert "2 times in a row" in answer
    published.clear_faults()
    plain = 'answer = pathlib.Path(hf_hub_download("alice/model", given["name"])).read_bytes().decode("latin-1")'
    assert client(published, plain, home=tmp_path / "home", name=name) == CONTENT[name]


def test_a_file_that_was_spoilt_in_the_cache_is_fetched_anew(
    published: HubServer, client: Client, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    client(published, SNAPSHOT, home=home)
    (cached,) = [path for path in (home / "hub").rglob("w.bin") if "snapshots" in path.parts]
    cached.resolve().write_bytes(b"\0" * 1000)
    assert client(published, SNAPSHOT, home=home) == CONTENT


def test_what_lies_in_the_directory_beside_what_was_asked_for_is_verified_too(
    published: HubServer, client: Client, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    client(published, SNAPSHOT, home=home)
    (cached,) = [path for path in (home / "hub").rglob("w.bin") if "snapshots" in path.parts]
    cached.with_name("planted.py").write_text("import this")
    cached.resolve().write_bytes(b"\0" * 1000)
    some = client(published, SNAPSHOT, home=home, options={"allow_patterns": "*.txt"})
    assert some == {name: text for name, text in CONTENT.items() if name != "w.bin"}


def test_a_spoilt_blob_is_not_copied_again_where_there_are_no_links(
    published: HubServer, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    client(published, SNAPSHOT, home=home)
    (cached,) = [path for path in (home / "hub").rglob("w.bin") if "snapshots" in path.parts]
    cached.resolve().write_bytes(b"\0" * 1000)
    cached.unlink()
    monkeypatch.setenv("HF_HUB_DISABLE_SYMLINKS", "1")
    assert client(published, SNAPSHOT, home=home) == CONTENT


def test_a_hub_that_lists_what_cannot_be_is_not_followed(published: HubServer, client: Client, tmp_path: Path) -> None:
    victim = tmp_path / "victim.txt"
    victim.write_text("mine")
    listing = """
from huggingface_hub.hf_api import RepoFile

HfApi.list_repo_tree = lambda *_, **__: [RepoFile(path=given["path"], size=1, oid="0" * 40)]
"""
    for path in ("/".join([".."] * 30) + str(victim), str(victim)):
        assert client(published, listing + SNAPSHOT, path=path).startswith("DownloadFailed: alice/model at main: ")
    assert victim.read_text() == "mine"
    published.inject(Fault(match="^GET /api/models/alice/model", status=200, content={"id": "alice/model"}))
    assert "its commit is None" in client(published, SNAPSHOT)


def test_what_does_not_pass_is_given_up_with_the_reason(published: HubServer, client: Client) -> None:
    published.inject(Fault(match=GET + "w.bin", reset_after=10))
    answer = client(published, SNAPSHOT, options={"attempts": 2})
    assert answer.startswith("DownloadFailed: alice/model at main: given up after 2 attempts; the last ended with ")
    assert "ReadError" in answer or "ChunkedEncodingError" in answer


@pytest.mark.parametrize(
    ("repository", "options", "error"),
    [
        ("alice/never", {}, "RepositoryNotFoundError"),
        ("alice/model", {"revision": "nope"}, "RevisionNotFoundError"),
        ("alice/model", {"token": "hf_wrong"}, "HfHubHTTPError"),
    ],
)
def test_what_is_not_there_is_asked_for_once_and_raised_as_the_client_does(
    repository: str, options: dict[str, Any], error: str, published: HubServer, client: Client
) -> None:
    answer = client(published, SNAPSHOT.replace("alice/model", repository), options=options)
    assert answer.startswith(error)
    asked = [entry.target for entry in published.journal.entries() if "/api/models/" in entry.target]
    assert len(asked) == 1


def test_all_files_are_of_one_commit_while_the_branch_moves(published: HubServer, client: Client) -> None:
    published.inject(
        Fault(match="^GET /api/models/alice/model", move={"repository": "alice/model", "to": "v1"}, times=1)
    )
    assert client(published, SNAPSHOT) == CONTENT
    assert "old.txt" in client(published, SNAPSHOT)
