"""BatchingClassifier of one classifier or of several on one encoder: who answers, and with whom errors stay."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from iosr_fast.exceptions import BadImageError, IosrFastError, NotFittedError
from iosr_fast.images import preprocess
from iosr_fast.images.crop import Box, Crop
from iosr_fast.serving.batching import BatchingClassifier, DecodeLimits
from iosr_fast.serving.batching.classifiers import EncoderAlone
from iosr_fast.serving.limits import Deadlines
from tests.pictures import encode
from tests.serving.batching_fakes import (
    PATIENCE_S,
    FakeClassifier,
    FakeEncoder,
    FakeError,
    Watcher,
    fail_on,
    nothing,
    picture,
    said,
)
from tests.waiting import wait_until

BLACK, HOLD, BAD = 0, 250, "FakeError"  # what failed is tried with a black picture
ALL = ("a", "b", "c")
Names = str | tuple[str, ...]


class Several:
    """Classifiers on one encoder, whose heads have the versions 10, 20 and 30."""

    def __init__(self) -> None:
        self.encoder, self.watcher = FakeEncoder(), Watcher()
        self.a, self.b, self.c = (FakeClassifier(version=version, encoder=self.encoder) for version in (10, 20, 30))
        self.named: Any = {"a": self.a, "b": self.b, "c": self.c}
        self.collected: list[tuple[int, int]] = []

    def start(self, **options: Any) -> BatchingClassifier:
        self.batching = BatchingClassifier(self.named, decode_threads=2, observer=self.watcher, **options)
        return self.batching

    def collect(self, image: Any, rows: Any, head: Any, client: str) -> None:
        self.collected.append((head.version, int(rows.plain[0, 0])))

    def ask(self, number: int = 1, names: Names = ALL) -> Any:
        return said(self.batching.submit(picture(number), classifier=names))

    def together(self, *asked: tuple[int, Names]) -> list[Any]:
        """What is said of pictures that come in one batch; of those from 100 on more classes are asked."""
        raises = self.encoder.raises
        self.encoder.raises = lambda given: None if given == [HOLD] else raises(given)
        with self.a.held(self.batching, HOLD, classifier="a"):
            futures = [self.batching.submit(picture(i), classifier=names, top=1 + i // 100) for i, names in asked]
        return [said(future) for future in futures]


@pytest.fixture
def several() -> Iterator[Several]:
    made = Several()
    with made.start(collect={"b": made.collect}):
        yield made
        made.encoder.open.set()
    assert made.batching.pending == 0


def test_a_picture_is_encoded_once_and_scored_by_each_that_it_asks(several: Several) -> None:
    found = several.together((1, "a"), (2, ("c", "a")), (3, ("b",)), (4, ALL), (5, "b"))
    assert found == [10, [30, 10], [20], [10, 20, 30], 20] and several.encoder.batches == [[HOLD], [1, 2, 3, 4, 5]]
    scored = [[numbers for numbers, *_ in one.asked] for one in (several.a, several.b, several.c)]
    assert scored == [[[HOLD], [1, 2, 4]], [[3, 4, 5]], [[2, 4]]], "in one call of each head"
    assert several.watcher.done[1:] == [("ok", label) for label in ("1", None, "3", None, "5")]
    assert several.collected == [(20, 3), (20, 4), (20, 5)] and all(one.promises for one in several.named.values())


@pytest.mark.parametrize(("isolated", "margin", "labels"), [(False, 0.0, "34"), (True, 0.0, "34"), (True, 1.0, "33")])
def test_parts_of_a_picture_are_decoded_once_for_all(isolated: bool, margin: float, labels: str) -> None:
    """With the margin of the fit."""
    several = Several()
    several.a.margin = several.b.margin = several.c.margin = margin
    scene = np.repeat([3, 4], 8 * 16 * 3).astype(np.uint8).reshape(16, 16, 3)
    with several.start(isolated=isolated, collect=several.collect) as batching:
        parts = [Crop(encode(scene), Box(4, y, 4, 4)) for y in (1, 8, 99)]
        *inside, outside = batching.submit_many(parts, classifier=("c", "b"))
        assert [[one.label for one in part.result(PATIENCE_S)] for part in inside] == [[label] * 2 for label in labels]
        assert said(inside[0]) == [30, 20] and said(outside) == "BadImageError" and not several.collected
        whole = batching.decode_whole(encode(scene), classifier="b").result(PATIENCE_S)
        np.testing.assert_array_equal(whole, scene)


def test_names_that_are_not_here_are_refused(several: Several) -> None:
    for names in ("", "d", ("a", "d"), ["a"], None):
        with pytest.raises(IosrFastError, match="expected classifier"):
            several.batching.submit(picture(1), classifier=names)
    with pytest.raises(IosrFastError, match="of one classifier, got 3"):
        several.batching.classifier  # noqa: B018
    assert several.batching.pending == 0
    with BatchingClassifier({"x": several.a}) as batching:
        assert batching.classifier is several.a and said(batching.submit(picture(1))) == 10


@pytest.mark.parametrize(("field", "value"), [("fingerprint", "x"), ("image_size", 8), ("width", 2), ("margin", 0.1)])
def test_classifiers_share_an_encoder_or_are_refused(several: Several, field: str, value: Any) -> None:
    other = FakeClassifier()
    setattr(other if field == "margin" else other.encoder, field, value)
    unfitted = Mock(snapshot=Mock(side_effect=NotFittedError("not fitted yet")))
    for named, collect, message in (
        ({**several.named, "z": other}, {}, r"'z' with (fingerprint|geometry|width|margin) .*, and others with"),
        ({**several.named, "z": unfitted}, {}, "classifier 'z': not fitted"),
        ({}, {}, "expected a classifier"),
        (several.named, {"d": several.collect}, "expected collect for"),
    ):
        with pytest.raises(IosrFastError, match=message):
            BatchingClassifier(named, collect=collect)
    # Another one is fitted again on another encoder: the others go on.
    several.c.encoder, several.c.margin = other.encoder, other.margin
    assert several.ask(names=("b", "a")) == [20, 10]
    with pytest.raises(IosrFastError, match="'c' was fitted again on another encoder"):
        several.ask()


@pytest.mark.parametrize("adapted", [(), (1,), (1, 2)])
def test_all_share_the_encoder_of_the_first_of_adapted_embeddings(adapted: tuple[int, ...]) -> None:
    made = [FakeClassifier(version=i, adapted=i in adapted) for i in range(3)]
    with BatchingClassifier({str(i): one for i, one in enumerate(made)}) as batching:  # type: ignore[misc]
        assert said(batching.submit(picture(1), classifier="2")) == 2
    assert [len(one.encoder.batches) for one in made] == [int(i == (1 if adapted else 0)) for i in range(3)]


# --- failures ---


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
    assert [said(future) for future in futures] == [1, bad, memory, bad, 1, ended, bad, bad]
    assert str(futures[3].exception()) == "can't read image missing.png: no such file"
    assert "image number 1: it is not an image" in str(futures[1].exception())
    assert "got SystemExit" in str(futures[5].exception())
    assert batching.healthy and batching.last_error is None and batching.pending == 0
    counts = {name: [outcome for outcome, _ in watcher.done].count(name) for name in ("ok", "bad_image", "error")}
    assert counts == {"ok": 2, "bad_image": 4, "error": 2}


def test_limits_are_checked_before_pixels_are_read(classifier: FakeClassifier, monkeypatch, tmp_path: Path) -> None:
    noise = encode(np.random.default_rng(0).integers(0, 255, (20, 20, 3), np.uint8))
    (tmp_path / "a.png").write_bytes(noise)
    with BatchingClassifier(classifier, limits=DecodeLimits(max_bytes=500, max_pixels=1000)) as batching:
        good = [encode(picture(7, 30)), Image.new("L", (30, 30), 7), picture(7, 30)]
        assert [said(future) for future in batching.submit_many(good)] == [1] * 3
        monkeypatch.setattr(preprocess, "resize_and_crop", None)
        for message, image in {
            "expected at most 1000 pixels, got 40 x 40": encode(picture(7, 40)),
            "got 32 x 33": np.zeros((33, 32), np.uint8),
            "got 40 x 41": Crop(encode(np.full((41, 40, 3), 7, np.uint8)), Box(0, 0, 9, 9)),
            r"a.png: expected at most 500 encoded bytes": tmp_path / "a.png",
            r"at most 500 encoded bytes, got \d\d": Crop(noise, Box(0, 0, 9, 9)),
        }.items():
            with pytest.raises(BadImageError, match=message):
                batching.submit(image).result(PATIENCE_S)


@pytest.mark.parametrize("guilty", [2, 3])
def test_a_head_that_fails_on_one_picture_fails_for_it_alone(several: Several, guilty: int, caplog) -> None:
    several.a.raises = several.b.raises = fail_on(guilty)
    found = several.together((1, ALL), (2, ALL), (3, "b"), (4, ("b",)), (5, "c"))
    assert found[:2] == [[10, 20, 30], [BAD, BAD, 30] if guilty == 2 else [10, 20, 30]]
    assert found[2:] == [BAD if guilty == 3 else 20, [20], 30]
    assert several.batching.healthy and not several.batching.failures and several.batching.last_error is None
    tried = sorted(several.encoder.batches[2:])
    assert tried == [[BLACK], [1], [2], [3], [4]], "encoded once more: embeddings may be what is wrong"
    assert [numbers for numbers, *_ in several.c.asked] == [[1, 2, 5]], "the others are scored once"
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1
    assert sorted(several.collected) == sorted((20, number) for number in {1, 2, 3, 4} - {guilty})


def test_a_head_that_fails_on_every_picture_fails_alone(several: Several, monkeypatch, caplog) -> None:
    monkeypatch.setattr(Deadlines, "engine_probe_s", 3600.0)
    several.b.raises = fail_on()
    found = several.together((1, ALL), (2, "b"), (3, ("b", "c")), (101, "b"))
    assert found == [[10, BAD, 30], BAD, [BAD, 30], BAD]
    asked = [numbers for numbers, *_ in several.b.asked if numbers != [BLACK]]
    assert asked == [[1, 2, 3]] and [1] not in several.encoder.batches, "no picture is tried alone"
    assert several.batching.healthy and several.batching.failures.keys() == {"b"}
    assert [outcome for outcome, _ in several.watcher.done] == ["ok", "ok", "error", "ok", "error"]
    image = picture(1)
    watched, future = weakref.ref(image), several.batching.submit(image, classifier=ALL)
    del image
    assert said(future)[1] == BAD
    wait_until(lambda: watched() is None)
    assert several.ask(names=("b", "a")) == [BAD, 10] and caplog.text.count("tried one by one") == 1
    several.a.raises = several.c.raises = fail_on()
    assert several.ask() == [BAD] * 3 and several.watcher.done[-1] == ("error", None)
    assert not several.batching.healthy and isinstance(several.batching.last_error, FakeError)
    several.a.raises = several.b.raises = nothing
    assert several.ask(names=("a", "b")) == [10, 20] and several.batching.healthy
    assert several.batching.failures.keys() == {"c"}, "until it is asked again, or tried"


@pytest.mark.parametrize("busy", [False, True])
def test_failed_heads_are_tried_while_nobody_asks_them(several: Several, monkeypatch, busy: bool) -> None:
    monkeypatch.setattr(Deadlines, "engine_probe_s", 0.01 if busy else 0.001)
    several.b.raises = fail_on()
    assert several.ask() == [10, BAD, 30]
    count = len(several.b.asked)
    ask: Callable[[], Any] = (lambda: several.ask(names="a")) if busy else (lambda: 10)
    wait_until(lambda: ask() == 10 and len(several.b.asked) > count + 3)
    assert several.batching.failures.keys() == {"b"}
    several.b.raises = nothing
    wait_until(lambda: ask() == 10 and not several.batching.failures)
    several.b.raises = several.a.raises = several.c.raises = fail_on()
    assert several.ask(names="b") == BAD
    wait_until(lambda: not several.batching.healthy)  # the others are tried, too


def test_an_encoder_that_fails_fails_for_the_pictures_it_fails_on(several: Several, caplog) -> None:
    several.encoder.raises = fail_on(2, 7)
    pictures = [(number, names) for number, names in enumerate((ALL, ALL, "a") * 3)]
    found = several.together(*pictures[1:])
    assert found == [BAD if i in (2, 7) else 10 if names == "a" else [10, 20, 30] for i, names in pictures[1:]]
    assert several.batching.healthy and several.batching.last_error is None
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1
    several.encoder.raises = lambda numbers: fail_on()(numbers) if numbers == [2] else None  # when it is tried again
    several.b.raises = fail_on(2)
    assert several.together((1, ALL), (2, ALL)) == [[10, 20, 30], [10, BAD, 30]] and several.batching.healthy


def test_an_encoder_alone_is_up_again_while_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Deadlines, "engine_probe_s", 0.001)
    encoder = FakeEncoder()
    with BatchingClassifier(EncoderAlone(encoder), decode_threads=1) as batching:
        batching.warm()
        encoder.raises = fail_on(2)
        futures = batching.submit_many([picture(number) for number in (1, 2, 3)], classifier=())
        assert isinstance(futures[1].exception(PATIENCE_S), FakeError) and batching.healthy
        assert [futures[i].result(PATIENCE_S).plain.tolist() for i in (0, 2)] == [[[1.0]], [[3.0]]]
        encoder.raises = fail_on()
        assert isinstance(batching.submit(picture(1), classifier=()).exception(PATIENCE_S), FakeError)
        assert not batching.healthy
        encoder.raises = nothing
        wait_until(lambda: batching.healthy)


def test_an_engine_is_down_and_up_again(several: Several, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Deadlines, "engine_probe_s", 3600.0)
    several.encoder.raises = several.b.raises = fail_on()
    assert several.together((1, ALL), (2, "a"), (3, ("b",))) == [BAD] * 3
    assert several.encoder.batches[1:] == [[1, 2, 3], [BLACK]], "nothing is tried on an engine that is down"
    assert not several.batching.healthy and str(several.batching.last_error) == "lost"
    assert several.ask() == BAD and not several.batching.healthy and not several.batching.failures
    assert several.watcher.done[1:] == [("error", None)] * 4
    several.encoder.raises = nothing
    assert several.ask(names=("a", "b")) == [10, BAD] and several.batching.healthy
    several.encoder.raises = fail_on()
    monkeypatch.setattr(Deadlines, "engine_probe_s", 0.001)
    assert several.ask() == BAD and not several.batching.healthy
    several.encoder.raises = nothing
    wait_until(lambda: several.batching.healthy)  # without a request


def test_neither_observer_nor_engine_ends_a_thread_by_its_errors(
    classifier: FakeClassifier, monkeypatch, caplog
) -> None:
    with BatchingClassifier(classifier, observer=object(), decode_threads=2) as batching:  # type: ignore[arg-type]
        with monkeypatch.context() as patch:
            patch.setattr(batching._engine, "run", Mock(side_effect=SystemExit("unexpected")))
            assert said(batching.submit(picture(1))) == "RuntimeError"
        assert said(batching.submit(picture(2))) == said(batching.submit(picture(3, 9))) == 1 and not batching.pending
    assert "a batch could not be run" in caplog.text and "the observer's on_done raised" in caplog.text


def test_warming_runs_every_size_once_beside_no_batch(batching, classifier: FakeClassifier) -> None:
    with classifier.held(batching, 1) as first:
        warming = threading.Thread(target=batching.warm)
        warming.start()
        warming.join(0.05)
        assert warming.is_alive() and classifier.encoder.batches == [[1]]
    warming.join(PATIENCE_S)
    assert said(first) == 1
    assert sorted(map(len, classifier.encoder.batches)) == [1, 1, 1, 2, 3, 4, 8], "one of them to warm scoring"


def test_warming_runs_each_head_and_names_those_that_fail(several: Several) -> None:
    several.encoder.buckets, several.encoder.max_batch = (1, 2, 4), 4
    several.b.raises = fail_on()
    several.batching.warm()
    assert [len(numbers) for numbers, *_ in several.c.asked] == [1, 2, 4] and len(several.b.asked) == 1
    assert several.batching.healthy and several.batching.failures.keys() == {"b"}
    several.a.raises = several.c.raises = fail_on()
    with pytest.raises(FakeError):
        several.batching.warm()
    several.a.raises, several.encoder.raises = nothing, fail_on()
    with pytest.raises(FakeError):
        several.batching.warm()
