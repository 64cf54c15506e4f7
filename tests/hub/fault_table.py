# SPDX-License-Identifier: Apache-2.0
"""What the real client makes of each fault, as a table: `python tests/hub/fault_table.py [--write]`.

Each row is one Hub with one fault, and one process with the unmodified client that is installed here. The column of its
line is compared with the one in docs/hub.md, or written there.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from harness.hub import Fault, HubServer
from harness.hub.records import AddLfs

DOCUMENT = Path(__file__).parents[2] / "docs" / "hub.md"
LINES = ("huggingface_hub 2.x", "huggingface_hub 0.36")
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"

MEGABYTE = 1 << 20
PATIENT_SECONDS = 15
"""From here on a table says that the client took its time; its waits add up to 23 s, others to less than 5 s."""

PRELUDE = """
import hashlib, json, os, pathlib, sys, time
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, snapshot_download

api = HfApi()


def download():
    return hashlib.sha256(pathlib.Path(hf_hub_download("alice/model", "w.bin")).read_bytes()).hexdigest()


def snapshot():
    folder = pathlib.Path(snapshot_download("alice/model"))
    return hashlib.sha256((folder / "w.bin").read_bytes()).hexdigest()


def upload():
    api.upload_file(path_or_fileobj=bytes(range(256)) * 400, path_in_repo="new.bin", repo_id="alice/model")


def commit():
    api.create_commit("alice/model", [CommitOperationAdd("new.txt", b"text")], commit_message="new")


def create():
    api.create_repo("alice/new")


def info():
    api.model_info("alice/model")


def listing():
    api.list_repo_files("alice/model")


start = time.monotonic()
try:
    value, error = globals()[sys.argv[1]](), None
except Exception as raised:
    value, error = None, raised
