"""Wrong labels: how many there are, and for each label the probability that it is wrong."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from iosr_fast.methods.log_loss import log_losses

# Factors of the logits that are searched. Those of a plan are calibrated, and wrong labels make them too small.
_LOG_FACTORS = np.linspace(-np.log(16.0), np.log(16.0), 17)
_MOST = 0.5
_RIGHT = 8  # further labels, all right: the prior Beta(1, 9) of the share, which decides if the logits say nothing


@dataclass(frozen=True, eq=False)
class LabelNoise:
    """The result of `fit_label_noise` for N images.

    wrong     (N,) float64, the probability that the label is wrong
    surprise  (N,) float64, -log of the label's probability, in nats: `wrong` rises with it, and has ties where it is 1
    share     of the labels that are wrong, in (0, 0.5]
    factor    of the logits, by which right labels are most probable
    """

    wrong: np.ndarray
    surprise: np.ndarray
    share: float
    factor: float


def fit_label_noise(logits: np.ndarray, labels: np.ndarray) -> LabelNoise:
    """How probable it is that each of N labels is wrong, by logits (N, C) that have not seen them; float64.

    A label is right with probability 1 - share and then drawn from p = softmax(factor * logits); a wrong one is any of
    the other classes. Both parameters maximise the likelihood of the labels and of eight more that are right,

        sum over i of log q[i] + 8 log(1 - share),  q[i] = (1 - share) p[i, y_i] + share (1 - p[i, y_i]) / (C - 1),

    and wrong[i] = share (1 - p[i, y_i]) / (C - 1) / q[i] by Bayes' rule. So the sum of `wrong` estimates the number of
    wrong labels, and a label counts as wrong rather than right if the classifier finds it less probable than an error.
    A classifier that is often mistaken gives its labels probabilities that say so, and accuses few. The share is at
    least half an image's, so that images are still ranked if no label is wrong.

    labels (N,) int64. For N = 0 the share is NaN.
    """
    if not len(labels):
        return LabelNoise(np.zeros(0), np.zeros(0), float("nan"), 1.0)
    others = logits.shape[1] - 1
    exact = logits.astype(np.float64)

    def fit_at(log_factor: float) -> tuple[float, LabelNoise]:
        factor = float(np.exp(log_factor))
        surprise = log_losses(factor * exact, labels)
        p = np.exp(-surprise)
        share = _share(p, others)
        right = (1 - share) * p
        wrong = share * (1 - p) / others
        likelihood = float(np.log(right + wrong).sum() + _RIGHT * np.log(1 - share))
        return likelihood, LabelNoise(wrong / (right + wrong), surprise, share, factor)

    best = int(np.argmax([fit_at(value)[0] for value in _LOG_FACTORS]))
    low, high = (float(_LOG_FACTORS[k]) for k in (max(best - 1, 0), min(best + 1, len(_LOG_FACTORS) - 1)))
    for _ in range(12):  # thirds of the interval: likelihood has one maximum there; its width falls to 0.5%
        one = low + (high - low) / 3
        two = high - (high - low) / 3
        low, high = (low, two) if fit_at(one)[0] >= fit_at(two)[0] else (one, high)
    return fit_at((low + high) / 2)[1]


def _share(p: np.ndarray, others: int) -> float:
    """The share of highest likelihood for the labels' probabilities p (N,), which is concave in it."""
    low = 0.5 / len(p)
    high = _MOST
    gain = (1 - p) / others - p
    for _ in range(30):
        middle = (low + high) / 2
        if (gain / (p + middle * gain)).sum() > _RIGHT / (1 - middle):
            low = middle
        else:
            high = middle
    return (low + high) / 2
