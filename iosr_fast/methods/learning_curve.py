"""What more images of each class would bring: a learning curve of left-out support images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from iosr_fast.methods.folds import MAX_FOLDS
from iosr_fast.methods.support_set import SupportSet
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.score import score

Compile = Callable[[SupportSet], ScoringPlan]
# Draws of a learning curve are repeated until this number of images has been scored at each of its points.
_SCORED = 1000
_MAX_DRAWS = 5


@dataclass(frozen=True)
class CurvePoint:
    """A point of a learning curve: with `images` of each class, `accuracy` on `scored` others."""

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


def learning_curve(support: SupportSet, plan_of: Compile, logits: np.ndarray) -> LearningCurve:
    """Accuracies with 1, 2, 4, ... images of each class, on the others, and with all but the left-out ones.

    `logits` (N, C) are the out-of-fold ones, with NaN for images that are never left out. The images of a smaller fit
    are drawn several times, until 1,000 others are scored, at most 5 times; at least one image of each class with two
    is left for the score. The error is taken as a power of the number of images through the last three points
    (error = a * images^-b; Hestness et al., 2017), each with half a mistake added, and b >= 0.
    """
    labels, counts, own = support.labels, support.counts, support.as_queries
    scored = np.isfinite(logits[:, 0])
    if not scored.any():
        return LearningCurve()
    rng, points = np.random.default_rng(0), list[CurvePoint]()
    usual = int(np.median(counts[counts > 1]))
    most = usual - -(-usual // MAX_FOLDS)  # images that the fit of a fold has
    for images in (2**k for k in range(most.bit_length()) if 2**k < most):
        right: list[np.ndarray] = []
        while len(right) < _MAX_DRAWS and sum(map(len, right)) < _SCORED:
            chosen = _drawn(support, images, rng)
            right.append(score(plan_of(support.only(chosen)), own[~chosen]).argmax(1) == labels[~chosen])
        points.append(_point(images, np.concatenate(right)))
    points.append(_point(most, logits[scored].argmax(1) == labels[scored]))
    if len(points) < 2:
        return LearningCurve(tuple(points), usual)
    last = points[-3:]
    sizes = np.log([point.images for point in last])
    errors = np.log([1 - point.accuracy + 0.5 / point.scored for point in last])
    slope = min(float(np.polyfit(sizes, errors, 1)[0]), 0.0)
    at = np.log([usual, 2 * usual])
    now, twice = (1 - np.exp(errors.mean() + slope * (at - sizes.mean()))).tolist()
    return LearningCurve(tuple(points), usual, now, twice)


def _drawn(support: SupportSet, images: int, rng: np.random.Generator) -> np.ndarray:
    """(N,) bool: `images` of each class at random, or all but one of a smaller class; the only one of a class."""
    order = rng.permutation(len(support.labels))
    order = order[np.argsort(support.labels[order], kind="stable")]
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - support.class_offsets[support.labels]
    chosen: np.ndarray = rank < np.minimum(images, np.maximum(support.counts - 1, 1))[support.labels]
    return chosen


def _point(images: int, right: np.ndarray) -> CurvePoint:
    return CurvePoint(images, float(right.mean()), len(right))
