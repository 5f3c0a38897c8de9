"""From a saved folder to the ASGI application: what is served, its batches, and the routes around them."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from iosr_fast import __version__
from iosr_fast.encoders.encoder import Encoder
from iosr_fast.encoders.rows import Rows
from iosr_fast.exceptions import IosrFastError
from iosr_fast.serving.batching import BatchingClassifier
from iosr_fast.serving.http import classes, errors, health, lists, predict, schemas, static
from iosr_fast.serving.http.middleware import RequestMiddleware
from iosr_fast.serving.http.service import Service
from iosr_fast.serving.http.settings import Settings
from iosr_fast.utils.machine import usable_threads

if TYPE_CHECKING:
    from iosr_fast.classifier import Classifier

_CPU_BATCH = 8


def open_served(folder: str | Path, settings: Settings, cores: int | None = None) -> Classifier:
    """What is served of a folder (classifier.open_saved), on so many cores; None: all. Raises IosrFastError for what
    can't be.

    On a CPU the encoder has about as many runs as threads. Each run has batches of its own, so a core that a decoder
    or a request takes delays one run. One run on all cores would wait at every layer for the core that is taken. One
    thread a run would be slow for a lone image.
    """
    from iosr_fast.classifier import open_saved

    cores = cores or usable_threads()
    runs = math.ceil(math.sqrt(cores))
    served = open_saved(folder, settings.runtime, cores // runs, settings.expected_digest, runs)
    if isinstance(served.encoder, Rows) and (settings.log or settings.collect) is not None:
        raise IosrFastError("a head takes no changes and gets no pictures: leave out --log and --collect")
    served.snapshot().require_single_label("the HTTP API", "serve one fitted with one label, or use predict")
    return served


def make_batching(classifier: Classifier, settings: Settings, **options: Any) -> BatchingClassifier:
    """A BatchingClassifier with these limits, whose decoders run in processes; `options` go to its constructor."""
    from PIL import Image

    own: dict[str, Any] = {"isolated": True, "decode_threads": settings.decode_threads}
    own["max_batch"] = batch_for(classifier.encoder, settings)
    if isinstance(classifier.encoder, Rows):  # nothing to decode, and little that a large batch delays
        own = {"decode_threads": 1, "max_batch": settings.max_batch or settings.max_images}
    # Pillow refuses images of twice this: a second check, of the size that a decoder reads inside a file.
    Image.MAX_IMAGE_PIXELS = max(1, settings.max_pixels // 2)
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    limits = {"max_queue": settings.max_queue, "limits": settings.decode_limits, "max_error": settings.max_error}
    return BatchingClassifier(classifier, **{**limits, **own, **options})


def batch_for(encoder: Encoder, settings: Settings) -> int:
    """`max_batch`, or the default of the engine. Only engines on a GPU have sizes of batches that they prepare."""
    return settings.max_batch or (encoder.max_batch if encoder.buckets else _CPU_BATCH)


def create_app(service: Service) -> FastAPI:
    """The application. Without a token in the settings it is read-only. May be called several times in a process."""
    # FastAPI's documentation pages load scripts from another site.
    app = FastAPI(
        title="iosr_fast",
        version=__version__,
        summary="Few-shot image classification",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses=schemas.ERRORS,
        exception_handlers=errors.HANDLERS,
    )
    app.add_middleware(RequestMiddleware, service=service)
    for module in (predict, lists, health, *([classes] if service.takes_changes else [])):
        app.include_router(module.make_router(service))
    app.include_router(static.make_router(service.uploads.sentence))
    return app


def warm(app: FastAPI, service: Service) -> None:
    """Do what is slow the first time: run the engine at each batch size, and describe the API (/openapi.json), for
    which the event loop would stand still. Raises what the engine raises."""
    service.batching.warm()
    app.openapi()
