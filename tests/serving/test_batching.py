"""BatchingClassifier: when a batch leaves and with whom, who is refused, deadlines, cancelling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from iosr_fast.exceptions import DeadlineExceededError, QueueFullError
from iosr_fast.serving.batching import BatchingClassifier
from iosr_fast.serving.batching import front as batching
from iosr_fast.serving.batching import item as batch_item
from iosr_fast.serving.batching import queue as batch_queue
from tests.pictures import encode
from tests.serving.batching_fakes import PATIENCE_S, FakeClassifier, Gated, Watcher, labels, picture, until

NEVER_MS = 3_600_000.0  # a wait that no test sits out


@pytest.fixture
def make(classifier: FakeClassifier) -> Iterator[Callable[..., BatchingClassifier]]:
    made: list[BatchingClassifier] = []

    def build(**options: Any) -> BatchingClassifier:
        made.append(BatchingClassifier(classifier, **{"decode_threads": 2, **options}))
        return made[-1]

    yield build
    classifier.encoder.open.set()
    for one in made:
        one.close(PATIENCE_S)
        assert one.pending == 0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Time that passes when a test says so."""
    fake = SimpleNamespace(now=1000.0, monotonic=lambda: fake.now)
    for module in (batch_item, batch_queue, batching):
        monkeypatch.setattr(module, "time", fake)
    return fake


def test_every_form_of_image(make, tmp_path: Path) -> None:
    encoded = encode(picture(7, 9))
    path = tmp_path / "seven.png"
    path.write_bytes(encoded)
    forms = [picture(7), picture(7, 9), picture(7, 9)[..., 0], Image.fromarray(picture(7, 6)), path, str(path)]
    forms += [encoded, bytearray(encoded), memoryview(encoded)]
    assert labels(make().submit_many(forms)) == [7] * len(forms)


def test_batches_fill_up_while_the_engine_is_busy(make, classifier: FakeClassifier) -> None:
    batching = make(max_batch=4)
    with classifier.held(batching) as first:
        rest = [batching.submit(picture(i)) for i in range(1, 10)]
        assert batching.pending == 10
    assert labels([first, *rest]) == list(range(10))
    assert classifier.encoder.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9]]


@pytest.mark.parametrize("size", [4, 5], ids=["pixels", "decoded"])
def test_one_that_is_alone_leaves_at_once(make, classifier: FakeClassifier, size: int) -> None:
    batching = make(max_wait_ms=NEVER_MS)
    for i in range(3):
        assert labels([batching.submit(picture(i, size))]) == [i]
    assert classifier.encoder.batches == [[0], [1], [2]]


def test_a_batch_waits_for_those_that_are_being_decoded(make, classifier: FakeClassifier) -> None:
    batching, slow = make(max_wait_ms=NEVER_MS), Gated(2)
    futures = batching.submit_many([picture(1), slow])
    assert slow.begun.wait(PATIENCE_S)
    futures.append(batching.submit(picture(3)))
    slow.gate.set()
    assert labels(futures) == [1, 2, 3] and classifier.encoder.batches == [[1, 3, 2]]


def test_but_not_longer_than_max_wait_ms(make, classifier: FakeClassifier) -> None:
    batching, slow = make(max_wait_ms=1.0), Gated(2)
    futures = batching.submit_many([slow, picture(1), picture(3)])
    assert labels(futures[1:]) == [1, 3] and not futures[0].done()
    slow.gate.set()
    assert labels(futures) == [2, 1, 3] and classifier.encoder.batches == [[1, 3], [2]]


def test_and_not_when_it_is_full(make, classifier: FakeClassifier) -> None:
    batching, slow = make(max_wait_ms=NEVER_MS, max_batch=2), Gated(9)
    last = batching.submit(slow)
    assert labels(batching.submit_many([picture(1), picture(2)])) == [1, 2]
    slow.gate.set()
    assert labels([last]) == [9] and classifier.encoder.batches == [[1, 2], [9]]


def test_and_not_when_the_last_one_is_cancelled_or_bad(make, classifier: FakeClassifier) -> None:
    batching = make(max_wait_ms=NEVER_MS)
    cancelled, bad = Gated(2), Gated(3)
    bad.pixels = bad.pixels[None]
    futures = batching.submit_many([picture(1), cancelled, bad])
    assert cancelled.begun.wait(PATIENCE_S) and bad.begun.wait(PATIENCE_S)
    assert futures[1].cancel() and not futures[0].done()
    bad.gate.set()
    assert labels(futures[:1]) == [1]
    with pytest.raises(ValueError, match=r"can't read image number 2: expected shape .* got \(1, 5, 5, 3\)"):
        futures[2].result(PATIENCE_S)
    cancelled.gate.set()


