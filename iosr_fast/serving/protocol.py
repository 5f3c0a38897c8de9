"""uvicorn's HTTP protocol with bounds on what it leaves unbounded: headers, and bodies that nobody reads."""

from __future__ import annotations

import asyncio
from typing import Any

from iosr_fast.serving.settings import Settings

_PIPELINED = 16  # requests sent before the answer to the one before; each is held until it is its turn
_LINGER_S = 5.0  # for the rest of a body that was refused: closed at once, the client might not see the answer


def bounded_protocol(settings: Settings) -> type[asyncio.Protocol]:
    """uvicorn's HttpToolsProtocol, but it closes a connection

    - that sends more than `max_header_bytes` outside of a body (headers, trailers, framing of chunks) in a row,
    - whose headers are not whole `header_timeout_s` after it was made, or after a request's first byte,
    - that still sends its body some seconds, or `max_body_bytes`, after it was answered,
    - that takes nothing of its answers for `body_timeout_s`,
    - that sends ever more requests before one is answered.
    """
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class BoundedProtocol(HttpToolsProtocol):
        _outside = 0  # bytes since the last one of a body
        _unread = 0  # bytes of a body that was answered already
        _in_body = False
        _cut = False
        _running: Any = None  # the request that is being answered; `cycle` is the newest one
        _timer: asyncio.TimerHandle | None = None
        _write_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._close_after(settings.header_timeout_s)

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            self._stop_write_timer()
            self.pipeline.clear()
            if self._running is not None and not self._running.response_complete:
                self._running.disconnected = True
                self._running.message_event.set()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            self._outside += len(data)  # nothing again where these bytes end headers, or hold some of a body
            super().data_received(data)
            if self._outside > settings.max_header_bytes and not self.transport.is_closing():
                self.send_400_response("Headers too large.")

        def on_message_begin(self) -> None:
            self._unread, self._in_body = 0, False
            self._close_after(settings.header_timeout_s)
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._stop_timer()
            self._outside, self._in_body = 0, True
            if len(self.pipeline) >= _PIPELINED:
                self._cut_off()
            if not self._cut:
                super().on_headers_complete()

        def _start_asgi_task(self, cycle: Any, app: Any) -> None:
            self._running = cycle
            super()._start_asgi_task(cycle, app)

        def on_body(self, body: bytes) -> None:
            self._outside = 0
            if self._cut:
                return
            if self.cycle.response_complete:
                self._unread += len(body)
                if self._unread > settings.max_body_bytes:
                    self.transport.close()
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._outside, self._in_body = 0, False
            if self._cut:
                return
            if self.cycle.response_complete:
                self._stop_timer()
            super().on_message_complete()

        def on_response_complete(self) -> None:
            if self._in_body:
                self._close_after(_LINGER_S)
            super().on_response_complete()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stop_write_timer()
            self._write_timer = self.loop.call_later(settings.body_timeout_s, self._cut_off)

        def resume_writing(self) -> None:
            self._stop_write_timer()
            super().resume_writing()

        def _cut_off(self) -> None:
            """Close at once; close() would wait until all is written. Who answers hears that nobody listens."""
            self._cut = True
            self.pipeline.clear()
            for cycle in (self._running, self.cycle):
                if cycle is not None and not cycle.response_complete:
                    cycle.disconnected = True
                    cycle.message_event.set()
            self.flow.resume_writing()
            self.transport.abort()

        def _stop_write_timer(self) -> None:
            if self._write_timer is not None:
                self._write_timer.cancel()
                self._write_timer = None

        def _close_after(self, seconds: float) -> None:
            self._stop_timer()
            self._timer = self.loop.call_later(seconds, self.transport.close)

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return BoundedProtocol


def protocol_for(settings: Settings) -> Any:
    """The bounded protocol; where httptools is missing h11, which bounds headers itself."""
    try:
        return bounded_protocol(settings)
    except ImportError:
        return "h11"
