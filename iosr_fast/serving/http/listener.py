"""Accepts connections faster than one client can open them, so that nobody waits behind those of another."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from functools import partial
from typing import Any

from iosr_fast.serving.http.addresses import client_of
from iosr_fast.serving.http.metrics import ClassifierMetrics
from iosr_fast.serving.http.turns import Peers
from iosr_fast.serving.limits import Deadlines, Limits


class Listener:
    """Takes connections from the kernel at once; each is made by `make`, and read, when its client's turn has come.

    Beyond `limit` connections, those that wait for their turn included, the client with most loses one: the one that
    has waited for it longest, else its oldest one. So nobody loses a connection to a client that has more. Where all
    connections of that client are busy, and the newest one is its own, this one is `surplus`.
    """

    def __init__(
        self, listening: socket.socket, make: Any, peers: Peers, limit: int, metrics: ClassifierMetrics
    ) -> None:
        self._listening, self._make, self._peers = listening, make, peers
        self._limit, self._metrics = limit, metrics
        self._loop = asyncio.get_running_loop()
        self._made: set[asyncio.Task[None]] = set()
        self._closed = False
        listening.setblocking(False)
        self._listen()

    def _listen(self) -> None:
        if not self._closed:
            self._loop.add_reader(self._listening, self._accept)

    def close(self) -> None:
        """Accept no more, and drop those whose turn has not come."""
        self._closed = True
        self._loop.remove_reader(self._listening)

    async def wait_closed(self) -> None:
        """Called by uvicorn after `close`."""

    def admit(self, newcomer: Newcomer) -> None:
        """Make a connection of one whose turn has come."""
        self._peers.remove(newcomer)
        if self._closed:
            newcomer.abort()
            return
        task = self._loop.create_task(self._connect(newcomer))
        self._made.add(task)
        task.add_done_callback(self._made.discard)

    async def _connect(self, newcomer: Newcomer) -> None:
        with contextlib.suppress(OSError):  # the client is gone
            newcomer.accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            make = partial(self._make, surplus=newcomer.surplus)
            _, made = await self._loop.connect_accepted_socket(make, newcomer.accepted)
            if self._closed:
                made.shutdown()

    def _accept(self) -> None:
        for _ in range(Limits.accepted_at_once):
            try:
                accepted, address = self._listening.accept()
            except (BlockingIOError, ConnectionError):
                return
            except OSError:
                self._metrics.on_error("accept_failed")
                self._loop.remove_reader(self._listening)
                self._loop.call_later(Deadlines.accept_pause_s, self._listen)
                return
            newcomer = Newcomer(self, accepted, client_of(address))
            self._peers.add(newcomer).waiting[newcomer] = None
            self._peers.put(newcomer, self._loop)
            while self._peers.count > self._limit and not newcomer.surplus:  # one, and those made since, if any
                oldest = self._peers.oldest_of_largest()
                newcomer.surplus = oldest is newcomer
                if not newcomer.surplus:
                    self._metrics.on_error("connection_dropped")
                    self._peers.remove(oldest)
                    oldest.abort()


class Newcomer:
    """An accepted connection, of which nothing is read before its client's turn."""

    def __init__(self, listener: Listener, accepted: socket.socket, peer: str) -> None:
        self.accepted, self.peer, self.surplus = accepted, peer, False
        self._listener = listener

    def begin(self) -> None:
        self._listener.admit(self)

    def abort(self) -> None:
        self.accepted.close()
