"""Shares of something limited that several clients hold: bytes of requests, images of a queue."""

from __future__ import annotations


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
