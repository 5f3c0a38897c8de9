"""Clients hold shares and take turns, at decoders, in batches and at the event loop: none keeps others out."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iosr_fast.exceptions import BadImageError, QueueFullError
from iosr_fast.images.crop import Box, Crop, Sharing
from iosr_fast.serving.batching import BatchingClassifier, DecodeLimits
from iosr_fast.serving.batching.admission import Admission
from iosr_fast.serving.batching.item import LARGE_PIXELS, Item, Query
from iosr_fast.serving.batching.queue import BatchQueue
from iosr_fast.serving.fairness import Shares, Turns
from iosr_fast.serving.http.turns import Peers
from tests.images.jpegs import jpeg, scan
from tests.pictures import encode
from tests.serving.batching_fakes import PATIENCE_S, FakeClassifier, FakeEncoder, Watcher, labels, picture
from tests.serving.hostile_images import png

Thing = tuple[str, int, int]  # of a client, its request, and a number
LARGE = 49_000_000
NINE = Box(0, 0, 9, 9)
SMALL = encode(np.full((9, 9, 3), 7, np.uint8))
MINUTE, USUAL = 60.0, 5.0  # deadlines
COST_S = 0.002  # of a request


@pytest.mark.parametrize("clients", [1, 2, 5, 20])
def test_clients_that_take_all_they_may_leave_as_much_to_the_next(clients: int) -> None:
    shares = Shares(1000)
    while sum(shares.take(str(client), 1) for client in range(clients)):
        pass
    fair = 1000 / (clients + 1)
    assert all(abs(shares.held(str(client)) - fair) < 3 for client in range(clients))
    assert shares.fits("another", fair / 2 - 3) and not shares.fits("another", fair / 2 + 3)
    for client in range(clients):
        shares.add(str(client), -shares.held(str(client)))
    assert shares.used == 0 and not shares._held


def test_clients_take_turns_and_so_do_their_requests() -> None:
    rng, turns = np.random.default_rng(0), Turns[Thing](lambda thing: thing[:2])
    sizes = {(client, request): int(rng.integers(1, 9)) for client in "abcd" for request in range(rng.integers(1, 5))}
    things = [(*key, number) for key, size in sizes.items() for number in range(size)]
    for thing in things:
        turns.put(thing)
    taken, left = list[Thing](), set(things)
    while turns:
        head = next(turns.heads())
        turns.take(head)
        taken.append(head)
        left.remove(head)
        assert len(turns) == len(left) and turns.clients == {client for client, *_ in left}
        clients, requests = Counter(client for client, *_ in taken), Counter(thing[:2] for thing in taken)
        assert max(clients.values()) - min((clients[client] for client in turns.clients), default=99) <= 1
        for client, request, number in left:
            assert max(requests[key] for key in sizes if key[0] == client) - requests[client, request] <= 1
            assert number >= requests[client, request], "in order"


# --- decoders and batches ---


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


def waiting(decoders: int, *requests: list[Item], room: int = 100 * LARGE, observer: Any = None) -> BatchQueue:
    """A queue without threads."""
    queue = BatchQueue(1, 8, 0.0, 256, decoders, room, observer)
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


def test_parts_of_a_picture_have_a_place_each_and_one_turn_together() -> None:
    data = png(6000, 4000)
    parts = parts_of("one", data, 4)
    queue = waiting(99, parts, parts_of("one", data, 1, request=1), items("two"))
    assert parts[0].future.cancel() and queue.pending == 5
    jobs = [queue.next_to_decode() for _ in range(3)]
    assert [(job[0].client, len(job)) for job in jobs] == [("one", 3), ("two", 1), ("one", 1)]
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
    assert {(part.large, part.cost) for part in parts} == {(work > LARGE_PIXELS, 6_000_000)}


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


# --- the queue ---


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


def test_places_and_pixels_have_shares_which_are_given_back() -> None:
    admission = Admission(256, 2)
    made = submit(admission, items("a", 122, LARGE))
    with pytest.raises(QueueFullError, match="pixels to decode wait"):
        submit(admission, items("a", 1, LARGE))
    made += submit(admission, items("a", 6))
    with pytest.raises(QueueFullError, match="this client's share of the queue is full: 128 images wait") as refused:
        submit(admission, items("a"))
    assert refused.value.retry_after_s > 0
    submit(admission, items("newcomer", 32, LARGE))
    answer(admission, 1.0, made)
    submit(admission, items("a", 32, LARGE))


def test_an_empty_queue_admits_any_request_and_the_program_may_fill_it() -> None:
    admission = Admission(256, 2)
    submit(admission, items("a", 200))
    submit(admission, items("", 55))
    with pytest.raises(QueueFullError, match="255 images wait, 2 more came, max_queue is 256") as refused:
        submit(admission, items("b", 2))
    assert refused.value.retry_after_s > 0
    submit(admission, items("b"))


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


def test_one_slow_image_does_not_refuse_the_next_ones() -> None:
    admission = Admission(256, 2)
    made = submit(admission, items("a", 40))
    for number in range(9):
        answer(admission, 0.01 * number + (4.0 if number == 8 else 0.0), [made[number]])
    submit(admission, items("a", 40, request=1, deadline_s=USUAL))


def test_images_that_are_late_or_cancelled_are_no_answers(watcher: Watcher) -> None:
    """They leave at once, and would promise the next ones an answer at once."""
    queue = waiting(9, items("a", 9), observer=watcher)
    late = queue.next_to_decode()
    queue.decoded(late, [late[0].late(0.0)], late=True)
    queue.next_to_decode()[0].future.cancel()
    queue.admit(items("a", request=1, deadline_s=USUAL))
    done(queue, *queue.next_to_decode())  # since time began
    queue.admit(items("b", request=2, deadline_s=USUAL))
    with pytest.raises(QueueFullError, match="an answer within 5 s"):
        queue.admit(items("a", request=3, deadline_s=USUAL))
    assert watcher.refused == ["deadline"]


def test_a_flood_of_jpegs_of_many_scans_leaves_a_decoder_to_others() -> None:
    """Each takes many seconds for its 60,000 scans, without more pixels than others have."""
    flood = jpeg(0xC2, 2000, 2000, scan(1, 2, 3, band=(0, 0, 0)), *[scan(1, band=(1, 63, 0))] * 60_000)
    limits = DecodeLimits(timeout_s=PATIENCE_S)
    batching = BatchingClassifier(FakeClassifier(), decode_threads=2, isolated=True, limits=limits)
    floods = [batching.submit(flood, client=f"attacker {i % 4}") for i in range(8)]
    assert labels([batching.submit(SMALL, deadline_s=USUAL, client="lone")]) == [7]
    assert not any(one.done() for one in floods)
    batching.close(0.1)


@pytest.mark.parametrize(("decoders", "kind"), [(1, "PNG"), (2, "WEBP")])
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


# --- the event loop ---


class Connection:
    """Begins requests again and again, which keep the loop's thread busy for COST_S; `begun` are so many."""

    def __init__(self, peers: Peers, peer: str) -> None:
        self.peer, self.begun, self._peers = peer, 0, peers
        peers.add(self)

    def ask(self) -> None:
        self._peers.put(self, asyncio.get_running_loop())

    def begin(self) -> None:
        until = time.thread_time() + COST_S
        while time.thread_time() < until:
            pass
        self.begun += 1
        self.ask()

    def abort(self) -> None:
        """Nobody calls it here."""


