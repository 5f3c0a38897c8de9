"""The threads of BatchingClassifier: some decode, some run batches. No exception ends them before close()."""

from __future__ import annotations

import atexit
import logging
import math
import os
import threading
import time
import traceback
from collections.abc import Sequence

import numpy as np

from iosr_fast.exceptions import ClosedError
from iosr_fast.serving.batching.decoder import Decoder
from iosr_fast.serving.batching.engine import Engine
from iosr_fast.serving.batching.item import Item, notify, ordinary
from iosr_fast.serving.batching.queue import BatchQueue
from iosr_fast.serving.limits import Deadlines

log = logging.getLogger(__name__)

_alive: set[Workers] = set()


class Workers:
    """Starts and stops the threads. They hold no reference to the BatchingClassifier, so it can be collected."""

    def __init__(self, queue: BatchQueue, engine: Engine, runs: int, decoders: Sequence[Decoder]) -> None:
        """Returns when every decoder has started. Raises the error of a decoder that did not."""
        self._queue, self._engine, self._decoders = queue, engine, decoders
        self._process = os.getpid()
        self._probe_at = 0.0
        self._errors: list[Exception | None] = [None] * len(decoders)  # of decoders that do not work
        self._attempted = [threading.Event() for _ in decoders]
        self._threads = [
            *(threading.Thread(target=self._run_batches, name=f"iosr-fast-batches-{i}") for i in range(runs)),
            *(
                threading.Thread(target=self._decode, args=(i,), name=f"iosr-fast-decode-{i}")
                for i in range(len(decoders))
            ),
        ]
        _alive.add(self)
        try:
            for thread in self._threads:
                thread.daemon = True
                thread.start()
            for event in self._attempted:
                event.wait()
            if error := next((error for error in self._errors if error is not None), None):
                raise error
            if self.warning:
                log.warning("%s", self.warning)
        except BaseException:  # no more threads or processes are available: stop those that run
            _alive.discard(self)
            queue.close()
            queue.stop_decoding()
            raise

    @property
    def decoders_error(self) -> Exception | None:
        """The error if no decoder works; None if one does."""
        return self._errors[0] if all(self._errors) else None

    @property
    def warning(self) -> str:
        """That of the decoders; "" if they are confined as they should be, or need not be."""
        return max(decoder.warning for decoder in self._decoders)

    def close(self, timeout: float | None = None) -> None:
        """As BatchingClassifier.close."""
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
                item.answer(ClosedError("closed before the image could be classified"), self._queue.observer)
            for decoder in self._decoders:
                decoder.close()

    def _run_batches(self) -> None:
        try:
            while self._run_batch():
                pass
        finally:
            self._queue.stop_decoding()
            _alive.discard(self)

    def _run_batch(self) -> bool:
        """Wait for a batch and answer it; False when there are no more."""
        queue, engine = self._queue, self._engine
        items = list[Item]()
        try:
            if engine.failures and engine.healthy and time.monotonic() >= self._probe_at:
                self._probe()  # a busy engine is never idle, and those that failed may get no request
            failing = engine.failures or not engine.healthy
            waited_for = queue.next_batch(Deadlines.engine_probe_s if failing else math.inf)
            if waited_for is None:
                return False
            items = waited_for
            if items:
                run = engine.run(items)
                notify(queue.observer, "on_batch", len(items), run.encode_s, run.score_s)
            else:
                self._probe()
        except BaseException as error:
            log.exception("a batch could not be run; its images get the error, and the next batch runs")
            for item in items:
                item.outcome = item.outcome or ordinary(error)
        queue.finish(items)
        return True

    def _probe(self) -> None:
        self._probe_at = time.monotonic() + Deadlines.engine_probe_s
        self._engine.probe()

    def _decode(self, place: int) -> None:
        # The traceback of an error refers to its frames and through them to this one. So no frame may keep an item: its
        # future would keep itself, and the whole image, alive.
        queue, decoder, pause_s = self._queue, self._decoders[place], 0.0
        while not queue.ended.wait(pause_s):
            try:
                decoder.start()
            except Exception as error:  # meanwhile other decoders take the images
                if self._errors[place] is None:
                    log.error("a decoder does not start and is retried: %s", error)
                self._errors[place] = error
                pause_s = min(max(Deadlines.decoder_pause_s, 2 * pause_s), Deadlines.decoder_longest_pause_s)
                continue
            finally:
                self._attempted[place].set()
            self._errors[place], pause_s = None, 0.0
            items = queue.next_to_decode()
            if not items:
                break
            results: list[np.ndarray | Exception]
            try:
                results = decoder.decode(*items)
            except BaseException as error:  # even MemoryError concerns this image only
                results = [ordinary(error)] * len(items)
            for result in results:
                chained: BaseException | None = result if isinstance(result, Exception) else None
                while chained is not None:
                    traceback.clear_frames(chained.__traceback__)
                    chained = chained.__context__
            queue.decoded(items, results)
            del items, results, result
        decoder.close()


@atexit.register
def _close_all() -> None:
    # An exiting interpreter stops daemon threads anywhere, which can crash inside the C++ code of an engine. So
    # accepted images are finished first, for a limited time.
    until = time.monotonic() + Deadlines.at_exit_s
    for workers in list(_alive):
        workers.close(max(0.0, until - time.monotonic()))
