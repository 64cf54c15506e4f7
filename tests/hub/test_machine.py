# SPDX-License-Identifier: Apache-2.0
"""A Hub over HTTP against plain dicts of what it should hold, with the real client, through kills and restarts."""

from __future__ import annotations

import base64
import copy
import dataclasses
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from harness.hub import client_environment
from harness.hub.attributes import ATTRIBUTES
from harness.hub.fsck import fsck
from harness.hub.wire import reserved_port
from tests.hub.holding import (
    TYPES,
    Change,
    Commit,
    Holding,
    Key,
    No,
    Repository,
    changed,
    folders,
    is_lfs,
    sha256,
    tree,
)
from tests.hub.raw import answers, request

pytestmark = pytest.mark.hub

HOST, SECONDS = "127.0.0.1", 20.0

# A `parity hub` for each root that it reads, in a process that is split off when everything is imported: a start costs
# milliseconds. It shares its port with the test here, so that no other takes it while this server is away.
SERVE = """
import functools, os, sys
import harness.hub.server as server
from harness.cli import main, parser

parser()
arguments = ["hub", "--port", sys.argv[1], "--user", "alice:hf_alice", "--user", "bob:hf_bob", "--root"]
server.HubServer = functools.partial(server.HubServer, share_port=True)
for root in sys.stdin:
    child = os.fork()
    if child == 0:
        print(os.getpid(), flush=True)
        sys.exit(main([*arguments, root.strip()]))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

CONTENTS = (b"", b"text\n", b"other text\n", b"\0\1" * 100, bytes(range(256)) * 800, b"x" * 70_000)
PATHS = (
    *("config.json", "w.bin", "d/x.txt", "d/y.bin", "d/e/z.txt", "d/e/v.bin", "a b/ä #?%&+.txt", "c/d/e/f"),
    *("d.txt", "d-e", "model.bin", "d"),  # The last is a folder, too.
)
NAMES = ("alice/one", "alice/two")
IDS = tuple((type, name) for type in TYPES for name in NAMES)
BRANCHES = ("main", "dev", "feat/x", "v1")
TAGS = ("v1", "v/2", "dev")
ODD = 13
"""One of so many is asked for that is not there."""
BURST = 3
BURST_FILES = 6

# What is drawn says nothing of what is there: each number is counted round what there is to choose from then. A kill
# may come before or after a change, so that what is there can differ from one run to the next; what is drawn cannot.
PICK = st.integers(0, 5039)
CHANGES = st.lists(
    st.tuples(st.sampled_from(["add", "add", "add", "delete", "delete_folder"]), PICK), min_size=1, max_size=5
)
BY = st.sampled_from(["client", "raw"])


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the server said; headers by lower-case name."""

    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)


