"""Scores of support images that are left out, and what follows for a promise: conformal thresholds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods import gda
from iosr_fast.methods.support_set import SupportSet
from iosr_fast.methods.tuning.held_out import HeldOutSet

# Images are left out fold by fold until there are this many: a share of 5% then has a standard error of half a point.
MOST = 2000
# Images on which the drift is measured.
MOST_FOR_DRIFT = 500
Score = Callable[[SupportSet, np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class LeftOut:
    """Scores of V support images, each by a model of the support images of other folds.

    rows    (V,) int64, which images
    values  (V, m) float64
    drift   (m,) what the scores gain on the mean where no image is left out
    gained  (G,) int64, the images on which it was measured, with `gains` (G, m), whose mean it is

    A model without a fold knows fewer images than the one in use, so that `values` are too low for a threshold.
    `values + drift` is their extrapolation: with n images a class on the mean, n1 without one fold and n2 without two,

        drift = (mean of values without one fold - mean without two) * (1 / n1 - 1 / n) / (1 / n2 - 1 / n1),

    as if means were linear in 1 / n. It is 0 where no class would have two images without the second fold.
    """

    rows: np.ndarray
    values: np.ndarray
    gained: np.ndarray
    gains: np.ndarray

    @property
    def drift(self) -> np.ndarray:
        drift: np.ndarray = self.gains.mean(0) if len(self.gains) else np.zeros(self.values.shape[1])
        return drift

    @property
    def extrapolated(self) -> np.ndarray:
        """(V, m): values + drift."""
        extrapolated: np.ndarray = self.values + self.drift
        return extrapolated

    def extrapolated_by_class(self, labels: np.ndarray) -> np.ndarray:
        """(V, m): values + the drift of an image's class; `labels` (N,) are those of all support images. A class on
        which no drift was measured has that of all."""
        of_class = np.tile(self.drift, (int(labels.max(initial=-1)) + 1, 1))
        for c in np.unique(labels[self.gained]):
            of_class[c] = self.gains[labels[self.gained] == c].mean(0)
        extrapolated: np.ndarray = self.values + of_class[labels[self.rows]]
        return extrapolated


def leave_out(support: SupportSet, score: Score, most: int = MOST) -> LeftOut:
    """`score(others, rows)` (len(rows), m) of the images `rows`, by a model of the support set `others` without them.

    One image of each class is left out at a time (`left_out_folds`), until there are `most`. The only image of a class
    is never left out: V is 0 if each class has one.
    """
    folds, scored = left_out_folds(support)
    n_folds = int(folds.max(initial=-1)) + 1
    rows: list[np.ndarray] = []
    values: list[np.ndarray] = []
    gains: list[np.ndarray] = []
    gained: list[np.ndarray] = []
    sizes: list[tuple[int, int]] = []
    for fold in range(n_folds):
        if _count(rows) >= most:
            break
        inside = folds == fold
        rows.append(np.flatnonzero(inside & scored))
        values.append(np.asarray(score(support.only(~inside), rows[-1]), np.float64))
        two = _without_two(support, folds, fold, (fold + 1) % n_folds)
        if _has_pairs(support.only(two)) and two.sum() < (~inside).sum() and _count(gains) < MOST_FOR_DRIFT:
            gains.append(values[-1] - score(support.only(two), rows[-1]))
            gained.append(rows[-1])
            sizes.append((int((~inside).sum()), int(two.sum())))
    if not rows:
        return LeftOut(np.zeros(0, np.int64), np.zeros((0, 1)), np.zeros(0, np.int64), np.zeros((0, 1)))
    measured = np.zeros(0, np.int64), np.zeros((0, values[0].shape[1]))
    if gains:
        one, fewer = np.mean(sizes, axis=0)
        factor = (1.0 / one - 1.0 / len(folds)) / (1.0 / fewer - 1.0 / one)
        measured = np.concatenate(gained), factor * np.concatenate(gains)
    return LeftOut(np.concatenate(rows), np.concatenate(values), *measured)


def left_out_folds(support: SupportSet) -> tuple[np.ndarray, np.ndarray]:
    """HeldOutSet.leave_one_out: (N,) int64, each image's fold, negative for one that is never left out, and (N,) bool,
    the images that are scored."""
    held_out = HeldOutSet.leave_one_out(gda.METHOD, None, support)
    assert held_out.folds is not None
    return held_out.folds, held_out.scored


def _has_pairs(support: SupportSet) -> bool:
    """Whether half of the classes have two images: a covariance of fewer pairs is far from that of the model in use."""
    counts = support.counts[support.counts > 0]
    return bool(len(counts)) and bool((counts > 1).mean() >= 0.5)


def _count(parts: list[np.ndarray]) -> int:
    return sum(len(part) for part in parts)


def _without_two(support: SupportSet, folds: np.ndarray, first: int, second: int) -> np.ndarray:
    """(N,) bool, the images of other folds; a class of which none would be left keeps that of `second`."""
    rest = folds != first
    both = rest & (folds != second)
    left = np.bincount(support.labels[both], minlength=support.n_classes)
    mask: np.ndarray = np.where(left[support.labels] > 0, both, rest)
    return mask


def threshold(scores: np.ndarray, share: float) -> float:
    """The largest t that at least `share` of new images reach, (0, 1), if they are exchangeable with the V that have
    `scores`: the floor((1 - share)(V + 1))-th smallest (split conformal prediction; Papadopoulos et al., ECML 2002).

    Raises IosrFastError where V is too small for the promise: floor is then 0.

    >>> threshold(np.arange(19.0), 0.95)
    0.0
    """
    rank = rank_of(len(scores), share)
    if rank < 1:
        raise IosrFastError(
            f"a promise for {share:.4g} of the pictures needs at least {images_needed(share)} support images that can "
            f"be left out, got {len(scores)}: give more pictures of each class, at least two, or promise less"
        )
    return float(np.partition(scores, rank - 1)[rank - 1])


def rank_of(n_scores: int, share: float) -> int:
    return min(n_scores, math.floor((1.0 - share) * (n_scores + 1) + 1e-9))


def images_needed(share: float) -> int:
    """The least number of left-out images with which `threshold` can promise `share`.

    >>> images_needed(0.95), images_needed(0.9)
    (19, 9)
    """
    return math.ceil(1.0 / (1.0 - share) - 1e-9) - 1


def check_share(name: str, share: float) -> float:
    """`share` as a float above 0 and below 1. Raises IosrFastError."""
    if not (isinstance(share, int | float | np.floating) and 0.0 < share < 1.0):
        raise IosrFastError(f"expected {name} above 0 and below 1, like 0.95, got {share!r}")
    return float(share)
