"""Fairness between clients: how much of something limited each may hold (Shares), and whose turn is next (Turns)."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, KeysView
from typing import Generic, TypeVar

T = TypeVar("T")


class Shares:
    """How much each client holds of `limit`, and whether it may take more. For one thread.

    A client may hold at most as much as is left free (dynamic thresholds; Choudhury and Hahne 1998): one client alone
    takes at most half of the limit, two a third each, n take 1 / (n + 1) each. So a new client always finds room.
    """

    def __init__(self, limit: float) -> None:
        self.limit, self.used = limit, 0.0
        self._held: dict[str, float] = {}

    def held(self, client: str) -> float:
        return self._held.get(client, 0.0)

    def fits(self, client: str, amount: float) -> bool:
        """Whether the client would hold no more than is left free after it takes `amount`."""
        return self.held(client) + amount <= self.limit - self.used - amount

    def take(self, client: str, amount: float) -> bool:
        """Take `amount`; False, with nothing taken, if it does not fit."""
        fits = self.fits(client, amount)
        if fits:
            self.add(client, amount)
        return fits

    def add(self, client: str, amount: float) -> None:
        """Take `amount`, whether it fits or not; a negative one is returned."""
        self.used += amount
        held = self._held.pop(client, 0.0) + amount
        if held > 0:
            self._held[client] = held


class Turns(Generic[T]):
    """What waits. Clients take turns, and so do the requests of a client; a request's own are served in order.

    `key` says of what client and request something is. For one thread.
    """

    def __init__(self, key: Callable[[T], tuple[str, int]]) -> None:
        self._key = key
        self._waiting: dict[str, dict[int, dict[T, None]]] = {}  # the next one first, at each level

    def __len__(self) -> int:
        return sum(len(request) for requests in self._waiting.values() for request in requests.values())

    @property
    def clients(self) -> KeysView[str]:
        return self._waiting.keys()

    def put(self, thing: T) -> None:
        client, request = self._key(thing)
        self._waiting.setdefault(client, {}).setdefault(request, {})[thing] = None

    def heads(self, blocked: Container[str] = ()) -> Iterator[T]:
        """The first of each request, in the order of turns, without those of blocked clients."""
        for client, requests in self._waiting.items():
            if client not in blocked:
                yield from (next(iter(request)) for request in requests.values())

    def request_of(self, thing: T) -> list[T]:
        """All that waits of its request, in order."""
        client, request = self._key(thing)
        return list(self._waiting[client][request])

    def take(self, *things: T) -> None:
        """Remove things of one request, which is then the last one of its client, and this the last of all."""
        self.discard(*things)
        client, request = self._key(things[0])
        if client in self._waiting:
            requests = self._waiting[client] = self._waiting.pop(client)
            if request in requests:
                requests[request] = requests.pop(request)

    def discard(self, *things: T) -> None:
        """Remove those that are here, without a turn."""
        for thing in things:
            client, request = self._key(thing)
            requests = self._waiting.get(client, {})
            waiting = requests.get(request, {})
            waiting.pop(thing, None)
            if not waiting:
                requests.pop(request, None)
            if not requests:
                self._waiting.pop(client, None)
