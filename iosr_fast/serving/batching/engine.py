"""Runs a batch through encoder and scoring; after an error, finds the images that cause it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.head.predictions import Prediction, predict
from iosr_fast.serving.batching.item import Item, Query

Collect: TypeAlias = Callable[[Any, Embeddings, Any], None]
log = logging.getLogger(__name__)


@dataclass
class Run:
    """What a batch took, in seconds; `clean` is False after any error."""

    encode_s: float = 0.0
    score_s: float = 0.0
    clean: bool = True


class Engine:
    """Runs batches of at most `max_batch` images. `healthy` is False while the engine fails on every image;
    `last_error` is the error of its last failure. `collect` is called with each answered image that is whole and no
    probe, its embeddings (1, D) and the head that answered."""

    def __init__(self, classifier: Any, max_batch: int, collect: Collect | None = None) -> None:
        self.healthy = True
        self._classifier, self._collect = classifier, collect
        self.last_error: Exception | None = None
        self._max_batch = max_batch
        self._encoding = threading.Lock()  # of an encoder with one run, which may not be thread-safe

    def warm(self) -> None:
        """Run batches of 1, 2, 4, ... and the most images once, because first runs are slow: of the encoder, in all
        runs at the same time, and on a GPU of scoring, too, whose kernels are compiled for a batch's size. On a CPU
        also 3, a usual size there. Raises what the engine raises."""
        encoder = self._classifier.encoder
        most = min(self._max_batch, encoder.max_batch)
        sizes = {*(1 << k for k in range((most - 1).bit_length())), most}
        encoded = sizes if encoder.buckets or most < 3 else sizes | {3}
        with self._encoding if encoder.runs == 1 else nullcontext(), ThreadPoolExecutor(encoder.runs) as pool:
            for size in sorted(encoded):
                list(pool.map(encoder.warm, [[size]] * encoder.runs))
        for size in sorted(sizes) if encoder.buckets else [1]:
            self._black(size)

    def run(self, items: Sequence[Item]) -> Run:
        """Set the outcome of every item: a Prediction or an exception.

        After an error each image is tried alone, so that only those that fail twice get it. If a black image fails
        too, the engine fails on every image, and the rest gets the error at once.
        """
        run, down = Run(), None
        error = self._try(items, run)
        for item in items if error else ():
            if error is not None and not self._works():
                down = error
                break
            error = self._try([item], run)
        for item in items:
            item.outcome = item.outcome or down
        self._judge(down)
        return run

    def probe(self) -> None:
        """Check whether a failed engine works again."""
        if self._works():
            self._judge(None)

    def _judge(self, down: Exception | None) -> None:
        """Update the health after a batch; `down` is the error if the engine fails on every image."""
        if down is not None:
            self.last_error = down
            if self.healthy:
                log.error("the engine fails on every image: %r", down)
        elif not self.healthy:
            log.info("the engine works again")
        self.healthy = down is None

    def _try(self, items: Sequence[Item], run: Run) -> Exception | None:
        """Set the outcomes of items; returns the error, which is also the outcome of a single one."""
        try:
            pixels = np.stack([item.pixels for item in items])  # type: ignore[misc]
            for item, prediction in zip(items, self._predict(pixels, items, run), strict=True):
                item.outcome = prediction
        except Exception as error:
            if self.healthy and run.clean:
                log.warning("a batch failed; its images are tried one by one", exc_info=error)
            run.clean = False
            error.__traceback__ = None  # its frames would keep all images of the batch alive
            if len(items) == 1:
                items[0].outcome = error
            return error
        return None

    def _works(self) -> bool:
        try:
            self._black(1)
        except Exception:
            return False
        return True

    def _black(self, count: int) -> None:
        """Classify black images."""
        fit = self._classifier._fitted()
        head, encoder = fit.head, fit.encoder
        items = [Item(None, i, Query(top=1, probe=True), 0.0, head=head, encoder=encoder) for i in range(count)]
        self._predict(encoder.blank(count), items, Run())

    def _predict(self, pixels: np.ndarray, items: Sequence[Item], run: Run) -> list[Prediction]:
        """Pixels (B, S, S, 3) uint8 -> B predictions, each by the head of its item; items that ask one head for the
        same are computed together. Raises RuntimeError for items of several encoders, which are then tried alone."""
        started, encoder = time.perf_counter(), items[0].encoder
        if any(item.encoder is not encoder for item in items):
            raise RuntimeError("expected images of one encoder, got some from before another fit and some from after")
        with self._encoding if encoder.runs == 1 else nullcontext():
            embeddings = encoder.encode_on_device(pixels)
        encoded = time.perf_counter()
        run.encode_s += encoded - started
        if len(embeddings) != len(pixels):
            raise RuntimeError(f"expected {len(pixels)} embeddings of the encoder, got {len(embeddings)}")
        groups: dict[Any, list[int]] = {}
        for row, item in enumerate(items):
            query = item.query
            groups.setdefault((item.head, query.top, query.nearest, query.abstention), []).append(row)
        predictions: dict[int, Prediction] = {}
        for (head, *asked), rows in groups.items():
            part = embeddings if len(groups) == 1 else embeddings[np.array(rows)]
            predictions.update(zip(rows, predict(head, part, *asked), strict=True))
        if self._collect is not None:
            for row, item in enumerate(items):
                if item.crop is None and not item.query.probe:
                    self._collect(item.image, embeddings[np.array([row])], item.head)
        run.score_s += time.perf_counter() - encoded
        return [predictions[row] for row in range(len(pixels))]
