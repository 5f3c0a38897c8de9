"""A client of the HTTP API that records times and checks every answer, in closed and in open loops."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp
import numpy as np
from PIL import Image
from yarl import URL

from benchmarks.photographs import QUALITY, photograph
from iosr_fast.classifier import Classifier
from tools.demo.bundle import held_out_queries

Result = TypeVar("Result")
BROKEN = (aiohttp.ClientError, OSError, TimeoutError)
_PATIENCE_S = 20.0  # beyond the deadline: a missing answer is an error, not a hang
_OLDEST_S = 30.0  # idle connections are closed earlier than the server closes them
_LEAD_S = 0.05  # before the first request of an open loop, for its thread to start
_FEWEST = 8  # answers for a rate, whatever the time they take


@dataclass(frozen=True)
class Queries:
    """What is asked: `bodies[i]` is a request's body; `is_wrong(i, answer)` judges the JSON of a 200 for it, and raises
    ValueError, KeyError or TypeError for another form of an answer."""

    bodies: list[bytes] = field(repr=False)
    is_wrong: Callable[[int, Any], bool]
    content_type: str = "image/png"
    path: str = "/v1/predict"


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
    status: int  # 0: no answer
    error: str = ""  # "" for 200 and for a refusal with Retry-After
    wrong: bool = False  # a 200 that `is_wrong`
    content: Any = None  # what `read` made of the JSON of a 200

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
    """Requests over any number of kept-alive connections, to each of `urls` in turn. An async context manager."""

    def __init__(self, urls: str | Sequence[str], queries: Queries, deadline_ms: int) -> None:
        self.queries, self.deadline_s = queries, deadline_ms / 1e3
        self._urls = [urls] if isinstance(urls, str) else urls
        self._predict = f"{queries.path}?deadline_ms={deadline_ms}"

    async def __aenter__(self) -> Client:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_OLDEST_S),
            timeout=aiohttp.ClientTimeout(total=self.deadline_s + _PATIENCE_S),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def predict(
        self, number: int, due: float | None = None, query: str = "", read: Callable[[Any], Any] | None = None
    ) -> Answer:
        """The answer to body `number`, modulo their count. `due` None: now. With `read`, which makes `content` of the
        JSON, the answer is not judged."""
        number %= len(self.queries.bodies)
        sent = time.perf_counter()
        answer = Answer(sent if due is None else due, sent, sent, 0)
        try:
            async with self._session.post(
                URL(self._urls[number % len(self._urls)] + self._predict + query, encoded=True),
                data=self.queries.bodies[number],
                headers={"Content-Type": self.queries.content_type},
            ) as response:
                body = await response.read()
        except BROKEN as error:
            answer.done, answer.error = time.perf_counter(), type(error).__name__
            return answer
        answer.done, answer.status = time.perf_counter(), response.status
        if response.status == 503:
            answer.error = "" if response.headers.get("Retry-After", "").isdigit() else "no Retry-After"
        elif response.status != 200:
            answer.error = f"status {response.status}"
        else:
            try:
                content = json.loads(body)
                if read is None:
                    answer.wrong = self.queries.is_wrong(number, content)
                else:
                    answer.content = read(content)
            except (ValueError, KeyError, TypeError) as error:
                answer.error = f"unreadable answer: {type(error).__name__}"
        return answer

    async def request(self, method: str, path: str, token: str = "", form: Any = None) -> tuple[int, Any]:
        """(status, body) of any request; a body that is not JSON is text. Raises one of BROKEN."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        async with self._session.request(method, self._urls[0] + path, data=form, headers=headers) as response:
            content = await response.read()
        try:
            return response.status, json.loads(content)
        except ValueError:
            return response.status, content.decode("utf-8", "replace")


def run_alone(work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work` on an event loop of its own: uvloop's where it is installed, as a lighter client leaves more
    to the server, and without collections of all that was imported."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        from asyncio import new_event_loop
    gc.collect()
    gc.freeze()  # the collector must not scan all modules while requests are timed
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            return runner.run(work)
    finally:
        gc.unfreeze()  # else extension modules report frozen objects as leaks at exit


async def closed_loop(client: Client, connections: int, seconds: float) -> list[Answer]:
    """`connections` users who each wait for an answer, then send the next request; all answers of `seconds`."""
    until = time.perf_counter() + seconds
    answers: list[Answer] = []

    async def use(number: int) -> None:
        while time.perf_counter() < until:
            answer = await client.predict(number)
            answers.append(answer)
            number += connections
            if not answer.ok:
                await asyncio.sleep(0.01)  # refused or broken: don't spin

    await asyncio.gather(*map(use, range(connections)))
    return answers


def steady_rps(done: Sequence[float], start: float, until: float) -> float:
    """Answers a second: the slope of their number over time between `start` and `until`, so that neither the wait for
    the first batch nor half a batch at the end counts."""
    times = sorted(at for at in done if start <= at <= until)
    if len(times) < _FEWEST:
        times = sorted(done)[-_FEWEST:]
    return float(np.polyfit(np.array(times) - times[0], np.arange(len(times)), 1)[0])


def arrival_times(rate: float, seconds: float) -> np.ndarray:
    """Times of `rate * seconds` requests at a constant rate, as in wrk2 and k6, in seconds from the start."""
    if not rate > 0 or not seconds > 0:
        raise ValueError(f"expected rate > 0 and seconds > 0, got {rate} and {seconds}")
    return np.arange(max(1, round(rate * seconds))) / rate


async def open_loop(ask: Callable[[int, float], Awaitable[Answer]], times: np.ndarray) -> list[Answer]:
    """Call `ask(number, due)` at each of `times`, whether or not earlier requests are answered; returns all answers.

    A thread keeps the times, because its sleep is accurate to tens of microseconds. Timers of an event loop are
    accurate to a millisecond, which would count as latency of the server.
    """
    loop = asyncio.get_running_loop()
    tasks: list[asyncio.Future[Answer]] = []
    all_sent, stopped = asyncio.Event(), threading.Event()

    def send(number: int, due: float) -> None:
        tasks.append(asyncio.ensure_future(ask(number, due)))

    def keep_time() -> None:
        start = time.perf_counter() + _LEAD_S
        for number, due in enumerate((start + times).tolist()):
            if (wait := due - time.perf_counter()) > 0:
                time.sleep(wait)
            if stopped.is_set():
                return
            loop.call_soon_threadsafe(send, number, due)
        loop.call_soon_threadsafe(all_sent.set)

    thread = threading.Thread(target=keep_time, name="arrivals", daemon=True)
    thread.start()
    try:
        await all_sent.wait()
        return list(await asyncio.gather(*tasks))
    finally:
        stopped.set()
        for task in tasks:
            task.cancel()
        thread.join()
