"""Is it alive (/healthz), should it get requests (/readyz), what has it done (/metrics)."""

from __future__ import annotations

import asyncio
import io
import time
from functools import cache

from fastapi import APIRouter
from PIL import Image
from starlette.responses import JSONResponse, Response

from iosr_fast.serving.batching import ClosedError, QueueFullError
from iosr_fast.serving.http import schemas
from iosr_fast.serving.http.metrics import CONTENT_TYPE
from iosr_fast.serving.http.service import Service


class Probe:
    """Decodes and classifies a grey PNG where no image was classified for a while, and remembers for a while what came
    of it.

    Those who ask at the same time share one probe, so that asking often costs nothing.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._lock = asyncio.Lock()
        self._failure = ""
        self._probed = float("-inf")

    async def failure(self) -> str:
        """What is wrong with the engine; "" where nothing is."""
        batching, settings = self._service.batching, self._service.settings
        if not batching.healthy:
            return f"the engine failed: {batching.last_error}"
        async with self._lock:
            silent = time.monotonic() - self._service.metrics.last_answer
            if silent < settings.probe_after_s or self._service.loading or batching.closed:
                return ""
            if time.monotonic() - self._probed >= settings.probe_every_s:
                self._failure = await self._probe(silent)
                self._probed = time.monotonic()
            return self._failure

    async def _probe(self, silent: float) -> str:
        service, settings = self._service, self._service.settings
        within = settings.probe_deadline_s
        try:
            async with asyncio.timeout(within):
                await service.batching.classify(_grey_png(), top=1, deadline_s=within)
        except QueueFullError:
            return self._busy(silent)
        except ClosedError:
            return ""
        except TimeoutError:  # DeadlineExceededError is one
            if service.batching.decoders_are_busy:  # with images that take long, each within its limits
                return self._busy(silent)
            return f"a grey image was not classified within {within:g} s"
        except Exception as error:
            return f"a grey image could not be classified: {error}"
        return ""

    def _busy(self, silent: float) -> str:
        """So much to do that a probe finds no place or no decoder is no failure, but nothing done for long is."""
        return "" if silent < self._service.settings.stuck_after_s else f"no image was classified for {silent:.0f} s"


@cache
def _grey_png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (128, 128, 128)).save(file, "PNG")
    return file.getvalue()


def make_router(service: Service) -> APIRouter:
    router = APIRouter(tags=["operations"])
    probe = Probe(service)

    @router.get(
        "/healthz",
        response_model=schemas.StateAnswer,
        responses={503: {"model": schemas.StateAnswer, "description": "The engine failed: restart the process"}},
        summary="Does the engine work?",
    )
    async def healthz() -> Response:
        failure = await probe.failure()
        return state_answer(failure == "", "failed", failure)

    @router.get(
        "/readyz",
        response_model=schemas.StateAnswer,
        responses={503: {"model": schemas.StateAnswer, "description": "Loading, shutting down, or failed"}},
        summary="Should it get requests?",
    )
    async def readyz() -> Response:
        if service.draining or service.batching.closed:
            return state_answer(False, "shutting down")
        ready = not service.loading and service.batching.healthy
        return state_answer(ready, "loading" if service.loading else "failed", service.read_only if ready else "")

    # Not `async`: rendering thousands of classes' series takes a while, which is then a thread's.
    @router.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {CONTENT_TYPE: {"schema": {"type": "string"}}}}},
        summary="For Prometheus",
    )
    def metrics() -> Response:
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    return router


def state_answer(good: bool, status: str, detail: str = "") -> Response:
    """200 where all is `good`, 503 with `status` otherwise; for nobody's cache."""
    body = {"status": "ok" if good else status, "detail": detail}
    return JSONResponse(body, 200 if good else 503, {"Cache-Control": "no-store"})
