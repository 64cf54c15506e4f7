# SPDX-License-Identifier: Apache-2.0
"""kill -9 at any moment: every acknowledged change is there afterwards, none is there by half, and fsck is silent."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from harness.hub.fsck import fsck
from harness.hub.store import Store

ROUNDS = 6
COMMON = """
    import json, os, signal, sys, threading
    from pathlib import Path
    from harness.hub.records import AddFile, AddLfs, DeleteFolder
    from harness.hub.store import Store

    store = Store(Path(sys.argv[1]))

    def commit(repository, number, folder):
        # Each commit replaces a folder of two files that say the same number.
        there = store.entry(repository, store.resolve(repository, "main"), folder)
        operations = [DeleteFolder(folder)] if there else []
        for name in ("a.txt", "sub/b.txt"):
            stored = store.blobs.add([b"%d" % number, name.encode()])
            operations.append(AddFile(f"{folder}/{name}", stored.sha256))
        stored = store.blobs.add([b"%d" % number] * 1000)
        store.note_upload(repository, stored.sha256)
        operations.append(AddLfs(f"{folder}/w.bin", stored.sha256, stored.size))
        return store.commit(repository, "main", operations, title=str(number), message="", author="alice").oid
"""
LOOP = """
    repository = store.find_repository("model", "alice/m") or store.create_repository(
        "model", "alice", "m", private=False, author="alice"
    )
    start = len(store.commits(repository, store.resolve(repository, "main"), count=100000))
    lock = threading.Lock()

    def work(worker):
        number = start * 10 + worker
        while True:
            oid = commit(repository, number, f"w{worker}")
            number += 10
            with lock:
                os.write(1, json.dumps([oid, number - 10, f"w{worker}"]).encode() + b"\\n")

    for worker in range(3):
        threading.Thread(target=work, args=(worker,)).start()
"""
STEPS = """
    # A child is killed just before its n-th statement, for every n: before, in and after the transaction.
    repository = store.create_repository("model", "alice", "m", private=False, author="alice")
    commit(repository, 0, "w")
    store.close()
    root, steps = Path(sys.argv[1]), int(sys.argv[2])
    acknowledged, read_end, write_end = None, *os.pipe()
    for step in range(steps):
        child = os.fork()
        if child == 0:
            left = iter(range(step))

            def count(statement):
                if next(left, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)

            store = Store(root)
            store.database._connection.set_trace_callback(count)
            os.write(write_end, f"{commit(repository, step + 1, 'w')}\\n".encode())
            made = store.create_repository("model", "alice", f"n{step}", private=False, author="alice")
            store.propose(made, "main", [], title="t", message="", author="alice")
            store.create_tag(made, "v1", at="main")
            store.move_repository(made, owner="alice", name=f"moved{step}")
            store.delete_repository(made)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(json.dumps([step, os.WIFSIGNALED(status)]), flush=True)
        verify(root, step)
        if not os.WIFSIGNALED(status):
            break
    os.close(write_end)
    print(json.dumps(["acknowledged", open(read_end).read().split()]), flush=True)
"""
OPENING = """
    # The same for a root that is being made.
    import os, signal, sqlite3, sys
    from pathlib import Path
    from harness.hub.fsck import fsck
    from harness.hub.store import Store

    connect = sqlite3.connect

    def open_and_die(root, step):
        left = iter(range(step))

        def count(statement):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        def traced(*arguments, **keywords):
            connection = connect(*arguments, **keywords)
            connection.set_trace_callback(count)
            return connection

        sqlite3.connect = traced
        Store(root)
        os._exit(0)

    for step in range(100):
        root = Path(sys.argv[1]) / str(step)
        child = os.fork()
        if child == 0:
            open_and_die(root, step)
        _, status = os.waitpid(child, 0)
        store = Store(root)
        store.create_repository("model", "alice", "m", private=False, author="alice")
        store.close()
        assert fsck(root) == [], step
        if not os.WIFSIGNALED(status):
            print(step)
            break
