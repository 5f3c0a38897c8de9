"""Requests to replicas, repeated on another replica if one dies or refuses."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from types import SimpleNamespace
from typing import Any, Unpack

from iosr_fast.exceptions import ClosedError, DeadlineExceededError, IosrFastError, QueueFullError
from iosr_fast.head.predictions import Prediction
from iosr_fast.serving.batching.item import Query, QueryOptions
from iosr_fast.serving.http.errors import ApiError, busy
from iosr_fast.serving.http.metrics import Metrics
from iosr_fast.serving.ray.messages import Facts, Reply

MAX_REFUSALS = 3  # replicas that may refuse a request before it fails
MAX_DEATHS = 3  # replicas that may die during a request before it is assumed to kill them
_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.5
log = logging.getLogger("ray.serve")


# call(method, *values) runs a method of some replica. It raises ray.exceptions.RayError if that replica died or can't
# be reached.
Call = Callable[..., Awaitable[Any]]


def over_handle(handle: Any) -> Call:
    """Calls over a DeploymentHandle. Cancelling a call cancels it at the replica."""
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


class Remote:
    """The replicas, with the interface of BatchingClassifier that the routes of iosr_fast.serving.http use.

    For one event loop. No accepted request is lost with its replica: predictions change nothing, so a request is
    repeated on another replica if its replica dies or refuses it (full queue, shutting down, engine failed). After
    MAX_DEATHS deaths it is not repeated, because it may be the cause. Ray Serve chooses the replica: the less loaded
    of two random ones.

    `pending` is always 0, `healthy` True and `decoders_are_busy` False, because each replica refuses requests itself.
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
        """The description of some replica; waits until there is one."""
        self._facts = await self.ask("describe")
        return self._facts

    @property
    def classifier(self) -> Any:
        """The attributes of a classifier that routes read without waiting, from the last answer of a replica."""
        if self._facts is None:
            raise RuntimeError("expected describe() to have been called")
        return SimpleNamespace(version=self._facts.version, encoder=SimpleNamespace(geometry=self._facts.geometry))

    async def ask(self, method: str, *values: Any) -> Any:
        """The result of a method of any replica."""
        return await self._reach(time.monotonic() + self._longest_s, method, *values)

    async def classify(self, image: Any, **options: Unpack[QueryOptions]) -> Prediction:
        """As BatchingClassifier.classify."""
        (result,) = await self.classify_many((image,), **options)
        if isinstance(result, Exception):
            raise result
        return result

    async def classify_many(
        self, images: Iterable[Any], **options: Unpack[QueryOptions]
    ) -> list[Prediction | Exception]:
        """As BatchingClassifier.classify_many. Raises QueueFullError or ClosedError if MAX_REFUSALS replicas refused
        the request, IosrFastError if one refused the query, ApiError 503 if their engines failed, ApiError 500 if
        MAX_DEATHS replicas died."""
        query, images, start = Query(**options), list(images), time.monotonic()
        until = start + (self._longest_s if query.deadline_s is None else query.deadline_s)
        replies: list[Reply] = []
        while len(replies) < MAX_REFUSALS:
            try:
                reply = await self._reach(until, "classify", images, query)
            except DeadlineExceededError as error:
                if replies:
                    break
                return [error for _ in images]
            self._facts = reply.facts
            if reply.status == "ok":
                self._count(reply, time.monotonic() - start)
                return list(reply.results)
            if reply.status == "refused":
                raise IosrFastError(reply.message)
            replies.append(reply)
            await asyncio.sleep(_PAUSE_S)
        raise _refusal(replies)

    async def _reach(self, until: float, method: str, *values: Any) -> Any:
        """The result of a method of the first replica that survives it. Raises DeadlineExceededError, ApiError."""
        from ray.exceptions import ActorDiedError, RayError, RayTaskError
        from ray.serve.exceptions import RayServeException

        attempts = deaths = 0
        while (left_s := until - time.monotonic()) > 0:
            try:
                return await self.call(method, *values, *([left_s] if method == "classify" else []))
            except RayTaskError:
                raise  # the replica runs; its method raised
            except ActorDiedError as error:
                deaths += 1
                if deaths == MAX_DEATHS:
                    message = f"{MAX_DEATHS} replicas died during this request; it is not sent to another one"
                    raise ApiError(500, "replicas_died", message) from error
                log.warning("a replica died during a request; trying another one: %s", _first_line(error))
            except (RayError, RayServeException) as error:
                log.warning("a replica can't be reached; trying another one: %s", _first_line(error))
            attempts += 1
            await asyncio.sleep(min(_PAUSE_S * 2**attempts, _LONGEST_PAUSE_S, max(0.0, until - time.monotonic())))
        raise DeadlineExceededError(f"no replica answered within the deadline, in {attempts} attempts")

    def _count(self, reply: Reply, latency_s: float) -> None:
        for result in reply.results:
            if isinstance(result, Prediction):
                self._metrics.on_done(latency_s, "ok", result.label)


def _refusal(replies: list[Reply]) -> Exception:
    """The error for a request that all replicas refused, by the most relevant of their reasons."""
    by_status = {reply.status: reply for reply in replies}
    if "full" in by_status:
        soonest_s = min(reply.retry_after_s for reply in replies if reply.status == "full")
        return QueueFullError(by_status["full"].message, soonest_s)
    if "failed" in by_status:
        return busy("engine_failed", "the engines of the replicas fail at present; try again", 5)
    return ClosedError(by_status["closed"].message)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
