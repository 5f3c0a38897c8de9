"""One replica: a classifier behind its own batches, in a process of its own."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import warnings
from typing import Any

from iosr_fast.images.preprocess import BadImageError
from iosr_fast.serving.batching import BatchingClassifier, ClosedError, DeadlineExceededError, QueueFullError
from iosr_fast.serving.http.lists import PAGE, class_page, example_page
from iosr_fast.serving.http.settings import Settings
from iosr_fast.serving.ray.messages import Facts, Reply
from iosr_fast.serving.ray.source import Source
from iosr_fast.state.predictions import Prediction

log = logging.getLogger("ray.serve")


class ClassifierReplica:
    """What Ray Serve runs several of. Its `user_config` is {"bundle": folder, "checksum": of its manifest, or None}.

    `reconfigure` loads the bundle of a new user_config beside the old one, warms it, and then swaps: no request waits
    longer for it than for a batch. A bundle that can't be loaded is an error where there is no old one; otherwise the
    old one stays, the error is logged and stands in `describe`. It is not raised then, because Ray Serve would stop the
    replica, and with it the classifier that works; rollout.deploy raises it, and goes back to the old bundle.
    """

    def __init__(self, settings: Settings, threads: int) -> None:
        from PIL import Image

        # As iosr_fast.serving.http.server does: a second look at what decoders are told by a file's inside.
        Image.MAX_IMAGE_PIXELS = max(1, settings.max_pixels // 2)
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        self._settings, self._threads = settings, threads
        self._batching: BatchingClassifier | None = None
        self._wanted: Source | None = None
        self._source: Source | None = None
        self._refused = ""
        self._updating = asyncio.Lock()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        wanted = Source.from_config(user_config)
        async with self._updating:
            if wanted == self._wanted and not self._refused:
                return  # Ray Serve calls for other reasons, too
            self._wanted = wanted
            try:
                self._source = await asyncio.to_thread(self._take, wanted)
                self._refused = ""
            except Exception as error:
                if self._batching is None:
                    raise
                self._refused = f"{wanted.bundle}: {error}"
                log.exception("the bundle %s can't be served; %s stays", wanted.bundle, self._source)

    def _take(self, wanted: Source) -> Source:
        source, classifier = wanted.load(self._settings, self._threads)
        if self._batching is not None:
            self._batching.replace(classifier)
            return source
        settings = self._settings
        self._batching = BatchingClassifier(
            classifier,
            max_batch=settings.batch_for(classifier.encoder),
            max_wait_ms=settings.max_wait_ms,
            max_queue=settings.max_queue,
            decode_threads=settings.decode_threads or self._threads,
            limits=settings.decode_limits,
            isolated=True,
            warm=True,
        )
        return source

    async def classify(self, images: list[Any], top: int, nearest: int, client: str, deadline_s: float | None) -> Reply:
        """Predictions of images as BatchingClassifier takes them, or why another replica should be asked."""
        batching = self._serving
        try:
            results = await batching.classify_many(
                images, top=top, nearest=nearest, deadline_s=deadline_s, client=client
            )
        except QueueFullError as error:
            return Reply("full", self._facts(), message=str(error), retry_after_s=error.retry_after_s)
        except ClosedError as error:
            return Reply("closed", self._facts(), message=str(error))
        if any(isinstance(result, ClosedError) for result in results):
            return Reply("closed", self._facts(), message="the replica was closed before it had answered")
        if not batching.healthy and any(_unexpected(result) for result in results):
            return Reply("failed", self._facts(), message=str(batching.last_error))
        return Reply("ok", self._facts(), [_portable(result) for result in results])

    async def describe(self) -> Facts:
        return self._facts()

    async def try_bundle(self, user_config: dict[str, Any]) -> str:
        """Why this replica can't serve a bundle; "" where it can. Loads it, encodes one image, and forgets it."""
        wanted = Source.from_config(user_config)
        async with self._updating:
            return await asyncio.to_thread(self._try, wanted)

    def _try(self, wanted: Source) -> str:
        import numpy as np

        try:
            _, classifier = wanted.load(self._settings, self._threads)
            side = classifier.encoder.image_size
            classifier.explain(np.zeros((1, side, side, 3), np.uint8), top=1)
        except Exception as error:
            return str(error) or type(error).__name__
        return ""

    async def classes(self, limit: int = PAGE, after: str | None = None) -> dict[str, Any]:
        """As GET /v1/classes answers."""
        return await asyncio.to_thread(class_page, self._serving.classifier.snapshot(), limit, after)

    async def examples(self, class_id: str, limit: int = PAGE, after: str | None = None) -> dict[str, Any] | None:
        """As GET /v1/classes/{class_id}/examples answers; None where there is no such class."""
        return await asyncio.to_thread(example_page, self._serving.classifier.snapshot(), class_id, limit, after)

    async def picture(self, example_id: str) -> bytes | None:
        """A support image's thumbnail, WebP; None where there is none."""
        try:
            return self._serving.classifier.picture(example_id)
        except ValueError:
            return None

    def check_health(self) -> None:
        """Ray Serve replaces a replica on which this raises several times."""
        if not self._serving.healthy:
            raise RuntimeError(f"the engine failed: {self._serving.last_error}")

    def __del__(self) -> None:
        """Called by Ray Serve when the replica has answered what it had, or its time for that is over."""
        batching = getattr(self, "_batching", None)
        if batching is not None:
            batching.close(self._settings.grace_s)

    @property
    def _serving(self) -> BatchingClassifier:
        if self._batching is None:
            raise RuntimeError('expected a user_config {"bundle": folder}, got none')
        return self._batching

    def _facts(self) -> Facts:
        classifier = self._serving.classifier
        assert self._source is not None
        state = classifier.snapshot()
        return Facts(
            _replica_name(),
            os.getpid(),
            socket.gethostname(),
            self._source,
            state.version,
            classifier.encoder.image_size,
            len(state.uids),
            self._serving.pending,
            self._refused,
        )


def _replica_name() -> str:
    from ray import serve

    name: str = serve.get_replica_context().replica_tag
    return name


def _unexpected(result: Prediction | Exception) -> bool:
    return isinstance(result, Exception) and not isinstance(result, BadImageError | DeadlineExceededError)


def _portable(result: Prediction | Exception) -> Prediction | Exception:
    """What another process can make an object of again: not every library's exceptions can be."""
    return RuntimeError(f"{type(result).__name__}: {result}") if _unexpected(result) else result
