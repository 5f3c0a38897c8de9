"""The exact search for alpha: the alphas at which a sample is right, and the one at which most samples are right.

Tip-Adapter's public code (Zhang et al., ECCV 2022) tries a grid of alphas. None is needed: a sample with logits
z + alpha * s is right on one interval of alphas, so the best alpha lies where most intervals overlap.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from iosr_fast.methods.log_loss import MAX_ALPHA
from iosr_fast.methods.support_set import ROUNDING

# Bits of the flags of an interval.
LOWER_OPEN = 1
UPPER_OPEN = 2
EMPTY = 4

# Elements of the arrays of a chunk of samples: a few arrays of 8 MB each.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Plateau:
    """The alphas from `low` to `high`, which are equal if it is a single point, at which `right` samples are right."""

    low: float
    high: float
    right: int

    @property
    def alpha(self) -> float:
        """The middle, the most robust choice."""
        return self.low + (self.high - self.low) / 2


@dataclass(frozen=True, eq=False)
class Intervals:
    """The alphas in [0, MAX_ALPHA] at which each of V samples is right.

    lower, upper (V,) float64; upper is inf if nothing bounds it
    flags        (V,) uint8: LOWER_OPEN and UPPER_OPEN if an end does not belong to the interval, EMPTY if no alpha
                 makes the sample right (the ends then have no meaning)
    """

    lower: np.ndarray
    upper: np.ndarray
    flags: np.ndarray

    def only(self, rows: np.ndarray) -> Intervals:
        """The intervals of some samples, `rows` a mask (V,) or indices."""
        return Intervals(self.lower[rows], self.upper[rows], self.flags[rows])

    def right_at(self, alpha: float) -> np.ndarray:
        """(V,) bool: which samples are right at this alpha."""
        after = (self.lower < alpha) | ((self.lower == alpha) & (self.flags & LOWER_OPEN == 0))
        before = (alpha < self.upper) | ((alpha == self.upper) & (self.flags & UPPER_OPEN == 0))
        right: np.ndarray = after & before & (self.flags & EMPTY == 0)
        return right

    def best(self) -> Plateau:
        """The alphas at which most samples are right: the widest plateau of the maximum, of equal ones the first.

        The number of right samples is constant between neighbouring ends of intervals. A single point wins only if
        strictly more samples are right there than next to it. O(V log V).

        Alphas range from 0 to twice the largest finite end above 0, or to 2 without one, so that an unbounded plateau
        has a middle. If no sample is right at any alpha, the whole range is the plateau.
        """
        limit, starts, stops = self._positions()
        outer = np.concatenate([_position(np.zeros(1), False), _position(limit, True)])
        positions = np.unique(np.concatenate([outer, starts, stops]))
        counts = np.searchsorted(np.sort(starts), positions[:-1], "right")
        counts -= np.searchsorted(np.sort(stops), positions[:-1], "right")
        # If one interval ends where another begins, the count may stay the same and the plateau continues.
        firsts = np.concatenate([[0], np.flatnonzero(np.diff(counts)) + 1])
        borders = positions[np.concatenate([firsts, [len(counts)]])]
        widths = np.where(counts[firsts] == counts.max(), np.diff(_alpha(borders)), -1.0)
        at = int(widths.argmax())
        low, high = _alpha(borders[at : at + 2]).tolist()
        return Plateau(low, high, int(counts.max()))

    def _positions(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The largest alpha that is considered (1,), and the start and end positions of the non-empty intervals."""
        some = (self.flags & EMPTY) == 0
        ends = np.concatenate([self.lower[some], self.upper[some]])
        ends = ends[(ends > 0) & (ends < np.inf)]
        limit = 2.0 * float(ends.max()) if len(ends) else 2.0
        lower, upper, flags = self.lower[some], self.upper[some], self.flags[some]
        starts = _position(lower, (flags & LOWER_OPEN) != 0)
        stops = _position(np.minimum(upper, limit), (upper > limit) | ((flags & UPPER_OPEN) == 0))
        some = starts < stops
        return np.array([limit]), starts[some], stops[some]


