"""A client of the HTTP API that records times and checks every answer, in closed and in open loops."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
from PIL import Image

from benchmarks.photographs import QUALITY, photograph
from iosr_fast.classifier import Classifier
from tools.demo.bundle import held_out_queries

_PATIENCE_S = 20.0  # beyond the deadline: a missing answer is an error, not a hang
_OLDEST_S = 30.0  # idle connections are closed earlier than the server closes them
_LEAD_S = 0.05  # before the first request of an open loop, for its thread to start


@dataclass(frozen=True)
class Queries:
    """What is asked: `bodies[i]` is a request's body, sent to the paths in turn; `is_wrong(i, answer)` judges the JSON
    of a 200 for it, and raises ValueError, KeyError or TypeError for another form of an answer."""

    bodies: Sequence[bytes] = field(repr=False)
    is_wrong: Callable[[int, Any], bool]
    content_type: str = "image/png"
    paths: Sequence[str] = ("/v1/predict",)


def make_queries(classifier: Classifier, count: int) -> Queries:
    """`count` pictures and the labels of Classifier.predict: PNGs of the demo's held-out pictures, evenly spread, for a
    CLIP with the demo's input, else JPEGs of 500 x 375 (benchmarks.photographs)."""
    pictures = held_out_queries()[0]
    pictures = pictures[np.linspace(0, len(pictures) - 1, count).astype(int)]
    small = pictures.shape[1] == classifier.encoder.image_size
    images = []
    for number, picture in enumerate(pictures):
        file = io.BytesIO()
        if small:
            Image.fromarray(picture).save(file, "PNG")
        else:
            photograph(picture, seed=number).save(file, "JPEG", quality=QUALITY)
        images.append(file.getvalue())
    labels = [prediction.label for prediction in classifier.explain(images, top=1)]

    def is_wrong(number: int, answer: Any) -> bool:
        (prediction,) = answer["predictions"]
        return bool(prediction["label"] != labels[number])

    return Queries(images, is_wrong, "image/png" if small else "image/jpeg")


@dataclass(slots=True)
class Answer:
    """Times in seconds on time.perf_counter's clock. Latency counts from `due`, when the request should have been sent,
    so that a late sender hides no waiting (coordinated omission)."""

    due: float
    sent: float
    done: float
    outcome: str  # "ok"; "refused": a 503 with Retry-After; else an error in words
    wrong: bool = False

    @property
    def latency_s(self) -> float:
        return self.done - self.due


@dataclass(frozen=True)
class Client:
    """Requests over kept-alive connections; queries go to each path of each of `urls` in turn."""

    session: aiohttp.ClientSession
    urls: Sequence[str]
    queries: Queries
    deadline_ms: int

    async def predict(self, number: int, due: float | None = None) -> Answer:
        """The judged answer to body `number`, modulo their count. `due` None: now."""
        number %= len(self.queries.bodies)
        places = [url + path for url in self.urls for path in self.queries.paths]
        url = places[number % len(places)]
        url += f"{'&' if '?' in url else '?'}deadline_ms={self.deadline_ms}"
        headers = {"Content-Type": self.queries.content_type}
        answer, content = await self.request("POST", url, self.queries.bodies[number], headers, due)
        if answer.outcome == "ok":
            try:
                answer.wrong = self.queries.is_wrong(number, content)
            except (ValueError, KeyError, TypeError) as error:
                answer.outcome = f"unreadable answer: {type(error).__name__}"
        return answer

    async def request(
        self, method: str, url: str, data: Any = None, headers: dict[str, str] | None = None, due: float | None = None
    ) -> tuple[Answer, Any]:
        """The answer to any request, and its JSON; None where it failed."""
        sent, content = time.perf_counter(), None
        timeout = aiohttp.ClientTimeout(total=self.deadline_ms / 1e3 + _PATIENCE_S)
        try:
            async with self.session.request(method, url, data=data, headers=headers, timeout=timeout) as response:
                body = await response.read()
            done, outcome = time.perf_counter(), "ok"
            if response.status in (200, 201):
                content = json.loads(body)
            elif response.status == 503:
                outcome = "refused" if response.headers.get("Retry-After", "").isdigit() else "no Retry-After"
            else:
                outcome = f"status {response.status}: {body[:200].decode('utf-8', 'replace')}"
        except (aiohttp.ClientError, OSError) as error:
            done, outcome = time.perf_counter(), type(error).__name__
        except ValueError as error:
            outcome = f"unreadable answer: {type(error).__name__}"
        return Answer(sent if due is None else due, sent, done, outcome), content


def new_session() -> aiohttp.ClientSession:
    """Of any number of connections."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_OLDEST_S)
    return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())


async def closed_loop(client: Client, connections: int, seconds: float) -> list[Answer]:
    """`connections` users who each wait for an answer, then send the next request; all answers of `seconds`."""
    until = time.perf_counter() + seconds
    answers: list[Answer] = []

    async def use(number: int) -> None:
        while time.perf_counter() < until:
            answers.append(await client.predict(number))
            number += connections
            if answers[-1].outcome != "ok":
                await asyncio.sleep(0.01)  # refused or broken: don't spin

    await asyncio.gather(*map(use, range(connections)))
    return answers


async def open_loop(ask: Callable[[int, float], Awaitable[Answer]], rate: float, seconds: float) -> list[Answer]:
    """Call `ask(number, due)` at a constant rate, as wrk2 and k6 do, whether or not earlier requests are answered;
    returns all answers.

    A thread keeps the times, because its sleep is accurate to tens of microseconds. Timers of an event loop are
    accurate to a millisecond, which would count as latency of the server.
    """
    loop, stopped, start = asyncio.get_running_loop(), threading.Event(), time.perf_counter() + _LEAD_S
    asked: list[asyncio.Future[Answer]] = []

    def send(number: int, due: float) -> None:
        asked.append(asyncio.ensure_future(ask(number, due)))

    def keep_time() -> None:
        for number in range(max(1, round(rate * seconds))):
            due = start + number / rate
            if stopped.wait(max(0.0, due - time.perf_counter())):
                return
            loop.call_soon_threadsafe(send, number, due)

    try:
        await asyncio.to_thread(keep_time)
        return list(await asyncio.gather(*asked))
    finally:
        stopped.set()