def test_answers_do_not_depend_on_the_order_of_decoding(make, classifier: FakeClassifier) -> None:
    batching = make(max_wait_ms=NEVER_MS, decode_threads=4)
    slow = [Gated(i) for i in range(4)]
    futures = batching.submit_many(slow)
    for i in (2, 0, 3, 1):
        assert slow[i].begun.wait(PATIENCE_S)
        slow[i].gate.set()
        until(lambda i=i: futures[i].done() or batching._queue._decoding == 3 - (2, 0, 3, 1).index(i))
    assert labels(futures) == [0, 1, 2, 3] and classifier.encoder.batches == [[2, 0, 3, 1]]


def test_each_gets_as_much_as_it_asked_for(make, classifier: FakeClassifier) -> None:
    batching = make(max_batch=8)
    with classifier.held(batching):
        wanted = [(5, 0), (1, 0), (9, 0), (2, 3), (3, 1), (700, 0)]
        futures = [batching.submit(picture(i), top=t, nearest=n) for i, (t, n) in enumerate(wanted)]
    got = [future.result(PATIENCE_S) for future in futures]
    assert [int(made.label) for made in got] == list(range(6))
    assert [(len(made.top), len(made.nearest)) for made in got] == wanted
    assert all(made.top[0].label == made.label for made in got)
    assert len({made.version for made in got}) == 1
    assert len(classifier.encoder.batches) == 2
    # Nobody but those who ask pays for neighbours, nor for one who asks for very many classes.
    assert classifier.asked[1:] == [([0, 1, 2], 9, 0), ([3, 4], 3, 3), ([5], 700, 0)]


def test_a_snapshot_is_taken_once_a_batch(make, classifier: FakeClassifier) -> None:
    batching = make(max_batch=4)
    before = classifier.version
    with classifier.held(batching) as first:
        rest = batching.submit_many([picture(i) for i in range(8)])
    versions = [future.result(PATIENCE_S).version - before for future in [first, *rest]]
    assert versions == [1, 2, 2, 2, 2, 3, 3, 3, 3]


def test_a_full_queue_refuses_at_once_and_recovers(make, classifier: FakeClassifier) -> None:
    watcher = Watcher()
    batching = make(max_queue=4, observer=watcher)
    with classifier.held(batching):
        kept = batching.submit_many([picture(1), picture(2)])
        with pytest.raises(QueueFullError, match="3 images wait, 2 more came, max_queue is 4") as refused:
            batching.submit_many([picture(3), picture(4)])
        assert refused.value.retry_after_s > 0 and batching.pending == 3
        kept.append(batching.submit(picture(3)))
        with pytest.raises(QueueFullError):
            batching.submit(picture(4))
    assert labels(kept) == [1, 2, 3] and watcher.refused == ["full"] * 3
    until(lambda: batching.pending == 0)
    for i in range(10):  # a place is free before an answer is out
        assert labels(batching.submit_many([picture(i)] * 4)) == [i] * 4
    with pytest.raises(ValueError, match=r"at most 4 images at once \(max_queue\), got 5"):
        batching.submit_many([picture(0)] * 5)
    assert batching.submit_many([]) == []


def test_a_deadline_that_can_not_be_kept_is_refused(make, classifier: FakeClassifier, clock) -> None:
    watcher = Watcher()
    batching = make(max_batch=1, observer=watcher)

    def takes(seconds: float) -> None:
        classifier.encoder.raises = lambda numbers: setattr(clock, "now", clock.now + seconds)

    takes(8.0)
    assert labels([batching.submit(picture(0), deadline_s=1.0)]) == [0]  # nothing was measured yet
    with classifier.held(batching):
        with pytest.raises(QueueFullError, match="within 1 s, but it would take about 24 s with 1 images") as refused:
            batching.submit(picture(1), deadline_s=1.0)
        assert refused.value.retry_after_s == pytest.approx(23.0) and watcher.refused == ["deadline"]
        kept = batching.submit(picture(1), deadline_s=24.5)
        with pytest.raises(QueueFullError):
            batching.submit_many([picture(2)] * 2, deadline_s=35.5)
        takes(0.1)
    assert labels([kept]) == [1]
    until(lambda: batching.pending == 0)
    # The estimate is far above any of these deadlines still, and yet an empty house takes them, and learns.
    for i in range(30):
        assert labels([batching.submit(picture(i), deadline_s=0.5)]) == [i]
        until(lambda: batching.pending == 0)
    with classifier.held(batching):
        kept = batching.submit(picture(1), deadline_s=0.4)
    assert labels([kept]) == [1]


