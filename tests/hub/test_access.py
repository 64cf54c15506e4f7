# SPDX-License-Identifier: Apache-2.0
"""Who may see, download and write what, and the exception that the real client raises where one may not."""

from __future__ import annotations

import hashlib
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.hub import HubServer, Organisation, User
from harness.hub.accounts import Accounts, digest
from harness.hub.refusals import Refusal

Client = Callable[..., Any]

USERS = [
    User(name="alice", token="hf_alice"),
    User(name="bob", token="hf_bob"),
    User(name="carol", token="hf_carol"),
    User(name="carol", token="hf_carol_reads", role="read"),
]
TEAM = Organisation(name="team", members={"alice": "admin", "carol": "read"})

EVERYTHING = """
def everything(repo):
    "What becomes of each thing one can do to a repository."
    calls = {
        "info": lambda: api.model_info(repo),
        "files": lambda: api.list_repo_files(repo),
        "tree": lambda: list(api.list_repo_tree(repo)),
        "refs": lambda: api.list_repo_refs(repo),
        "history": lambda: api.list_repo_commits(repo),
        "download": lambda: hf_hub_download(repo, "f"),
        "snapshot": lambda: snapshot_download(repo),
        "absent": lambda: hf_hub_download(repo, "nope"),
        "revision": lambda: hf_hub_download(repo, "f", revision="nope"),
        "check": lambda: api.auth_check(repo),
        "upload": lambda: api.upload_file(path_or_fileobj=b"2", path_in_repo="g", repo_id=repo),
        "branch": lambda: api.create_branch(repo, branch="other"),
        "settings": lambda: api.update_repo_settings(repo, gated=False),
        "delete": lambda: api.delete_repo(repo),
    }
    return {name: tried(calls[name]) for name in given.get("only", calls)}
"""


@pytest.fixture
def shared(tmp_path: Path, client: Client) -> Iterator[HubServer]:
    """A Hub with alice, bob, carol, a team, and one repository each that is public, private, gated and disabled."""
    with HubServer(tmp_path / "hub", users=USERS, organisations=[TEAM]) as hub:
        client(
            hub,
            """
            for name in ("public", "private", "auto", "manual", "disabled"):
                api.create_repo(f"alice/{name}", private=name == "private")
                api.upload_file(path_or_fileobj=b"1", path_in_repo="f", repo_id=f"alice/{name}")
                if name in ("auto", "manual"):
                    api.update_repo_settings(f"alice/{name}", gated=name)
            api.create_repo("team/private", private=True)
            api.upload_file(path_or_fileobj=b"1", path_in_repo="f", repo_id="team/private")
            """,
        )
        disabled = hub.store.find_repository("model", "alice/disabled")
        assert disabled is not None
        hub.store.set_repository(disabled, disabled=True)
        yield hub


def everything(hub: HubServer, client: Client, repository: str, token: str | None, **given: Any) -> dict[str, str]:
    answer: dict[str, str] = client(hub, EVERYTHING + f"answer = everything({repository!r})", token=token, **given)
    # The one name that differs between the client lines.
    return {name: said.replace("RemoteEntryNotFoundError", "EntryNotFoundError") for name, said in answer.items()}


@pytest.mark.hub
@pytest.mark.parametrize("token", [None, "hf_bob"])
def test_a_private_repository_cannot_be_told_from_one_that_is_not_there(
    token: str | None, shared: HubServer, client: Client
) -> None:
    private = everything(shared, client, "alice/private", token)
    assert private == everything(shared, client, "alice/never", token)
    status = 404 if token else 401
    missing = f"RepositoryNotFoundError {status}"
    # The client says of these two, without a token, only that they are not authorised.
    assert {name: said for name, said in private.items() if said != missing} in ({}, {"delete": "HfHubHTTPError 401"})
    listed = client(shared, "answer = [m.id for m in api.list_models(author='alice')]", token=token)
    assert "alice/private" not in listed and "alice/public" in listed


@pytest.mark.hub
def test_a_public_repository_is_read_by_all_and_written_by_its_owner(shared: HubServer, client: Client) -> None:
    reading = ["info", "files", "tree", "refs", "history", "download", "snapshot", "check"]
    for token in (None, "hf_bob"):
        done = everything(shared, client, "alice/public", token)
        assert {done[name] for name in reading} == {"ok"}
        assert done["absent"] == "EntryNotFoundError 404"
        assert done["revision"] == "RevisionNotFoundError 404"
        kind = "HfHubHTTPError 403" if token else "RepositoryNotFoundError 401"
        assert {done[name] for name in ("upload", "branch", "settings")} == {kind}
        assert done["delete"] in (kind, "HfHubHTTPError 401")
    own = everything(shared, client, "alice/public", "hf_alice")
    assert {name for name, said in own.items() if said != "ok"} == {"absent", "revision"}


