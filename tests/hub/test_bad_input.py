# SPDX-License-Identifier: Apache-2.0
"""What no client of good will sends: each gets one clear answer in JSON, and nothing is left half written."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

from harness.hub import HubServer, Sizes, User
from harness.hub.fsck import fsck

ALICE = {"Authorization": "Bearer hf_alice"}

Ask = Callable[..., tuple[int, dict[str, str], Any]]


@pytest.fixture
def ask(hub: HubServer) -> Iterator[Ask]:
    """Sends one request; gives status, headers by lower-case name, and the JSON of the answer or its bytes."""
    connections = []

    def send(method: str, target: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], Any]:
        connection = http.client.HTTPConnection("127.0.0.1", hub.port, timeout=120)
        connections.append(connection)
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method, target.removeprefix(hub.url), body=content, headers=ALICE | headers)
        response = connection.getresponse()
        answered = response.read()
        told = {name.lower(): value for name, value in response.getheaders()}
        is_json = told.get("content-type", "").startswith("application/") and "octet" not in told["content-type"]
        return response.status, told, json.loads(answered) if is_json and answered else answered

    yield send
    for connection in connections:
        connection.close()


@pytest.fixture
def model(ask: Ask) -> str:
    """The address of a repository with one file, below /api/models/."""
    assert ask("POST", "/api/repos/create", {"name": "model"})[0] == 200
    assert commit(ask, file("there.txt", b"there"))[0] == 200
    return "/api/models/alice/model"


def file(path: str, content: bytes) -> dict[str, Any]:
    """A line of a commit that adds a file."""
    value = {"path": path, "content": base64.b64encode(content).decode(), "encoding": "base64"}
    return {"key": "file", "value": value}


def lines(*content: Any) -> bytes:
    return b"\n".join(one if isinstance(one, bytes) else json.dumps(one).encode() for one in content)


def commit(ask: Ask, *operations: Any, revision: str = "main", **header: Any) -> tuple[int, dict[str, str], Any]:
    """Sends a commit with a header line."""
    first = {"key": "header", "value": {"summary": "change", **header}}
    return ask("POST", f"/api/models/alice/model/commit/{revision}", lines(first, *operations))


def head(ask: Ask) -> str:
    """The commit that main is at."""
    found: str = ask("GET", "/api/models/alice/model")[2]["sha"]
    return found


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "first line"),
        (b"\n\n", "first line"),
        (b"not json\n", "line 1 of the commit is not JSON"),
        (b"[1]\n", "line 1 of the commit must be a JSON object"),
        (b'"header"\n', "line 1 of the commit must be a JSON object"),
        (b"\xff\xfe\n", "line 1 of the commit is not JSON"),
        (b"[" * 100_000, "line 1 of the commit is not JSON"),
        (lines({"key": "header"}), "line 1 of the commit needs"),
        (lines({"key": 3, "value": {}}), "line 1 of the commit needs"),
        (lines(file("a", b"a")), "first line"),
        (lines({"key": "header", "value": {}}), "'summary'"),
        (lines({"key": "header", "value": {"summary": 7}}), "'summary' must be a string"),
        (lines({"key": "header", "value": {"summary": "s"}}, b"{"), "line 2 of the commit is not JSON"),
        (lines({"key": "header", "value": {"summary": "s"}}, {"key": "unknown", "value": {"path": "a"}}), "'unknown'"),
        (lines({"key": "header", "value": {"summary": "s"}}, {"key": "file", "value": {"content": ""}}), "'path'"),
        (lines({"key": "header", "value": {"summary": "s"}}, {"key": "file", "value": {"path": "a"}}), "'content'"),
        (
            lines(
                {"key": "header", "value": {"summary": "s"}},
                {"key": "file", "value": {"path": "a", "content": "!!", "encoding": "base64"}},
            ),
            "not base64",
        ),
        (
            lines(
                {"key": "header", "value": {"summary": "s"}},
                {"key": "file", "value": {"path": "a", "content": "x", "encoding": "rot13"}},
            ),
            "'rot13'",
        ),
        (
            lines(
                {"key": "header", "value": {"summary": "s"}},
                {"key": "file", "value": {"path": "a", "content": "\ud800"}},
            ),
            "must be text",
        ),
        (
            lines(
                {"key": "header", "value": {"summary": "s"}},
                {"key": "lfsFile", "value": {"path": "a", "algo": "md5", "oid": "x"}},
            ),
            "sha256",
        ),
    ],
)
def test_a_malformed_commit_is_refused_and_changes_nothing(body: bytes, said: str, ask: Ask, model: str) -> None:
    before = head(ask)
    status, headers, answer = ask("POST", f"{model}/commit/main", body)
    assert (status, said in answer["error"], headers["x-request-id"]) == (400, True, answer["requestId"])
    assert head(ask) == before


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "/etc/passwd",
        "..",
        "../x",
        "a/../../x",
        "a/./b",
        "a//b",
        ".git/config",
        "a/.git/x",
        "a\0b",
        "a\nb",
        "x" * 5000,
        "/".join("x" * 200 for _ in range(30)),
        "a/",
        "\ud800",
    ],
)
def test_a_path_that_could_lead_elsewhere_is_refused(path: str, ask: Ask, model: str, hub: HubServer) -> None:
    before = head(ask)
    sha256 = hashlib.sha256(b"there").hexdigest()
    for operation in (file(path, b"x"), {"key": "lfsFile", "value": {"path": path, "algo": "sha256", "oid": sha256}}):
        assert commit(ask, operation)[0] == 400
    assert ask("POST", f"{model}/preupload/main", {"files": [{"path": path, "size": 1, "sample": ""}]})[0] == 400
    assert head(ask) == before
    assert not [found for found in hub.root.parent.rglob("*") if found.name in ("x", "passwd")]


@pytest.mark.parametrize(
    "target",
    [
        "/alice/model/resolve/main/..%2f..%2f..%2fsecret",
        "/alice/model/resolve/main/%2e%2e/%2e%2e/secret",
        "/alice/model/resolve/main/%00",
        "/alice/model/resolve/..%2f..%2fmain/there.txt",
        "/alice/model/resolve/main//secret",
        "/alice/model/resolve/main/%2fetc%2fpasswd",
        "/alice/..%2f..%2fsecret/resolve/main/there.txt",
        "/alice/model/resolve/main/there.txt/more",
        "/alice/model/resolve/main/there.txt%0d%0aX-Evil:1",
    ],
)
def test_no_address_leads_out_of_a_repository(target: str, ask: Ask, model: str, hub: HubServer) -> None:
    status, headers, answer = ask("GET", target)
    assert status in (400, 404)
    assert "x-evil" not in headers
    assert isinstance(answer, dict) and answer["error"]


UNPLEASANT = [
    "with space.txt",
    "ünïcödé/日本語.txt",
    "a#b?c%d&e+f.txt",
    "quote'\"`.txt",
    "-leading",
    ".hidden",
    "a;b,c=d.txt",
    "emoji 🙂",
    "%2e%2e",
    "%00",
    "CON",
    "trailing.",
    "tab-is-not-here",
    "x" * 200,
]


def test_unpleasant_names_are_kept_to_the_letter(ask: Ask, model: str) -> None:
    assert commit(ask, *[file(path, path.encode()) for path in UNPLEASANT])[0] == 200
    listed = {entry["path"] for entry in ask("GET", f"{model}/tree/main?recursive=true")[2]}
    assert set(UNPLEASANT) <= listed
    for path in UNPLEASANT:
        assert ask("GET", f"/alice/model/resolve/main/{quote(path, safe='/')}")[2] == path.encode()


def test_one_path_twice_a_file_as_a_folder_and_a_folder_as_a_file_are_refused(ask: Ask, model: str) -> None:
    commit(ask, file("folder/inner.txt", b"x"))
    before = head(ask)
    for operations in (
        [file("a", b"1"), file("a", b"2")],
        [file("there.txt/below", b"1")],
        [file("folder", b"1")],
        [file("new", b"1"), file("new/below", b"1")],
    ):
        status, _, answer = commit(ask, *operations)
        assert (status, bool(answer["error"])) == (400, True)
    assert head(ask) == before
    swapped = [{"key": "deletedFile", "value": {"path": "there.txt"}}, file("there.txt/below", b"1")]
    assert commit(ask, *swapped)[0] == 200


def test_refs_that_cannot_be_are_refused(ask: Ask, model: str) -> None:
    before = head(ask)
    for name in (
        "..",
        "a..b",
        "a b",
        "a~b",
        "a^b",
        "a:b",
        ".a",
        "a.lock",
        "a//b",
        "@",
        "HEAD~1",
        "0" * 40,
        "refs/heads/x" * 50,
    ):
        assert ask("POST", f"{model}/branch/{quote(name, safe='')}", {})[0] == 400, name
        assert ask("POST", f"{model}/tag/main", {"tag": name})[0] == 400, name
    for revision in ("nope", "0" * 40, before[:6], "refs%2Fheads%2Fnope", "%20", "main%00"):
        for target in (
            f"{model}/revision/{revision}",
            f"{model}/tree/{revision}",
            f"/alice/model/resolve/{revision}/there.txt",
        ):
            status, headers, _ = ask("GET", target)
            assert (status, headers.get("x-error-code")) in ((404, "RevisionNotFound"), (400, None)), target
    assert commit(ask, file("x", b"x"), revision="nope")[0] == 404
    assert commit(ask, file("x", b"x"), revision=before)[0] in (400, 404)  # a commit is no branch
    assert ask("POST", f"{model}/branch/other", {"startingPoint": "nope"})[0] == 404


def test_a_stale_parent_loses_and_says_so(ask: Ask, model: str) -> None:
    before = head(ask)
    assert commit(ask, file("a", b"1"), parentCommit=before)[0] == 200
    status, _, answer = commit(ask, file("b", b"1"), parentCommit=before)
    assert status == 412 and before[:7] in answer["error"]
    assert ask("GET", f"{model}/tree/main?recursive=true")[2][-1]["path"] == "there.txt"


def upload_address(ask: Ask, content: bytes, *, size: int | None = None, **more: Any) -> dict[str, Any]:
    """What the LFS batch answers for one object."""
    oid = hashlib.sha256(content).hexdigest()
    body = {
        "operation": "upload",
        "transfers": ["basic"],
        "objects": [{"oid": oid, "size": len(content) if size is None else size}],
    }
    answer: dict[str, Any] = ask("POST", "/alice/model.git/info/lfs/objects/batch", body | more)[2]["objects"][0]
    return answer


def test_an_lfs_object_of_another_size_or_content_is_refused(ask: Ask, model: str) -> None:
    content = b"0" * 1000
    href = upload_address(ask, content)["actions"]["upload"]["href"]
    for sent in (b"1" * 1000, content[:-1], content + b"0", b""):
        assert ask("PUT", href, sent)[0] in (400, 413)
    oid = hashlib.sha256(content).hexdigest()
    line = {"key": "lfsFile", "value": {"path": "w.bin", "algo": "sha256", "oid": oid, "size": 1000}}
    status, _, answer = commit(ask, line)
    assert status == 400 and oid[:7] in answer["error"]
    assert ask("PUT", href, content)[0] == 200
    line["value"]["size"] = 999
    assert commit(ask, line)[0] == 400
    line["value"]["size"] = 1000
    assert commit(ask, line)[0] == 200


def test_an_upload_address_cannot_be_made_up(ask: Ask, model: str, hub: HubServer) -> None:
    content = b"0" * 1000
    href = upload_address(ask, content)["actions"]["upload"]["href"]
    parts = urlsplit(href).path.split("/")
    for place, value in ((2, "verify"), (3, "999"), (4, "0" * 64), (5, "10000"), (6, "0" * 64), (6, "ünknown")):
        forged = [*parts[:place], quote(value), *parts[place + 1 :]]
        assert ask("PUT", "/".join(forged), content)[0] in (403, 405)
    assert ask("PUT", "/".join(parts[:-1]), content)[0] == 404
    assert ask("GET", href)[0] == 405
    assert hashlib.sha256(content).hexdigest() not in hub.store.blobs


@pytest.mark.parametrize(
    "change",
    [
        {"objects": None},
        {"objects": "many"},
        {"objects": [3]},
        {"objects": [{"oid": "x"}]},
        {"operation": "download"},
        {"transfers": ["xet"]},
        {"objects": [{"oid": "a" * 64, "size": "1"}]},
        {"objects": [{"oid": "a" * 64, "size": 1}] * 1001},
    ],
)
def test_a_malformed_batch_is_refused(change: dict[str, Any], ask: Ask, model: str) -> None:
    body = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": "a" * 64, "size": 1}]} | change
    assert ask("POST", "/alice/model.git/info/lfs/objects/batch", body)[0] == 400


@pytest.mark.parametrize(
    ("oid", "size"), [("a" * 63, 1), ("A" * 64, 1), ("../x", 1), ("a" * 64, -1), ("a" * 64, 1 << 50)]
)
def test_an_object_that_cannot_be_gets_an_error_of_its_own(oid: str, size: int, ask: Ask, model: str) -> None:
    body = {"operation": "upload", "objects": [{"oid": oid, "size": size}, {"oid": "b" * 64, "size": 1}]}
    status, _, answer = ask("POST", "/alice/model.git/info/lfs/objects/batch", body)
    assert (status, answer["objects"][0]["error"]["code"]) == (200, 422)
    assert "actions" in answer["objects"][1]


def test_parts_that_were_not_sent_do_not_complete_an_upload(tmp_path: Path) -> None:
    with HubServer(tmp_path / "parts", sizes=Sizes(multipart=10, part=10)) as hub:
        repository = hub.store.create_repository("model", "alice", "model", private=False, author="alice")
        connection = http.client.HTTPConnection("127.0.0.1", hub.port, timeout=20)
        content = b"0123456789abcdef"
        oid = hashlib.sha256(content).hexdigest()

        def send(method: str, target: str, body: bytes) -> tuple[int, str, bytes]:
            connection.request(method, target.removeprefix(hub.url), body=body, headers=ALICE)
            response = connection.getresponse()
            return response.status, response.headers.get("ETag", ""), response.read()

        batch = {"operation": "upload", "transfers": ["multipart"], "objects": [{"oid": oid, "size": len(content)}]}
        answer = json.loads(send("POST", "/alice/model.git/info/lfs/objects/batch", json.dumps(batch).encode())[2])
        upload = answer["objects"][0]["actions"]["upload"]
        tags = [
            send("PUT", upload["header"]["1"], content[:10])[1],
            send("PUT", upload["header"]["2"], content[10:])[1],
        ]
        assert send("PUT", upload["header"]["1"], b"x" * 11)[0] == 413

        def complete(*parts: tuple[int, str]) -> int:
            body = {"oid": oid, "parts": [{"partNumber": number, "etag": tag} for number, tag in parts]}
            return send("POST", upload["href"], json.dumps(body).encode())[0]

        assert complete((1, tags[0])) == 400
        assert complete((2, tags[1]), (1, tags[0])) == 400
        assert complete((1, tags[0]), (2, "0" * 64)) == 400
        assert complete((1, tags[0]), (2, "../../secret")) == 400
        assert not hub.store.has_content(repository, oid)
        assert complete((1, tags[0]), (2, tags[1])) == 200
        assert hub.store.has_content(repository, oid)
        connection.close()


@pytest.mark.parametrize(
    ("method", "target", "body", "expected"),
    [
        ("POST", "/api/repos/create", {"name": "a/b"}, 400),
        ("POST", "/api/repos/create", {"name": ".."}, 400),
        ("POST", "/api/repos/create", {"name": "x" * 97}, 400),
        ("POST", "/api/repos/create", {"name": ""}, 400),
        ("POST", "/api/repos/create", {}, 400),
        ("POST", "/api/repos/create", {"name": 3}, 400),
        ("POST", "/api/repos/create", {"name": "a", "type": "house"}, 400),
        ("POST", "/api/repos/create", b"{", 400),
        ("POST", "/api/repos/create", {"name": "a", "visibility": "secret"}, 400),
        ("POST", "/api/repos/create", {"name": "a", "organization": "strangers"}, 403),
        ("POST", "/api/repos/create", b"{" + b" " * (5 << 20) + b"}", 413),
        ("GET", "/api/repos/create", None, 405),
        ("PUT", "/api/models/alice/model/settings", {}, 400),
        ("PUT", "/api/models/alice/model/settings", {"gated": "maybe"}, 400),
        ("POST", "/api/repos/move", {"fromRepo": "alice/model", "toRepo": "nowhere"}, 400),
        ("POST", "/api/repos/move", {"fromRepo": "alice/model", "toRepo": "bob/model"}, 403),
        ("POST", "/api/repos/move", {"fromRepo": "alice/model", "toRepo": "alice/.."}, 400),
        ("GET", "/api/models/alice/model/tree/main?limit=0", None, 400),
        ("GET", "/api/models/alice/model/tree/main?limit=x", None, 400),
        ("GET", "/api/models?limit=-1", None, 400),
        ("GET", "/api/models/alice/model/commits/main?p=x", None, 400),
        ("POST", "/api/models/alice/model/paths-info/main", b"\xff\xff", 400),
        ("POST", "/api/models/alice/model/preupload/main", {"files": [{"path": "a", "size": 1}] * 257}, 400),
        ("POST", "/api/models/alice/model/preupload/main", {"files": [{"path": "a", "size": 1, "sample": "%"}]}, 400),
        ("POST", "/api/models/alice/model/preupload/main", {"files": ["a"]}, 400),
        ("PATCH", "/api/models/alice/model", None, 405),
        ("DELETE", "/alice/model/resolve/main/there.txt", None, 405),
        ("GET", "/api/nothing", None, 404),
        ("GET", "/", None, 404),
        ("GET", "/api/models/alice/model/nothing", None, 404),
        ("GET", "/api/agent-harnesses", None, 404),
        ("GET", "/__hub__/faults", None, 404),
        ("HEAD", "/api/telemetry/x", None, 200),
        ("GET", "/__lfs__/x", None, 404),
        ("POST", "/api/models/alice/model/discussions", {"title": "t"}, 501),
    ],
)
def test_every_endpoint_says_what_it_cannot_take(
    method: str, target: str, body: Any, expected: int, ask: Ask, model: str
) -> None:
    status, headers, answer = ask(method, target, body)
    assert status == expected
    if status >= 400:
        assert answer["error"] and answer["requestId"] == headers["x-request-id"]
        assert "Traceback" not in answer["error"]


HALF = "\ud800"


def test_half_a_surrogate_pair_is_refused_wherever_it_stands(ask: Ask, model: str) -> None:
    assert ask("PUT", f"{model}/settings", {"gated": "manual"})[0] == 200
    oid = {"objects": [{"oid": HALF, "size": 1}]}
    for method, target, body, status in (
        ("DELETE", "/api/repos/delete", {"name": HALF}, 404),
        ("DELETE", "/api/repos/delete", {"name": "x", "organization": HALF}, 404),
        ("POST", "/api/repos/create", {"name": HALF}, 400),
        ("POST", "/api/repos/move", {"fromRepo": HALF, "toRepo": "alice/x"}, 404),
        ("POST", f"{model}/user-access-request/grant", {"user": HALF}, 404),
        ("POST", f"{model}/user-access-request/handle", {"requestId": f"1-{HALF}", "status": "accepted"}, 404),
        ("POST", "/alice/model.git/info/lfs/objects/batch", oid, 200),
    ):
        answered, _, content = ask(method, target, body)
        assert (answered, isinstance(content, dict)) == (status, True), (target, content)
    assert content["objects"][0]["error"]["code"] == 422


@pytest.mark.parametrize("token", [{}, {"Authorization": "Bearer hf_bob"}], ids=["nobody", "bob"])
def test_a_private_repository_named_like_an_endpoint_answers_as_one_that_is_not_there(
    token: dict[str, str], tmp_path: Path
) -> None:
    users = [User(name="alice", token="hf_alice"), User(name="bob", token="hf_bob")]
    names = ["tree", "refs", "settings", "resolve", "info"]

    def told(hub: HubServer) -> list[Any]:
        found = []
        for name in names:
            for method, target in (
                *((method, f"/api/models/alice/{name}") for method in ("GET", "PUT", "POST", "DELETE", "HEAD")),
                *((method, f"/api/models/alice/{name}/{name}/main") for method in ("GET", "POST", "DELETE")),
                *((method, f"/api/models/alice/{name}/main") for method in ("GET", "POST")),
                *((method, f"/alice/{name}/resolve/main/f") for method in ("GET", "HEAD", "POST")),
                *(("POST", f"/alice/{name}{path}") for path in (".git/info/lfs/objects/batch", "/ask-access")),
            ):
                connection = http.client.HTTPConnection("127.0.0.1", hub.port, timeout=20)
                connection.request(method, target, body=b"{}" if method in ("PUT", "POST") else None, headers=token)
                response = connection.getresponse()
                content = response.read().partition(b'"requestId"')[0]
                headers = {key: value for key, value in response.getheaders() if key not in ("Date", "X-Request-Id")}
                connection.close()
                headers.pop("Content-Length", None)
                found.append((method, target, response.status, headers, content))
        return found

    with HubServer(tmp_path / "hub", users=users) as hub:
        without = told(hub)
        for name in names:
            hub.store.create_repository("model", "alice", name, private=True, author="alice")
        assert told(hub) == without


def test_a_tree_of_ten_thousand_files_is_written_read_and_sound(ask: Ask, model: str, hub: HubServer) -> None:
    many = [file(f"{n % 100:02}/{n % 37:02}/{n}.txt", b"%d" % (n % 50)) for n in range(10_000)]
    assert commit(ask, *many)[0] == 200
    assert commit(ask, file("50/13/one more.txt", b"x"))[0] == 200
    listed, target = [], f"{model}/tree/main?recursive=true"
    while target:
        _, headers, page = ask("GET", target)
        listed += [entry["path"] for entry in page if entry["type"] == "file"]
        link = headers.get("link", "")
        target = link.partition(">")[0].removeprefix("<")
    assert len(listed) == len(set(listed)) == 10_003
    assert fsck(hub.store) == []


def test_a_range_gives_exactly_the_bytes_asked_for(ask: Ask, model: str) -> None:
    content = bytes(range(256)) * 4
    commit(ask, file("r", content))
    for header, status, expected in (
        ("bytes=0-9", 206, content[:10]),
        ("bytes=1000-", 206, content[1000:]),
        ("bytes=-24", 206, content[-24:]),
        ("bytes=0-99999", 206, content),
        ("bytes=1023-1023", 206, content[1023:]),
        ("bytes=5-2", 200, content),
        ("bytes=0-1,5-6", 200, content),
        ("lines=1-2", 200, content),
        ("bytes=-", 200, content),
        ("bytes=x-y", 200, content),
    ):
        answered, headers, body = ask("GET", "/alice/model/resolve/main/r", Range=header)
        assert (answered, body) == (status, expected), header
        assert int(headers["content-length"]) == len(expected)
        if status == 206:
            assert headers["content-range"].endswith("/1024")
    status, headers, _ = ask("GET", "/alice/model/resolve/main/r", Range="bytes=1024-")
    assert (status, headers["content-range"]) == (416, "bytes */1024")
    tag = ask("HEAD", "/alice/model/resolve/main/r")[1]["etag"]
    assert ask("GET", "/alice/model/resolve/main/r", **{"If-None-Match": tag})[0] == 304


@pytest.mark.parametrize(
    "header", ["Bearer hf_wrong", "Bearer ", "Basic hf_alice", "hf_alice", "Bearer hf_alice hf_alice", "Bearer \u00fc"]
)
def test_a_wrong_authorization_is_refused_and_named(header: str, ask: Ask, model: str) -> None:
    status, headers, answer = ask("GET", model, Authorization=header)
    assert (status, headers["x-error-message"]) == (401, "Invalid credentials in Authorization header")
    assert "hf_" not in json.dumps(answer)