"""


def program(*parts: str) -> str:
    return "".join(textwrap.dedent(part) for part in parts)


def whole(store: Store, oid: str) -> None:
    """Every folder of a commit has its files, and all say one number."""
    repository = store.find_repository("model", "alice/m")
    assert repository is not None
    for folder in store.entries(repository, oid, recursive=False):
        if not folder.directory:
            continue
        entries = store.entries(repository, oid, folder.path, recursive=True)
        names = [entry.path.removeprefix(f"{folder.path}/") for entry in entries]
        assert names == ["a.txt", "sub", "sub/b.txt", "w.bin"]
        texts = {
            name: store.blobs.path(entry.sha256).read_bytes()
            for name, entry in zip(names, entries, strict=True)
            if entry.sha256
        }
        number = texts["a.txt"].removesuffix(b"a.txt")
        assert texts["sub/b.txt"] == number + b"sub/b.txt" and texts["w.bin"] == number * 1000


def test_a_server_that_is_killed_loses_no_acknowledged_commit(tmp_path: Path) -> None:
    root, draw = tmp_path / "root", random.Random(20240229)
    acknowledged: list[tuple[str, int, str]] = []
    for _ in range(ROUNDS):
        child = subprocess.Popen(
            [sys.executable, "-c", program(COMMON, LOOP), str(root)], stdout=subprocess.PIPE, start_new_session=True
        )
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(draw.randrange(1, 25))]
        time.sleep(draw.random() * 0.01)
        os.kill(child.pid, signal.SIGKILL)
        lines += child.stdout.readlines()
        child.wait()
        child.stdout.close()
        acknowledged += [tuple(json.loads(line)) for line in lines if line.endswith(b"\n")]
        assert fsck(root) == []
        store = Store(root)
        repository = store.find_repository("model", "alice/m")
        assert repository is not None and not list(store.blobs.unfinished.iterdir())
        line = store.commits(repository, store.resolve(repository, "main"), count=100_000)
        assert {oid for oid, _, _ in acknowledged} <= {commit.oid for commit in line}
        # At most one commit of each thread landed whose acknowledgement did not come.
        assert len(acknowledged) + 1 <= len(line) <= len(acknowledged) + 1 + 3 * ROUNDS
        for commit in line[:30]:
            whole(store, commit.oid)
        store.close()
    assert len(acknowledged) >= ROUNDS


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_before_each_statement(tmp_path: Path) -> None:
    """All moments that differ for the metadata, one after the other."""
    check = """
    from harness.hub.fsck import fsck

    def verify(root, step):
        problems = fsck(root)
        assert not problems, (step, problems)
        store = Store(root)
        commits = store.commits(repository, store.resolve(repository, "main"), count=100000)
        head = store.entry(repository, commits[0].oid, "w/a.txt")
        assert store.blobs.path(head.sha256).read_bytes() == commits[0].title.encode() + b"a.txt"
        (made,) = store.database.read("SELECT count(*) FROM histories WHERE repository = ?", (repository.key,))
        assert made == (len(commits),), "a commit that stands on no branch"
        for other in store.repositories("model"):
            for ref in store.refs(other):
                if ref.full == "refs/pr/1":
                    assert store.commit_of(other, ref.oid).parent == store.resolve(other, "main"), "an empty proposal"
        print(json.dumps([step, "head", commits[0].oid]), flush=True)
        store.close()
    """
    done = subprocess.run(
        [sys.executable, "-c", program(COMMON, check, STEPS), str(tmp_path / "root"), "200"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    killed = [line for line in said if len(line) == 2 and line[1] is True]
    assert 40 < len(killed) < 199, "the last child is to run to its end"
    store = Store(tmp_path / "root")
    repository = store.find_repository("model", "alice/m")
    assert repository is not None
    line = [commit.oid for commit in store.commits(repository, store.resolve(repository, "main"), count=1000)]
    (acknowledged,) = [line[1] for line in said if line[0] == "acknowledged"]
    assert acknowledged and set(acknowledged) <= set(line)
    heads = [line[2] for line in said if line[1] == "head"]
    # Each head is that of the step before, or one commit on.
    parents = dict(itertools.pairwise(line))
    for before, after in itertools.pairwise(heads):
        assert after == before or parents[after] == before
    store.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_while_a_root_is_made(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", program(OPENING), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 15  # So many moments were tried, and then one that is not killed.
