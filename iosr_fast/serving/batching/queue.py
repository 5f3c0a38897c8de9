"""The queue of BatchingClassifier: admission, decoding, and forming batches."""

from __future__ import annotations

import math
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np

from iosr_fast.exceptions import ClosedError, QueueFullError
from iosr_fast.serving.batching.admission import Admission
from iosr_fast.serving.batching.item import Item, Observer, Text, notify, set_work
from iosr_fast.serving.fairness import Turns


class BatchQueue:
    """Items from admission to their batch. Its lock is never held during decoding, encoding, scoring or a callback.

    An item waits for a decoder, and when it is ready, with its pixels, for a batch. Clients take turns at both.

    A client with a name leaves one decoder to others, and so do the large images of all clients, which have at most
    `max_pixels_together` (a single one may have more).

    Each of the encoder's `runs` has a thread that takes batches. With one run, a batch starts when it is full, when
    images have been ready for `max_wait_s`, or when no image is being decoded. With several, a free run starts at once
    with its share of the ready items, rounded up: the other runs take the others, so waiting gains nothing.
    """

    def __init__(
        self,
        runs: int,
        max_batch: int,
        max_wait_s: float,
        max_queue: int,
        decoders: int,
        max_pixels_together: int,
        observer: Observer | None,
    ) -> None:
        self.max_queue, self.observer = max_queue, observer
        self.closed = False
        self.ended = threading.Event()  # no further image is decoded
        self._runs, self._max_batch, self._max_wait_s = runs, max_batch, max_wait_s
        self._decoders, self._max_pixels_together = decoders, max_pixels_together
        lock = threading.RLock()
        self._changed = threading.Condition(lock)  # batch threads wait for it
        self._decoder_free = threading.Condition(lock)
        self._admission = Admission(max_queue, decoders)
        self._accepted: set[Item] = set()
        self._waiting = Turns(_turn)  # for a decoder
        self._in_decoders: set[Item] = set()
        self._ready = Turns(_turn)
        self._ready_since = 0.0  # of the first one
        self._process = os.getpid()
        self._weak_self = weakref.ref(self)

    @property
    def pending(self) -> int:
        return len(self._accepted)

    @property
    def decoders_are_busy(self) -> bool:
        """Whether every decoder has an image, or an image waits for one."""
        return len(self._in_decoders) >= self._decoders or len(self._waiting) > 0

    def admit(self, items: Sequence[Item]) -> None:
        """Accept all items of one request or none. Raises QueueFullError, but not for whole images, or ClosedError."""
        if os.getpid() != self._process:
            raise RuntimeError(
                "this BatchingClassifier was created before a fork and has no threads in this process; create a new one"
            )
        for item in items:
            item.future.add_done_callback(partial(_drop_cancelled, self._weak_self, weakref.ref(item)))
            if isinstance(item.image, Text) or (
                not item.whole and item.crop is None and item.encoder.accepts(item.image)
            ):
                item.pixels = item.image
        to_decode = (item for item in items if item.pixels is None)
        for _, parts in groupby(to_decode, lambda item: id(item.picture)):
            set_work(list(parts))
        reason = "closed"
        try:
            with self._changed:
                if self.closed:
                    again = "create a new one"
                    raise ClosedError(f"this BatchingClassifier is closed and accepts no more images; {again}")
                if items and not items[0].whole:
                    reason = "full"
                    self._admission.check_room(items)
                    reason = "deadline"
                    self._admission.check_deadline(items)
                for item in items:
                    self._accepted.add(item)
                    self._admission.add(item)
                    if item.pixels is None:
                        self._waiting.put(item)
                        self._decoder_free.notify()
                    else:
                        self._make_ready(item)
                        self._changed.notify()
        except (ClosedError, QueueFullError):
            for _ in items:
                notify(self.observer, "on_refused", reason)
            raise

    def next_to_decode(self) -> list[Item]:
        """Wait for the next image to decode: its item, or those of all its parts. The caller must call `decoded` for
        them. Empty: no more."""
        while True:
            with self._decoder_free:
                while (item := self._decodable()) is None and not self.ended.is_set():
                    self._decoder_free.wait()
                if item is None or self.ended.is_set():
                    return []
                items = [one for one in self._waiting.request_of(item) if one.picture is item.picture]
                self._waiting.take(*items)
                self._in_decoders.add(item)
            now = time.monotonic()
            if item.deadline >= now:
                return items
            self.decoded(items, [item.late(now)] * len(items), late=True)
            del item, items  # the frame would keep them until the next ones come

    def decoded(self, items: Sequence[Item], results: Sequence[np.ndarray | Exception], late: bool = False) -> None:
        """Set the pixels of items that were decoded together, or answer their errors."""
        answered = []
        with self._changed:
            self._in_decoders.discard(items[0])
            self._decoder_free.notify_all()  # another one of its client may start
            for item, result in zip(items, results, strict=True):
                if item.whole or isinstance(result, Exception):
                    if self._claim(item):
                        answered.append((item, result))
                elif item in self._accepted:
                    item.pixels = result
                    self._make_ready(item)
            self._leave([item for item, _ in answered], None if late else time.monotonic())
            self._changed.notify()
        for item, result in answered:
            item.answer(result, self.observer)

    def next_batch(self, idle_s: float = math.inf) -> list[Item] | None:
        """Wait for the next batch, which is empty after `idle_s` idle seconds. None: closed, and all are answered."""
        while True:
            with self._changed:
                if self.closed and not self._accepted:
                    self._changed.notify_all()  # the other threads end as well
                    return None
                due_s = self._until_due_s()
                if due_s > 0:
                    wait_s = min(due_s, idle_s)
                    if not self._changed.wait(wait_s if wait_s < math.inf else None) and idle_s < due_s:
                        return []
                    continue
                now = time.monotonic()
                items, late = self._take(now)
                self._leave(late)
                self._changed.notify()  # another thread for what is left
            for item in late:
                item.answer(item.late(now), self.observer)
            if items:
                return items
            del items, late

    def finish(self, items: Sequence[Item]) -> None:
        """Answer the items of a batch with their outcomes."""
        with self._changed:
            self._leave(items, time.monotonic())
            self._changed.notify()
        for item in items:
            item.answer(item.outcome, self.observer)

    def close(self) -> None:
        """Accept no more items."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def stop_decoding(self) -> None:
        """Let the decoders end; called when nothing is left to classify."""
        with self._decoder_free:
            self.ended.set()
            self._decoder_free.notify_all()

    def abandon(self) -> list[Item]:
        """Remove all unanswered items; returns them."""
        with self._changed:
            abandoned = list(self._accepted)
            self._leave(abandoned)
            self._changed.notify_all()
        return abandoned

    def drop(self, item: Item) -> None:
        """Remove an item whose future was cancelled."""
        with self._changed:
            if item in self._accepted:
                item.future.set_running_or_notify_cancel()  # now concurrent.futures.wait counts it as done
                self._leave((item,))
            self._changed.notify()
        notify(self.observer, "on_done", time.monotonic() - item.submitted, "cancelled", None)

    # --- all below is called under the lock ---

    def _make_ready(self, item: Item) -> None:
        if not self._ready:
            self._ready_since = time.monotonic()
        self._ready.put(item)

    def _leave(self, items: Sequence[Item], answered: float | None = None) -> None:
        """Free the places of items that have one. They are `answered` at that time, unless they are late or cancelled:
        the mean time between answers is of images that took some."""
        accepted = [item for item in items if item in self._accepted]
        if answered is not None:
            self._admission.measure(accepted, answered)
        for item in accepted:
            self._accepted.discard(item)
            self._admission.remove(item)
            self._waiting.discard(item)
            self._ready.discard(item)

    def _claim(self, item: Item) -> bool:
        """Make the future of an accepted item uncancellable. False: it was cancelled, and may be dropped."""
        claimed = item in self._accepted and item.future.set_running_or_notify_cancel()
        if not claimed:
            self._leave((item,))
        return claimed

    def _decodable(self) -> Item | None:
        """The next item to decode; None if none may start."""
        most, running = max(1, self._decoders - 1), Counter(item.client for item in self._in_decoders)
        full = {client for client, count in running.items() if client and count >= most}
        large = [item.cost for item in self._in_decoders if item.large]
        large_may_start = len(large) < most
        for item in self._waiting.heads(full):
            if not item.large:
                return item
            # While one waits for room no other large one starts: smaller ones would take the room again and again.
            large_may_start &= not large or sum(large) + item.cost <= self._max_pixels_together
            if large_may_start:
                return item
        return None

    def _until_due_s(self) -> float:
        if not self._ready:
            return math.inf
        if self._runs > 1 or len(self._ready) >= self._max_batch or not (self._in_decoders or self._waiting):
            return 0.0
        return self._ready_since + self._max_wait_s - time.monotonic()

    def _take(self, now: float) -> tuple[list[Item], list[Item]]:
        """The items of the next batch, and those that are too late for it."""
        items, late = list[Item](), list[Item]()
        size = min(self._max_batch, math.ceil(len(self._ready) / self._runs))
        while len(items) < size and (item := next(self._ready.heads(), None)) is not None:
            self._ready.take(item)
            if self._claim(item):
                (late if item.deadline < now else items).append(item)
        return items, late


def _turn(item: Item) -> tuple[str, int]:
    return item.client, item.request


def _drop_cancelled(queue: weakref.ref[BatchQueue], item: weakref.ref[Item], future: Future[Any]) -> None:
    """Done-callback of a future. It keeps neither queue nor item alive, because callers may keep futures for long."""
    if future.cancelled():
        owner, cancelled = queue(), item()
        if owner is not None and cancelled is not None:
            owner.drop(cancelled)
