"""The HTTP application: routes, errors and middleware around one BatchingClassifier."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from fastapi import APIRouter, FastAPI

from iosr_fast import __version__
from iosr_fast.serving.http import classes, errors, health, predict, static
from iosr_fast.serving.http.metrics import Metrics
from iosr_fast.serving.http.middleware import Authorisation, RequestMiddleware
from iosr_fast.serving.http.service import Service
from iosr_fast.serving.http.settings import Settings

if TYPE_CHECKING:
    from iosr_fast.serving.batching import BatchingClassifier


def create_app(batching: BatchingClassifier, settings: Settings, metrics: Metrics | None = None) -> FastAPI:
    """The application; `app.state.service` is its serving.service.Service.

    `metrics` is what `batching` was given as its observer; None makes one, which then counts requests but no batches.
    Closing `batching` is up to who made it. May be called several times in a process.
    """
    service = Service(batching, settings, metrics or Metrics())
    service.metrics.watch(service)
    routers = (classes.make_router(service), health.make_router(service))
    return assemble(service, "Few-shot image classification", routers, guarded=True)


def assemble(service: Service, summary: str, routers: Iterable[APIRouter], guarded: bool = False) -> FastAPI:
    """An application with predictions, the page, errors and middleware, and besides what `routers` have.

    `guarded` where some of that changes something: it needs the token then.
    """
    # The framework's own pages of documentation load scripts from elsewhere; /openapi.json has all they say.
    app = FastAPI(
        title="iosr_fast",
        version=__version__,
        summary=summary,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    errors.install(app)
    if guarded:
        app.add_middleware(Authorisation, service=service)
    app.add_middleware(RequestMiddleware, service=service)  # around the other one: refusals are logged and counted
    for router in (predict.make_router(service), *routers, static.make_router()):
        app.include_router(router)
    return app