@pytest.mark.hub
def test_a_reading_member_sees_what_is_private_and_writes_nothing(shared: HubServer, client: Client) -> None:
    only = ["download", "upload", "delete"]
    assert everything(shared, client, "team/private", "hf_alice", only=only[:2]) == {"download": "ok", "upload": "ok"}
    assert list(everything(shared, client, "team/private", "hf_carol", only=only).values()) == [
        "ok",
        "HfHubHTTPError 403",
        "HfHubHTTPError 403",
    ]
    assert everything(shared, client, "team/private", "hf_bob", only=only)["download"] == "RepositoryNotFoundError 404"


@pytest.mark.hub
def test_a_token_to_read_does_not_write_even_ones_own(shared: HubServer, client: Client) -> None:
    answer = client(
        shared,
        'answer = [tried(lambda: api.create_repo("carol/mine")), tried(lambda: hf_hub_download("alice/public", "f"))]',
        token="hf_carol_reads",
    )
    assert answer == ["HfHubHTTPError 403", "ok"]


@pytest.mark.hub
def test_whoever_sees_a_repository_may_open_a_pull_request_and_change_no_branch(
    shared: HubServer, client: Client
) -> None:
    script = """
    def put(**options):
        operations = [CommitOperationAdd("w.bin", given["text"].encode()), CommitOperationAdd("t.txt", b"t")]
        return api.create_commit("alice/public", operations, commit_message="mine", **options)


    answer = [
        tried(lambda: put(create_pr=True)),
        tried(lambda: put(revision="refs/pr/1")),
        tried(put),
        tried(lambda: api.create_pull_request("alice/public", "mine, without changes yet")),
        sorted(api.list_repo_files("alice/public")),
    ]
    """
    main = [".gitattributes", "f"]
    bob = client(shared, script, token="hf_bob", text="bob's own")
    assert bob == ["ok", "ok", "HfHubHTTPError 403", "ok", main]
    assert client(shared, script, token="hf_carol_reads", text="carol's") == ["HfHubHTTPError 403"] * 4 + [main]
    # Of others' pull requests only those who may write to the repository take care.
    carol = client(shared, script, token="hf_carol", text="carol's")
    assert carol == ["ok", "HfHubHTTPError 403", "HfHubHTTPError 403", "ok", main]
    missing = "RepositoryNotFoundError 401"
    assert client(shared, script, token=None, text="nobody's") == [missing] * 4 + [main]
    proposed = client(shared, 'answer = api.list_repo_files("alice/public", revision="refs/pr/1")')
    assert sorted(proposed) == [*main, "t.txt", "w.bin"]
    assert client(shared, script, text="alice's")[1] == "ok"


@pytest.mark.hub
def test_a_gated_repository_gives_its_files_to_those_who_were_given_access(shared: HubServer, client: Client) -> None:
    only = ["info", "files", "download", "check"]
    told = {
        name: [everything(shared, client, f"alice/{name}", token, only=only) for token in (None, "hf_bob", "hf_alice")]
        for name in ("auto", "manual")
    }
    for nobody, bob, alice in told.values():
        assert list(nobody.values()) == ["ok", "ok", "GatedRepoError 401", "GatedRepoError 401"]
        assert list(bob.values()) == ["ok", "ok", "GatedRepoError 403", "GatedRepoError 403"]
        assert set(alice.values()) == {"ok"}
    ask = """
    from huggingface_hub.utils import build_hf_headers, get_session


    def ask(name):
        return (
            get_session()
            .post(f"{os.environ['HF_ENDPOINT']}/alice/{name}/ask-access", headers=build_hf_headers())
            .status_code
        )


    answer = [
        ask("auto"),
        ask("manual"),
        tried(lambda: hf_hub_download("alice/auto", "f")),
        tried(lambda: hf_hub_download("alice/manual", "f")),
    ]
    """
    assert client(shared, ask, token="hf_bob") == [200, 200, "ok", "GatedRepoError 403"]
    decide = """
    pending = [r.username for r in api.list_pending_access_requests("alice/manual")]
    api.accept_access_request("alice/manual", "bob")
    api.grant_access("alice/manual", "carol")
    answer = [
        pending,
        sorted(r.username for r in api.list_accepted_access_requests("alice/manual")),
        tried(lambda: api.accept_access_request("alice/manual", "bob")),
        tried(lambda: api.grant_access("alice/manual", "nobody")),
        tried(lambda: list(api.list_pending_access_requests("alice/public"))),
        tried(lambda: api.accept_access_request("alice/auto", "carol")),
    ]
    """
    pending, accepted, again, unknown, ungated, unasked = client(shared, decide)
    assert (pending, accepted) == (["bob"], ["bob", "carol"])
    assert again == ungated == "BadRequestError 400"
    assert unknown == unasked == "HfHubHTTPError 404"
    download = 'answer = tried(lambda: hf_hub_download("alice/manual", "f"))'
    assert [client(shared, download, token=token) for token in ("hf_bob", "hf_carol")] == ["ok", "ok"]
    client(shared, 'api.reject_access_request("alice/manual", "bob", rejection_reason=None)')
    assert client(shared, download, token="hf_bob") == "GatedRepoError 403"


