# SPDX-License-Identifier: Apache-2.0
"""What the Hub's HTTP server costs: its start, a warm HEAD, and 500 MB up and down beside a plain file copy."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Against = Callable[..., None]

SIZE = 500_000_000
MOST_MEMORY = 100_000_000
HEADERS = "Host: hub\r\nUser-Agent: hf_hub/2.4.0; python/3.11\r\nAccept: */*\r\nAccept-Encoding: identity\r\n"
HEADERS += "Connection: keep-alive\r\nAuthorization: Bearer hf_alice\r\n"


@dataclasses.dataclass(frozen=True)
class Server:
    """A server in a process of its own."""

    port: int
    process: int
    directory: Path

    def peak_memory(self) -> int:
        """The most it has had resident, in bytes."""
        status = Path(f"/proc/{self.process}/status").read_text()
        peak = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert peak is not None
        return int(peak[1]) * 1024


@pytest.fixture
def server(tmp_path: Path, repository: Path) -> Iterator[Server]:
    """With nothing in its directory."""
    command = [sys.executable, "-m", "tests.bench.wire_server", str(tmp_path)]
    with subprocess.Popen(command, cwd=repository, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield Server(int(process.stdout.readline()), process.pid, tmp_path)
        process.communicate()


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """500 MB that no file system can shorten."""
    block = random.Random(0).randbytes(1_000_000)
    with (tmp_path / "large").open("wb") as file:
        for _ in range(SIZE // len(block)):
            file.write(block)
    return tmp_path / "large"


def head_of(answer: bytes) -> bytes:
    head, end, _ = answer.partition(b"\r\n\r\n")
    assert end
    assert head.startswith(b"HTTP/1.1 200 "), head
    return head


@pytest.mark.benchmark(group="hub")
def test_start(benchmark: Any) -> None:
    """A server in this process, started and stopped."""
    from harness.hub.faults import Faults
    from harness.hub.journal import Journal
    from harness.hub.messages import Request, Response
    from harness.hub.wire import Wire

    def handler(asked: Request) -> Response:
        return Response()

    def start_and_stop() -> None:
        wire = Wire(handler, faults=Faults(), journal=Journal(), log=print, move=print)
        wire.start()
        wire.stop()

    benchmark.extra_info["what"] = "the Hub's HTTP server, start and stop"
    benchmark(start_and_stop)


@pytest.mark.benchmark(group="hub")
def test_warm_head(benchmark: Any, server: Server) -> None:
    """On one connection, one after the other, from another process."""
    (server.directory / "file").write_bytes(b"content")
    ask = f"HEAD /file HTTP/1.1\r\n{HEADERS}\r\n".encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def heads() -> None:
            for _ in range(1000):
                connection.sendall(ask)
                head_of(connection.recv(65536))

        benchmark.extra_info["what"] = "1000 warm HEADs on one connection"
        benchmark.pedantic(heads, rounds=10, warmup_rounds=1)
    benchmark.extra_info["requests_per_second"] = 1000 / benchmark.stats.stats.median


@pytest.mark.benchmark(group="hub")
def test_get(benchmark: Any, server: Server, large: Path, against: Against) -> None:
    """500 MB from the server to a client that throws it away, beside a copy of the file."""
    buffer = bytearray(1_000_000)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:

        def get() -> None:
            connection.sendall(f"GET /large HTTP/1.1\r\n{HEADERS}\r\n".encode())
            begin = connection.recv(65536)
            left = SIZE - (len(begin) - len(head_of(begin)) - 4)
            while left:
                count = connection.recv_into(buffer)
                assert count
                left -= count

        benchmark.extra_info["what"] = "GET of 500 MB, beside shutil.copyfile"
        against(get, lambda: shutil.copyfile(large, server.directory / "copy"), rounds=5)
    benchmark.extra_info["peak_memory"] = server.peak_memory()
    assert server.peak_memory() < MOST_MEMORY


@pytest.mark.benchmark(group="hub")
def test_put(benchmark: Any, server: Server, large: Path, against: Against) -> None:
    """500 MB to the server, which hashes and writes it, beside a copy of the file."""
    with large.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with socket.create_connection(("127.0.0.1", server.port)) as connection, large.open("rb") as file:

        def put() -> None:
            connection.sendall(f"PUT /put HTTP/1.1\r\n{HEADERS}Content-Length: {SIZE}\r\n\r\n".encode())
            connection.sendfile(file, 0, SIZE)
            assert digest.encode() in head_of(connection.recv(65536))

        benchmark.extra_info["what"] = "PUT of 500 MB with its SHA-256, beside shutil.copyfile"
        against(put, lambda: shutil.copyfile(large, server.directory / "copy"), rounds=5)
    benchmark.extra_info["peak_memory"] = server.peak_memory()
    assert server.peak_memory() < MOST_MEMORY