class Server:
    """A `parity hub` process that comes and goes on a port that stays ours, and a connection to it."""

    def __init__(self, port: int) -> None:
        self.url = f"http://{HOST}:{port}"
        self.port = port
        self.pid: int | None = None
        self.connection: http.client.HTTPConnection | None = None
        command = [sys.executable, "-c", SERVE, str(port)]
        self.starter = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self, root: Path) -> None:
        assert self.starter.stdin is not None
        print(root, file=self.starter.stdin, flush=True)
        self.pid = int(self.line())
        assert self.line() == self.url

    def line(self) -> str:
        assert self.starter.stdout is not None
        return self.starter.stdout.readline().strip()

    def end(self, number: signal.Signals) -> int:
        """Ends it by a signal, if it runs; its exit status."""
        if self.connection is not None:
            self.connection.close()
            self.connection = None
        if self.pid is None:
            return 0
        os.kill(self.pid, number)
        self.pid = None
        return int(self.line())

    def close(self) -> None:
        self.end(signal.SIGKILL)
        self.starter.communicate(timeout=SECONDS)

    def ask(
        self, method: str, target: str, body: Any = None, *, token: str = "hf_alice", follow: bool = True
    ) -> Answer:
        """One answer; where a repository has moved, that of its new place."""
        if self.connection is None:
            self.connection = http.client.HTTPConnection(HOST, self.port, timeout=SECONDS)
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        self.connection.request(method, target, content, {"Authorization": f"Bearer {token}"} if token else {})
        response = self.connection.getresponse()
        headers = {name.lower(): value for name, value in response.headers.items()}
        answer = Answer(response.status, headers, response.read())
        assert answer.status != 500, answer
        if answer.status == 307 and follow:
            return self.ask(method, urlsplit(headers["location"])._replace(scheme="", netloc="").geturl(), body)
        return answer

    def send(self, data: bytes) -> socket.socket:
        """A connection of its own on which that was sent."""
        connection = socket.create_connection((HOST, self.port), timeout=SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(data)
        return connection


class Client:
    """The real client in one process, which lives through all that happens to its server."""

    def __init__(self, url: str, home: Path) -> None:
        environment = {**os.environ, **client_environment(url, token="hf_alice", home=home)}
        self.log = (home.parent / "client.log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("driven_client.py"))],
            env={**environment, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    def call(self, name: str, /, **given: Any) -> tuple[int, Any]:
        """The status and what the call gave."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps([name, given]), file=self.process.stdin, flush=True)
        status, value = json.loads(self.process.stdout.readline())
        return status, value

    def close(self) -> None:
        self.process.communicate(timeout=SECONDS)
        self.log.close()


def api(key: Key) -> str:
    return f"/api/{key[0]}s/{key[1]}"


def files_url(key: Key) -> str:
    return f"/{'datasets/' if key[0] == 'dataset' else ''}{key[1]}"


def segment(text: str) -> str:
    return quote(text, safe="")


def ndjson(title: str, changes: Sequence[Change], parent: str | None = None) -> bytes:
    """The body of a commit."""
    header = {"summary": title, "description": "", **({"parentCommit": parent} if parent else {})}
    lines: list[dict[str, Any]] = [{"key": "header", "value": header}]
    for what, path, content in changes:
        if what == "add" and is_lfs(path, content):
            value = {"path": path, "algo": "sha256", "oid": sha256(content), "size": len(content)}
            lines.append({"key": "lfsFile", "value": value})
        elif what == "add":
            encoded = base64.b64encode(content).decode()
            lines.append({"key": "file", "value": {"path": path, "content": encoded, "encoding": "base64"}})
        else:
            lines.append({"key": {"delete": "deletedFile"}.get(what, "deletedFolder"), "value": {"path": path}})
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


class HubMachine(RuleBasedStateMachine):
    """Does the same to a Hub and to plain dicts, and compares."""

    def __init__(self, server: Server, client: Client, root: Path) -> None:
        super().__init__()
        self.server, self.client, self.root = server, client, root
        self.holding = Holding()
        self.numbers = iter(range(10**6))

    @initialize()
    def begin(self) -> None:
        self.up()
        self.create(key=IDS[0], private=False, by="raw")

    def up(self) -> None:
        self.server.start(self.root)
        assert self.client.call("reconnect")[0] == 200

    def teardown(self) -> None:
        try:
            if self.server.pid is not None:
                self.read_everything(again=True)
                assert self.server.end(signal.SIGTERM) == 0
                assert fsck(self.root) == []
        finally:
            self.server.end(signal.SIGKILL)
            shutil.rmtree(self.root, ignore_errors=True)

    # What is there

    @invariant()
    def nothing_else_is_there(self) -> None:
        if self.server.pid is not None:
            assert self.observed() == self.holding.shown()

    def observed(self) -> dict[str, Any]:
        """What the Hub says of itself, as `Holding.shown`."""
        repositories: dict[Key, Any] = {}
        for type in TYPES:
            for one in self.server.ask("GET", f"/api/{type}s?limit=1000").json:
                refs = self.server.ask("GET", f"{api((type, one['id']))}/refs?include_prs=1").json
                repositories[type, one["id"]] = {
                    "private": one["private"],
                    "gated": one["gated"],
                    "refs": {
                        ref["ref"]: ref["targetCommit"]
                        for ref in [*refs["branches"], *refs["tags"], *refs["pullRequests"]]
                    },
                }
        moved = {}
        for key in IDS:
            if key not in repositories:
                answer = self.server.ask("GET", api(key), follow=False)
                assert answer.status in (307, 404)
                if answer.status == 307:
                    moved[key] = unquote(urlsplit(answer.headers["location"]).path).split("/", 3)[3]
        return {"repositories": repositories, "moved": moved}

    def read_everything(self, *, again: bool = False) -> None:
        """The commits behind each ref, and every commit there ever was, with every file in it, that was not read yet.

        again: all of them.
        """
        assert self.observed() == self.holding.shown()
        for key, repository in self.holding.repositories.items():
            contents: set[bytes] = set()
            for oid, commit in repository.commits.items():
                if again or oid not in repository.read:
                    self.read_tree(key, oid, commit)
                    for path, content in commit.files.items():
                        if content not in contents:
                            self.read_file(key, oid, path, content, commit=oid)
                    contents |= {*commit.files.values()}
            repository.read |= {*repository.commits}
            for full, oid in repository.refs.items():
                self.read_tree(key, full, repository.commits[oid])
                found = self.history(key, full)
                assert found == [(one, repository.commits[one].title) for one in repository.history(oid)]

    def read_tree(self, key: Key, revision: str, commit: Commit) -> None:
        found = {}
        for entry in self.server.ask("GET", f"{api(key)}/tree/{segment(revision)}?recursive=true").json:
            lfs = entry.get("lfs", {}).get("oid")
            is_file = entry["type"] == "file"
            found[entry["path"]] = (entry["oid"], entry["size"], lfs) if is_file else "folder"
        assert found == tree(commit.files)

    def read_file(self, key: Key, revision: str, path: str, content: bytes, *, commit: str) -> None:
        answer = self.server.ask("GET", f"{files_url(key)}/resolve/{segment(revision)}/{quote(path)}")
        assert (answer.status, answer.content == content) == (200, True)
        assert answer.headers["x-repo-commit"] == commit

    def history(self, key: Key, revision: str) -> list[tuple[str, str]]:
        """Ids and titles, newest first."""
        answer = self.server.ask("GET", f"{api(key)}/commits/{segment(revision)}?limit=1000")
        return [(commit["id"], commit["title"]) for commit in answer.json]

    # Choosing

    def key(self, pick: int) -> Key:
        """A repository that is there; now and then an id that none has, or that one had before."""
        there = [*self.holding.repositories]
        return there[pick % len(there)] if there and pick % ODD else IDS[pick % len(IDS)]

    def revision(self, key: Key, pick: int, *, written: bool = False) -> str:
        """A branch, tag, pull request or commit, whole or short; now and then one that is not there.

        written: mostly one that can be committed to.
        """
        named: list[str] = []
        repository = self.holding.repositories.get(key) or self.holding.moved.get(key)
        if repository is not None:
            writable = [full.removeprefix("refs/heads/") for full in repository.refs if "/tags/" not in full]
            tags = [full.removeprefix("refs/tags/") for full in repository.refs if "/tags/" in full]
            commits = [*repository.commits]
            others = [*tags, *repository.refs, *commits, *(oid[:10] for oid in commits)]
            named = [*writable * 4, *commits[:1]] if written else [*writable, *others]
        return named[pick % len(named)] if named and pick % ODD else "absent"

    def changes(self, files: dict[str, bytes], drawn: Sequence[tuple[str, int]]) -> list[Change]:
        """Changes of these files, each path at most once."""
        made: dict[str, Change] = {}
        for what, pick in drawn:
            there = [*files] if what == "delete" else sorted(folders(files))
            if what != "add" and there and pick % ODD:
                path = there[pick % len(there)]
            else:
                path = PATHS[pick % len(PATHS)]
                what = what if pick % ODD == 0 else "add"
            content = CONTENTS[pick // len(PATHS) % len(CONTENTS)] if what == "add" else b""
            made.setdefault(path, (what, path, content))
        return list(made.values())

    def agreed(self, model: Callable[[], Any], run: Callable[[], tuple[int, Any]]) -> Any:
        """What the Hub gives where the model agrees; None where both refuse, with the same status."""
        expected = 200
        try:
            model()
        except No as no:
            (expected,) = no.args
        status, value = run()
        assert status == expected, (status, value)
        return value if expected == 200 else None

    def raw(self, method: str, target: str, body: Any = None) -> tuple[int, Any]:
        answer = self.server.ask(method, target, body)
        return answer.status, answer.json

    def learn(self, key: Key) -> None:
        """The first commit of a new repository, whose id depends on the time."""
        ((oid, title),) = self.history(key, "main")
        repository = self.holding.repositories[key]
        repository.refs["refs/heads/main"] = oid
        repository.commits[oid] = Commit(parent=None, title=title, files={".gitattributes": ATTRIBUTES})

    # Changes

    @rule(key=st.sampled_from(IDS), private=st.booleans(), by=BY)
    def create(self, key: Key, private: bool, by: str) -> None:
        type, id = key
        body = {"name": id.partition("/")[2], "type": type, "private": private}
        done = self.agreed(
            lambda: self.holding.create(key, private=private),
            lambda: (
                self.client.call("create", type=type, id=id, private=private)
                if by == "client"
                else self.raw("POST", "/api/repos/create", body)
            ),
        )
        if done is not None:
            self.learn(key)

    @rule(place=PICK, by=BY)
    def delete(self, place: int, by: str) -> None:
        key = self.key(place)
        type, id = key
        body = {"name": id.partition("/")[2], "type": type}
        self.agreed(
            lambda: self.holding.delete(key),
            lambda: (
                self.client.call("delete", type=type, id=id)
                if by == "client"
                else self.raw("DELETE", "/api/repos/delete", body)
            ),
        )

    @rule(place=PICK, to=st.sampled_from(NAMES), by=BY)
    def move(self, place: int, to: str, by: str) -> None:
        key = self.key(place)
        type, id = key
        body = {"fromRepo": id, "toRepo": to, "type": type}
        self.agreed(
            lambda: self.holding.move(key, to),
            lambda: (
                self.client.call("move", type=type, id=id, to=to)
                if by == "client"
                else self.raw("POST", "/api/repos/move", body)
            ),
        )

    @rule(
        place=PICK,
        values=st.fixed_dictionaries(
            {}, optional={"private": st.booleans(), "gated": st.sampled_from(["auto", "manual", False])}
        ).filter(bool),
        by=BY,
    )
    def set(self, place: int, values: dict[str, Any], by: str) -> None:
        key = self.key(place)

        def model() -> None:
            repository = self.holding.find(key)
            repository.private = values.get("private", repository.private)
            repository.gated = values.get("gated", repository.gated)

        self.agreed(
            model,
            lambda: (
                self.client.call("settings", type=key[0], id=key[1], **values)
                if by == "client"
                else self.raw("PUT", f"{api(key)}/settings", values)
            ),
        )

    @rule(place=PICK, name=st.sampled_from(BRANCHES), at=PICK, by=BY)
    def branch(self, place: int, name: str, at: int, by: str) -> None:
        key = self.key(place)
        revision = self.revision(key, at)
        self.agreed(
            lambda: self.holding.create_ref(key, f"refs/heads/{name}", at=revision),
            lambda: (
                self.client.call("branch", type=key[0], id=key[1], name=name, at=revision)
                if by == "client"
                else self.raw("POST", f"{api(key)}/branch/{segment(name)}", {"startingPoint": revision})
            ),
        )

    @rule(place=PICK, name=st.sampled_from(TAGS), at=PICK, by=BY)
    def tag(self, place: int, name: str, at: int, by: str) -> None:
        key = self.key(place)
        revision = self.revision(key, at)
        self.agreed(
            lambda: self.holding.create_ref(key, f"refs/tags/{name}", at=revision),
            lambda: (
                self.client.call("tag", type=key[0], id=key[1], name=name, at=revision)
                if by == "client"
                else self.raw("POST", f"{api(key)}/tag/{segment(revision)}", {"tag": name})
            ),
        )

    @rule(place=PICK, kind=st.sampled_from(["branch", "tag"]), pick=PICK, by=BY)
    def delete_ref(self, place: int, kind: str, pick: int, by: str) -> None:
        key = self.key(place)
        folder, named = ("refs/heads/", BRANCHES) if kind == "branch" else ("refs/tags/", TAGS)
        repository = self.holding.repositories.get(key)
        there = [full.removeprefix(folder) for full in repository.refs if full.startswith(folder)] if repository else []
        named = there if there and pick % ODD else named
        name = named[pick % len(named)]
        self.agreed(
            lambda: self.holding.delete_ref(key, folder + name),
            lambda: (
                self.client.call(f"delete_{kind}", type=key[0], id=key[1], name=name)
                if by == "client"
                else self.raw("DELETE", f"{api(key)}/{kind}/{segment(name)}")
            ),
        )

    @rule(
        place=PICK,
        at=PICK,
        drawn=CHANGES,
        parent=st.sampled_from([None, None, None, "last", "short", "other"]),
        proposed=st.sampled_from([False, False, True]),
        by=BY,
    )
    def commit(self, place: int, at: int, drawn: Any, parent: str | None, proposed: bool, by: str) -> None:
        key = self.key(place)
        revision = self.revision(key, at, written=not proposed)
        expected: str | None = None
        files: dict[str, bytes] = {}
        try:
            repository = self.holding.find(key)
            head = repository.resolve(revision)
            files = repository.commits[head].files
            if parent is not None:
                expected = [*repository.commits][at % len(repository.commits)] if parent == "other" else head
                expected = expected[:9] if parent == "short" else expected
        except No:
            pass
        changes = self.changes(files, drawn)
        if by == "client":  # It leaves out what would change nothing, which is its own affair.
            changes = [change for change in changes if files.get(change[1]) != change[2] or change[0] != "add"]
        if not changes:
            return
        title = f"commit {next(self.numbers)}"
        target: list[str] = []

        def model() -> None:
            repository = self.holding.find(key)
            head = repository.resolve(revision)
            if by == "client":  # It uploads first, in whatever it commits to.
                repository.contents |= {sha256(content) for _, path, content in changes if is_lfs(path, content)}
            full = repository.next_pull_request() if proposed else repository.written(revision)
            head = head if proposed else repository.refs[full]
            if expected is not None and not head.startswith(expected):
                raise No(412)
            changed(repository.commits[head].files, changes)
            target.extend([full, head])

        def raw() -> tuple[int, Any]:
            self.upload(key, [content for _, path, content in changes if is_lfs(path, content)])
            query = "?create_pr=1" if proposed else ""
            body = ndjson(title, changes, expected)
            status, value = self.raw("POST", f"{api(key)}/commit/{segment(revision)}{query}", body)
            number = int(value["pullRequestUrl"].rpartition("/")[2]) if "pullRequestUrl" in value else None
            return status, [value.get("commitOid"), number]

        operations = [(what, path, base64.b64encode(content).decode()) for what, path, content in changes]
        done = self.agreed(
            model,
            lambda: (
                self.client.call(
                    "commit",
                    type=key[0],
                    id=key[1],
                    revision=revision,
                    operations=operations,
                    title=title,
                    parent=expected,
                    create_pr=proposed,
                )
                if by == "client"
                else raw()
            ),
        )
        if done is not None:
            repository, (full, head) = self.holding.find(key), target
            oid, number = done
            assert (f"refs/pr/{number}" == full) == proposed
            repository.refs[full] = head
            repository.add(full, oid, title, changes)
            self.read_tree(key, oid, repository.commits[oid])

    def upload(self, key: Key, contents: Sequence[bytes]) -> None:
        """Sends LFS contents, but for those that the repository has: no other's count for it."""
        for content, action in self.addresses(key, contents):
            assert self.server.ask("PUT", urlsplit(action["upload"]["href"]).path, content, token="").status == 200
            verify = {"oid": sha256(content), "size": len(content)}
            assert self.server.ask("POST", urlsplit(action["verify"]["href"]).path, verify).status == 200
            self.holding.find(key).contents.add(sha256(content))

    def addresses(self, key: Key, contents: Sequence[bytes]) -> list[tuple[bytes, Any]]:
        """Where to send those that are not there yet."""
        repository = self.holding.repositories.get(key) or self.holding.moved.get(key)
        if repository is None or not contents:
            return []
        objects = [{"oid": sha256(content), "size": len(content)} for content in contents]
        body = {"operation": "upload", "transfers": ["basic"], "objects": objects}
        answer = self.server.ask("POST", f"{files_url(key)}.git/info/lfs/objects/batch", body)
        assert answer.status == 200, answer
        found = [each.get("actions") for each in answer.json["objects"]]
        assert [action is None for action in found] == [sha256(one) in repository.contents for one in contents]
        return [(content, action) for content, action in zip(contents, found, strict=True) if action is not None]

    @rule(place=PICK, content=st.sampled_from([content for content in CONTENTS if is_lfs("", content)]))
    def upload_without_a_commit(self, place: int, content: bytes) -> None:
        self.upload(self.key(place), [content])

    # Reading

    @rule(place=PICK, at=PICK, file=PICK, by=BY)
    def read(self, place: int, at: int, file: int, by: str) -> None:
        key = self.key(place)
        revision = self.revision(key, at)
        found: list[Any] = []

        def model() -> None:
            oid = self.holding.find(key).resolve(revision)
            files = self.holding.find(key).commits[oid].files
            path = [*files, "absent.txt"][file % (len(files) + 1)]
            found.extend([path, oid])
            if path not in files:
                raise No(404)

        def run() -> tuple[int, Any]:
            path = found[0] if found else "absent.txt"
            if by == "client":
                return self.client.call("download", type=key[0], id=key[1], revision=revision, path=path)
            answer = self.server.ask("GET", f"{files_url(key)}/resolve/{segment(revision)}/{quote(path)}")
            assert answer.headers.get("x-repo-commit") == (found[1] if found else None)
            return answer.status, sha256(answer.content)

        content = self.agreed(model, run)
        if content is not None:
            assert content == sha256(self.holding.find(key).commits[found[1]].files[found[0]])

    @rule(place=PICK, at=PICK)
    def snapshot(self, place: int, at: int) -> None:
        key = self.key(place)
        revision = self.revision(key, at)
        oids: list[str] = []
        found = self.agreed(
            lambda: oids.append(self.holding.find(key).resolve(revision)),
            lambda: self.client.call("snapshot", type=key[0], id=key[1], revision=revision),
        )
        if found is not None:
            files = self.holding.find(key).commits[oids[0]].files
            assert found == {path: sha256(content) for path, content in files.items()}

    @rule(place=PICK, bob=st.booleans())
    def look_as_another(self, place: int, bob: bool) -> None:
        """What is private is not there for others; what is gated is there, and its files are when access was given."""
        key = self.key(place)
        if bob and place % 2:
            self.ask_for_access(key)
        token = "hf_bob" if bob else ""
        try:
            repository = self.holding.find(key)
            seen = not repository.private
        except No:
            seen = False
        expected = 200 if seen else 404 if bob else 401
        followed = self.holding.key_of(repository) if seen else key
        assert self.server.ask("GET", api(followed), token=token).status == expected
        if not seen:
            return
        files = repository.commits[repository.refs["refs/heads/main"]].files
        open_to = not repository.gated or (bob and repository.access.get("bob") == "accepted")
        for path in [*files][:1]:
            answer = self.server.ask("GET", f"{files_url(followed)}/resolve/main/{quote(path)}", token=token)
            assert answer.status == (200 if open_to else 403 if bob else 401)

    def ask_for_access(self, key: Key) -> None:
        def model() -> None:
            repository = self.holding.repositories.get(key)
            if repository is None or repository.private:
                raise No(404)
            if not repository.gated:
                raise No(400)
            if repository.access.get("bob") != "accepted":
                repository.access["bob"] = "accepted" if repository.gated == "auto" else "pending"

        def run() -> tuple[int, Any]:
            answer = self.server.ask("POST", f"{files_url(key)}/ask-access", {}, token="hf_bob", follow=False)
            return 404 if answer.status == 307 else answer.status, answer.json if answer.status != 307 else None

        answer = self.agreed(model, run)
        if answer is not None:
            assert answer["status"] == self.holding.repositories[key].access["bob"]

    # Many at once, kills and restarts

    @rule(place=PICK, at=PICK)
    def commit_at_once(self, place: int, at: int) -> None:
        """Commits on one branch by several connections: each of them is made, in whatever order."""
        key = self.key(place)
        self.several(key, at, read=BURST, kill_after=None)

    @rule(place=PICK, at=PICK, read=st.integers(0, BURST - 1), milliseconds=st.integers(0, 25))
    def kill_while_committing(self, place: int, at: int, read: int, milliseconds: int) -> None:
        """Those that were answered are made; of the others each is made whole or not at all."""
        key = self.key(place)
        self.several(key, at, read=read, kill_after=milliseconds / 1000)

    def several(self, key: Key, at: int, *, read: int, kill_after: float | None) -> None:
        """Sends commits at once and reads the answers to the first of them."""
        if key not in self.holding.repositories:
            return
        repository = self.holding.repositories[key]
        written = [full for full in repository.refs if not full.startswith("refs/tags/")]
        full = written[at % len(written)]
        pending: dict[str, list[Change]] = {}
        connections: list[tuple[str, socket.socket]] = []
        for _ in range(BURST):
            number = next(self.numbers)
            title, contents = f"burst {number}", [b"%d %d" % (number, file) for file in range(BURST_FILES)]
            pending[title] = [("add", f"{number}/{file % 3}/{file}", each) for file, each in enumerate(contents)]
            data = self.as_sent("POST", f"{api(key)}/commit/{segment(full)}", ndjson(title, pending[title]))
            connections.append((title, self.server.send(data)))
        answered = {title: self.answer(connection).json["commitOid"] for title, connection in connections[:read]}
        if kill_after is not None:
            # As soon as somebody can see one of them, or after a while.
            before, deadline = repository.refs[full], time.monotonic() + kill_after
            while time.monotonic() < deadline and self.head(key, full) == before:
                pass
            self.kill()
        for _, connection in connections:
            connection.close()
        self.absorb(key, full, pending, answered)
        if kill_after is not None:
            self.read_everything()

    @rule(place=PICK, part=st.integers(0, 99))
    def kill_amid_a_commit(self, place: int, part: int) -> None:
        """A commit of which a part arrived is not made."""
        key = self.key(place)
        content = b"text\n" * 20_000
        body = ndjson("never", [("add", f"{number}.txt", content) for number in range(3)])
        data = self.as_sent("POST", f"{api(key)}/commit/main", body)
        with self.server.send(data[: len(data) * part // 100]):
            self.kill()
        self.read_everything()

    @rule(place=PICK, part=st.integers(0, 100), milliseconds=st.integers(0, 5))
    def kill_amid_an_upload(self, place: int, part: int, milliseconds: int) -> None:
        """An LFS file of which a part arrived is not there; one that arrived whole is there, or is not."""
        key = self.key(place)
        content = b"%d" % next(self.numbers) + bytes(1_000_000)
        repository = self.holding.repositories.get(key)
        if repository is not None:
            ((_, action),) = self.addresses(key, [content])
            data = self.as_sent("PUT", urlsplit(action["upload"]["href"]).path, content)
            with self.server.send(data[: len(data) * part // 100]):
                time.sleep(milliseconds / 1000)
                self.kill()
            body = {"objects": [{"oid": sha256(content), "size": len(content)}]}
            answer = self.server.ask("POST", f"{files_url(key)}.git/info/lfs/objects/batch", body).json
            there = "actions" not in answer["objects"][0]
            assert part == 100 or not there
            if there:
                repository.contents.add(sha256(content))
            if there or part % 2:
                self.commit_content(key, content)

    def commit_content(self, key: Key, content: bytes) -> None:
        """Uploads it unless it is there, and commits it."""
        self.upload(key, [content])
        title, changes = f"commit {next(self.numbers)}", [("add", "large.bin", content)]
        answer = self.server.ask("POST", f"{api(key)}/commit/main", ndjson(title, changes))
        assert answer.status == 200, answer
        self.holding.repositories[key].add("refs/heads/main", answer.json["commitOid"], title, changes)

    @rule(
        key=st.sampled_from(IDS),
        to=st.sampled_from(NAMES),
        what=st.sampled_from(["create", "delete", "move", "branch", "tag", "delete_branch", "delete_tag"]),
        milliseconds=st.integers(0, 8),
    )
    def kill_while_changing(self, key: Key, to: str, what: str, milliseconds: int) -> None:
        """A change that was not answered is there after a kill, or is not; nothing else is different."""
        url, name = api(key), {"type": key[0], "name": key[1].partition("/")[2]}
        after = copy.deepcopy(self.holding)
        moved = {"fromRepo": key[1], "toRepo": to, "type": key[0]}
        changes: dict[str, tuple[str, str, Any, Callable[[], Any]]] = {
            "create": ("POST", "/api/repos/create", name, lambda: after.create(key, private=False)),
            "delete": ("DELETE", "/api/repos/delete", name, lambda: after.delete(key)),
            "move": ("POST", "/api/repos/move", moved, lambda: after.move(key, to)),
            "branch": ("POST", f"{url}/branch/dev", {}, lambda: after.create_ref(key, "refs/heads/dev", at="main")),
            "tag": ("POST", f"{url}/tag/main", {"tag": "v1"}, lambda: after.create_ref(key, "refs/tags/v1", at="main")),
            "delete_branch": ("DELETE", f"{url}/branch/dev", None, lambda: after.delete_ref(key, "refs/heads/dev")),
            "delete_tag": ("DELETE", f"{url}/tag/v1", None, lambda: after.delete_ref(key, "refs/tags/v1")),
        }
        method, target, body, change = changes[what]
        try:
            if what not in ("create", "delete", "move") and key in after.moved:
                raise No(307)
            change()
        except No:
            after = self.holding
        with self.server.send(self.as_sent(method, target, b"" if body is None else json.dumps(body).encode())):
            time.sleep(milliseconds / 1000)
            self.kill()
        if self.observed() != self.holding.shown():
            self.holding = after
            if what == "create":
                self.learn(key)
        self.read_everything()

    @rule(gently=st.booleans())
    def restart(self, gently: bool) -> None:
        if gently:
            assert self.server.end(signal.SIGTERM) == 0
            self.up()
        else:
            self.kill()
        self.read_everything()

    def kill(self) -> None:
        """Ends the server without a warning, and starts it again."""
        self.server.end(signal.SIGKILL)
        self.up()

    @staticmethod
    def as_sent(method: str, target: str, body: bytes) -> bytes:
        return request(method, target, body, Authorization="Bearer hf_alice", Connection="close")

    @staticmethod
    def answer(connection: socket.socket) -> Answer:
        data = b""
        while part := connection.recv(65536):
            data += part
        (found,) = answers(data)
        assert found.status == 200 and found.whole, found
        return Answer(found.status, dict(found.headers), found.content)

    def head(self, key: Key, full: str) -> str:
        return str(self.server.ask("GET", f"{api(key)}/revision/{segment(full)}").json["sha"])

    def absorb(self, key: Key, full: str, pending: dict[str, list[Change]], answered: dict[str, str]) -> None:
        """Takes the commits into the model that are new on a ref."""
        repository: Repository = self.holding.repositories[key]
        line = self.history(key, full)
        before = [oid for oid, _ in line].index(repository.refs[full])
        made: dict[str, str] = {}
        for oid, title in reversed(line[:before]):
            made[title] = oid
            repository.add(full, oid, title, pending.pop(title))
            self.read_tree(key, oid, repository.commits[oid])
        assert answered.items() <= made.items()


@pytest.fixture
def server() -> Iterator[Server]:
    with reserved_port() as keeper:
        served = Server(keeper.getsockname()[1])
        yield served
        served.close()


@pytest.fixture
def real_client(server: Server, tmp_path: Path) -> Iterator[Client]:
    client = Client(server.url, tmp_path / "home")
    yield client
    client.close()


def test_a_hub_holds_what_it_was_given_and_nothing_else(server: Server, real_client: Client, tmp_path: Path) -> None:
    roots = iter(range(10**6))
    run_state_machine_as_test(
        lambda: HubMachine(server, real_client, tmp_path / f"root {next(roots)}"),
        settings=settings(
            max_examples=12,
            stateful_step_count=40,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
