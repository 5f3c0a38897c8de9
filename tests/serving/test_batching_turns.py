"""Clients take turns at decoders and in batches, hold their share of the queue, and can't deny it to others."""

from __future__ import annotations

from collections.abc import Sequence
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


def items(
    client: str, count: int = 1, cost: int = 0, request: int = 0, deadline_s: float | None = None, now: float = 0.0
) -> list[Item]:
    query, encoder = Query(client=client, deadline_s=deadline_s), FakeEncoder()
    options: Any = {"encoder": encoder, "cost": cost, "work": cost, "large": cost > LARGE_PIXELS}
    return [Item(client, i, query, now, request, **options) for i in range(count)]


def parts_of(client: str, data: bytes, count: int, request: int = 0, box: Box = NINE) -> list[Item]:
    """Parts of one picture."""
    query, encoder = Query(client=client), FakeEncoder()
    parts = Sharing()([Crop(data, box)] * count)
    return [Item(part, i, query, 0.0, request, encoder=encoder) for i, part in enumerate(parts)]


def waiting(decoders: int, *requests: list[Item], room: int = 100 * LARGE) -> BatchQueue:
    """A queue without threads."""
    queue = BatchQueue(1, 8, 0.0, 256, decoders, room, None)
    for made in requests:
        queue.admit(made)
    return queue


def taken(queue: BatchQueue, count: int = 99) -> list[Item]:
    """The next ones to decode, as many as may begin."""
    return [queue.next_to_decode()[0] for _ in range(count) if queue._decodable() is not None]


def names(jobs: list[Item]) -> str:
    return "".join(job.client for job in jobs)


def done(queue: BatchQueue, *jobs: Item) -> None:
    for job in jobs:
        queue.decoded([job], [ValueError()])


# --- turns ---


def test_clients_and_their_requests_take_turns_at_decoding() -> None:
    queue = waiting(99, items("a", 3), items("a", 2, request=1), items("c", 2))
    jobs = taken(queue, 3)
    queue.admit(items("d"))
    jobs += taken(queue)
    assert names(jobs) == "acacadaa" and [job.request for job in jobs if job.client == "a"] == [0, 1, 0, 1, 0]


def test_parts_of_a_picture_have_a_place_each_and_one_turn_together() -> None:
    data = png(6000, 4000)
    parts = parts_of("one", data, 4)
    queue = waiting(99, parts, parts_of("one", data, 1, request=1), items("two"))
    assert queue.pending == 6
    assert parts[0].future.cancel() and queue.pending == 5
    jobs = [queue.next_to_decode() for _ in range(3)]
    assert sorted(map(len, jobs)) == [1, 1, 3] and parts[1:] in jobs, "the other request has its own turn"
    assert parts[2].future.cancel()
    queue.decoded(parts[1:], [picture(1), picture(2), BadImageError(None, 3, "outside")])
    assert isinstance(parts[3].future.exception(0), BadImageError) and queue.pending == 3
    assert queue.next_batch() == [parts[1]] and queue.pending == 3


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


def test_cost_is_the_largest_picture_that_decoding_makes() -> None:
    assert to_decode(encode(Image.new("L", (640, 480))), Geometry(64)).cost == 640 * 480
    assert to_decode(png(1, 900), Geometry(224)).cost == 224 * 224 * 900  # its shorter side is resized to 224
    assert [to_decode(image, Geometry(64)).cost for image in (b"", b"abc", picture(1), "a.png")] == [0] * 4


@pytest.mark.parametrize(("decoders", "most"), [(1, 1), (2, 1), (8, 7)])
@pytest.mark.parametrize("cost", [0, LARGE])
def test_a_client_leaves_a_decoder_to_others(decoders: int, most: int, cost: int) -> None:
    queue = waiting(decoders, items("a", 9, cost))
    own = taken(queue)
    assert names(own) == "a" * most
    queue.admit(items("b"))
    assert decoders == 1 or names(taken(queue)) == "b"
    done(queue, own[0])
    assert names(taken(queue, 1)) == "a"
    assert len(taken(waiting(decoders, items("", 9)))) >= decoders, "the program itself has no share"


@pytest.mark.parametrize("decoders", [2, 8])
def test_large_images_leave_a_decoder_to_the_others(decoders: int) -> None:
    queue = waiting(decoders, *[items(f"L{i}", 1, LARGE) for i in range(decoders + 1)])
    large = taken(queue)
    assert len(large) == decoders - 1
    queue.admit(items("s", 3))
    for _ in range(3):  # one after another, by the decoder that is left
        (small,) = taken(queue, 1)
        assert small.client == "s" and queue.decoders_are_busy
        done(queue, small)
    done(queue, large[0])
    assert names(taken(queue)).startswith("L")


def test_large_images_wait_for_memory_and_others_do_not() -> None:
    requests = items("a", 2, 40_000_000), items("b", 1, 90_000_000), items("c", 9, 20_000_000), items("s")
    queue = waiting(8, *requests, room=100_000_000)
    large, small = taken(queue)
    assert names([large, small]) == "as", "c, which fits, would have b wait again and again"
    done(queue, large)
    assert names(taken(queue)) == "b"
    assert names(taken(waiting(2, items("L", 1, LARGE), room=10))) == "L", "one beyond the room is decoded alone"


