"""The estimated time per image under load, to refuse images whose deadline can't be met."""

from __future__ import annotations

import math

_NEWEST = 0.25  # weight of the newest batch
_MAX_SLOWDOWN = 4.0  # of one batch against the estimate
# An image whose estimate only just meets its deadline is refused, because accepted images must be answered in time.
_MARGIN = 1.5


class Pace:
    """`item_s`: seconds per image, from decoding to answer; 0 before the first batch."""

    def __init__(self) -> None:
        self.item_s = 0.0
        self._last_done = -math.inf

    def done(self, now: float) -> None:
        """Record the end of a batch whose time is not representative."""
        self._last_done = now

    def measure(self, now: float, submitted: float, count: int) -> None:
        """Record the end of a batch of `count` images, the first of which was submitted at `submitted`."""
        # From the moment when there was work, so that decoding counts if encoding waits for it.
        item_s = (now - max(self._last_done, submitted)) / count
        if self.item_s:  # one image that takes seconds to decode says little about the next ones
            item_s = min(item_s, _MAX_SLOWDOWN * self.item_s)
        self.item_s += (item_s - self.item_s) * (_NEWEST if self.item_s else 1.0)
        self._last_done = now

    def wait_s(self, count: int) -> float:
        """Upper estimate of the time for `count` images."""
        return _MARGIN * count * self.item_s