@pytest.mark.hub
def test_a_disabled_repository_says_so_to_everybody(shared: HubServer, client: Client) -> None:
    for token in (None, "hf_alice"):
        done = everything(shared, client, "alice/disabled", token, only=["info", "files", "download", "upload"])
        # Where files are downloaded the client keeps the reason as the cause of this one.
        assert done.pop("download") == "LocalEntryNotFoundError"
        assert set(done.values()) == {"DisabledRepoError 403"}


@pytest.mark.hub
def test_a_wrong_token_is_refused_where_none_would_do(shared: HubServer, client: Client) -> None:
    done = everything(shared, client, "alice/public", "hf_wrong", only=["info", "download"])
    assert done["info"] == "HfHubHTTPError 401"
    assert done["download"] in ("HfHubHTTPError 401", "LocalEntryNotFoundError")


@pytest.mark.hub
def test_nobody_gets_a_private_file_by_its_hash(shared: HubServer, client: Client) -> None:
    client(
        shared,
        'api.upload_file(path_or_fileobj=b"secret" * 100, path_in_repo="w.bin", repo_id="alice/private")',
    )
    client(shared, 'api.create_repo("bob/thief")', token="hf_bob")
    content = b"secret" * 100
    stolen = {"path": "w.bin", "algo": "sha256", "oid": hashlib.sha256(content).hexdigest(), "size": len(content)}
    lines = [{"key": "header", "value": {"summary": "mine"}}, {"key": "lfsFile", "value": stolen}]
    request = urllib.request.Request(
        f"{shared.url}/api/models/bob/thief/commit/main",
        data="\n".join(map(json.dumps, lines)).encode(),
        headers={"Authorization": "Bearer hf_bob"},
    )
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request)
    assert client(shared, 'answer = api.list_repo_files("bob/thief")', token="hf_bob") == [".gitattributes"]


# Accounts by themselves


def test_tokens_are_stored_hashed_only(shared: HubServer) -> None:
    shared.stop()
    stored = b"".join(
        path.read_bytes() for path in shared.root.rglob("*") if path.is_file() and "client" not in path.parts
    )
    assert b"hf_alice" not in stored
    assert digest("hf_alice").encode() in stored


@pytest.mark.parametrize(
    ("user", "said"),
    [
        (User(name="no/slash", token="t"), "no/slash"),
        (User(name="", token="t"), ""),
        (User(name="dave", token=""), "token of dave"),
        (User(name="dave", token="two words"), "token of dave"),
        (User(name="dave", token="t", role="admin"), "read"),  # type: ignore[arg-type]
        (User(name="team", token="t"), "organisation already"),
        (User(name="dave", token="hf_alice"), "that of alice already"),
    ],
)
def test_a_user_who_cannot_be_is_refused_with_the_reason(user: User, said: str, shared: HubServer) -> None:
    with pytest.raises(Refusal) as refusal:
        shared.accounts.add_user(user)
    assert said in str(refusal.value)


def test_a_name_is_taken_in_any_case(shared: HubServer) -> None:
    for name in ("Alice", "TEAM"):
        with pytest.raises(Refusal, match="already"):
            shared.accounts.add_user(User(name=name, token="other"))


def test_members_must_be_users_and_a_failed_organisation_leaves_nothing(shared: HubServer) -> None:
    with pytest.raises(Refusal, match="no user 'nobody'"):
        shared.accounts.add_organisation(Organisation(name="club", members={"alice": "admin", "nobody": "read"}))
    assert "club" not in shared.accounts.organisations_of("alice")


def test_a_token_that_is_removed_is_refused(shared: HubServer) -> None:
    accounts: Accounts = shared.accounts
    accounts.remove_token("hf_bob")
    with pytest.raises(Refusal) as refusal:
        accounts.account_of("Bearer hf_bob")
    assert refusal.value.kind == "bad_token"
