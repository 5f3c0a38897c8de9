"""The connections of a server by client: how many each one has, and whose request begins next."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Protocol

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
    ready: dict[Waiting, None] = field(default_factory=dict)  # to begin a request
    running: dict[Waiting, None] = field(default_factory=dict)  # with a whole request that is not answered
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
        self._turns: dict[str, None] = {}  # clients with requests that may begin, the next one first
        self._running: dict[str, None] = {}  # clients with requests that run
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
        self.answered(connection)
        self.count -= 1
        for kind in (peer.all, peer.waiting, peer.ready):
            kind.pop(connection, None)
        if not peer.ready:
            self._turns.pop(connection.peer, None)
        if not peer.all:
            del self._peers[connection.peer]

    def oldest_of_largest(self) -> Waiting:
        """Of the client with most connections the one that has waited for it longest, else its oldest one."""
        largest = max(self._peers.values(), key=lambda peer: (len(peer.all), len(peer.waiting) > 0))
        return next(iter(largest.waiting or largest.all))

    def runs(self, connection: Waiting) -> None:
        """Note that a connection has a whole request."""
        self._peers[connection.peer].running[connection] = None
        self._running[connection.peer] = None

    def answered(self, connection: Waiting) -> None:
        """Note that it has none any more."""
        peer = self._peers.get(connection.peer, Peer())
        if connection in peer.running:
            del peer.running[connection]
            if not peer.running:
                del self._running[connection.peer]

    def put(self, connection: Waiting, loop: asyncio.AbstractEventLoop) -> None:
        """Call `begin` of a connection when its turn has come, unless it is removed before."""
        self._peers[connection.peer].ready[connection] = None
        self._turns.setdefault(connection.peer)
        self._schedule(loop, 0.0)

    def _schedule(self, loop: asyncio.AbstractEventLoop, wait_s: float) -> None:
        if self._handle is not None:
            self._handle.cancel()
        later = loop.call_later(wait_s, self._begin_next, loop) if wait_s else loop.call_soon(self._begin_next, loop)
        self._handle = later

    def _begin_next(self, loop: asyncio.AbstractEventLoop) -> None:
        now, waits_s = loop.time(), list[float]()
        for name in self._turns:
            alone = self._running.keys() <= {name}
            waits_s.append(0.0 if alone else max(0.0, min(self._peers[name].due, self._due) - now))
            if not waits_s[-1]:
                for _ in range(_ALONE if alone and len(self._turns) == 1 else 1):
                    if name in self._turns:
                        self._begin(name, now)
                break
        if self._turns:
            self._schedule(loop, min(waits_s))

    def _begin(self, name: str, now: float) -> None:
        before_s, self._cpu_s = self._cpu_s, time.thread_time()
        self._cost_s += _NEWEST * (self._cpu_s - before_s - self._cost_s)
        peer, clients = self._peers[name], len(self._running.keys() | self._turns.keys())
        peer.due = max(peer.due, now - _BURST_S) + self._cost_s * clients
        self._due = max(self._due, now - _BURST_S) + self._cost_s / _BUSY
        del self._turns[name]
        connection = next(iter(peer.ready))
        del peer.ready[connection]
        if peer.ready:
            self._turns[name] = None
        connection.begin()
