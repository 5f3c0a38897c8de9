"""HTTP/1.1 connections for uvicorn.Server, parsed by h11, with a deadline in every state."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import uvicorn
from uvicorn.server import ServerState

from iosr_fast.serving.http.exchange import Exchange
from iosr_fast.serving.http.framing import Refused, find_head, read_head, split_target
from iosr_fast.serving.http.metrics import Metrics
from iosr_fast.serving.http.settings import Settings

_HEAD_S = 10.0  # from its first byte to its last
_KEEP_ALIVE_S = 65.0
_MAX_HEAD_BYTES = 64 << 10  # with 100 headers and 8 KiB for the request line
_LINGER_S = 5.0  # to read what a client still sends after its answer; if closed at once, it might miss the answer


class Edge:
    """Shared by all connections of a server. `protocol` is the `http` option of uvicorn."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings, self.metrics = settings, metrics
        self.waiting: dict[Connection, None] = {}  # connections that wait for their client, longest first

    def protocol(
        self, config: uvicorn.Config, server_state: ServerState, app_state: dict[str, Any], _loop: Any = None
    ) -> Connection:
        return Connection(self, config, server_state)

    def make_room(self, newest: Connection) -> None:
        """Close the connection that has waited longest for its client; refuse `newest` if all others are busy."""
        oldest = next(iter(self.waiting))
        if oldest is newest:
            newest.refuse(Refused(503, "busy", "too many connections; try again"))
        else:
            self.metrics.on_error("connection_dropped")
            oldest.abort()


class Connection(asyncio.Protocol):
    """Handles one request after another. Pipelined requests stay in the kernel until it is their turn.

    The connection waits for its client in four states. Each has a timeout that no received byte extends:

    - for a head: _HEAD_S for the first one, _KEEP_ALIVE_S until a later one begins, and then _HEAD_S from its first
      byte (408),
    - for a body: `body_timeout_s` (BoundedBody, 408),
    - until the client reads its answer: `body_timeout_s`,
    - for the rest of a body that is already answered, or the client's close: _LINGER_S and `max_body_bytes`.

    It closes after a request that is not strictly HTTP/1.1 or 1.0, and never upgrades. Beyond `max_connections`, the
    connection that has waited longest for its client is closed.
    """

    transport: asyncio.Transport

    def __init__(self, edge: Edge, config: uvicorn.Config, server_state: ServerState) -> None:
        self._edge, self._settings = edge, edge.settings
        self._app, self._state = config.loaded_app, server_state
        self._buffer = bytearray()  # of an incomplete head
        self._searched = 0  # bytes of the buffer
        self._begun = self._blank = False  # whether a head has begun; whether a blank line was skipped
        self._exchange: Exchange | None = None
        self._unread = 0  # bytes dropped after the answer
        self._closing = False  # close after the current answer
        self._drained = False  # received bytes are dropped
        self._timer: asyncio.TimerHandle | None = None
        self._writable = asyncio.Event()
        self._writable.set()

    # --- called by asyncio ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's transport does not inherit from it
        self._state.connections.add(self)  # type: ignore[arg-type]
        self._wait(_HEAD_S)
        if len(self._state.connections) > self._settings.max_connections:
            self._edge.make_room(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._state.connections.discard(self)
        self._stop_waiting()
        self._leave()

    def eof_received(self) -> None:
        """The client closed its side. It may be disconnected, so drop the request.

        The transport closes after it has sent all written data. Reading is paused while an answer is computed, unless
        the application waits for a disconnect, so a half-close has no effect before that.
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
            elif len(self._buffer) > _MAX_HEAD_BYTES:
                self.pause_reading()

    def pause_writing(self) -> None:
        self._writable.clear()
        if not self._drained:
            self._wait(self._settings.body_timeout_s)

    def resume_writing(self) -> None:
        self._writable.set()
        if not self._drained and not self.transport.is_closing():
            self._stop_waiting()

    # --- called by uvicorn.Server ---

    def shutdown(self) -> None:
        """Close after the current answer."""
        self._closing = True
        if self._exchange is None and not self._drained:
            self._wait(_LINGER_S)
            self.transport.close()

    # --- called by the exchange ---

    def pause_reading(self) -> None:
        if not self.transport.is_closing():
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """Headers of every answer."""
        return [*self._state.default_headers, *([(b"connection", b"close")] if self._closing else [])]

    async def write(self, data: bytes) -> None:
        """Returns when the transport has room for more."""
        if not self.transport.is_closing():
            self.transport.write(data)
            await self._writable.wait()

    def answered(self, exchange: Exchange) -> None:
        """The answer is written; the body may be incomplete."""
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
        """Close at once and drop unsent bytes; the application gets http.disconnect."""
        self._stop_waiting()
        self._leave()
        self.transport.abort()

    # --- heads and bodies ---

    def _next(self) -> None:
        """Wait for the next head, or take the one in the buffer."""
        self._exchange = None
        self._searched, self._begun, self._blank = 0, False, False
        self._wait(_KEEP_ALIVE_S)
        self.resume_reading()
        self._begin()

    def _begin(self) -> None:
        buffer = self._buffer
        if buffer.startswith(b"\r\n") and not self._blank:
            self._blank = True  # the RFC requires skipping one; no head has begun
            del buffer[:2]
        if not buffer or (buffer == b"\r" and not self._blank):
            return
        try:
            size = find_head(buffer, self._searched, _MAX_HEAD_BYTES)
            self._searched = len(buffer)
            if size:
                head = bytes(buffer[:size])
                del buffer[:size]
                self._start(head)
            elif not self._begun:
                self._begun = True
                self._wait(_HEAD_S)
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

    def _address(self, name: str) -> tuple[str, int] | None:
        address = self.transport.get_extra_info(name)
        return address[:2] if address else None  # None if the client has disconnected

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
        """Answer with an error and close; only close if an answer has begun."""
        if self._exchange is not None and self._exchange.started:
            self.abort()
            return
        self._edge.metrics.on_error(refused.code)
        self.transport.write(refused.answer())
        self._leave()
        self._drain()

    def _drain(self) -> None:
        """Close the sending side and drop what the client still sends, so that it can read its answer."""
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
        """Signal to the application that the client is disconnected."""
        self._writable.set()
        if self._exchange is not None:
            self._exchange.disconnect()

    def _wait(self, seconds: float | None) -> None:
        """Wait for the client for `seconds` from now; None: the deadline is checked elsewhere."""
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
            seconds = _HEAD_S
            self.refuse(Refused(408, "headers_too_slow", f"expected all headers within {seconds:g} s"))
        else:
            self.abort()
