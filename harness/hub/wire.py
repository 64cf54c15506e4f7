# SPDX-License-Identifier: Apache-2.0
"""An HTTP/1.1 server on sockets and threads: takes requests to a handler and its answers back, faults and all."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import selectors
import socket
import struct
import threading
import time
import traceback
from collections.abc import Callable, Mapping

from harness.hub import parsing, sending
from harness.hub.faults import Fault, Faults
from harness.hub.journal import Journal
from harness.hub.messages import Handler, Request, Response, json_response, refused
from harness.hub.receiving import IncomingBody, Limits, Stream
from harness.hub.refusals import Refusal

__all__ = ["Limits", "Wire", "reserved_port"]

BACKLOG = 1024
TURNED_AWAY = 64
NOTED = 200


def reserved_port(host: str = "127.0.0.1") -> socket.socket:
    """A socket that keeps a port of its own choice (`getsockname()[1]`) for a Wire with `share_port=True`.

    It does not listen: while no server does, connections to the port are refused. The port is free after its close().
    """
    keeper = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    keeper.bind((host, 0))
    return keeper


@dataclasses.dataclass(frozen=True)
class _Client:
    number: int
    socket: socket.socket
    stream: Stream


@dataclasses.dataclass(kw_only=True)
class _Exchange:
    """What is known so far of one request; `body` is None until its head was understood."""

    id: str
    client: _Client
    began: float
    method: str = ""
    target: str = ""
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    body: IncomingBody | None = None
    keep_alive: bool = False
    fault: Fault | None = None
    aside: bool = False


class Wire:
    """Serves one handler. May be started again after it was stopped, on the same port; a thread per connection.

    port: 0 lets the system choose at the first start. share_port: another socket of the same user may be bound to the
    port meanwhile, see `reserved_port`. log: gets what an operator must know, a handler's traceback for one. move:
    called with a fault's `move`. aside: requests whose target begins so meet no faults and stay out of the journal.
    """

    def __init__(
        self,
        handler: Handler,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        limits: Limits | None = None,
        faults: Faults,
        journal: Journal,
        log: Callable[[str], None],
        move: Callable[[Mapping[str, str]], None],
        share_port: bool = False,
        aside: str | None = None,
    ) -> None:
        self.host, self.port = host, port
        self._handler = handler
        self._limits = limits or Limits()
        self._faults = faults
        self._journal = journal
        self._log = log
        self._move = move
        self._share_port = share_port
        self._aside = aside
        self._series = os.urandom(4).hex()
        self._numbers = itertools.count(1)
        self._client_numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._clients: dict[int, _Client] = {}
        self._threads: list[threading.Thread] = []
        self._stopping = threading.Event()
        self._listener: socket.socket | None = None
        self._bell: tuple[socket.socket, socket.socket] | None = None

    @property
    def url(self) -> str:
        """Where it serves."""
        return f"http://{self.host}:{self.port}"

    def start(self) -> None:
        """Binds, listens and serves in daemon threads. Raises OSError where the port is taken."""
        if self._listener is not None:
            raise RuntimeError("this server was started already")
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if self._share_port:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind((self.host, self.port))
            listener.listen(BACKLOG)
            listener.setblocking(False)
        except BaseException:
            listener.close()
            raise
        self.port = listener.getsockname()[1]
        self._stopping.clear()
        self._listener, self._bell = listener, socket.socketpair()
        accepting = threading.Thread(target=self._accept, name=f"hub {self.port} accepting", daemon=True)
        self._threads = [accepting]
        accepting.start()

    def stop(self) -> None:
        """Closes the listener and every connection; returns when every thread has ended. Does nothing if stopped."""
        listener, bell = self._listener, self._bell
        if listener is None or bell is None:
            return
        self._stopping.set()
        # Another process that was forked meanwhile may hold the listener too: close alone would not end it.
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        bell[1].send(b"!")
        self._threads[0].join()
        for one in (listener, *bell):
            one.close()
        with self._lock:
            for client in self._clients.values():
                with contextlib.suppress(OSError):
                    client.socket.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            if thread is not threading.current_thread():
                thread.join()
        self._threads = []
        self._listener = self._bell = None

    def _accept(self) -> None:
        assert self._listener is not None
        assert self._bell is not None
        turned_away: dict[socket.socket, float] = {}
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._bell[0], selectors.EVENT_READ)
            while not self._stopping.is_set():
                ready = [key.fileobj for key, _ in selector.select(timeout=0.1 if turned_away else None)]
                for one in ready:
                    if one is self._listener:
                        self._accept_one(self._listener, turned_away, selector)
                self._let_go(turned_away, selector)
            for one in turned_away:
                one.close()

    def _accept_one(
        self, listener: socket.socket, turned_away: dict[socket.socket, float], selector: selectors.BaseSelector
    ) -> None:
        try:
            connection, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError:
            # No file descriptor is left, or the client is gone again: others still have theirs.
            self._stopping.wait(0.01)
            return
        try:
            if len(self._clients) < self._limits.connections and self._serve_in_thread(connection):
                return
            connection.setblocking(False)
            connection.send(self._busy())
            connection.shutdown(socket.SHUT_WR)
            if len(turned_away) < TURNED_AWAY:
                turned_away[connection] = time.monotonic() + self._limits.linger_seconds
                selector.register(connection, selectors.EVENT_READ)
                return
        except OSError:
            pass
        connection.close()

    def _let_go(self, turned_away: dict[socket.socket, float], selector: selectors.BaseSelector) -> None:
        """Reads what clients without a place still send, so that they get to read why, and forgets those done."""
        for connection, deadline in list(turned_away.items()):
            try:
                done = not connection.recv(65536)
            except BlockingIOError:
                done = False
            except OSError:
                done = True
            if done or time.monotonic() > deadline:
                del turned_away[connection]
                selector.unregister(connection)
                connection.close()

    def _busy(self) -> bytes:
        request_id = self._new_id()
        message = f"This server has {self._limits.connections} connections, which is all it takes."
        response = refused(Refusal(kind="busy", message=message), request_id=request_id)
        assert isinstance(response.content, bytes)
        pieces = (response.content,)
        answer = sending.answer_to("", response, pieces, request_id=request_id, keep_alive=False)
        return answer.head + response.content

    def _serve_in_thread(self, connection: socket.socket) -> bool:
        connection.setblocking(True)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        seconds = self._limits.idle_seconds
        timeout = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
        client = _Client(next(self._client_numbers), connection, Stream(connection, limits=self._limits))
        thread = threading.Thread(
            target=self._serve, args=(client,), name=f"hub {self.port} client {client.number}", daemon=True
        )
        with self._lock:
            self._clients[client.number] = client
            self._threads = [one for one in self._threads if one.is_alive()] + [thread]
        try:
            thread.start()
        except RuntimeError:
            with self._lock:
                del self._clients[client.number]
                self._threads.remove(thread)
            return False
        return True

    def _serve(self, client: _Client) -> None:
        try:
            with contextlib.suppress(OSError):
                while self._answer_next(client):
                    pass
                if client.socket.fileno() != -1:
                    client.socket.shutdown(socket.SHUT_WR)
                    client.stream.discard()
        finally:
            with self._lock:
                del self._clients[client.number]
                client.socket.close()

    def _answer_next(self, client: _Client) -> bool:
        """Whether the connection may carry another request. Raises OSError where the client is gone."""
        refusal = None
        try:
            head = client.stream.head()
            if head is None:
                return False
        except Refusal as error:
            head, refusal = b"", error
        exchange = _Exchange(id=self._new_id(), client=client, began=time.perf_counter())
        if refusal is None:
            try:
                request = self._understand(exchange, head)
            except Refusal as error:
                refusal = error
        if refusal is not None:
            return self._send(exchange, refused(refusal, request_id=exchange.id))
        return self._exchange(exchange, request)

    def _understand(self, exchange: _Exchange, head: bytes) -> Request:
        first, *others = head.split(b"\r\n")
        line = parsing.request_line(first, target_bytes=self._limits.target_bytes)
        exchange.method, exchange.target = line.method, line.target
        headers = exchange.headers = parsing.header_fields(others, limit=self._limits.headers)
        framing = parsing.framing(line, headers)
        path, query = parsing.target_parts(line)
        exchange.aside = self._aside is not None and line.target.startswith(self._aside)
        fault = exchange.fault = None if exchange.aside else self._faults.take(line.method, line.target)
        exchange.keep_alive = framing.keep_alive
        exchange.body = IncomingBody(
            exchange.client.stream,
            exchange.client.socket,
            length=framing.length,
            expects_continue=framing.expects_continue,
            limits=self._limits,
            cut_after=None if fault is None else fault.reset_upload_after,
        )
        if fault is not None and fault.ignore_range:
            headers = {name: value for name, value in headers.items() if name != "range"}
        return Request(
            id=exchange.id,
            method=line.method,
            target=line.target,
            path=path,
            query=query,
            headers=headers,
            body=exchange.body,
        )

    def _exchange(self, exchange: _Exchange, request: Request) -> bool:
        fault, body = exchange.fault, exchange.body
        assert body is not None
        if fault is not None and fault.delay is not None and self._stopping.wait(fault.delay):
            return False
        if fault is not None and (fault.reset_before or fault.close_before or body.cut):
            if fault.close_before:
                body.drain()
            return self._say_nothing(exchange)
        response = self._handled(exchange, request)
        body.drain()
        if body.cut or (fault is not None and fault.apply_then_reset):
            return self._say_nothing(exchange)
        if fault is not None and fault.move is not None:
            response = self._guarded(exchange, lambda: self._moved(response, fault))
        exchange.keep_alive = exchange.keep_alive and body.complete
        return self._send(exchange, response)

    def _handled(self, exchange: _Exchange, request: Request) -> Response:
        fault = exchange.fault
        if fault is not None and fault.status is not None:
            if fault.content is None:
                return Response(status=fault.status, headers=fault.headers or {})
            return json_response(fault.content, status=fault.status, headers=fault.headers)
        return self._guarded(exchange, lambda: self._handler(request))

    def _moved(self, response: Response, fault: Fault) -> Response:
        self._move(fault.move or {})
        return response

    def _guarded(self, exchange: _Exchange, work: Callable[[], Response]) -> Response:
        """The answer, whatever happens in the work."""
        try:
            try:
                return work()
            except Refusal as error:
                return refused(error, request_id=exchange.id)
        except BaseException:  # A thread has nobody above it who could want a SystemExit.
            return self._failed(exchange)

    def _failed(self, exchange: _Exchange) -> Response:
        self._log(f"{exchange.id} {exchange.method} {exchange.target} failed:\n{traceback.format_exc()}")
        message = f"The server failed on this request; its log says why, under {exchange.id}."
        return refused(Refusal(kind="failed", message=message), request_id=exchange.id)

    def _send(self, exchange: _Exchange, response: Response) -> bool:
        with contextlib.ExitStack() as open_files:
            try:
                answer = self._prepared(exchange, response, open_files)
            except Exception:
                response = self._failed(exchange)
                answer = self._prepared(exchange, response, open_files)
            self._record(exchange, status=response.status, content_length=answer.content_length)
            return sending.send(exchange.client.socket, answer, exchange.fault, stopping=self._stopping)

    def _prepared(self, exchange: _Exchange, response: Response, open_files: contextlib.ExitStack) -> sending.Answer:
        return sending.answer_to(
            exchange.method,
            response,
            open_files.enter_context(sending.opened(response.content)),
            request_id=exchange.id,
            keep_alive=exchange.keep_alive and not self._stopping.is_set(),
            fault=exchange.fault,
        )

    def _say_nothing(self, exchange: _Exchange) -> bool:
        """Ends the connection without an answer: by reset, unless the fault wants a clean end."""
        self._record(exchange, status=None, content_length=None)
        if exchange.fault is None or not exchange.fault.close_before:
            sending.reset(exchange.client.socket)
        return False

    def _record(self, exchange: _Exchange, *, status: int | None, content_length: int | None) -> None:
        if exchange.aside:
            return
        headers = exchange.headers
        self._journal.record(
            request_id=exchange.id,
            method=exchange.method,
            target=exchange.target,
            status=status,
            range=_shortened(headers.get("range")),
            authorised="authorization" in headers,
            user_agent=_shortened(headers.get("user-agent")),
            content_length=content_length,
            received=exchange.body.received if exchange.body is not None else 0,
            connection=exchange.client.number,
            seconds=time.perf_counter() - exchange.began,
            fault=exchange.fault.match if exchange.fault is not None else None,
        )

    def _new_id(self) -> str:
        return f"{self._series}-{next(self._numbers)}"


def _shortened(text: str | None) -> str | None:
    """What may be kept ten thousand times."""
    return None if text is None else text[:NOTED]
