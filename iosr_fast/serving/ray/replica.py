"""One replica: a classifier behind its own batches, in its own process."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from dataclasses import replace
from typing import Any

from iosr_fast.classifier import Classifier
from iosr_fast.exceptions import BadImageError, ClosedError, DeadlineExceededError, IosrFastError, QueueFullError
from iosr_fast.head.predictions import Prediction
from iosr_fast.serving.batching import BatchingClassifier
from iosr_fast.serving.batching.item import Query
from iosr_fast.serving.http.lists import ClassifierLists
from iosr_fast.serving.http.settings import Settings
from iosr_fast.serving.ray.messages import Facts, Reply, Source

log = logging.getLogger("ray.serve")


class ClassifierReplica(ClassifierLists):
    """The deployment with several replicas. `user_config` is {"bundle": folder, "checksum": of its manifest or None}.

    `reconfigure` loads the bundle of a new user_config beside the old one, warms it up and then swaps, so no request
    waits longer than for a batch. If a bundle can't be loaded, the old one stays in use; the error is logged and
    reported by `describe`. It is raised only without an old bundle, because Ray Serve would otherwise stop a replica
    with a working classifier. rollout.deploy raises it and restores the old bundle.
    """

    def __init__(self, settings: Settings, threads: int) -> None:
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
                return  # Ray Serve also calls this when nothing has changed
            self._wanted = wanted
            try:
                self._source = await asyncio.to_thread(self._load, wanted)
                self._refused = ""
            except Exception as error:
                if self._batching is None:
                    raise
                self._refused = f"{wanted.bundle}: {error}"
                log.exception("the bundle %s can't be served; %s stays", wanted.bundle, self._source)

    def _load(self, wanted: Source) -> Source:
        source, classifier = wanted.load(self._settings, self._threads)
        if self._batching is not None:
            self._batching.replace(classifier)
        else:
            decoders = self._settings.decode_threads or self._threads
            self._batching = self._settings.make_batching(classifier, decode_threads=decoders, warm=True)
        return source

    async def classify(self, images: list[Any], query: Query, deadline_s: float | None) -> Reply:
        """Predictions of images that BatchingClassifier takes, or the reason to try another replica. `deadline_s` is
        the remaining time of the deadline of `query`."""
        batching = self._serving
        try:
            results = await batching.classify_many(images, **vars(replace(query, deadline_s=deadline_s)))
        except QueueFullError as error:
            return Reply("full", self._facts(), message=str(error), retry_after_s=error.retry_after_s)
        except ClosedError as error:
            return Reply("closed", self._facts(), message=str(error))
        except IosrFastError as error:
            return Reply("refused", self._facts(), message=str(error))
        if any(isinstance(result, ClosedError) for result in results):
            return Reply("closed", self._facts(), message="the replica was closed before it had answered")
        if not batching.healthy and any(_unexpected(result) for result in results):
            return Reply("failed", self._facts(), message=str(batching.last_error))
        return Reply("ok", self._facts(), [_portable(result) for result in results])

    async def describe(self) -> Facts:
        return self._facts()

    async def try_bundle(self, user_config: dict[str, Any]) -> str:
        """Why this replica can't serve a bundle; "" if it can. Loads it, encodes one image, and drops it."""
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

    def check_health(self) -> None:
        """Ray Serve replaces a replica on which this raises several times."""
        if not self._serving.healthy:
            raise RuntimeError(f"the engine failed: {self._serving.last_error}")

    def __del__(self) -> None:
        """Ray Serve calls this after the last request, or after its timeout for that."""
        batching = getattr(self, "_batching", None)
        if batching is not None:
            batching.close(self._settings.grace_s)

    @property
    def classifier(self) -> Classifier:
        return self._serving.classifier

    @property
    def _serving(self) -> BatchingClassifier:
        if self._batching is None:
            raise RuntimeError('expected a user_config {"bundle": folder}, got none')
        return self._batching

    def _facts(self) -> Facts:
        assert self._source is not None
        head = self.classifier.snapshot()
        return Facts(
            _replica_name(),
            os.getpid(),
            socket.gethostname(),
            self._source,
            head.version,
            self.classifier.encoder.geometry,
            len(head.uids),
            self._serving.pending,
            self._refused,
        )


def _replica_name() -> str:
    from ray import serve

    return serve.get_replica_context().replica_tag


def _unexpected(result: Prediction | Exception) -> bool:
    return isinstance(result, Exception) and not isinstance(result, BadImageError | DeadlineExceededError)


def _portable(result: Prediction | Exception) -> Prediction | Exception:
    """A result that Ray can send to another process; exceptions of some libraries become RuntimeErrors."""
    return RuntimeError(f"{type(result).__name__}: {result}") if _unexpected(result) else result
