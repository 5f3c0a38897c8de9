"""Images that wait, in the order in which they are served: clients take turns, and so do the requests of a client."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Container

from iosr_fast.serving.batching.item import Item


class Turns:
    """Items by client and request; those of the next client's next request come first. Not thread-safe."""

    def __init__(self) -> None:
        self._items: OrderedDict[tuple[str, int], deque[Item]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._items.values()))

    def put(self, item: Item) -> None:
        self._items.setdefault((item.client, item.request), deque()).append(item)

    def first(self, blocked: Container[str] = ()) -> Item | None:
        """The next item of a client that is not blocked."""
        return next((items[0] for (client, _), items in self._items.items() if client not in blocked), None)

    def take(self, item: Item) -> None:
        """Remove an item, which is the turn of its client and request."""
        self.discard(item)
        own = [key for key in self._items if key[0] == item.client]
        for key in sorted(own, key=lambda key: key[1] == item.request):  # its request becomes the last one
            self._items.move_to_end(key)

    def take_picture(self, item: Item) -> list[Item]:
        """Take an item with the other parts of its picture, in one turn; returns all."""
        parts = [one for one in self._items[item.client, item.request] if one.picture is item.picture]
        self.take(item)
        for part in parts:
            self.discard(part)
        return parts

    def leave(self, client: str) -> list[Item]:
        """Remove all items of a client; returns them."""
        keys = [key for key in self._items if key[0] == client]
        return [item for key in keys for item in self._items.pop(key)]

    def discard(self, item: Item) -> None:
        """Remove an item, if it is here."""
        key = item.client, item.request
        items = self._items.get(key, deque())
        if item in items:
            items.remove(item)
            if not items:
                del self._items[key]

    def clear(self) -> None:
        self._items.clear()
