# SPDX-License-Identifier: Apache-2.0
"""Every endpoint as the real client uses it: what it writes is there, and what it reads is what was written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.hub import HubServer, Sizes

pytestmark = pytest.mark.hub

Client = Callable[..., Any]


def test_a_file_comes_back_as_it_was_sent_whether_git_or_lfs_keeps_it(hub: HubServer, client: Client) -> None:
    answer = client(
        hub,
        """
        api.create_repo("alice/model")
        content = {
            "README.md": b"# Model",
            "weights.safetensors": os.urandom(100_000),
            "empty.bin": b"",
            "a/b/c.txt": b"x" * 50,
            "zero.dat": b"text" + bytes(10),
        }
        commits = [
            api.upload_file(path_or_fileobj=data, path_in_repo=name, repo_id="alice/model").oid
            for name, data in content.items()
        ]
        back = {name: pathlib.Path(hf_hub_download("alice/model", name)).read_bytes() for name in content}
        tree = {
            entry.path: [entry.blob_id, entry.lfs and entry.lfs.sha256]
            for entry in api.list_repo_tree("alice/model", recursive=True)
            if hasattr(entry, "blob_id")
        }
        folders = [
            entry.path
            for entry in api.list_repo_tree("alice/model", recursive=True)
            if not hasattr(entry, "blob_id")
        ]
        info = api.model_info("alice/model", files_metadata=True)
        answer = {
            "same": [back[name] == data for name, data in content.items()],
            "tree": tree,
            "folders": folders,
            "files": sorted(api.list_repo_files("alice/model")),
            "sha": info.sha,
            "last": commits[-1],
            "sizes": {s.rfilename: s.size for s in info.siblings},
            "history": [c.title for c in api.list_repo_commits("alice/model")],
        }
        """,
    )
    assert answer["same"] == [True] * 5
    assert answer["files"] == [
        ".gitattributes",
        "README.md",
        "a/b/c.txt",
        "empty.bin",
        "weights.safetensors",
        "zero.dat",
    ]
    assert answer["folders"] == ["a", "a/b"]
    assert answer["tree"]["README.md"] == [hashlib.sha1(b"blob 7\0# Model").hexdigest(), None]
    assert [name for name, (_, lfs) in answer["tree"].items() if lfs] == ["weights.safetensors", "zero.dat"]
    assert answer["sha"] == answer["last"]
    assert answer["sizes"]["weights.safetensors"] == 100_000
    assert len(answer["history"]) == 6  # the repository begins with a commit of its own


def test_one_commit_adds_copies_and_deletes(hub: HubServer, client: Client) -> None:
    answer = client(
        hub,
        """
        api.create_repo("alice/model")
        operations = [CommitOperationAdd(f"folder/{n}.txt", f"{n}".encode()) for n in range(5)]
        operations.append(CommitOperationAdd("big.bin", b"0" * 1000))
        first = api.create_commit("alice/model", operations, commit_message="all", commit_description="at once")
        api.create_commit(
            "alice/model",
            [
                CommitOperationCopy("big.bin", "copy/big.bin"),
                CommitOperationCopy("folder/1.txt", "one.txt"),
                CommitOperationDelete("folder/0.txt"),
                CommitOperationAdd("folder/1.txt", b"changed"),
            ],
            commit_message="second",
            parent_commit=first.oid,
        )
        api.delete_folder("copy", "alice/model")
        api.delete_file("one.txt", "alice/model")
        answer = {
            "files": sorted(api.list_repo_files("alice/model")),
            "first": sorted(api.list_repo_files("alice/model", revision=first.oid)),
            "changed": pathlib.Path(hf_hub_download("alice/model", "folder/1.txt")).read_text(),
            "before": pathlib.Path(hf_hub_download("alice/model", "folder/1.txt", revision=first.oid)).read_text(),
            "stale": tried(
                lambda: api.create_commit(
                    "alice/model", [CommitOperationAdd("x", b"x")], commit_message="x", parent_commit=first.oid
                )
            ),
            "history": [[c.title, c.message, c.authors] for c in api.list_repo_commits("alice/model")],
            "absent": tried(lambda: api.delete_file("nowhere.txt", "alice/model")),
        }
        """,
    )
    assert answer["files"] == [
        ".gitattributes",
        "big.bin",
        "folder/1.txt",
        "folder/2.txt",
        "folder/3.txt",
        "folder/4.txt",
    ]
    assert len(answer["first"]) == 7
    assert (answer["changed"], answer["before"]) == ("changed", "1")
    assert answer["stale"] == "HfHubHTTPError 412"
    assert answer["absent"] in ("RemoteEntryNotFoundError 404", "EntryNotFoundError 404")
    assert answer["history"][3] == ["all", "at once", ["alice"]]


def test_a_folder_is_uploaded_and_a_snapshot_is_the_same_folder(hub: HubServer, client: Client, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for name in (
        "a.txt",
        "b/c.py",
        "b/d/e.bin",
        "unpleasant/ä ö#?%25&+'.txt",
        "unpleasant/日本.txt",
        ".hidden",
        "cache.pyc",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() * 10)
    answer = client(
        hub,
        """
        api.create_repo("alice/model")
        api.upload_folder(repo_id="alice/model", folder_path=given["folder"], ignore_patterns=["*.pyc"])
        snapshot = pathlib.Path(snapshot_download("alice/model"))
        answer = {str(p.relative_to(snapshot)): p.read_bytes().decode() for p in snapshot.rglob("*") if p.is_file()}
        """,
        folder=str(folder),
    )
    expected = {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}
    del answer[".gitattributes"], expected["cache.pyc"]
    assert answer == expected


def test_gitignore_leaves_files_out_the_one_sent_and_the_one_there(
    hub: HubServer, client: Client, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("kept.txt", "left.log"):
        (folder / name).write_text(name)
    (folder / ".gitignore").write_text("*.log\n")
    answer = client(
        hub,
        """
        api.create_repo("alice/model")
        api.upload_folder(repo_id="alice/model", folder_path=given["folder"])
        os.remove(given["folder"] + "/.gitignore")
        api.upload_folder(repo_id="alice/model", folder_path=given["folder"])
        answer = sorted(api.list_repo_files("alice/model"))
        """,
        folder=str(folder),
    )
    assert answer == [".gitattributes", ".gitignore", "kept.txt"]


def test_branches_tags_and_pull_requests_lead_to_their_commits(hub: HubServer, client: Client) -> None:
    answer = client(
        hub,
        """
        api.create_repo("alice/model")


        def put(text, **options):
            return api.upload_file(
                path_or_fileobj=text.encode(), path_in_repo="f", repo_id="alice/model", **options
            )


        def get(revision):
            return pathlib.Path(hf_hub_download("alice/model", "f", revision=revision)).read_text()


        one = put("one").oid
        api.create_tag("alice/model", tag="v1")
        api.create_branch("alice/model", branch="feat/x")
        put("branch", revision="feat/x")
        two = put("two").oid
        api.create_tag("alice/model", tag="v0", revision=one, tag_message="first")
        request = put("request", create_pr=True)
        put("request again", revision=request.pr_revision)
        empty = api.create_pull_request("alice/model", "nothing yet")
        put("late", revision=empty.git_reference)
        refs = api.list_repo_refs("alice/model", include_pull_requests=True)
        answer = {
            "texts": {
                r: get(r)
                for r in ["main", "v1", "v0", "feat/x", one, one[:8], "refs/heads/main", "refs/pr/1", "refs/pr/2"]
            },
            "refs": sorted(r.ref for r in [*refs.branches, *refs.tags, *refs.pull_requests]),
            "again": [
                tried(lambda: api.create_tag("alice/model", tag="v1")),
                tried(lambda: api.create_branch("alice/model", branch="feat/x")),
            ],
            "number": request.pr_num,
            "target": {r.name: r.target_commit for r in refs.tags},
            "one": one,
            "discussions": [d.num for d in api.get_repo_discussions("alice/model")],
        }
        api.delete_tag("alice/model", tag="v1")
        api.delete_branch("alice/model", branch="feat/x")
        answer["gone"] = [tried(lambda: get("v1")), tried(lambda: get("feat/x"))]
        answer["main"] = tried(lambda: api.delete_branch("alice/model", branch="main"))
        """,
    )
    assert answer["texts"] == {
        "main": "two",
        "v1": "one",
        "v0": "one",
        "feat/x": "branch",
        answer["one"]: "one",
        answer["one"][:8]: "one",
        "refs/heads/main": "two",
        "refs/pr/1": "request again",
        "refs/pr/2": "late",
    }
    assert answer["refs"] == [
        "refs/heads/feat/x",
        "refs/heads/main",
        "refs/pr/1",
        "refs/pr/2",
        "refs/tags/v0",
        "refs/tags/v1",
    ]
    assert answer["again"] == ["HfHubHTTPError 409"] * 2
    assert answer["target"]["v0"] == answer["one"]
    assert sorted(answer["discussions"]) == [1, 2]
    assert answer["gone"] == ["RevisionNotFoundError 404"] * 2
    assert answer["main"].startswith(("HfHubHTTPError 4", "BadRequestError"))


def test_repositories_are_listed_moved_and_deleted(hub: HubServer, client: Client) -> None:
    answer = client(
        hub,
        """
        url = api.create_repo("alice/old")
        api.upload_file(path_or_fileobj=b"kept", path_in_repo="f", repo_id="alice/old")
        first = api.list_repo_commits("alice/old")[0].commit_id
        again = api.create_repo("old", exist_ok=True)
        conflict = tried(lambda: api.create_repo("alice/old"))
        api.move_repo("alice/old", "alice/new")
        api.create_repo("alice/data", repo_type="dataset")
        api.upload_file(path_or_fileobj=b"1,2", path_in_repo="t.csv", repo_id="alice/data", repo_type="dataset")
        answer = {
            "url": [url, url.repo_id, again],
            "conflict": conflict,
            "through the old name": [
                pathlib.Path(hf_hub_download("alice/old", "f")).read_text(),
                api.model_info("alice/old").id,
            ],
            "written through it": tried(
                lambda: api.upload_file(path_or_fileobj=b"more", path_in_repo="g", repo_id="alice/old")
            ),
            "files": sorted(api.list_repo_files("alice/new")),
            "models": [m.id for m in api.list_models(author="alice")],
            "search": [m.id for m in api.list_models(search="ne")],
            "datasets": [d.id for d in api.list_datasets(author="alice")],
            "row": pathlib.Path(hf_hub_download("alice/data", "t.csv", repo_type="dataset")).read_text(),
            "exists": [
                api.repo_exists("alice/new"),
                api.repo_exists("alice/data"),
                api.file_exists("alice/new", "f"),
                api.file_exists("alice/new", "nope"),
                api.revision_exists("alice/new", "nope"),
            ],
        }
        api.delete_repo("alice/new")
        answer["gone"] = [
            tried(lambda: api.model_info("alice/new")),
            tried(lambda: api.delete_repo("alice/new")),
            api.delete_repo("alice/new", missing_ok=True),
        ]
        """,
    )
    assert answer["url"] == [f"{hub.url}/alice/old", "alice/old", f"{hub.url}/alice/old"]
    assert answer["conflict"] == "HfHubHTTPError 409"
    assert answer["through the old name"] == ["kept", "alice/new"]
    assert answer["written through it"] == "ok"
    assert answer["files"] == [".gitattributes", "f", "g"]
    assert (answer["models"], answer["search"], answer["datasets"]) == (["alice/new"], ["alice/new"], ["alice/data"])
    assert answer["row"] == "1,2"
    assert answer["exists"] == [True, False, True, False, False]
    assert answer["gone"] == ["RepositoryNotFoundError 404"] * 2 + [None]


def test_a_listing_longer_than_a_page_is_complete_and_in_order(hub: HubServer, client: Client) -> None:
    answer = client(
        hub,
        """
        api.create_repo("alice/model")
        operations = [CommitOperationAdd(f"d{n % 7}/{n:04}.txt", b"%d" % n) for n in range(2300)]
        api.create_commit("alice/model", operations, commit_message="many")
        tree = [entry.path for entry in api.list_repo_tree("alice/model", recursive=True)]
        for n in range(120):
            api.create_commit("alice/model", [CommitOperationAdd("f", b"%d" % n)], commit_message=f"{n}")
        some = api.get_paths_info("alice/model", ["d1/0001.txt", "d2", "nope"])
        answer = {
            "count": len(tree),
            "sorted": tree == sorted(tree),
            "flat": [e.path for e in api.list_repo_tree("alice/model", "d3")][:2],
            "history": [c.title for c in api.list_repo_commits("alice/model")][:120],
            "some": [e.path for e in some],
            "unknown folder": tried(lambda: list(api.list_repo_tree("alice/model", "nope"))),
            "models": 0,
        }
        for n in range(5):
            api.create_repo(f"alice/m{n}")
        answer["models"] = [m.id for m in api.list_models(limit=4)]
        """,
    )
    assert answer["count"] == 2300 + 7 + 1
    assert answer["sorted"]
    assert answer["flat"] == ["d3/0003.txt", "d3/0010.txt"]
    assert answer["history"] == [str(n) for n in reversed(range(120))]
    assert answer["some"] == ["d1/0001.txt", "d2"]
    assert answer["unknown folder"] in ("RemoteEntryNotFoundError 404", "EntryNotFoundError 404")
    assert answer["models"] == ["alice/m4", "alice/m3", "alice/m2", "alice/m1"]


def test_a_large_file_goes_up_in_parts_and_down_again_from_where_it_broke_off(tmp_path: Path, client: Client) -> None:
    with HubServer(tmp_path / "hub", sizes=Sizes(multipart=1 << 20, part=300_000)) as hub:
        answer = client(
            hub,
            """
            import hashlib

            api.create_repo("alice/model")
            data = os.urandom(1_500_000)
            api.upload_file(path_or_fileobj=data, path_in_repo="w.bin", repo_id="alice/model")
            back = pathlib.Path(hf_hub_download("alice/model", "w.bin")).read_bytes()
            answer = back == data
            """,
        )
        puts = [entry for entry in hub.journal.entries() if entry.method == "PUT"]
    assert answer is True
    assert len(puts) == 5


def test_content_that_is_there_is_not_sent_again_but_by_another_repository(hub: HubServer, client: Client) -> None:
    client(
        hub,
        """
        for name in ("alice/one", "alice/one", "alice/two"):
            api.create_repo(name, exist_ok=True)
            api.upload_file(
                path_or_fileobj=b"0" * 5000, path_in_repo=f"{len(api.list_repo_commits(name))}.bin", repo_id=name
            )
        """,
    )
    assert [entry.method for entry in hub.journal.entries()].count("PUT") == 2


def test_a_client_that_insists_on_xet_is_told_which_variable_to_set(hub: HubServer, client: Client) -> None:
    answer = client(
        hub,
        """
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        api.create_repo("alice/model")
        try:
            hf_raise_for_status(
                get_session().get(
                    f"{os.environ['HF_ENDPOINT']}/api/models/alice/model/xet-write-token/main",
                    headers=build_hf_headers(),
                )
            )
        except Exception as error:
            answer = str(error)
        """,
    )
    assert "HF_HUB_DISABLE_XET=1" in answer


def test_what_was_pushed_is_there_after_a_restart_on_the_same_port(hub: HubServer, client: Client) -> None:
    client(
        hub,
        """
        api.create_repo("alice/model")
        api.upload_file(path_or_fileobj=b"kept", path_in_repo="f", repo_id="alice/model")
        """,
    )
    url = hub.url
    hub.stop()
    hub.start()
    assert hub.url == url
    assert client(hub, 'answer = pathlib.Path(hf_hub_download("alice/model", "f")).read_text()') == "kept"


def test_whoami_tells_user_organisations_and_the_tokens_role(tmp_path: Path, client: Client) -> None:
    from harness.hub import Organisation, User

    users = [User(name="alice", token="hf_alice"), User(name="bob", token="hf_bob", role="read")]
    team = Organisation(name="team", members={"alice": "admin", "bob": "read"})
    with HubServer(tmp_path / "hub", users=users, organisations=[team]) as hub:
        who = [client(hub, "answer = api.whoami()", token=token) for token in ("hf_alice", "hf_bob")]
        wrong = client(hub, "answer = tried(api.whoami)", token="hf_wrong")
    assert [(w["name"], w["orgs"][0]["roleInOrg"], w["auth"]["accessToken"]["role"]) for w in who] == [
        ("alice", "admin", "write"),
        ("bob", "read", "read"),
    ]
    assert wrong.endswith("401") or wrong == "HTTPError"
