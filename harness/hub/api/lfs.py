# SPDX-License-Identifier: Apache-2.0
"""Endpoints of git's LFS: where to upload a large file, its upload in one piece or in parts, and no Xet."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.hub.api.calls import JSON_BYTES, Hub, RepositoryCall, json_object, shown
from harness.hub.messages import Request, Response, json_response
from harness.hub.refusals import Refusal

ROOT = "__lfs__"
SHA256 = re.compile(r"[0-9a-f]{64}")
MOST_OBJECTS = 1000
CHUNK_BYTES = 1 << 20

NO_XET = (
    "this Hub has no Xet storage: set HF_HUB_DISABLE_XET=1 in the environment of the client, before it imports"
    " huggingface_hub"
)


def refuse_xet(call: RepositoryCall) -> Response:
    """Tells a client that insists on Xet which variable to set."""
    raise Refusal(kind="bad_request", message=NO_XET)


def batch(call: RepositoryCall) -> Response:
    """For each object: nothing to do, an address to upload to, one for each of its parts, or an error."""
    if call.rest != ("lfs", "objects", "batch"):
        raise Refusal(kind="no_such_page", message="of git's interface there is info/lfs/objects/batch alone")
    body = call.json()
    if call.field(body, "operation", str, default="upload") != "upload":
        raise Refusal(kind="bad_request", message="the LFS interface is for uploads; files are read at /resolve/")
    transfers = call.field(body, "transfers", list, default=["basic"])
    if not set(map(str, transfers)) & {"basic", "multipart"}:
        raise Refusal(kind="bad_request", message=f"no transfer of {shown(transfers)} is known; {NO_XET}")
    objects = call.required(body, "objects", list)
    if len(objects) > MOST_OBJECTS:
        raise Refusal(kind="bad_request", message=f"{len(objects)} objects in one request, at most {MOST_OBJECTS}")
    wants_parts = "multipart" in transfers
    # A client takes the parts from the actions themselves; the transfer named is for the others.
    found = [_object(call, each, wants_parts=wants_parts) for each in objects]
    in_parts = any("chunk_size" in each.get("actions", {}).get("upload", {}).get("header", {}) for each in found)
    return json_response(
        {"transfer": "multipart" if in_parts else "basic", "objects": found},
        headers={"Content-Type": "application/vnd.git-lfs+json"},
    )


def _object(call: RepositoryCall, requested: Any, *, wants_parts: bool) -> dict[str, Any]:
    hub = call.hub
    if not isinstance(requested, dict):
        raise Refusal(kind="bad_request", message=f"an object must be a JSON object, not {shown(requested)}")
    oid, size = call.required(requested, "oid", str), call.required(requested, "size", int)
    answer: dict[str, Any] = {"oid": oid, "size": size}
    if not SHA256.fullmatch(oid) or not 0 <= size <= hub.sizes.file:
        message = f"an object needs a sha256 in hexadecimal and a size of at most {hub.sizes.file} bytes"
        return {**answer, "error": {"code": 422, "message": message}}
    if hub.store.has_content(call.repository, oid):
        return answer
    basic = _address(hub, "whole", call.repository.key, oid, size)
    upload: dict[str, Any] = {"href": basic}
    if wants_parts and size > hub.sizes.multipart:
        upload_id = secrets.token_hex(8)
        count = -(-size // hub.sizes.part)
        parts = {
            str(n): _address(hub, f"part-{upload_id}-{n}", call.repository.key, oid, size) for n in range(1, count + 1)
        }
        upload = {
            "href": _address(hub, f"complete-{upload_id}", call.repository.key, oid, size),
            "header": {"chunk_size": str(hub.sizes.part), **parts},
        }
    return {
        **answer,
        "actions": {"upload": upload, "verify": {"href": _address(hub, "verify", call.repository.key, oid, size)}},
    }


# Behind the addresses that a batch hands out: no token is sent there, so that they carry their own right


def upload(hub: Hub, request: Request) -> Response:
    """Takes a file, a part of one, or the word that all parts were sent; and says whether a file is there."""
    if len(request.path) != 6:
        raise Refusal(kind="no_such_page", message="this is no address of an upload")
    _, step, key, oid, size, signature = request.path
    if not hmac.compare_digest(signature.encode(), _signature(hub, step, key, oid, size).encode()):
        raise Refusal(kind="forbidden", message="this address was not handed out by this Hub; ask for another one")
    repository = hub.store.repository_with_key(int(key))
    if repository is None:
        raise Refusal(kind="no_such_page", message="the repository that this upload was for is gone")
    name, *more = step.split("-")
    if (request.method, name) == ("PUT", "whole"):
        stored = hub.store.blobs.add(request.body.chunks(limit=int(size)), sha256=oid, size=int(size))
        hub.store.note_upload(repository, oid)
        return Response(headers={"ETag": f'"{stored.sha256}"'})
    if (request.method, name) == ("PUT", "part"):
        return Response(headers={"ETag": f'"{_store_part(hub, more[0], more[1], request)}"'})
    if (request.method, name) == ("POST", "complete"):
        body = json_object(request.body.read(limit=JSON_BYTES), what="the body")
        _complete(hub, more[0], oid, int(size), body)
        hub.store.note_upload(repository, oid)
        return json_response({})
    if (request.method, name) == ("POST", "verify"):
        request.body.read(limit=JSON_BYTES)
        if not hub.store.has_content(repository, oid):
            raise Refusal(kind="no_such_page", message=f"the object {oid} was not uploaded")
        return json_response({})
    raise Refusal(kind="method", message=f"an upload's address '{name}' does not take {request.method}")


def _store_part(hub: Hub, upload_id: str, number: str, request: Request) -> str:
    """Keeps one part, and returns what the client names it by when all are sent."""
    directory = hub.uploads / upload_id
    directory.mkdir(parents=True, exist_ok=True)
    unfinished = directory / f"{number}-{secrets.token_hex(4)}.unfinished"
    digest = hashlib.sha256()
    try:
        with open(unfinished, "xb") as file:
            for chunk in request.body.chunks(limit=hub.sizes.part):
                digest.update(chunk)
                file.write(chunk)
        unfinished.replace(directory / f"{number}.{digest.hexdigest()}")
    finally:
        unfinished.unlink(missing_ok=True)
    return digest.hexdigest()


def _complete(hub: Hub, upload_id: str, oid: str, size: int, body: dict[str, Any]) -> None:
    """Puts the parts together, in the order and by the tags that the client names."""
    directory = hub.uploads / upload_id
    listed = body.get("parts")
    if not isinstance(listed, list) or not all(isinstance(part, dict) for part in listed):
        raise Refusal(kind="bad_request", message="'parts' must be a list of objects")
    files = []
    for expected, part in enumerate(listed, start=1):
        number, tag = part.get("partNumber"), str(part.get("etag", "")).strip('"')
        if number != expected or not SHA256.fullmatch(tag) or not (directory / f"{expected}.{tag}").is_file():
            raise Refusal(kind="bad_request", message=f"part {shown(number)} with the tag {shown(tag)} was not sent")
        files.append(directory / f"{expected}.{tag}")
    hub.store.blobs.add(_joined(files), sha256=oid, size=size)
    shutil.rmtree(directory, ignore_errors=True)


def _joined(files: list[Path]) -> Iterator[bytes]:
    for path in files:
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk


def _address(hub: Hub, step: str, key: int, oid: str, size: int) -> str:
    signature = _signature(hub, step, str(key), oid, str(size))
    return f"{hub.url()}/{ROOT}/{step}/{key}/{oid}/{size}/{signature}"


def _signature(hub: Hub, *signed: str) -> str:
    return hmac.new(hub.secret, json.dumps(signed).encode(), hashlib.sha256).hexdigest()
