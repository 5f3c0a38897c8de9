"""Many callers, one engine: images are decoded side by side, encoded in batches, and each answered by itself."""

from __future__ import annotations

import _thread
import asyncio
import itertools
import math
import operator
import time
import weakref
from collections.abc import Iterable
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Any

from iosr_fast.images.preprocess import as_image_list
from iosr_fast.serving.batching.decode import DecodeLimits, Limits, decoding_cost
from iosr_fast.serving.batching.engine import Engine
from iosr_fast.serving.batching.item import Hooks, Item, Observer, WholeImage
from iosr_fast.serving.batching.queue import BatchQueue
from iosr_fast.serving.batching.turns import Turns
from iosr_fast.serving.batching.workers import Workers, make_decoders
from iosr_fast.utils.machine import usable_threads

if TYPE_CHECKING:
    import numpy as np

    from iosr_fast.classifier import Classifier
    from iosr_fast.state.predictions import Prediction

_MOST_DECODERS = 8
_requests = itertools.count()


class BatchingClassifier:
    """Classifies images that come one at a time, from any number of threads or an event loop, in batches.

    with BatchingClassifier(classifier) as batching:
        batching.submit("a.jpg").result().label

    Images are as Classifier.predict takes them; leave them alone until they are answered.
    `decode_threads` threads bring them to pixels while the batch before is encoded. A batch of at most `max_batch`
    leaves as soon as the engine is free and it is full, its first image has been ready for `max_wait_ms`, or no other
    image is being decoded that could join: one that is alone leaves at once. Each batch is answered by one state of the
    classifier, whatever changes meanwhile.

    At most `max_queue` images are accepted and not answered; more are refused at once. `limits`, a DecodeLimits, bounds
    what is decoded. `observer` is told what happens (Observer). `warm` runs the engine at every batch size 1, 2, 4, ...
    before the constructor returns (`warm()`).

    Requests take turns at decoding, an image each, and images above 16 million pixels leave a decoder to the others.
    `isolated` decodes encoded bytes, which may be strangers', in one process for each decoding thread. An image that
    takes longer than limits.timeout_s there, or more memory than its header allows, is a BadImageError, as is one that
    crashes the process: it is killed and another one started.

    An image that can't be read or encoded fails alone. Where the engine fails on everything, all get its error and
    `healthy` is False until it works again, which is tried every second while nobody asks.

    Callbacks of futures run on the threads that answer: keep them short, and don't wait in them for another image.
    Raises ValueError for a classifier that is not fitted and for settings that can't be.
    """

    def __init__(
        self,
        classifier: Classifier,
        max_batch: int = 32,
        max_wait_ms: float = 2.0,
        max_queue: int = 256,
        decode_threads: int | None = None,
        observer: Observer | None = None,
        limits: Limits | None = None,
        warm: bool = False,
        isolated: bool = False,
    ) -> None:
        threads = min(_MOST_DECODERS, usable_threads()) if decode_threads is None else decode_threads
        for name, value in {"max_batch": max_batch, "max_queue": max_queue, "decode_threads": threads}.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"expected {name} to be a whole number of at least 1, got {value!r}")
        if not 0 <= max_wait_ms < math.inf:
            raise ValueError(f"expected max_wait_ms of at least 0, got {max_wait_ms!r}")
        classifier.snapshot()  # says so where it is not fitted
        hooks = Hooks(observer)
        self._warm = warm
        self._engine = Engine(max_batch)
        if warm:
            self._engine.warm(classifier)
        limits = DecodeLimits() if limits is None else limits
        turns = Turns(threads, limits.max_pixels_together)
        self._queue = BatchQueue(classifier, max_batch, max_wait_ms / 1e3, max_queue, hooks, turns)
        self._workers = Workers(self._queue, self._engine, hooks, make_decoders(limits, threads, isolated))
        # One that is dropped without close() answers what it accepted and ends its threads. The garbage collector may
        # run in the middle of anything, also under the queue's lock, so the lock is taken on a thread of its own.
        self._dropped = weakref.finalize(self, _thread.start_new_thread, self._queue.close, ())
        self._dropped.atexit = False

    def submit(
        self, image: Any, *, top: int = 5, nearest: int = 0, deadline_s: float | None = None
    ) -> Future[Prediction]:
        """Classify one image: a Future of its Prediction with `top` classes and `nearest` support images.

        The future raises BadImageError for an image that can't be read, DeadlineExceededError where `deadline_s`
        seconds from now were over before it was encoded, or what the engine raised. Cancelled before its batch is
        formed, the image costs nothing more.

        Raises, at once, QueueFullError where there is no place or the deadline can't be kept, ClosedError after
        close(), ValueError for a top, nearest or deadline_s that can't be.
        """
        return self.submit_many((image,), top=top, nearest=nearest, deadline_s=deadline_s)[0]

    def submit_many(
        self,
        images: Iterable[Any],
        *,
        top: int = 5,
        nearest: int = 0,
        deadline_s: float | None = None,
        client: str = "",
    ) -> list[Future[Prediction]]:
        """Classify the images of one request: a future of each, in order. All are accepted, or none.

        Decoders take one image of each `client` in turn, and of a client's requests likewise.

        BadImageError calls an image without a path by its position here. Raises as `submit` does, and ValueError for
        more than `max_queue` images, which would never have a place.
        """
        top, nearest = operator.index(top), operator.index(nearest)
        if top < 1 or nearest < 0:
            raise ValueError(f"expected top >= 1 and nearest >= 0, got {top} and {nearest}")
        if deadline_s is not None and not 0 < deadline_s < math.inf:
            raise ValueError(f"expected deadline_s > 0 or None, got {deadline_s!r}")
        now = time.monotonic()
        deadline = math.inf if deadline_s is None else now + deadline_s
        turn, size = next(_requests), self._queue.image_size
        items = [
            Item(image, i, top, nearest, now, deadline, turn, client, decoding_cost(image, size))
            for i, image in enumerate(as_image_list(images))
        ]
        if len(items) > self._queue.max_queue:
            raise ValueError(
                f"expected at most {self._queue.max_queue} images at once (max_queue), got {len(items)}; submit fewer"
            )
        self._queue.admit(items, deadline_s)
        return [item.future for item in items]

    def decode_whole(self, image: Any, position: int = 0, *, deadline_s: float = math.inf) -> Future[np.ndarray]:
        """All pixels of an image, (height, width, 3) uint8, by the decoders and their limits; it waits its turn.

        The future raises BadImageError, DeadlineExceededError where no decoder was free within `deadline_s` seconds, or
        ClosedError. Raises ClosedError at once after close().
        """
        deadline = time.monotonic() + deadline_s
        made = WholeImage(image, position, deadline, next(_requests), decoding_cost(image, 1))
        self._queue.admit_whole(made)
        return made.future

    async def classify(
        self, image: Any, *, top: int = 5, nearest: int = 0, deadline_s: float | None = None
    ) -> Prediction:
        """`submit` for asyncio. Cancelling the task that awaits it cancels the image."""
        future = self.submit(image, top=top, nearest=nearest, deadline_s=deadline_s)
        try:
            return await asyncio.wrap_future(future)
        finally:
            future.cancel()  # at once, and nothing where it is done

    async def classify_many(
        self,
        images: Iterable[Any],
        *,
        top: int = 5,
        nearest: int = 0,
        deadline_s: float | None = None,
        client: str = "",
    ) -> list[Prediction | Exception]:
        """`submit_many` for asyncio: in order, each image's Prediction or what its future raised."""
        futures = self.submit_many(images, top=top, nearest=nearest, deadline_s=deadline_s, client=client)
        try:
            results: list[Any] = await asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
            return results
        finally:
            for future in futures:
                future.cancel()

    def replace(self, classifier: Classifier) -> Classifier:
        """Classify with another classifier from the next batch on; a batch in flight finishes on the old one.

        Images that wait are decoded again where the other takes other pixels. With `warm`, the other is warmed here
        first, while the old one serves. Returns the old one. Raises ClosedError; ValueError, or what warming raised,
        and then the old one stays.
        """
        classifier.snapshot()
        warmed = self._warm and classifier.encoder is not self.classifier.encoder
        if warmed:
            self._engine.warm(classifier)
        old: Classifier = self._queue.replace(classifier)
        if warmed:
            self._engine.judge(None)
        return old

    def warm(self) -> None:
        """Run the engine at every batch size 1, 2, 4, ..., max_batch once. Raises what the engine raises."""
        self._engine.warm(self.classifier)

    def close(self, timeout: float | None = None) -> None:
        """Accept nothing more, answer everything accepted and end the threads. May be called again.

        After `timeout` seconds (None: however long it takes) what is left gets ClosedError. In a callback, which runs
        on a thread that answers, it doesn't wait: the rest is answered after the callback.
        """
        self._dropped.detach()
        self._workers.close(timeout)

    def __enter__(self) -> BatchingClassifier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def classifier(self) -> Classifier:
        """What the next batch is classified with."""
        classifier: Classifier = self._queue.classifier
        return classifier

    @property
    def pending(self) -> int:
        """Images that are accepted and not answered."""
        return self._queue.pending

    @property
    def closed(self) -> bool:
        return self._queue.closed

    @property
    def healthy(self) -> bool:
        """False from a batch on which the engine failed altogether, until one that works; and while no decoder
        works."""
        return self._engine.healthy and self._workers.decoders_error is None

    @property
    def last_error(self) -> BaseException | None:
        """What the engine raised when it failed altogether the last time, or what no decoder works for; None where
        neither ever was."""
        return self._workers.decoders_error or self._engine.last_error

    @property
    def decoders_are_busy(self) -> bool:
        """Whether every decoder has an image, or an image waits for one."""
        return self._queue.decoders_are_busy
