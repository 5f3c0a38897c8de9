"""BatchingClassifier: images are decoded in parallel, encoded in batches, and answered one by one."""

from __future__ import annotations

import _thread
import asyncio
import itertools
import math
import time
import weakref
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from iosr_fast.exceptions import IosrFastError
from iosr_fast.images.crop import Sharing
from iosr_fast.images.limits import DecodeLimits
from iosr_fast.images.preprocess import as_image_list
from iosr_fast.serving.batching.classifiers import Classifiers, EncoderAlone, naming
from iosr_fast.serving.batching.decoder import Decoder
from iosr_fast.serving.batching.engine import Collect, Engine
from iosr_fast.serving.batching.item import Item, Observer, Query
from iosr_fast.serving.batching.queue import BatchQueue
from iosr_fast.serving.batching.workers import Workers
from iosr_fast.serving.limits import Limits
from iosr_fast.utils.machine import usable_threads
from iosr_fast.utils.numbers import check_integer, check_share

if TYPE_CHECKING:
    import numpy as np

    from iosr_fast.classifier import Classifier
    from iosr_fast.encoders.encoder import Encoder

_requests = itertools.count()


class BatchingClassifier:
    """Classifies images that arrive one at a time, from any number of threads or an event loop, in batches.

    `classifiers` is a Classifier, or several by their names, with the same fingerprint of the encoder, geometry,
    exif_orientation and margin. An image is decoded and encoded once, however many of them are asked: by the encoder of
    the first one that compares adapted embeddings, else of the first one. One that is fitted again on another encoder
    can't be asked any more. In their place, an EncoderAlone embeds.

    Images are those that Classifier.predict takes; do not modify them before they are answered.
    `decode_threads` threads decode images while the previous batch is encoded. A batch of at most `max_batch` images
    starts when the engine is idle and the batch is full, its first image has been ready for `max_wait_ms`, or no other
    image is being decoded: a single image starts at once. If the encoder has several `runs`, as many batches are
    encoded at once, and an idle run starts at once with its share of the images that are ready. All images of a request
    are answered by the version of the classifier at its submission. What `max_error` rests on is computed
    here, and by later changes (Classifier.serve_promises): no request waits for it. `keep` has its first request wait.

    At most `max_queue` images are accepted and not yet answered; more are refused at once. `limits`, a DecodeLimits,
    bounds decoding. `observer` gets callbacks for metrics (Observer).

    A `client` with a name may hold at most as many images as it leaves places free, and likewise pixels to decode, so
    that no client keeps others out. Clients and their requests take turns, one image each, at decoding and in batches.
    Each client leaves a decoder to others, and so do all large images: above 16 million pixels, or as much work by a
    JPEG's scans or by crops.

    `max_error` is that of queries which name none (Query). Where support images are too few for it, no label is
    accepted. `collect(image, embeddings, head, client)` is called in the thread of a batch for each image that it
    answers; it may be a mapping by names.

    `isolated` decodes encoded bytes in a separate process for each decoding thread, because they may be untrusted. An
    image that takes longer than limits.timeout_s there, takes more memory than its header allows, or crashes the
    process is a BadImageError; the process is replaced.

    An image that can't be read or encoded fails alone. If the engine fails on every image, all get its error and
    `healthy` is False until the engine works again; while idle, it is tried every second. So does a classifier that
    fails on every image: it is in `failures` meanwhile, and the answers of the others are whole.

    Callbacks of futures run on the threads that answer: keep them short, and don't wait in them for another image.
    Raises NotFittedError for a classifier that is not fitted, and IosrFastError for invalid settings.

    >>> from iosr_fast import Classifier
    >>> from iosr_fast.backbones.demo.pictures import load_pictures
    >>> pictures = load_pictures("held-out", min_styles=5)
    >>> images, labels = pictures.images[:18], [pictures.names[c] for c in pictures.concepts[:18]]
    >>> classifier = Classifier("demo", method="tip-adapter++", alpha=100, beta=20).fit(images, labels)
    >>> with BatchingClassifier(classifier, decode_threads=1) as batching:
    ...     futures = [batching.submit(image, top=1) for image in images[:3]]
    ...     [future.result().label for future in futures] == labels[:3]
    True

    Two questions on a picture are two classifiers:

    >>> letters = Classifier("demo", method="tip-adapter").fit(images, [label[0] for label in labels])
    >>> with BatchingClassifier({"name": classifier, "letter": letters}, decode_threads=1) as batching:
    ...     name, letter = batching.submit(images[0], classifier=("name", "letter")).result()
    ...     name.label[0] == letter.label, batching.submit(images[0], classifier="name").result().label == name.label
    (True, True)
    """

    def __init__(
        self,
        classifiers: Classifier | Mapping[str, Classifier] | EncoderAlone,
        max_batch: int = 32,
        max_wait_ms: float = 2.0,
        max_queue: int = 256,
        decode_threads: int | None = None,
        observer: Observer | None = None,
        limits: DecodeLimits | None = None,
        isolated: bool = False,
        max_error: float | None = None,
        collect: Collect | Mapping[str, Collect] | None = None,
    ) -> None:
        if decode_threads is None:
            decode_threads = min(Limits.decoders, max(2, usable_threads()))  # a client leaves one to others
        for name, value in {"max_batch": max_batch, "max_queue": max_queue, "decode_threads": decode_threads}.items():
            check_integer(name, value, 1)
        if not 0 <= max_wait_ms < math.inf:
            raise IosrFastError(f"expected max_wait_ms of at least 0, got {max_wait_ms!r}")
        self._classifiers = Classifiers(classifiers)
        runs = self._classifiers.encoder.runs
        collectors = dict.fromkeys(self.classifiers, collect) if callable(collect) else collect or {}
        if unknown := collectors.keys() - self.classifiers.keys():
            raise IosrFastError(f"expected collect for {list(self.classifiers)} or some of them, got {sorted(unknown)}")
        self._engine = Engine(self._classifiers, max_batch, collectors)
        self._max_error = None if max_error is None else check_share("max_error", max_error, like=0.01)
        limits = DecodeLimits() if limits is None else limits
        self._queue = BatchQueue(
            runs, max_batch, max_wait_ms / 1e3, max_queue, decode_threads, limits.max_pixels_together, observer
        )
        decoders = [Decoder(limits, isolated) for _ in range(decode_threads)]
        self._workers = Workers(self._queue, self._engine, runs, decoders)
        # A BatchingClassifier that is garbage-collected without close() answers accepted images and ends its threads.
        # The collector may run anywhere, even under the lock of the queue, so a new thread takes that lock.
        self._dropped = weakref.finalize(self, _thread.start_new_thread, self._queue.close, ())
        self._dropped.atexit = False

    def submit(self, image: Any, **options: Any) -> Future[Any]:
        """Classify one image; returns a Future of its Prediction. `options` are the fields of Query. With a tuple of
        names as `classifier` it is a Future of a tuple: the Prediction of each, or the exception with which it failed;
        with an empty one, of the Embeddings (1, D).

        The future raises BadImageError for an image that can't be read, DeadlineExceededError for one that was not
        encoded within `deadline_s` seconds, or the error of the engine. Cancelling it before its batch starts frees its
        place.

        Raises at once: QueueFullError if the queue is full or the deadline can't be met, ClosedError after close(),
        ValueError for an option out of range, where there are too few support images for `keep` or `max_error`, and for
        a classifier that isn't here, or "" where there are several.
        """
        return self.submit_many((image,), **options)[0]

    def submit_many(self, images: Iterable[Any], **options: Any) -> list[Future[Any]]:
        """Classify the images of one request; returns a future for each, in order. All are accepted, or none.

        Decoders take one image of each `client` in turn, and of each of its requests. Parts of one picture that follow
        one another are decoded together, once; `collect` gets none of them.

        BadImageError names an image without a path by its position. Raises as `submit` does, and ValueError for more
        than `max_queue` images, which can never be accepted.
        """
        query, now = Query(**options), time.monotonic()
        heads, fit = self._classifiers.ask(query.classifier)
        abstention = query.abstention
        for name, head in heads.items():
            with naming("" if isinstance(query.classifier, str) else name):
                abstention.check(head)
        if query.max_error is None:
            query = replace(query, max_error=self._max_error)
        of_fit = next(_requests), heads, fit.encoder, fit.settings.exif_orientation
        listed = Sharing(fit.settings.margin)(as_image_list(images))
        deadline = math.inf if query.deadline_s is None else now + query.deadline_s
        items = [Item(one, i, query, now, *of_fit, deadline=deadline) for i, one in enumerate(listed)]
        if len(items) > self._queue.max_queue:
            raise IosrFastError(
                f"expected at most {self._queue.max_queue} images at once (max_queue), got {len(items)}; submit fewer"
            )
        self._queue.admit(items)
        return [item.future for item in items]

    def decode_whole(
        self, image: Any, position: int = 0, *, classifier: str = "", deadline_s: float = math.inf, client: str = ""
    ) -> Future[np.ndarray]:
        """Decode a support image of a classifier with the decoders and their limits: (height, width, 3) uint8, as a fit
        resizes it.

        The future raises BadImageError, DeadlineExceededError if no decoder was free within `deadline_s` seconds, or
        ClosedError. Raises ClosedError at once after close().
        """
        (heads, fit), now = self._classifiers.ask(classifier), time.monotonic()
        of_fit = next(_requests), heads, fit.encoder, fit.settings.exif_orientation
        item = Item(image, position, Query(client=client), now, *of_fit, whole=True, deadline=now + deadline_s)
        self._queue.admit((item,))
        return item.future

    async def classify(self, image: Any, **options: Any) -> Any:
        """`submit` for asyncio. Cancelling the awaiting task cancels the image."""
        (result,) = await self.classify_many((image,), **options)
        if isinstance(result, Exception):
            raise result
        return result

    async def classify_many(self, images: Iterable[Any], **options: Any) -> list[Any]:
        """`submit_many` for asyncio: in order, the result of each image or the exception of its future."""
        futures = self.submit_many(images, **options)
        try:
            results: list[Any] = await asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
            return results
        finally:
            for future in futures:
                future.cancel()

    def warm(self) -> None:
        """Run the engine at the usual batch sizes once, because first runs are slow: 1, 2, 4, ..., max_batch, on a CPU
        also 3. Raises what it raises; of several classifiers one that fails is in `failures` instead."""
        self._engine.warm()

    def close(self, timeout: float | None = None) -> None:
        """Accept no more images, answer the accepted ones and end the threads. May be called repeatedly.

        After `timeout` seconds (None: no limit) the remaining images get ClosedError. Called in a future's callback, it
        does not wait; the remaining images are answered after the callback.
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
        """The only classifier. Raises IosrFastError where there are several."""
        if len(self.classifiers) != 1:
            raise IosrFastError(f"expected a BatchingClassifier of one classifier, got {len(self.classifiers)}")
        return next(iter(self.classifiers.values()))

    @property
    def classifiers(self) -> Mapping[str, Classifier]:
        """The classifiers by their names; a single one that came without has the name ""."""
        return self._classifiers.named

    @property
    def encoder(self) -> Encoder:
        """The one that embeds now."""
        return self._classifiers.encoder

    @property
    def reads_texts(self) -> bool:
        """Whether a Text can be embedded."""
        return self._classifiers.text is not None

    @property
    def failures(self) -> dict[str, Exception]:
        """The errors of classifiers that fail on every image, until they work again."""
        return dict(self._engine.failures)

    @property
    def pending(self) -> int:
        """Number of images that are accepted and not yet answered."""
        return self._queue.pending

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._queue.closed

    @property
    def healthy(self) -> bool:
        """False while the engine, or every classifier, fails on every image, or no decoder works."""
        return self._engine.healthy and self._workers.decoders_error is None

    @property
    def last_error(self) -> BaseException | None:
        """The error of the decoders if none works, else the last error with which the engine failed on every image;
        None without either."""
        return self._workers.decoders_error or self._engine.last_error

    @property
    def decoders_warning(self) -> str:
        """What the system lacks to confine the processes that decode; "" if nothing, or if none decodes."""
        return self._workers.warning

    @property
    def decoders_are_busy(self) -> bool:
        """Whether every decoder has an image, or an image waits for one."""
        return self._queue.decoders_are_busy
