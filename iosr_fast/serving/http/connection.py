"""HTTP/1.1 connections: uvicorn's httptools protocol with strict framing and a deadline in every state."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, cast

from httptools import HttpParserError, HttpParserInvalidMethodError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from iosr_fast.serving.http.addresses import client_of
from iosr_fast.serving.http.errors import ApiError, busy
from iosr_fast.serving.http.framing import TARGET, Body, bad_request, check_head, find_head, last_answer
from iosr_fast.serving.http.metrics import ClassifierMetrics
from iosr_fast.serving.http.settings import Settings
from iosr_fast.serving.http.turns import Peers
from iosr_fast.serving.limits import Deadlines, Limits


class Connection(HttpToolsProtocol):
    """Handles one request after another. A request whose head is whole begins in the turn of its client (Peers).

    Each head is checked by check_head and then parsed by llhttp, which sees nothing but this head: so it never
    upgrades, and the next request begins where Body says. During a request at most `Limits.head` bytes of further ones
    are kept; with more the connection is closed. The connection waits for its client in five states. Each has a timeout
    (Deadlines) that no received byte extends:

    - for a head: `head_s` for the first one, `keep_alive_s` until a later one begins, and then `head_s` from its first
      byte (408),
    - for a body: `body_timeout_s` (middleware.BoundedBody, 408),
    - until the client reads its answer: `body_timeout_s`,
    - after the client has closed its side, until the answer begins: `half_closed_s`,
    - for the rest of a body that is already answered, or the client's close: `linger_s` and `max_body_bytes`.

    One that is `surplus` (Listener) gets 503. All connections of a server share `peers`.
    """

    def __init__(
        self, settings: Settings, metrics: ClassifierMetrics, peers: Peers, *args: Any, surplus: bool, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._settings, self._metrics, self._peers, self._surplus = settings, metrics, peers, surplus
        self._buffer = bytearray()  # bytes of the next heads
        self._searched = 0  # bytes of the buffer; 0 until a head has begun
        self._head = 0  # bytes of a whole head, whose request waits for its turn
        self._blank = False  # whether a blank line was skipped
        self._body: Body | None = None  # of the current request, until both the body and the answer are complete
        self._has_request = False  # whether the body is complete and the answer is not
        self._keep_alive = True  # after the current request
        self._unread = 0  # bytes dropped after the answer
        self._half_closed = self.finished = False
        self._timer: asyncio.TimerHandle | None = None

    # --- called by asyncio ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._socket = cast(asyncio.Transport, transport)  # uvloop's transport does not inherit from it
        super().connection_made(self._socket)
        self.transport, self.write = cast(asyncio.Transport, self), self._socket.write
        self.peer = client_of(self.client)
        self._waiting = self._peers.add(self).waiting
        self._wait(Deadlines.head_s)
        if self._surplus:
            self._refuse(busy("busy", "too many connections; try again"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._peers.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.finished:
            self._drop(len(data))
        elif not (self._has_request or self._head):
            self._read(data)
        else:
            self._buffer += data
        self._bound_buffer()

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client closed its side. Close after the answer to a complete request, if it comes soon, else now; `begin`
        asks again."""
        self._half_closed = True
        if self._has_request and not (self.finished or self.cycle.response_complete):
            self.cycle.keep_alive = False
            if not self.cycle.response_started:
                self._wait(Deadlines.half_closed_s)
        elif not self._head:
            self._wait(Deadlines.linger_s)  # for the client to read what is written
            self._socket.close()
        return True

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait(self._settings.body_timeout_s)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.finished:
            self._wait(Deadlines.linger_s)
        elif self.cycle.response_complete:
            self.on_response_complete()
        else:
            self._stop_waiting()

    # --- called by uvicorn ---

    def shutdown(self) -> None:
        """Close after the current answer."""
        if self._head:
            self.begin()
        if self._body is not None and not self.cycle.response_complete:
            self._keep_alive = self.cycle.keep_alive = False
        elif not self.finished:
            self._wait(Deadlines.linger_s)
            self._socket.close()

    def on_headers_complete(self) -> None:
        authority, rest, _ = TARGET.fullmatch(self.url).groups()  # type: ignore[union-attr]
        if authority is not None:  # the host of a URL replaces Host
            self.url = b"/" + (rest or b"").removeprefix(b"/")
            self.headers[:] = [(name, authority if name == b"host" else value) for name, value in self.headers]
        if self.parser.get_http_version() == "1.0":
            self.expect_100_continue = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """llhttp has no body to parse; `_receive` knows where it ends."""

    def on_response_complete(self) -> None:
        if self.is_closing() or self.flow.write_paused:  # resume_writing calls it again
            return
        if self._has_request:
            self._next()
        else:
            self._unread = 0
            self._wait(Deadlines.linger_s)
            self.flow.resume_reading()

    # --- heads and bodies ---

    def _next(self) -> None:
        """Wait for the next head, or take the one in the buffer."""
        self._body, self._has_request = None, False
        self._peers.answered(self)
        self._searched, self._blank = 0, False
        self._wait(Deadlines.keep_alive_s)
        self.flow.resume_reading()
        self._read(b"")

    def _read(self, data: bytes) -> None:
        """Take bytes of a body or of a head."""
        try:
            if self._body is not None:
                self._receive(self._body.read(data), len(data))
                return
            buffer = self._buffer
            buffer += data
            if buffer.startswith(b"\r\n") and not self._blank:
                self._blank = True  # the RFC requires skipping one; no head has begun
                del buffer[:2]
            if not buffer or (buffer == b"\r" and not self._blank):
                return
            if size := find_head(buffer, self._searched):
                self._head = size
                self._stop_waiting()
                self._peers.put(self, self.loop)
                return
            if not self._searched and self.cycle is not None:
                self._wait(Deadlines.head_s)
            self._searched = len(buffer)
        except ApiError as error:
            self._refuse(error)

    def _bound_buffer(self) -> None:
        """Beyond Limits.head bytes: read no more until the turn of a request, close during a request."""
        if len(self._buffer) <= Limits.head:
            return
        if self._head:
            self.flow.pause_reading()
        else:
            self._metrics.on_error("connection_dropped")
            self.abort()

    def begin(self) -> None:
        """Start the request whose turn has come, unless `shutdown` did before."""
        if not self._head:
            return
        head = bytes(self._buffer[: self._head])
        del self._buffer[: self._head]
        self._head = 0
        self.flow.resume_reading()
        try:
            body, parts = Body(check_head(head, self._settings.serves)), []
            if not body.whole:
                parts = body.read(bytes(self._buffer))
                self._buffer.clear()
            self._start(head, body, parts)
        except ApiError as error:
            self._refuse(error)
        if self._half_closed:
            self.eof_received()
        self._bound_buffer()

    def _start(self, head: bytes, body: Body, parts: list[bytes]) -> None:
        """Start the application. Raises ApiError."""
        self.parser = HttpRequestParser(self)
        try:
            with contextlib.suppress(HttpParserUpgrade):  # the offer is ignored, as RFC 9110 lets a server do
                self.parser.feed_data(head)
        except HttpParserInvalidMethodError:
            raise ApiError(501, "unknown_method", "expected a method of HTTP, such as GET or POST") from None
        except HttpParserError as error:
            raise bad_request(f"a request by RFC 9112, got: {error}") from None
        self._body, self._keep_alive = body, self.cycle.keep_alive
        if not body.whole:
            self._wait(None)
        self._receive(parts)

    def _receive(self, parts: list[bytes], count: int = 0) -> None:
        """Give parts of the body to the application; drop them, `count` bytes, if it has answered."""
        assert self._body is not None
        if parts or self._body.whole:
            self.cycle.waiting_for_100_continue = False
        for part in parts:
            self.on_body(part)
        if self._body.whole:
            self._buffer += self._body.rest
            self._has_request = True
            self._peers.runs(self)
            super().on_message_complete()
            if not self.cycle.response_started:
                self.cycle.keep_alive = self._keep_alive
            if self.cycle.response_complete:
                self._next()
            else:
                self._stop_waiting()
        elif self.cycle.response_complete:
            self._drop(count)
        elif self.cycle.waiting_for_100_continue:
            self.cycle.keep_alive = False  # if refused now, the client may or may not send the body

    # --- ends ---

    def abort(self) -> None:
        """Close at once and drop unsent bytes; the application gets http.disconnect."""
        self._stop_waiting()
        self._peers.remove(self)
        self._socket.abort()

    def close(self) -> None:
        """Close the sending side and drop what the client still sends, so that it can read its answer.

        uvicorn writes to this object and closes it: with `write` and `is_closing` it is the transport that uvicorn has.
        """
        if self.is_closing():
            return
        self.finished, self._unread = True, 0
        self._peers.answered(self)
        self._buffer.clear()
        self._socket.write_eof()
        self.flow.resume_reading()
        if not self.flow.write_paused:
            self._wait(Deadlines.linger_s)

    def is_closing(self) -> bool:
        return self.finished or self._socket.is_closing()

    def _refuse(self, error: ApiError) -> None:
        """Answer with an error and close; only close if an answer has begun."""
        if self._body is not None and self.cycle.response_started:
            self.abort()
            return
        self._metrics.on_error(error.code)
        self._socket.write(last_answer(error))
        if self._body is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.close()

    def _drop(self, count: int) -> None:
        self._unread += count
        if self._unread > self._settings.max_body_bytes:
            self.abort()

    def _wait(self, seconds: float | None) -> None:
        """Wait for the client for `seconds` from now; None: the deadline is checked elsewhere."""
        self._stop_waiting()
        self._waiting[self] = None
        if seconds is not None:
            self._timer = self.loop.call_later(seconds, self._expire)

    def _stop_waiting(self) -> None:
        self._waiting.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        if self._body is None and self._searched and not self.finished:
            self._refuse(ApiError(408, "headers_too_slow", f"expected all headers within {Deadlines.head_s:g} s"))
        else:
            self.abort()
