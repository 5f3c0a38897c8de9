"""Which images the queue accepts: of each client up to its share (shares.py), and none whose deadline can't be met.

Shares are those of the places in the queue and of the work of decoding, which is counted in pixels: those of the image,
or as many as usually take as long as the images of its client took. A client that has nothing in the queue may take
all that is free.

Clients take turns. So the estimate of a client's waiting time counts, of each other client, at most as many images as
the client has itself. It is the slower one of two stages: encoding, and decoding of images of the same kind (large or
not). No client has all decoders (queue.py), so the other client with the most work to decode does not delay it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

from iosr_fast.exceptions import QueueFullError
from iosr_fast.serving.batching.item import Item
from iosr_fast.serving.shares import Shares

PIXELS_PER_S = 100_000_000  # that a decoder decodes; a first estimate
_BACKLOG_S = 60  # of decoding that may wait for each decoder
_NEWEST, _MAX_SLOWDOWN = 0.25, 4.0  # weight of the newest measurement; its largest ratio to the estimate
_MARGIN = 1.5  # an image whose estimate only just meets its deadline is refused
_LEAST_RETRY_S = 0.01
_PATIENCE, _PATIENCE_S = 4.0, 10.0  # longest deadlines: this multiple of the estimate, and at least these seconds
_MAX_CLIENTS = 1000  # whose decoding times are remembered


class Admission:
    """Counts and estimates, without a lock or a clock. `runs` batches are encoded at once."""

    def __init__(self, max_queue: int, decoders: int, runs: int) -> None:
        self.runs, self._decoders = runs, decoders
        self._places = Shares(max_queue)
        backlog = _BACKLOG_S * PIXELS_PER_S * decoders
        self._work = {False: Shares(backlog), True: Shares(backlog)}  # by whether images are large
        self._encode_s = 0.0  # of an image in a batch
        self._decode_s: OrderedDict[str, float] = OrderedDict()  # of an image of each client, the newest client last

    def check_room(self, client: str, items: Sequence[Item] = (), images: int = 1) -> None:
        """Raise QueueFullError if `items`, or so many images, would exceed the queue or the share of their client."""
        images, places = len(items) or images, self._places
        if places.used + images > places.limit:
            raise self._full(
                None,
                f"the queue is full: {places.used:.0f} images wait, {images} more came, max_queue is {places.limit}",
            )
        wanted = [("images", places, images)]
        wanted += [("pixels to decode", work, _work(items, large)) for large, work in self._work.items()]
        for kind, shares, more in wanted:
            if client and more and places.held(client) and not shares.fits(client, more):
                held = f"{shares.held(client):.0f} {kind} wait, {more} more came"
                raise self._full(client, f"this client's share of the queue is full: {held}")

    def accept(self, items: Sequence[Item], deadline_s: float | None) -> None:
        """Count the items of one request and bound their deadlines. Raises QueueFullError for one that can't be met."""
        ahead = self._places.used
        for item in items:
            self.add(item)
        estimate_s = _MARGIN * self._estimate_s(items[0].client) if items else 0.0
        # Always admit when the queue is empty, so that one slow batch does not block admission forever.
        if deadline_s is not None and estimate_s > deadline_s and ahead:
            for item in items:
                self.remove(item)
            retry_s = max(_LEAST_RETRY_S, estimate_s - deadline_s)
            raise QueueFullError(
                f"expected an answer within {deadline_s:.3g} s, but it would take about {estimate_s:.3g} s with "
                f"{ahead:.0f} images ahead; try again in {retry_s:.2g} s",
                retry_s,
            )
        if deadline_s is not None:  # an image that waits for much longer than estimated would keep its place in vain
            longest_s = max(_PATIENCE_S, _PATIENCE * estimate_s)
            for item in items:
                item.deadline = item.submitted + min(deadline_s, longest_s)

    def judge(self, item: Item) -> None:
        """Set the work of an item, by its header and its client's last images."""
        item.work = max(item.cost, int(PIXELS_PER_S * self._decode_s.get(item.client, 0.0)))

    def add(self, item: Item) -> None:
        self._places.add(item.client, 1)
        self._work[item.large].add(item.client, item.work)

    def drop_work(self, item: Item) -> None:
        """Take back the work of an item that needs no decoder any more."""
        self._work[item.large].give(item.client, item.work)
        item.work = 0

    def remove(self, item: Item) -> None:
        """Take back an item that leaves the queue."""
        self.drop_work(item)
        self._places.give(item.client, 1)

    def measure_decoding(self, client: str, seconds: float) -> None:
        """Record how long an image of `client` took."""
        self._decode_s[client] = _towards(self._decode_s.get(client, 0.0), seconds)
        self._decode_s.move_to_end(client)
        if len(self._decode_s) > _MAX_CLIENTS:
            self._decode_s.popitem(last=False)

    def measure_batch(self, seconds: float, images: int) -> None:
        """Record how long a batch took."""
        self._encode_s = _towards(self._encode_s, seconds / images)

    def _full(self, client: str | None, message: str) -> QueueFullError:
        retry_s = max(_LEAST_RETRY_S, self._estimate_s(client))
        return QueueFullError(f"{message}; try again in {retry_s:.2g} s", retry_s)

    def _estimate_s(self, client: str | None) -> float:
        """Seconds until all that a client holds is answered, if clients take turns; None: of all clients."""
        own = math.inf if client is None else self._places.held(client)
        images, pixels, most = 0.0, {False: 0.0, True: 0.0}, {False: 0.0, True: 0.0}
        for other, held in self._places.holders():
            part = min(1.0, own / held)
            images += part * held
            for large, work in self._work.items():
                pixels[large] += part * work.held(other)
                if client not in (None, other):
                    most[large] = max(most[large], part * work.held(other))
        encoding_s = images * self._encode_s / self.runs
        if self._decoders == 1:
            return max(encoding_s, sum(pixels.values()) / PIXELS_PER_S)
        pixels[False] -= most[False]
        pixels[True] -= most[True] if self._decoders > 2 else 0.0
        if client is None or not self._work[True].held(client):
            pixels[True] = 0.0
        return max(encoding_s, max(pixels.values()) / PIXELS_PER_S / (self._decoders - 1))


def _work(items: Sequence[Item], large: bool) -> int:
    return sum(item.work for item in items if item.large is large)


def _towards(estimate: float, measured: float) -> float:
    if not estimate:
        return measured
    # One image that takes seconds says little about the next ones.
    return estimate + _NEWEST * (min(measured, _MAX_SLOWDOWN * estimate) - estimate)
