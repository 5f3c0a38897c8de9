"""BatchingClassifier from start to end: closing, references, threads, the end of the interpreter."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from concurrent.futures import Future
from typing import Any

import pytest

from iosr_fast.exceptions import ClosedError
from iosr_fast.serving.batching import BatchingClassifier
from tests import ROOT
from tests.serving.batching_fakes import (
    PATIENCE_S,
    FakeClassifier,
    Gated,
    Kept,
    Watcher,
    labels,
    picture,
    threads,
    until,
)

pytestmark = pytest.mark.slow


def test_close_answers_everything_accepted(batching, classifier: FakeClassifier) -> None:
    slow = Gated(9)
    with classifier.held(batching) as first:
        futures = [first, *batching.submit_many([picture(i, 4 + i % 2) for i in range(1, 9)]), batching.submit(slow)]
        closing = threading.Thread(target=batching.close)
        closing.start()
        until(lambda: batching.closed)
        with pytest.raises(ClosedError, match="closed and accepts no more images"):
            batching.submit(picture(1))
        assert closing.is_alive()
    slow.gate.set()
    closing.join(PATIENCE_S)
    assert not closing.is_alive() and all(future.done() for future in futures)
    assert labels(futures) == list(range(10))
    batching.close()
    batching.close(timeout=0)


def test_close_with_a_timeout_answers_the_rest_with_an_error(classifier: FakeClassifier, caplog) -> None:
    watcher, slow, before = Watcher(), Gated(2), threads()
    batching = BatchingClassifier(classifier, max_batch=1, observer=watcher)
    with classifier.held(batching) as first:
        futures = [first, batching.submit(picture(1)), batching.submit(slow)]
        batching.close(timeout=0.01)
        for future in futures:
            with pytest.raises(ClosedError, match="closed before the image could be classified"):
                future.result(0)
        assert batching.pending == 0 and "with 3 images unanswered" in caplog.text
    slow.gate.set()
    batching.close(PATIENCE_S)
    until(lambda: threads() <= before)
    assert "could not be run" not in caplog.text
    assert classifier.encoder.batches == [[0]] and watcher.done.count(("closed", None)) == 3


def test_close_in_a_callback_does_not_wait_for_itself(batching, classifier: FakeClassifier) -> None:
    closed = threading.Event()

    def close(_: Future[Any]) -> None:
        batching.close()
        closed.set()

    with classifier.held(batching) as first:
        first.add_done_callback(close)
        rest = batching.submit_many([picture(i, 4 + i % 2) for i in range(1, 9)])
    assert closed.wait(PATIENCE_S) and labels([first, *rest]) == list(range(9))
    with pytest.raises(ClosedError):
        batching.submit(picture(1))


def test_futures_keep_neither_images_nor_classifiers_alive() -> None:
    classifier = FakeClassifier()
    batching = BatchingClassifier(classifier, decode_threads=1)
    images: list[Any] = [picture(i, 4 + i % 2).view(Kept) for i in range(1, 6)]
    images[2] = images[2][None]
    watched, slow = [weakref.ref(image) for image in images], Gated(6)
    with classifier.held(batching):
        futures = batching.submit_many([*images[:4], slow, images[4]])
        images.clear()
        assert slow.begun.wait(PATIENCE_S) and futures[3].cancel() and futures.pop().cancel()
        slow.gate.set()
    assert labels(futures[:2]) == [1, 2] and isinstance(futures[2].exception(PATIENCE_S), ValueError)
    assert labels(futures[-1:]) == [6] and batching.pending == 0
    until(lambda: all(ref() is None for ref in watched))
    futures.pop(2)  # the traceback of its error has a frame that holds the queue
    batching.close()
    made = [weakref.ref(classifier), weakref.ref(batching), weakref.ref(batching._queue)]
    del classifier, batching
    gc.collect()
    assert [ref() for ref in made] == [None] * 3, "futures that are kept keep nothing else"
    assert labels(futures[:2]) == [1, 2]


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
    until(lambda: threads() <= before)


@pytest.mark.parametrize("engine", ["works", "hangs"])
def test_an_interpreter_that_ends_without_close_does_not_hang(engine: str) -> None:
    program = f"""
import threading
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
