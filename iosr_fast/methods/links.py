"""How logits become answers: the largest class of an image, or each class by itself from its threshold on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from iosr_fast.methods.log_loss import PENALTY, Weights, fit_binary, fit_weights, sigmoid
from iosr_fast.scoring.reference import softmax

# How firmly the bias of a class is held at the common one, in images with and without the label. From the demo's
# validation concepts, pasted two to an image: from 0.5 to 1e6 the log-loss of other images changes by less than 1%.
SHRINKAGE = 4.0
_PAIRS = 1 << 21  # of image and class that weights are fitted to; if there are more, every n-th image is used


@dataclass(frozen=True)
class Softmax:
    """One label an image, that of the largest logit.

    >>> Softmax().members(np.array([[1.0, 3.0], [2.0, 0.0]])).tolist()
    [[False, True], [True, False]]
    """

    @staticmethod
    def fit(
        parts: Sequence[np.ndarray],
        labels: np.ndarray,
        prior: np.ndarray | None = None,
        strength: float = PENALTY,
        offset: np.ndarray | None = None,
    ) -> Weights:
        """The weights of parts (V, C) on images with labels (V,), without a bias (log_loss.fit_weights)."""
        weights, loss = fit_weights(parts, labels, prior, strength, offset=offset)
        return Weights(weights, loss)

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """(B, C) of logits (B, C), of their dtype; the sum of a row is 1."""
        return softmax(logits)

    def members(self, logits: np.ndarray) -> np.ndarray:
        """(B, C) bool, the class of each image; of equal logits the first one."""
        return logits.argmax(1)[:, None] == np.arange(logits.shape[1])


@dataclass(frozen=True, eq=False)
class Sigmoid:
    """Any number of labels an image: those whose probability reaches their threshold, `thresholds` (C,) float32.

    >>> Sigmoid(np.array([0.5, 0.2])).members(np.array([[1.0, -1.0], [-1.0, -2.0]])).tolist()
    [[True, True], [False, False]]
    """

    thresholds: np.ndarray

    @classmethod
    def of(cls, logits: np.ndarray) -> Sigmoid:
        """The thresholds of left-out images with these logits (N, C): halfway between the class's own (f1_thresholds)
        and their mean, because left-out images of one class are few."""
        thresholds = f1_thresholds(sigmoid(logits))
        return cls((thresholds + thresholds.mean()) / 2)

    @staticmethod
    def fit(
        parts: Sequence[np.ndarray], labels: np.ndarray, judged: np.ndarray, shrinkage: float = SHRINKAGE
    ) -> Weights:
        """The weights of parts (N, C) and the biases of classes, those of a mask (C,), on images with the indicator
        (N, C) of labels (log_loss.fit_binary)."""
        some = slice(None, None, -(-labels.size // _PAIRS))
        return fit_binary([part[some] for part in parts], labels[some], judged, shrinkage)

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """(B, C) 1 / (1 + exp(-logits)), each class by itself."""
        return sigmoid(logits)

    def members(self, logits: np.ndarray) -> np.ndarray:
        """(B, C) bool, the classes of each image."""
        reached: np.ndarray = sigmoid(logits.astype(np.float64)) >= self.thresholds
        return reached


Link: TypeAlias = Softmax | Sigmoid


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
