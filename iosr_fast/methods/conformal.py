"""Sets of labels with a promised coverage, and how right probabilities are: both by left-out support images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods.known_scores import log_odds_of_largest, log_sum_exp
from iosr_fast.methods.promise import MOST, images_needed, leave_out, threshold
from iosr_fast.methods.support_set import SupportSet
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.score import score
from iosr_fast.utils.text import abbreviate

ClassNames = Sequence[Any] | np.ndarray
BINS = 10
COVERAGE = 0.9


@dataclass(frozen=True, eq=False)
class Reliability:
    """Of V images in bins ((m - 1) / BINS, m / BINS] of the largest probability: how many are in a bin, their mean
    probability and the share that is right (NaN in an empty bin), each (BINS,).

    `error` is the expected calibration error, sum over bins of count / V * |right - confidence| (Guo et al., ICML 2017,
    equation 3). `accuracy` and `log_loss` are those of the V images.

    >>> right, log_loss = np.array([True, False]), np.array([0.09, 3.0])
    >>> one = LeftOutLabels(np.zeros(2), np.array([0.91, 0.95]), right, log_loss, np.array([0, 1]), np.zeros(2))
    >>> print(one.reliability)
    2 left-out support images: expected calibration error 43.0%, log-loss 1.545
    probability  images  mean   right
    0.9 to 1.0        2  93.0%  50.0%
    """

    counts: np.ndarray
    confidence: np.ndarray
    right: np.ndarray
    error: float
    accuracy: float
    log_loss: float

    @property
    def n_images(self) -> int:
        return int(self.counts.sum())

    def __str__(self) -> str:
        if not self.n_images:
            return "no support image can be left out: give at least two pictures of a class"
        lines = [
            f"{self.n_images} left-out support images: expected calibration error {self.error:.1%}, log-loss "
            f"{self.log_loss:.3f}",
            "probability  images  mean   right",
        ]
        for k in np.flatnonzero(self.counts):
            lines.append(
                f"{k / BINS:.1f} to {(k + 1) / BINS:.1f}  {self.counts[k]:7d}  {self.confidence[k]:5.1%}  "
                f"{self.right[k]:5.1%}"
            )
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class LeftOutLabels:
    """What a classifier says of V labelled images that it has not seen (`leave_out_labels`, `of_logits`).

    odds        (V,) log p / (1 - p) of the label, extrapolated to all support images (promise.LeftOut)
    confidence  (V,) the largest probability
    right       (V,) bool, whether it is the label's
    log_loss    (V,) -log p of the label, in nats
    labels      (V,) int64, the position of the label's class
    class_odds  (V,) as `odds`, extrapolated class by class
    """

    odds: np.ndarray
    confidence: np.ndarray
    right: np.ndarray
    log_loss: np.ndarray
    labels: np.ndarray
    class_odds: np.ndarray

    def thresholds(self, coverage: float = COVERAGE, classes: ClassNames | None = None) -> np.ndarray:
        """The least log p / (1 - p) of a label in a set: one number (), or with the names of all `classes` (C,) one for
        each, by the images of that class alone.

        Raises IosrFastError where there are too few images for the promise, naming the classes that have too few.
        """
        if classes is None:
            return np.array(threshold(self.odds, coverage))
        counts, needed = np.bincount(self.labels, minlength=len(classes)), images_needed(coverage)
        if few := [f"{name} ({n})" for name, n in zip(classes, counts.tolist(), strict=True) if n < needed]:
            raise IosrFastError(
                f"a promise for {coverage:.4g} of the pictures of each class needs at least {needed} support images of "
                f"each class that can be left out (of all together {MOST} at most), got fewer of {abbreviate(few)}: "
                "give more pictures of these classes, promise less, or leave per_class out"
            )
        return np.array([threshold(self.class_odds[self.labels == c], coverage) for c in range(len(classes))])

    def sets(self, logits: np.ndarray, coverage: float = COVERAGE, classes: ClassNames | None = None) -> np.ndarray:
        """(B, C) bool, the labels of each image's set: those whose log p / (1 - p), p = softmax(logits), reaches the
        threshold of `coverage`. At least that share of new images has its label in its set, if they are exchangeable
        with the V images, and hardly more: where more images than that are right, sets of unsure images are empty.
        With the names of the `classes` (C,) this holds for the images of each class (class-conditional or Mondrian
        conformal prediction), whatever the mix of classes among new images.

        Raises what `thresholds` raises. Sources: Sadinle et al., JASA 2019; by classes: Vovk, ACML 2012.
        """
        reached: np.ndarray = log_odds(logits) >= self.thresholds(coverage, classes)
        return reached

    @cached_property
    def reliability(self) -> Reliability:
        bins = np.ceil(self.confidence * BINS).astype(int).clip(1, BINS) - 1
        counts = np.bincount(bins, minlength=BINS)
        sums, right = np.bincount(bins, self.confidence, BINS), np.bincount(bins, self.right, BINS)
        with np.errstate(invalid="ignore"):
            means, shares = sums / counts, right / counts
        n_images = max(len(bins), 1)
        accuracy, loss = (float(part.mean()) if len(bins) else float("nan") for part in (self.right, self.log_loss))
        return Reliability(counts, means, shares, float(np.abs(right - sums).sum() / n_images), accuracy, loss)


def leave_out_labels(support: SupportSet, plan_of: Callable[[SupportSet], ScoringPlan]) -> LeftOutLabels:
    """Support images, each by the plan that `plan_of` makes of the support images of other folds (promise.leave_out).

    >>> from iosr_fast.methods import compile_method
    >>> from iosr_fast.methods.support_set import make_support_set
    >>> rng = np.random.default_rng(0)
    >>> def draw(n):
    ...     rows = np.eye(4, 16).repeat(n, 0) + 0.3 * rng.standard_normal((4 * n, 16))
    ...     rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    ...     return Embeddings(rows.astype(np.float32)), np.arange(4).repeat(n)
    >>> support = make_support_set(*draw(10), text=None, tau=100.0, n_classes=4)
    >>> plan_of = lambda others: compile_method("gda", others, alpha=0.5)
    >>> labels = leave_out_labels(support, plan_of)
    >>> images, expected = draw(100)
    >>> sets = labels.sets(score(plan_of(support), images), coverage=0.9)
    >>> sets.shape, bool(0.85 < sets[np.arange(400), expected].mean() < 0.97)
    ((400, 4), True)
    """
    own = support.as_queries

    def columns(others: SupportSet, rows: np.ndarray) -> np.ndarray:
        return _columns(score(plan_of(others), own[rows]), support.labels[rows])

    left = leave_out(support, columns) if len(support.embeddings) else None
    if left is None or not len(left.rows):
        return _labels(np.zeros((0, 4)), np.zeros(0, np.int64))
    by_class = left.extrapolated_by_class(support.labels)[:, 0]
    labels = _labels(left.values, support.labels[left.rows])
    return replace(labels, odds=left.extrapolated[:, 0], class_odds=by_class)


def of_logits(logits: np.ndarray, labels: np.ndarray) -> LeftOutLabels:
    """Labelled images (V,) that are not in the support set, by their logits (V, C): split conformal prediction."""
    labels = np.asarray(labels, np.int64)
    return _labels(_columns(logits, labels), labels)


def sets_of_labels(classes: np.ndarray, logits: np.ndarray, members: np.ndarray) -> list[np.ndarray]:
    """The labels of each image's set out of `classes` (C,), the most likely first; logits and members (B, C).

    >>> sets_of_labels(np.array(["a", "b", "c"]), np.array([[1.0, 3.0, 2.0]]), np.array([[True, True, False]]))
    [array(['b', 'a'], dtype='<U1')]
    """
    order = np.argsort(-logits, axis=1, kind="stable")
    return [classes[row[chosen[row]]] for row, chosen in zip(order, members, strict=True)]


def _labels(columns: np.ndarray, labels: np.ndarray) -> LeftOutLabels:
    odds, confidence, right, log_loss = columns.T
    return LeftOutLabels(odds, confidence, right > 0, log_loss, labels, odds)


def _columns(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The fields of LeftOutLabels, (V, 4)."""
    rows, exact = np.arange(len(labels)), logits.astype(np.float64)
    odds = log_odds(exact)[rows, labels]
    loss = log_sum_exp(exact) - exact[rows, labels]
    confidence = np.exp(exact.max(1) - log_sum_exp(exact)) if len(exact) else np.zeros(0)
    return np.stack([odds, confidence, exact.argmax(1) == labels, loss], axis=1)


def log_odds(logits: np.ndarray) -> np.ndarray:
    """log p / (1 - p) of p = softmax(logits), (B, C) float64, C >= 2; it does not saturate where p is almost 1.

    >>> log_odds(np.array([[100.0, 0.0]]))
    array([[ 100., -100.]])
    """
    exact = logits.astype(np.float64)
    if not len(exact):
        return exact
    logs = exact - log_sum_exp(exact)[:, None]
    odds = logs - np.log1p(-np.minimum(np.exp(logs), 0.5))  # that of the largest p, which may exceed 0.5, is next
    odds[np.arange(len(exact)), exact.argmax(1)] = log_odds_of_largest(exact)
    return odds
