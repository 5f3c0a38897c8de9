"""A server that tests share, and a batching classifier of a fake encoder for each test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from iosr_fast.serving.batching import BatchingClassifier, engine
from tests.serving.batching_fakes import FakeClassifier, Watcher, answer, threads


@pytest.fixture(scope="module")
def shared() -> Iterator[Any]:
    """A client of a served classifier, for tests that change nothing."""
    from tests.serving.http_client import serving

    with serving() as client:
        yield client


@pytest.fixture(autouse=True)
def _fake_heads_answer() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "predict", answer)
        yield


@pytest.fixture(autouse=True)
def _metrics_are_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iosr_fast.serving.limits.Deadlines.scrape_s", 0.0)


@pytest.fixture
def classifier() -> FakeClassifier:
    return FakeClassifier()


@pytest.fixture
def watcher() -> Watcher:
    return Watcher()


@pytest.fixture
def batching(classifier: FakeClassifier, watcher: Watcher) -> Iterator[BatchingClassifier]:
    """With small batches; it leaves nothing behind."""
    before = threads()
    with BatchingClassifier(classifier, max_batch=8, max_queue=64, decode_threads=2, observer=watcher) as made:
        yield made
        classifier.encoder.open.set()
    assert made.pending == 0 and made.closed and threads() <= before
