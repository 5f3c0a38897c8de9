"""The places of BatchingClassifier: who is accepted, what waits for a decoder or a batch, when a batch leaves."""

from __future__ import annotations

import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np

from iosr_fast.serving.batching.decode import is_pixels
from iosr_fast.serving.batching.item import ClosedError, Hooks, Item, QueuedBatch, QueueFullError, Stage, WholeImage
from iosr_fast.serving.batching.pace import Pace
from iosr_fast.serving.batching.turns import Turns

_LEAST_RETRY_S = 0.01


class BatchQueue:
    """Items from acceptance to their batch, under one lock that is never held while anything is decoded, encoded,
    scored or called.

    An item is DECODING, then READY, then TAKEN. Ready items have the pixels of the present classifier's size. A batch
    leaves when it is full, when its first item has been ready for `max_wait_s`, or when no accepted item is still
    DECODING, so that none could join.
    """

    def __init__(
        self, classifier: Any, max_batch: int, max_wait_s: float, max_queue: int, hooks: Hooks, turns: Turns
    ) -> None:
        self.classifier = classifier
        self.image_size: int = classifier.encoder.image_size
        self.exif_orientation: bool = classifier.exif_orientation
        self.max_queue = max_queue
        self.closed = False
        self._max_batch, self._max_wait_s, self._hooks = max_batch, max_wait_s, hooks
        self._changed = threading.Condition()  # only the batch thread waits for it
        self._accepted: set[Item] = set()
        self._ready: deque[Item] = deque()
        self._decoding = 0
        self._turns = turns
        self._ended = threading.Event()
        self._pace = Pace()
        self._process = os.getpid()
        self._itself = weakref.ref(self)

    @property
    def pending(self) -> int:
        """Items that are accepted and not finished."""
        return len(self._accepted)

    def admit(self, items: Sequence[Item], deadline_s: float | None) -> None:
        """Accept all items or none. Raises QueueFullError or ClosedError at once."""
        if os.getpid() != self._process:
            raise RuntimeError(
                "this BatchingClassifier was made before a fork, its threads stayed there; make one here"
            )
        for item in items:
            item.future.add_done_callback(partial(_drop_cancelled, self._itself, weakref.ref(item)))
        with self._changed:
            refused, error = self._refusal(len(items), deadline_s)
            if error is None:
                for item in items:
                    self._accepted.add(item)
                    self._send(item)
                self._changed.notify()
        if error is not None:
            self._hooks.refused(refused, len(items))
            raise error

    def admit_whole(self, image: WholeImage) -> None:
        """Accept an image that is only decoded. Raises ClosedError at once."""
        with self._changed:
            if self.closed:
                raise _closed()
            self._turns.put(image)

    def next_to_decode(self) -> Item | WholeImage | None:
        """The next image that still wants decoding, for which `has_decoded` has to be called; waits for one. None:
        there will be none."""
        while True:
            job = self._turns.get()
            if job is None or self._wants_decoding(job):
                return job  # type: ignore[return-value]
            self._turns.done(job)
            del job  # it would be held until the next one comes

    def has_decoded(self, job: Item | WholeImage) -> None:
        """A decoder is done with what next_to_decode gave it."""
        self._turns.done(job)

    def wait_for_close(self, seconds: float) -> bool:
        """Whether nothing will be decoded any more, as soon as that is so; waits for at most `seconds`."""
        return self._ended.wait(seconds)

    @property
    def decoders_are_busy(self) -> bool:
        """Whether every decoder has an image, or an image waits for one."""
        return self._turns.decoders_are_busy

    def _wants_decoding(self, job: Any) -> bool:
        now = time.monotonic()
        if isinstance(job, WholeImage):
            return job.is_wanted(now)
        if job.deadline < now:
            self.fail(job, job.late(now))
        return bool(job.stage is Stage.DECODING)

    def decoded(self, item: Item, pixels: np.ndarray, exif_orientation: bool) -> None:
        """An item's pixels (S, S, 3). Where the classifier was replaced by one that takes other pixels, it is decoded
        again."""
        with self._changed:
            if item.stage is not Stage.DECODING:
                return
            if (len(pixels), exif_orientation) != (self.image_size, self.exif_orientation):
                self._turns.put(item)
                return
            self._decoding -= 1
            self._make_ready(item, pixels)
            self._wake()

    def fail(self, item: Item, error: BaseException) -> None:
        """An item could not be decoded."""
        with self._changed:
            if item.stage is not Stage.DECODING:
                return
            self._decoding -= 1
            claimed = self._claim(item)
            if claimed:
                self._accepted.discard(item)
            self._wake()
        if claimed:
            item.answer(error, self._hooks)

    def drop(self, item: Item) -> None:
        """An item's future was cancelled: it frees its place before it costs anything more."""
        with self._changed:
            if item.stage is Stage.READY:
                self._ready.remove(item)
            elif item.stage is Stage.DECODING:
                self._decoding -= 1
                self._turns.discard(item)
            if item.stage is not Stage.CANCELLED:
                item.future.set_running_or_notify_cancel()  # concurrent.futures.wait counts it as done from here on
                item.stage = Stage.CANCELLED
            self._accepted.discard(item)
            self._wake()
        self._hooks.done(time.monotonic() - item.submitted, "cancelled", None)

    def take(self, idle_s: float = math.inf) -> QueuedBatch | None:
        """The next batch, when it is due; an empty one after `idle_s` seconds without. None: closed, and everything is
        answered."""
        with self._changed:
            while not (self.closed and not self._accepted):
                due_s = self._until_due_s()
                if due_s > 0:
                    wait_s = min(due_s, idle_s)
                    if not self._changed.wait(wait_s if wait_s < math.inf else None) and idle_s < due_s:
                        return QueuedBatch(self.classifier)
                    continue
                batch = self._form()
                if batch.items or batch.expired:
                    return batch
            return None

    def release(self, items: Sequence[Item], measure: bool) -> None:
        """Items of a batch are done: their places are free. `measure`: they say how long an image takes."""
        now = time.monotonic()
        with self._changed:
            self._accepted.difference_update(items)
            if measure:
                self._pace.measure(now, min(item.submitted for item in items), len(items))
            else:
                self._pace.done(now)
            self._wake()

    def replace(self, classifier: Any) -> Any:
        """Batches from here on are of another classifier; returns the one before. Raises ClosedError."""
        with self._changed:
            if self.closed:
                raise _closed()
            old, self.classifier = self.classifier, classifier
            wanted = classifier.encoder.image_size, classifier.exif_orientation
            if (self.image_size, self.exif_orientation) != wanted:
                self.image_size, self.exif_orientation = wanted
                again = list(self._ready)
                self._ready.clear()
                for item in again:
                    self._send(item)
                self._changed.notify()
            return old

    def close(self) -> None:
        """Accept nothing more."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def stop_decoding(self) -> None:
        """Let the decoders go: called when nothing is left to classify."""
        self._ended.set()
        for job in self._turns.close():
            if isinstance(job, WholeImage) and job.future.set_running_or_notify_cancel():
                job.future.set_exception(_closed())

    def abandon(self) -> list[Item]:
        """Forget everything that is not answered; returns what may still be answered: by the caller."""
        with self._changed:
            waiting = (Stage.DECODING, Stage.READY)
            left = [i for i in self._accepted if i.stage is Stage.TAKEN or (i.stage in waiting and self._claim(i))]
            self._accepted.clear()
            self._ready.clear()
            self._decoding = 0
            self._changed.notify_all()
        return left

    def forget_taken(self) -> list[Item]:
        """Forget the items of the batch in flight, and return them: for when running it went wrong unexpectedly."""
        with self._changed:
            taken = [item for item in self._accepted if item.stage is Stage.TAKEN]
            self._accepted.difference_update(taken)
            self._wake()
        return taken

    # --- all below: under the lock ---

    def _refusal(self, count: int, deadline_s: float | None) -> tuple[str, Exception | None]:
        if self.closed:
            return "closed", _closed()
        ahead = len(self._accepted)
        if ahead + count > self.max_queue:
            retry_after_s = max(_LEAST_RETRY_S, ahead * self._pace.item_s)
            told = (
                f"the queue is full: {ahead} images are in it, {count} more came, max_queue is {self.max_queue}; "
                f"try again in {retry_after_s:.2g} s"
            )
            return "full", QueueFullError(told, retry_after_s)
        # An empty house takes everybody: a single slow batch must not shut it for good.
        wait_s = self._pace.wait_s(ahead + count) if ahead else 0.0
        if deadline_s is not None and wait_s > deadline_s:
            retry_after_s = max(_LEAST_RETRY_S, wait_s - deadline_s)
            told = (
                f"expected to be done within {deadline_s:.3g} s, which would take about {wait_s:.3g} s with {ahead} "
                f"images ahead; try again in {retry_after_s:.2g} s"
            )
            return "deadline", QueueFullError(told, retry_after_s)
        return "", None

    def _send(self, item: Item) -> None:
        """To a decoder, or past it."""
        if is_pixels(item.image, self.image_size):
            self._make_ready(item, item.image)
        else:
            item.stage, item.pixels = Stage.DECODING, None
            self._decoding += 1
            self._turns.put(item)

    def _make_ready(self, item: Item, pixels: np.ndarray) -> None:
        item.stage, item.pixels, item.ready_at = Stage.READY, pixels, time.monotonic()
        self._ready.append(item)

    def _claim(self, item: Item) -> bool:
        """From here on the future can't be cancelled. False: it was, and drop() is about to hear of it."""
        claimed = item.future.set_running_or_notify_cancel()
        item.stage = Stage.TAKEN if claimed else Stage.CANCELLED
        return claimed

    def _until_due_s(self) -> float:
        if not self._ready:
            return math.inf
        if len(self._ready) >= self._max_batch or not self._decoding:
            return 0.0
        return self._ready[0].ready_at + self._max_wait_s - time.monotonic()

    def _form(self) -> QueuedBatch:
        batch = QueuedBatch(self.classifier)
        now = time.monotonic()
        while self._ready and len(batch.items) < self._max_batch:
            item = self._ready.popleft()
            if self._claim(item):
                (batch.expired if item.deadline < now else batch.items).append(item)
        batch.waiting = len(self._accepted) - len(batch.items) - len(batch.expired)
        return batch

    def _wake(self) -> None:
        """After one item more or less: wake the batch thread where a batch is due, or its clock has to start."""
        if len(self._ready) <= 1 or len(self._ready) >= self._max_batch or not self._decoding:
            self._changed.notify()


def _closed() -> ClosedError:
    return ClosedError("this BatchingClassifier is closed and takes no more images; make another one")


def _drop_cancelled(queue: weakref.ref[BatchQueue], item: weakref.ref[Item], future: Future[Any]) -> None:
    """What a future calls when it is done. It holds neither queue nor item: futures may be kept for long."""
    if future.cancelled():
        here, cancelled = queue(), item()
        if here is not None and cancelled is not None:
            here.drop(cancelled)
