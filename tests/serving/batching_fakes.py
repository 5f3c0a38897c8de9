"""For the tests of BatchingClassifier: an encoder that a test can hold, break and watch, and a classifier on it.

A picture is one number in all of its pixels, and its label is that number.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings, Encoder
from iosr_fast.head.predictions import ClassScore, Neighbour, Prediction, predict
from iosr_fast.images.geometry import Geometry
from iosr_fast.serving.batching.item import Item, Query

SIZE = 4
PATIENCE_S = 20.0  # how long a test waits before it fails; none is meant to


def picture(number: int, size: int = SIZE) -> np.ndarray:
    """One of the encoder's size needs no decoder."""
    return np.full((size, size, 3), number, np.uint8)


def to_decode(image: Any, geometry: Geometry, position: int = 0, whole: bool = False) -> Item:
    return Item(image, position, Query(), 0.0, encoder=SimpleNamespace(geometry=geometry), whole=whole)


def labels(futures: Iterable[Any]) -> list[int]:
    return [int(future.result(PATIENCE_S).label) for future in futures]


def said(future: Any) -> Any:
    """The version of a Prediction, which tells whose it is, or the name of an error; of several a list."""
    found = future.exception(PATIENCE_S) or future.result()
    each = [getattr(one, "version", type(one).__name__) for one in (found if isinstance(found, tuple) else (found,))]
    return each if isinstance(found, tuple) else each[0]


def threads() -> set[threading.Thread]:
    """The threads of all BatchingClassifiers."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("iosr-fast")}


class Gated:
    """A picture whose decoding waits for `gate`; `begun` is set when it starts."""

    def __init__(self, number: int, size: int = SIZE + 1) -> None:
        self.pixels = picture(number, size)
        self.begun, self.gate = threading.Event(), threading.Event()

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        self.begun.set()
        assert self.gate.wait(PATIENCE_S)
        return self.pixels


def fail_on(*numbers: int) -> Callable[[list[int]], None]:
    """Raises on these pictures; without any, on every one."""

    def raises(given: list[int]) -> None:
        if not numbers or set(numbers) & set(given):
            raise FakeError("lost")

    return raises


class FakeError(Exception):
    pass


nothing = fail_on(-1)


class FakeEncoder(Encoder):
    """`batches`: the numbers it was given; `raises`: called with them, may raise; `open`: cleared, it holds batches."""

    fingerprint, width = "fake", 1

    def __init__(self, size: int = SIZE) -> None:
        self.image_size = size
        self.batches: list[list[int]] = []
        self.began: SimpleQueue[list[int]] = SimpleQueue()
        self.open = threading.Event()
        self.open.set()
        self.raises = nothing

    def encode(self, pixels: np.ndarray) -> Embeddings:
        assert pixels.dtype == np.uint8 and pixels.shape[1:] == (self.image_size, self.image_size, 3)
        numbers = pixels[:, 0, 0, 0].tolist()
        self.batches.append(numbers)
        self.began.put(numbers)
        assert self.open.wait(PATIENCE_S)
        self.raises(numbers)
        return Embeddings(np.array(numbers, np.float32)[:, None])


class FakeHead:
    def __init__(self, classifier: FakeClassifier) -> None:
        self.version, self.needs_adapted, self._classifier = classifier.version, classifier.adapted, classifier

    def predict(self, embeddings: Embeddings, top: int = 5, nearest: int = 0, _: Any = None) -> list[Prediction]:
        numbers = [int(number) for number in embeddings.plain[:, 0]]
        self._classifier.asked.append((numbers, top, nearest))
        self._classifier.raises(numbers)
        return [self._say(number, top, nearest) for number in numbers]

    def _say(self, number: int, top: int, nearest: int) -> Prediction:
        scores = tuple(ClassScore(str(number + i), f"~{number + i}", 0.5, 2.0, 1.0, 1.0, 0.5) for i in range(top))
        near = tuple(Neighbour(f"e{i}", str(number), f"~{number}", 0.9) for i in range(nearest))
        return Prediction(str(number), f"~{number}", 0.5, 2.0, 1.0, 1.0, 0.5, scores, near, self.version)


def answer(head: Any, embeddings: Embeddings, *asked: Any) -> list[Prediction]:
    """`predict`, in whose place a fake head answers by itself."""
    return head.predict(embeddings, *asked) if isinstance(head, FakeHead) else predict(head, embeddings, *asked)


class FakeClassifier:
    """`asked`: (numbers, top, nearest) of each call of predict, which `raises` may break. `version` is that of the
    head, which compares `adapted` embeddings or plain ones."""

    def __init__(self, size: int = SIZE, version: int = 1, encoder: Any = None, adapted: bool = False) -> None:
        self.encoder = encoder or FakeEncoder(size)
        self.asked: list[tuple[list[int], int, int]] = []
        self.raises = nothing
        self.version, self.adapted = version, adapted
        self.margin, self.promises = 0.0, False
        self._head = FakeHead(self)

    def serve_promises(self) -> None:
        self.promises = True

    def snapshot(self) -> FakeHead:
        if self._head.version != self.version:
            self._head = FakeHead(self)
        return self._head

    def _fitted(self) -> Any:
        settings = SimpleNamespace(exif_orientation=True, margin=self.margin)
        clip = SimpleNamespace(encoder=self.encoder)
        return SimpleNamespace(head=self.snapshot(), encoder=self.encoder, settings=settings, clip=clip)

    @contextmanager
    def held(self, batching: Any, number: int = 0, **options: Any) -> Iterator[Any]:
        """Hold one picture in the engine, so that later ones wait; yields its future."""
        self.encoder.open.clear()
        future = batching.submit(picture(number), **options)
        while self.encoder.began.get(timeout=PATIENCE_S) != [number]:
            pass
        try:
            yield future
        finally:
            self.encoder.open.set()


class Watcher:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.done: list[tuple[str, str | None]] = []
        self.refused: list[str] = []

    def on_batch(self, size: int, encode_s: float, score_s: float) -> None:
        assert encode_s >= 0 and score_s >= 0
        self.batches.append(size)

    def on_done(self, latency_s: float, outcome: str, label: str | None) -> None:
        assert latency_s >= 0
        self.done.append((outcome, label))

    def on_refused(self, reason: str) -> None:
        self.refused.append(reason)
