"""The HTTP API in front of the replicas: iosr_fast.serving.http's, but for what only one process can offer."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

from fastapi import APIRouter, FastAPI, Path
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from iosr_fast.serving.batching import DeadlineExceededError
from iosr_fast.serving.http import schemas
from iosr_fast.serving.http.app import assemble
from iosr_fast.serving.http.errors import ApiError, busy
from iosr_fast.serving.http.health import Probe, state_answer
from iosr_fast.serving.http.lists import AFTER_CLASS, AFTER_EXAMPLE, LIMIT
from iosr_fast.serving.http.metrics import Metrics
from iosr_fast.serving.http.service import Service
from iosr_fast.serving.http.settings import Settings
from iosr_fast.serving.ray.remote import Remote, over_handle

if TYPE_CHECKING:
    from iosr_fast.serving.batching import BatchingClassifier

_CHANGES = (
    ("POST", "/v1/classes"),
    ("PATCH", "/v1/classes/{class_id}"),
    ("DELETE", "/v1/classes/{class_id}"),
    ("POST", "/v1/classes/{class_id}/examples"),
    ("DELETE", "/v1/examples/{example_id}"),
    ("POST", "/v1/retune"),
)
_READY_S = 2.0  # that a replica has to say that it is there


class Ingress:
    """The deployment that takes HTTP requests. It has started when a replica has answered it.

    It computes nothing, so that little can make it fail. Where it dies all the same, with its machine, the requests it
    had end without a prediction, and clients have to send them again.
    """

    async def __init__(self, replicas: Any, settings: Settings) -> None:  # type: ignore[misc]
        metrics = Metrics()
        remote = Remote(over_handle(replicas), settings.max_deadline_ms / 1e3, metrics)
        while True:
            try:
                await remote.describe()
                break
            except DeadlineExceededError:
                continue  # Ray Serve says of replicas that never start why they don't
        self._app = make_app(remote, settings, metrics)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app


def make_app(remote: Remote, settings: Settings, metrics: Metrics) -> FastAPI:
    """The application. `remote` has to have described itself; `app.state.service` is a serving.service.Service.

    There is no /metrics: behind a proxy each scrape would be of another process, and Ray exports its own.
    """
    service = Service(cast("BatchingClassifier", remote), settings, metrics)
    routers = (_lists(remote), _refused_changes(), _health(remote, service))
    return assemble(service, "Few-shot image classification, on several replicas", routers)


def _lists(remote: Remote) -> APIRouter:
    """What a replica says of its classes; during an update that is the old bundle or the new one."""
    router = APIRouter(tags=["classes"])
    told = schemas.errors(404, 422, 500, 503)

    @router.get(
        "/v1/classes",
        response_model=schemas.ClassesAnswer,
        responses=schemas.errors(422, 500, 503),
        summary="Classes, page by page",
    )
    async def classes(limit: int = LIMIT, after: str | None = AFTER_CLASS) -> Response:
        return JSONResponse(await _asked(remote, "classes", limit, after))

    @router.get(
        "/v1/classes/{class_id}/examples",
        response_model=schemas.ExamplesAnswer,
        responses=told,
        summary="A class's support images, page by page",
    )
    async def examples(
        class_id: str = Path(max_length=40), limit: int = LIMIT, after: str | None = AFTER_EXAMPLE
    ) -> Response:
        found = await _asked(remote, "examples", class_id, limit, after)
        if found is None:
            raise ApiError(404, "no_class", f"no class has the id {class_id!r}; /v1/classes lists those that are there")
        return JSONResponse(found)

    @router.get(
        "/v1/examples/{example_id}/picture",
        response_class=Response,
        responses={
            200: {"content": {"image/webp": {"schema": {"type": "string", "format": "binary"}}}},
            **told,
        },
        summary="A support image, small",
    )
    async def picture(example_id: str = Path(max_length=40)) -> Response:
        kept = await _asked(remote, "picture", example_id)
        if kept is None:
            raise ApiError(404, "no_picture", f"there is no picture of a support image {example_id!r}")
        # Not to be cached: another bundle may call another picture so.
        return Response(kept, media_type="image/webp", headers={"Cache-Control": "no-store"})

    return router


async def _asked(remote: Remote, method: str, *values: Any) -> Any:
    try:
        return await remote.ask(method, *values)
    except DeadlineExceededError:
        raise busy("no_replica", "no replica has answered; try again", 5) from None


def _refused_changes() -> APIRouter:
    """405 for what iosr_fast.serving.http changes here."""
    router = APIRouter(include_in_schema=False)

    async def refuse(request: Request) -> Response:
        allowed = "GET" if request.url.path == "/v1/classes" or request.url.path.endswith("/examples") else ""
        raise ApiError(
            405,
            "changes_elsewhere",
            "classes are not changed on replicas, for a change would be one replica's: change them on one classifier "
            "(`iosr-fast serve`, or Python), save it and roll the bundle out (tools/serve_ray.py)",
            {"Allow": allowed},
        )

    for method, path in _CHANGES:
        router.add_api_route(path, refuse, methods=[method])
    return router


def _health(remote: Remote, service: Service) -> APIRouter:
    router = APIRouter(tags=["operations"])
    probe = Probe(service)

    @router.get(
        "/healthz",
        response_model=schemas.StateAnswer,
        responses={503: {"model": schemas.StateAnswer, "description": "No replica classifies"}},
        summary="Are images classified?",
    )
    async def healthz() -> Response:
        failure = await probe.failure()
        return state_answer(failure == "", "failed", failure)

    @router.get(
        "/readyz",
        response_model=schemas.StateAnswer,
        responses={503: {"model": schemas.StateAnswer, "description": "No replica answers"}},
        summary="Should it get requests?",
    )
    async def readyz() -> Response:
        try:
            async with asyncio.timeout(_READY_S):
                facts = await remote.describe()
        except (TimeoutError, ApiError):  # DeadlineExceededError is a TimeoutError
            return state_answer(False, "no replica", f"none answered within {_READY_S:g} s")
        return state_answer(True, "ok", f"an update was refused: {facts.refused}" if facts.refused else "")

    return router
