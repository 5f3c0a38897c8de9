"""BatchingClassifier when images, engine or observer fail: which images get the error, and which do not."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iosr_fast.exceptions import BadImageError
from iosr_fast.images import preprocess
from iosr_fast.images.crop import Box, Crop
from iosr_fast.serving.batching import BatchingClassifier, DecodeLimits
from iosr_fast.serving.limits import Deadlines
from tests.pictures import encode
from tests.serving.batching_fakes import PATIENCE_S, FakeClassifier, Watcher, picture

BLACK = 0  # a failed engine is tried with a black picture
FIRST = 200


class EngineError(Exception):
    pass


def together(batching: BatchingClassifier, classifier: FakeClassifier, numbers: list[int]) -> list[Any]:
    """Futures of pictures that come in one batch, behind another one on which nothing is raised."""
    raises = classifier.encoder.raises
    classifier.encoder.raises = lambda given: None if given == [FIRST] else raises(given)
    with classifier.held(batching, FIRST):
        return batching.submit_many([picture(number) for number in numbers])


def outcomes(futures: list[Any]) -> list[int | str]:
    """Labels, and names of errors."""
    got = [(future.exception(PATIENCE_S), future) for future in futures]
    return [int(future.result().label) if error is None else type(error).__name__ for error, future in got]


def raising(error: Callable[[], BaseException], when: Callable[[list[int]], bool]) -> Callable[[list[int]], None]:
    def raises(numbers: list[int]) -> None:
        if when(numbers):
            raise error()

    return raises


def test_a_bad_image_fails_alone(batching, classifier: FakeClassifier, watcher: Watcher, monkeypatch) -> None:
    def opened(source: Any, *given: Any, **options: Any) -> Any:
        data = source if isinstance(source, bytes) else b""
        if data == b"memory":
            raise MemoryError("no room for it")
        if data == b"exit":
            raise SystemExit(3)
        return open_image(source, *given, **options)

    open_image = preprocess.open_image
    monkeypatch.setattr(preprocess, "open_image", opened)
    images = [picture(1), b"no image", b"memory", "missing.png", picture(2, 9), b"exit", picture(3).astype(float), 17]
    futures = batching.submit_many(images)
    bad, memory, ended = "BadImageError", "MemoryError", "RuntimeError"
    assert outcomes(futures) == [1, bad, memory, bad, 2, ended, bad, bad]
    assert str(futures[3].exception()) == "can't read image missing.png: no such file"
    assert "image number 1: it is not an image" in str(futures[1].exception())
    assert "got SystemExit" in str(futures[5].exception())
    assert batching.healthy and batching.last_error is None and batching.pending == 0
    counts = {name: [outcome for outcome, _ in watcher.done].count(name) for name in ("ok", "bad_image", "error")}
    assert counts == {"ok": 2, "bad_image": 4, "error": 2}


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize(("margin", "expected"), [(0.0, 2), (0.5, 1)])
def test_parts_have_the_margin_of_the_fit(classifier: FakeClassifier, margin: float, expected: int, isolated) -> None:
    scene = picture(1, 16)
    scene[4:12, 4:12] = 2
    classifier.margin = margin
    with BatchingClassifier(classifier, isolated=isolated, decode_threads=1) as batching:
        for source in (encode(scene), Image.fromarray(scene)):
            inside, outside = (Crop(source, Box(x, 4, 8, 8)) for x in (4, 18))
            assert outcomes(batching.submit_many([inside, inside, outside])) == [expected, expected, "BadImageError"]


def test_limits_are_checked_by_the_header(classifier: FakeClassifier, monkeypatch, tmp_path: Path) -> None:
    limits = DecodeLimits(max_bytes=500, max_pixels=1000)
    noise = encode(np.random.default_rng(0).integers(0, 255, (20, 20, 3), np.uint8))
    (tmp_path / "a.png").write_bytes(noise)
    opened: list[Any] = []
    resize_and_crop = preprocess.resize_and_crop
    monkeypatch.setattr(preprocess, "resize_and_crop", lambda *given: opened.append(given) or resize_and_crop(*given))
    with BatchingClassifier(classifier, limits=limits) as batching:
        good = [encode(picture(7, 30)), Image.new("L", (30, 30), 7), picture(7, 30)]
        assert outcomes(batching.submit_many(good)) == [7] * 3 and len(opened) == 3
        for said, image in {
            "expected at most 1000 pixels, got 40 x 40": encode(picture(7, 40)),
            "got 32 x 33": np.zeros((33, 32), np.uint8),
            "got 40 x 41": Crop(encode(np.full((41, 40, 3), 7, np.uint8)), Box(0, 0, 9, 9)),
            r"at most 500 encoded bytes, got \d+": noise,
            r"a.png: expected at most 500 encoded bytes": tmp_path / "a.png",
            r"at most 500 encoded bytes, got \d\d": Crop(noise, Box(0, 0, 9, 9)),
        }.items():
            with pytest.raises(BadImageError, match=said):
                batching.submit(image).result(PATIENCE_S)
    assert len(opened) == 3


@pytest.mark.parametrize("guilty", [{3}, {1}, {8}, {2, 7}, {1, 2, 3, 4, 5, 6, 7, 8}])
def test_only_images_that_fail_alone_get_the_error(
    batching, classifier: FakeClassifier, guilty: set[int], caplog
) -> None:
    classifier.encoder.raises = raising(EngineError, lambda numbers: bool(guilty & set(numbers)))
    futures = together(batching, classifier, list(range(1, 9)))
    assert outcomes(futures) == ["EngineError" if i in guilty else i for i in range(1, 9)]
    assert batching.healthy and batching.last_error is None
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1


def test_engine_down_and_up_again(batching, classifier: FakeClassifier, watcher: Watcher, monkeypatch) -> None:
    monkeypatch.setattr(Deadlines, "engine_probe_s", 3600.0)
    classifier.encoder.raises = raising(lambda: EngineError("lost"), lambda numbers: True)
    futures = together(batching, classifier, [1, 2, 3, 4, 5])
    assert outcomes(futures) == ["EngineError"] * 5
    assert not batching.healthy and str(batching.last_error) == "lost"
    assert classifier.encoder.batches[1:] == [[1, 2, 3, 4, 5], [BLACK]], "nothing is tried on an engine that is down"
    assert outcomes([batching.submit(picture(6))]) == ["EngineError"] and not batching.healthy
    classifier.encoder.raises = lambda numbers: None
    assert outcomes([batching.submit(picture(7))]) == [7]
    assert batching.healthy and str(batching.last_error) == "lost" and batching.pending == 0
    assert [outcome for outcome, _ in watcher.done].count("error") == 6


def test_an_observer_that_raises_affects_no_answer(classifier: FakeClassifier, caplog) -> None:
    class Broken:
        def on_batch(self, *_: Any) -> None:
            raise RuntimeError("full disk")

        def on_done(self, *_: Any) -> None:
            raise RuntimeError("full disk")

        on_refused = None

    with BatchingClassifier(classifier, observer=Broken(), max_queue=2) as batching:
        for i in range(3):
            assert outcomes([batching.submit(picture(i))]) == [i]
    with pytest.raises(RuntimeError, match="closed"):
        batching.submit(picture(1))
    assert "the observer's on_done raised" in caplog.text and "full disk" in caplog.text


def test_the_batch_thread_survives_unexpected_errors(batching, monkeypatch, caplog) -> None:
    run, left = batching._engine.run, [SystemExit("unexpected")]

    def fails_once(*given: Any) -> Any:
        if left:
            raise left.pop()
        return run(*given)

    monkeypatch.setattr(batching._engine, "run", fails_once)
    assert outcomes([batching.submit(picture(1))]) == ["RuntimeError"]
    assert outcomes(batching.submit_many([picture(2), picture(3, 9)])) == [2, 3] and batching.pending == 0
    assert "a batch could not be run" in caplog.text


def test_nothing_is_encoded_by_two_threads_at_once(batching, classifier: FakeClassifier) -> None:
    with classifier.held(batching, 1) as first:
        warming = threading.Thread(target=batching.warm)
        warming.start()
        warming.join(0.05)
        assert warming.is_alive() and classifier.encoder.batches == [[1]]
    warming.join(PATIENCE_S)
    assert outcomes([first]) == [1] and sorted(map(len, classifier.encoder.batches)) == [1, 1, 1, 2, 3, 4, 8]


def test_warming_runs_every_bucket_before_serving(classifier: FakeClassifier) -> None:
    with BatchingClassifier(classifier, max_batch=6) as batching:
        batching.warm()
        assert classifier.encoder.batches == [[0] * n for n in (1, 2, 3, 4, 6, 1)]
        assert len(classifier.asked) == 1, "scoring is warmed as well"
    classifier.encoder.raises = raising(EngineError, lambda numbers: True)
    with BatchingClassifier(classifier) as batching, pytest.raises(EngineError):
        batching.warm()
