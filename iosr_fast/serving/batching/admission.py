"""Which images the queue accepts: of each client up to its share (fairness.py), and none whose deadline can't be met.

Shares are those of the places in the queue and of the pixels to decode (Item.work). A client that has nothing in the
queue may take all that is free, and is refused for no deadline: floods of others and slow batches never lock it out.

Clients take turns, so how fast a client's images are answered says how long its next ones wait, whatever others send.
The estimate of a request is the mean time between answers of its client, times the images that come before its last
one: its own, and of each other request of its client at most as many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from iosr_fast.exceptions import QueueFullError
from iosr_fast.serving.batching.item import PIXELS_PER_S, Item
from iosr_fast.serving.fairness import Shares
from iosr_fast.serving.limits import Deadlines

_NEWEST, _MAX_SLOWDOWN = 0.25, 4.0  # weight of the newest measurement; its largest ratio to the mean


@dataclass
class Backlog:
    """The images of a client that are accepted and not answered."""

    since: float  # the last answer, or the first image
    requests: Counter[int] = field(default_factory=Counter)  # images of each request
    image_s: float = 0.0  # mean time between answers; 0 before the first one

    @property
    def left_s(self) -> float:
        """Seconds until all are answered."""
        return self.image_s * self.requests.total()

    def estimate_s(self, images: int) -> float:
        """Seconds until another request of so many images is answered."""
        return self.image_s * (images + sum(min(images, held) for held in self.requests.values()))

    def measure(self, images: int, now: float) -> None:
        """Note that so many are answered."""
        measured_s, self.since = (now - self.since) / images, now
        if self.image_s:  # one image that takes seconds says little about the next ones
            measured_s = self.image_s + _NEWEST * (min(measured_s, _MAX_SLOWDOWN * self.image_s) - self.image_s)
        self.image_s = measured_s


class Admission:
    """Counts and estimates, without a lock or a clock."""

    def __init__(self, max_queue: int, decoders: int) -> None:
        self._places, self._pixels = Shares(max_queue), Shares(Deadlines.backlog_s * PIXELS_PER_S * decoders)
        self._backlogs: dict[str, Backlog] = {}

    def check_room(self, items: Sequence[Item]) -> None:
        """Raise QueueFullError if the items of a request exceed the queue or a share of their client."""
        client, count, places = items[0].client, len(items), self._places
        if places.used + count > places.limit:
            waiting = f"{places.used:.0f} images wait, {count} more came, max_queue is {places.limit}"
            left_s = max(backlog.left_s for backlog in self._backlogs.values())
            raise _refused(f"the queue is full: {waiting}", left_s)
        pixels = sum(item.work for item in items)
        for kind, shares, more in (("images", places, count), ("pixels to decode", self._pixels, pixels)):
            if client and more and places.held(client) and not shares.fits(client, more):
                held = f"{shares.held(client):.0f} {kind} wait, {more} more came"
                raise _refused(f"this client's share of the queue is full: {held}", self._backlogs[client].left_s)

    def check_deadline(self, items: Sequence[Item]) -> None:
        """Raise QueueFullError if the items of a request would be answered too late."""
        backlog, deadline_s = self._backlogs.get(items[0].client), items[0].query.deadline_s
        if backlog is None or deadline_s is None:
            return
        estimate_s = backlog.estimate_s(len(items))
        if estimate_s > deadline_s:
            raise _refused(
                f"expected an answer within {deadline_s:.3g} s, but it would take about {estimate_s:.3g} s with "
                f"{backlog.requests.total()} images ahead",
                estimate_s - deadline_s,
            )

    def add(self, item: Item) -> None:
        self._places.add(item.client, 1)
        self._pixels.add(item.client, item.work)
        self._backlogs.setdefault(item.client, Backlog(item.submitted)).requests[item.request] += 1

    def measure(self, items: Iterable[Item], now: float) -> None:
        """Note that accepted items are answered; before `remove`."""
        for client, count in Counter(item.client for item in items).items():
            self._backlogs[client].measure(count, now)

    def remove(self, item: Item) -> None:
        """Take back an item that leaves the queue."""
        self._places.add(item.client, -1)
        self._pixels.add(item.client, -item.work)
        requests = self._backlogs[item.client].requests
        requests[item.request] -= 1
        if not requests[item.request]:
            del requests[item.request]
        if not requests:
            del self._backlogs[item.client]


def _refused(message: str, retry_s: float) -> QueueFullError:
    retry_s = max(Deadlines.least_retry_s, retry_s)
    return QueueFullError(f"{message}; try again in {retry_s:.2g} s", retry_s)
