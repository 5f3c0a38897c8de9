"""BatchingClassifier when images, decoders, engine or observer fail: which images get the error, and which do not."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iosr_fast.exceptions import BadImageError
from iosr_fast.images import preprocess
from iosr_fast.images.crop import Box, Crop
from iosr_fast.serving.batching import BatchingClassifier, DecodeLimits, workers
from tests.pictures import encode
from tests.serving.batching_fakes import PATIENCE_S, FakeClassifier, FakeError, Watcher, fail_on, nothing, picture, said

BLACK, HOLD = 0, 200  # a failed engine is tried with a black picture


def outcomes(futures: list[Any]) -> list[int | str]:
    """Labels, and names of errors."""
    return [said(future, lambda made: int(made.label)) for future in futures]


def together(batching: BatchingClassifier, classifier: FakeClassifier, *numbers: int) -> list[int | str]:
    """Outcomes of pictures that come in one batch, behind another one on which nothing is raised."""
    raises = classifier.encoder.raises
    classifier.encoder.raises = lambda given: None if given == [HOLD] else raises(given)
    with classifier.held(batching, HOLD):
        futures = batching.submit_many([picture(number) for number in numbers])
    return outcomes(futures)


def test_a_bad_image_fails_alone(batching, watcher: Watcher, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(source: Any, *given: Any, **options: Any) -> Any:
        if isinstance(source, bytes) and source in raised:
            raise raised[source]
        return open_image(source, *given, **options)

    raised, open_image = {b"memory": MemoryError("no room for it"), b"exit": SystemExit(3)}, preprocess.open_image
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


def test_limits_are_checked_before_pixels_are_read(classifier: FakeClassifier, monkeypatch, tmp_path: Path) -> None:
    noise = encode(np.random.default_rng(0).integers(0, 255, (20, 20, 3), np.uint8))
    (tmp_path / "a.png").write_bytes(noise)
    opened: list[Any] = []
    resize_and_crop = preprocess.resize_and_crop
    monkeypatch.setattr(preprocess, "resize_and_crop", lambda *given: opened.append(given) or resize_and_crop(*given))
    with BatchingClassifier(classifier, limits=DecodeLimits(max_bytes=500, max_pixels=1000)) as batching:
        good = [encode(picture(7, 30)), Image.new("L", (30, 30), 7), picture(7, 30)]
        assert outcomes(batching.submit_many(good)) == [7] * 3 and len(opened) == 3
        for said_, image in {
            "expected at most 1000 pixels, got 40 x 40": encode(picture(7, 40)),
            "got 32 x 33": np.zeros((33, 32), np.uint8),
            "got 40 x 41": Crop(encode(np.full((41, 40, 3), 7, np.uint8)), Box(0, 0, 9, 9)),
            r"a.png: expected at most 500 encoded bytes": tmp_path / "a.png",
            r"at most 500 encoded bytes, got \d\d": Crop(noise, Box(0, 0, 9, 9)),
        }.items():
            with pytest.raises(BadImageError, match=said_):
                batching.submit(image).result(PATIENCE_S)
    assert len(opened) == 3


@pytest.mark.parametrize("guilty", [{1}, {2, 7}, {*range(1, 9)}])
def test_only_images_that_fail_alone_get_the_error(batching, classifier: FakeClassifier, guilty, caplog) -> None:
    classifier.encoder.raises = fail_on(*guilty)
    found = together(batching, classifier, *range(1, 9))
    assert found == ["FakeError" if i in guilty else i for i in range(1, 9)]
    assert batching.healthy and batching.last_error is None
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1


def test_an_engine_is_down_and_up_again(batching, classifier: FakeClassifier, watcher: Watcher, monkeypatch) -> None:
    monkeypatch.setattr(workers, "_PROBE_S", 3600.0)
    classifier.encoder.raises = fail_on()
    assert together(batching, classifier, 1, 2, 3, 4, 5) == ["FakeError"] * 5
    assert not batching.healthy and str(batching.last_error) == "lost"
    assert classifier.encoder.batches[1:] == [[1, 2, 3, 4, 5], [BLACK]], "nothing is tried on an engine that is down"
    assert outcomes([batching.submit(picture(6))]) == ["FakeError"] and not batching.healthy
    classifier.encoder.raises = nothing
    assert outcomes([batching.submit(picture(7))]) == [7]
    assert batching.healthy and str(batching.last_error) == "lost" and batching.pending == 0
    assert [outcome for outcome, _ in watcher.done].count("error") == 6


def test_neither_observer_nor_engine_ends_a_thread_by_its_errors(
    classifier: FakeClassifier, monkeypatch, caplog
) -> None:
    with BatchingClassifier(classifier, observer=object(), decode_threads=2) as batching:  # type: ignore[arg-type]
        run, left = batching._engine.run, [SystemExit("unexpected")]
        monkeypatch.setattr(batching._engine, "run", lambda given: run(given) if not left else throw(left.pop()))
        assert outcomes([batching.submit(picture(1))]) == ["RuntimeError"]
        assert outcomes(batching.submit_many([picture(2), picture(3, 9)])) == [2, 3] and batching.pending == 0
    assert "a batch could not be run" in caplog.text and "the observer's on_done raised" in caplog.text


def throw(error: BaseException) -> None:
    raise error


def test_warming_runs_every_size_once_beside_no_batch(batching, classifier: FakeClassifier) -> None:
    with classifier.held(batching, 1) as first:
        warming = threading.Thread(target=batching.warm)
        warming.start()
        warming.join(0.05)
        assert warming.is_alive() and classifier.encoder.batches == [[1]]
    warming.join(PATIENCE_S)
    assert outcomes([first]) == [1]
    assert sorted(map(len, classifier.encoder.batches)) == [1, 1, 1, 2, 3, 4, 8], "one of them to warm scoring"
    classifier.encoder.raises = fail_on()
    with pytest.raises(FakeError):
        batching.warm()
