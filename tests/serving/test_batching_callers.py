"""BatchingClassifier asked by an event loop, and by many threads while others replace and close it."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import Future, as_completed
from typing import Any

import numpy as np
import pytest

from iosr_fast.exceptions import ClosedError, QueueFullError
from iosr_fast.serving.batching import BatchingClassifier
from tests.serving.batching_fakes import PATIENCE_S, FakeClassifier, labels, picture, threads, until


def test_asyncio(batching, classifier: FakeClassifier) -> None:
    async def main() -> None:
        found = await asyncio.gather(*(batching.classify(picture(i, 4 + i % 2), top=2) for i in range(20)))
        assert [int(made.label) for made in found] == list(range(20)) and len(found[0].top) == 2
        mixed = await batching.classify_many([picture(1), b"no image", picture(2, 9)], nearest=1)
        assert [getattr(made, "label", "bad") for made in mixed] == ["1", "bad", "2"] and len(mixed[0].nearest) == 1
        with pytest.raises(ValueError, match="can't read image number 0"):
            await batching.classify(b"no image")

        classifier.encoder.open.clear()
        running = asyncio.create_task(batching.classify(picture(50)))
        await asyncio.to_thread(until, lambda: [50] in classifier.encoder.batches)
        waiting = asyncio.create_task(batching.classify(picture(51)))
        several = asyncio.create_task(batching.classify_many([picture(52), picture(53)]))
        kept = asyncio.create_task(batching.classify(picture(54)))
        await asyncio.to_thread(until, lambda: batching.pending == 5)
        for task in (running, waiting, several):
            task.cancel()
        gone = await asyncio.gather(running, waiting, several, return_exceptions=True)
        assert [type(error) for error in gone] == [asyncio.CancelledError] * 3
        assert batching.pending == 2, "those that waited free their places, the one in a batch can't"
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(batching.classify(picture(55)), 0.01)
        assert batching.pending == 2
        classifier.encoder.open.set()
        assert (await kept).label == "54"
        assert classifier.encoder.batches[-2:] == [[50], [54]]
        batching.close()
        with pytest.raises(ClosedError):
            await batching.classify(picture(1))

    asyncio.run(main())


def test_a_coroutine_that_is_dropped_cancels_its_images(batching, classifier: FakeClassifier) -> None:
    async def main() -> None:
        for ask in (batching.classify(picture(1)), batching.classify_many([picture(2), picture(3, 9)])):
            ask.send(None)
            assert batching.pending > 1
            ask.close()
            assert batching.pending == 1

    with classifier.held(batching):
        asyncio.run(main())


def test_a_loop_that_ends_early_harms_nobody(batching, classifier: FakeClassifier) -> None:
    async def main() -> None:
        asyncio.ensure_future(batching.classify(picture(1)))  # noqa: RUF006 - it is left behind on purpose
        await asyncio.to_thread(until, lambda: bool(classifier.encoder.batches))

    classifier.encoder.open.clear()
    asyncio.run(main())
    classifier.encoder.open.set()
    assert labels([batching.submit(picture(2))]) == [2]


def test_many_threads_against_replace_and_close(classifier: FakeClassifier) -> None:
    """Every accepted image is answered with its own label, whatever goes on around it."""
    before = threads()
    batching = BatchingClassifier(classifier, max_batch=8, max_wait_ms=0.1, max_queue=32, decode_threads=3)
    start = threading.Barrier(10)
    accepted: list[list[tuple[int, Future[Any]]]] = [[] for _ in range(8)]

    def submits(which: int) -> None:
        rng = np.random.default_rng(which)
        start.wait()
        while True:
            numbers = rng.integers(1, 256, int(rng.integers(1, 4))).tolist()
            images = [picture(number, int(rng.choice([4, 5, 6]))) for number in numbers]
            try:
                futures = batching.submit_many(images, deadline_s=None if rng.random() < 0.5 else 60.0)
            except QueueFullError:
                time.sleep(0.001)
                continue
            except ClosedError:
                return
            accepted[which] += zip(numbers, futures, strict=True)
            if rng.random() < 0.2:
                futures[0].cancel()

    def replaces() -> None:
        start.wait()
        for i in range(40):
            until(lambda i=i: sum(map(len, accepted)) > 20 * i)
            batching.replace(FakeClassifier(4 + 2 * (i % 2)))

    hammering = [threading.Thread(target=submits, args=(which,)) for which in range(8)]
    replacing = threading.Thread(target=replaces)
    for thread in (*hammering, replacing):
        thread.start()
    start.wait()
    replacing.join(PATIENCE_S)
    batching.close(PATIENCE_S)
    for thread in hammering:
        thread.join(PATIENCE_S)
    everything = [pair for pairs in accepted for pair in pairs]
    assert len(everything) > 700 and all(future.done() for _, future in everything)
    assert batching.pending == 0 and threads() <= before and not any(thread.is_alive() for thread in hammering)
    cancelled = [future for _, future in everything if future.cancelled()]
    answered = [(number, future) for number, future in everything if not future.cancelled()]
    for number, future in answered:
        assert future.result().label == str(number)
    assert len(answered) > len(cancelled) and len(set(as_completed(f for _, f in everything))) == len(everything)