root = type(error).__module__.partition(".")[0]
response = getattr(error, "response", None)
said = {
    "value": value,
    "error": error and ("" if root in ("builtins", "huggingface_hub") else f"{root}.") + type(error).__name__,
    "status": getattr(response, "status_code", None),
    "text": str(error),
    "seconds": time.monotonic() - start,
}
print(json.dumps(said))
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One fault and what the client is asked to do: a name of PRELUDE. warm: w.bin is in the cache. down: no server."""

    said: str
    asks: str = "download"
    faults: tuple[Fault, ...] = ()
    warm: bool = False
    down: bool = False
    size: int = 100_000


HEAD, GET = r"^HEAD .*/resolve/.*/w\.bin", r"^GET .*/resolve/.*/w\.bin"
COMMIT, PUT, CREATE = "^POST .*/commit/", "^PUT /__lfs__/", "^POST /api/repos/create"


def row(
    said: str, match: str, asks: str = "download", *, warm: bool = False, size: int = 100_000, **fault: object
) -> Row:
    """A row with one fault."""
    return Row(said=said, asks=asks, faults=(Fault(match=match, **fault),), warm=warm, size=size)  # type: ignore[arg-type]


def status(said: str, match: str, code: int, asks: str = "download", *, times: int = 1, **more: object) -> Row:
    """A row with an answer of a status."""
    return row(said, match, asks, status=code, times=times, **more)  # type: ignore[arg-type]


ROWS: tuple[Row, ...] = (
    Row(said="no fault"),
    status("HEAD: 503 once", HEAD, 503),
    status("HEAD: 503 for ever", HEAD, 503, times=-1),
    status("HEAD: 500 for ever, warm cache", HEAD, 500, times=-1, warm=True),
    status(
        "HEAD: 401 RepoNotFound, warm cache", HEAD, 401, times=-1, warm=True, headers={"X-Error-Code": "RepoNotFound"}
    ),
    status("HEAD: 429 once, Retry-After 1", HEAD, 429, headers={"Retry-After": "1"}),
    status("GET: 429 once, Retry-After 1", GET, 429, headers={"Retry-After": "1"}),
    status("GET: 503 once", GET, 503),
    status("GET: 503 once, in a snapshot", GET, 503, "snapshot"),
    row("GET: clean close within the body, once", GET, close_after=15 * MEGABYTE, times=1, size=25 * MEGABYTE),
    row("GET: clean close within the body, always at the same byte", GET, close_after=1000),
    row("GET: reset within the body, once", GET, reset_after=15 * MEGABYTE, times=1, size=25 * MEGABYTE),
    row("GET: nothing more comes within the body, once", GET, stall=1000, times=1),
    row("GET: reset before the answer, once", GET, reset_before=True, times=1),
    Row(
        said="GET: clean close within the body, once, then Range ignored",
        faults=(Fault(match=GET, close_after=15 * MEGABYTE, times=1), Fault(match=GET, ignore_range=True)),
        size=25 * MEGABYTE,
    ),
    row("HEAD: reset before the answer, once", HEAD, reset_before=True, times=1),
    row("HEAD: reset before the answer, once, warm cache", HEAD, reset_before=True, times=1, warm=True),
    Row(said="server down", down=True),
    Row(said="server down, warm cache", down=True, warm=True),
    row("HEAD without X-Repo-Commit", HEAD, set_headers={"X-Repo-Commit": None}),
    row("HEAD without ETag", HEAD, set_headers={"ETag": None, "X-Linked-Etag": None}),
    row("GET: body shorter than X-Linked-Size, its own length consistent", GET, truncate=1000),
    row("GET: one byte flipped, same size", GET, flip=1000),
    row("revision moves between HEAD and GET", HEAD, move={"repository": "alice/model", "to": "v1"}, times=1),
    status("PUT: 500 once", PUT, 500, "upload"),
    status("PUT: 500 for ever", PUT, 500, "upload", times=-1),
    row("PUT: reset within the upload, once", PUT, "upload", reset_upload_after=10_000, times=1),
    status("LFS batch: 503 once", "/objects/batch", 503, "upload"),
    status("preupload: 503 once", "/preupload/", 503, "upload"),
    status("listing: 503 once", "/tree/|GET /api/models/alice/model", 503, "listing"),
    status("verify: 500 once", "^POST /__lfs__/verify", 500, "upload"),
    status("commit: 503 once", COMMIT, 503, "commit"),
    status("commit: 429 once, Retry-After 1", COMMIT, 429, "commit", headers={"Retry-After": "1"}),
    row("commit: done, then reset instead of the answer", COMMIT, "commit", apply_then_reset=True, times=1),
    status("create: 503 once", CREATE, 503, "create"),
    status("info: 503 once", "^GET /api/models/alice/model", 503, "info"),
    status("PUT: 403", PUT, 403, "upload", times=-1),
)


def measured(row: Row) -> str:
    """What the installed client makes of a row, in a few words."""
    with tempfile.TemporaryDirectory(prefix="parity-faults-") as directory, HubServer(Path(directory) / "hub") as hub:
        content = os.urandom(row.size)
        alice = hub.store.create_repository("model", "alice", "model", private=False, author="alice")
        for name, data in (("v1", content[::-1]), ("main", content)):
            stored = hub.store.blobs.add([data])
            hub.store.note_upload(alice, stored.sha256)
            operation = AddLfs("w.bin", stored.sha256, len(data))
            hub.store.commit(alice, "main", [operation], title=name, message="", author="alice")
            if name == "v1":
                hub.store.create_tag(alice, "v1", at="main", message="")
        environment = {**os.environ, **hub.env(), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        environment |= {"HF_HUB_DOWNLOAD_TIMEOUT": "3", "HF_HUB_ETAG_TIMEOUT": "3"}

        def ask(what: str) -> dict[str, object]:
            done = subprocess.run(
                [sys.executable, "-c", PRELUDE, what], env=environment, capture_output=True, text=True, timeout=300
            )
            if done.returncode:
                raise RuntimeError(f"{row.said}: {done.stderr}")
            said: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
            return said

        if row.warm:
            ask("download")
        hub.inject(*row.faults)
        if row.down:
            hub.stop()
        said = ask(row.asks)
        seconds = said["seconds"]
        assert isinstance(seconds, float)
        late = f", after more than {PATIENT_SECONDS} s" if seconds > PATIENT_SECONDS else ""
        if said["error"] is None:
            other = row.asks in ("download", "snapshot") and said["value"] != stored.sha256
            return f"ok{late}" if not other else f"**other content, without a word**{late}"
        text = " (consistency check)" if "Consistency check failed" in str(said["text"]) else ""
        return f"`{said['error']}`{' ' + str(said['status']) if said['status'] else ''}{text}{late}"


def column() -> dict[str, str]:
    """Fault -> what becomes of it, by the client that is installed here; rows that wait do so side by side."""
    with concurrent.futures.ThreadPoolExecutor(max_workers=6) as pool:
        # Those that wait longest first.
        order = sorted(ROWS, key=lambda one: -max([fault.times == -1 for fault in one.faults], default=one.down))
        return dict(zip([one.said for one in order], pool.map(measured, order), strict=True))


def line_here() -> str:
    """The client line that is installed here, as the table calls it."""
    return LINES[metadata.version("huggingface_hub").startswith("0.")]


def read_table(text: str) -> dict[str, list[str]]:
    """Fault -> one cell for each of LINES, from between the marks of the document."""
    body = text.partition(BEGIN)[2].partition(END)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.strip().splitlines()[2:]]
    return {cells[0]: cells[1:] for cells in rows}


def with_table(text: str, table: dict[str, list[str]]) -> str:
    """The document with the table between its marks."""
    lines = [["fault", *LINES], ["---"] * 3, *([said, *cells] for said, cells in table.items())]
    body = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return f"{text.partition(BEGIN)[0]}{BEGIN}\n{body}\n{END}{text.partition(END)[2]}"


def main() -> int:
    """Prints what differs from the document, or writes it there. Exit 1 where something differs."""
    text = DOCUMENT.read_text(encoding="utf-8")
    known, here, found = read_table(text), LINES.index(line_here()), column()
    table = {one.said: list(known.get(one.said, ["", ""])) for one in ROWS}
    for said, outcome in found.items():
        table[said][here] = outcome
    if "--write" in sys.argv[1:]:
        DOCUMENT.write_text(with_table(text, table), encoding="utf-8")
        return 0
    if table == known:
        return 0
    for said, cells in table.items():
        if cells != known.get(said):
            print(f"{said} ({line_here()}): {cells[here]}; the document: {known.get(said, ['nothing'] * 2)[here]}")
    print("write it anew with: python tests/hub/fault_table.py --write")
    return 1


if __name__ == "__main__":
    sys.exit(main())
