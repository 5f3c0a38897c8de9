"""Runs a batch through encoder and scoring; after an error, finds the images that cause it."""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings, Encoder
from iosr_fast.head.predictions import Prediction, predict
from iosr_fast.serving.batching.item import Item, Query, without_frames

log = logging.getLogger(__name__)


def bucket_sizes(max_batch: int) -> list[int]:
    """1, 2, 4, ... and max_batch itself."""
    return [*(1 << k for k in range((max_batch - 1).bit_length())), max_batch]


def warm_encoder(encoder: Encoder, max_batch: int) -> None:
    """Execute batches of bucket_sizes once, in all runs at the same time; on a CPU also of 3, a usual size there."""
    sizes = {*bucket_sizes(min(max_batch, encoder.max_batch)), *([] if encoder.buckets or max_batch < 3 else [3])}
    if encoder.runs == 1:
        encoder.warm(sorted(sizes))
        return
    with ThreadPoolExecutor(encoder.runs) as pool:
        for size in sorted(sizes):
            list(pool.map(encoder.warm, [[size]] * encoder.runs))


class Engine:
    """Runs batches of at most `max_batch` images. `healthy` is False while the engine fails on every image;
    `last_error` is the error of its last failure."""

    def __init__(self, max_batch: int) -> None:
        self.healthy = True
        self.last_error: BaseException | None = None
        self._max_batch = max_batch
        self._encoding = threading.Lock()  # of an encoder with one run, which may not be thread-safe

    def warm(self, classifier: Any) -> None:
        """Run each bucket size once, because first runs are slow: of the encoder, and on a GPU of scoring, too, whose
        kernels are compiled for a batch's size. Raises what the engine raises."""
        encoder = classifier.encoder
        with self._encoding if encoder.runs == 1 else nullcontext():
            warm_encoder(encoder, self._max_batch)
        for size in bucket_sizes(min(self._max_batch, encoder.max_batch)) if encoder.buckets else [1]:
            pixels = np.zeros((size, encoder.image_size, encoder.image_size, 3), np.uint8)
            Run(classifier, self._encoding).compute(pixels)

    def run(self, classifier: Any, items: Sequence[Item]) -> Run:
        """Set the outcome of every item: a Prediction or an exception."""
        run = Run(classifier, self._encoding, quiet=not self.healthy)
        error = run.attempt(items)
        if error is not None:
            run.narrow(items, error)
        if run.down is not None:
            for item in items:
                if item.outcome is None:
                    item.outcome = _copy(run.down)
        return run

    def probe(self, classifier: Any) -> None:
        """Check whether a failed engine works again."""
        if Run(classifier, self._encoding, quiet=True).works():
            self.judge(None)

    def judge(self, down: BaseException | None) -> None:
        """Update the health after a batch; `down` is the error if the engine fails on every image."""
        if down is not None:
            self.last_error = down
            if self.healthy:
                log.error("the engine fails on every image: %r", down)
        elif not self.healthy:
            log.info("the engine works again")
        self.healthy = down is None