def intervals(base: np.ndarray, slope: np.ndarray, labels: np.ndarray) -> Intervals:
    """The alphas from 0 to MAX_ALPHA at which argmax over c of base[v, c] + alpha * slope[v, c] is labels[v].

    The first of equal logits wins, as in np.argmax. With y = labels[v], d = slope[y] - slope[c] and
    e = base[c] - base[y], each other class c requires
        alpha >= e / d  if d > 0,    alpha <= e / d  if d < 0,    e <= 0  if d == 0,
    without the bound itself if c < y. If e != 0, slopes that differ by no more than 64 roundings of float32, in which
    plans are executed, count as equal (d = 0): only a huge alpha lets such a difference outweigh e, and whether it does
    is noise. An end beyond MAX_ALPHA becomes infinite, an interval beyond it empty.

    base, slope (V, C); labels (V,) integers in [0, C). Samples are processed in chunks, so that memory stays bounded.

    >>> found = intervals(np.array([[0.0, 1.0], [2.0, 0.0]]), np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([0, 0]))
    >>> found.lower, found.upper, found.best().alpha
    (array([1., 0.]), array([inf,  2.]), 1.5)
    """
    step = max(1, _CHUNK // base.shape[1])
    chunks = (slice(first, first + step) for first in range(0, len(labels), step))
    parts = [_bounds(base[at].astype(np.float64), slope[at].astype(np.float64), labels[at]) for at in chunks]
    lower, upper, flags = (
        np.concatenate([np.zeros(0, kind), *(getattr(part, name) for part in parts)])
        for name, kind in (("lower", float), ("upper", float), ("flags", np.uint8))
    )
    return Intervals(
        lower, np.where(upper > MAX_ALPHA, np.inf, upper), np.where(lower > MAX_ALPHA, np.uint8(EMPTY), flags)
    )


def _bounds(base: np.ndarray, slope: np.ndarray, labels: np.ndarray) -> Intervals:
    """intervals() of one chunk, in float64. A sample beaten by a class of the same slope has lower = inf."""
    own = (np.arange(len(labels)), labels)
    e = base - base[own][:, None]
    own_slope = slope[own][:, None]
    d = own_slope - slope
    d[(np.abs(d) <= ROUNDING * (np.abs(own_slope) + np.abs(slope))) & (e != 0)] = 0.0
    strict = np.arange(base.shape[1]) < labels[:, None]
    beaten = (d == 0) & ((e > 0) | ((e == 0) & strict))
    with np.errstate(divide="ignore", invalid="ignore"):
        bound = e / d
    below = np.where(beaten, np.inf, np.where(d > 0, bound, -np.inf))
    above = np.where(d < 0, bound, np.inf)
    # The largest bounds that exclude themselves (strict) and that don't; an end is open if a strict one is the largest.
    lower_strict = np.where(strict, below, -np.inf).max(axis=1)
    lower = np.maximum(np.where(strict, -np.inf, below).max(axis=1), 0.0)
    upper_strict = np.where(strict, above, np.inf).min(axis=1)
    upper = np.where(strict, np.inf, above).min(axis=1)
    lower_open = lower_strict >= lower
    upper_open = (upper_strict <= upper) & (upper_strict < np.inf)
    lower = np.maximum(lower, lower_strict) + 0.0  # no -0
    upper = np.minimum(upper, upper_strict) + 0.0
    empty = (lower == np.inf) | (lower > upper) | ((lower == upper) & (lower_open | upper_open))
    flags = LOWER_OPEN * lower_open + UPPER_OPEN * upper_open + EMPTY * empty
    return Intervals(lower, upper, flags.astype(np.uint8))


# A position on the axis of alphas: twice the bits of v for the point v, and one more for just after it. (Numbers >= 0
# sort like their bits.) An interval covers the positions from its start to before its end.
def _position(alpha: np.ndarray, after: np.ndarray | bool) -> np.ndarray:
    bits: np.ndarray = np.ascontiguousarray(alpha, dtype=np.float64).view(np.uint64)
    return (bits << np.uint64(1)) | np.asarray(after, dtype=np.uint64)


def _alpha(positions: np.ndarray) -> np.ndarray:
    return (positions >> np.uint64(1)).view(np.float64)
