"""Links: how logits become answers. An answer is a pair of a picture and a class."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, TypeAlias

import numpy as np

from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods.log_loss import fit_binary, sigmoid
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.reference import softmax
from iosr_fast.utils.ranking import mean_average_precision

_TINY = 1e-300  # whose logarithm is finite
_LEAST = 1e-4  # of a scale that a plan can have


@dataclass(frozen=True)
class Softmax:
    """A picture has one class, that with the largest logit; there are no thresholds.

    >>> link = Softmax()
    >>> link.named(link.decide(np.array([[1.0, 3.0], [2.0, 0.0]])), np.array(["cat", "dog"]))
    array(['dog', 'cat'], dtype='<U3')
    """

    thresholds: ClassVar[None] = None

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """(B, C): softmax of the logits."""
        return softmax(logits)

    def decision(self, logits: np.ndarray) -> np.ndarray:
        """`decision_function` of logits (B, C): of two classes (B,), the second one's logit minus the first one's."""
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

    def listed(self, logits: np.ndarray, top: int) -> np.ndarray:
        """(B, k) the `top` classes of each query, or all if there are fewer, the largest logit first; equal ones in
        their order, as in argmax."""
        return largest(logits, top)

    def decide(self, logits: np.ndarray) -> np.ndarray:
        """(B,) int64, the class of each query's largest logit, of equal ones the first."""
        return logits.argmax(1)

    def named(self, decided: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """The label (B,) of each query; `labels` (C,) are the classes'."""
        return labels[decided]

    def entropy(self, logits: np.ndarray) -> np.ndarray:
        """(B,) float64, in nats: how uncertain the classes of each query are."""
        p = softmax(logits.astype(np.float64))
        result: np.ndarray = -(p * np.log(np.maximum(p, _TINY))).sum(1)
        return result

    def quality(self, truth: np.ndarray, logits: np.ndarray) -> float:
        """The share of queries whose largest logit is that of their class, `truth` (B,)."""
        if not len(truth):
            raise IosrFastError("expected at least one image to score, got none")
        return float((logits.argmax(1) == truth).mean())


@dataclass(frozen=True, eq=False)
class Sigmoid:
    """A picture has each class whose probability reaches the class's threshold, (C,) float32: several, one or none.

    >>> link = Sigmoid(np.array([0.5, 0.2], np.float32))
    >>> decided = link.decide(np.array([[3.0, -1.0], [-3.0, -9.0]]))
    >>> link.named(decided, np.array(["cat", "dog"])).tolist() == [frozenset({"cat", "dog"}), frozenset()]
    True
    """

    thresholds: np.ndarray

    @classmethod
    def of(cls, logits: np.ndarray) -> Sigmoid:
        """The thresholds of left-out images with these logits (N, C): halfway between the class's own (f1_thresholds)
        and their mean, because left-out images of one class are few."""
        thresholds = f1_thresholds(sigmoid(logits))
        return cls((thresholds + thresholds.mean()) / 2)

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """(B, C), of each class by itself: 1 / (1 + exp(-logit))."""
        return sigmoid(logits)

    def decision(self, logits: np.ndarray) -> np.ndarray:
        """`decision_function`: the logits (B, C)."""
        return logits

    def decide(self, logits: np.ndarray) -> np.ndarray:
        """(B, C) bool, the classes of each query."""
        reached: np.ndarray = sigmoid(logits.astype(np.float64)) >= self.thresholds
        return reached

    def listed(self, logits: np.ndarray, top: int) -> list[np.ndarray]:
        """All classes of each query, the most likely first."""
        ordered = zip(np.argsort(-sigmoid(logits), axis=1, kind="stable"), self.decide(logits), strict=True)
        return [order[chosen[order]] for order, chosen in ordered]

    def named(self, decided: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """A frozenset of labels for each query, (B,) of dtype object; an indicator (B, C) of int64 where the `labels`
        (C,) of the classes are integers."""
        if labels.dtype.kind == "i":
            return decided.astype(np.int64)
        sets = np.empty(len(decided), object)
        sets[:] = [frozenset(labels[row].tolist()) for row in decided]
        return sets

    def entropy(self, logits: np.ndarray) -> np.ndarray:
        """(B,) float64, in nats: how uncertain it is which classes each query has, summed over the classes."""
        p = sigmoid(logits.astype(np.float64))
        result: np.ndarray = -sum(q * np.log(np.maximum(q, _TINY)) for q in (p, 1 - p)).sum(1)
        return result

    def quality(self, truth: np.ndarray, logits: np.ndarray) -> float:
        """The mean average precision over the classes that a query has; `truth` (B, C) bool."""
        return mean_average_precision(truth, logits)


@dataclass(frozen=True, eq=False)
class Platt:
    """scale * logits + bias (C,): logits of each class by itself, whose sigmoid has its probability (Platt, 1999).

    >>> Platt(2.0, np.array([0.0, 1.0])).logits(np.array([[1.0, 1.0]]))
    array([[2., 3.]])
    """

    scale: float
    bias: np.ndarray

    @classmethod
    def fit(cls, logits: np.ndarray, labels: np.ndarray, judged: np.ndarray) -> Platt:
        """Of left-out logits (N, C) with the indicator (N, C) of labels, by the `judged` classes (C,), whose biases are
        held at a common one as by log_loss.fit_binary. Without any the odds at the mean logit are those of a label."""
        logits = logits.astype(np.float64)
        if judged.any():
            spread = float(logits.std()) or 1.0  # fit_binary takes parts in units of their spread
            fitted = fit_binary([logits / spread], labels, judged)
            assert fitted.bias is not None
            return cls(max(float(fitted.weights[0]) / spread, _LEAST), fitted.bias)
        labelled = int(labels.sum())
        odds = math.log(labelled / max(labels.size - labelled, 0.5))
        return cls(1.0, np.full(labels.shape[1], odds - float(logits.mean())))

    def logits(self, logits: np.ndarray) -> np.ndarray:
        """(B, C) float64."""
        return self.scale * logits.astype(np.float64) + self.bias

    def applied_to(self, plan: ScoringPlan) -> ScoringPlan:
        """The plan that has these logits."""
        scaled = plan.scaled(self.scale)
        before = 0.0 if scaled.bias is None else scaled.bias
        return replace(scaled, bias=(before + self.bias).astype(np.float32))


Link: TypeAlias = Softmax | Sigmoid


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """(B, k) column indices of each row's largest values, largest first; equal ones in their order, as in argmax."""
    width = values.shape[1]
    if count >= width or width <= 256:
        return np.argsort(-values, axis=1, kind="stable")[:, :count]
    # The k-th largest value of a row marks the candidates for the first k; ties at the mark fall to the lowest index.
    marks = np.partition(values, width - count, axis=1)[:, width - count]
    indices = np.empty((len(values), count), np.int64)
    for b, (row, mark) in enumerate(zip(values, marks, strict=True)):
        candidates = np.flatnonzero(row >= mark)
        indices[b] = candidates[np.argsort(-row[candidates], kind="stable")][:count]
    return indices


def f1_thresholds(probabilities: np.ndarray) -> np.ndarray:
    """The threshold (C,) float32 of each class that maximises its expected F1 on images of which these are the
    probabilities (N, C).

    F[k] = 2 sum_{i <= k} p[i] / (k + sum_i p[i]) of the k largest p of a class; the threshold is max_k F[k] / 2, which
    is never above 0.5. Only probabilities are used, because few images have the label.

    Source: Lipton, Elkan & Naryanaswamy, ECML PKDD 2014, theorem 1 (half of the optimal F1).
    """
    largest = -np.sort(-probabilities, axis=0)
    first = np.arange(1, len(largest) + 1)[:, None]
    expected = 2 * np.cumsum(largest, axis=0) / (first + largest.sum(0))
    return (expected.max(0) / 2).astype(np.float32)
