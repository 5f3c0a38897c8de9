"""The connections of a server by client: how many each one has, and whose request begins next."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass, field
from typing import Protocol

from iosr_fast.serving.fairness import Turns

_ALONE = 8  # requests of a client that is alone that begin together: those that come together share a batch
_BUSY = 0.5  # of the event loop's time that several clients may take together, whatever their shares
_NEWEST = 0.1  # weight of the newest measurement of what a request costs
_BURST_S = 0.005  # by which requests may begin too early: timers of an event loop count whole milliseconds


class Waiting(Protocol):
    """A connection, or one that is about to be made (listener.Newcomer)."""

    peer: str

    def begin(self) -> None:
        """Its turn has come."""

    def abort(self) -> None:
        """Close at once."""


@dataclass
class Peer:
    """The connections of one client, the oldest first."""

    all: dict[Waiting, None] = field(default_factory=dict)
    waiting: dict[Waiting, None] = field(default_factory=dict)  # for the client, or as newcomers
    due: float = 0.0  # when the next request is within the client's share


class Peers:
    """Clients take turns: each pass of the event loop begins one request, of the next client, or _ALONE of a lone one.

    Turns alone are not enough: each step of a request waits for a pass of the loop, and other threads for Python's
    lock. So while requests of n clients run or may begin, a request begins when its client has taken at most 1 / n of
    the loop's time, or all together at most half of it; the rest is idle. A client that is alone takes all of it. The
    cost of a request is a moving average. For one thread.
    """

    def __init__(self) -> None:
        self.count = 0  # of connections
        self._peers: dict[str, Peer] = {}
        self._ready = Turns(_turn)  # to begin a request
        self._running = Turns(_turn)  # with a whole request that is not answered
        self._due = 0.0  # when the next request is within what all may take together
        self._cost_s = 0.0  # of a request, in time of this thread
        self._cpu_s = time.thread_time()  # when the last one began
        self._handle: asyncio.Handle | None = None

    def add(self, connection: Waiting) -> Peer:
        peer = self._peers.setdefault(connection.peer, Peer())
        peer.all[connection] = None
        self.count += 1
        return peer

    def remove(self, connection: Waiting) -> None:
        """Forget a connection, unless this was done."""
        peer = self._peers.get(connection.peer)
        if peer is None or connection not in peer.all:
            return
        self.count -= 1
        for connections in (peer.all, peer.waiting):
            connections.pop(connection, None)
        for turns in (self._ready, self._running):
            turns.discard(connection)
        if not peer.all:
            del self._peers[connection.peer]

    def oldest_of_largest(self) -> Waiting:
        """Of the client with most connections the one that has waited for it longest, else its oldest one."""
        largest = max(self._peers.values(), key=lambda peer: (len(peer.all), len(peer.waiting) > 0))
        return next(iter(largest.waiting or largest.all))

    def runs(self, connection: Waiting) -> None:
        """Note that a connection has a whole request."""
        self._running.put(connection)

    def answered(self, connection: Waiting) -> None:
        """Note that it has none any more."""
        self._running.discard(connection)

    def put(self, connection: Waiting, loop: asyncio.AbstractEventLoop) -> None:
        """Call `begin` of a connection when its turn has come, unless it is removed before."""
        self._ready.put(connection)
        self._schedule(loop, 0.0)

    def _schedule(self, loop: asyncio.AbstractEventLoop, wait_s: float) -> None:
        if self._handle is not None:
            self._handle.cancel()
        later = loop.call_later(wait_s, self._begin_next, loop) if wait_s else loop.call_soon(self._begin_next, loop)
        self._handle = later

    def _begin_next(self, loop: asyncio.AbstractEventLoop) -> None:
        now, wait_s = loop.time(), math.inf
        for connection in self._ready.heads():
            alone = self._running.clients <= {connection.peer}
            due = min(self._peers[connection.peer].due, self._due)
            wait_s = min(wait_s, 0.0 if alone else max(0.0, due - now))
            if not wait_s:
                together = _ALONE if alone and len(self._ready.clients) == 1 else 1
                for one in self._ready.request_of(connection)[:together]:
                    self._begin(one, now)
                break
        if self._ready:
            self._schedule(loop, wait_s)

    def _begin(self, connection: Waiting, now: float) -> None:
        before_s, self._cpu_s = self._cpu_s, time.thread_time()
        self._cost_s += _NEWEST * (self._cpu_s - before_s - self._cost_s)
        peer, clients = self._peers[connection.peer], len(self._running.clients | self._ready.clients)
        peer.due = max(peer.due, now - _BURST_S) + self._cost_s * clients
        self._due = max(self._due, now - _BURST_S) + self._cost_s / _BUSY
        self._ready.take(connection)
        connection.begin()


def _turn(connection: Waiting) -> tuple[str, int]:
    return connection.peer, 0
