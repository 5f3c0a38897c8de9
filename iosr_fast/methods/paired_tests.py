"""Whether two classifiers differ beyond noise, by the same labelled images: `lost` of these are right by the first one
alone, `won` by the second one alone, and the others say nothing.

If both are equally good, lost ~ Binomial(lost + won, 1/2). `sign_test` is the exact chance of so many losses, for few
images; `is_level` is its normal approximation at two standard errors, a chance of 2.3%, for many candidates.
"""

from __future__ import annotations

from math import comb

import numpy as np


def lost_and_won(first: np.ndarray, second: np.ndarray) -> tuple[int, int]:
    """How many images only the first gets right, and how many only the second; both (V,) bool, which ones are right."""
    return int((first & ~second).sum()), int((second & ~first).sum())


def is_level(right: np.ndarray, best: np.ndarray) -> bool:
    """Whether `right` is as good as `best` within noise. Both are (V,) bool: the images that a candidate gets right.

    lost - won <= 2 sqrt(lost + won), the standard error of the difference being sqrt(lost + won).
    """
    lost, won = lost_and_won(best, right)
    return lost - won <= 2.0 * float(np.sqrt(lost + won))


def sign_test(lost: int, won: int) -> float:
    """P(X >= lost) for X ~ Binomial(lost + won, 1/2).

    >>> sign_test(1, 0), sign_test(3, 0), sign_test(2, 2)
    (0.5, 0.125, 0.6875)
    """
    n = lost + won
    return sum(comb(n, k) for k in range(lost, n + 1)) / 2**n
