"""What more images of each class would bring: a learning curve of left-out support images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from iosr_fast.methods.folds import MAX_FOLDS, Folds
from iosr_fast.methods.out_of_fold import OutOfFold
from iosr_fast.methods.support_set import SupportSet
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.score import score

Compile = Callable[[SupportSet], ScoringPlan]
# Draws of a learning curve are repeated until this number of images has been scored at each of its points.
_SCORED = 1000
_MAX_DRAWS = 5


@dataclass(frozen=True)
class CurvePoint:
    """A point of a learning curve: with `images` of each class (Folds.distinct), `accuracy` on `scored` others."""

    images: int
    accuracy: float
    scored: int


@dataclass(frozen=True)
class LearningCurve:
    """Accuracies by the number of images a class, and what `twice` as many as now would give, in 0..1.

    `points` are measured on left-out support images, the last one with all others in the fit. `now`, with the usual
    number of `images` of a class, and `twice` are read from the power law through the last points; NaN if there are
    fewer than two.
    """

    points: tuple[CurvePoint, ...] = ()
    images: int = 0
    now: float = float("nan")
    twice: float = float("nan")

    @property
    def gain(self) -> float:
        """What twice as many images would add to the accuracy."""
        return self.twice - self.now


def learning_curve(support: SupportSet, plan_of: Compile, left_out: OutOfFold) -> LearningCurve:
    """Accuracies with 1, 2, 4, ... images of each class, on the others, and with all but the left-out ones.

    Near duplicates and groups count as one image. The images of a smaller fit are drawn several times, until 1,000
    others are scored, at most 5 times; at least one image of each class with two is left for the score. The error is
    taken as a power of the number of images through the last three points (error = a * images^-b; Hestness et al.,
    2017), each with half a mistake added, and b >= 0.
    """
    labels, folds, own = support.labels, left_out.folds, support.as_queries
    if not len(left_out.labels):
        return LearningCurve()
    rng, points = np.random.default_rng(0), list[CurvePoint]()
    usual = int(np.median(folds.distinct[folds.distinct > 1]))
    most = usual - -(-usual // MAX_FOLDS)  # images that the fit of a fold has
    for images in (2**k for k in range(most.bit_length()) if 2**k < most):
        right: list[np.ndarray] = []
        while len(right) < _MAX_DRAWS and sum(map(len, right)) < _SCORED:
            chosen, others = _drawn(support, folds, images, rng)
            right.append(score(plan_of(support.only(chosen)), own[others]).argmax(1) == labels[others])
        if len(of_others := np.concatenate(right)):
            points.append(CurvePoint(images, float(of_others.mean()), len(of_others)))
    right_now = left_out.logits.argmax(1) == left_out.labels
    points.append(CurvePoint(most, float(right_now.mean()), len(right_now)))
    if len(points) < 2:
        return LearningCurve(tuple(points), usual)
    last = points[-3:]
    sizes = np.log([point.images for point in last])
    errors = np.log([1 - point.accuracy + 0.5 / point.scored for point in last])
    slope = min(float(np.polyfit(sizes, errors, 1)[0]), 0.0)
    at = np.log([usual, 2 * usual])
    now, twice = (1 - np.exp(errors.mean() + slope * (at - sizes.mean()))).tolist()
    return LearningCurve(tuple(points), usual, now, twice)


def _drawn(support: SupportSet, folds: Folds, images: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(N,) bool twice: `images` of each class at random, or all but one of a smaller class, or the only one of a class,
    with what counts as the same image; and the images of no such unit."""
    n, labels = len(support.labels), support.labels
    first = np.empty(folds.units.max() + 1, np.int64)  # the place of a unit's first image in a random order
    first[folds.units[rng.permutation(n)[::-1]]] = np.arange(n)[::-1]
    units, own = np.unique(labels * n + first[folds.units], return_inverse=True)  # of each class
    rank = np.arange(len(units)) - np.searchsorted(units // n, units // n)
    chosen = rank[own] < np.minimum(images, np.maximum(folds.distinct - 1, 1))[labels]
    return chosen, ~np.isin(folds.units, folds.units[chosen])
