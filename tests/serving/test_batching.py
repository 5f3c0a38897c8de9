"""BatchingClassifier: when a batch starts and with which images, deadlines, cancelling, several runs, asyncio."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, wait
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from iosr_fast.exceptions import ClosedError, DeadlineExceededError, NotFittedError, QueueFullError
from iosr_fast.serving.batching import BatchingClassifier, batching_classifier, item, queue, workers
from tests.pictures import encode
from tests.serving.batching_fakes import (
    PATIENCE_S,
    SIZE,
    FakeClassifier,
    FakeEncoder,
    Gated,
    Watcher,
    labels,
    picture,
    threads,
    until,
)

NEVER_MS = 3_600_000.0


@pytest.fixture
def make(classifier: FakeClassifier) -> Iterator[Callable[..., BatchingClassifier]]:
    made: list[BatchingClassifier] = []

    def build(runs: int = 1, **options: Any) -> BatchingClassifier:
        classifier.encoder.runs = runs
        made.append(BatchingClassifier(classifier, **{"decode_threads": 2, "max_wait_ms": NEVER_MS, **options}))
        return made[-1]

    yield build
    classifier.encoder.open.set()
    for batching in made:
        batching.close(PATIENCE_S)
        assert batching.pending == 0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that a test moves."""
    fake = SimpleNamespace(now=1000.0, monotonic=lambda: fake.now)
    for module in (item, queue, batching_classifier, workers):
        monkeypatch.setattr(module, "time", fake)
    return fake


def test_batches_fill_up_while_the_engine_is_busy(make, classifier: FakeClassifier) -> None:
    watcher = Watcher()
    batching = make(max_batch=4, observer=watcher)
    with classifier.held(batching) as first:
        rest = [batching.submit(picture(i)) for i in range(1, 7)]
        classifier.version = 2
        rest += batching.submit_many([picture(i) for i in range(7, 10)])
        assert batching.pending == 10
        classifier.version = 3
    assert labels([first, *rest]) == list(range(10))
    assert classifier.encoder.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9]]
    assert [future.result().version for future in [first, *rest]] == [1] * 7 + [2] * 3, "that of its submission"
    assert watcher.batches == [1, 4, 4, 1]
    assert watcher.done == [("ok", str(i)) for i in range(10)]


@pytest.mark.parametrize("size", [4, 5], ids=["pixels", "decoded"])
def test_a_lone_image_starts_at_once(make, classifier: FakeClassifier, size: int) -> None:
    batching = make()
    for i in range(3):
        assert labels([batching.submit(picture(i, size))]) == [i]
    assert classifier.encoder.batches == [[0], [1], [2]]


def test_a_batch_waits_for_images_in_decoders(make, classifier: FakeClassifier) -> None:
    batching, slow = make(), Gated(2)
    futures = batching.submit_many([picture(1), slow])
    assert slow.begun.wait(PATIENCE_S)
    futures.append(batching.submit(picture(3)))
    slow.gate.set()
    assert labels(futures) == [1, 2, 3] and classifier.encoder.batches == [[1, 3, 2]]


@pytest.mark.parametrize("options", [{"max_wait_ms": 1.0}, {"max_batch": 2}, {"runs": 2}])
def test_a_batch_does_not_wait_for_long_or_when_full_or_with_an_idle_run(make, options: dict[str, Any]) -> None:
    batching, slow = make(**options), Gated(2)
    futures = batching.submit_many([slow, picture(1), picture(3)])
    assert labels(futures[1:]) == [1, 3] and not futures[0].done()
    slow.gate.set()
    assert labels(futures) == [2, 1, 3]


@pytest.mark.parametrize(("runs", "shares"), [(2, [3, 2, 1]), (3, [2, 2, 1, 1]), (8, [1] * 6)])
def test_each_run_takes_its_share(make, classifier: FakeClassifier, runs: int, shares: list[int]) -> None:
    batching = make(runs)
    classifier.encoder.open.clear()
    first = []
    for number in range(runs):
        first.append(batching.submit(picture(number)))
        assert classifier.encoder.began.get(timeout=PATIENCE_S) == [number]
    rest = [batching.submit(picture(number)) for number in range(runs, runs + 6)]
    classifier.encoder.open.set()
    assert labels([*first, *rest]) == list(range(runs + 6))
    batches = sorted(classifier.encoder.batches)[runs:]
    assert [len(batch) for batch in batches] == shares and sum(batches, []) == list(range(runs, runs + 6))  # noqa: RUF017


