"""Clients take turns at decoders and in batches, hold their share of the queue, and can't deny it to others."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iosr_fast.exceptions import BadImageError, QueueFullError
from iosr_fast.images.crop import Box, Crop, Sharing
from iosr_fast.images.geometry import Geometry
from iosr_fast.serving.batching import BatchingClassifier, DecodeLimits
from iosr_fast.serving.batching.admission import Admission
from iosr_fast.serving.batching.item import LARGE_PIXELS, Item, Query
from iosr_fast.serving.batching.queue import BatchQueue
from tests.images.jpegs import jpeg, scan
from tests.pictures import encode
from tests.serving.batching_fakes import (
    PATIENCE_S,
    FakeClassifier,
    FakeEncoder,
    Watcher,
    labels,
    picture,
    to_decode,
    until,
)
from tests.serving.hostile_images import png

LARGE = 49_000_000
NINE = Box(0, 0, 9, 9)
SMALL = encode(np.full((9, 9, 3), 7, np.uint8))
MINUTE, USUAL = 60.0, 5.0  # deadlines


def items(client: str, count: int = 1, cost: int = 0, request: int = 0, name: str = "") -> list[Item]:
    query, encoder = Query(client=client), FakeEncoder()
    made = [Item(name or client, i, query, 0.0, request, cost=cost, encoder=encoder) for i in range(count)]
    for item in made:
        item.large = cost > LARGE_PIXELS
    return made


def parts_of(client: str, data: bytes, count: int, request: int = 0, box: Box = NINE) -> list[Item]:
    """Parts of one picture."""
    query, encoder = Query(client=client), FakeEncoder()
    parts = Sharing()([Crop(data, box)] * count)
    return [Item(part, i, query, 0.0, request, encoder=encoder) for i, part in enumerate(parts)]


def submit(admission: Admission, made: list[Item], deadline_s: float | None = MINUTE) -> list[Item]:
    for item in made:
        admission.judge([item], item.cost)
    admission.check_room(made[0].client, made)
    admission.accept(made, deadline_s)
    return made


def waiting(decoders: int, *requests: list[Item], room: int = 100 * LARGE) -> BatchQueue:
    """A queue without threads."""
    queue = BatchQueue(1, 8, 0.0, 256, decoders, room, None)
    for made in requests:
        queue.admit(made, None)
    return queue


def taken(queue: BatchQueue, count: int) -> list[Any]:
    return [queue.next_to_decode()[0] for _ in range(count)]


def names(jobs: list[Any]) -> str:
    return "".join(job.image for job in jobs)


def done(queue: BatchQueue, *jobs: Item, seconds: float = 0.0) -> None:
    for job in jobs:
        queue.decoded([job], [ValueError()], seconds)


# --- turns ---


def test_clients_and_their_requests_take_turns_at_decoding() -> None:
    queue = waiting(99, items("one", 3, name="a"), items("one", 2, request=1, name="b"), items("two", 2, name="c"))
    jobs = taken(queue, 3)
    queue.admit(items("three", name="d"), None)
    jobs += taken(queue, 4)
    assert names(jobs) == "acbcadb"


def test_parts_of_a_picture_have_a_place_each_and_one_turn_together() -> None:
    data = png(6000, 4000)
    parts = parts_of("one", data, 4)
    queue = waiting(99, parts, parts_of("one", data, 1, request=1), items("two", name="c"))
    assert queue.pending == 6
    assert parts[0].future.cancel() and queue.pending == 5
    jobs = [queue.next_to_decode() for _ in range(3)]
    assert sorted(map(len, jobs)) == [1, 1, 3] and parts[1:] in jobs, "the other request has its own turn"
    assert parts[2].future.cancel()
    queue.decoded(parts[1:], [picture(1), picture(2), BadImageError(None, 3, "outside")])
    assert isinstance(parts[3].future.exception(0), BadImageError) and queue.pending == 3
    assert queue.next_batch() == [parts[1]] and queue.pending == 3


@pytest.mark.parametrize("decoders", [2, 3, 8])
def test_large_images_leave_a_decoder_to_the_others(decoders: int) -> None:
    queue = waiting(decoders, *[items(f"L{i}", 1, LARGE, name="L") for i in range(decoders + 1)])
    large = taken(queue, decoders - 1)
    queue.admit(items("s", 3), None)
    for _ in range(3):  # one after another, by the decoder that is left
        (small,) = taken(queue, 1)
        assert small.image == "s" and queue.decoders_are_busy
        done(queue, small)
    done(queue, large[0])
    assert names(taken(queue, 1)) == "L"


def test_clients_whose_images_take_long_leave_a_decoder_to_the_others() -> None:
    """Whatever their headers say, and those that wait already, too."""
    queue = waiting(2, *[items(client, 3, name=client) for client in "ab"])
    done(queue, *taken(queue, 2), seconds=4.0)
    queue.admit(items("a", request=1), None)
    (slow,) = taken(queue, 1)
    assert slow.large and queue._decodable() is None
    queue.admit(items("honest"), None)
    assert names(taken(queue, 1)) == "honest"


@pytest.mark.parametrize(
    ("box", "count", "work"),
    [
        (NINE, 64, 6_000_000 + 63 * 9 * 9),
        (Box(0, 0, 3000, 2000), 64, 384_000_000),
        (Box(0, 0, 3000, 2000), 128, 400_000_000),  # decoding goes on for no more than 4 s
        (Box(0, 0, 1000, 1e9), 5, 6_000_000 + 4 * 3_000_000),  # as it would be in a picture that EXIF turns
        (Box(0.1, 0.1, 0.5, 0.5, relative=True), 6, 6_000_000 + 5 * 1500 * 1500),
        (Box(0, 0, 1, 2000), 4, 6_000_000 + 3 * 4 * 8000),  # its shorter side is resized to 4
    ],
)
def test_each_part_of_a_picture_is_work(box: Box, count: int, work: int) -> None:
    parts = parts_of("a", png(3000, 2000), count, box=box)
    waiting(2, parts)
    assert sum(part.work for part in parts) == pytest.approx(work, abs=count)
    assert {part.large for part in parts} == {work > LARGE_PIXELS}
    assert {part.cost for part in parts} == {6_000_000}, "which its memory follows from"


@pytest.mark.parametrize(("decoders", "cost", "most"), [(1, 0, 1), (2, 0, 1), (3, 0, 2), (3, LARGE, 1), (8, LARGE, 6)])
def test_a_client_leaves_decoders_to_the_others(decoders: int, cost: int, most: int) -> None:
    queue = waiting(decoders, items("a", 9, cost))
    own = taken(queue, most)
    assert queue._decodable() is None
    if decoders > 1:
        queue.admit(items("b", 1, cost if decoders > 2 else 0), None)
        assert names(taken(queue, 1)) == "b"
    done(queue, own[0])
    assert names(taken(queue, 1)) == "a"
    program = waiting(decoders, items("", decoders))
    assert len(taken(program, decoders)) == decoders, "the program itself has no share"


def test_one_decoder_alternates_between_large_images_and_others() -> None:
    queue = waiting(1, items("L", 3, LARGE), items("s", 3))
    got = ""
    for _ in range(6):
        (job,) = taken(queue, 1)
        got += job.image
        done(queue, job)
    assert got in ("LsLsLs", "sLsLsL")


def test_large_images_wait_for_memory_and_others_do_not() -> None:
    queue = waiting(8, items("L", 3, 40_000_000), items("s"), room=100_000_000)
    jobs = taken(queue, 3)
    assert names(jobs) == "LsL" and queue._decodable() is None
    done(queue, jobs[0])
    assert names(taken(queue, 1)) == "L"
    assert names(taken(waiting(2, items("L", 1, LARGE), room=10), 1)) == "L", "one beyond the room is decoded alone"


def test_clients_take_turns_in_batches() -> None:
    classifier = FakeClassifier()
    with BatchingClassifier(classifier, max_batch=4, decode_threads=1) as batching:
        with classifier.held(batching):
            many = batching.submit_many([picture(i) for i in range(1, 7)], client="many")
            lone = batching.submit(picture(9), client="lone")
        assert labels([lone, *many]) == [9, *range(1, 7)]
    assert classifier.encoder.batches[1] == [1, 9, 2, 3]


# --- shares ---


def test_a_client_fills_half_of_the_queue_and_two_a_third_each() -> None:
    admission = Admission(256, 2, 1)
    for client, share in (("a", 128), ("b", 64)):
        for _ in range(share):
            submit(admission, items(client))
        with pytest.raises(QueueFullError, match="this client's share of the queue is full") as refused:
            admission.check_room(client)
        assert refused.value.retry_after_s > 0
    submit(admission, items("newcomer", 64))
    submit(Admission(256, 2, 1), items("c", 256))  # an empty queue admits any request
    with pytest.raises(QueueFullError, match=r"the queue is full: \d+ images wait, 99 more came, max_queue is 256"):
        admission.check_room("other", items("other", 99))


def test_the_program_itself_may_fill_the_queue(classifier: FakeClassifier) -> None:
    watcher = Watcher()
    with BatchingClassifier(classifier, max_queue=4, decode_threads=1, observer=watcher) as batching:
        with classifier.held(batching):
            kept = batching.submit_many([picture(1), picture(2)])
            with pytest.raises(QueueFullError, match="3 images wait, 2 more came, max_queue is 4"):
                batching.submit_many([picture(3), picture(4)])
            batching.check_room()
            kept.append(batching.submit(picture(3)))
            with pytest.raises(QueueFullError):
                batching.check_room("any")
        assert labels(kept) == [1, 2, 3] and watcher.refused == ["full"] * 2 + ["full_before_body"]
        until(lambda: batching.pending == 0)
        assert labels(batching.submit_many([picture(5)] * 4)) == [5] * 4


def test_pixels_to_decode_have_shares_too() -> None:
    admission = Admission(256, 2, 1)
    submit(admission, items("a", 64, LARGE), None)
    with pytest.raises(QueueFullError, match="pixels to decode wait"):
        submit(admission, items("a", 64, LARGE), None)
    submit(admission, items("b", 32, LARGE), None)


def test_places_and_work_are_given_back() -> None:
    admission = Admission(4, 2, 1)
    for _ in range(3):
        made = submit(admission, items("a", 4, LARGE), None)
        admission.drop_work(made[0])
        for item in made:
            admission.remove(item)
    assert not admission.images and not admission._requests and not any(one._held for one in admission._shares)


# --- estimates ---


def measured(decoders: int = 2, encode_s: float = 0.03, **decode_s: float) -> Admission:
    admission = Admission(256, decoders, 2)
    admission.measure_batch(encode_s, 1)
    for client, seconds in decode_s.items():
        for item in items(client) * 30 + items(client, cost=LARGE) * 30:
            admission.measure_decoding(item, seconds, 0.0)
    return admission


@pytest.mark.parametrize("decoders", [2, 8])
@pytest.mark.parametrize("seconds", [0.01, 0.5, 4.0])
@pytest.mark.parametrize("cost", [0, LARGE])
def test_no_flood_of_one_client_refuses_another_clients_lone_image(decoders: int, seconds: float, cost: int) -> None:
    """Many or few images a request, long or short deadlines: what is accepted of them is accepted."""
    for count, deadline_s in ((64, MINUTE), (1, MINUTE), (7, USUAL), (128, None)):
        admission = measured(decoders, attacker=seconds, lone=0.02)
        for _ in range(300):
            with suppress(QueueFullError):
                submit(admission, items("attacker", count, cost), deadline_s)
        for cost_of_lone in (0, 3_000_000):
            admission.check_room("lone")
            (lone,) = submit(admission, items("lone", 1, cost_of_lone), USUAL)
            assert lone.deadline == USUAL
            admission.remove(lone)
        admission.check_room("newcomer")
        submit(admission, items("newcomer", 1, LARGE), 10.0)


@pytest.mark.parametrize("decoders", [1, 2, 8])
def test_a_form_of_large_images_refuses_no_other_request_of_its_client(decoders: int) -> None:
    """Requests of a client take turns: a small one waits for one image of the form, not for 64."""
    admission = measured(decoders)
    for large in items("a", 30, LARGE):
        admission.measure_decoding(large, 0.6, 0.0)
    form = submit(admission, items("a", 64, 50_000_000))
    (small,) = submit(admission, items("a", 1, 3_000_000, request=1), USUAL)
    assert small.deadline == USUAL and (small.work, form[0].work) == (3_000_000, 60_000_000)
    if decoders > 1:
        submit(admission, items("a", 1, LARGE, request=2), USUAL)
        with pytest.raises(QueueFullError, match="within 2 s"):
            submit(admission, items("a", 20, LARGE, request=3), 2.0)
    admission.remove(form[0])
    submit(admission, items("a", 1, 3_000_000, request=4), USUAL)
    if decoders > 2:  # one is left for images that are not large
        submit(admission, items("a", 20, 3_000_000, request=5), 2.0)


def test_a_deadline_that_can_not_be_met_is_refused() -> None:
    admission = measured(encode_s=2.0)
    submit(admission, items("a"), 0.1)  # an empty queue admits
    with pytest.raises(QueueFullError, match="within 1 s, but it would take about 3 s with 1 images ahead") as refused:
        submit(admission, items("a"), 1.0)
    assert refused.value.retry_after_s == pytest.approx(2.0) and admission.images == 1
    submit(admission, items("a"), 3.5)


def test_deadlines_are_bounded_by_the_estimate() -> None:
    admission = measured(encode_s=4.0)
    assert submit(admission, items("a"), MINUTE)[0].deadline == pytest.approx(12.0)  # 4 times 1.5 times 4 s / 2 runs
    assert submit(measured(), items("a"), MINUTE)[0].deadline == 10.0
    assert submit(measured(), items("a"), 2.0)[0].deadline == 2.0
    assert submit(measured(), items("a"), None)[0].deadline == float("inf")


def test_one_slow_image_does_not_refuse_the_next_ones() -> None:
    admission = measured(a=0.01)
    admission.measure_decoding(items("a")[0], 4.0, 0.0)
    admission.measure_batch(4.0, 1)
    submit(admission, items("a", 40), USUAL)
    submit(admission, items("a", 40), USUAL)


def test_a_client_is_slow_for_a_while() -> None:
    admission, late = Admission(256, 2, 1), items("a", 2)
    assert admission.measure_decoding(items("a")[0], 4.0, 10.0)
    late[0].submitted, late[1].submitted = 249.0, 251.0
    submit(admission, late)
    assert [item.large for item in late] == [True, False]


# --- with decoders ---


def test_a_flood_of_jpegs_of_many_scans_leaves_a_decoder_to_others() -> None:
    """Each takes many seconds for its 60,000 scans, without more pixels than others have."""
    flood = jpeg(0xC2, 2000, 2000, scan(1, 2, 3, band=(0, 0, 0)), *[scan(1, band=(1, 63, 0))] * 60_000)
    limits = DecodeLimits(timeout_s=PATIENCE_S)
    batching = BatchingClassifier(FakeClassifier(), decode_threads=2, isolated=True, limits=limits)
    floods = [batching.submit(flood, client=f"attacker {i % 4}") for i in range(8)]
    assert labels([batching.submit(SMALL, deadline_s=USUAL, client="lone")]) == [7]
    assert not any(one.done() for one in floods)
    batching.close(0.1)


@pytest.mark.parametrize("decoders", [1, 2])
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_a_flood_of_large_images_does_not_deny_service(decoders: int, kind: str) -> None:
    flood = encode(Image.new("RGB", (3000, 2000)), kind)
    limits = DecodeLimits(max_pixels=6_000_000, max_pixels_together=12_000_000)
    with BatchingClassifier(FakeClassifier(), decode_threads=decoders, isolated=True, limits=limits) as batching:
        floods: list[Any] = []
        for _ in range(20):
            for _ in range(4):
                try:
                    floods += batching.submit_many([flood] * 64, deadline_s=MINUTE, client="attacker")
                except QueueFullError as error:
                    assert error.retry_after_s > 0
            assert labels([batching.submit(SMALL, deadline_s=USUAL, client="lone")]) == [7]
        assert not floods[-1].done()
        for one in floods:
            one.cancel()


def test_cost_is_the_largest_picture_that_decoding_makes() -> None:
    assert to_decode(encode(Image.new("L", (640, 480))), Geometry(64)).cost == 640 * 480
    assert to_decode(png(1, 900), Geometry(224)).cost == 224 * 224 * 900  # its shorter side is resized to 224
    assert [to_decode(image, Geometry(64)).cost for image in (b"", b"abc", picture(1), "a.png")] == [0] * 4
