"""HTTP/1.1 connections for uvicorn.Server, each with one deadline whatever its state; h11 does the parsing."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import uvicorn
from uvicorn.server import ServerState

from iosr_fast.serving.http.exchange import Exchange
from iosr_fast.serving.http.framing import Refused, find_head, read_head, split_target
from iosr_fast.serving.http.metrics import Metrics
from iosr_fast.serving.http.settings import Settings

_LINGER_S = 5.0  # for what a client still sends after its answer: closed at once, it might not see the answer


class Edge:
    """What the connections of one server share. `protocol` is uvicorn's `http`."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings, self.metrics = settings, metrics
        self.waiting: dict[Connection, None] = {}  # for their clients; who keeps it waiting longest comes first

    def protocol(
        self, config: uvicorn.Config, server_state: ServerState, app_state: dict[str, Any], _loop: Any = None
    ) -> Connection:
        return Connection(self, config, server_state)

    def make_room(self, newest: Connection) -> None:
        """Drop the connection that has waited longest for its client, `newest` where all others are being answered."""
        oldest = next(iter(self.waiting))
        if oldest is newest:
            newest.refuse(Refused(503, "busy", "too many connections; try again"))
        else:
            self.metrics.on_error("connection_dropped")
            oldest.abort()


class Connection(asyncio.Protocol):
    """Requests one after another. What is sent ahead of its turn stays in the kernel: nothing is read meanwhile.

    A client is waited for in four states, each with a time that no byte prolongs:

    - a head: `keep_alive_s` until it begins, `header_timeout_s` for the first one and from its first byte (408),
    - a body: `body_timeout_s` (BoundedBody, 408),
    - an answer that it does not take: `body_timeout_s`,
    - the rest of a body that was answered already, or its end of the connection: some seconds and `max_body_bytes`.

    It is closed after a request that is not strictly HTTP/1.1 or 1.0, an upgrade is never made, and where there are
    more than `max_connections` the one that has waited longest for its client makes room.
    """

    transport: asyncio.Transport

    def __init__(self, edge: Edge, config: uvicorn.Config, server_state: ServerState) -> None:
        self._edge, self._settings = edge, edge.settings
        self._app, self._state = config.loaded_app, server_state
        self._buffer = bytearray()  # what comes before a head is whole
        self._searched = 0  # bytes of it
        self._begun = self._blank = False  # a head; a blank line before it
        self._exchange: Exchange | None = None
        self._unread = 0  # bytes received after the answer
        self._closing = False  # after the answer that is under way
        self._drained = False  # nothing is read any more but to be dropped
        self._timer: asyncio.TimerHandle | None = None
        self._writable = asyncio.Event()
        self._writable.set()

    # --- what asyncio calls ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one, but not by inheritance
        self._state.connections.add(self)  # type: ignore[arg-type]
        self._wait(self._settings.header_timeout_s)
        if len(self._state.connections) > self._settings.max_connections:
            self._edge.make_room(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._state.connections.discard(self)
        self._stop_waiting()
        self._leave()

    def eof_received(self) -> None:
        """The client closed its side: it is gone or sends nothing more, which looks the same. Drop the request.

        The transport closes when it has sent what was written. Nothing is read while an answer is made, unless the
        application waits for the client to go: to half-close does no harm before that.
        """
        self._leave()
        self._wait(_LINGER_S)

    def data_received(self, data: bytes) -> None:
        if self._drained:
            self._drop(len(data))
        elif self._exchange is not None and not self._exchange.body.whole:
            self._receive(self._exchange, data)
        else:
            self._buffer += data
            if self._exchange is None:
                self._begin()
            elif len(self._buffer) > self._settings.max_header_bytes:
                self.pause_reading()

    def pause_writing(self) -> None:
        self._writable.clear()
        if not self._drained:
            self._wait(self._settings.body_timeout_s)

    def resume_writing(self) -> None:
        self._writable.set()
        if not self._drained and not self.transport.is_closing():
            self._stop_waiting()

    # --- what uvicorn.Server calls ---

    def shutdown(self) -> None:
        """Close, after the answer that is under way."""
        self._closing = True
        if self._exchange is None and not self._drained:
            self._wait(_LINGER_S)
            self.transport.close()

    # --- what an exchange calls ---

    def pause_reading(self) -> None:
        if not self.transport.is_closing():
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """Those of every answer."""
        return [*self._state.default_headers, *([(b"connection", b"close")] if self._closing else [])]

    async def write(self, data: bytes) -> None:
        """Returns when it has room for more."""
        if not self.transport.is_closing():
            self.transport.write(data)
            await self._writable.wait()

    def answered(self, exchange: Exchange) -> None:
        """The answer is written; the body may not have come whole."""
        self._closing = self._closing or not exchange.keeps_alive
        if self._closing:
            self._drain()
        elif exchange.body.whole:
            self._next()
        else:
            self._unread = 0
            self._wait(_LINGER_S)
            self.resume_reading()

    def abort(self) -> None:
        """Close at once, unsent bytes included; the application gets http.disconnect."""
        self._stop_waiting()
        self._leave()
        self.transport.abort()

    # --- heads and bodies ---

    def _next(self) -> None:
        """Wait for another head, or take the one that has come already."""
        self._exchange = None
        self._searched, self._begun, self._blank = 0, False, False
        self._wait(self._settings.keep_alive_s)
        self.resume_reading()
        self._begin()

    def _begin(self) -> None:
        buffer = self._buffer
        if buffer.startswith(b"\r\n") and not self._blank:
            self._blank = True  # one is ignored, as the RFC wants it; it is no head that has begun
            del buffer[:2]
        if not buffer or (buffer == b"\r" and not self._blank):
            return
        try:
            size = find_head(buffer, self._searched, self._settings.max_header_bytes)
            self._searched = len(buffer)
            if size:
                head = bytes(buffer[:size])
                del buffer[:size]
                self._start(head)
            elif not self._begun:
                self._begun = True
                self._wait(self._settings.header_timeout_s)
        except Refused as refused:
            self.refuse(refused)

    def _start(self, head: bytes) -> None:
        connection, request = read_head(head)
        path, raw_path, query, headers = split_target(request)
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": request.http_version.decode("ascii"),
            "server": self._address("sockname"),
            "client": self._address("peername"),
            "scheme": "http",
            "method": request.method.decode("ascii"),
            "root_path": "",
            "path": path,
            "raw_path": raw_path,
            "query_string": query,
            "headers": headers,
        }
        exchange = self._exchange = Exchange(self, connection, request, scope)
        self._wait(None)
        body, self._buffer = bytes(self._buffer), bytearray()
        self._receive(exchange, body)
        if not self._drained:
            task = asyncio.get_running_loop().create_task(exchange.run(self._app))
            self._state.tasks.add(task)
            task.add_done_callback(self._state.tasks.discard)

    def _address(self, whose: str) -> tuple[str, int] | None:
        found = self.transport.get_extra_info(whose)
        return found[:2] if found else None  # None where the client is gone by now

    def _receive(self, exchange: Exchange, data: bytes) -> None:
        try:
            exchange.receive_data(data)
        except Refused as refused:
            self.refuse(refused)
            return
        if exchange.body.whole:
            self._buffer += exchange.body.rest
            if not exchange.complete:
                self._stop_waiting()
                self.pause_reading()
            elif self._closing:
                self._drain()
            else:
                self._next()
        elif exchange.complete:
            self._drop(len(data))

    # --- ends ---

    def refuse(self, refused: Refused) -> None:
        """Answer what is no request, or can't be read on, and close; only close where an answer has begun."""
        if self._exchange is not None and self._exchange.started:
            self.abort()
            return
        self._edge.metrics.on_error(refused.code)
        self.transport.write(refused.answer())
        self._leave()
        self._drain()

    def _drain(self) -> None:
        """Say that nothing more will be sent, and read what the client still sends, so that it sees its answer."""
        self._drained, self._unread = True, 0
        self._buffer.clear()
        if not self.transport.is_closing():
            self._wait(_LINGER_S)
            self.transport.write_eof()
            self.transport.resume_reading()

    def _drop(self, count: int) -> None:
        self._unread += count
        if self._unread > self._settings.max_body_bytes:
            self.abort()

    def _leave(self) -> None:
        """Nobody is there to be answered."""
        self._writable.set()
        if self._exchange is not None:
            self._exchange.disconnect()

    def _wait(self, seconds: float | None) -> None:
        """From now on it is the client that is waited for, for so long; None: somebody else looks at the time."""
        self._stop_waiting()
        self._edge.waiting[self] = None
        if seconds is not None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._expire)

    def _stop_waiting(self) -> None:
        self._edge.waiting.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        if self._exchange is None and self._begun and not self._drained:
            seconds = self._settings.header_timeout_s
            self.refuse(Refused(408, "headers_too_slow", f"expected all headers within {seconds:g} s"))
        else:
            self.abort()
