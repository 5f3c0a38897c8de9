"""The queue in front of the decoders: fair between clients and their requests, with a bound on large images."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque

from iosr_fast.serving.batching.item import Item, WholeImage

LARGE_PIXELS = 16_000_000  # more than most phones send


Job = Item | WholeImage


class Turns:
    """A queue between threads. Clients take turns, an image each, and so do the requests of a client.

    Large images use at most all decoders but one, and at most `room` pixels together (a single one may have more). With
    one decoder, large and small images alternate.
    """

    def __init__(self, decoders: int, room: int) -> None:
        self._decoders, self._max_large, self._room = decoders, max(1, decoders - 1), room
        self._changed = threading.Condition()
        self._small, self._large = _Lane(), _Lane()
        self._running = 0  # images that are being decoded
        self._running_large = self._pixels = 0  # large ones among them
        self._large_was_last = False
        self._closed = False

    def put(self, job: Job) -> None:
        with self._changed:
            self._lane(job).put(job)
            self._changed.notify()

    def get(self) -> Job | None:
        """Wait for the next job; the caller must call `done` for it. None: closed."""
        with self._changed:
            while not self._closed:
                large = self._startable()
                if large or self._small:
                    return self._take(large and not (self._small and self._large_was_last))
                self._changed.wait()
            return None

    def done(self, job: Job) -> None:
        """Record that a job from `get` has ended."""
        with self._changed:
            self._running -= 1
            if job.cost > LARGE_PIXELS:
                self._running_large -= 1
                self._pixels -= job.cost
                self._changed.notify_all()

    def discard(self, job: Job) -> None:
        """Remove a job, if it still waits."""
        with self._changed:
            self._lane(job).discard(job)

    def close(self) -> list[Job]:
        """Wake all threads in `get`; returns the waiting jobs."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            return [*self._small.clear(), *self._large.clear()]

    @property
    def decoders_are_busy(self) -> bool:
        """Whether every decoder has an image, or an image waits."""
        return self._running >= self._decoders or bool(self._small or self._large)

    def _take(self, large: bool) -> Job:
        job = (self._large if large else self._small).pop()
        self._large_was_last = large
        self._running += 1
        if large:
            self._running_large += 1
            self._pixels += job.cost
        return job

    def _lane(self, job: Job) -> _Lane:
        return self._large if job.cost > LARGE_PIXELS else self._small

    def _startable(self) -> bool:
        if not self._large or self._running_large >= self._max_large:
            return False
        return not self._running_large or self._pixels + self._large.first().cost <= self._room


class _Lane:
    """Jobs by client and request; the next client and its next request come first."""

    def __init__(self) -> None:
        self._clients: OrderedDict[str, OrderedDict[int, deque[Job]]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._clients)

    def put(self, job: Job) -> None:
        self._clients.setdefault(job.client, OrderedDict()).setdefault(job.turn, deque()).append(job)

    def first(self) -> Job:
        requests = next(iter(self._clients.values()))
        return next(iter(requests.values()))[0]

    def pop(self) -> Job:
        job = self.first()
        self.discard(job)
        requests = self._clients.get(job.client)
        if requests is not None:
            self._clients.move_to_end(job.client)
            if job.turn in requests:
                requests.move_to_end(job.turn)
        return job

    def discard(self, job: Job) -> None:
        requests = self._clients.get(job.client)
        jobs = None if requests is None else requests.get(job.turn)
        if requests is None or jobs is None or job not in jobs:
            return
        jobs.remove(job)
        if not jobs:
            del requests[job.turn]
        if not requests:
            del self._clients[job.client]

    def clear(self) -> list[Job]:
        left = [job for requests in self._clients.values() for jobs in requests.values() for job in jobs]
        self._clients.clear()
        return left