def test_each_query_gets_what_it_asks_for(make, classifier: FakeClassifier) -> None:
    batching = make(max_batch=8)
    with classifier.held(batching):
        wanted = [(5, 0), (1, 0), (9, 0), (2, 3), (5, 0)]
        futures = [batching.submit(picture(i), top=t, nearest=n) for i, (t, n) in enumerate(wanted)]
    got = [future.result(PATIENCE_S) for future in futures]
    assert [(len(made.top), len(made.nearest)) for made in got] == wanted
    assert [int(made.label) for made in got] == list(range(5))
    # A query pays for no other's neighbours or classes.
    assert classifier.asked[1:] == [([0, 4], 5, 0), ([1], 1, 0), ([2], 9, 0), ([3], 2, 3)]


def test_images_of_two_encoders_get_the_embeddings_of_their_own(make, classifier: FakeClassifier) -> None:
    batching, before = make(max_batch=8), classifier.encoder
    with classifier.held(batching):
        old = batching.submit_many([picture(1), picture(2)])
        classifier.encoder = FakeEncoder()
        new = batching.submit(picture(3))
        before.open.set()
        assert labels([*old, new]) == [1, 2, 3]
    assert before.batches[1:] == [[1], [2]] and classifier.encoder.batches[-1] == [3]


def test_an_image_that_is_late_is_not_encoded(make, classifier: FakeClassifier, clock) -> None:
    watcher = Watcher()
    batching = make(max_batch=2, decode_threads=1, observer=watcher)
    with classifier.held(batching):
        late = [batching.submit(picture(i), deadline_s=1.0) for i in (1, 2)]
        slow = Gated(3)
        in_time = [batching.submit(picture(4), deadline_s=5.0), batching.submit(slow)]
        late.append(batching.submit(picture(6, 9), deadline_s=1.0))  # waits for the only decoder
        assert slow.begun.wait(PATIENCE_S)
        clock.now += 2.0
        slow.gate.set()
    for future in late:
        with pytest.raises(TimeoutError, match="deadline of 1 s passed 1 s before") as raised:
            future.result(PATIENCE_S)
        assert isinstance(raised.value, DeadlineExceededError)
    assert labels(in_time) == [4, 3] and sorted(sum(classifier.encoder.batches, [])) == [0, 3, 4]  # noqa: RUF017
    assert [outcome for outcome, _ in watcher.done].count("deadline") == 3


def test_an_image_that_would_be_late_is_refused(make, classifier: FakeClassifier, clock) -> None:
    watcher = Watcher()
    batching = make(max_batch=1, observer=watcher)
    classifier.encoder.raises = lambda numbers: classifier.encoder.open.clear() if numbers == [0] else None
    with classifier.held(batching):
        first = batching.submit_many([picture(1), picture(2)], deadline_s=1.0)  # nothing has taken any time yet
        clock.now += 0.8
    until(lambda: batching.pending == 2)
    with pytest.raises(QueueFullError, match=r"take about 1\.6 s with 2 images ahead") as refused:
        batching.submit(picture(3), deadline_s=1.0)
    assert refused.value.retry_after_s == pytest.approx(0.6) and watcher.refused == ["deadline"]
    others = [batching.submit(picture(4), deadline_s=2.0), batching.submit(picture(5), client="new", deadline_s=0.1)]
    classifier.encoder.open.set()
    assert labels([*first, *others]) == [1, 2, 4, 5]


def test_a_cancelled_image_frees_its_place(make, classifier: FakeClassifier) -> None:
    watcher = Watcher()
    batching = make(max_queue=4, decode_threads=1, max_wait_ms=1.0, observer=watcher)
    with classifier.held(batching) as running:
        slow, never = Gated(1), Gated(2)
        ready, decoding, waiting = batching.submit(picture(3)), batching.submit(slow), batching.submit(never)
        assert slow.begun.wait(PATIENCE_S) and batching.pending == 4
        assert ready.cancel() and decoding.cancel() and waiting.cancel() and batching.pending == 1
        assert not running.cancel(), "it is in a batch"
        done, left = wait([ready, decoding, waiting], timeout=PATIENCE_S)
        assert len(done) == 3 and not left and watcher.done == [("cancelled", None)] * 3
        others = [batching.submit(picture(i)) for i in (5, 6, 7)]
        slow.gate.set()
    assert labels([running, *others]) == [0, 5, 6, 7] and labels([batching.submit(picture(8, 9))]) == [8]
    assert not never.begun.is_set() and all(3 not in numbers for numbers in classifier.encoder.batches)
    with pytest.raises(CancelledError):
        ready.result()


