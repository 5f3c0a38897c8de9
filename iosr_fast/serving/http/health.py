"""/healthz (does the engine work?), /readyz (is the server ready for requests?) and /metrics."""

from __future__ import annotations

import asyncio
import math
import time
from types import SimpleNamespace
from typing import Any

from fastapi import APIRouter
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE
from starlette.responses import JSONResponse, Response

from iosr_fast.exceptions import ClosedError, QueueFullError
from iosr_fast.serving.http import schemas
from iosr_fast.serving.http.site import ServedEncoder, Site
from iosr_fast.serving.limits import Deadlines


class Probe:
    """Classifies a grey PNG, or a row of ones, if no image was classified for a while; one at a time, and any answer
    counts for all."""

    def __init__(self, served: ServedEncoder) -> None:
        self._served = served
        self._lock = asyncio.Lock()

    async def failure(self) -> str:
        """Why the engine is unhealthy; "" if it works."""
        batching = self._served.batching
        if not batching.healthy:
            return f"the engine failed: {batching.last_error}"
        async with self._lock:
            idle_s = time.monotonic() - self._served.engine_metrics.last_answer
            if idle_s < Deadlines.probe_after_s or self._served.site.loading or batching.closed:
                return ""
            names = tuple(batching.classifiers)
            # A server too busy for the probe is healthy as long as it classifies images.
            busy = "" if idle_s < Deadlines.stuck_after_s else f"no image was classified for {idle_s:.0f} s"
            try:
                async with asyncio.timeout(within_s := Deadlines.probe_within_s):
                    asked: dict[str, Any] = {"top": 1, "deadline_s": within_s, "probe": True, "classifier": names}
                    answers = await batching.classify(self._served.uploads.probe, **asked)
                failed = [answer for answer in answers if isinstance(answer, Exception)] if names else []
                if failed and len(failed) == len(names):
                    raise failed[0]
            except QueueFullError:
                return busy
            except ClosedError:
                return ""
            except TimeoutError:  # DeadlineExceededError is one; decoders may be busy with slow images within limits
                return busy if batching.decoders_are_busy else f"a probe was not classified within {within_s:g} s"
            except Exception as error:
                return f"a probe could not be classified: {error}"
            return ""


def make_router(site: Site) -> APIRouter:
    """/healthz, /readyz and /metrics."""
    router = APIRouter(tags=["operations"])
    probes = [Probe(served) for served in site.engines]
    rendering, rendered = asyncio.Lock(), SimpleNamespace(text=b"", at=-math.inf)
    every = [*site.served.values()]

    @router.get(
        "/healthz",
        response_model=schemas.StateAnswer,
        responses={503: {"model": schemas.StateAnswer, "description": "No image can be classified: restart it"}},
        summary="Does the engine work?",
    )
    async def healthz() -> Response:
        failures = await asyncio.gather(*(probe.failure() for probe in probes))
        return _state("failed" if all(failures) else "ok", "; ".join(filter(None, failures)))

    @router.get(
        "/readyz",
        response_model=schemas.StateAnswer,
        responses={503: {"model": schemas.StateAnswer, "description": "Loading, shutting down, or failed"}},
        summary="Is the server ready for requests?",
    )
    async def readyz() -> Response:
        if site.draining or all(served.batching.closed for served in every):
            return _state("shutting down")
        if site.loading or all(served.failure for served in every):
            return _state("loading" if site.loading else "failed")
        return _state("ok", site.note)

    @router.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {CONTENT_TYPE: {"schema": {"type": "string"}}}}},
        summary="Metrics in Prometheus's text format",
    )
    async def scrape() -> Response:
        async with rendering:
            if time.monotonic() - rendered.at >= Deadlines.scrape_s:
                rendered.text = await asyncio.to_thread(render)  # the series of thousands of classes
                rendered.at = time.monotonic()
        return Response(rendered.text, headers={"Content-Type": CONTENT_TYPE})

    def render() -> bytes:
        for served in site.classifiers:
            if served.collector is not None:
                served.collector.read_labels(served.head)  # for the next scrape
        return site.metrics.text()

    return router


def _state(status: str, detail: str = "") -> Response:
    """200 for "ok", else 503; never cached."""
    code = 200 if status == "ok" else 503
    return JSONResponse({"status": status, "detail": detail}, code, {"Cache-Control": "no-store"})
