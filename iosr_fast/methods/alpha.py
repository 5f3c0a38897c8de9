"""The exact search for alpha: the alphas at which a sample is right, and the one at which most samples are right.

Tip-Adapter's public code (Zhang et al., ECCV 2022) tries a grid of alphas. None is needed: a sample with logits
z + alpha * s is right on one interval of alphas, so the best alpha lies where most intervals overlap.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from iosr_fast.methods.log_loss import MAX_ALPHA
from iosr_fast.methods.support_set import ROUNDING, blocks

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
    """The alphas in [0, MAX_ALPHA] at which each of V samples is right, as positions (V,) uint64 on the axis of alphas.

    The position of the point v is twice the bits of the float64 v, and the next one lies just after v (numbers >= 0
    sort like their bits). An interval covers the positions from `start` to before `stop`, none where that is not later.
    """

    start: np.ndarray
    stop: np.ndarray

    def only(self, rows: np.ndarray) -> Intervals:
        """The intervals of some samples, `rows` a mask (V,) or indices."""
        return Intervals(self.start[rows], self.stop[rows])

    def right_at(self, alpha: float) -> np.ndarray:
        """(V,) bool: which samples are right at this alpha."""
        at = _position(alpha)
        return (self.start <= at) & (at < self.stop)

    def best(self) -> Plateau:
        """The alphas at which most samples are right: the widest plateau of the maximum, of equal ones the first.

        The number of right samples is constant between neighbouring ends of intervals. A single point wins only if
        strictly more samples are right there than next to it. O(V log V).

        Alphas range from 0 to twice the largest finite end above 0, or to 2 without one, so that an unbounded plateau
        has a middle. If no sample is right at any alpha, the whole range is the plateau.
        """
        some = self.only(self.start < self.stop)
        ends = _alpha(np.concatenate([some.start, some.stop]))
        ends = ends[(ends > 0) & (ends < np.inf)]
        limit = _position(2.0 * float(ends.max()) if len(ends) else 2.0, after=True)
        stops = np.minimum(some.stop, limit)
        positions = np.unique(np.concatenate([_position(0.0), limit, some.start, stops]))
        counts = np.searchsorted(np.sort(some.start), positions[:-1], "right")
        counts -= np.searchsorted(np.sort(stops), positions[:-1], "right")
        # If one interval ends where another begins, the count may stay the same and the plateau continues.
        firsts = np.concatenate([[0], np.flatnonzero(np.diff(counts)) + 1])
        borders = positions[np.concatenate([firsts, [len(counts)]])]
        widths = np.where(counts[firsts] == counts.max(), np.diff(_alpha(borders)), -1.0)
        at = int(widths.argmax())
        low, high = _alpha(borders[at : at + 2]).tolist()
        return Plateau(low, high, int(counts.max()))


def intervals(base: np.ndarray, slope: np.ndarray, labels: np.ndarray) -> Intervals:
    """The alphas from 0 to MAX_ALPHA at which argmax over c of base[v, c] + alpha * slope[v, c] is labels[v].

    The first of equal logits wins, as in np.argmax. With y = labels[v], d = slope[y] - slope[c] and
    e = base[c] - base[y], each other class c requires
        alpha >= e / d  if d > 0,    alpha <= e / d  if d < 0,    e <= 0  if d == 0,
    without the bound itself if c < y. If e != 0, slopes that differ by no more than 64 roundings of float32, in which
    plans are executed, count as equal (d = 0): only a huge alpha lets such a difference outweigh e, and whether it does
    is noise. An end beyond MAX_ALPHA becomes infinite, an interval beyond it empty.

    base, slope (V, C); labels (V,) integers in [0, C). Samples are processed in chunks, so that memory stays bounded.
    """
    start, stop = np.zeros((2, len(labels)), np.uint64)
    for at in blocks(len(labels), _CHUNK // base.shape[1]):
        start[at], stop[at] = _bounds(base[at].astype(np.float64), slope[at].astype(np.float64), labels[at])
    last = _position(MAX_ALPHA, after=True)
    nowhere = _position(np.inf, after=True)
    return Intervals(np.where(start > last, nowhere, start), np.where(stop > last, nowhere, stop))


def _bounds(base: np.ndarray, slope: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The positions where the intervals of a chunk start and stop, by the class that bounds each most."""
    of_label = (np.arange(len(labels)), labels)
    e = base - base[of_label][:, None]
    label_slope = slope[of_label][:, None]
    d = label_slope - slope
    d[(np.abs(d) <= ROUNDING * (np.abs(label_slope) + np.abs(slope))) & (e != 0)] = 0.0
    strict = np.arange(base.shape[1]) < labels[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        bound = e / d
    beaten = (d == 0) & ((e > 0) | ((e == 0) & strict))
    below = _position(np.where(beaten, np.inf, np.where(d > 0, bound, 0.0)), strict & ((bound >= 0) & (d > 0)))
    above = np.where(d < 0, _position(bound, ~strict), _position(np.inf, after=True))
    above[(d < 0) & (bound < 0)] = 0
    return below.max(1), above.min(1)


def _position(alpha: np.ndarray | float, after: np.ndarray | bool = False) -> np.ndarray:
    """The positions of alphas, (1,) of a number; of one below 0 that of 0."""
    bits: np.ndarray = (np.maximum(np.ascontiguousarray(alpha, np.float64), 0.0) + 0.0).view(np.uint64)
    return (bits << np.uint64(1)) | np.asarray(after, np.uint64)


def _alpha(positions: np.ndarray) -> np.ndarray:
    return (positions >> np.uint64(1)).view(np.float64)
