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
from iosr_fast.serving.batching.item import Item, Observer, Text, decoding_work, notify
from iosr_fast.serving.batching.turns import Turns


class BatchQueue:
    """Items from admission to their batch. Its lock is never held during decoding, encoding, scoring or a callback.

    An item waits for a decoder, and when it is ready, with its pixels, for a batch.
    Clients take turns at both. A client with a name leaves one decoder to others, and two with large images; those of
    all clients leave one, and have at most `max_pixels_together` (a single one may have more). Large images alternate
    with others.

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
        self._max_batch, self._max_wait_s = max_batch, max_wait_s
        self._decoders, self._max_pixels_together = decoders, max_pixels_together
        lock = threading.RLock()
        self._changed = threading.Condition(lock)  # batch threads wait for it
        self._decoder_free = threading.Condition(lock)
        self._admission = Admission(max_queue, decoders, runs)
        self._accepted: set[Item] = set()
        self._waiting = {False: Turns(), True: Turns()}  # for a decoder, by whether they are large
        self._in_decoders: set[Item] = set()
        self._large_was_last = False
        self._ready = Turns()
        self._ready_since = 0.0  # of the first one
        self._process = os.getpid()
        self._weak_self = weakref.ref(self)

    @property
    def pending(self) -> int:
        return len(self._accepted)

    @property
    def decoders_are_busy(self) -> bool:
        """Whether every decoder has an image, or an image waits for one."""
        return len(self._in_decoders) >= self._decoders or any(self._waiting.values())

    def check_room(self, client: str) -> None:
        """Raise QueueFullError or ClosedError if no image of `client` would be accepted now."""
        try:
            with self._changed:
                self._check_open()
                self._admission.check_room(client)
        except QueueFullError:
            notify(self.observer, "on_refused", "full_before_body")
            raise

    def admit(self, items: Sequence[Item], deadline_s: float | None) -> None:
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
        pictures = [list(parts) for _, parts in groupby(to_decode, lambda item: id(item.picture))]
        works = list(map(decoding_work, pictures))
        reason = "closed"
        try:
            with self._changed:
                self._check_open()
                for parts, work in zip(pictures, works, strict=True):
                    self._admission.judge(parts, work)
                if items and not items[0].whole:
                    reason = "full"
                    self._admission.check_room(items[0].client, items)
                    reason = "deadline"
                self._admission.accept(items, deadline_s)
                for item in items:
                    self._accepted.add(item)
                    if item.pixels is None:
                        self._waiting[item.large].put(item)
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
                items = self._waiting[item.large].take_picture(item)
                self._large_was_last = item.large
                self._in_decoders.add(item)
            now = time.monotonic()
            if item.deadline >= now:
                return items
            self.decoded(items, [item.late(now)] * len(items))
            del item, items  # the frame would keep them until the next ones come

    def decoded(self, items: Sequence[Item], results: Sequence[np.ndarray | Exception], seconds: float = 0.0) -> None:
        """Set the pixels of items that were decoded together, or answer their errors."""
        answered = []
        with self._changed:
            self._in_decoders.discard(items[0])
            self._decoder_free.notify_all()  # another one of its client may start
            if seconds and self._admission.measure_decoding(items[0], seconds, time.monotonic()):
                for item in self._waiting[False].leave(items[0].client):  # judged before this was known
                    self._admission.make_large(item)
                    self._waiting[True].put(item)
            for item, result in zip(items, results, strict=True):
                if item.whole or isinstance(result, Exception):
                    if self._claim(item):
                        answered.append((item, result))
                    self._forget((item,))
                elif item in self._accepted:
                    item.pixels = result
                    self._make_ready(item)
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
                self._forget(late)
                self._changed.notify()  # another thread for what is left
            for item in late:
                item.answer(item.late(now), self.observer)
            if items:
                return items
            del items, late

    def finish(self, items: Sequence[Item], seconds: float) -> None:
        """Answer the items of a batch with their outcomes. `seconds` that it took; 0 if they are not representative."""
        with self._changed:
            self._forget(items)
            if seconds:
                self._admission.measure_batch(seconds, len(items))
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
            self._forget(abandoned)
            for turns in (self._ready, *self._waiting.values()):
                turns.clear()
            self._changed.notify_all()
        return abandoned

    def drop(self, item: Item) -> None:
        """Remove an item whose future was cancelled."""
        with self._changed:
            if item in self._accepted:
                item.future.set_running_or_notify_cancel()  # now concurrent.futures.wait counts it as done
                self._waiting[item.large].discard(item)
                self._ready.discard(item)
                self._forget((item,))
            self._changed.notify()
        notify(self.observer, "on_done", time.monotonic() - item.submitted, "cancelled", None)

    # --- all below is called under the lock ---

    def _check_open(self) -> None:
        if self.closed:
            raise ClosedError("this BatchingClassifier is closed and accepts no more images; create a new one")

    def _make_ready(self, item: Item) -> None:
        if not self._ready:
            self._ready_since = time.monotonic()
        self._ready.put(item)
        self._admission.drop_work(item)

    def _forget(self, items: Sequence[Item]) -> None:
        """Free the places of items that have one."""
        for item in items:
            if item in self._accepted:
                self._accepted.discard(item)
                self._admission.remove(item)

    def _claim(self, item: Item) -> bool:
        """Make the future of an accepted item uncancellable. False: it was cancelled, and may be dropped."""
        claimed = item in self._accepted and item.future.set_running_or_notify_cancel()
        if not claimed:
            self._forget((item,))
        return claimed

    def _decodable(self) -> Item | None:
        """The next item to decode; None if none may start."""
        running = Counter((item.client, item.large) for item in self._in_decoders)
        clients = {client for client, _ in running if client}
        full = {c for c in clients if running[c, False] + running[c, True] >= max(1, self._decoders - 1)}
        full_of_large = full | {c for c in clients if running[c, True] >= max(1, self._decoders - 2)}
        ordinary, large = self._waiting[False].first(full), self._waiting[True].first(full_of_large)
        costs = [item.cost for item in self._in_decoders if item.large]
        fits = large and (not costs or sum(costs) + large.cost <= self._max_pixels_together)
        if fits and len(costs) < max(1, self._decoders - 1) and not (ordinary and self._large_was_last):
            return large
        return ordinary

    def _until_due_s(self) -> float:
        if not self._ready:
            return math.inf
        if (
            self._admission.runs > 1
            or len(self._ready) >= self._max_batch
            or not (self._in_decoders or any(self._waiting.values()))
        ):
            return 0.0
        return self._ready_since + self._max_wait_s - time.monotonic()

    def _take(self, now: float) -> tuple[list[Item], list[Item]]:
        """The items of the next batch, and those that are too late for it."""
        items, late = list[Item](), list[Item]()
        size = min(self._max_batch, math.ceil(len(self._ready) / self._admission.runs))
        while len(items) < size and (item := self._ready.first()) is not None:
            self._ready.take(item)
            if self._claim(item):
                (late if item.deadline < now else items).append(item)
        return items, late


def _drop_cancelled(queue: weakref.ref[BatchQueue], item: weakref.ref[Item], future: Future[Any]) -> None:
    """Done-callback of a future. It keeps neither queue nor item alive, because callers may keep futures for long."""
    if future.cancelled():
        owner, cancelled = queue(), item()
        if owner is not None and cancelled is not None:
            owner.drop(cancelled)
