"""One batch through encoder and scoring, and, where that raises, whose fault it was."""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.serving.batching.item import Item, without_frames
from iosr_fast.state.predictions import Prediction, predict

log = logging.getLogger(__name__)


def bucket_sizes(max_batch: int) -> list[int]:
    """1, 2, 4, ... and max_batch itself."""
    return [*(1 << k for k in range((max_batch - 1).bit_length())), max_batch]


class Engine:
    """Runs batches of at most max_batch images. `healthy`: whether it could, when last asked; `last_error`: why not,
    the last time that it could not."""

    def __init__(self, max_batch: int) -> None:
        self.healthy = True
        self.last_error: BaseException | None = None
        self._max_batch = max_batch
        self._encoding = threading.Lock()  # not every encoder may be called by two threads

    def warm(self, classifier: Any) -> None:
        """Run each bucket size once, so that no request pays for an engine's beginnings. Raises what it raises."""
        encoder = classifier.encoder
        sizes = bucket_sizes(min(self._max_batch, encoder.max_batch))
        with self._encoding:
            encoder.warm(sizes)
        Run(classifier, self._encoding).compute(np.zeros((1, encoder.image_size, encoder.image_size, 3), np.uint8))

    def run(self, classifier: Any, items: Sequence[Item]) -> Run:
        """Give every item its outcome: a Prediction, or what was raised on it."""
        run = Run(classifier, self._encoding, quiet=not self.healthy)
        error = run.attempt(items)
        if error is not None:
            run.narrow(items, error)
        if run.down is not None:
            for item in items:
                if item.outcome is None:
                    item.outcome = _another(run.down)
        return run

    def probe(self, classifier: Any) -> None:
        """See whether an engine that failed works again."""
        if Run(classifier, self._encoding, quiet=True).works():
            self.judge(None)

    def judge(self, down: BaseException | None) -> None:
        """The engine's state after a batch: whether it is down, and with what error."""
        if down is not None:
            self.last_error = down
            if self.healthy:
                log.error("the engine fails on every image: %r", down)
        elif not self.healthy:
            log.info("the engine works again")
        self.healthy = down is None


@dataclass
class Run:
    """A batch on one classifier and one state of it. `down`: the engine fails on any image, with this error; `clean`:
    nothing failed."""

    classifier: Any
    encoding: threading.Lock
    quiet: bool = False  # a failure was logged already
    encode_s: float = 0.0
    score_s: float = 0.0
    clean: bool = True
    down: BaseException | None = None
    state: Any = None

    def compute(self, pixels: np.ndarray, asked: Sequence[tuple[int, int]] | None = None) -> list[Prediction]:
        """Pixels (B, S, S, 3) uint8 -> B predictions. `asked`: top and nearest of each; one class where it is None."""
        asked = [(1, 0)] * len(pixels) if asked is None else asked
        started = time.perf_counter()
        with self.encoding:
            embeddings = self.classifier.encoder.encode(pixels)
        encoded = time.perf_counter()
        self.encode_s += encoded - started
        if len(embeddings) != len(pixels):
            raise RuntimeError(f"expected {len(pixels)} embeddings of the encoder, got {len(embeddings)}")
        if self.state is None:
            self.state = self.classifier.snapshot()
        groups: dict[tuple[int, int], list[int]] = {}
        for row, (top, nearest) in enumerate(asked):
            groups.setdefault((_band(top), _band(nearest)), []).append(row)
        found: dict[int, Prediction] = {}
        for rows in groups.values():
            part = embeddings if len(groups) == 1 else embeddings[np.array(rows)]
            found.update(zip(rows, self._explain(part, [asked[row] for row in rows]), strict=True))
        self.score_s += time.perf_counter() - encoded
        return [found[row] for row in range(len(pixels))]

    def attempt(self, items: Sequence[Item]) -> BaseException | None:
        """Outcomes for all of `items`, or the error that came instead."""
        try:
            pixels = np.stack([item.pixels for item in items])  # type: ignore[misc]
            for item, made in zip(items, self.compute(pixels, [(i.top, i.nearest) for i in items]), strict=True):
                item.outcome = made
        except BaseException as error:
            return self._failed(error)
        return None

    def narrow(self, items: Sequence[Item], error: BaseException, again: bool = False) -> None:
        """After `error` on all of `items`: halve them until only those fail that fail alone, twice.

        A black image tells after each failure whether the engine works at all; where it doesn't, `down` says so.
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

    def _explain(self, embeddings: Embeddings, asked: Sequence[tuple[int, int]]) -> list[Prediction]:
        most = max(top for top, _ in asked), max(nearest for _, nearest in asked)
        predictions = predict(self.state, embeddings, *most)
        if len(predictions) != len(embeddings):
            raise RuntimeError(f"expected {len(embeddings)} predictions, got {len(predictions)}")
        return [_trimmed(made, *one) for made, one in zip(predictions, asked, strict=True)]

    def _failed(self, error: BaseException) -> BaseException:
        if not self.quiet:
            log.warning("a batch failed; it is tried again in parts", exc_info=error)
        self.clean, self.quiet = False, True
        return without_frames(error)


def _band(count: int) -> int:
    """Counts of one band are computed together, at the largest: nobody pays for one who asks for much more."""
    return max(count, 16).bit_length() // 2 if count else 0


def _trimmed(made: Prediction, top: int, nearest: int) -> Prediction:
    if len(made.top) <= top and len(made.nearest) <= nearest:
        return made
    return replace(made, top=made.top[:top], nearest=made.nearest[:nearest])


def _another(error: BaseException) -> BaseException:
    """A copy for each future: raising one and the same from many threads would mix up their tracebacks."""
    try:
        return copy.copy(error)
    except Exception:
        return error
