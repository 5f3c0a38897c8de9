"""The stream from files to predictions: order, bounds, unreadable images, and that no thread outlives it."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iosr_fast.encoders.encoder import Embeddings, Encoder
from iosr_fast.exceptions import BadImageError
from iosr_fast.files.stream import Stage, batch_sizes, choose_batch, classify
from iosr_fast.images.decode import CpuDecoder, DecodedBatch
from iosr_fast.images.listing import list_images
from iosr_fast.utils.ordered import map_ordered

SIZE = 8
TWO_WAYS = pytest.mark.parametrize(("callers", "decode_threads"), [(1, 2), (3, 0)])


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


class CountingEncoder(Encoder):
    """plain = the mean of a picture's pixels. Counts pictures it was given, and batches that were with it at once."""

    image_size, width, fingerprint, runtime, adapted = SIZE, 1, "counting", "counting", False

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.batches, self.inside, self.most = seconds, [], 0, 0
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


STATE: Any = None


@pytest.fixture(autouse=True)
def predictions_of_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "iosr_fast.files.stream.predict_any",
        lambda head, embeddings, top, keep: [("seen", int(x)) for x in embeddings.plain[:, 0]],
    )


def grey(level: int) -> np.ndarray:
    return np.full((SIZE, SIZE, 3), level, np.uint8)


# Work ahead


def test_results_come_in_order_and_not_far_ahead() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for i in range(50):
            taken.append(i)
            yield i

    def slow_first(i: int) -> int:
        time.sleep(0.02 if i % 7 == 0 else 0)
        return i

    with closing(map_ordered(items(), slow_first, threads=3, ahead=5)) as made:
        assert next(made) == 0 and len(taken) == 5
        assert [next(made) for _ in range(10)] == list(range(1, 11)) and len(taken) == 15
        assert list(made) == list(range(11, 50))


def test_what_work_or_items_raise_is_raised_in_its_place() -> None:
    def fails(i: int) -> int:
        if i == 4:
            raise KeyError("four")
        return i

    made = map_ordered(range(9), fails, threads=2, ahead=3)
    assert [next(made) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(KeyError, match="four"):
        next(made)
    with pytest.raises(StopIteration):
        next(made)

    def ends() -> Iterator[int]:
        yield 0
        raise OSError("the list ended")

    with pytest.raises(OSError, match="the list ended"):
        list(map_ordered(ends(), abs, threads=2, ahead=3))


def test_closing_early_stops_the_threads_and_what_was_not_begun() -> None:
    begun: list[int] = []

    def slow(i: int) -> int:
        begun.append(i)
        time.sleep(0.01)
        return i

    made = map_ordered(range(1000), slow, threads=2, ahead=40)
    next(made)
    made.close()
    assert len(begun) < 40
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("iosr-fast-ahead")]


# The stream


@TWO_WAYS
def test_predictions_come_in_order_with_the_unreadable_in_their_places(callers: int, decode_threads: int) -> None:
    sources: list[Any] = [grey(i) for i in range(40)]
    sources[5], sources[17] = b"no picture", "nowhere.png"
    for i in range(20, 24):
        sources[i] = b""  # a whole batch
    encoder = CountingEncoder()
    made = list(classify(STATE, Stage(encoder, callers, decode_threads), CpuDecoder(), sources, batch=4))
    assert [len(batch) for batch in made] == [4] * 10
    flat: list[Any] = [answer for batch in made for answer in batch]
    for i, answer in enumerate(flat):
        if i in (5, 17, *range(20, 24)):
            assert isinstance(answer, BadImageError) and answer.position == i
        else:
            assert answer == ("seen", i)
    assert sorted(encoder.batches) == [3, 3, *[4] * 7]