def test_clients_take_turns_in_batches() -> None:
    classifier = FakeClassifier()
    with BatchingClassifier(classifier, max_batch=4, decode_threads=1) as batching:
        with classifier.held(batching):
            many = batching.submit_many([picture(i) for i in range(1, 7)], client="many")
            lone = batching.submit(picture(9), client="lone")
        assert labels([lone, *many]) == [9, *range(1, 7)]
    assert classifier.encoder.batches[1] == [1, 9, 2, 3]


# --- shares and deadlines ---


def submit(admission: Admission, made: list[Item]) -> list[Item]:
    admission.check_room(made)
    admission.check_deadline(made)
    for item in made:
        admission.add(item)
    return made


def answer(admission: Admission, now: float, answered: Sequence[Item]) -> None:
    admission.measure(answered, now)
    for item in answered:
        admission.remove(item)


def test_a_client_fills_half_of_the_queue_and_two_a_third_each() -> None:
    admission = Admission(256, 2)
    for client, share in (("a", 128), ("b", 64)):
        for _ in range(share):
            submit(admission, items(client))
        with pytest.raises(QueueFullError, match="this client's share of the queue is full") as refused:
            submit(admission, items(client))
        assert refused.value.retry_after_s > 0
    submit(admission, items("newcomer", 64))
    submit(Admission(256, 2), items("c", 256))  # an empty queue admits any request


def test_pixels_to_decode_have_shares_too_which_are_given_back() -> None:
    admission = Admission(256, 2)
    made = submit(admission, items("a", 122, LARGE))
    with pytest.raises(QueueFullError, match="pixels to decode wait"):
        submit(admission, items("a", 1, LARGE))
    submit(admission, items("a"))
    submit(admission, items("b", 32, LARGE))
    answer(admission, 1.0, made)
    submit(admission, items("a", 32, LARGE))


def test_the_program_itself_may_fill_the_queue(classifier: FakeClassifier) -> None:
    watcher = Watcher()
    with BatchingClassifier(classifier, max_queue=4, decode_threads=1, observer=watcher) as batching:
        with classifier.held(batching):
            kept = batching.submit_many([picture(1), picture(2)])
            with pytest.raises(QueueFullError, match="3 images wait, 2 more came, max_queue is 4"):
                batching.submit_many([picture(3), picture(4)])
            kept.append(batching.submit(picture(3)))
            with pytest.raises(QueueFullError, match="the queue is full") as refused:
                batching.submit(picture(4), client="any")
            assert refused.value.retry_after_s > 0
        assert labels(kept) == [1, 2, 3] and watcher.refused == ["full"] * 3
        until(lambda: batching.pending == 0)
        assert labels(batching.submit_many([picture(5)] * 4)) == [5] * 4


def test_a_deadline_that_can_not_be_met_is_refused() -> None:
    """A client waits for as long as its images of late, those that it has now."""
    admission = Admission(256, 2)
    for start in (0.0, 1000.0):
        made = submit(admission, items("a", 4, now=start))
        answer(admission, start + 4.0, made[:2])
        submit(admission, items("a", request=1, deadline_s=4.1))
        others = submit(admission, items("a", request=2))  # without a deadline
        with pytest.raises(QueueFullError, match="about 12 s with 4 images ahead"):  # of them 1 or 2 of each request
            submit(admission, items("a", 2, request=3, deadline_s=11.9))
        answer(admission, start + 8.0, [*made[2:], *items("a", request=1), *others])


def test_no_flood_of_one_client_refuses_anothers_images() -> None:
    admission = Admission(256, 2)
    flood = submit(admission, items("attacker", 128, deadline_s=MINUTE))
    for number, item in enumerate(flood[:40]):
        answer(admission, 4.0 * number, [item])
        own = [submit(admission, items("other", request=i, deadline_s=USUAL))[0] for i in range(8)]
        for one in own:
            one.submitted = 4.0 * number
        answer(admission, 4.0 * number + 0.2, own)
    with pytest.raises(QueueFullError, match="answer within 60 s"):
        submit(admission, items("attacker", 40, request=1, deadline_s=MINUTE))


def test_one_slow_image_does_not_refuse_the_next_ones() -> None:
    admission = Admission(256, 2)
    made = submit(admission, items("a", 40))
    for number in range(9):
        answer(admission, 0.01 * number + (4.0 if number == 8 else 0.0), [made[number]])
    submit(admission, items("a", 40, request=1, deadline_s=USUAL))


def test_images_that_are_late_or_cancelled_are_no_answers(classifier: FakeClassifier) -> None:
    """They leave at once, and would promise the next ones an answer at once."""
    queue = waiting(9, items("a", 9))
    late = queue.next_to_decode()
    queue.decoded(late, [late[0].late(0.0)], late=True)
    (other,) = queue.next_to_decode()
    other.future.cancel()
    assert queue._admission._backlogs["a"].image_s == 0.0
    done(queue, *queue.next_to_decode())
    assert queue._admission._backlogs["a"].image_s > 0.0


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
