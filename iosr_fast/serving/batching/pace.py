"""How long an image takes while there is work, to refuse those whose deadline can't be kept."""

from __future__ import annotations

import math

_NEWEST = 0.25  # weight of the newest batch
_MOST_SLOWER = 4.0  # than measured before, for one batch
# Refuse an image whose estimate only just meets its deadline: accepted images must be answered in time.
_MARGIN = 1.5


class Pace:
    """`item_s`: seconds an image, from decoding to answer; 0 before the first batch."""

    def __init__(self) -> None:
        self.item_s = 0.0
        self._last_done = -math.inf

    def done(self, now: float) -> None:
        """A batch that says nothing of the pace has ended."""
        self._last_done = now

    def measure(self, now: float, submitted: float, count: int) -> None:
        """A batch of `count` images has ended, the first of which came at `submitted`."""
        # From when there was work to do, so decoding counts where encoding waits for it.
        item_s = (now - max(self._last_done, submitted)) / count
        if self.item_s:  # one picture that takes seconds to decode says little about those behind it
            item_s = min(item_s, _MOST_SLOWER * self.item_s)
        self.item_s += (item_s - self.item_s) * (_NEWEST if self.item_s else 1.0)
        self._last_done = now

    def wait_s(self, count: int) -> float:
        """How long `count` images may take."""
        return _MARGIN * count * self.item_s
