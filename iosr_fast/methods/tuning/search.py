"""The exact search for alpha: the alphas at which a sample is right, and the one at which most samples are right.

Tip-Adapter's public code (Zhang et al., ECCV 2022) tries a grid of alphas. None is needed: a sample with logits
z + alpha * s is right on one interval of alphas, so the best alpha lies where most intervals overlap. `intervals` and
`cache_intervals` find the intervals, `sweep` the best alpha. Samples are processed in chunks, so that memory stays
bounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from iosr_fast.methods.method import ROUNDING

# Bits of the flags of an interval.
LOWER_OPEN = 1
UPPER_OPEN = 2
EMPTY = 4

# Elements of the arrays of a chunk of samples: a few arrays of 8 MB each.
_CHUNK = 1 << 20

Rows = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False)
class Intervals:
    """The alphas in [0, inf) at which each of V samples is right, in each of S settings.

    lower, upper (S, V) float64; upper is inf if nothing bounds it
    flags        (S, V) uint8: LOWER_OPEN and UPPER_OPEN if an end does not belong to the interval, EMPTY if no alpha
                 makes the sample right (the ends then have no meaning)
    """

    lower: np.ndarray
    upper: np.ndarray
    flags: np.ndarray

    @property
    def n_samples(self) -> int:
        """V."""
        return int(self.lower.shape[1])

    def only(self, rows: np.ndarray) -> Intervals:
        """The intervals of some samples, `rows` a mask (V,) or indices."""
        return Intervals(self.lower[:, rows], self.upper[:, rows], self.flags[:, rows])

    @staticmethod
    def concatenate(parts: Sequence[Intervals], axis: int = 1) -> Intervals:
        """The samples of several parts (folds) side by side; with axis=0 their settings below one another."""
        lower, upper, flags = (
            np.concatenate([getattr(part, name) for part in parts], axis) for name in ("lower", "upper", "flags")
        )
        return Intervals(lower, upper, flags)


@dataclass(frozen=True, eq=False)
class Best:
    """The best alpha of each of S settings: the middle of the widest plateau of the number of right samples.

    alpha, low, high  (S,) float64; the plateau reaches from low to high, which are equal if it is a single point
    right             (S,) int64, the number of right samples on the plateau
    low_included, high_included  (S,) bool, whether an end belongs to the plateau
    """

    alpha: np.ndarray
    low: np.ndarray
    high: np.ndarray
    right: np.ndarray
    low_included: np.ndarray
    high_included: np.ndarray


def intervals(base: np.ndarray, slope: np.ndarray, labels: np.ndarray) -> Intervals:
    """The alphas >= 0 at which argmax over c of base[v, c] + alpha * slope[v, c] is labels[v]; S = 1.

    The first of equal logits wins, as in np.argmax. With y = labels[v], d = slope[y] - slope[c] and
    e = base[c] - base[y], each other class c requires
        alpha >= e / d  if d > 0,    alpha <= e / d  if d < 0,    e <= 0  if d == 0,
    without the bound itself if c < y. Differences and quotients are taken in float64. If e != 0, slopes that differ by
    no more than 64 roundings of float32 count as equal (d = 0): only a huge alpha lets such a difference outweigh e,
    and whether it does is noise.

    base, slope (V, C) float32; labels (V,) integers in [0, C).
    """
    rows = _empty_rows(1, len(labels))
    for part in _chunks(*base.shape):
        bounds = _bounds(base[part].astype(np.float64), slope[part].astype(np.float64), labels[part])
        for out, row in zip(rows, bounds, strict=True):
            out[0, part] = row
    return Intervals(*rows)


def cache_intervals(
    base: np.ndarray,
    query: np.ndarray,
    keys: np.ndarray,
    class_offsets: np.ndarray,
    labels: np.ndarray,
    betas: Sequence[float],
    weights: np.ndarray | None = None,
    extra: np.ndarray | None = None,
    gammas: Sequence[float] = (0.0,),
) -> Intervals:
    """intervals() for a cache at K betas and G gammas at once; setting k * G + g has betas[k] and gammas[g].

    slope[v, c] = sum over keys j of class c: weights[k, j] * exp(-betas[k] * (1 - <query[v], keys[j]>))
    base[v, c] + gammas[g] * extra[v, c] takes the place of base[v, c]

    Equals intervals() of these without holding the (V, N) affinity: the product of queries and keys is computed once
    for all betas, chunk by chunk.

    base, extra    (V, C) float32
    query, keys    (V, D) and (N, D) float32, unit rows, or zero where a reducer leaves nothing; keys sorted by class
    class_offsets  (C + 1,); class c owns keys[class_offsets[c]:class_offsets[c + 1]], which may be empty
    labels         (V,) integers in [0, C)
    weights        (K, N) float32; None for all ones
    """
    rows = _empty_rows(len(betas) * len(gammas), len(labels))
    # For an empty segment reduceat gives a[i] rather than 0, so only classes with keys are summed.
    classes = np.flatnonzero(np.diff(class_offsets))
    for part in _chunks(len(labels), max(len(keys), base.shape[1])):
        dots = query[part] @ keys.T
        dots -= np.float32(1.0)
        for k, beta in enumerate(betas):
            affinity = np.exp(dots * np.float32(beta))
            if weights is not None:
                affinity *= weights[k]
            slope = np.zeros((len(dots), base.shape[1]))
            slope[:, classes] = np.add.reduceat(affinity, class_offsets[classes], axis=1, dtype=np.float64)
            for g, gamma in enumerate(gammas):
                shifted = base[part].astype(np.float64)
                if extra is not None:
                    shifted += gamma * extra[part].astype(np.float64)
                for out, row in zip(rows, _bounds(shifted, slope, labels[part]), strict=True):
                    out[k * len(gammas) + g, part] = row
    return Intervals(*rows)


def sweep(intervals: Intervals) -> Best:
    """The alpha at which most samples are right, for each setting.

    The number of right samples is constant between neighbouring ends of intervals. The result is the middle of its
    widest plateau at the maximum (the first one of equals); a single point wins only if strictly more samples are right
    there than next to it. O(V log V) per setting.

    Alphas range from 0 to twice the largest finite end above 0 of the setting's intervals, or to 2 without one, so that
    an unbounded plateau has a middle. If no sample is right at any alpha, the whole range is the plateau.
    """
    settings = [_sweep(*rows) for rows in zip(intervals.lower, intervals.upper, intervals.flags, strict=True)]
    low, high, right, low_included, high_included = (np.array(column) for column in zip(*settings, strict=True))
    return Best(low + (high - low) / 2, low, high, right, low_included, high_included)


def _chunks(n_samples: int, width: int) -> Iterator[slice]:
    step = max(1, _CHUNK // max(1, width))
    for begin in range(0, n_samples, step):
        yield slice(begin, min(begin + step, n_samples))


def _empty_rows(*shape: int) -> Rows:
    return np.empty(shape), np.empty(shape), np.empty(shape, dtype=np.uint8)


def _bounds(base: np.ndarray, slope: np.ndarray, labels: np.ndarray) -> Rows:
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
    return lower, upper, flags.astype(np.uint8)


# A position on the axis of alphas: twice the bits of v for the point v, and one more for just after it. (Numbers >= 0
# sort like their bits.) An interval covers the positions from its start to before its end.
def _position(alpha: np.ndarray, after: np.ndarray | bool) -> np.ndarray:
    bits: np.ndarray = np.ascontiguousarray(alpha, dtype=np.float64).view(np.uint64)
    return (bits << np.uint64(1)) | np.asarray(after, dtype=np.uint64)


def _alpha(positions: np.ndarray) -> np.ndarray:
    return (positions >> np.uint64(1)).view(np.float64)


def _domain(lower: np.ndarray, upper: np.ndarray, flags: np.ndarray) -> Rows:
    """The largest alpha that is considered (1,), and the start and end positions of the non-empty intervals."""
    some = (flags & EMPTY) == 0
    ends = np.concatenate([lower[some], upper[some]])
    ends = ends[(ends > 0) & (ends < np.inf)]
    alpha_max = min(2.0 * float(ends.max()), float(np.finfo(np.float64).max)) if len(ends) else 2.0
    some &= (lower <= alpha_max) & (upper >= 0)
    lower, upper, flags = lower[some], upper[some], flags[some]
    starts = _position(np.maximum(lower, 0.0) + 0.0, (lower >= 0) & ((flags & LOWER_OPEN) != 0))
    ends = _position(np.minimum(upper, alpha_max) + 0.0, (upper > alpha_max) | ((flags & UPPER_OPEN) == 0))
    some = starts < ends
    return np.array([alpha_max]), starts[some], ends[some]


def _sweep(lower: np.ndarray, upper: np.ndarray, flags: np.ndarray) -> tuple[float, float, int, bool, bool]:
    """sweep() of one setting: low, high, right, low_included, high_included."""
    limit, starts, stops = _domain(lower, upper, flags)
    outer = np.concatenate([_position(np.zeros(1), False), _position(limit, True)])
    positions = np.unique(np.concatenate([outer, starts, stops]))
    counts = np.searchsorted(np.sort(starts), positions[:-1], "right")
    counts -= np.searchsorted(np.sort(stops), positions[:-1], "right")
    # If one interval ends where another begins, the count may stay the same and the plateau continues.
    changes = np.flatnonzero(np.diff(counts)) + 1
    firsts = np.concatenate([[0], changes])
    borders = positions[np.concatenate([firsts, [len(counts)]])]
    widths = np.where(counts[firsts] == counts.max(), np.diff(_alpha(borders)), -1.0)
    best = int(widths.argmax())
    low, high = _alpha(borders[best : best + 2])
    first, past = (int(border) & 1 for border in borders[best : best + 2])
    return float(low), float(high), int(counts.max()), not first, bool(past)
