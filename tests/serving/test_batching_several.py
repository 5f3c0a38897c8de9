"""BatchingClassifier of several classifiers on one encoder: one encoding, answers of each, errors of one alone."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from iosr_fast.exceptions import IosrFastError, NotFittedError
from iosr_fast.head.verdict import Abstention
from iosr_fast.images.crop import Box, Crop
from iosr_fast.serving.batching import BatchingClassifier, workers
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

BLACK, HOLD, BAD = 0, 250, "FakeError"
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


@pytest.mark.parametrize("isolated", [False, True])
def test_parts_of_a_picture_are_decoded_once_for_all(isolated: bool) -> None:
    several = Several()
    scene = np.repeat([3, 4], 8 * 16 * 3).astype(np.uint8).reshape(16, 16, 3)
    with several.start(isolated=isolated, collect=several.collect) as batching:
        parts = [Crop(encode(scene), Box(4, y, 4, 4)) for y in (1, 11, 99)]
        top, bottom, outside = batching.submit_many(parts, classifier=("c", "b"))
        assert [one.label for one in top.result(PATIENCE_S)] == ["3"] * 2 and said(bottom) == [30, 20]
        assert said(outside) == "BadImageError" and not several.collected
        whole = batching.decode_whole(encode(scene), classifier="b").result(PATIENCE_S)
        np.testing.assert_array_equal(whole, scene)


def test_queries_that_do_not_fit_are_refused(several: Several, monkeypatch) -> None:
    for names in ("", "d", ("a", "d"), ["a"], None):
        with pytest.raises(IosrFastError, match="expected classifier"):
            several.batching.submit(picture(1), classifier=names)
    with pytest.raises(IosrFastError, match="of one classifier, got 3"):
        several.batching.classifier  # noqa: B018

    def check(self: Abstention, head: Any) -> None:
        if head.version == 20:
            raise IosrFastError("too few support images")

    monkeypatch.setattr(Abstention, "check", check)
    for names, message in {"b": "^too few", ALL: "^classifier 'b': too few"}.items():
        with pytest.raises(IosrFastError, match=message):
            several.batching.submit(picture(1), classifier=names, max_error=0.1)
    assert several.batching.pending == 0 and not several.encoder.batches
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
    monkeypatch.setattr(workers, "_PROBE_S", 3600.0)
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
    monkeypatch.setattr(workers, "_PROBE_S", 0.01 if busy else 0.001)
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


def test_an_encoder_that_fails_fails_for_all(several: Several, monkeypatch) -> None:
    monkeypatch.setattr(workers, "_PROBE_S", 0.001)
    several.encoder.raises = fail_on(3)
    assert several.together((1, ALL), (3, ALL), (4, "a")) == [[10, 20, 30], BAD, 10]
    several.encoder.raises = lambda numbers: fail_on()(numbers) if numbers == [2] else None  # when it is tried again
    several.b.raises = fail_on(2)
    assert several.together((1, ALL), (2, ALL)) == [[10, 20, 30], [10, BAD, 30]]
    assert several.batching.healthy
    several.encoder.raises, several.b.raises = fail_on(), fail_on()
    assert several.ask() == BAD and not several.batching.healthy and not several.batching.failures
    several.encoder.raises = nothing
    wait_until(lambda: several.batching.healthy)
    assert several.ask(names=("a", "b")) == [10, BAD]


def test_warming_runs_each_head_and_names_those_that_fail(several: Several) -> None:
    several.encoder.buckets, several.encoder.max_batch = (1, 2, 4), 4
    several.b.raises = fail_on()
    several.batching.warm()
    assert [len(numbers) for numbers, *_ in several.c.asked] == [1, 2, 4] and len(several.b.asked) == 1
    assert several.batching.healthy and several.batching.failures.keys() == {"b"}
    several.a.raises = several.c.raises = fail_on()
    with pytest.raises(FakeError):
        several.batching.warm()
