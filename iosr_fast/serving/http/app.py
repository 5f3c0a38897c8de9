"""From a classifier to the ASGI application: its batches, and the routes around them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from iosr_fast import __version__
from iosr_fast.encoders.encoder import Encoder
from iosr_fast.encoders.rows import Rows
from iosr_fast.serving.batching import BatchingClassifier
from iosr_fast.serving.http import classes, errors, health, lists, predict, schemas, static
from iosr_fast.serving.http.logs import logger
from iosr_fast.serving.http.middleware import RequestMiddleware
from iosr_fast.serving.http.service import Served, Service
from iosr_fast.serving.http.settings import Settings

if TYPE_CHECKING:
    from iosr_fast.classifier import Classifier

_CPU_BATCH = 8
OPTIONS: dict[str, Any] = {  # of an application
    "title": "iosr_fast",
    "version": __version__,
    "summary": "Few-shot image classification",
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


def create_app(service: Service) -> FastAPI:
    """The application. Without a token in the settings it is read-only. May be called several times in a process."""
    app = FastAPI(**OPTIONS)
    app.add_middleware(RequestMiddleware, service=service)
    for module in (predict, lists, health, *([classes] if service.takes_changes else [])):
        app.include_router(module.make_router(service))
    app.include_router(static.make_router(service.uploads.sentence))
    return app


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
