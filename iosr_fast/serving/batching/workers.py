"""The threads of BatchingClassifier: some decode, one runs batches; none of them dies before it is told to."""

from __future__ import annotations

import atexit
import logging
import math
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from iosr_fast.serving.batching.decode import Decoder, Limits, ThreadDecoder
from iosr_fast.serving.batching.engine import Engine
from iosr_fast.serving.batching.item import ClosedError, Hooks, Item, QueuedBatch, WholeImage, without_frames
from iosr_fast.serving.batching.queue import BatchQueue

log = logging.getLogger(__name__)

_PROBE_S = 1.0  # how often an engine that failed is tried while nobody asks: no traffic may come to one that is ill
_AT_EXIT_S = 5.0  # how long an exiting interpreter waits for what was accepted
_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0  # before a decoder that does not start is started again
_alive: set[Workers] = set()


def make_decoders(limits: Limits, count: int, isolated: bool) -> list[Decoder]:
    """One for each decoding thread: in a process of its own where `isolated`, else in the thread."""
    if not isolated:
        return [ThreadDecoder(limits) for _ in range(count)]
    from iosr_fast.serving.batching.processes import DecoderProcess

    return [DecoderProcess(limits) for _ in range(count)]


class Workers:
    """Starts the threads, and ends them. They hold no reference to the BatchingClassifier, which may be dropped."""

    def __init__(self, queue: BatchQueue, engine: Engine, hooks: Hooks, decoders: Sequence[Decoder]) -> None:
        """Returns when every decoder works. Raises what starting one raises."""
        self._queue, self._hooks, self._decoders = queue, hooks, decoders
        self._process = os.getpid()
        # Of each decoder, why it does not work.
        self._errors: list[BaseException | None] = [None] * len(decoders)
        tried = [threading.Event() for _ in decoders]
        batches = threading.Thread(
            target=_run_batches, args=(self, queue, engine, hooks), name="iosr-fast-batches", daemon=True
        )
        decoding = [
            threading.Thread(
                target=_decode,
                args=(queue, decoder, self._errors, i, tried[i]),
                name=f"iosr-fast-decode-{i}",
                daemon=True,
            )
            for i, decoder in enumerate(decoders)
        ]
        self._threads = [batches, *decoding]
        _alive.add(self)
        try:
            for thread in self._threads:
                thread.start()
            for event in tried:
                event.wait()
            if error := next((error for error in self._errors if error is not None), None):
                raise error
        except BaseException:  # no more threads or processes are to be had: those that run shall end
            _alive.discard(self)
            queue.close()
            queue.stop_decoding()
            raise

    @property
    def decoders_error(self) -> BaseException | None:
        """Why no decoder works; None where one does."""
        return next(iter(self._errors)) if all(self._errors) else None

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
            for decoder in self._decoders:
                decoder.kill()


@atexit.register
def _close_all() -> None:
    # Daemon threads are stopped wherever they are when the interpreter ends; in the middle of an engine's C++ that can
    # crash, so what was accepted is finished first, within bounds.
    until = time.monotonic() + _AT_EXIT_S
    for workers in list(_alive):
        workers.close(max(0.0, until - time.monotonic()))


def _run_batches(workers: Workers, queue: BatchQueue, engine: Engine, hooks: Hooks) -> None:
    try:
        while _run_batch(queue, engine, hooks):
            pass
    finally:
        queue.stop_decoding()
        _alive.discard(workers)


def _run_batch(queue: BatchQueue, engine: Engine, hooks: Hooks) -> bool:
    """Wait for a batch and answer it; False when there are no more."""
    batch: QueuedBatch | None = None
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


def _answer(batch: QueuedBatch, queue: BatchQueue, engine: Engine, hooks: Hooks) -> None:
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


def _decode(
    queue: BatchQueue, decoder: Decoder, errors: list[BaseException | None], place: int, tried: threading.Event
) -> None:
    # An error's traceback holds the frames that it went through and, by way of them, this one. So nothing here may
    # know an item any longer than it takes: its future would hold itself, and all of the image.
    try:
        while _started(queue, decoder, errors, place, tried) and (job := queue.next_to_decode()) is not None:
            size, upright = None if isinstance(job, WholeImage) else queue.image_size, queue.exif_orientation
            made = _decoded(decoder, job.image, job.position, size, job.deadline, upright)
            _hand_over(queue, job, made, upright)
            queue.has_decoded(job)
            del job, made
    finally:
        decoder.close()


def _started(
    queue: BatchQueue, decoder: Decoder, errors: list[BaseException | None], place: int, tried: threading.Event
) -> bool:
    """Whether the decoder works, which is tried until it does; False where it doesn't and all is closed. Images
    wait meanwhile: another decoder may take them."""
    pause_s = 0.0
    while not queue.wait_for_close(pause_s):
        try:
            decoder.start()
            errors[place] = None
            return True
        except BaseException as error:
            if errors[place] is None:
                log.error("a decoder does not start, which is tried again and again: %s", error)
            errors[place] = without_frames(error)
        finally:
            tried.set()
        pause_s = min(max(_PAUSE_S, 2 * pause_s), _LONGEST_PAUSE_S)
    return False


def _decoded(
    decoder: Decoder, image: Any, position: int, size: int | None, deadline: float, exif_orientation: bool
) -> np.ndarray | BaseException:
    """Pixels of the encoder's `size`, of the whole image where it is None, or what was raised."""
    try:
        if size is None:
            return decoder.whole(image, position, deadline, exif_orientation)
        return decoder.pixels(image, position, size, deadline, exif_orientation)
    except BaseException as error:  # MemoryError too: it concerns this image alone
        return error


def _hand_over(queue: BatchQueue, job: Item | WholeImage, made: Any, exif_orientation: bool) -> None:
    try:
        if isinstance(job, WholeImage):
            (job.future.set_exception if isinstance(made, BaseException) else job.future.set_result)(made)
        elif isinstance(made, BaseException):
            queue.fail(job, made)
        else:
            queue.decoded(job, made, exif_orientation)
    except BaseException as error:
        if isinstance(job, Item):
            queue.fail(job, without_frames(error))