@pytest.mark.parametrize(
    ("images", "batch", "callers"), [(500, 16, 2), (61, 7, 3), (5, 16, 2), (100, 3, 8), (0, 16, 2)]
)
def test_the_last_batches_are_smaller_so_that_callers_end_together(images: int, batch: int, callers: int) -> None:
    sizes = list(batch_sizes(images, batch, callers))
    assert sum(sizes) == images and all(0 < size <= batch for size in sizes)
    # One caller has no other to wait for; of several, none begins more than half its share of what is left.
    assert list(batch_sizes(images, batch, 1)) == [batch] * (images // batch) + [images % batch] * (images % batch > 0)
    for done in range(len(sizes)):
        left = images - sum(sizes[:done])
        assert sizes[done] <= max(4, -(-left // (2 * callers)))
        assert list(batch_sizes(left, batch, callers)) == sizes[done:]  # a run that goes on there has the same ones


def test_a_stream_without_a_length_is_cut_evenly() -> None:
    encoder = CountingEncoder()
    sources = [grey(i) for i in range(40)]
    stage = Stage(encoder, 2, 0)
    known = [len(made) for made in classify(STATE, stage, CpuDecoder(), sources, batch=8)]
    assert known == list(batch_sizes(40, 8, 2)) and known[0] == 8 and known[-1] < 8 and sum(known) == 40
    assert [len(made) for made in classify(STATE, stage, CpuDecoder(), iter(sources), batch=8)] == [8] * 5


@TWO_WAYS
def test_few_batches_are_held_at_once(callers: int, decode_threads: int) -> None:
    """Pixels that are decoded and not yet let go of, however slowly they are encoded and taken."""
    held: set[int] = set()
    most: list[int] = []

    class Tracked(np.ndarray):
        def __del__(self) -> None:
            held.discard(id(self))

    class Decoder:
        name = "tracked"

        def decode(self, sources: Any, size: int, start: int = 0) -> DecodedBatch:
            pixels = np.stack(sources).view(Tracked)
            held.add(id(pixels))
            most.append(len(held))
            return DecodedBatch([None] * len(sources), pixels)

    stage = Stage(CountingEncoder(0.003), callers, decode_threads)
    with closing(classify(STATE, stage, Decoder(), (grey(i % 250) for i in range(400)), batch=4)) as answers:
        for _ in answers:
            time.sleep(0.001)
    assert len(most) == 100 and max(most) <= (callers if callers > 1 else decode_threads + 2)


def test_callers_encode_side_by_side_and_one_caller_alone() -> None:
    sources = [grey(i) for i in range(60)]
    beside, alone = CountingEncoder(0.02), CountingEncoder(0.001)
    list(classify(STATE, Stage(beside, 3, 0), CpuDecoder(), sources, batch=5))
    list(classify(STATE, Stage(alone, 1, 3), CpuDecoder(), sources, batch=5))
    assert beside.most == 3 and alone.most == 1


@TWO_WAYS
def test_who_stops_early_or_fails_leaves_no_thread(callers: int, decode_threads: int) -> None:
    stage, sources = Stage(CountingEncoder(0.001), callers, decode_threads), [grey(i % 250) for i in range(400)]
    answers = classify(STATE, stage, CpuDecoder(), sources, batch=4)
    next(answers)
    answers.close()
    assert sum(stage.encoder.batches) < 100  # type: ignore[attr-defined]

    def consumer() -> None:
        for _ in classify(STATE, stage, CpuDecoder(), sources, batch=4):
            raise RuntimeError("the consumer failed")

    with pytest.raises(RuntimeError, match="the consumer failed") as raised:
        consumer()
    del raised  # its traceback holds the consumer's frame, and that the generator
    gc.collect()
    assert sum(stage.encoder.batches) < 200  # type: ignore[attr-defined]


@TWO_WAYS
def test_an_encoder_that_fails_ends_the_stream(callers: int, decode_threads: int) -> None:
    class Failing(CountingEncoder):
        def encode(self, pixels: np.ndarray) -> Embeddings:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        list(classify(STATE, Stage(Failing(), callers, decode_threads), CpuDecoder(), [grey(1)] * 40, batch=4))


def test_the_batch_fits_the_machine() -> None:
    encoder: Any = CountingEncoder()
    assert choose_batch(encoder, None) == 16 and choose_batch(encoder, 5) == 5
    encoder.buckets, encoder.max_batch = (1, 2, 32), 32
    assert choose_batch(encoder, None) == 32
    encoder.max_batch = 256
    assert choose_batch(encoder, None) == 64
    with pytest.raises(ValueError, match="expected batch of at least 1, got 0"):
        choose_batch(encoder, 0)


# Folders


def test_a_folder_is_listed_name_by_name(tmp_path: Path) -> None:
    for name in ("b.png", "a/z.JPG", "a/b/c.webp", "a-b/d.png", ".hidden/e.png", "a/.f.png", "a/notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "a-b")
    listed = [Path(path).relative_to(tmp_path).as_posix() for path in list_images(tmp_path).paths]
    assert listed == ["a/b/c.webp", "a/z.JPG", "a-b/d.png", "b.png"], "link/d.png is a-b/d.png"
    with pytest.raises(FileNotFoundError, match="found no folder"):
        list_images(tmp_path / "nowhere")


def test_images_of_any_kind_are_taken(tmp_path: Path) -> None:
    Image.fromarray(grey(7)).save(tmp_path / "a.png")
    sources = [tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes(), grey(7)]
    (answers,) = classify(
        STATE, Stage(CountingEncoder(), 1, 1), CpuDecoder(), [*sources, Image.fromarray(grey(7))], batch=9
    )
    assert answers == [("seen", 7)] * 5
