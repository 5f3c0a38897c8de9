"""The stream from files to predictions: order, bounds, unreadable images, and that no thread outlives it."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from iosr_fast.encoders.encoder import Embeddings, Encoder
from iosr_fast.exceptions import BadImageError
from iosr_fast.files.stream import Reader, ReadOptions, Stage, batches_of
from iosr_fast.head.support_images import SupportSettings, encode_images
from iosr_fast.images import preprocess
from iosr_fast.images.geometry import Geometry
from iosr_fast.images.preprocess import Decode, DecodedBatch
from iosr_fast.serving.http.open_site import open_classifiers
from iosr_fast.serving.http.settings import Settings
from iosr_fast.serving.http.site import Site

SIZE = 8
TWO_WAYS = pytest.mark.parametrize(("callers", "decode_threads"), [(1, 2), (3, 0)])


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


class CountingEncoder(Encoder):
    """plain = the mean of a picture's pixels. Counts the pictures of each batch, and the batches that are in it at
    once."""

    image_size, width, fingerprint, runtime, adapted = SIZE, 1, "counting", "counting", False

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.batches, self.inside, self.most = seconds, list[int](), 0, 0
        self._lock = threading.Lock()

    def encode(self, pixels: np.ndarray) -> Embeddings:
        with self._lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
            self.batches.append(len(pixels))
        time.sleep(self.seconds)
        with self._lock:
            self.inside -= 1
        return Embeddings(pixels.reshape(len(pixels), -1).mean(1, keepdims=True))


def levels(embeddings: Embeddings) -> list[int]:
    return [int(level) for level in embeddings.plain[:, 0]]


def read(
    stage: Stage, sources: list[Any], batch: int, decode: Decode | None = None, use: Callable[..., Any] = levels
) -> Any:
    reader = Reader(stage.encoder, Path(), SupportSettings(), ReadOptions(batch, skip_bad=True))
    reader.decode = decode or reader.decode
    return reader.read_batches(stage, batches_of(sources, batch, 1), use)


def grey(level: int) -> np.ndarray:
    return np.full((SIZE, SIZE, 3), level, np.uint8)


@TWO_WAYS
def test_results_come_in_order_with_the_unreadable_in_their_places(callers: int, decode_threads: int) -> None:
    sources: list[Any] = [grey(i + 1) for i in range(40)]
    sources[5], sources[17] = b"no picture", "nowhere.png"
    for i in range(20, 24):
        sources[i] = b""  # a whole batch
    encoder = CountingEncoder()
    made = list(read(Stage(encoder, callers, decode_threads), sources, 4))
    assert [len(errors) for errors, _ in made] == [4] * 10 and made[5][1] is None
    errors = [error for batch, _ in made for error in batch if error is not None]
    assert [error.position for error in errors] == [5, 17, *range(20, 24)]
    assert all(isinstance(error, BadImageError) for error in errors)
    readable = [i for i in range(40) if i not in (5, 17, *range(20, 24))]
    assert [level - 1 for _, batch in made for level in batch or ()] == readable
    assert sorted(encoder.batches) == [3, 3, *[4] * 7]


class OverflowingEncoder(CountingEncoder):
    """Dark pictures have NaN, black ones zeros, as where fp16 overflows before or in the norm."""

    def encode(self, pixels: np.ndarray) -> Embeddings:
        rows = super().encode(pixels).plain
        return Embeddings(np.ones_like(rows), np.where((rows == 0) | (rows > 99), rows, np.nan))


@TWO_WAYS
def test_an_image_without_a_usable_embedding_is_unreadable(callers: int, decode_threads: int, tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{i}.png") for i in range(9)]
    for path, level in zip(paths, [100, 5, 200, 0, 5, 5, 5, 150, 160], strict=True):
        Image.fromarray(grey(level)).save(path)
    stage = Stage(OverflowingEncoder(), callers, decode_threads)
    made = list(read(stage, ["nowhere.png", *paths], 4, use=lambda rows: rows.adapted[:, 0].tolist()))
    assert [result for _, result in made] == [[100, 200], None, [150, 160]]
    errors = {error.position: str(error) for batch, _ in made for error in batch if error is not None}
    assert [*errors] == [0, 2, 4, 5, 6, 7] and "no such file" in errors.pop(0)
    assert all(f"{paths[i - 1]}: its embedding is not finite, or zeros" in said for i, said in errors.items())
    reader = Reader(stage.encoder, Path(), SupportSettings(), ReadOptions(4))
    with pytest.raises(BadImageError, match=rf"can't read image {paths[1]}: its embedding is not finite"):
        list(reader.read_batches(stage, batches_of(paths, 4, 1), levels))


@pytest.mark.parametrize(
    ("images", "batch", "callers"), [(500, 16, 2), (61, 7, 3), (5, 16, 2), (100, 3, 8), (0, 16, 2)]
)
def test_the_last_batches_are_smaller_so_that_callers_end_together(images: int, batch: int, callers: int) -> None:
    def sizes_of(images: int, callers: int, later: int = 0) -> list[int]:
        return [len(sources) for _, sources in batches_of(range(images), batch, callers, later=later)]

    sizes = sizes_of(images, callers)
    assert sum(sizes) == images and all(0 < size <= batch for size in sizes)
    assert sizes_of(images, 1) == [batch] * (images // batch) + [images % batch] * (images % batch > 0)
    for done in range(len(sizes)):
        left = images - sum(sizes[:done])
        assert sizes[done] <= max(4, -(-left // (2 * callers)))
        assert sizes_of(left, callers) == sizes[done:], "a run that resumes has the same batches"
    assert set(sizes_of(2 * batch, callers, later=1000)) == {batch}, "only the last ones of the whole run"


@TWO_WAYS
def test_pixels_of_few_batches_are_in_memory(callers: int, decode_threads: int) -> None:
    held: set[int] = set()
    most: list[int] = []

    class Tracked(np.ndarray):
        def __del__(self) -> None:
            held.discard(id(self))

    def tracked(sources: Any, geometry: Geometry, start: int) -> DecodedBatch:
        pixels = np.stack(sources).view(Tracked)
        held.add(id(pixels))
        most.append(len(held))
        return DecodedBatch([None] * len(sources), pixels)

    stage = Stage(CountingEncoder(0.003), callers, decode_threads)
    with closing(read(stage, [grey(i % 250) for i in range(400)], 4, tracked)) as answers:
        for _ in answers:
            time.sleep(0.001)
    assert len(most) == 100 and max(most) <= (callers if callers > 1 else decode_threads + 2)


def test_nearly_no_core_idles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where many images are encoded, and where a classifier is served."""
    monkeypatch.setattr("iosr_fast.encoders.runtimes.open_engine", lambda *_, **options: Mock(parallel=True, **options))
    monkeypatch.setattr("iosr_fast.serving.http.open_site.load", Mock())
    opened = Mock(side_effect=lambda saved, *_: saved)
    monkeypatch.setattr("iosr_fast.classifier.open_together", opened)
    for cores in range(1, 65):
        reader = Reader(Mock(parallel=True, buckets=None), Path(), SupportSettings(), ReadOptions(4, threads=cores))
        encoder = reader.stage(10_000).encoder if cores > 1 else Mock(runs=1, threads=1)
        assert min(cores, 8) / 2 < encoder.runs <= 8
        open_classifiers(Site(Settings(), {"": Path()}), cores)
        threads, runs = opened.call_args.args[2:]
        assert runs < 2.2 * cores**0.5 and threads < 2.2 * cores**0.5 and (threads > 1 or cores < 4)
        for idle in (cores - encoder.runs * encoder.threads, cores - runs * threads):
            assert 0 <= idle <= max(1, cores / 11), cores


