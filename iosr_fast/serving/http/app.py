"""The ASGI application: routes, error handlers and middleware around one BatchingClassifier."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI

from iosr_fast import __version__
from iosr_fast.serving.http import classes, errors, health, lists, predict, schemas, static
from iosr_fast.serving.http.metrics import Metrics
from iosr_fast.serving.http.middleware import RequestMiddleware
from iosr_fast.serving.http.service import Service
from iosr_fast.serving.http.settings import Settings

if TYPE_CHECKING:
    from iosr_fast.serving.batching import BatchingClassifier
    from iosr_fast.serving.collector import Collector


def create_app(
    batching: BatchingClassifier,
    settings: Settings,
    metrics: Metrics | None = None,
    collector: Collector | None = None,
) -> FastAPI:
    """The application; `app.state.service` is its service.Service. Without `settings.token` it is read-only.

    `metrics` should be the observer of `batching`; None makes a new one, which counts requests but no batches.
    `collector` is what `batching` collects with. The caller closes both. May be called several times in a process.
    """
    service = Service(batching, settings, metrics or Metrics(), collector)
    service.metrics.watch(service)
    # FastAPI's documentation pages load scripts from another site.
    app = FastAPI(
        title="iosr_fast",
        version=__version__,
        summary="Few-shot image classification",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses=schemas.ERRORS,
    )
    app.state.service = service
    errors.install(app)
    app.add_middleware(RequestMiddleware, service=service)
    for module in (predict, lists, health, *([classes] if service.takes_changes else [])):
        app.include_router(module.make_router(service))
    app.include_router(static.make_router(service.uploads.sentence))
    return app
