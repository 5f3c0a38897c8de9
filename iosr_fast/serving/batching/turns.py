"""Images that wait, in the order in which they are served: clients take turns, and so do the requests of a client."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Container

from iosr_fast.serving.batching.item import Item


class Turns:
    """Items by client and request; the first of the next client's next request comes first. Not thread-safe."""

    def __init__(self) -> None:
        self._clients: OrderedDict[str, OrderedDict[int, deque[Item]]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def put(self, item: Item) -> None:
        self._clients.setdefault(item.client, OrderedDict()).setdefault(item.request, deque()).append(item)
        self._count += 1

    def first(self, blocked: Container[str] = ()) -> Item | None:
        """The next item of a client that is not blocked."""
        for client, requests in self._clients.items():
            if client not in blocked:
                return next(iter(requests.values()))[0]
        return None

    def take(self, item: Item) -> None:
        """Remove an item, which is the turn of its client and request."""
        self.discard(item)
        requests = self._clients.get(item.client)
        if requests is not None:
            self._clients.move_to_end(item.client)
            if item.request in requests:
                requests.move_to_end(item.request)

    def pop(self) -> Item:
        """Take the first item."""
        item = self.first()
        assert item is not None
        self.take(item)
        return item

    def discard(self, item: Item) -> None:
        """Remove an item, if it is here."""
        requests = self._clients.get(item.client, OrderedDict())
        items = requests.get(item.request, deque())
        if item not in items:
            return
        items.remove(item)
        self._count -= 1
        if not items:
            del requests[item.request]
        if not requests:
            del self._clients[item.client]

    def clear(self) -> list[Item]:
        """Remove all items; returns them."""
        return [self.pop() for _ in range(len(self))]
