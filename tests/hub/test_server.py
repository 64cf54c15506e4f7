# SPDX-License-Identifier: Apache-2.0
"""A Hub that is stopped, started and looked at from outside: what it keeps, and what it tells a client's shell."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from harness.hub import HubServer, Sizes
from harness.hub.environment import client_environment
from harness.hub.records import AddFile


def send(method: str, url: str, body: bytes | None) -> tuple[dict[str, str], Any]:
    """Headers and JSON of an answer."""
    headers = {"Authorization": "Bearer hf_alice"} if "__lfs__" not in url else {}
    with urllib.request.urlopen(urllib.request.Request(url, data=body, headers=headers, method=method)) as response:
        return dict(response.headers), json.loads(response.read() or b"null")


def test_an_upload_in_parts_goes_on_after_a_restart(tmp_path: Path) -> None:
    content = bytes(range(256)) * 4
    oid = hashlib.sha256(content).hexdigest()
    with HubServer(tmp_path / "hub", sizes=Sizes(multipart=100, part=600)) as hub:
        send("POST", f"{hub.url}/api/repos/create", b'{"name": "model"}')
        asked = {"transfers": ["multipart"], "objects": [{"oid": oid, "size": len(content)}]}
        batch = send("POST", f"{hub.url}/alice/model.git/info/lfs/objects/batch", json.dumps(asked).encode())[1]
        upload = batch["objects"][0]["actions"]["upload"]
        first = send("PUT", upload["header"]["1"], content[:600])[0]["ETag"]
        hub.stop()
        hub.start()
        second = send("PUT", upload["header"]["2"], content[600:])[0]["ETag"]
        parts = [{"partNumber": 1, "etag": first}, {"partNumber": 2, "etag": second}]
        send("POST", upload["href"], json.dumps({"oid": oid, "parts": parts}).encode())
        repository = hub.store.find_repository("model", "alice/model")
        assert repository is not None
        assert hub.store.has_content(repository, oid)
        assert not list((hub.root / "uploads").iterdir())
        left = hub.root / "uploads" / "left"
        left.mkdir()
        os.utime(left, (0, 0))
        hub.stop()
        hub.start()
        assert not left.exists()


def test_a_listing_goes_on_where_it_stopped_whatever_is_deleted_meanwhile(tmp_path: Path) -> None:
    ticks = itertools.count()
    with HubServer(tmp_path / "hub", clock=lambda: datetime.fromtimestamp(next(ticks), UTC)) as hub:

        def listed(query: str) -> tuple[list[str], str]:
            headers, found = send("GET", f"{hub.url}/api/models?{query}", None)
            return [one["id"] for one in found], headers.get("Link", "").partition("?")[2].partition(">")[0]

        made = [hub.store.create_repository("model", "alice", n, private=False, author="alice") for n in "abcd"]
        operation = AddFile("f", hub.store.blobs.add([b"1"]).sha256)
        hub.store.commit(made[1], "main", [operation], title="change", message="", author="alice")
        assert listed("sort=createdAt")[0] == ["alice/d", "alice/c", "alice/b", "alice/a"]
        assert listed("sort=lastModified")[0] == ["alice/b", "alice/d", "alice/c", "alice/a"]
        first, then = listed("limit=2")
        hub.store.delete_repository(made[1])
        assert (first, *listed(then)) == (["alice/d", "alice/c"], ["alice/a"], "")


def test_a_secret_that_was_not_written_is_made_anew(tmp_path: Path) -> None:
    root = tmp_path / "hub"
    root.mkdir()
    (root / "secret").touch()
    with HubServer(root):
        secret = (root / "secret").read_bytes()
        assert len(secret) == 32
    with HubServer(root):
        assert (root / "secret").read_bytes() == secret


def test_a_clients_shell_is_told_of_no_token_cache_or_proxy_of_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "example.org")
    monkeypatch.setenv("TRANSFORMERS_CACHE", "/mine")
    monkeypatch.delenv("PYTORCH_TRANSFORMERS_CACHE", raising=False)
    told = client_environment("http://127.0.0.2:1", token=None, home=Path("home"))
    assert told["HF_HOME"] == str(tmp_path / "home")
    assert told["NO_PROXY"] == told["no_proxy"] == "example.org,127.0.0.1,localhost,127.0.0.2"
    assert told["HF_TOKEN"] == told["HUGGING_FACE_HUB_TOKEN"] == ""
    assert told["TRANSFORMERS_CACHE"] == told["HF_HUB_CACHE"]
    assert "PYTORCH_TRANSFORMERS_CACHE" not in told