def test_what_is_late_when_its_batch_is_formed_is_not_encoded(make, classifier: FakeClassifier, clock) -> None:
    watcher = Watcher()
    batching = make(max_batch=2, decode_threads=1, observer=watcher)
    with classifier.held(batching):
        late = [batching.submit(picture(i), deadline_s=1.0) for i in (1, 2)]
        slow = Gated(3)
        in_time = [batching.submit(picture(4), deadline_s=5.0), batching.submit(slow), batching.submit(picture(5))]
        behind = batching.submit(picture(6, 9), deadline_s=1.0)  # waits for the only decoder
        assert slow.begun.wait(PATIENCE_S)
        clock.now += 2.0
        slow.gate.set()
        with pytest.raises(DeadlineExceededError, match="deadline of 1 s passed 1 s before"):
            behind.result(PATIENCE_S)
    for future in late:
        with pytest.raises(DeadlineExceededError):
            future.result(PATIENCE_S)
    assert labels(in_time) == [4, 3, 5]
    assert classifier.encoder.batches == [[0], [4, 5], [3]]
    assert [outcome for outcome, _ in watcher.done].count("deadline") == 3 and issubclass(
        DeadlineExceededError, TimeoutError
    )


def test_cancelled_before_its_batch_it_costs_nothing(make, classifier: FakeClassifier) -> None:
    watcher = Watcher()
    batching = make(max_queue=4, decode_threads=1, observer=watcher)
    with classifier.held(batching):
        slow, never = Gated(1), Gated(2)
        ready, decoding, waiting = batching.submit(picture(3)), batching.submit(slow), batching.submit(never)
        assert slow.begun.wait(PATIENCE_S) and batching.pending == 4
        assert ready.cancel() and decoding.cancel() and waiting.cancel() and batching.pending == 1
        done, left = wait([ready, decoding, waiting], timeout=PATIENCE_S)
        assert len(done) == 3 and not left and watcher.done == [("cancelled", None)] * 3
        others = [batching.submit(picture(i)) for i in (5, 6, 7)]
        slow.gate.set()
    assert labels(others) == [5, 6, 7]
    assert labels([batching.submit(picture(8, 9))]) == [8]  # so the decoder has gone past what was cancelled
    assert not never.begun.is_set() and all(3 not in numbers for numbers in classifier.encoder.batches)
    with pytest.raises(CancelledError):
        ready.result()


def test_in_a_batch_it_can_not_be_cancelled_any_more(make, classifier: FakeClassifier) -> None:
    batching = make()
    with classifier.held(batching, 9) as future:
        assert future.running() and not future.cancel()
    assert labels([future]) == [9] and not future.cancel()


def test_the_observer_sees_what_happens(make, classifier: FakeClassifier) -> None:
    watcher = Watcher()
    batching = make(max_batch=2, observer=watcher)
    with classifier.held(batching):
        futures = batching.submit_many([picture(1), picture(2), picture(3)])
    assert labels(futures) == [1, 2, 3]
    assert watcher.batches == [(1, 0), (2, 1), (1, 0)]
    assert watcher.done == [("ok", "0"), ("ok", "1"), ("ok", "2"), ("ok", "3")]


def test_settings_and_questions_that_can_not_be(make, classifier: FakeClassifier) -> None:
    for options in ({"max_batch": 0}, {"max_queue": 0}, {"decode_threads": 0}, {"max_batch": 1.5}):
        with pytest.raises(ValueError, match=f"expected {next(iter(options))} (of at least 1|to be a whole number)"):
            make(**options)
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="expected max_wait_ms of at least 0"):
            make(max_wait_ms=wrong)
    batching = make()
    for said, asked in {
        "top of at least 1, got 0": {"top": 0},
        "nearest of at least 0, got -1": {"nearest": -1},
        "expected deadline_s > 0 or None, got 0": {"deadline_s": 0},
        "got nan": {"deadline_s": float("nan")},
    }.items():
        with pytest.raises(ValueError, match=said):
            batching.submit(picture(0), **asked)
    with pytest.raises(ValueError, match=r"expected top to be a whole number, got 1\.5"):
        batching.submit(picture(0), top=1.5)
    assert batching.pending == 0 and classifier.encoder.batches == []