def test_callers_encode_side_by_side_and_one_caller_alone() -> None:
    sources = [grey(i) for i in range(60)]
    beside, alone = CountingEncoder(0.02), CountingEncoder(0.001)
    list(read(Stage(beside, 3, 0), sources, 5))
    list(read(Stage(alone, 1, 3), sources, 5))
    assert beside.most == 3 and alone.most == 1


@TWO_WAYS
def test_no_thread_is_left_by_a_consumer_or_encoder_that_fails(callers: int, decode_threads: int) -> None:
    stage, sources = Stage(CountingEncoder(0.001), callers, decode_threads), [grey(i % 250) for i in range(400)]
    answers = read(stage, sources, 4)
    next(answers)
    answers.close()
    assert sum(stage.encoder.batches) < 100  # type: ignore[attr-defined]

    def consumer() -> None:
        for _ in read(stage, sources, 4):
            raise RuntimeError("the consumer failed")

    with pytest.raises(RuntimeError, match="the consumer failed") as raised:
        consumer()
    del raised  # its traceback holds the consumer's frame, and that the generator
    gc.collect()
    assert sum(stage.encoder.batches) < 200  # type: ignore[attr-defined]

    def fails(embeddings: Embeddings) -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        list(read(stage, sources, 4, use=fails))


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("way", ["one caller", "callers", "support"])
def test_the_parts_of_a_file_share_one_decoding(
    batch: int, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, whole, most = Counter[Path](), list[weakref.ref[Image.Image]](), list[int]()
    upright, opened = preprocess.upright_rgb, preprocess.opened

    def counted(image: Image.Image, *options: Any) -> Image.Image:
        whole.append(weakref.ref(made := upright(image, *options)))
        most.append(sum(one() is not None for one in whole))
        return made

    monkeypatch.setattr(preprocess, "opened", lambda path: reads.update([path]) or opened(path))
    monkeypatch.setattr(preprocess, "upright_rgb", counted)
    files = [tmp_path / f"{i}.png" for i in range(12)]
    for i, file in enumerate(files):
        columns = np.repeat(np.arange(10, dtype=np.uint8)[None] + 10 * i + 1, 4, axis=0)
        Image.fromarray(columns).resize((80, 32), Image.Resampling.NEAREST).save(file)
    files[5].write_bytes(b"no image")
    sources = [f"{file}#xywh={8 * i},0,8,32" for file in files for i in range(10)]
    expected = [level + 1 for level in range(120) if level // 10 != 5]
    if way == "support":
        encoded = encode_images(CountingEncoder(), sources, SupportSettings(thumbnail=0), skip_bad=True)
        found, errors = expected[: len(encoded.examples)], encoded.errors
        assert encoded.examples.paths == tuple(one for one in sources if "/5.png" not in one)
    else:
        stage = Stage(CountingEncoder(), *((1, 2) if way == "one caller" else (3, 0)))
        results = list(read(stage, sources, batch))
        found = [level for _, some in results for level in some or ()]
        errors = [error for some, _ in results for error in some if error is not None]
    assert found == expected and reads == dict.fromkeys(files, 1)
    assert [(error.position, str(error.path)) for error in errors] == list(enumerate(sources))[50:60]
    assert max(most) <= 5 and not any(one() is not None for one in whole)
