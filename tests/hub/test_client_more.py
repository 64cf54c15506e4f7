# SPDX-License-Identifier: Apache-2.0
"""What the client's methods tell of repositories, files and pull requests is what was done to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.hub import HubServer

pytestmark = pytest.mark.hub

Client = Callable[..., Any]


def test_a_repository_is_told_as_far_as_it_is_asked_for(hub: HubServer, client: Client) -> None:
    answer = client(
        hub,
        """
        for name in ("alice/one", "alice/two", "alice/tree"):
            api.create_repo(name)
            api.upload_file(path_or_fileobj=b"12345", path_in_repo="f", repo_id=name)
        api.upload_file(path_or_fileobj=b"1", path_in_repo="g", repo_id="alice/one", commit_message="<b> & more")
        info = api.model_info("alice/two", expand=["siblings", "sha"])
        # Names that are parts of addresses, too.
        kinds = ["tree", "refs", "resolve", "settings"]
        answer = {
            "files": [[s.rfilename for s in info.siblings], info.sha == api.model_info("alice/two").sha, info.private],
            "full": [sorted(s.rfilename for s in m.siblings or []) for m in api.list_models(full=True, author="alice")],
            "plain": [m.siblings for m in api.list_models(author="alice")],
            "changed": [m.id for m in api.list_models(author="alice", sort=given["sort"])],
            "created": [m.id for m in api.list_models(author="alice", limit=2)],
            "filter": tried(lambda: list(api.list_models(filter="text-generation"))),
            "formatted": api.list_repo_commits("alice/one", formatted=True)[0].formatted_title,
            "unformatted": api.list_repo_commits("alice/one")[0].formatted_title,
            "exist": [api.repo_exists("alice/" + kind) for kind in kinds],
            "files of tree": api.list_repo_files("alice/tree"),
        }
        """,
        sort="last_modified",
    )
    assert answer["files"] == [[".gitattributes", "f"], True, None]
    assert answer["full"] == [[".gitattributes", "f"]] * 2 + [[".gitattributes", "f", "g"]]
    assert answer["plain"] == [None] * 3
    assert answer["created"] == ["alice/tree", "alice/two"]
    assert sorted(answer["changed"]) == ["alice/one", "alice/tree", "alice/two"]
    assert answer["filter"] == "BadRequestError 400"
    assert (answer["formatted"], answer["unformatted"]) == ("&lt;b&gt; &amp; more", None)
    assert answer["exist"] == [True, False, False, False]
    assert answer["files of tree"] == [".gitattributes", "f"]


def test_each_file_is_told_with_the_commit_that_changed_it(hub: HubServer, client: Client) -> None:
    answer = client(
        hub,
        """
        from huggingface_hub import HfFileSystem

        api.create_repo("alice/model")


        def put(title, **files):
            operations = [CommitOperationAdd(name.replace("_", "/"), text.encode()) for name, text in files.items()]
            api.create_commit("alice/model", operations, commit_message=title)


        put("first", a="1", folder_b="1", folder_c="1")
        put("second", folder_b="2")
        put("third", d="1")
        put("fourth", d="2")
        api.create_branch("alice/model", branch="other")
        put("fifth", d="1")
        listed = list(api.list_repo_tree("alice/model", recursive=True, expand=True))
        files = HfFileSystem()
        answer = {
            "tree": {e.path: e.last_commit.title for e in listed},
            "paths": [e.last_commit.title for e in api.get_paths_info("alice/model", ["folder", "d"], expand=True)],
            "branch": [
                e.last_commit.title
                for e in api.get_paths_info("alice/model", ["d"], expand=True, revision="other")
            ],
            "not asked": [e.last_commit for e in api.get_paths_info("alice/model", ["d"])],
            "time": files.modified("alice/model/d").isoformat()[:4],
        }
        """,
    )
    assert answer["tree"] == {
        ".gitattributes": "initial commit",
        "a": "first",
        "d": "fifth",
        "folder": "second",
        "folder/b": "second",
        "folder/c": "first",
    }
    assert answer["paths"] == ["fifth", "second"] or answer["paths"] == ["second", "fifth"]
    assert (answer["branch"], answer["not asked"]) == (["fourth"], [None])
    assert answer["time"].isdecimal()


def test_a_pull_request_has_the_title_and_author_it_was_opened_with(hub: HubServer, client: Client) -> None:
    answer = client(
        hub,
        """
        api.create_repo("alice/model")
        opened = api.create_pull_request("alice/model", title="Better weights")
        api.upload_file(
            path_or_fileobj=b"1", path_in_repo="f", repo_id="alice/model", revision=opened.git_reference
        )
        told = api.get_discussion_details("alice/model", opened.num)
        answer = [opened.title, told.title, told.author, [d.title for d in api.get_repo_discussions("alice/model")]]
        """,
    )
    assert answer == ["Better weights", "Better weights", "alice", ["Better weights"]]


def test_a_file_system_reads_writes_copies_and_removes(hub: HubServer, client: Client, tmp_path: Path) -> None:
    (tmp_path / "local").write_bytes(b"local")
    answer = client(
        hub,
        """
        from huggingface_hub import HfFileSystem

        api.create_repo("alice/model")
        files = HfFileSystem()
        with files.open("alice/model/a/x.bin", "wb") as file:
            file.write(bytes(range(100)))
        with files.open("alice/model/a/x.bin", "rb", block_size=16) as file:
            file.seek(90)
            end = list(file.read())
        files.cp("alice/model/a/x.bin", "alice/model/y.bin")
        files.put(given["local"], "alice/model/z.txt")
        files.mv("alice/model/z.txt", "alice/model/w.txt")
        files.rm("alice/model/a", recursive=True)
        answer = [end, files.glob("alice/model/*"), files.cat("alice/model/w.txt").decode(), files.exists("alice/no/x")]
        """,
        local=str(tmp_path / "local"),
    )
    names = [f"alice/model/{name}" for name in (".gitattributes", "w.txt", "y.bin")]
    assert answer == [list(range(90, 100)), names, "local", False]
