"""The threads of BatchingClassifier: some decode, one runs batches; none of them dies before it is told to."""

from __future__ import annotations

import atexit
import logging
import math
import os
import threading
import time
from typing import Any

import numpy as np

from iosr_fast.batching.decode import Limits, decode
from iosr_fast.batching.engine import Engine
from iosr_fast.batching.item import ClosedError, Hooks, Item, without_frames
from iosr_fast.batching.queue import Batch, BatchQueue

log = logging.getLogger(__name__)

_PROBE_S = 1.0  # how often an engine that failed is tried while nobody asks: no traffic may come to one that is ill
_AT_EXIT_S = 5.0  # how long an exiting interpreter waits for what was accepted
_alive: set[Workers] = set()


class Workers:
    """Starts the threads, and ends them. They hold no reference to the BatchingClassifier, which may be dropped."""

    def __init__(self, queue: BatchQueue, engine: Engine, hooks: Hooks, limits: Limits, decode_threads: int) -> None:
        self._queue, self._hooks = queue, hooks
        self._process = os.getpid()
        batches = threading.Thread(
            target=_run_batches,
            args=(self, queue, engine, hooks, decode_threads),
            name="iosr-fast-batches",
            daemon=True,
        )
        decoders = [
            threading.Thread(target=_decode, args=(queue, limits), name=f"iosr-fast-decode-{i}", daemon=True)
            for i in range(decode_threads)
        ]
        self._threads = [batches, *decoders]
        _alive.add(self)
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:  # no more threads are to be had: those that run shall end
            _alive.discard(self)
            queue.close()
            queue.stop_decoding(decode_threads)
            raise

    def close(self, timeout: float | None = None) -> None:
        """Accept nothing more, wait until all is answered and the threads have ended.

        After `timeout` seconds what is left is answered with ClosedError. On a thread of its own, in a callback, it
        doesn't wait: the rest is answered when the callback has returned.
        """
        self._queue.close()
        if threading.current_thread() in self._threads or os.getpid() != self._process:
            return
        until = None if timeout is None else time.monotonic() + timeout
        for thread in self._threads:
            thread.join(None if until is None else max(0.0, until - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            left = self._queue.abandon()
            log.warning("closed after %g s with %d images unanswered: they get ClosedError", timeout, len(left))
            for item in left:
                item.answer(ClosedError("closed before the image could be classified"), self._hooks)


@atexit.register
def _close_all() -> None:
    # Daemon threads are stopped wherever they are when the interpreter ends; in the middle of an engine's C++ that can
    # crash, so what was accepted is finished first, within bounds.
    until = time.monotonic() + _AT_EXIT_S
    for workers in list(_alive):
        workers.close(max(0.0, until - time.monotonic()))


def _run_batches(workers: Workers, queue: BatchQueue, engine: Engine, hooks: Hooks, decode_threads: int) -> None:
    try:
        while _run_batch(queue, engine, hooks):
            pass
    finally:
        queue.stop_decoding(decode_threads)
        _alive.discard(workers)


def _run_batch(queue: BatchQueue, engine: Engine, hooks: Hooks) -> bool:
    """Wait for a batch and answer it; False when there are no more."""
    batch: Batch | None = None
    try:
        batch = queue.take(math.inf if engine.healthy else _PROBE_S)
        if batch is not None:
            _answer(batch, queue, engine, hooks)
        return batch is not None
    except BaseException as error:
        log.exception("a batch could not be run; its images get the error, the next batch is tried")
        for item in {*queue.forget_taken(), *(batch.all_items if batch is not None else ())}:
            if not item.future.done():
                item.answer(without_frames(error), hooks)
        return True


def _answer(batch: Batch, queue: BatchQueue, engine: Engine, hooks: Hooks) -> None:
    if batch.expired:
        queue.release(batch.expired, measure=False)
        now = time.monotonic()
        for item in batch.expired:
            item.answer(item.late(now), hooks)
    if not batch.items:
        if not batch.expired:
            engine.probe(batch.classifier)
        return
    run = engine.run(batch.classifier, batch.items)
    if batch.classifier is queue.classifier:
        engine.judge(run.down)
    queue.release(batch.items, measure=run.clean)
    hooks.batch(len(batch.items), batch.waiting, run.encode_s, run.score_s)
    for item in batch.items:
        if item.outcome is None:
            raise RuntimeError("expected an outcome for every image of a batch, got none for one")
        item.answer(item.outcome, hooks)


def _decode(queue: BatchQueue, limits: Limits) -> None:
    # An error's traceback holds the frames that it went through and, by way of them, this one. So nothing here may
    # know an item any longer than it takes: its future would hold itself, and all of the image.
    while (item := queue.next_to_decode()) is not None:
        exif_orientation = queue.exif_orientation
        made = _pixels(item.image, item.position, queue.image_size, limits, exif_orientation)
        _hand_over(queue, item, made, exif_orientation)
        del item, made


def _pixels(image: Any, position: int, size: int, limits: Limits, exif_orientation: bool) -> np.ndarray | BaseException:
    try:
        return decode(image, position, size, limits, exif_orientation)
    except BaseException as error:  # MemoryError too: it concerns this image alone
        return error


def _hand_over(queue: BatchQueue, item: Item, made: np.ndarray | BaseException, exif_orientation: bool) -> None:
    try:
        if isinstance(made, BaseException):
            queue.fail(item, made)
        else:
            queue.decoded(item, made, exif_orientation)
    except BaseException as error:
        queue.fail(item, without_frames(error))
