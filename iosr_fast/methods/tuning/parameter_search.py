"""The search for a method's parameters: the public grid's values, then finer ones around the best, each with its best
alpha."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from iosr_fast.methods.method import MAX_ALPHA
from iosr_fast.methods.tuning.held_out import HeldOutSet, Setting
from iosr_fast.methods.tuning.log_loss import fit_alpha, fit_factor, spread
from iosr_fast.methods.tuning.search import EMPTY, LOWER_OPEN, UPPER_OPEN, Intervals, sweep

# Two candidates are level if they differ by at most this number of standard errors.
LEVEL = 2.0
_SHORTLIST = 20
_ROUNDS = 2


def is_level(right: np.ndarray | None, best: np.ndarray | None) -> bool:
    """Whether `right` is as good as `best` within noise. Both are (V,) bool: the images that a candidate gets right.

    lost - won <= LEVEL * sqrt(lost + won), with lost the number of images that only `best` gets right and won that of
    images that only `right` gets right; sqrt(lost + won) is the standard error of their difference.
    """
    assert right is not None and best is not None
    lost, won = int((best & ~right).sum()), int((right & ~best).sum())
    return lost - won <= LEVEL * float(np.sqrt(lost + won))


@dataclass(frozen=True, eq=False)
class Candidate:
    """A setting with an alpha; row `row` of `intervals` has the intervals of its images."""

    setting: Setting
    alpha: float
    alpha_range: tuple[float, float]
    accuracy: float
    intervals: Intervals
    row: int
    log_loss: float | None = None
    factor: float = 1.0
    right: np.ndarray | None = None  # at alpha, where the log-loss was computed
    spreads: tuple[float, float] | None = None  # of base and slope, where the log-loss was computed

    @property
    def width(self) -> float:
        return self.alpha_range[1] - self.alpha_range[0]

    def right_at(self, alpha: float) -> np.ndarray:
        """(V,) bool: which of the held-out images are right at this alpha."""
        lower, upper, flags = (
            part[self.row] for part in (self.intervals.lower, self.intervals.upper, self.intervals.flags)
        )
        after = (lower < alpha) | ((lower == alpha) & (flags & LOWER_OPEN == 0))
        before = (alpha < upper) | ((alpha == upper) & (flags & UPPER_OPEN == 0))
        right: np.ndarray = after & before & (flags & EMPTY == 0)
        return right


class ParameterSearch:
    """Every setting that was tried, each with its best alpha."""

    def __init__(self, held_out: HeldOutSet) -> None:
        self.held_out = held_out
        self.labels = held_out.labels[held_out.rows]
        self.tried: list[Candidate] = []
        for settings in self._schedule():
            self._try(settings)

    def _schedule(self) -> Iterator[list[Setting]]:
        """All combinations of the axes' values; then, twice, finer ones around the best."""
        values = {name: list(axis) for name, axis in self.held_out.method.axes.items()}
        yield _combinations(values)
        for _ in range(_ROUNDS if values else 0):
            best = self.most_right().setting
            values = {name: _between(axis, best[name]) for name, axis in values.items()}
            yield _combinations(values)

    def _try(self, settings: list[Setting]) -> None:
        self.tried += _swept(settings, _cut(self.held_out.intervals(settings)))

    def most_right(self, rows: np.ndarray | None = None) -> Candidate:
        """The candidate with the highest accuracy; then with the widest plateau relative to alpha; then the first. With
        `rows` (V,) bool, by these images alone."""
        tried = self.tried if rows is None else self._tried_on(rows)
        return max(tried, key=lambda c: (c.accuracy, c.width / max(c.alpha, 1e-30)))

    def choose(self) -> tuple[Candidate, np.ndarray]:
        """The candidate to use, and which held-out images are right (V,) bool by what the others choose.

        By leave-one-out the least log-loss chooses among the candidates that are level with the best, each tried at
        its best alpha and at its alpha of least log-loss; on a validation set `most_right`. Each half of the images
        (HeldOutSet.halves) is judged at the setting and the alpha that the other half chooses by the same rule; images
        that can't be halved, at those of the candidate.
        """
        halves = self.held_out.halves
        others = [~half for half in halves] if all(half.any() for half in halves) else []
        if self.held_out.folds is None:
            best, *chosen = self.most_right(), *map(self.most_right, others)
        else:
            best, *chosen = self._level_with_least_loss([None, *others])
        right = best.right_at(best.alpha)
        for half, candidate in zip(halves if others else (), chosen, strict=True):
            right[half] = candidate.right_at(candidate.alpha)[half]
        return best, right

    def _tried_on(self, rows: np.ndarray) -> list[Candidate]:
        """The same settings, each with the best alpha of these images; `intervals` stay those of all."""
        tried: list[Candidate] = []
        while len(tried) < len(self.tried):
            batch = [c for c in self.tried if c.intervals is self.tried[len(tried)].intervals]
            some = _swept([c.setting for c in batch], batch[0].intervals.only(rows))
            tried += [replace(c, intervals=batch[0].intervals) for c in some]
        return tried

    def _level_with_least_loss(self, rows: Sequence[np.ndarray | None]) -> list[Candidate]:
        """For each of `rows` the choice of these images (None: of all). Logits are computed once a setting."""
        everything = np.ones(len(self.labels), bool)
        masks = [everything if some is None else some for some in rows]
        shortlists = [
            _near_the_best(self.tried if some is None else self._tried_on(some), int(mask.sum()))
            for some, mask in zip(rows, masks, strict=True)
        ]
        measured: list[list[Candidate]] = [[] for _ in rows]
        settings = {tuple(c.setting.items()): c.setting for shortlist in shortlists for c in shortlist}
        for key, setting in settings.items():
            base, slope = self.held_out.logits(setting)
            for mask, shortlist, results in zip(masks, shortlists, measured, strict=True):
                for candidate in shortlist:
                    if tuple(candidate.setting.items()) == key:
                        results += _by_loss(candidate, base, slope, self.labels, mask)
        return [_least_loss(results, mask) for results, mask in zip(measured, masks, strict=True)]


