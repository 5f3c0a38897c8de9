"""How right probabilities are: accuracy, log-loss and expected calibration error of a batch of logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BINS = 15
ROWS = 4096  # scored at a time in float64


@dataclass(frozen=True)
class Scores:
    """On one set of test images: the accuracy, the log-loss in nats and the expected calibration error, in 0..1."""

    accuracy: float
    log_loss: float
    calibration_error: float


def measure(logits: np.ndarray, labels: np.ndarray) -> Scores:
    """Scores of p = softmax(logits), (B, C), for labels (B,), computed in float64.

        accuracy            the share of images whose label is the first of the highest logits
        log-loss            mean of -log p[b, label of b]
        calibration error   sum over bins m of (images in m / B) * |accuracy in m - mean confidence in m|

    The confidence of an image is its highest probability; the BINS bins ((m - 1) / BINS, m / BINS] are of equal width.
    Source of the calibration error: Guo et al., On Calibration of Modern Neural Networks, ICML 2017, equation 3.

    >>> import numpy as np
    >>> scores = measure(np.log([[0.8, 0.2], [0.6, 0.4]]), np.array([0, 1]))
    >>> scores.accuracy, round(scores.log_loss, 4), round(scores.calibration_error, 4)
    (0.5, 0.5697, 0.4)
    """
    parts = [_confidences(logits[k : k + ROWS], labels[k : k + ROWS]) for k in range(0, len(labels), ROWS)]
    of_label, confidence, right = (np.concatenate(part) for part in zip(*parts, strict=True))
    bins = np.ceil(confidence * BINS).astype(int).clip(1, BINS) - 1
    gaps = np.bincount(bins, right, BINS) - np.bincount(bins, confidence, BINS)
    return Scores(float(right.mean()), float(-of_label.mean()), float(np.abs(gaps).sum() / len(labels)))


def measure_probabilities(probabilities: np.ndarray, labels: np.ndarray) -> Scores:
    """As `measure`. A probability of 0 counts as the smallest step of float64 from 1, as in scikit-learn's log_loss."""
    return measure(np.log(np.maximum(probabilities, np.finfo(np.float64).eps, dtype=np.float64)), labels)


def _confidences(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each image the label's log-probability, the highest probability, and whether that is the label's."""
    rows = np.arange(len(labels))
    exact = logits.astype(np.float64)
    exact -= exact.max(1, keepdims=True)
    total = np.exp(exact).sum(1)
    return exact[rows, labels] - np.log(total), 1.0 / total, exact.argmax(1) == labels