def test_invalid_settings_and_queries_are_refused(make, classifier: FakeClassifier) -> None:
    for options in ({"max_batch": 0}, {"max_queue": 0}, {"decode_threads": 0}, {"max_batch": 1.5}):
        with pytest.raises(ValueError, match=f"expected {next(iter(options))} (of at least 1|to be a whole number)"):
            make(**options)
    unfitted = Mock(snapshot=Mock(side_effect=NotFittedError("not fitted yet")))
    with pytest.raises(NotFittedError):
        BatchingClassifier(unfitted)
    with pytest.raises(ValueError, match="expected max_wait_ms of at least 0"):
        make(max_wait_ms=float("nan"))
    batching = make(max_queue=4)
    for message, query in {
        "top of at least 1, got 0": {"top": 0},
        "nearest of at least 0, got -1": {"nearest": -1},
        "expected deadline_s > 0 or None, got 0": {"deadline_s": 0},
    }.items():
        with pytest.raises(ValueError, match=message):
            batching.submit(picture(0), **query)
    with pytest.raises(ValueError, match=r"at most 4 images at once \(max_queue\), got 5"):
        batching.submit_many([picture(0)] * 5)
    assert batching.submit_many([]) == [] and batching.pending == 0 and classifier.encoder.batches == []


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
        several = asyncio.create_task(batching.classify_many([picture(52), picture(53)]))
        kept = asyncio.create_task(batching.classify(picture(54)))
        await asyncio.to_thread(until, lambda: batching.pending == 4)
        for task in (running, several):
            task.cancel()
        gone = await asyncio.gather(running, several, return_exceptions=True)
        assert [type(error) for error in gone] == [asyncio.CancelledError] * 2
        assert batching.pending == 2, "only the one in a batch keeps its place"
        classifier.encoder.open.set()
        assert (await kept).label == "54" and classifier.encoder.batches[-2:] == [[50], [54]]
        batching.close()
        with pytest.raises(ClosedError):
            await batching.classify(picture(1))

    asyncio.run(main())


def test_every_image_that_many_threads_submit_before_a_close_gets_its_own_label(classifier: FakeClassifier) -> None:
    before = threads()
    batching = BatchingClassifier(classifier, max_batch=8, max_wait_ms=0.1, max_queue=32, decode_threads=3)
    start = threading.Barrier(9)
    accepted: list[list[tuple[int, Future[Any]]]] = [[] for _ in range(8)]

    def submits(which: int) -> None:
        rng = np.random.default_rng(which)
        start.wait()
        while True:
            numbers = rng.integers(1, 256, int(rng.integers(1, 4))).tolist()
            images = [picture(number, int(rng.choice([4, 5, 6]))) for number in numbers]
            options = {"deadline_s": None if rng.random() < 0.5 else 60.0, "client": str(which % 3 or "")}
            try:
                futures = batching.submit_many(images, **options)
            except QueueFullError:
                time.sleep(0.001)
                continue
            except ClosedError:
                return
            accepted[which] += zip(numbers, futures, strict=True)
            if rng.random() < 0.2:
                futures[0].cancel()

    running = [threading.Thread(target=submits, args=(which,)) for which in range(8)]
    for thread in running:
        thread.start()
    start.wait()
    until(lambda: sum(map(len, accepted)) > 700)
    batching.close(PATIENCE_S)
    for thread in running:
        thread.join(PATIENCE_S)
    everything = [pair for pairs in accepted for pair in pairs]
    assert len(everything) > 700 and all(future.done() for _, future in everything)
    assert batching.pending == 0 and threads() <= before
    assert all(future.cancelled() or future.result().label == str(number) for number, future in everything)


def test_a_submission_reads_the_fit_once(
    classifier: FakeClassifier, batching: BatchingClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another fit, with an encoder of its own, comes right after each reading."""
    first, second = classifier.encoder, FakeEncoder()
    as_stored = SimpleNamespace(exif_orientation=False, margin=0.0)
    fit = SimpleNamespace(head=classifier.snapshot(), encoder=first, settings=as_stored)

    def then_refit(read: Callable[[], Any]) -> Any:
        found = read()
        classifier.encoder = second
        return found

    for name, read in (("_fitted", lambda: fit), ("snapshot", classifier.snapshot)):
        monkeypatch.setattr(classifier, name, partial(then_refit, read))
    exif = Image.Exif()
    exif[274] = 3  # turned by 180 degrees
    turned = encode(
        Image.fromarray(np.repeat([5, 6], SIZE * SIZE * 3 // 2).astype(np.uint8).reshape(SIZE, SIZE, 3)), exif=exif
    )
    assert labels([batching.submit(turned)]) == [5]
    assert first.batches == [[5]] and second.batches == []
