"""BatchingClassifier: when a batch starts and with which images, deadlines, cancelling, asyncio, its end."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iosr_fast import Classifier
from iosr_fast.exceptions import ClosedError, DeadlineExceededError, QueueFullError
from iosr_fast.head import head
from iosr_fast.serving.batching import BatchingClassifier, batching_classifier, item, queue, workers
from tests import ROOT
from tests.demo_cache import demo_bundle
from tests.pictures import turned
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
)
from tests.waiting import wait_until
from tools.demo.bundle import held_out_queries

NEVER_MS = 3_600_000.0


@pytest.fixture
def make(classifier: FakeClassifier, watcher: Watcher) -> Iterator[Callable[..., BatchingClassifier]]:
    made: list[BatchingClassifier] = []

    def build(runs: int = 1, **options: Any) -> BatchingClassifier:
        classifier.encoder.runs = runs
        usual = {"decode_threads": 2, "max_wait_ms": NEVER_MS, "observer": watcher}
        made.append(BatchingClassifier(classifier, **{**usual, **options}))
        return made[-1]

    yield build
    classifier.encoder.open.set()
    for batching in made:
        batching.close(PATIENCE_S)
        assert batching.pending == 0


# --- batches ---


def test_batches_fill_while_the_engine_is_busy(make, classifier: FakeClassifier, watcher: Watcher) -> None:
    batching = make(max_batch=4)
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


def test_a_lone_image_starts_at_once_and_a_batch_waits_for_decoders(make, classifier: FakeClassifier) -> None:
    batching, slow = make(), Gated(2)
    assert labels([batching.submit(picture(8))]) == [8] and labels([batching.submit(picture(9, SIZE + 1))]) == [9]
    futures = batching.submit_many([picture(1), slow])
    assert slow.begun.wait(PATIENCE_S)
    futures.append(batching.submit(picture(3)))
    slow.gate.set()
    assert labels(futures) == [1, 2, 3] and classifier.encoder.batches == [[8], [9], [1, 3, 2]]


@pytest.mark.parametrize("options", [{"max_wait_ms": 1.0}, {"max_batch": 2}, {"runs": 2}])
def test_a_batch_waits_not_for_long_nor_when_full_nor_beside_an_idle_run(make, options: dict[str, Any]) -> None:
    batching, slow = make(**options), Gated(2)
    futures = batching.submit_many([slow, picture(1), picture(3)])
    assert labels(futures[1:]) == [1, 3] and not futures[0].done()
    slow.gate.set()
    assert labels(futures) == [2, 1, 3]


@pytest.mark.parametrize(("runs", "shares"), [(2, [3, 2, 1]), (8, [1] * 6)])
def test_each_run_takes_its_share(make, classifier: FakeClassifier, runs: int, shares: list[int]) -> None:
    batching, first = make(runs), []
    classifier.encoder.open.clear()
    for number in range(runs):
        first.append(batching.submit(picture(number)))
        assert classifier.encoder.began.get(timeout=PATIENCE_S) == [number]
    rest = [batching.submit(picture(number)) for number in range(runs, runs + 6)]
    classifier.encoder.open.set()
    assert labels([*first, *rest]) == list(range(runs + 6))
    assert [len(batch) for batch in sorted(classifier.encoder.batches)[runs:]] == shares


def test_each_query_gets_and_pays_for_what_it_asks(make, classifier: FakeClassifier) -> None:
    batching = make()
    with classifier.held(batching):
        futures = [batching.submit(picture(i), top=t, nearest=n) for i, (t, n) in enumerate([(5, 0), (2, 3), (5, 0)])]
    got = [(made.label, len(made.top), len(made.nearest)) for made in (one.result(PATIENCE_S) for one in futures)]
    assert got == [("0", 5, 0), ("1", 2, 3), ("2", 5, 0)] and classifier.asked[1:] == [([0, 2], 5, 0), ([1], 2, 3)]


def test_each_image_is_of_the_fit_of_its_submission(make, classifier: FakeClassifier, monkeypatch) -> None:
    """Of which it reads one, though another comes right after each reading."""
    batching, before, after = make(max_batch=8), classifier.encoder, FakeEncoder()
    as_stored = SimpleNamespace(exif_orientation=False, margin=0.0)
    fit = SimpleNamespace(head=classifier.snapshot(), encoder=before, settings=as_stored)
    halves = Image.fromarray(np.repeat([5, 6], SIZE * SIZE * 3 // 2).astype(np.uint8).reshape(SIZE, SIZE, 3))

    def read_once() -> Any:
        classifier.encoder = after
        monkeypatch.undo()
        return fit

    with classifier.held(batching):
        old = batching.submit_many([picture(1), picture(2)])
        monkeypatch.setattr(classifier, "_fitted", read_once)
        old.append(batching.submit(turned(halves, 3, "PNG")))
        new = batching.submit(picture(3))
        before.open.set()
        assert labels([*old, new]) == [1, 2, 6, 3], "the last old one as it is stored, turned"
    assert sorted(before.batches[1:]) == [[1], [2], [6]] and after.batches[-1] == [3]


@pytest.mark.slow
def test_changes_compute_what_promises_rest_on_once_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("open_clip", reason="it comes with the cpu extra")
    classifier, images = Classifier.load(demo_bundle(12, 3)), held_out_queries(12, 3)[0]
    fits = list[str]()

    def counted(name: str) -> None:
        compute = getattr(head, name)
        monkeypatch.setattr(head, name, lambda *given: fits.append(f"{name} {classifier.version}") or compute(*given))

    counted("fit_unknown")
    counted("out_of_fold")
    classifier.rename_class("~0", "plain", keep_text=True)
    assert not fits, "nobody serves it"
    with BatchingClassifier(classifier) as batching:
        classifier.add_class("new", images[:2])
        assert fits == ["out_of_fold 2"], "before it is published; nobody has asked for unknown pictures"

        def ask() -> int:
            batching.submit(images[5], keep=0.7, max_error=0.4).result(PATIENCE_S)
            return len(fits)

        assert ask() == 2 and fits[1:] == ["fit_unknown 3"]
        classifier.remove_class("~0")
        assert sorted(fits[2:]) == ["fit_unknown 3", "out_of_fold 3"] and ask() == 4
        classifier.rename_class("~1", "another", keep_text=True)
        assert ask() == 4, "a name alone changes no promise"


# --- deadlines, cancelling, refusals ---


def test_an_image_that_is_late_is_not_encoded(make, classifier: FakeClassifier, watcher: Watcher, monkeypatch) -> None:
    clock = SimpleNamespace(now=1000.0, monotonic=lambda: clock.now)
    for module in (item, queue, batching_classifier, workers):
        monkeypatch.setattr(module, "time", clock)
    batching = make(max_batch=2, decode_threads=1)
    with classifier.held(batching):
        late = [batching.submit(picture(i), deadline_s=1.0) for i in (1, 2)]
        slow, never = Gated(3), Gated(6)
        in_time = [batching.submit(picture(4), deadline_s=5.0), batching.submit(slow)]
        late.append(batching.submit(never, deadline_s=1.0))  # waits for the only decoder
        assert slow.begun.wait(PATIENCE_S)
        clock.now += 2.0
        slow.gate.set()
    for future in late:
        with pytest.raises(DeadlineExceededError, match="deadline of 1 s passed 1 s before"):
            future.result(PATIENCE_S)
    assert labels(in_time) == [4, 3] and sorted(sum(classifier.encoder.batches, [])) == [0, 3, 4]  # noqa: RUF017
    assert [outcome for outcome, _ in watcher.done].count("deadline") == 3 and not never.begun.is_set()


def test_a_cancelled_image_frees_its_place(make, classifier: FakeClassifier, watcher: Watcher) -> None:
    batching = make(max_queue=4, decode_threads=1, max_wait_ms=1.0)
    with classifier.held(batching) as running:
        slow, never = Gated(1), Gated(2)
        cancelled = [batching.submit(image) for image in (picture(3), slow, never)]  # ready, in a decoder, waiting
        assert slow.begun.wait(PATIENCE_S) and batching.pending == 4
        assert all(one.cancel() for one in cancelled) and batching.pending == 1
        assert not running.cancel(), "it is in a batch"
        assert len(wait(cancelled, timeout=PATIENCE_S).done) == 3 and watcher.done == [("cancelled", None)] * 3
        others = [batching.submit(picture(i)) for i in (5, 6, 7)]
        slow.gate.set()
    assert labels([running, *others]) == [0, 5, 6, 7] and labels([batching.submit(picture(8, 9))]) == [8]
    assert not never.begun.is_set() and all(3 not in numbers for numbers in classifier.encoder.batches)
    with pytest.raises(CancelledError):
        cancelled[0].result()


@pytest.mark.parametrize(
    ("options", "query", "message"),
    [
        ({"max_batch": 0}, {}, "max_batch of at least 1"),
        ({"max_queue": 1.5}, {}, "max_queue to be a whole number"),
        ({"decode_threads": 0}, {}, "decode_threads of at least 1"),
        ({"max_wait_ms": float("nan")}, {}, "max_wait_ms of at least 0"),
        ({}, {"top": 0}, "top of at least 1, got 0"),
        ({}, {"nearest": -1}, "nearest of at least 0, got -1"),
        ({}, {"deadline_s": 0}, "expected deadline_s > 0 or None, got 0"),
        ({"max_queue": 1}, {}, r"at most 1 images at once \(max_queue\), got 2"),
    ],
)
def test_invalid_settings_and_queries_are_refused(make, options: Any, query: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options).submit_many([picture(0)] * 2, **query)


def test_asyncio(batching, classifier: FakeClassifier) -> None:
    async def main() -> None:
        mixed = await batching.classify_many([picture(1), b"no image", picture(2, 9)], nearest=1)
        assert [getattr(made, "label", "bad") for made in mixed] == ["1", "bad", "2"] and len(mixed[0].nearest) == 1
        with pytest.raises(ValueError, match="can't read image number 0"):
            await batching.classify(b"no image")
        classifier.encoder.open.clear()
        running = asyncio.create_task(batching.classify(picture(50)))
        await asyncio.to_thread(wait_until, lambda: [50] in classifier.encoder.batches)
        several = asyncio.create_task(batching.classify_many([picture(52), picture(53)]))
        kept = asyncio.create_task(batching.classify(picture(54)))
        await asyncio.to_thread(wait_until, lambda: batching.pending == 4)
        for task in (running, several):
            task.cancel()
        gone = await asyncio.gather(running, several, return_exceptions=True)
        assert [type(error) for error in gone] == [asyncio.CancelledError] * 2
        assert batching.pending == 2, "only the one in a batch keeps its place"
        classifier.encoder.open.set()
        assert (await kept).label == "54" and classifier.encoder.batches[-2:] == [[50], [54]]

    asyncio.run(main())


# --- the end ---


def test_all_that_many_threads_submit_before_a_close_is_answered(classifier: FakeClassifier) -> None:
    before, accepted = threads(), list[tuple[int, Future[Any]]]()
    batching = BatchingClassifier(classifier, max_batch=8, max_wait_ms=0.1, max_queue=32, decode_threads=3)

    def submits(which: int) -> None:
        rng = np.random.default_rng(which)
        while not batching.closed:
            numbers = rng.integers(1, 256, int(rng.integers(1, 4))).tolist()
            images = [picture(number, int(rng.choice([4, 5, 6]))) for number in numbers]
            try:
                futures = batching.submit_many(images, client=str(which % 3 or ""))
            except (QueueFullError, ClosedError):
                time.sleep(0.001)
                continue
            accepted.extend(zip(numbers, futures, strict=True))
            if rng.random() < 0.2:
                futures[0].cancel()

    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(submits, which) for which in range(8)]
        wait_until(lambda: len(accepted) > 700)
        batching.close(PATIENCE_S)
    assert all(one.result() is None for one in running) and batching.pending == 0 and threads() <= before
    assert all(future.cancelled() or future.result(0).label == str(number) for number, future in accepted)


def test_close_answers_all_that_was_accepted(batching, classifier: FakeClassifier) -> None:
    """In a callback, too, it does not wait for itself."""
    slow, closed_inside = Gated(9), threading.Event()

    def close(_: Future[Any]) -> None:
        batching.close()
        closed_inside.set()

    with classifier.held(batching) as first:
        first.add_done_callback(close)
        futures = [first, *batching.submit_many([picture(i, 4 + i % 2) for i in range(1, 9)]), batching.submit(slow)]
        closing = threading.Thread(target=batching.close)
        closing.start()
        wait_until(lambda: batching.closed)
        with pytest.raises(ClosedError, match="closed and accepts no more images"):
            batching.submit(picture(1))
        assert closing.is_alive()
    assert closed_inside.wait(PATIENCE_S)
    slow.gate.set()
    closing.join(PATIENCE_S)
    assert not closing.is_alive() and all(future.done() for future in futures)
    assert labels(futures) == list(range(10))


def test_close_with_a_timeout_answers_the_rest_by_errors(classifier: FakeClassifier, watcher: Watcher, caplog) -> None:
    slow, before = Gated(2), threads()
    batching = BatchingClassifier(classifier, max_batch=1, observer=watcher)
    with classifier.held(batching) as first:
        futures = [first, batching.submit(picture(1)), batching.submit(slow)]
        batching.close(timeout=0.01)
        for future in futures:
            with pytest.raises(ClosedError, match="closed before the image could be classified"):
                future.result(0)
        assert batching.pending == 0 and "with 3 images unanswered" in caplog.text
    slow.gate.set()
    wait_until(lambda: threads() <= before)
    assert "could not be run" not in caplog.text
    assert classifier.encoder.batches == [[0]] and watcher.done.count(("closed", None)) == 3


def test_futures_keep_neither_images_nor_classifiers_alive() -> None:
    classifier = FakeClassifier()
    batching = BatchingClassifier(classifier, decode_threads=1)
    images: list[Any] = [picture(i, 4 + i % 2) for i in range(1, 6)]
    images[2] = images[2][None]
    watched, slow = [weakref.ref(image) for image in images], Gated(6)
    with classifier.held(batching):
        futures = batching.submit_many([*images[:4], slow, images[4]])
        images.clear()
        assert slow.begun.wait(PATIENCE_S) and futures[3].cancel() and futures.pop().cancel()
        slow.gate.set()
    assert labels(futures[:2]) == [1, 2] and isinstance(futures[2].exception(PATIENCE_S), ValueError)
    assert labels(futures[-1:]) == [6] and batching.pending == 0
    wait_until(lambda: all(ref() is None for ref in watched))
    futures.pop(2)  # the traceback of its error has a frame that holds the queue
    batching.close()
    made = [weakref.ref(classifier), weakref.ref(batching), weakref.ref(batching._queue)]
    del classifier, batching
    gc.collect()
    assert [ref() for ref in made] == [None] * 3 and labels(futures[:2]) == [1, 2]


def test_a_collected_batcher_answers_and_ends_its_threads(classifier: FakeClassifier) -> None:
    before = threads()
    batching = BatchingClassifier(classifier)
    classifier.encoder.open.clear()
    futures = batching.submit_many([picture(1), picture(2, 9), picture(3)])
    itself = weakref.ref(batching)
    del batching
    gc.collect()
    assert itself() is None
    classifier.encoder.open.set()
    assert labels(futures) == [1, 2, 3]
    wait_until(lambda: threads() <= before)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["works", "hangs"])
def test_an_interpreter_that_ends_without_close_does_not_hang(engine: str) -> None:
    program = f"""
from iosr_fast.serving.batching import workers as batch_workers
from iosr_fast.serving.batching import BatchingClassifier, engine
from tests.serving.batching_fakes import FakeClassifier, answer, picture
engine.predict = answer
classifier = FakeClassifier()
batching = BatchingClassifier(classifier)
if {engine == "hangs"}:
    batch_workers._AT_EXIT_S = 0.1
    classifier.encoder.open.clear()
for future in batching.submit_many([picture(i, 4 + i % 2) for i in range(20)]):
    future.add_done_callback(lambda future: print(type(future.exception()).__name__, flush=True))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["NoneType" if engine == "works" else "ClosedError"] * 20


def test_submitting_in_a_forked_process_is_an_error(batching, monkeypatch: pytest.MonkeyPatch) -> None:
    here = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: here + 1)
    with pytest.raises(RuntimeError, match="created before a fork"):
        batching.submit(picture(1))
    monkeypatch.undo()
    assert labels([batching.submit(picture(1))]) == [1]
