"""One user of the HTTP API: sends pictures, notes when, checks every answer."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httptools

from tools.serving_load.connections import Pool, Reply
from tools.serving_load.queries import Queries

_PATIENCE_S = 20.0  # beyond the deadline: an answer that never comes is an error, not a hang
BROKEN = (OSError, TimeoutError, httptools.HttpParserError)
_BOUNDARY = "iosr-fast-load-test"


@dataclass(slots=True)
class Answer:
    """Times in seconds on time.perf_counter's clock. `due` is when the request should have been sent: latency counts
    from there, so that a late sender hides no waiting (coordinated omission)."""

    due: float
    sent: float
    done: float
    status: int  # 0: none came
    error: str = ""  # what was wrong with it; "" for 200 and for a refusal with Retry-After
    wrong: bool = False  # a label other than the classifier's own
    told: Any = None  # what `read` made of a 200's body

    @property
    def latency_s(self) -> float:
        return self.done - self.due

    @property
    def ok(self) -> bool:
        return self.status == 200 and not self.error

    @property
    def refused(self) -> bool:
        return self.status == 503 and not self.error


class Client:
    """Requests over kept-alive connections, as many as it takes. Use as an async context manager.

    `check`: compare labels with the classifier's own; off where classes change meanwhile.
    """

    def __init__(self, url: str, queries: Queries, deadline_ms: int, check: bool = True) -> None:
        self.queries, self.deadline_s, self.check = queries, deadline_ms / 1e3, check
        self._pool = Pool(url)
        self._path = f"/v1/predict?deadline_ms={deadline_ms}"
        self._encoded: dict[tuple[int, str], bytes] = {}

    async def __aenter__(self) -> Client:
        await self._pool.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._pool.__aexit__(*error)

    @property
    def connections(self) -> int:
        """Made so far."""
        return self._pool.made

    async def predict(
        self, number: int, due: float | None = None, query: str = "", read: Callable[[Any], Any] | None = None
    ) -> Answer:
        """Picture number `number` of the queries, counted round and round. `due` None: now.

        `read(body)` of a 200 is kept as `told`.
        """
        number %= len(self.queries)
        request = self._encoded.get((number, query))
        if request is None:
            image = self.queries.images[number]
            request = self._pool.encode("POST", self._path + query, image, {"Content-Type": "image/png"})
            self._encoded[number, query] = request
        sent = time.perf_counter()
        answer = Answer(sent if due is None else due, sent, sent, 0)
        try:
            reply = await self._pool.ask(request, self.deadline_s + _PATIENCE_S)
        except BROKEN as error:
            answer.done, answer.error = time.perf_counter(), type(error).__name__
            return answer
        answer.done, answer.status = time.perf_counter(), reply.status
        if reply.status == 503:
            answer.error = "" if reply.headers.get(b"retry-after", b"").isdigit() else "no Retry-After"
        elif reply.status != 200:
            answer.error = f"status {reply.status}"
        else:
            self._judge(answer, reply, number, read)
        return answer

    async def post_form(
        self, path: str | None, images: list[bytes], texts: dict[str, str] | None = None, token: str = ""
    ) -> tuple[int, Any]:
        """(status, body) of a form with text fields and the field `images`; `path` None: /v1/predict."""
        kind = {"Content-Type": f"multipart/form-data; boundary={_BOUNDARY}"}
        return await self.request("POST", path or self._path, token, multipart(images, texts or {}), kind)

    async def request(
        self, method: str, path: str, token: str = "", body: bytes = b"", headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """(status, body) of any request of the API; a body that is no JSON is text. Raises what BROKEN names."""
        secret = {"Authorization": f"Bearer {token}"} if token else {}
        request = self._pool.encode(method, path, body, {**secret, **(headers or {})})
        reply = await self._pool.ask(request, self.deadline_s + _PATIENCE_S)
        try:
            return reply.status, json.loads(reply.body)
        except ValueError:
            return reply.status, reply.body.decode("utf-8", "replace")

    def _judge(self, answer: Answer, reply: Reply, number: int, read: Callable[[Any], Any] | None) -> None:
        try:
            body = json.loads(reply.body)
            (prediction,) = body["predictions"]
            answer.wrong = self.check and prediction["label"] != self.queries.labels[number]
            answer.told = None if read is None else read(body)
        except (ValueError, KeyError, TypeError) as error:
            answer.error = f"unreadable answer: {type(error).__name__}"


def multipart(images: list[bytes], texts: dict[str, str]) -> bytes:
    """The body of a form."""
    parts = [f'Content-Disposition: form-data; name="{name}"\r\n\r\n{text}'.encode() for name, text in texts.items()]
    for i, image in enumerate(images):
        head = f'Content-Disposition: form-data; name="images"; filename="{i}.png"\r\nContent-Type: image/png\r\n\r\n'
        parts.append(head.encode() + image)
    boundary = f"--{_BOUNDARY}".encode()
    return b"".join(boundary + b"\r\n" + part + b"\r\n" for part in parts) + boundary + b"--\r\n"
