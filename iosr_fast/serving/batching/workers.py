"""The threads of BatchingClassifier: some decode, some run batches. No exception ends them before close()."""

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

from iosr_fast.exceptions import ClosedError
from iosr_fast.images.limits import DecodeLimits
from iosr_fast.serving.batching.decode import Decoder
from iosr_fast.serving.batching.engine import Engine
from iosr_fast.serving.batching.item import Hooks, Item, QueuedBatch, WholeImage, without_frames
from iosr_fast.serving.batching.queue import BatchQueue, PixelForm

log = logging.getLogger(__name__)

_PROBE_S = 1.0  # period of probes of a failed engine while idle: load balancers send no traffic to unhealthy servers
_AT_EXIT_S = 5.0  # how long an exiting interpreter waits for accepted images
_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0  # before a decoder that failed to start is started again
_alive: set[Workers] = set()


def make_decoders(limits: DecodeLimits, count: int, isolated: bool) -> list[Decoder]:
    """A decoder for each decoding thread: in its own process if `isolated`, else in the thread."""
    if not isolated:
        return [Decoder(limits) for _ in range(count)]
    from iosr_fast.serving.batching.processes import DecoderProcess

    return [DecoderProcess(limits) for _ in range(count)]


class Workers:
    """Starts and stops the threads. They hold no reference to the BatchingClassifier, so it can be collected."""

    def __init__(self, queue: BatchQueue, engine: Engine, hooks: Hooks, decoders: Sequence[Decoder]) -> None:
        """Returns when every decoder has started. Raises the error of a decoder that did not."""
        self._queue, self._engine, self._hooks, self._decoders = queue, engine, hooks, decoders
        self._process = os.getpid()
        # The error of each decoder that does not work.
        self._errors: list[BaseException | None] = [None] * len(decoders)
        self._attempted = [threading.Event() for _ in decoders]
        self._threads = [
            *(
                threading.Thread(target=self._run_batches, name=f"iosr-fast-batches-{i}", daemon=True)
                for i in range(queue.runs)
            ),
            *(
                threading.Thread(target=self._decode, args=(i,), name=f"iosr-fast-decode-{i}", daemon=True)
                for i in range(len(decoders))
            ),
        ]
        _alive.add(self)
        try:
            for thread in self._threads:
                thread.start()
            for event in self._attempted:
                event.wait()
            if error := next((error for error in self._errors if error is not None), None):
                raise error
        except BaseException:  # no more threads or processes are available: stop those that run
            _alive.discard(self)
            queue.close()
            queue.stop_decoding()
            raise

    @property
    def decoders_error(self) -> BaseException | None:
        """The error if no decoder works; None if one does."""
        return next(iter(self._errors)) if all(self._errors) else None

    def close(self, timeout: float | None = None) -> None:
        """Accept no more images, and wait until all are answered and the threads have ended.

        After `timeout` seconds the remaining images get ClosedError. In a callback on one of the threads it does not
        wait; the remaining images are answered after the callback.
        """
        self._queue.close()
        if threading.current_thread() in self._threads or os.getpid() != self._process:
            return
        until = None if timeout is None else time.monotonic() + timeout
        for thread in self._threads:
            thread.join(None if until is None else max(0.0, until - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            abandoned = self._queue.abandon()
            log.warning("closed after %g s with %d images unanswered: they get ClosedError", timeout, len(abandoned))
            for item in abandoned:
                item.answer(ClosedError("closed before the image could be classified"), self._hooks)
            for decoder in self._decoders:
                decoder.kill()

    def _run_batches(self) -> None:
        try:
            while self._run_batch():
                pass
        finally:
            self._queue.stop_decoding()
            _alive.discard(self)

    def _run_batch(self) -> bool:
        """Wait for a batch and answer it; False when there are no more."""
        batch = QueuedBatch()
        try:
            taken = self._queue.take(batch, math.inf if self._engine.healthy else _PROBE_S)
            if taken:
                self._answer(batch)
            return taken
        except BaseException as error:
            log.exception("a batch could not be run; its images get the error, and the next batch runs")
            unanswered = [*batch.expired, *batch.items]
            self._queue.release(unanswered, measure=False)
            for item in unanswered:
                if not item.future.done():
                    item.answer(without_frames(error), self._hooks)
            return True

    def _answer(self, batch: QueuedBatch) -> None:
        queue, engine, hooks = self._queue, self._engine, self._hooks
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

    def _decode(self, place: int) -> None:
        # The traceback of an error refers to its frames and through them to this one. So this frame must not keep an
        # item: its future would keep itself, and the whole image, alive.
        queue, decoder = self._queue, self._decoders[place]
        try:
            while self._started(place) and (job := queue.next_to_decode()) is not None:
                form = queue.form
                geometry = None if isinstance(job, WholeImage) else form.geometry
                result = _try_decode(decoder, job.image, job.position, geometry, job.deadline, form.exif_orientation)
                _hand_over(queue, job, result, form)
                queue.turns.done(job)
                del job, result
        finally:
            decoder.close()

    def _started(self, place: int) -> bool:
        """Start the decoder, repeatedly if it fails; False if the queue is closed before it works. Meanwhile other
        decoders may take the images."""
        pause_s = 0.0
        while not self._queue.ended.wait(pause_s):
            try:
                self._decoders[place].start()
                self._errors[place] = None
                return True
            except BaseException as error:
                if self._errors[place] is None:
                    log.error("a decoder does not start and is retried: %s", error)
                self._errors[place] = without_frames(error)
            finally:
                self._attempted[place].set()
            pause_s = min(max(_PAUSE_S, 2 * pause_s), _LONGEST_PAUSE_S)
        return False


@atexit.register
def _close_all() -> None:
    # An exiting interpreter stops daemon threads anywhere, which can crash inside the C++ code of an engine. So
    # accepted images are finished first, for a limited time.
    until = time.monotonic() + _AT_EXIT_S
    for workers in list(_alive):
        workers.close(max(0.0, until - time.monotonic()))


def _try_decode(decoder: Decoder, *args: Any) -> np.ndarray | BaseException:
    """The pixels, or the exception."""
    try:
        return decoder.decode(*args)
    except BaseException as error:  # even MemoryError concerns this image only
        return error


def _hand_over(queue: BatchQueue, job: Item | WholeImage, result: Any, form: PixelForm) -> None:
    try:
        if isinstance(job, WholeImage):
            (job.future.set_exception if isinstance(result, BaseException) else job.future.set_result)(result)
        elif isinstance(result, BaseException):
            queue.fail(job, result)
        else:
            queue.decoded(job, result, form)
    except BaseException as error:
        if isinstance(job, Item):
            queue.fail(job, without_frames(error))
