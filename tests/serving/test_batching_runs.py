"""BatchingClassifier on an encoder with several runs: shares, order, errors, replacement, warm-up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.serving.batching import BatchingClassifier
from iosr_fast.serving.batching import engine as batch_engine
from iosr_fast.serving.http.settings import Settings
from tests.serving.batching_fakes import PATIENCE_S, FakeClassifier, FakeEncoder, Gated, labels, picture, threads

NEVER_MS = 3_600_000.0


@pytest.fixture
def classifier() -> FakeClassifier:
    return several_runs(2)


def several_runs(runs: int) -> FakeClassifier:
    classifier = FakeClassifier()
    classifier.encoder.runs = runs
    return classifier


@pytest.fixture
def make(classifier: FakeClassifier) -> Iterator[Callable[..., BatchingClassifier]]:
    before, opened = threads(), []

    def build(**options: Any) -> BatchingClassifier:
        opened.append(BatchingClassifier(classifier, **{"decode_threads": 2, "max_wait_ms": NEVER_MS, **options}))
        return opened[-1]

    yield build
    classifier.encoder.open.set()
    for batching in opened:
        batching.close(PATIENCE_S)
        assert batching.pending == 0
    assert threads() <= before


def occupy(batching: BatchingClassifier, classifier: FakeClassifier, count: int) -> list[Any]:
    """One picture, 0 to count - 1, in each of `count` runs, held there."""
    classifier.encoder.open.clear()
    futures = []
    for number in range(count):
        futures.append(batching.submit(picture(number)))
        assert classifier.encoder.began.get(timeout=PATIENCE_S) == [number]
    return futures


@pytest.mark.parametrize(("runs", "shares"), [(2, [3, 2, 1]), (3, [2, 2, 1, 1]), (8, [1] * 6)])
def test_each_run_takes_its_share(runs: int, shares: list[int]) -> None:
    classifier = several_runs(runs)
    with BatchingClassifier(classifier, decode_threads=1) as batching:
        first = occupy(batching, classifier, runs)
        rest = [batching.submit(picture(number)) for number in range(runs, runs + 6)]
        classifier.encoder.open.set()
        assert labels([*first, *rest]) == list(range(runs + 6))
    batches = sorted(classifier.encoder.batches)[runs:]
    assert [len(batch) for batch in batches] == shares
    assert [number for batch in batches for number in batch] == list(range(runs, runs + 6))


def test_a_share_is_at_most_max_batch(make, classifier: FakeClassifier) -> None:
    batching = make(max_batch=2)
    first = occupy(batching, classifier, 2)
    rest = [batching.submit(picture(number)) for number in range(2, 12)]
    classifier.encoder.open.set()
    assert labels([*first, *rest]) == list(range(12))
    assert max(map(len, classifier.encoder.batches)) == 2


def test_a_free_run_does_not_wait_for_decoders(make, classifier: FakeClassifier) -> None:
    batching, slow = make(), Gated(2)
    futures = batching.submit_many([slow, picture(1), picture(3)])
    assert labels(futures[1:]) == [1, 3] and not futures[0].done()
    slow.gate.set()
    assert labels(futures) == [2, 1, 3]


def test_an_error_in_one_run_is_not_that_of_another(make, classifier: FakeClassifier, monkeypatch) -> None:
    batching = make()
    held = occupy(batching, classifier, 1)
    run, failed = batching._engine.run, threading.Event()

    def fails_once(*given: Any) -> Any:
        if not failed.is_set():
            failed.set()
            raise RuntimeError("unexpected")
        return run(*given)

    monkeypatch.setattr(batching._engine, "run", fails_once)
    with pytest.raises(RuntimeError, match="unexpected"):
        batching.submit(picture(1)).result(PATIENCE_S)
    assert batching.pending == 1 and not held[0].done()
    classifier.encoder.open.set()
    assert labels([*held, batching.submit(picture(2))]) == [0, 2]


class OneAtATime(FakeEncoder):
    """Fails if two threads execute it at once."""

    def __init__(self) -> None:
        super().__init__()
        self.busy = threading.Lock()

    def encode(self, pixels: np.ndarray) -> Embeddings:
        assert self.busy.acquire(blocking=False), "two threads at once"
        try:
            return super().encode(pixels)
        finally:
            self.busy.release()


def test_a_classifier_with_one_run_replaces_one_with_several(make) -> None:
    batching, other = make(max_batch=4), FakeClassifier()
    other.encoder = OneAtATime()
    batching.replace(other)
    numbers = [number % 200 for number in range(256)]
    assert labels(batching.submit_many([picture(number) for number in numbers])) == numbers
    assert sum(map(len, other.encoder.batches)) == 256 and batching.healthy


def test_close_answers_what_every_run_has(make, classifier: FakeClassifier) -> None:
    batching = make()
    futures = [*occupy(batching, classifier, 2), batching.submit(picture(2))]
    closing = threading.Thread(target=batching.close)
    closing.start()
    classifier.encoder.open.set()
    closing.join(PATIENCE_S)
    assert not closing.is_alive() and labels(futures) == [0, 1, 2]


@pytest.mark.parametrize(
    ("max_batch", "buckets", "sizes"),
    [(8, None, {1, 2, 3, 4, 8}), (2, None, {1, 2}), (8, (1, 2, 4, 8), {1, 2, 4, 8}), (1, None, {1})],
)
def test_every_run_is_warmed_at_usual_sizes(max_batch: int, buckets: Any, sizes: set[int]) -> None:
    encoder, together = FakeEncoder(), threading.Barrier(3)
    encoder.runs, encoder.buckets, warmed = 3, buckets, []

    def warm(given: list[int]) -> None:
        together.wait(PATIENCE_S)  # in all runs at the same time
        warmed.extend(given)

    encoder.warm = warm  # type: ignore[assignment,method-assign]
    batch_engine.warm_encoder(encoder, max_batch)
    assert set(warmed) == sizes and len(warmed) == 3 * len(sizes)


def test_the_server_shares_all_cores_between_runs() -> None:
    layouts = {cores: Settings(engine_threads=cores).engine_layout for cores in (1, 2, 3, 4, 8, 16, 64)}
    assert layouts == {1: (1, 1), 2: (2, 1), 3: (2, 1), 4: (2, 2), 8: (3, 2), 16: (4, 4), 64: (8, 8)}
    runs, each = Settings().engine_layout
    assert runs >= 1 and each >= 1
