"""The sufficient statistics of GDA, updated image by image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from iosr_fast.methods.gda import gda_plan, mean_excess, shrunk_precision
from iosr_fast.scoring.plan import ScoringPlan, Which
from iosr_fast.scoring.reducers import Reducer


@dataclass(frozen=True, eq=False)
class Moments:
    """Of rows x of C classes, in float64: counts n (C,), sums s (C, D), second moment T = sum of x x' (D, D).

    The scatter about the class means is T - sum over c of s_c s_c' / n_c.
    """

    counts: np.ndarray
    sums: np.ndarray
    second: np.ndarray

    @classmethod
    def none(cls, classes: int, width: int) -> Moments:
        return cls(np.zeros(classes, np.int64), np.zeros((classes, width)), np.zeros((width, width)))

    def add(self, rows: np.ndarray, places: np.ndarray, sign: int = 1) -> Moments:
        """With rows (n, D) of the classes `places` (n,) added, or with sign = -1 subtracted."""
        exact = rows.astype(np.float64)
        counts, sums = self.counts.copy(), self.sums.copy()
        np.add.at(counts, places, sign)
        np.add.at(sums, places, sign * exact)
        sums[counts == 0] = 0.0  # without the rounding error
        return Moments(counts, sums, self.second + sign * (exact.T @ exact))

    def select_classes(self, mask: np.ndarray) -> Moments:
        """The classes of a mask (C,); the others must have no row."""
        return Moments(self.counts[mask], self.sums[mask], self.second)

    def append_class(self) -> Moments:
        """With one more class, without a row."""
        return Moments(
            np.append(self.counts, 0), np.concatenate([self.sums, np.zeros((1, self.sums.shape[1]))]), self.second
        )

    def compile(self, text: np.ndarray, tau: float, which: Which, reducer: Reducer | None, alpha: float) -> ScoringPlan:
        """The plan of methods.gda, at a cost in C and D alone. Every class has a row."""
        means = self.sums / self.counts[:, None]
        scatter = self.second - self.sums.T @ means
        precision = shrunk_precision((scatter + scatter.T) / 2, int(self.counts.sum()))
        excess = mean_excess(self.counts, scatter, precision)
        return gda_plan(means, precision, excess, text, tau, which, reducer, alpha)
