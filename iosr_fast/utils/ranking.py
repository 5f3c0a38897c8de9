"""How well a score separates two groups."""

from __future__ import annotations

import numpy as np


def auroc(higher: np.ndarray, lower: np.ndarray) -> float:
    """The probability that one of `higher` exceeds one of `lower` (ties count half): 1 at best, 0.5 by chance.

    >>> auroc(np.array([2.0, 3.0]), np.array([1.0, 2.0]))
    0.875
    """
    ordered = np.sort(lower)
    below = np.searchsorted(ordered, higher, side="left")
    up_to = np.searchsorted(ordered, higher, side="right")
    return float((below + up_to).mean() / 2 / len(ordered))


def mean_average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """The mean over classes of the average precision, of those classes that an image has; NaN if there is none.

    labels (B, C) bool, scores (B, C). The average precision of a class is sum_i (R[i] - R[i - 1]) P[i], with precision
    P[i] and recall R[i] of the images with at least the i-th largest score; equal scores count as one
    (sklearn.metrics.average_precision_score, average="macro").

    >>> mean_average_precision(np.array([[True], [False], [True]]), np.array([[3.0], [2.0], [1.0]])).__round__(3)
    0.833
    """
    present = np.flatnonzero(labels.any(0))
    return float(np.mean([_average_precision(labels[:, c], scores[:, c]) for c in present])) if len(present) else np.nan


def _average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    order = np.argsort(-scores, kind="stable")
    right, ranked = np.cumsum(labels[order]), scores[order]
    last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)  # of each group of equal scores
    precision = right[last] / (last + 1)
    return float(np.diff(right[last], prepend=0) @ precision / right[-1])
