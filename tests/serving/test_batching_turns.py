"""Who gets a decoder: requests take turns, and large images leave one to the others, and memory."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iosr_fast.images.geometry import Geometry
from iosr_fast.serving.batching import BatchingClassifier
from iosr_fast.serving.batching.decode import decoding_cost
from iosr_fast.serving.batching.turns import LARGE_PIXELS, Turns
from tests.images.jpegs import jpeg, scan
from tests.pictures import encode
from tests.serving.batching_fakes import PATIENCE_S, FakeClassifier, Gated, labels, picture, until
from tests.serving.hostile_images import png

BIG = 50_000_000


@dataclass(eq=False)
class Image_:
    name: str
    turn: int = 0
    cost: int = 0
    client: str = ""


def taken(turns: Turns, count: int) -> list[Any]:
    return [turns.get() for _ in range(count)]


def names(jobs: Any) -> str:
    return "".join(job.name for job in jobs)


def test_requests_take_turns_whatever_they_bring() -> None:
    turns = Turns(2, BIG)
    for name, turn in ("a1", "a1", "a1", "b2", "b2", "c3"):
        turns.put(Image_(name, int(turn)))
    assert names(taken(turns, 4)) == "abca"
    turns.put(Image_("d", 4))
    assert names(taken(turns, 3)) == "bad"


def test_many_requests_of_one_client_do_not_keep_another_waiting() -> None:
    turns = Turns(2, BIG)
    for turn in range(5):
        turns.put(Image_("a", turn, client="one"))
    turns.put(Image_("b", 5, client="other"))
    turns.put(Image_("c", 5, client="other"))
    turns.put(gone := Image_("d", 6, client="third"))
    turns.discard(gone)
    assert names(taken(turns, 4)) == "abac"
    assert names(turns.close()) == "aaa"


@pytest.mark.parametrize("decoders", [2, 3, 8])
def test_large_images_leave_a_decoder_to_the_others(decoders: int) -> None:
    turns = Turns(decoders, 100 * BIG)
    for _ in range(decoders + 1):
        turns.put(Image_("L", 1, BIG))
    large = taken(turns, decoders - 1)
    assert names(large) == "L" * (decoders - 1)
    for turn in range(3):
        turns.put(Image_("s", 2 + turn))
    small = taken(turns, 3)  # one after another, by the decoder that is left
    assert names(small) == "sss" and turns.decoders_are_busy
    turns.done(large[0])
    assert names(taken(turns, 1)) == "L"


def test_one_decoder_alternates_between_large_and_small() -> None:
    turns = Turns(1, BIG)
    for _ in range(3):
        turns.put(Image_("L", 1, BIG))
        turns.put(Image_("s", 2))
    got = ""
    for _ in range(6):
        (job,) = taken(turns, 1)
        got += job.name
        turns.done(job)
    assert got in ("LsLsLs", "sLsLsL")


def test_large_images_wait_for_room_and_small_ones_do_not() -> None:
    turns = Turns(8, 100_000_000)
    jobs = [Image_("L", i, 40_000_000) for i in range(3)]
    for job in jobs:
        turns.put(job)
    first = taken(turns, 2)
    waits: list[Any] = []
    waiter = threading.Thread(target=lambda: waits.extend(turns.get() for _ in range(2)), daemon=True)
    waiter.start()
    turns.put(Image_("s", 9))
    until(lambda: names(waits) == "s")
    turns.done(first[0])
    waiter.join(PATIENCE_S)
    assert names(waits) == "sL"
    alone = Turns(2, 10)
    alone.put(Image_("L", 0, BIG))
    assert names(taken(alone, 1)) == "L"  # one that is beyond the room is decoded alone


def test_what_is_cancelled_waits_no_longer() -> None:
    turns = Turns(2, BIG)
    jobs = [Image_(name, 1, cost) for name, cost in (("a", 0), ("b", 0), ("L", BIG))]
    for job in jobs:
        turns.put(job)
    turns.discard(jobs[0])
    turns.discard(jobs[2])
    assert names(taken(turns, 1)) == "b" and not turns.decoders_are_busy
    turns.discard(jobs[1])  # it has a decoder: nothing to do
    assert turns.close() == [] and turns.get() is None


def test_cost_is_the_largest_picture_that_decoding_makes() -> None:
    assert decoding_cost(encode(Image.new("L", (640, 480))), Geometry(64)) == 640 * 480
    assert decoding_cost(jpeg(0xC2, 7000, 6000, scan(1)), Geometry(224)) == 42_000_000
    assert decoding_cost(png(1, 900), Geometry(224)) == 224 * 224 * 900  # its shorter side is resized to 224
    assert [
        decoding_cost(image, Geometry(64)) for image in (b"", b"abc", picture(1), "a.png", Image.new("L", (9, 9)))
    ] == [0] * 5
    assert LARGE_PIXELS < BIG


def test_many_images_of_one_request_do_not_keep_another_waiting() -> None:
    with BatchingClassifier(FakeClassifier(), decode_threads=1, max_batch=1) as batching:
        gates = [Gated(i) for i in range(1, 6)]
        many = batching.submit_many(gates)
        assert gates[0].begun.wait(PATIENCE_S)
        one = batching.submit(picture(9, 9))
        gates[0].gate.set()
        gates[1].gate.set()
        assert labels([one]) == [9] and not many[3].done()
        for gate in gates:
            gate.gate.set()
        assert labels(many) == [1, 2, 3, 4, 5]


def test_large_images_of_many_requests_do_not_keep_small_ones_waiting() -> None:
    """A flood of the largest that are taken, by processes: what is small has its decoder at once."""
    flood = encode(Image.new("1", (8000, 6000)))
    small = encode(np.full((9, 9, 3), 7, np.uint8))
    with BatchingClassifier(FakeClassifier(), decode_threads=2, isolated=True) as batching:
        floods = [batching.submit(flood) for _ in range(8)]
        assert labels(batching.submit_many([small] * 5)) == [7] * 5
        assert not floods[-1].done()
        for one in floods:
            one.cancel()
