"""Requests on their way to replicas: which ones are sent again, to whom, and how often."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from iosr_fast.serving.batching import ClosedError, DeadlineExceededError, QueueFullError
from iosr_fast.serving.http.errors import ApiError, busy
from iosr_fast.serving.http.metrics import Metrics
from iosr_fast.serving.ray.messages import Facts, Reply
from iosr_fast.state.predictions import Prediction

ASKED = 3  # replicas that a request is offered to before it is refused
DEATHS = 3  # replicas that may die while they have one request, before it is taken for what kills them
_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.5
log = logging.getLogger("ray.serve")


class Call(Protocol):
    """Runs a method of some replica; raises ray.exceptions.RayError where that replica died or can't be reached."""

    def __call__(self, method: str, *values: Any) -> Awaitable[Any]: ...


def over_handle(handle: Any) -> Call:
    """Calls over a DeploymentHandle. Cancelling one cancels it at the replica."""
    methods: dict[str, Any] = {}

    async def call(method: str, *values: Any) -> Any:
        if method not in methods:
            methods[method] = handle.options(method_name=method)
        response = methods[method].remote(*values)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise

    return call


@dataclass(frozen=True)
class RemoteEncoder:
    image_size: int


@dataclass(frozen=True)
class RemoteClassifier:
    """The little that serving's routes ask of a classifier without waiting, as the last answer told it."""

    version: int
    encoder: RemoteEncoder


class Remote:
    """The replicas, as iosr_fast.serving.http's routes take a BatchingClassifier: for one event loop.

    No accepted request is lost with a replica: predicting changes nothing, so what a replica had when it died is sent
    to another one, as is what a replica refuses (a full queue, shutting down, an engine that failed). A request that
    DEATHS replicas died of is not sent again: it may be what kills them. Which replica is asked, is up to Ray Serve:
    of two that it draws the one with less to do.

    `pending` is 0, `healthy` True and `decoders_are_busy` False for good: each replica knows these of itself, and
    refuses by itself.
    """

    closed = False
    pending = 0
    healthy = True
    decoders_are_busy = False
    last_error = None

    def __init__(self, call: Call, longest_s: float, metrics: Metrics) -> None:
        self.call = call
        self._longest_s = longest_s
        self._metrics = metrics
        self._facts: Facts | None = None

    async def describe(self) -> Facts:
        """What some replica says of itself; waits until there is one."""
        self._facts = await self._reach(time.monotonic() + self._longest_s, "describe")
        return self._facts

    @property
    def classifier(self) -> RemoteClassifier:
        if self._facts is None:
            raise RuntimeError("expected describe() to have been called")
        return RemoteClassifier(self._facts.version, RemoteEncoder(self._facts.image_size))

    async def ask(self, method: str, *values: Any) -> Any:
        """What a method of any replica returns."""
        return await self._reach(time.monotonic() + self._longest_s, method, *values)

    async def classify(
        self, image: Any, *, top: int = 5, nearest: int = 0, deadline_s: float | None = None
    ) -> Prediction:
        """BatchingClassifier.classify."""
        (result,) = await self.classify_many((image,), top=top, nearest=nearest, deadline_s=deadline_s)
        if isinstance(result, Exception):
            raise result
        return result

    async def classify_many(
        self,
        images: Iterable[Any],
        *,
        top: int = 5,
        nearest: int = 0,
        deadline_s: float | None = None,
        client: str = "",
    ) -> list[Prediction | Exception]:
        """BatchingClassifier.classify_many. Raises QueueFullError and ClosedError where ASKED replicas refused, and
        ApiError: 503 where their engines failed, 500 where DEATHS replicas died."""
        given, started = list(images), time.monotonic()
        until = started + (self._longest_s if deadline_s is None else deadline_s)
        replies: list[Reply] = []
        while len(replies) < ASKED:
            try:
                reply = await self._reach(until, "classify", given, top, nearest, client)
            except DeadlineExceededError as error:
                if replies:
                    break
                return [error for _ in given]
            self._facts = reply.facts
            if reply.status == "ok":
                self._count(reply, time.monotonic() - started)
                return list(reply.results)
            replies.append(reply)
            await asyncio.sleep(_PAUSE_S)
        raise _refusal(replies)

    async def _reach(self, until: float, method: str, *values: Any) -> Any:
        """A method's result, of whichever replica lives long enough. Raises DeadlineExceededError, ApiError."""
        from ray.exceptions import ActorDiedError, RayError, RayTaskError
        from ray.serve.exceptions import RayServeException

        asked = died = 0
        while (left := until - time.monotonic()) > 0:
            try:
                return await self.call(method, *values, *([left] if method == "classify" else []))
            except RayTaskError:
                raise  # a replica that lives, and a mistake in what it runs
            except ActorDiedError as error:
                died += 1
                if died == DEATHS:
                    told = f"{DEATHS} replicas died while they had this request, which is not sent to another one"
                    raise ApiError(500, "replicas_died", told) from error
                log.warning("a replica died with a request, which is sent to another one: %s", _first_line(error))
            except (RayError, RayServeException) as error:
                log.warning("a replica can't be reached, another one is asked: %s", _first_line(error))
            asked += 1
            await asyncio.sleep(min(_PAUSE_S * 2**asked, _LONGEST_PAUSE_S, max(0.0, until - time.monotonic())))
        raise DeadlineExceededError(f"no replica had answered within the deadline; {asked} were asked")

    def _count(self, reply: Reply, latency_s: float) -> None:
        for result in reply.results:
            if isinstance(result, Prediction):
                self._metrics.on_done(latency_s, "ok", result.label)


def _refusal(replies: list[Reply]) -> Exception:
    """What all of them, or the most telling one, said."""
    by_status = {reply.status: reply for reply in replies}
    if "full" in by_status:
        soonest = min(reply.retry_after_s for reply in replies if reply.status == "full")
        return QueueFullError(by_status["full"].message, soonest)
    if "failed" in by_status:
        return busy("engine_failed", "the engines do not work at this moment; try again", 5)
    return ClosedError(by_status["closed"].message)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
