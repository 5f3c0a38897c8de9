"""Sets of labels with a promised coverage, and how right probabilities are: by left-out or calibration images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods.folds import unit_weights
from iosr_fast.methods.log_loss import log_losses, log_odds_of_largest, log_softmax, sigmoid
from iosr_fast.methods.tree import Tree, finest
from iosr_fast.utils.text import abbreviate

ClassNames = Sequence[Any] | np.ndarray
BINS = 10
COVERAGE = 0.9
# What promises rest on; where pictures may have several labels, on labels of these.
LEFT_OUT, CALIBRATION, LABELS_OF = "left-out support images", "images of calibrate_on", "labels of "


@dataclass(frozen=True, eq=False)
class Reliability:
    """Of V images in bins ((m - 1) / BINS, m / BINS] of the largest probability: how many are in a bin, their mean
    probability and the share that is right (NaN in an empty bin), each (BINS,).

    `error` is the expected calibration error, sum over bins of share * |right - confidence| (Guo et al., ICML 2017,
    equation 3). `accuracy` and `log_loss` are means over the V images, which are `basis`: LEFT_OUT or CALIBRATION.
    All means and shares are of images as they count (Judged.counted): a burst counts once.

    >>> right, log_loss = np.array([True, False]), np.array([0.09, 3.0])
    >>> odds = np.log([0.91 / 0.09, 0.95 / 0.05])
    >>> one = Judged(np.zeros(2), odds[:, None], right[:, None], log_loss, np.array([0, 1]))
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
    basis: str = LEFT_OUT

    @property
    def n_images(self) -> int:
        return int(self.counts.sum())

    def __str__(self) -> str:
        if not self.n_images:
            return f"there are no {self.basis}: give at least two pictures of a class"
        lines = [
            f"{self.n_images} {self.basis}: expected calibration error {self.error:.1%}, log-loss {self.log_loss:.3f}",
            "probability  images  mean   right",
        ]
        for k in np.flatnonzero(self.counts):
            bounds = f"{k / BINS:.1f} to {(k + 1) / BINS:.1f}"
            lines.append(f"{bounds}  {self.counts[k]:7d}  {self.confidence[k]:5.1%}  {self.right[k]:5.1%}")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Judged:
    """What a classifier says of V labelled images that it has not seen (`of_logits`).

    label_odds  (V,) log p / (1 - p) of the label
    odds        (V, L) log m / (1 - m) of the answer at each level of a tree (Tree.of_logits), first that of classes
    right       (V, L) bool, whether the label's class is that answer or below it
    log_loss    (V,) -log p of the label, in nats
    labels      (V,) int64, the position of the label's class
    basis       what these images are, as of Reliability
    weights     (V,) float64, what each image counts, as images of a burst may be right or wrong together
                (folds.unit_weights); None: each counts 1
    units       where pictures may have several labels (`of_answers`), with V answers in place of images: the unit (V,)
                of the picture of each, as of folds.Folds; else None
    """

    label_odds: np.ndarray
    odds: np.ndarray
    right: np.ndarray
    log_loss: np.ndarray
    labels: np.ndarray
    basis: str = LEFT_OUT
    weights: np.ndarray | None = None
    units: np.ndarray | None = None

    @cached_property
    def counted(self) -> np.ndarray:
        """(V,) float64: the weights."""
        return np.ones(len(self.labels)) if self.weights is None else self.weights

    @cached_property
    def count(self) -> float:
        """How many images V images count as: the sum of their weights; of answers, their effective number."""
        return self.effective(np.ones(len(self.labels), bool))

    def effective(self, chosen: np.ndarray) -> float:
        """What the chosen ones (V,) bool count as. Of answers a[u] of which are of the unit u it is Kish's effective
        sample size, (sum_u a[u])^2 / sum_u a[u]^2 (Survey Sampling, 1965): answers of one picture may be right or wrong
        together."""
        if self.units is None:
            return float(self.counted[chosen].sum())
        sizes = np.unique(self.units[chosen], return_counts=True)[1].astype(np.float64)
        return float(sizes.sum() ** 2 / (sizes @ sizes)) if len(sizes) else 0.0

    def answered(self, least_odds: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The level of each image's answer (tree.finest), whether it is accepted, and whether it is accepted and wrong,
        each (V,)."""
        level, accepted = finest(self.odds, least_odds)
        return level, accepted, accepted & ~self.right[np.arange(len(level)), level]

    def accepted_and_wrong(self, least_odds: float) -> tuple[float, float]:
        """What the accepted answers count as, and the wrong ones of them."""
        _, accepted, wrong = self.answered(least_odds)
        number, k = self.effective(accepted), float(self.counted[wrong].sum())
        return number, k if self.units is None or not k else number * k / float(accepted.sum())

    def thresholds(self, coverage: float = COVERAGE, classes: ClassNames | None = None) -> np.ndarray:
        """The least log p / (1 - p) of a label in a set: one number (), or with the names of all `classes` (C,) one for
        each, by the images of that class alone.

        Raises IosrFastError where there are too few images for the promise, naming the classes that have too few.
        """
        if classes is None:
            return np.array(threshold(self.label_odds, coverage, self.basis, self.weights))
        counts = np.bincount(self.labels, self.counted, len(classes))
        needed = images_needed(coverage)
        if few := [f"{name} ({n:.4g})" for name, n in zip(classes, counts.tolist(), strict=True) if n < needed - 1e-6]:
            raise IosrFastError(
                f"a promise for {coverage:.4g} of the pictures of each class needs at least {needed} {self.basis} of "
                f"each class, got fewer of {abbreviate(few)}: "
                "give more pictures of these classes, promise less, or leave per_class out"
            )
        by_class = [self.labels == c for c in range(len(classes))]
        return np.array(
            [threshold(self.label_odds[rows], coverage, self.basis, self.counted[rows]) for rows in by_class]
        )

    def sets(self, logits: np.ndarray, coverage: float = COVERAGE, classes: ClassNames | None = None) -> np.ndarray:
        """(B, C) bool, the labels of each image's set: those whose log p / (1 - p), p = softmax(logits), reaches the
        threshold of `coverage`. At least that share of new images has its label in its set, and hardly more: where more
        images than that are right, sets of unsure images are empty. It is exact where the V images and new ones are
        exchangeable, as those of calibrate_on can be; left-out images are judged by classifiers without their folds,
        for which it holds to first order.
        With the names of the `classes` (C,) this holds for the images of each class (class-conditional or Mondrian
        conformal prediction), whatever the mix of classes among new images.

        Raises what `thresholds` raises. Sources: Sadinle et al., JASA 2019; by classes: Vovk, ACML 2012.
        """
        reached: np.ndarray = log_odds(logits) >= self.thresholds(coverage, classes)
        return reached

    @property
    def confidence(self) -> np.ndarray:
        """(V,) the largest probability."""
        return sigmoid(self.odds[:, 0])

    @cached_property
    def reliability(self) -> Reliability:
        bins = np.ceil(self.confidence * BINS).astype(int).clip(1, BINS) - 1
        counted, total = self.counted, float(self.counted.sum()) or math.nan
        of_bins = np.bincount(bins, counted, BINS)
        sums, right = (np.bincount(bins, counted * part, BINS) for part in (self.confidence, self.right[:, 0]))
        with np.errstate(invalid="ignore"):
            means, shares = sums / of_bins, right / of_bins
        accuracy, loss = (float(counted @ part) / total for part in (self.right[:, 0], self.log_loss))
        error = float(np.abs(right - sums).sum()) / total
        return Reliability(np.bincount(bins, minlength=BINS), means, shares, error, accuracy, loss, self.basis)


def of_logits(
    logits: np.ndarray,
    labels: np.ndarray,
    basis: str = LEFT_OUT,
    units: np.ndarray | None = None,
    tree: Tree | None = None,
) -> Judged:
    """Labelled images (V,), by the logits (V, C) of a classifier that has not seen them: the out-of-fold logits of
    support images (out_of_fold.OutOfFold), or those of other images, as in split conformal prediction. `units` (V,) as
    of folds.Folds.
    """
    labels, exact = np.asarray(labels, np.int64), np.asarray(logits, np.float64)
    tree = tree or Tree(((),) * exact.shape[1])
    odds, nodes = tree.of_logits(exact)
    return Judged(
        label_odds=log_odds(exact)[np.arange(len(labels)), labels],
        odds=odds,
        right=nodes == tree.levels[:, labels].T,
        log_loss=log_losses(exact, labels),
        labels=labels,
        basis=basis,
        weights=None if units is None else unit_weights(units),
    )


def of_answers(
    logits: np.ndarray, labels: np.ndarray, answers: np.ndarray, units: np.ndarray, basis: str = LEFT_OUT
) -> Judged:
    """The `answers` (V, C) bool to pictures that may have several labels, a row for each, by the logits (V, C) of each
    class by itself; `labels` (V, C) bool, `units` (V,) as of `of_logits`.

    >>> logits, labels = np.array([[3.0, 2.0], [4.0, -9.0]]), np.array([[True, False], [True, False]])
    >>> one = of_answers(logits, labels, logits > 0, units=np.arange(2))
    >>> one.odds[:, 0].tolist(), one.right[:, 0].tolist(), round(one.count, 2)
    ([3.0, 2.0, 4.0], [True, False, True], 1.8)
    """
    pictures, classes = np.nonzero(answers)
    odds, right = logits.astype(np.float64)[pictures, classes], labels[pictures, classes]
    losses = np.logaddexp(0.0, np.where(right, -odds, odds))
    return Judged(odds, odds[:, None], right[:, None], losses, classes, LABELS_OF + basis, units=units[pictures])


def sets_of_labels(classes: np.ndarray, logits: np.ndarray, members: np.ndarray) -> list[np.ndarray]:
    """The labels of each image's set out of `classes` (C,), the most likely first; logits and members (B, C).

    >>> sets_of_labels(np.array(["a", "b", "c"]), np.array([[1.0, 3.0, 2.0]]), np.array([[True, True, False]]))
    [array(['b', 'a'], dtype='<U1')]
    """
    order = np.argsort(-logits, axis=1, kind="stable")
    return [classes[row[chosen[row]]] for row, chosen in zip(order, members, strict=True)]


def log_odds(logits: np.ndarray) -> np.ndarray:
    """log p / (1 - p) of p = softmax(logits), (B, C) float64, C >= 2; it does not saturate where p is almost 1."""
    exact = logits.astype(np.float64)
    if not len(exact):
        return exact
    logs = log_softmax(exact)
    odds = logs - np.log1p(-np.minimum(np.exp(logs), 0.5))  # that of the largest p, which may exceed 0.5, is next
    odds[np.arange(len(exact)), exact.argmax(1)] = log_odds_of_largest(exact)
    return odds


def threshold(scores: np.ndarray, share: float, basis: str = LEFT_OUT, weights: np.ndarray | None = None) -> float:
    """The largest t that at least `share` of new images reach, (0, 1), if they are exchangeable with the V that have
    `scores`: the floor((1 - share)(V + 1))-th smallest (split conformal prediction; Papadopoulos et al., ECML 2002).
    With weights (V,) it is the largest score up to which scores weigh (1 - share)(sum of weights + 1) or less.

    Raises IosrFastError where the images are too few for the promise: none weighs so little.
    """
    order = np.argsort(scores, kind="stable")
    weighed = np.cumsum(np.ones(len(scores)) if weights is None else weights[order])
    count = float(weighed[-1]) if len(weighed) else 0.0
    rank = int(np.searchsorted(weighed, (1.0 - share) * (count + 1.0) + 1e-9, side="right"))
    if count < images_needed(share) - 1e-6 or rank < 1:
        raise IosrFastError(
            f"a promise for {share:.4g} of the pictures needs at least {images_needed(share)} {basis}, "
            f"got {counted_as(len(scores), count)}: give more pictures of each class, at least two, or promise less"
        )
    return float(scores[order[rank - 1]])


def counted_as(images: int, count: float, basis: str = "", of: str = "") -> str:
    """A number of images of a `basis` in words, and what they count as, if that is less. `of` is a basis that is not
    said again.

    >>> counted_as(1616, 1616.0, LEFT_OUT), counted_as(1616, 545.3)
    ('1,616 left-out support images', '1,616 (effective sample size 545: look-alikes are not independent)')
    """
    what = "labels of one picture" if (basis or of).startswith(LABELS_OF) else "look-alikes"
    fewer = f" (effective sample size {count:,.0f}: {what} are not independent)" if count < images - 0.5 else ""
    return f"{images:,}" + (f" {basis}" if basis else "") + fewer


def images_needed(share: float) -> int:
    """The least number of left-out images with which `threshold` can promise `share`.

    >>> images_needed(0.95), images_needed(0.9)
    (19, 9)
    """
    return math.ceil(1.0 / (1.0 - share) - 1e-9) - 1
