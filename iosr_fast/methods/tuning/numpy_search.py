"""The exact search for alpha in NumPy: for where the extension can't be imported, and to test it against.

Arguments are search.py's, checked there. Samples are taken in chunks, so that memory stays bounded.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

# Bits of the flags of an interval.
LOWER_OPEN = 1
UPPER_OPEN = 2
EMPTY = 4
# Slopes are float32 sums: a difference of this share of them, or less, may be nothing but their rounding.
ROUNDING = 64 * float(np.finfo(np.float32).eps)

# Elements of the arrays that a chunk of samples takes: a few of 8 MB each.
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
    found = _empty_rows(len(labels))
    for part in _chunks(*base.shape):
        bounds = _bounds(base[part].astype(np.float64), slope[part].astype(np.float64), labels[part])
        for out, row in zip(found, bounds, strict=True):
            out[part] = row
    return found


def _bounds(base: np.ndarray, slope: np.ndarray, labels: np.ndarray) -> Rows:
    """intervals() of one chunk, in float64. A sample that a class with its own slope beats has lower = inf."""
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
    # The largest bound with and without itself; open where one of the former is among the largest.
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
    own: np.ndarray | None,
) -> Rows:
    """search.cache_intervals: lower, upper and flags, (K * G, V) each. One product a chunk, one exponential a beta."""
    n_gammas = 1 if gammas is None else len(gammas)
    found = _empty_rows(len(betas) * n_gammas, len(labels))
    # reduceat gives a[i] for an empty segment rather than 0, so only classes with keys take part.
    classes = np.flatnonzero(np.diff(class_offsets))
    for part in _chunks(len(labels), max(len(keys), base.shape[1])):
        dots = query[part] @ keys.T
        dots -= np.float32(1.0)
        for k, beta in enumerate(betas.astype(np.float32)):
            affinity = np.exp(dots * beta)
            if weights is not None:
                affinity *= weights[k]
            if own is not None:
                masked = np.flatnonzero(own[part] >= 0)
                affinity[masked, own[part][masked]] = 0.0
            slope = np.zeros((len(dots), base.shape[1]))
            slope[:, classes] = np.add.reduceat(affinity, class_offsets[classes], axis=1, dtype=np.float64)
            for g in range(n_gammas):
                shifted = base[part].astype(np.float64)
                if extra is not None and gammas is not None:
                    shifted += gammas[g] * extra[part].astype(np.float64)
                for out, row in zip(found, _bounds(shifted, slope, labels[part]), strict=True):
                    out[k * n_gammas + g, part] = row
    return found


# A position on the line of alphas: twice v's bits for the point v, and one more for just after it. (Numbers >= 0 are in
# the order of their bits.) An interval covers the positions from its start to before its end.
def _position(alpha: np.ndarray, after: np.ndarray | bool) -> np.ndarray:
    bits: np.ndarray = np.ascontiguousarray(alpha, dtype=np.float64).view(np.uint64)
    return (bits << np.uint64(1)) | np.asarray(after, dtype=np.uint64)


def _alpha(positions: np.ndarray) -> np.ndarray:
    return (positions >> np.uint64(1)).view(np.float64)


def _domain(lower: np.ndarray, upper: np.ndarray, flags: np.ndarray, alpha_max: float | None) -> Rows:
    """alpha_max (1,), and the start and end positions of the intervals that are there from 0 to alpha_max."""
    kept = (flags & EMPTY) == 0
    lower, upper, flags = lower[kept], upper[kept], flags[kept]
    if alpha_max is None:
        ends = np.concatenate([lower, upper])
        ends = ends[(ends > 0) & (ends < np.inf)]
        alpha_max = min(2.0 * float(ends.max()), float(np.finfo(np.float64).max)) if len(ends) else 2.0
    kept = (lower <= alpha_max) & (upper >= 0)
    lower, upper, flags = lower[kept], upper[kept], flags[kept]
    starts = _position(np.maximum(lower, 0.0) + 0.0, (lower >= 0) & ((flags & LOWER_OPEN) != 0))
    ends = _position(np.minimum(upper, alpha_max) + 0.0, (upper > alpha_max) | ((flags & UPPER_OPEN) == 0))
    kept = starts < ends
    return np.array([alpha_max]), starts[kept], ends[kept]


def sweep(
    lower: np.ndarray, upper: np.ndarray, flags: np.ndarray, alpha_max: float | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """search.sweep: alpha, low, high, flags of the plateau's ends, right; (S,) each."""
    n_settings = len(lower)
    alpha, low, high = np.empty(n_settings), np.empty(n_settings), np.empty(n_settings)
    ends, right = np.empty(n_settings, dtype=np.uint8), np.empty(n_settings, dtype=np.int64)
    for s in range(n_settings):
        limit, starts, stops = _domain(lower[s], upper[s], flags[s], alpha_max)
        outer = np.concatenate([_position(np.zeros(1), False), _position(limit, True)])
        positions = np.unique(np.concatenate([outer, starts, stops]))
        counts = np.searchsorted(np.sort(starts), positions[:-1], "right")
        counts -= np.searchsorted(np.sort(stops), positions[:-1], "right")
        # Where one interval ends and another begins the count may stay, and the plateau goes on.
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


def step_curve(
    lower: np.ndarray, upper: np.ndarray, flags: np.ndarray, alpha_max: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """search.step_curve of the intervals (V,) of one setting."""
    limit, starts, stops = _domain(lower, upper, flags, alpha_max)
    begins, ends = _alpha(starts), _alpha(stops)
    begins, ends = begins[begins < ends], ends[begins < ends]
    edges = np.unique(np.concatenate([np.zeros(1), limit, begins, ends]))
    right = np.searchsorted(np.sort(begins), edges[:-1], "right") - np.searchsorted(np.sort(ends), edges[:-1], "right")
    return edges, right.astype(np.int64)
