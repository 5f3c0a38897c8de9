"""How well a score separates two groups."""

from __future__ import annotations

import numpy as np


def auroc(higher: np.ndarray, lower: np.ndarray) -> float:
    """The probability that one of `higher` exceeds one of `lower` (ties count half): 1 at best, 0.5 by chance.

    >>> auroc(np.array([2.0, 3.0]), np.array([1.0, 2.0]))
    0.875
    """
    ordered = np.sort(lower)
    below = np.searchsorted(ordered, higher, side="left")
    up_to = np.searchsorted(ordered, higher, side="right")
    return float((below + up_to).mean() / 2 / len(ordered))