@pytest.mark.parametrize(("flooding", "beside"), [(1, 1), (1, 10), (3, 1), (1, 0)])
def test_clients_leave_the_loop_to_those_whose_requests_run(flooding: int, beside: int, monkeypatch) -> None:
    """Only upper bounds are checked, so a busy machine passes. A lone client never waits."""
    schedule, waits = Peers._schedule, list[float]()
    monkeypatch.setattr(Peers, "_schedule", lambda *given: waits.append(given[-1]) or schedule(*given))

    async def flood() -> list[float]:
        """Of the loop's time, what each client takes that always asks."""
        peers = Peers()
        many = [Connection(peers, f"flood {i}") for i in range(flooding) for _ in range(20)]
        for i in range(beside):
            peers.runs(Connection(peers, f"other {i}"))
        for one in many:
            one.ask()
        start = time.perf_counter()
        await asyncio.sleep(0.5)
        took = time.perf_counter() - start
        return [sum(one.begun for one in many if one.peer == f"flood {i}") * COST_S / took for i in range(flooding)]

    fair = 1 / (flooding + beside)
    assert all(0 < share < 1.2 * max(fair, 0.5 / flooding) + 0.02 for share in asyncio.run(flood()))
    assert waits and any(waits) == (beside > 0)


def test_what_is_removed_never_begins_and_leaves_nothing_behind() -> None:
    async def remove() -> None:
        peers = Peers()
        many = [Connection(peers, f"client {i % 3}") for i in range(9)]
        for one in many:
            one.ask()
            peers.runs(one)
        for one in many * 2:
            peers.remove(one)
        await asyncio.sleep(0.01)
        assert not any(one.begun for one in many)
        assert peers.count == 0 and not (peers._peers or peers._ready or peers._running)

    asyncio.run(remove())
