"""The exact search for alpha in NumPy, used if the extension can't be imported, and as the reference in its tests.

search.py checks the arguments. Samples are processed in chunks, so that memory stays bounded.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from iosr_fast.methods.method import ROUNDING

# Bits of the flags of an interval.
LOWER_OPEN = 1
UPPER_OPEN = 2
EMPTY = 4

# Elements of the arrays of a chunk of samples: a few arrays of 8 MB each.
_CHUNK = 1 << 20

Rows = tuple[np.ndarray, np.ndarray, np.ndarray]


def _chunks(n_samples: int, width: int) -> Iterator[slice]:
    step = max(1, _CHUNK // max(1, width))
    for begin in range(0, n_samples, step):
        yield slice(begin, min(begin + step, n_samples))


def _empty_rows(*shape: int) -> Rows:
    return np.empty(shape), np.empty(shape), np.empty(shape, dtype=np.uint8)


def intervals(base: np.ndarray, slope: np.ndarray, labels: np.ndarray) -> Rows:
    """search.intervals: lower, upper and flags, (V,) each."""
    rows = _empty_rows(len(labels))
    for part in _chunks(*base.shape):
        bounds = _bounds(base[part].astype(np.float64), slope[part].astype(np.float64), labels[part])
        for out, row in zip(rows, bounds, strict=True):
            out[part] = row
    return rows


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


def cache_intervals(
    base: np.ndarray,
    query: np.ndarray,
    keys: np.ndarray,
    class_offsets: np.ndarray,
    labels: np.ndarray,
    betas: np.ndarray,
    weights: np.ndarray | None,
    extra: np.ndarray | None,
    gammas: np.ndarray | None,
) -> Rows:
    """search.cache_intervals: lower, upper and flags, (K * G, V) each. One product a chunk, one exponential a beta."""
    n_gammas = 1 if gammas is None else len(gammas)
    rows = _empty_rows(len(betas) * n_gammas, len(labels))
    # For an empty segment reduceat gives a[i] rather than 0, so only classes with keys are summed.
    classes = np.flatnonzero(np.diff(class_offsets))
    for part in _chunks(len(labels), max(len(keys), base.shape[1])):
        dots = query[part] @ keys.T
        dots -= np.float32(1.0)
        for k, beta in enumerate(betas.astype(np.float32)):
            affinity = np.exp(dots * beta)
            if weights is not None:
                affinity *= weights[k]
            slope = np.zeros((len(dots), base.shape[1]))
            slope[:, classes] = np.add.reduceat(affinity, class_offsets[classes], axis=1, dtype=np.float64)
            for g in range(n_gammas):
                shifted = base[part].astype(np.float64)
                if extra is not None and gammas is not None:
                    shifted += gammas[g] * extra[part].astype(np.float64)
                for out, row in zip(rows, _bounds(shifted, slope, labels[part]), strict=True):
                    out[k * n_gammas + g, part] = row
    return rows


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


def sweep(
    lower: np.ndarray, upper: np.ndarray, flags: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """search.sweep: alpha, low, high, flags of the plateau's ends, right; (S,) each."""
    n_settings = len(lower)
    alpha, low, high = np.empty(n_settings), np.empty(n_settings), np.empty(n_settings)
    ends, right = np.empty(n_settings, dtype=np.uint8), np.empty(n_settings, dtype=np.int64)
    for s in range(n_settings):
        limit, starts, stops = _domain(lower[s], upper[s], flags[s])
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
        low[s], high[s] = _alpha(borders[best : best + 2])
        alpha[s] = low[s] + (high[s] - low[s]) / 2
        first, past = (int(border) & 1 for border in borders[best : best + 2])
        ends[s] = LOWER_OPEN * first + UPPER_OPEN * (1 - past)
        right[s] = counts.max()
    return alpha, low, high, ends, right
