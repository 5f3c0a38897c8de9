"""The server's HTTP edge around an application, in a thread, and bare sockets to talk to it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from iosr_fast.serving.http.metrics import ClassifierMetrics, Metrics
from iosr_fast.serving.http.server import Edge
from iosr_fast.serving.http.settings import Settings
from tests.waiting import wait_until

BIG = 8 << 20  # bytes of /big, more than a kernel holds


class Site:
    """A server that runs `app`, or else a small application that notes in `seen` the (method, path, bytes of the body)
    of the requests that reach it.

    /unread answers without reading the body, /slow after half a second, /big with BIG bytes in parts, /whole at once.
    /block stops the event loop until `go_on` is set.
    """

    def __init__(self, app: Any = None, **settings: Any) -> None:
        self.seen: list[tuple[str, str, int]] = []
        self.gone = 0  # clients that left before their answer
        self.go_on = threading.Event()
        self.metrics = ClassifierMetrics(Metrics())
        self.settings = Settings(**{"grace_s": 3, "host": "0.0.0.0", **settings})  # any Host
        listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
        self.port = listener.getsockname()[1]
        self.server = Edge(app or self._app, self.settings, self.metrics)
        self.connections = self.server.server_state.connections
        self.thread = threading.Thread(target=self.server.run, args=([listener],), daemon=True)
        self.thread.start()
        wait_until(lambda: self.server.started)

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        path, body = scope["path"], b""
        with contextlib.suppress(ClientDisconnect):
            body = b"" if path == "/unread" else await request.body()
            self.seen.append((scope["method"], path, len(body)))
            if path == "/block":
                self.go_on.wait(timeout=30)
            if path == "/slow":
                watch = asyncio.ensure_future(receive())
                await asyncio.wait({watch}, timeout=0.5)
                self.gone += watch.done()
                watch.cancel()
            facts = {"path": path, "size": len(body), "host": request.headers.get("host")}
            response: Response = JSONResponse({**facts, "client": request.client.host})
            if path == "/big":
                response = StreamingResponse(bytes(65536) for _ in range(BIG // 65536))
            elif path == "/whole":
                response = Response(bytes(BIG))
            await response(scope, receive, send)

    def connect(self, source: str = "127.0.0.1") -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10, source_address=(source, 0))

    def ask(self, *parts: bytes, pause_s: float = 0.0) -> bytes:
        """All that comes back for these bytes until the server closes."""
        with self.connect() as connection:
            for part in parts:
                with contextlib.suppress(ConnectionError):
                    connection.sendall(part)
                time.sleep(pause_s)
            return read_all(connection)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(15)
        assert not self.thread.is_alive()


def read_all(connection: socket.socket) -> bytes:
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def read_answers(connection: socket.socket, count: int) -> list[tuple[int, Any]]:
    """Status and content of so many answers with a Content-Length of JSON; the connection may stay open."""
    data, answers = b"", []
    while len(answers) < count:
        head, end, rest = data.partition(b"\r\n\r\n")
        size = next((int(line[15:]) for line in head.lower().split(b"\r\n") if line[:15] == b"content-length:"), 0)
        if end and len(rest) >= size:
            answers.append((int(head[9:12]), json.loads(rest[:size]) if size else None))
            data = rest[size:]
            continue
        part = connection.recv(65536)
        assert part, (answers[-3:], data)
        data += part
    assert not data
    return answers


def statuses(answer: bytes) -> list[int]:
    """Of all answers in these bytes."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


@contextmanager
def site(app: Any = None, **settings: Any) -> Iterator[Site]:
    made = Site(app, **settings)
    try:
        yield made
    finally:
        made.stop()
