"""Which images the queue accepts: of each client up to its share (shares.py), and none whose deadline can't be met.

Shares are those of the places in the queue and of the work of decoding, which is counted in pixels: by header, scans
and boxes, or as many as usually take as long as the images of its client took. An image of more than LARGE_PIXELS of
work is large, and so is each of a slow client, one of whose images took as long without being large. A client that has
nothing in the queue may take all that is free.

Clients take turns, and so do the requests of a client. So the estimate of a request's waiting time counts, of each
other request of its client, at most as many images as it has itself, and of each other client at most as many as come
before of its own. It is the slower one of two stages: encoding, and decoding of images of the same kind (large or not).
No client has all decoders (queue.py), so the other client with the most work to decode does not delay it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from iosr_fast.exceptions import QueueFullError
from iosr_fast.images.limits import DecodeLimits
from iosr_fast.serving.batching.item import LARGE_PIXELS, Item
from iosr_fast.serving.shares import Shares

PIXELS_PER_S = 100_000_000  # that a decoder decodes; a first estimate
_MOST_WORK = int(DecodeLimits.timeout_s * PIXELS_PER_S)  # an estimate: by default no decoding goes on for longer
# An image that takes as long (LARGE_PIXELS of WebP do) makes its client slow, for so many times as long as it took.
_SLOW_S, _SLOW_TIMES = 0.5, 60
_BACKLOG_S = 60  # of decoding that may wait for each decoder
_NEWEST, _MAX_SLOWDOWN = 0.25, 4.0  # weight of the newest measurement; its largest ratio to the estimate
_MARGIN = 1.5  # an image whose estimate only just meets its deadline is refused
_LEAST_RETRY_S = 0.01
_NOTHING = (0.0, 0.0, 0.0)
_PATIENCE, _PATIENCE_S = 4.0, 10.0  # longest deadlines: this multiple of the estimate, and at least these seconds
_MAX_CLIENTS = 1000  # whose decoding times are remembered

Load: TypeAlias = tuple[float, ...]  # no array: three numbers are counted several times for each image


class Admission:
    """Counts and estimates, without a lock or a clock: times are those of Item. `runs` batches are encoded at once.

    What is counted are loads: images, and the work of decoding those that are not large and those that are.
    """

    def __init__(self, max_queue: int, decoders: int, runs: int) -> None:
        self.runs, self._decoders = runs, decoders
        backlog = _BACKLOG_S * PIXELS_PER_S * decoders
        self._shares = Shares(max_queue), Shares(backlog), Shares(backlog)
        self._requests: dict[str, dict[int, Load]] = {}  # the load of each request, by its client
        self._encode_s = 0.0  # of an image in a batch
        self._slow_until: dict[str, float] = {}  # of slow clients
        # Of an image, by its client and whether it is large, the newest last.
        self._decode_s: OrderedDict[tuple[str, bool], float] = OrderedDict()

    @property
    def images(self) -> int:
        """How many are accepted and not answered."""
        return int(self._shares[0].used)

    def check_room(self, client: str, items: Sequence[Item] = ()) -> None:
        """Raise QueueFullError if `items`, or one image, would exceed the queue or the share of their client."""
        load = _sum(map(_load, items)) if items else (1.0, 0.0, 0.0)
        places = self._shares[0]
        if places.used + load[0] > places.limit:
            waiting = f"{self.images} images wait, {load[0]:.0f} more came, max_queue is {places.limit}"
            raise self._full(None, f"the queue is full: {waiting}")
        for kind, shares, more in zip(("images", *["pixels to decode"] * 2), self._shares, load, strict=True):
            if client and more and places.held(client) and not shares.fits(client, more):
                held = f"{shares.held(client):.0f} {kind} wait, {more:.0f} more came"
                raise self._full(client, f"this client's share of the queue is full: {held}")

    def accept(self, items: Sequence[Item], deadline_s: float | None) -> None:
        """Count the items of one request and bound their deadlines. Raises QueueFullError for one that can't be met."""
        ahead = self.images
        for item in items:
            self.add(item)
        estimate_s = _MARGIN * self._estimate_s(items[0].client, items[0].request) if items else 0.0
        # Always admit when the queue is empty, so that one slow batch does not block admission forever.
        if deadline_s is not None and estimate_s > deadline_s and ahead:
            for item in items:
                self.remove(item)
            retry_s = max(_LEAST_RETRY_S, estimate_s - deadline_s)
            raise QueueFullError(
                f"expected an answer within {deadline_s:.3g} s, but it would take about {estimate_s:.3g} s with "
                f"{ahead} images ahead; try again in {retry_s:.2g} s",
                retry_s,
            )
        if deadline_s is not None:  # an image that waits for much longer than estimated would keep its place in vain
            longest_s = max(_PATIENCE_S, _PATIENCE * estimate_s)
            for item in items:
                item.deadline = item.submitted + min(deadline_s, longest_s)

    def judge(self, parts: Sequence[Item], work: int) -> None:
        """Share their decoding_work, or what their client's last images took, among the parts of a picture."""
        client = parts[0].client
        large = work > LARGE_PIXELS or parts[0].submitted < self._slow_until.get(client, 0.0)
        usual = int(PIXELS_PER_S * self._decode_s.get((client, large), 0.0))
        for part in parts:
            part.work, part.large = max(min(work, _MOST_WORK), usual) // len(parts), large

    def make_large(self, item: Item) -> None:
        self._count(item, (0.0, -float(item.work), float(item.work)))
        item.large = True

    def add(self, item: Item) -> None:
        self._count(item, _load(item))

    def drop_work(self, item: Item) -> None:
        """Take back the work of an item that needs no decoder any more."""
        _, ordinary, large = _load(item)
        self._count(item, (0.0, -ordinary, -large))
        item.work = 0

    def remove(self, item: Item) -> None:
        """Take back an item that leaves the queue."""
        self.drop_work(item)
        self._count(item, (-1.0, 0.0, 0.0))

    def measure_decoding(self, item: Item, seconds: float, now: float) -> bool:
        """Note what a picture took, by its first item. Returns whether this makes its client slow."""
        key = item.client, item.large
        self._decode_s[key] = _towards(self._decode_s.get(key, 0.0), seconds)
        self._decode_s.move_to_end(key)
        if len(self._decode_s) > _MAX_CLIENTS:
            self._decode_s.popitem(last=False)
        slow = bool(item.client) and not item.large and seconds >= _SLOW_S
        if slow:
            self._slow_until = {client: until for client, until in self._slow_until.items() if until > now}
            self._slow_until[item.client] = now + _SLOW_TIMES * seconds
        return slow

    def measure_batch(self, seconds: float, images: int) -> None:
        self._encode_s = _towards(self._encode_s, seconds / images)

    def _count(self, item: Item, load: Load) -> None:
        for shares, amount in zip(self._shares, load, strict=True):
            shares.add(item.client, amount)
        requests = self._requests.setdefault(item.client, {})
        requests[item.request] = _sum((requests.get(item.request, _NOTHING), load))
        if not requests[item.request][0]:
            del requests[item.request]
        if not requests:
            del self._requests[item.client]

    def _full(self, client: str | None, message: str) -> QueueFullError:
        retry_s = max(_LEAST_RETRY_S, self._estimate_s(client))
        return QueueFullError(f"{message}; try again in {retry_s:.2g} s", retry_s)

    def _estimate_s(self, client: str | None, request: int | None = None) -> float:
        """Seconds until a request is answered, by turns; None: all that its client holds, or of client None, all."""
        requests = {} if client is None else self._requests.get(client, {})
        asked = _sum((_NOTHING, *requests.values())) if request is None else requests[request]
        own = _sum((_NOTHING, *_by_turns(requests.values(), asked[0])))
        others = [tuple(one.held(other) for one in self._shares) for other in self._requests if other != client]
        parts = _by_turns(others, math.inf if client is None else own[0])
        images, ordinary, large = _sum((own, *parts))
        encoding_s = images * self._encode_s / self.runs
        if self._decoders == 1:
            return max(encoding_s, (ordinary + large) / PIXELS_PER_S)
        if client is not None:
            ordinary -= max((part[1] for part in parts), default=0.0)
            large -= max((part[2] for part in parts), default=0.0) if self._decoders > 2 else 0.0
        if not asked[2]:  # it waits for no large image, but with two decoders for one of its client in its turn
            large = own[2] if self._decoders == 2 else 0.0
        return max(encoding_s, max(ordinary, large) / PIXELS_PER_S / (self._decoders - 1))


def _by_turns(loads: Iterable[Load], images: float) -> list[Load]:
    """What of each load comes before the last of so many images, if one image of each has its turn."""
    parts = ((min(1.0, images / load[0]), load) for load in loads)
    return [(part * load[0], part * load[1], part * load[2]) for part, load in parts]


def _load(item: Item) -> Load:
    return (1.0, 0.0, float(item.work)) if item.large else (1.0, float(item.work), 0.0)


def _sum(loads: Iterable[Load]) -> Load:
    return tuple(map(sum, zip(*loads, strict=True)))


def _towards(estimate: float, measured: float) -> float:
    if not estimate:
        return measured
    # One image that takes seconds says little about the next ones.
    return estimate + _NEWEST * (min(measured, _MAX_SLOWDOWN * estimate) - estimate)
