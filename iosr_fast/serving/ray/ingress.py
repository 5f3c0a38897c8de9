"""The HTTP API in front of the replicas: that of iosr_fast.serving.http without changes of classes and /metrics."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from iosr_fast.exceptions import DeadlineExceededError
from iosr_fast.methods.unknown import KEEP
from iosr_fast.serving.http import classes, health, lists
from iosr_fast.serving.http.app import assemble
from iosr_fast.serving.http.errors import ApiError, busy
from iosr_fast.serving.http.lists import PAGE
from iosr_fast.serving.http.metrics import Metrics
from iosr_fast.serving.http.service import Service
from iosr_fast.serving.http.settings import Settings
from iosr_fast.serving.ray.remote import Remote, over_handle

if TYPE_CHECKING:
    from iosr_fast.serving.batching import BatchingClassifier

_READY_S = 2.0  # for a replica to describe itself


class Ingress:
    """The deployment that receives HTTP requests. It has started once a replica has answered it.

    It computes nothing, so it rarely fails. If its machine fails, its requests end without an answer and clients have
    to send them again.
    """

    async def __init__(self, replicas: Any, settings: Settings) -> None:  # type: ignore[misc]
        metrics = Metrics()
        remote = Remote(over_handle(replicas), settings.max_deadline_ms / 1e3, metrics)
        while True:
            try:
                await remote.describe()
                break
            except DeadlineExceededError:
                continue  # Ray Serve reports why replicas do not start
        self._app = make_app(remote, settings, metrics)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app


class RemoteService(Service):
    """A Service whose lists and readiness come from the replicas."""

    def __init__(self, remote: Remote, settings: Settings, metrics: Metrics) -> None:
        super().__init__(cast("BatchingClassifier", remote), settings, metrics)
        self._remote = remote

    async def overview(self, keep: float = KEEP) -> dict[str, Any]:
        return await self._ask("overview", keep)

    async def classes(self, limit: int = PAGE, after: str | None = None) -> dict[str, Any]:
        return await self._ask("classes", limit, after)

    async def examples(self, class_id: str, limit: int = PAGE, after: str | None = None) -> dict[str, Any] | None:
        return await self._ask("examples", class_id, limit, after)

    async def picture(self, example_id: str) -> bytes | None:
        return await self._ask("picture", example_id)

    async def readiness(self) -> tuple[bool, str, str]:
        try:
            async with asyncio.timeout(_READY_S):
                facts = await self._remote.describe()
        except (TimeoutError, ApiError):  # DeadlineExceededError is a TimeoutError
            return False, "no replica", f"none answered within {_READY_S:g} s"
        return True, "ok", f"an update was refused: {facts.refused}" if facts.refused else ""

    async def _ask(self, method: str, *values: Any) -> Any:
        try:
            return await self._remote.ask(method, *values)
        except DeadlineExceededError:
            raise busy("no_replica", "no replica has answered; try again", 5) from None


def make_app(remote: Remote, settings: Settings, metrics: Metrics) -> FastAPI:
    """The application; `app.state.service` is a RemoteService. `remote.describe` must have been called.

    There is no /metrics: behind a proxy each scrape would reach another process, and Ray exports its own metrics.
    """
    service = RemoteService(remote, settings, metrics)
    # During an update a list comes from the old bundle or from the new one. Pictures are not cached, because another
    # bundle may use the same id for another picture.
    routers = (
        lists.make_router(service, "no-store", 503),
        _refused_changes(service),
        health.make_router(service, metrics=False),
    )
    return assemble(service, "Few-shot image classification, on several replicas", routers)


def _refused_changes(service: Service) -> APIRouter:
    """405 for the changes of iosr_fast.serving.http."""
    router = APIRouter(include_in_schema=False)

    async def refuse(request: Request) -> Response:
        allowed = "GET" if request.url.path == "/v1/classes" or request.url.path.endswith("/examples") else ""
        raise ApiError(
            405,
            "changes_elsewhere",
            "classes can't be changed on replicas, because a change would reach one replica only: change them on one "
            "classifier (`iosr-fast serve`, or Python), save it and deploy the bundle (`iosr-fast serve-ray`)",
            {"Allow": allowed},
        )

    for route in cast("list[APIRoute]", classes.make_router(service).routes):
        router.add_api_route(route.path, refuse, methods=list(route.methods or ()))
    return router
