"""The queue of BatchingClassifier: admission, decoding, and forming batches."""

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
from typing import Any, NamedTuple

import numpy as np

from iosr_fast.exceptions import ClosedError, QueueFullError
from iosr_fast.images.geometry import Geometry
from iosr_fast.serving.batching.decode import is_pixels
from iosr_fast.serving.batching.item import Hooks, Item, QueuedBatch, Stage, WholeImage
from iosr_fast.serving.batching.pace import Pace
from iosr_fast.serving.batching.turns import Turns

_LEAST_RETRY_S = 0.01


class PixelForm(NamedTuple):
    """How a classifier's images become pixels."""

    geometry: Geometry
    exif_orientation: bool

    @classmethod
    def of(cls, classifier: Any) -> PixelForm:
        return cls(classifier.encoder.geometry, classifier.exif_orientation_)


class BatchQueue:
    """Items from admission to their batch. Its lock is never held during decoding, encoding, scoring or a callback.

    An item is DECODING, then READY, then TAKEN. Ready items have pixels of the current classifier's form. Each of the
    encoder's `runs` has a thread that takes batches. With one run, a batch starts when it is full, when its first item
    has been ready for `max_wait_s`, or when no accepted item is still DECODING and could join. With several, a free run
    starts at once with its share of the ready items, rounded up: the other runs take the others, so waiting gains
    nothing.
    """

    def __init__(
        self, classifier: Any, max_batch: int, max_wait_s: float, max_queue: int, hooks: Hooks, turns: Turns
    ) -> None:
        self.classifier = classifier
        self.runs: int = classifier.encoder.runs
        self.form = PixelForm.of(classifier)
        self.max_queue = max_queue
        self.closed = False
        self._max_batch, self._max_wait_s, self._hooks = max_batch, max_wait_s, hooks
        self._changed = threading.Condition()  # the batch threads wait for it
        self._accepted: set[Item] = set()
        self._ready: deque[Item] = deque()
        self._decoding = 0
        self.turns = turns
        self.ended = threading.Event()  # no further image is decoded
        self._pace = Pace()
        self._process = os.getpid()
        self._weak_self = weakref.ref(self)

    @property
    def pending(self) -> int:
        """Number of accepted items that are not finished."""
        return len(self._accepted)

    def admit(self, items: Sequence[Item], deadline_s: float | None) -> None:
        """Accept all items or none. Raises QueueFullError or ClosedError at once."""
        if os.getpid() != self._process:
            raise RuntimeError(
                "this BatchingClassifier was created before a fork and has no threads in this process; create a new one"
            )
        for item in items:
            item.future.add_done_callback(partial(_drop_cancelled, self._weak_self, weakref.ref(item)))
        with self._changed:
            reason, error = self._refusal(len(items), deadline_s)
            if error is None:
                for item in items:
                    self._accepted.add(item)
                    self._send(item)
                self._changed.notify()
        if error is not None:
            self._hooks.refused(reason, len(items))
            raise error

    def admit_whole(self, image: WholeImage) -> None:
        """Accept an image that is only decoded. Raises ClosedError at once."""
        with self._changed:
            if self.closed:
                raise _closed()
            self.turns.put(image)

    def next_to_decode(self) -> Item | WholeImage | None:
        """Wait for the next image to decode; the caller must call `turns.done` for it. None: closed."""
        while True:
            job = self.turns.get()
            if job is None or self._needs_decoding(job):
                return job
            self.turns.done(job)
            del job  # the frame would keep it until the next one comes

    def _needs_decoding(self, job: Item | WholeImage) -> bool:
        now = time.monotonic()
        if isinstance(job, WholeImage):
            return job.is_wanted(now)
        if job.deadline < now:
            self.fail(job, job.late(now))
        return job.stage is Stage.DECODING

    def decoded(self, item: Item, pixels: np.ndarray, form: PixelForm) -> None:
        """Set the pixels (S, S, 3) of an item, decoded to `form`; decode it again if a new classifier takes another."""
        with self._changed:
            if item.stage is not Stage.DECODING:
                return
            if form != self.form:
                self.turns.put(item)
                return
            self._decoding -= 1
            self._make_ready(item, pixels)
            self._wake()

    def fail(self, item: Item, error: BaseException) -> None:
        """Answer an item that could not be decoded."""
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
        """Remove an item whose future was cancelled."""
        with self._changed:
            if item.stage is Stage.READY:
                self._ready.remove(item)
            elif item.stage is Stage.DECODING:
                self._decoding -= 1
                self.turns.discard(item)
            if item.stage is not Stage.CANCELLED:
                item.future.set_running_or_notify_cancel()  # now concurrent.futures.wait counts it as done
                item.stage = Stage.CANCELLED
            self._accepted.discard(item)
            self._wake()
        self._hooks.done(time.monotonic() - item.submitted, "cancelled", None)

    def take(self, batch: QueuedBatch, idle_s: float = math.inf) -> bool:
        """Wait for the next batch and fill `batch`; it stays empty after `idle_s` idle seconds. False: closed, and all
        are answered."""
        with self._changed:
            while not (self.closed and not self._accepted):
                due_s = self._until_due_s()
                if due_s > 0:
                    wait_s = min(due_s, idle_s)
                    if not self._changed.wait(wait_s if wait_s < math.inf else None) and idle_s < due_s:
                        batch.classifier = self.classifier
                        return True
                    continue
                self._fill(batch)
                if batch.items or batch.expired:
                    self._wake()  # another thread for what is left
                    return True
            self._changed.notify_all()  # the other threads end as well
            return False

    def release(self, items: Sequence[Item], measure: bool) -> None:
        """Remove the finished items of a batch. `measure`: their time is representative."""
        now = time.monotonic()
        with self._changed:
            self._accepted.difference_update(items)
            if measure:
                self._pace.measure(now, min(item.submitted for item in items), len(items))
            else:
                self._pace.done(now)
            self._wake()

    def replace(self, classifier: Any) -> Any:
        """Use another classifier from the next batch on; returns the old one. Raises ClosedError."""
        with self._changed:
            if self.closed:
                raise _closed()
            old, self.classifier = self.classifier, classifier
            self.runs = classifier.encoder.runs
            form = PixelForm.of(classifier)
            if self.form != form:
                self.form = form
                outdated = list(self._ready)
                self._ready.clear()
                for item in outdated:
                    self._send(item)
                self._changed.notify()
            return old

    def close(self) -> None:
        """Accept no more items."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def stop_decoding(self) -> None:
        """Stop the decoders; called when nothing is left to classify."""
        self.ended.set()
        for job in self.turns.close():
            if isinstance(job, WholeImage) and job.future.set_running_or_notify_cancel():
                job.future.set_exception(_closed())

    def abandon(self) -> list[Item]:
        """Remove all unanswered items; returns those that the caller must answer."""
        with self._changed:
            waiting = (Stage.DECODING, Stage.READY)
            abandoned = [i for i in self._accepted if i.stage is Stage.TAKEN or (i.stage in waiting and self._claim(i))]
            self._accepted.clear()
            self._ready.clear()
            self._decoding = 0
            self._changed.notify_all()
        return abandoned

    # --- all below is called under the lock ---

    def _refusal(self, count: int, deadline_s: float | None) -> tuple[str, Exception | None]:
        if self.closed:
            return "closed", _closed()
        ahead = len(self._accepted)
        if ahead + count > self.max_queue:
            retry_after_s = max(_LEAST_RETRY_S, ahead * self._pace.item_s)
            message = (
                f"the queue is full: {ahead} images wait, {count} more came, max_queue is {self.max_queue}; "
                f"try again in {retry_after_s:.2g} s"
            )
            return "full", QueueFullError(message, retry_after_s)
        # Always admit when the queue is empty, so that one slow batch does not block admission forever.
        wait_s = self._pace.wait_s(ahead + count) if ahead else 0.0
        if deadline_s is not None and wait_s > deadline_s:
            retry_after_s = max(_LEAST_RETRY_S, wait_s - deadline_s)
            message = (
                f"expected an answer within {deadline_s:.3g} s, but it would take about {wait_s:.3g} s with {ahead} "
                f"images ahead; try again in {retry_after_s:.2g} s"
            )
            return "deadline", QueueFullError(message, retry_after_s)
        return "", None

    def _send(self, item: Item) -> None:
        """Queue an item for decoding, or make it ready if it has pixels."""
        if is_pixels(item.image, self.form.geometry.size):
            self._make_ready(item, item.image)
        else:
            item.stage, item.pixels = Stage.DECODING, None
            self._decoding += 1
            self.turns.put(item)

    def _make_ready(self, item: Item, pixels: np.ndarray) -> None:
        item.stage, item.pixels, item.ready_at = Stage.READY, pixels, time.monotonic()
        self._ready.append(item)

    def _claim(self, item: Item) -> bool:
        """Make the future uncancellable. False: it was cancelled, and drop() is about to be called."""
        claimed = item.future.set_running_or_notify_cancel()
        item.stage = Stage.TAKEN if claimed else Stage.CANCELLED
        return claimed

    def _until_due_s(self) -> float:
        if not self._ready:
            return math.inf
        if self.runs > 1 or len(self._ready) >= self._max_batch or not self._decoding:
            return 0.0
        return self._ready[0].ready_at + self._max_wait_s - time.monotonic()

    def _fill(self, batch: QueuedBatch) -> None:
        now, batch.classifier = time.monotonic(), self.classifier
        size = min(self._max_batch, math.ceil(len(self._ready) / self.runs))
        while self._ready and len(batch.items) < size:
            item = self._ready.popleft()
            batch.items.append(item)  # first, so that no error can lose it
            if not self._claim(item):
                batch.items.pop()
            elif item.deadline < now:
                batch.expired.append(batch.items.pop())
        batch.waiting = len(self._accepted) - len(batch.items) - len(batch.expired)

    def _wake(self) -> None:
        """Wake a batch thread if a batch is due or its timer must start."""
        if self.runs > 1 or len(self._ready) <= 1 or len(self._ready) >= self._max_batch or not self._decoding:
            self._changed.notify()


def _closed() -> ClosedError:
    return ClosedError("this BatchingClassifier is closed and accepts no more images; create a new one")


def _drop_cancelled(queue: weakref.ref[BatchQueue], item: weakref.ref[Item], future: Future[Any]) -> None:
    """Done-callback of a future. It keeps neither queue nor item alive, because callers may keep futures for long."""
    if future.cancelled():
        owner, cancelled = queue(), item()
        if owner is not None and cancelled is not None:
            owner.drop(cancelled)