def _swept(settings: Sequence[Setting], intervals: Intervals) -> list[Candidate]:
    """Each setting with its best alpha."""
    best, n_samples = sweep(intervals), intervals.n_samples
    return [
        Candidate(
            setting,
            float(best.alpha[row]),
            (float(best.low[row]), float(best.high[row])),
            float(best.right[row]) / n_samples,
            intervals,
            row,
        )
        for row, setting in enumerate(settings)
    ]


def _near_the_best(tried: Sequence[Candidate], n_samples: int) -> list[Candidate]:
    """Some candidates within three standard errors of the best."""
    best = max(c.accuracy for c in tried)
    error = float(np.sqrt(best * (1 - best) / n_samples))
    near = sorted((c for c in tried if c.accuracy >= best - 3 * error), key=lambda c: -c.accuracy)
    return near[:: -(-len(near) // _SHORTLIST)]


def _by_loss(
    candidate: Candidate, base: np.ndarray, slope: np.ndarray, labels: np.ndarray, rows: np.ndarray
) -> list[Candidate]:
    """The candidate at its alpha and at that of least log-loss on the images `rows` (V,) bool."""
    base, slope, labels = base[rows], slope[rows], labels[rows]
    spreads = spread(base), spread(slope)
    results = []
    for fit in (fit_factor(base, slope, labels, candidate.alpha), fit_alpha(base, slope, labels)):
        right = candidate.right_at(fit.alpha)
        results.append(
            replace(
                candidate,
                alpha=fit.alpha,
                accuracy=float(right[rows].mean()),
                log_loss=fit.loss,
                factor=fit.factor,
                right=right,
                spreads=spreads,
            )
        )
    return results


def _least_loss(measured: Sequence[Candidate], rows: np.ndarray) -> Candidate:
    """Of the candidates that are level with the best on the images `rows`, the one with the least log-loss."""
    top = max(measured, key=lambda c: c.accuracy)
    assert top.right is not None
    level = [c for c in measured if c.right is not None and is_level(c.right[rows], top.right[rows])]
    return min(level, key=lambda c: c.log_loss if c.log_loss is not None else np.inf)


def _cut(intervals: Intervals) -> Intervals:
    """The intervals from 0 to MAX_ALPHA: an end beyond it becomes infinite, an interval beyond it becomes empty."""
    upper = np.where(intervals.upper > MAX_ALPHA, np.inf, intervals.upper)
    flags = np.where(intervals.lower > MAX_ALPHA, np.uint8(EMPTY), intervals.flags)
    return replace(intervals, upper=upper, flags=flags)


def _combinations(values: Mapping[str, Sequence[float]]) -> list[Setting]:
    return [dict(zip(values, point, strict=True)) for point in product(*values.values())]


def _between(axis: Sequence[float], value: float) -> list[float]:
    """`value` and the points halfway to its neighbours on the axis."""
    at = axis.index(value)
    neighbours = (axis[max(at - 1, 0)], value, axis[min(at + 1, len(axis) - 1)])
    return sorted({(value + neighbour) / 2 for neighbour in neighbours})
