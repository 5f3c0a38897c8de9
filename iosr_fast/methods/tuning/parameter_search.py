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
from iosr_fast.methods.tuning.numpy_search import EMPTY, LOWER_OPEN, UPPER_OPEN
from iosr_fast.methods.tuning.search import Intervals, sweep

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
        intervals = _cut(self.held_out.intervals(settings))
        best = sweep(intervals)
        for row, setting in enumerate(settings):
            plateau = (float(best.low[row]), float(best.high[row]))
            accuracy = float(best.right[row]) / len(self.labels)
            self.tried.append(Candidate(setting, float(best.alpha[row]), plateau, accuracy, intervals, row))

    def most_right(self) -> Candidate:
        """The candidate with the highest accuracy; then with the widest plateau relative to alpha; then the first."""
        return max(self.tried, key=lambda c: (c.accuracy, c.width / max(c.alpha, 1e-30)))

    def level_with_least_loss(self) -> Candidate:
        """The candidate with the least log-loss among those that are level with the best, each tried at its best alpha
        and at its alpha of least log-loss."""
        best = self.most_right().accuracy
        error = float(np.sqrt(best * (1 - best) / len(self.labels)))
        near = sorted((c for c in self.tried if c.accuracy >= best - 3 * error), key=lambda c: -c.accuracy)
        measured: list[Candidate] = []
        for candidate in near[:: -(-len(near) // _SHORTLIST)]:
            base, slope = self.held_out.logits(candidate.setting)
            spreads = spread(base), spread(slope)
            for fit in (fit_factor(base, slope, self.labels, candidate.alpha), fit_alpha(base, slope, self.labels)):
                right = candidate.right_at(fit.alpha)
                measured.append(
                    replace(
                        candidate,
                        alpha=fit.alpha,
                        accuracy=float(right.mean()),
                        log_loss=fit.loss,
                        factor=fit.factor,
                        right=right,
                        spreads=spreads,
                    )
                )
        top = max(measured, key=lambda c: c.accuracy)
        level = [c for c in measured if is_level(c.right, top.right)]
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
