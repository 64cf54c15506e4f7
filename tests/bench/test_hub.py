# SPDX-License-Identifier: Apache-2.0
"""The Hub over HTTP, with the real client and without: what a push, a load, a commit and a large file cost."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from harness.hub import HubServer, client_environment

pytestmark = pytest.mark.benchmark(group="Hub")

LARGE = 500_000_000
ROUNDS = 5
THREADS, COMMITS = 16, 64
SMALL_FILES = 65
WAIT_SECONDS = 120

# The real client, which runs each line of Python that it is given.
CLIENT = """
import contextlib, itertools, json, os, sys, tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, snapshot_download

api = HfApi()
numbers = itertools.count()
names = dict(globals())
for line in sys.stdin:
    with contextlib.redirect_stdout(sys.stderr):
        exec(json.loads(line), names)
    print("done", flush=True)
"""

Client = Callable[[str], None]
Served = tuple[str, psutil.Process]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """The address and the process of a `parity hub`."""
    command = [sys.executable, "-m", "harness.cli", "hub", "--root", str(tmp_path / "root")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield process.stdout.readline().strip(), psutil.Process(process.pid)
    process.terminate()
    process.communicate(timeout=WAIT_SECONDS)


@pytest.fixture
def client(served: Served, tmp_path: Path) -> Iterator[Client]:
    """`client("lines of Python")` runs them in a process that has the real client imported."""
    environment = {**os.environ, **client_environment(served[0], token="hf_alice", home=tmp_path / "home")}
    process = subprocess.Popen(
        [sys.executable, "-c", CLIENT],
        env={**environment, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None and stdout is not None

    def run(source: str) -> None:
        print(json.dumps(source), file=stdin, flush=True)
        assert stdout.readline() == "done\n"

    run("api.create_repo('alice/model')")
    yield run
    process.communicate(timeout=WAIT_SECONDS)


def start(process: list[subprocess.Popen[str]], root: Path) -> None:
    """Until the line with the address is there."""
    command = [sys.executable, "-m", "harness.cli", "hub", "--root", str(root)]
    process.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    stdout = process[-1].stdout
    assert stdout is not None and stdout.readline().startswith("http://")


def test_start_in_process(benchmark: Any, tmp_path: Path) -> None:
    """What each test pays that has a Hub of its own."""
    numbers = itertools.count()
    started: list[HubServer] = []

    def run() -> None:
        started.append(HubServer(tmp_path / f"{next(numbers)}"))
        started[-1].start()

    benchmark.extra_info["what"] = "start of a HubServer, in process"
    benchmark.pedantic(run, rounds=20, warmup_rounds=1)
    for hub in started:
        hub.stop()


def test_start_from_a_shell(benchmark: Any, tmp_path: Path) -> None:
    numbers = itertools.count()
    started: list[subprocess.Popen[str]] = []
    benchmark.extra_info["what"] = "`parity hub` until it prints its address"
    benchmark.pedantic(lambda: start(started, tmp_path / f"{next(numbers)}"), rounds=10, warmup_rounds=1)
    for process in started:
        process.terminate()
        process.communicate(timeout=WAIT_SECONDS)


MODEL = """
folder = Path("model")
folder.mkdir()
(folder / "config.json").write_text("{}")
(folder / "modeling.py").write_text("# code\\n" * 1000)
(folder / "README.md").write_text("# Model\\n")
"""


def test_push(benchmark: Any, client: Client) -> None:
    client(MODEL)
    push = """
(folder / "model.safetensors").write_bytes(os.urandom(1_000_000))
api.upload_folder(repo_id="alice/model", folder_path=folder)
"""
    benchmark.extra_info["what"] = "push of a 1 MB model of four files, real client"
    benchmark.pedantic(client, args=(push,), rounds=10, warmup_rounds=1)


def test_cold_load(benchmark: Any, client: Client) -> None:
    client(MODEL + '(folder / "model.safetensors").write_bytes(os.urandom(1_000_000))')
    client('api.upload_folder(repo_id="alice/model", folder_path=folder)')
    benchmark.extra_info["what"] = "load of a 1 MB model of four files, real client, cold cache"
    load = 'snapshot_download("alice/model", cache_dir=tempfile.mkdtemp(dir="."))'
    benchmark.pedantic(client, args=(load,), rounds=10, warmup_rounds=1)


def test_commits_at_once(benchmark: Any, client: Client) -> None:
    client(
        """
def commit(number):
    operations = [CommitOperationAdd(f"{number}.txt", b"%d" % number)]
    api.create_commit("alice/model", operations, commit_message=f"{number}")

pool = ThreadPoolExecutor(THREADS)
""".replace("THREADS", str(THREADS))
    )
    run = f"list(pool.map(commit, [next(numbers) for _ in range({COMMITS})]))"
    benchmark.extra_info["what"] = f"{COMMITS} commits by {THREADS} threads of the real client"
    benchmark.pedantic(client, args=(run,), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("cache", ["cold", "warm"])
def test_snapshot(benchmark: Any, client: Client, cache: str) -> None:
    client(f"""
