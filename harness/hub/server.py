# SPDX-License-Identifier: Apache-2.0
"""A Hub from start to stop: a store below a directory, the accounts in it, and the server in front of both."""

from __future__ import annotations

import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from harness.errors import DescriptionError
from harness.hub.accounts import Accounts, Organisation, User
from harness.hub.api import handler
from harness.hub.api.admin import ROOT as ADMIN
from harness.hub.api.calls import TYPES, Hub, Sizes
from harness.hub.environment import client_environment, is_loopback
from harness.hub.faults import Fault, Faults
from harness.hub.journal import Journal
from harness.hub.refusals import Refusal
from harness.hub.store import Store
from harness.hub.wire import Limits, Wire

ALICE = User(name="alice", token="hf_alice")

LOG = "server.log"
SECRET_BYTES = 32
UPLOAD_SECONDS = 24 * 3600.0
"""How long the parts of an upload are kept for a client that goes on with it."""


class HubServer:
    """A Hugging Face Hub on this machine, for the unmodified client.

        with HubServer(tmp_path / "hub") as hub:
            subprocess.run([sys.executable, "push.py"], env={**os.environ, **hub.env()}, check=True)

    A client reads its address when it is imported: it has to start with the environment of `env`.

    root: an existing or new directory, for this Hub alone; what was pushed to it is there again at the next start.
    users, organisations: made known at every start, besides those that `root` knows already.
    host: an address of this machine. Others reach it only with allow_remote: there is no encryption.
    port: 0 takes a free one. share_port: lets another socket of this user keep the port while no server runs.
    faults_over_http: whether `/__hub__/faults` and `/__hub__/journal` are there. clock: the time commits get.
    log: called with each line of the log; without it they go to `server.log` below root.
    Raises DescriptionError for an address that is not loopback, and for a root that another server has.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        users: Sequence[User] = (ALICE,),
        organisations: Sequence[Organisation] = (),
        host: str = "127.0.0.1",
        port: int = 0,
        share_port: bool = False,
        allow_remote: bool = False,
        faults_over_http: bool = False,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        log: Callable[[str], None] | None = None,
        limits: Limits | None = None,
        sizes: Sizes | None = None,
    ) -> None:
        if not allow_remote and not is_loopback(host):
            raise DescriptionError(
                f"{host} is not a loopback address, and whoever reaches this Hub could read and write without"
                " encryption; use 127.0.0.1, or allow it (--allow-remote)"
            )
        if host in ("0.0.0.0", "::", ""):
            raise DescriptionError(
                f"{host!r} is every address of this machine and none that a client could be sent to; give one of them"
            )
        self.root = Path(root)
        self.faults = Faults()
        self.journal = Journal()
        self._users, self._organisations = users, organisations
        self._host, self._port, self._share_port = host, port, share_port
        self._faults_over_http = faults_over_http
        self._clock = clock
        self._limits, self._sizes = limits or Limits(), sizes or Sizes()
        self._log = log or self._write_log
        self._log_lock = threading.Lock()
        self._store: Store | None = None
        self._wire: Wire | None = None
        self._accounts: Accounts | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Opens the store and begins to answer. After `stop` it is on the same port, with everything that was there."""
        store = Store(self.root, clock=self._clock)
        try:
            accounts = Accounts(store.database, clock=self._clock)
            for user in self._users:
                accounts.add_user(user)
            for organisation in self._organisations:
                accounts.add_organisation(organisation)
            uploads = self.root / "uploads"
            _remove_old(uploads)
            hub = Hub(
                store=store,
                accounts=accounts,
                url=lambda: self.url,
                faults=self.faults,
                journal=self.journal,
                uploads=uploads,
                secret=_secret(self.root / "secret"),
                faults_over_http=self._faults_over_http,
                sizes=self._sizes,
            )
            wire = Wire(
                handler(hub),
                host=self._host,
                port=self._port,
                limits=self._limits,
                faults=self.faults,
                journal=self.journal,
                log=self._log,
                move=self._move,
                share_port=self._share_port,
                aside=f"/{ADMIN}/",
            )
            wire.start()
        except BaseException:
            store.close()
            raise
        self._store, self._accounts, self._wire, self._port = store, accounts, wire, wire.port

    def stop(self) -> None:
        """Ends every connection and closes the store. From then on clients are refused."""
        if self._wire is not None:
            self._wire.stop()
        if self._store is not None:
            self._store.close()
        self._wire = self._store = self._accounts = None

    @property
    def port(self) -> int:
        """The port, 0 before the first start where a free one was asked for."""
        return self._port

    @property
    def url(self) -> str:
        """The address, without a slash at its end: what HF_ENDPOINT is set to."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._port}"

    @property
    def store(self) -> Store:
        """Repositories and their content, of a Hub that runs."""
        if self._store is None:
            raise RuntimeError("a Hub has its store while it runs: inside its with statement")
        return self._store

    @property
    def accounts(self) -> Accounts:
        """Users and their rights, of a Hub that runs."""
        if self._accounts is None:
            raise RuntimeError("a Hub has its accounts while it runs: inside its with statement")
        return self._accounts

    def env(self, *, token: str | bool | None = True, home: str | Path | None = None) -> dict[str, str]:
        """What a client's environment needs, see `client_environment`.

        token: True is the first user's; False and None are nobody's. home: `client` below root where none is given.
        """
        if isinstance(token, bool):
            token = self._users[0].token if token and self._users else None
        return client_environment(self.url, token=token, home=self.root / "client" if home is None else Path(home))

    def inject(self, *faults: Fault) -> None:
        """Has requests meet faults from now on; the first one that matches acts."""
        self.faults.add(*faults)

    def clear_faults(self) -> None:
        """Takes all faults away."""
        self.faults.clear()

    def _move(self, move: Mapping[str, str]) -> None:
        """Moves a branch, between an answer and its arrival."""
        repository = self.store.find_repository(TYPES.get(move.get("type", "models"), "model"), move["repository"])
        if repository is None:
            raise Refusal(kind="no_repository", message=f"a fault moves {move['repository']}, which is not here")
        self.store.set_branch(repository, move.get("branch", "main"), to=move["to"])

    def _write_log(self, line: str) -> None:
        with self._log_lock, open(self.root / LOG, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(line + "\n")


def _secret(path: Path) -> bytes:
    """Signs upload addresses; kept, so that an upload goes on when the server was started again."""
    secret = path.read_bytes() if path.exists() else b""
    if len(secret) != SECRET_BYTES:  # also where a server was killed before it was written
        secret = secrets.token_bytes(SECRET_BYTES)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(secret)
    return secret


def _remove_old(uploads: Path) -> None:
    """Takes away what is left of uploads in parts that nobody goes on with."""
    for upload in uploads.glob("*"):
        if upload.stat().st_mtime < time.time() - UPLOAD_SECONDS:
            shutil.rmtree(upload, ignore_errors=True)
    for part in uploads.glob("*/*.unfinished"):
        part.unlink()