@dataclass
class Run:
    """One batch on one head of one classifier, but for what _head_of says. `down` is the error if the engine fails on
    every image; `clean` is False after any error."""

    classifier: Any
    encoding: threading.Lock
    quiet: bool = False  # an error was logged already
    encode_s: float = 0.0
    score_s: float = 0.0
    clean: bool = True
    down: BaseException | None = None
    head: Any = None

    def compute(self, pixels: np.ndarray, items: Sequence[Item] | None = None) -> list[Prediction]:
        """Pixels (B, S, S, 3) uint8 -> B predictions as the items' queries ask for (None: one class)."""
        started, encoder = time.perf_counter(), self.classifier.encoder
        with self.encoding if encoder.runs == 1 else nullcontext():
            embeddings = encoder.encode_on_device(pixels)
        encoded = time.perf_counter()
        self.encode_s += encoded - started
        if len(embeddings) != len(pixels):
            raise RuntimeError(f"expected {len(pixels)} embeddings of the encoder, got {len(embeddings)}")
        if self.head is None:
            self.head = self.classifier.snapshot()
        queries = [Query(top=1)] * len(pixels) if items is None else [item.query for item in items]
        states = [self.head] * len(pixels) if items is None else [self._head_of(item, encoder) for item in items]
        groups: dict[tuple[int, int, float | None, Any], list[int]] = {}
        for row, (query, head) in enumerate(zip(queries, states, strict=True)):
            groups.setdefault((_band(query.top), _band(query.nearest), query.keep, head), []).append(row)
        predictions: dict[int, Prediction] = {}
        for (_, _, _, head), rows in groups.items():
            part = embeddings if len(groups) == 1 else embeddings[np.array(rows)]
            predictions.update(zip(rows, _explain(head, part, [queries[row] for row in rows]), strict=True))
        self.score_s += time.perf_counter() - encoded
        return [predictions[row] for row in range(len(pixels))]

    def attempt(self, items: Sequence[Item]) -> BaseException | None:
        """Set the outcomes of all `items`, or return the error."""
        try:
            pixels = np.stack([item.pixels for item in items])  # type: ignore[misc]
            predictions = self.compute(pixels, items)
            for item, prediction in zip(items, predictions, strict=True):
                item.outcome = prediction
        except BaseException as error:
            return self._failed(error)
        return None

    def narrow(self, items: Sequence[Item], error: BaseException, again: bool = False) -> None:
        """After `error` on all `items`, bisect them: only items that fail alone, twice, get an error.

        After each failure a black image shows whether the engine works at all; if not, `down` is set.
        """
        if not self.works():
            self.down = error
            return
        if len(items) == 1 and again:
            items[0].outcome = error
            return
        half = (len(items) + 1) // 2
        for part in (items[:half], items[half:]):
            failure = self.attempt(part) if part and self.down is None else None
            if failure is not None:
                self.narrow(part, failure, again=len(items) == 1)

    def works(self) -> bool:
        """Whether the engine classifies a black image."""
        size = self.classifier.encoder.image_size
        try:
            self.compute(np.zeros((1, size, size, 3), np.uint8))
        except BaseException:
            return False
        return True

    def _head_of(self, item: Item, encoder: Encoder) -> Any:
        """The head that answers an item: of one with `keep` that of its submission, because a later one may have to
        be fitted first; unless the classifier was replaced by one with another encoder."""
        return item.fitted.head if item.fitted is not None and item.fitted.encoder is encoder else self.head

    def _failed(self, error: BaseException) -> BaseException:
        if not self.quiet:
            log.warning("a batch failed; it is retried in parts", exc_info=error)
        self.clean, self.quiet = False, True
        return without_frames(error)


def _band(count: int) -> int:
    """Queries with counts in the same band are computed together with the largest count, so that a small query never
    costs as much as a much larger one."""
    return max(count, 16).bit_length() // 2 if count else 0


def _explain(head: Any, embeddings: Embeddings, queries: Sequence[Query]) -> list[Prediction]:
    """Predictions of queries with the same `keep`."""
    top, nearest = max(query.top for query in queries), max(query.nearest for query in queries)
    predictions = predict(head, embeddings, top, nearest, queries[0].keep)
    if len(predictions) != len(embeddings):
        raise RuntimeError(f"expected {len(embeddings)} predictions, got {len(predictions)}")
    return [_trim(prediction, query) for prediction, query in zip(predictions, queries, strict=True)]


def _trim(prediction: Prediction, query: Query) -> Prediction:
    if len(prediction.top) <= query.top and len(prediction.nearest) <= query.nearest:
        return prediction
    return replace(prediction, top=prediction.top[: query.top], nearest=prediction.nearest[: query.nearest])


def _copy(error: BaseException) -> BaseException:
    """A copy for each future: raising the same error in several threads would mix up its tracebacks."""
    try:
        return copy.copy(error)
    except Exception:
        return error
