"""From one classifier, or several, to the ASGI application: their batches, and the routes around them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import msgspec
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from iosr_fast import __version__
from iosr_fast.encoders.encoder import Encoder
from iosr_fast.encoders.rows import Rows
from iosr_fast.serving.batching import BatchingClassifier
from iosr_fast.serving.http import classes, errors, health, lists, predict, schemas, static
from iosr_fast.serving.http.errors import ApiError
from iosr_fast.serving.http.logs import logger
from iosr_fast.serving.http.middleware import REFUSAL, WHOLE_PATH, RequestMiddleware
from iosr_fast.serving.http.service import Front, Served, Service
from iosr_fast.serving.http.settings import Settings

if TYPE_CHECKING:
    from iosr_fast.classifier import Classifier

_CPU_BATCH = 8
_ROOT = "/v1/classifiers"
_PATH = re.compile(rf"{_ROOT}/([^/]*)/(.*)", re.DOTALL)
_NAME = {"name": "classifier", "in": "path", "required": True, "schema": {"type": "string"}, "description": "its name"}
_OPTIONS: dict[str, Any] = {  # of an application
    "title": "iosr_fast",
    "version": __version__,
    "summary": "Few-shot image classification",
    "openapi_url": None,  # FastAPI would encode the description for each request
    "docs_url": None,  # FastAPI's documentation pages load scripts from another site
    "redoc_url": None,
    "redirect_slashes": False,
    "responses": schemas.ERRORS,
    "generate_unique_id_function": lambda route: route.name,  # names of functions in generated clients
    "exception_handlers": errors.HANDLERS,
}


def make_batching(
    classifiers: Classifier | Mapping[str, Classifier], settings: Settings, **options: Any
) -> BatchingClassifier:
    """A BatchingClassifier with these limits, whose decoders run in processes; `options` go to its constructor."""
    from PIL import Image

    encoder = (next(iter(classifiers.values())) if isinstance(classifiers, Mapping) else classifiers).encoder
    own: dict[str, Any] = {"isolated": True, "decode_threads": settings.decode_threads}
    own["max_batch"] = batch_for(encoder, settings)
    if isinstance(encoder, Rows):  # nothing to decode, and little that a large batch delays
        own = {"decode_threads": 1, "max_batch": settings.max_batch or settings.max_images}
    # Pillow refuses images of twice this: a second check, of the size that a decoder reads inside a file.
    Image.MAX_IMAGE_PIXELS = max(1, settings.max_pixels // 2)
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    limits = {"max_queue": settings.max_queue, "limits": settings.decode_limits, "max_error": settings.max_error}
    return BatchingClassifier(classifiers, **{**limits, **own, **options})


def batch_for(encoder: Encoder, settings: Settings) -> int:
    """`max_batch`, or the default of the engine. Only engines on a GPU have sizes of batches that they prepare."""
    return settings.max_batch or (encoder.max_batch if encoder.buckets else _CPU_BATCH)


def create_app(served: Service | Front) -> FastAPI:
    """The application. Without a token in the settings it is read-only. May be called several times in a process."""
    if isinstance(served, Front):
        return SeveralApp(served)
    app = FastAPI(**_OPTIONS)
    _add_middleware(app, served)
    for module in (predict, lists, health, classes):
        app.include_router(module.make_router(served))
    app.include_router(static.make_router(served.uploads.sentence))
    _describe(app)
    return app


def _describe(app: FastAPI) -> None:
    """Answer /openapi.json by the same bytes each time."""
    described = cache(lambda: msgspec.json.encode(app.openapi()))

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return Response(described(), media_type="application/json")


def _add_middleware(app: FastAPI, served: Served) -> None:
    app.add_middleware(RequestMiddleware, service=served)
    if served.settings.allow_origin:  # around it, because a browser hides errors, too, if they lack its headers
        app.add_middleware(
            CORSMiddleware,
            allow_origins=served.settings.allow_origin,
            allow_methods=("GET", "POST", "PATCH", "DELETE"),
            allow_headers=("Authorization", "Content-Type"),
            expose_headers=("Retry-After", "X-Request-ID"),
        )


def warm(app: FastAPI, served: Served) -> None:
    """Do what is slow the first time: run the engine at each batch size, and describe the API (/openapi.json), for
    which the event loop would stand still. Raises what the engine raises; of several, if none works."""
    failures = dict[str, Exception]()
    for service in served.engines:
        try:
            service.batching.warm()
        except Exception as error:
            failures[service.name] = error
    if len(failures) == len(served.engines):
        raise next(iter(failures.values()))
    for name, failure in failures.items():
        logger.error("warm_up_failed", exc_info=failure, extra={"facts": {"classifier": name}})
    app.openapi()


class SeveralApp(FastAPI):
    """Hands each request below /v1/classifiers/NAME/ to the application of that classifier, which gets it as the server
    of one gets it: REST as /v1/REST, and the page and its files as they are. Answers the others itself."""

    def __init__(self, front: Front) -> None:
        super().__init__(**_OPTIONS)
        self._front = front
        self._apps = {name: create_app(service) for name, service in front.services.items()}
        _add_middleware(self, front)
        for router in (predict.make_router(front), health.make_router(front)):
            self.include_router(router)
        self.get(_ROOT, tags=["classes"], name="classifiers", summary="All classifiers")(self._list)
        self.include_router(static.make_router(start="classifiers.html"))
        _describe(self)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        named = _PATH.fullmatch(scope["path"]) if scope["type"] == "http" else None
        if named is None:
            await super().__call__(scope, receive, send)
            return
        name, rest = named.groups()
        inner = {**scope, WHOLE_PATH: scope["path"], "path": f"/v1/{rest}"}
        if rest in ("", "openapi.json") or rest.startswith("static/"):
            inner["path"] = f"/{rest}"
        app: Any = super().__call__ if rest == "openapi.json" else self._apps.get(name)
        if isinstance(refusal := self._front.find(name), ApiError):
            app, inner[REFUSAL] = super().__call__, refusal
        await app(inner, receive, send)

    def openapi(self) -> dict[str, Any]:
        """Its own routes, and those of a classifier, with its name as a parameter: of one that takes images, if any."""
        fresh, described = self.openapi_schema is None, super().openapi()
        if fresh:
            first = max(self._apps, key=lambda name: self._front.services[name].takes_changes)
            of_one = self._apps[first].openapi()
            for path, operations in of_one["paths"].items():
                if path.startswith("/v1/"):
                    whole = f"{_ROOT}/{{classifier}}/{path.removeprefix('/v1/')}"
                    described["paths"][whole] = {"parameters": [_NAME], **operations}
            for kind, parts in of_one["components"].items():
                described["components"].setdefault(kind, {}).update(parts)
        return described

    def _list(self) -> schemas.ClassifiersAnswer:
        listed = [schemas.Listed(name, error) for name, error in self._front.refused.items()]
        for name, one in self._front.services.items():
            head, source = one.head, one.classifier.encoder.source
            model = None if source is None else source.manifest["model"]
            facts = len(head.uids), head.version, model, head.config.method
            listed.append(schemas.Listed(name, one.failure or None, *facts))
        return schemas.ClassifiersAnswer(sorted(listed, key=lambda one: one.name))
