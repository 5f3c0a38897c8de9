"""The ASGI application: routes, error handlers and middleware around one BatchingClassifier."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from fastapi import APIRouter, FastAPI

from iosr_fast import __version__
from iosr_fast.serving.http import classes, errors, health, lists, predict, static
from iosr_fast.serving.http.metrics import Metrics
from iosr_fast.serving.http.middleware import Authorisation, RequestMiddleware
from iosr_fast.serving.http.service import Service
from iosr_fast.serving.http.settings import Settings

if TYPE_CHECKING:
    from iosr_fast.serving.batching import BatchingClassifier


def create_app(batching: BatchingClassifier, settings: Settings, metrics: Metrics | None = None) -> FastAPI:
    """The application; `app.state.service` is its service.Service.

    `metrics` should be the observer of `batching`; None makes a new one, which counts requests but no batches.
    The caller closes `batching`. May be called several times in a process.
    """
    service = Service(batching, settings, metrics or Metrics())
    service.metrics.watch(service)
    routers = (
        lists.make_router(service, "private, max-age=3600"),
        classes.make_router(service),
        health.make_router(service, metrics=True),
    )
    return assemble(service, "Few-shot image classification", routers, guarded=True)


def assemble(service: Service, summary: str, routers: Iterable[APIRouter], guarded: bool = False) -> FastAPI:
    """An application with predictions, the page, error handlers, middleware and the routes of `routers`.

    `guarded` requires the token for every request that could change something.
    """
    # FastAPI's documentation pages load scripts from another site.
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
    app.add_middleware(RequestMiddleware, service=service)  # outermost, so that refusals are logged and counted
    for router in (predict.make_router(service), *routers, static.make_router()):
        app.include_router(router)
    return app
