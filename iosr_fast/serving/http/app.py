"""From a Site to the ASGI application: the same routes for one classifier and for each of several."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, FastAPI, Path
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from iosr_fast import __version__
from iosr_fast.serving.http import classes, embeddings, errors, health, lists, predict, schemas, static
from iosr_fast.serving.http.logs import logger
from iosr_fast.serving.http.middleware import RequestMiddleware
from iosr_fast.serving.http.site import ServedClassifier, Site


async def _named(classifier: Annotated[str, Path(description="its name, of /v1/classifiers")]) -> None:
    """Describes the name in a path, by which RequestMiddleware finds the classifier."""


def create_app(site: Site) -> FastAPI:
    """The application. Without a token in the settings it is read-only. May be called several times in a process."""
    app = FastAPI(
        title="iosr_fast",
        version=__version__,
        summary="Few-shot image classification",
        openapi_url=None,  # FastAPI would encode the description for each request
        docs_url=None,  # FastAPI's documentation pages load scripts from another site
        redoc_url=None,
        redirect_slashes=False,
        responses=schemas.ERRORS,
        generate_unique_id_function=lambda route: route.name,  # names of functions in generated clients
        exception_handlers=errors.HANDLERS,
    )
    app.add_middleware(RequestMiddleware, site=site)
    if site.settings.allow_origin:  # around it, because a browser hides errors, too, if they lack its headers
        app.add_middleware(
            CORSMiddleware,
            allow_origins=site.settings.allow_origin,
            allow_methods=("GET", "POST", "PATCH", "DELETE"),
            allow_headers=("Authorization", "Content-Type"),
            expose_headers=("Retry-After", "X-Request-ID"),
        )
    described = cache(lambda: msgspec.json.encode(app.openapi()))  # the same bytes each time

    async def openapi() -> Response:
        return Response(described(), media_type="application/json")

    @app.get("/v1/classifiers", tags=["classes"], include_in_schema=not site.alone, summary="All classifiers")
    def classifiers() -> schemas.ClassifiersAnswer:
        return schemas.ClassifiersAnswer(site.listed())

    if not site.alone:
        app.include_router(predict.make_router_of_several(site))
    routes = APIRouter()
    if isinstance(site.described, ServedClassifier):
        for router in (predict.make_router(site), lists.router, classes.make_router(site)):
            routes.include_router(router)
    routes.include_router(embeddings.make_router(site))
    pages = static.make_router()
    pages.get("/openapi.json")(openapi)
    named: Any = {"prefix": "/v1/classifiers/{classifier}", "dependencies": [Depends(_named)]}
    app.include_router(health.make_router(site))  # first, as these are the cheapest requests
    app.include_router(pages)
    app.include_router(routes, prefix="/v1", include_in_schema=site.alone)
    app.include_router(routes, include_in_schema=not site.alone, **named)
    app.include_router(pages, **named)
    return app


def warm(app: FastAPI, site: Site) -> None:
    """Do what is slow the first time: run the engine at each batch size, and describe the API (/openapi.json), for
    which the event loop would stand still. Raises what the engine raises; of several, if none works."""
    failures = dict[str, Exception]()
    for served in site.engines:
        try:
            served.batching.warm()
        except Exception as error:
            failures[served.name] = error
    if len(failures) == len(site.engines):
        raise next(iter(failures.values()))
    for name, failure in failures.items():
        logger.error("warm_up_failed", exc_info=failure, extra={"facts": {"classifier": name}})
    app.openapi()
