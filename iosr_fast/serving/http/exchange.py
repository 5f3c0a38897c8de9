"""One request and its answer as ASGI messages."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Protocol

import h11
from starlette.types import ASGIApp, Message, Scope

from iosr_fast.serving.http.framing import Body, Refused
from iosr_fast.serving.http.logs import logger

_MAX_BUFFERED = 64 << 10  # bytes of a body that wait for the application; reading pauses above this
_CLOSE = (b"connection", b"close")
_PHRASES = {status.value: status.phrase for status in HTTPStatus}


class Client(Protocol):
    """The connection of an exchange."""

    @property
    def headers(self) -> list[tuple[bytes, bytes]]: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    async def write(self, data: bytes) -> None: ...
    def answered(self, exchange: Exchange) -> None: ...
    def refuse(self, refused: Refused) -> None: ...
    def abort(self) -> None: ...


class Exchange:
    """Buffers the body for the application; `receive` and `send` are those of ASGI."""

    def __init__(self, client: Client, connection: h11.Connection, request: h11.Request, scope: Scope) -> None:
        self.body = Body(connection, request)
        self.started = self.complete = False  # of the answer
        self._client, self._connection, self._scope = client, connection, scope
        self._parts: list[bytes] = []
        self._buffered = 0
        self._delivered = False  # the whole body
        self._disconnected = False
        self._changed = asyncio.Event()
        self._head = b""  # of the answer; sent with the first bytes of its body

    @property
    def keeps_alive(self) -> bool:
        """Whether another request may follow; valid once the answer is complete."""
        return self._connection.our_state is h11.DONE

    def receive_data(self, data: bytes) -> None:
        """Take bytes from the client; bytes after the body are in `body.rest`. Raises Refused."""
        parts = self.body.read(data)
        if self.complete or self._disconnected:
            return
        self._parts += parts
        self._buffered += sum(map(len, parts))
        if self._buffered > _MAX_BUFFERED:
            self._client.pause_reading()
        self._changed.set()

    def disconnect(self) -> None:
        self._disconnected = True
        self._changed.set()

    async def run(self, app: ASGIApp) -> None:
        try:
            await app(self._scope, self.receive, self.send)
        except asyncio.CancelledError:
            self._client.abort()
            raise
        except Exception:
            logger.exception("unexpected", extra={"facts": {}})
        if not self.complete and not self._disconnected:
            self._client.refuse(Refused(500, "internal", "the server failed at this request; see its log"))

    async def receive(self) -> Message:
        if self._connection.they_are_waiting_for_100_continue and not self._disconnected:
            informational = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
            await self._client.write(self._connection.send(informational))
        while not (self._parts or self._disconnected or self.complete or (self.body.whole and not self._delivered)):
            self._changed.clear()
            self._client.resume_reading()
            await self._changed.wait()
        if self._disconnected or self.complete:
            return {"type": "http.disconnect"}
        self._delivered = self.body.whole
        body, self._parts, self._buffered = b"".join(self._parts), [], 0
        return {"type": "http.request", "body": body, "more_body": not self._delivered}

    async def send(self, message: Message) -> None:
        if self._disconnected:
            return
        expected = "http.response.body" if self.started else "http.response.start"
        if self.complete or message["type"] != expected:
            raise RuntimeError(f"expected {'no more messages' if self.complete else expected}, got {message['type']!r}")
        if not self.started:
            self._head = self._start(message["status"], list(message.get("headers", ())))
            self.started = True
            return
        data = b"" if self._scope["method"] == "HEAD" else message.get("body", b"")
        last = not message.get("more_body", False)
        sent = self._head + self._connection.send(h11.Data(data=data))
        self._head = b""
        await self._client.write(sent + self._connection.send(h11.EndOfMessage()) if last else sent)
        if last and not self._disconnected:
            self.complete = True
            self._changed.set()
            self._client.answered(self)

    def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> bytes:
        headers = [*self._client.headers, *headers]
        if self._connection.they_are_waiting_for_100_continue:
            headers.append(_CLOSE)  # refused before 100 Continue: the client may or may not send the body
        phrase = _PHRASES.get(status, "")
        return self._connection.send(h11.Response(status_code=status, headers=headers, reason=phrase.encode()))