operations = [CommitOperationAdd(f"data/{{number}}.txt", b"%d" % number) for number in range({SMALL_FILES - 1})]
api.create_commit("alice/model", operations, commit_message="many")
""")
    where = {"cold": 'tempfile.mkdtemp(dir=".")', "warm": '"warm"'}[cache]
    benchmark.extra_info["what"] = f"snapshot of {SMALL_FILES} small files, real client, {cache} cache"
    load = f'snapshot_download("alice/model", cache_dir={where})'
    benchmark.pedantic(client, args=(load,), rounds=5, warmup_rounds=1)


def test_head(benchmark: Any, served: Served, client: Client) -> None:
    """One connection; the answers are not parsed."""
    client('api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="alice/model")')
    where = urlsplit(served[0])
    connection = socket.create_connection((where.hostname, where.port), timeout=WAIT_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    asked = (
        b"HEAD /alice/model/resolve/main/config.json HTTP/1.1\r\nHost: hub\r\nAuthorization: Bearer hf_alice\r\n\r\n"
    )
    count = 1000

    def run() -> None:
        for _ in range(count):
            connection.sendall(asked)
            answer = b""
            while not answer.endswith(b"\r\n\r\n"):
                answer += connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200")

    with connection:
        benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    benchmark.extra_info["what"] = f"{count} HEAD requests for a file, one connection"
    benchmark.extra_info["per_second"] = count / benchmark.stats.stats.median


# 500 MB, beside a copy of the same file in the same run


@contextlib.contextmanager
def watched(process: psutil.Process, noted: dict[str, Any]) -> Iterator[None]:
    """Notes the largest resident size that the process has meanwhile, in MiB."""
    sizes = [process.memory_info().rss]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            sizes.append(process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        noted["server_mib"] = max(sizes) / 2**20
        noted["server_mib_before"] = sizes[0] / 2**20


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """Half a gigabyte that does not compress, and that differs from one benchmark to the next."""
    piece = os.urandom(1 << 20)
    with (tmp_path / "given.bin").open("wb") as file:
        for start in range(0, LARGE, len(piece)):
            file.write(piece[: LARGE - start])
    return tmp_path / "given.bin"


def address(url: str, file: Path) -> str:
    """Where a file of the repository may be sent, as often as one likes."""
    with file.open("rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    body = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": sha256, "size": LARGE}]}
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=WAIT_SECONDS)
    headers = {"Authorization": "Bearer hf_alice"}
    connection.request("POST", "/alice/model.git/info/lfs/objects/batch", json.dumps(body), headers)
    answer = json.load(connection.getresponse())
    connection.close()
    return str(urlsplit(answer["objects"][0]["actions"]["upload"]["href"]).path)


def put(url: str, path: str, file: Path) -> None:
    """Sends a file without another copy of it in this process."""
    where = urlsplit(url)
    with (
        socket.create_connection((where.hostname, where.port), timeout=WAIT_SECONDS) as connection,
        file.open("rb") as f,
    ):
        connection.sendall(f"PUT {path} HTTP/1.1\r\nHost: hub\r\nContent-Length: {LARGE}\r\n\r\n".encode())
        connection.sendfile(f)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")


def get(url: str, path: str) -> None:
    """Reads a file and throws it away."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=WAIT_SECONDS)
    connection.request("GET", path, headers={"Authorization": "Bearer hf_alice"})
    response = connection.getresponse()
    buffer = bytearray(1 << 20)
    size = 0
    while count := response.readinto(buffer):
        size += count
    connection.close()
    assert (response.status, size) == (200, LARGE)


@pytest.mark.parametrize("way", ["raw PUT", "raw GET", "upload_file", "hf_hub_download"])
def test_large(
    against: Callable[..., None], benchmark: Any, served: Served, client: Client, given: Path, tmp_path: Path, way: str
) -> None:
    url, process = served
    upload = f'api.upload_file(path_or_fileobj={str(given)!r}, path_in_repo="w.bin", repo_id="alice/model")'
    if way == "raw PUT":
        path = address(url, given)
        run: Callable[[], Any] = lambda: put(url, path, given)  # noqa: E731
    elif way == "raw GET":
        client(upload)
        run = lambda: get(url, "/alice/model/resolve/main/w.bin")  # noqa: E731
    elif way == "upload_file":
        # Another repository has nothing of what the first one holds.
        run = lambda: client(f"""
id = f"alice/model{{next(numbers)}}"
api.create_repo(id)
{upload.replace('"alice/model"', "id")}
""")  # noqa: E731
    else:
        client(upload)
        run = lambda: client("""
with tempfile.TemporaryDirectory(dir=".") as cache:
    hf_hub_download("alice/model", "w.bin", cache_dir=cache)
""")  # noqa: E731

    def copy() -> None:
        # A new file each time, as the server and the client write one: new pages cost more than those of an old file.
        shutil.copyfile(given, tmp_path / "unfinished")
        os.replace(tmp_path / "unfinished", tmp_path / "copy")

    what = "by the real client" if "_" in way else "without a client"
    benchmark.extra_info.update(what=f"{way} of 500 MB, {what}", baseline="a copy")
    with watched(process, benchmark.extra_info):
        against(run, copy, rounds=ROUNDS)
