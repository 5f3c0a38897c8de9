"""Runs a batch through encoder and scoring; after an error, finds the images or the classifiers that cause it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.predictions import predict
from iosr_fast.serving.batching.classifiers import Classifiers
from iosr_fast.serving.batching.item import Item, Text

Collect: TypeAlias = Callable[[Any, Embeddings, Any, str], None]
log = logging.getLogger(__name__)


@dataclass
class Run:
    """What a batch took, in seconds; `clean` is False after any error. `heads`: for each classifier that was asked the
    error if it fails on every image, else None. `black`: the embeddings of black images."""

    encode_s: float = 0.0
    score_s: float = 0.0
    clean: bool = True
    heads: dict[str, Exception | None] = field(default_factory=dict)
    black: Embeddings | None = None


class Engine:
    """Runs batches of at most `max_batch` images. `healthy` is False while encoding, or scoring by every classifier,
    fails on every image; `last_error` is the error of its last failure. `failures` has the errors of classifiers that
    fail on every image. `collect` has, by classifier, what is called with each answered image that is whole and no
    probe, its embeddings (1, D), the head that answered and the client."""

    def __init__(self, classifiers: Classifiers, max_batch: int, collect: Mapping[str, Collect]) -> None:
        self.healthy = True
        self.failures: dict[str, Exception] = {}
        self.last_error: Exception | None = None
        self._classifiers, self._collect = classifiers, collect
        self._max_batch = max_batch
        self._encoding = threading.Lock()  # of an encoder with one run, which may not be thread-safe

    def warm(self) -> None:
        """Run batches of 1, 2, 4, ... and the most images once, because first runs are slow: of the encoder, in all
        runs at the same time, and on a GPU of scoring, too, whose kernels are compiled for a batch's size. On a CPU
        also 3, a usual size there. Raises what encoding raises, and what scoring raises if no classifier works."""
        encoder, errors = self._classifiers.encoder, dict[str, Exception | None]()
        most = min(self._max_batch, encoder.max_batch)
        sizes = {*(1 << k for k in range((most - 1).bit_length())), most}
        encoded = sizes if encoder.buckets or most < 3 else sizes | {3}
        with self._encoding if encoder.runs == 1 else nullcontext(), ThreadPoolExecutor(encoder.runs) as pool:
            for size in sorted(encoded):
                list(pool.map(encoder.warm, [[size]] * encoder.runs))
        for size in sorted(sizes) if encoder.buckets else [1]:
            run = Run(black=self._black(size))
            errors = {name: errors.get(name) or self._score_black(run, name) for name in self._classifiers.named}
        failed = [error for error in errors.values() if error is not None]
        if failed and len(failed) == len(errors):
            raise failed[0]
        self._judge(None, errors)

    def run(self, items: Sequence[Item]) -> Run:
        """Set the outcome of every item: a Prediction, a tuple with one or an exception for each classifier, Embeddings
        where none is asked, or an exception.

        After an error each image is tried alone, so that only those that fail twice get it. If a black image fails
        too, the engine fails on every image, and the rest gets the error at once. Likewise for each classifier, whose
        errors concern no other one.
        """
        run = Run()
        self._embed_texts([item for item in items if isinstance(item.image, Text)])
        items = [item for item in items if not isinstance(item.image, Text)]
        if not items:
            return run
        answers: list[dict[str, Any]] = [{} for _ in items]  # by classifier; of none what is embedded, by ""
        down = self._try(run, items, answers) and self._encode_black(run)
        for item, own in zip(items, answers, strict=True):
            if down is None and len(own) < max(1, len(item.heads)):
                down = self._try(run, [item], [own]) and self._encode_black(run)
        for item, own in zip(items, answers, strict=True):
            names, error = item.query.classifier, item.outcome or down
            if not own:
                item.outcome = error
            elif isinstance(names, str) or not names:
                item.outcome = next(iter(own.values()))
            else:
                item.outcome = tuple(own.get(name, error) for name in names)
        self._judge(down, run.heads)
        return run

    def probe(self) -> None:
        """Check whether what failed works again."""
        run = Run()
        if self._encode_black(run) is None:
            errors = {name: self._score_black(run, name) for name in self._classifiers.named}
            if self.healthy or not errors or not all(errors.values()):
                self._judge(None, errors)

    def _judge(self, down: Exception | None, heads: Mapping[str, Exception | None]) -> None:
        """Update the health after a batch; `down` is the error if encoding fails on every image, `heads` as of Run."""
        for name, error in heads.items():
            known = name in self.failures
            if error is not None:
                self.failures[name] = error
                if name and not known:
                    log.error("the classifier %r fails on every image: %r", name, error)
            elif known:
                self.failures.pop(name, None)
                if name:
                    log.info("the classifier %r works again", name)
        if down is None and self.failures and len(self.failures) == len(self._classifiers.named):
            down = next(filter(None, heads.values()), self.last_error)
        if down is not None:
            self.last_error = down
            if self.healthy:
                log.error("the engine fails on every image: %r", down)
        elif not self.healthy:
            log.info("the engine works again")
        self.healthy = down is None

    def _try(self, run: Run, items: Sequence[Item], answers: Sequence[dict[str, Any]]) -> Exception | None:
        """Encode items, and add the missing answers of classifiers; returns the error of encoding, which is also the
        outcome of a single item."""
        started, encoder = time.perf_counter(), items[0].encoder
        try:
            if any(item.encoder is not encoder for item in items):
                raise RuntimeError(
                    "expected images of one encoder, got some from before another fit and some from after"
                )
            embeddings = self._encode(encoder, np.stack([item.pixels for item in items]))  # type: ignore[misc]
        except Exception as error:
            if len(items) == 1:
                items[0].outcome = error
            return self._failed(run, error)
        encoded = time.perf_counter()
        run.encode_s += encoded - started
        self._score(run, items, embeddings, answers)
        run.score_s += time.perf_counter() - encoded
        return None

    def _embed_texts(self, items: Sequence[Item]) -> None:
        """Set the outcomes of texts; after an error each is tried alone."""
        text = self._classifiers.text if items else None
        for part in [items, *([item] for item in items)]:
            waiting = [item for item in part if not isinstance(item.outcome, Embeddings)]
            try:
                if waiting and text is None:
                    raise IosrFastError("expected pictures: the encoder here reads no texts")
                rows = text.embed([item.image for item in waiting]) if text and waiting else ()
                for item, row in zip(waiting, rows, strict=True):
                    item.outcome = Embeddings(row[None])
            except Exception as error:
                for item in waiting:
                    item.outcome = _forget_frames(error)

    def _encode(self, encoder: Any, pixels: np.ndarray) -> Embeddings:
        with self._encoding if encoder.runs == 1 else nullcontext():
            embeddings: Embeddings = encoder.encode_on_device(pixels)
        if len(embeddings) != len(pixels):
            raise RuntimeError(f"expected {len(pixels)} embeddings of the encoder, got {len(embeddings)}")
        return embeddings

    def _score(
        self, run: Run, items: Sequence[Item], embeddings: Embeddings, answers: Sequence[dict[str, Any]]
    ) -> None:
        """Add missing answers from embeddings (B, D): items that ask one head for the same are scored together. Of
        several items that fail together none gets an answer, unless the classifier fails on every image."""
        groups: dict[Any, list[int]] = {}
        for row, item in enumerate(items):
            query = item.query
            if not item.heads:
                answers[row][""] = embeddings[np.array([row])].to_numpy()
            for name, head in item.heads.items():
                if name not in answers[row]:
                    groups.setdefault((name, head, query.top, query.nearest, query.abstention), []).append(row)
        for (name, head, *asked), rows in groups.items():
            error = run.heads.get(name)
            if error is None:
                try:
                    part = embeddings if len(rows) == len(items) else embeddings[np.array(rows)]
                    predictions = dict(zip(rows, predict(head, part, *asked), strict=True))
                    self._offer(name, head, [items[row] for row in rows], part)
                    for row in rows:
                        answers[row][name] = predictions[row]
                except Exception as raised:
                    error = self._failed(run, raised, name)
                run.heads[name] = None if error is None else self._score_black(run, name)
            if run.heads[name] is not None or len(items) == 1:
                for row in rows:
                    answers[row].setdefault(name, error)

    def _offer(self, name: str, head: Any, items: Sequence[Item], embeddings: Embeddings) -> None:
        """Give whole images to the collector of a classifier."""
        for row, item in enumerate(items) if name in self._collect else ():
            if item.crop is None and not item.query.probe:
                self._collect[name](item.image, embeddings[np.array([row])], head, item.client)

    def _failed(self, run: Run, error: Exception, name: str = "") -> Exception:
        """Note an error, of scoring by a classifier with its name; returns it."""
        if self.healthy and run.clean and name not in self.failures:
            log.warning("a batch failed; its images are tried one by one", exc_info=error)
        run.clean = False
        return _forget_frames(error)

    def _black(self, count: int = 1) -> Embeddings:
        encoder = self._classifiers.encoder
        return self._encode(encoder, encoder.blank(count))

    def _encode_black(self, run: Run) -> Exception | None:
        """Encode a black image now; returns the error."""
        try:
            run.black = self._black()
        except Exception as error:
            return _forget_frames(error)
        return None

    def _score_black(self, run: Run, name: str) -> Exception | None:
        """Score the black image by the newest head of a classifier; returns the error."""
        try:
            if run.black is None:
                run.black = self._black()
            predict(self._classifiers.ask(name)[0][name], run.black, 1)
        except Exception as error:
            return _forget_frames(error)
        return None


def _forget_frames(error: Exception) -> Exception:
    """The error without tracebacks, nor those of what it comes from: their frames keep all images of a batch alive."""
    chained: BaseException | None = error
    while chained is not None:
        chained.__traceback__ = None
        chained = chained.__context__
    return error
