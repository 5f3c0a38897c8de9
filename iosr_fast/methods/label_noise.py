"""Wrong labels: how many there are, and for each label the probability that it is wrong."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from iosr_fast.methods.links import Platt
from iosr_fast.methods.log_loss import Evaluated, log_losses, newton, sigmoid
from iosr_fast.methods.models.model import TextModel
from iosr_fast.methods.out_of_fold import OutOfFold
from iosr_fast.methods.support_set import SupportSet

# Factors of the logits that are searched. Those of a plan are calibrated, and wrong labels make them too small.
_LOG_FACTORS = np.linspace(-np.log(16.0), np.log(16.0), 17)
_MOST = 0.5
_RIGHT = 8  # further labels, all right: the prior Beta(1, 9) of the share, which decides if the logits say nothing
_PAIRS = 1 << 20  # of image and class that several labels are fitted to; of more, those of every n-th image
_START, _LOG_STARTS = 0.05, (0.0, 1.0, 2.0)  # of both shares, and logs of the factor: likelihood may have two maxima


@dataclass(frozen=True, eq=False)
class LabelNoise:
    """The result of `fit_label_noise` for N images, and of `fit_missing_labels` for N images and C classes.

    wrong     (N,) or (N, C) float64, the probability that the label, or that there is none, is wrong
    surprise  of the same shape: `wrong` rises with it, and has ties where it is 1. -log of the label's probability, in
              nats; with several labels an image the log odds of `wrong`
    share     of the labels that are wrong, in (0, 0.5]
    factor    of the logits, by which right labels are most probable
    missing   with several labels an image the share of right labels that are not there, in (0, 0.5]
    """

    wrong: np.ndarray
    surprise: np.ndarray
    share: float
    factor: float
    missing: float = 0.0


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


def fit_missing_labels(logits: np.ndarray, labels: np.ndarray) -> LabelNoise:
    """How probable it is that a label that an image has is wrong, and that one that it has not is missing, by logits
    (N, C) that have not seen the labels (N, C) bool; float64.

    An image belongs to a class with probability p = sigmoid(factor * logit + bias). It then lacks the label with
    probability `missing`; an image of another class has it with probability share * odds, odds being those of a label
    or 1 if they are above: `share` is about that of the labels that are wrong. The four parameters maximise the
    likelihood of the labels and of eight more that are neither wrong nor missing,

        sum over i, c of log q[i, c] or, without the label, log(1 - q[i, c]) + 8 log(1 - share) + 8 log(1 - missing),
        q = (1 - missing) p + share odds (1 - p),

    and wrong[i, c] = share odds (1 - p) / q, or missing p / (1 - q), by Bayes' rule. The bias is needed, because
    logits that were calibrated to labels of which many are missing say too little everywhere. Without any label, or
    with all, nothing can be wrong.

    Source: Mnih & Hinton, Learning to label aerial images from noisy data, ICML 2012 (the two kinds of errors).
    """
    labelled = int(labels.sum())
    if labelled in (0, labels.size):
        return LabelNoise(np.zeros(labels.shape), np.zeros(labels.shape), float("nan"), 1.0)
    some = slice(None, None, -(-labels.size // _PAIRS))
    odds = min(labelled / (labels.size - labelled), 1.0)
    y, z = labels[some], logits[some].astype(np.float64)
    low = np.array([_LOG_FACTORS[0], -np.inf, 0.5 / labelled, 0.5 / labelled])
    high = np.array([_LOG_FACTORS[-1], np.inf, _MOST, _MOST])

    def evaluate(point: np.ndarray) -> Evaluated:  # the log of the factor, the bias, share and missing
        p = sigmoid(np.exp(point[0]) * z + point[1])
        q = (1 - point[3]) * p + point[2] * odds * (1 - p)
        loss = -float(np.log(np.where(y, q, 1 - q)).sum())
        return loss - _RIGHT * float(np.log1p(-point[2:]).sum()), loss, p

    def step(point: np.ndarray, p: np.ndarray) -> np.ndarray:  # Fisher's scoring
        q = (1 - point[3]) * p + point[2] * odds * (1 - p)
        by_bias = (1 - point[3] - point[2] * odds) * p * (1 - p)
        slopes = np.stack([by_bias * np.exp(point[0]) * z, by_bias, odds * (1 - p), -p]).reshape(4, -1)
        weighted = slopes / (q * (1 - q)).ravel()
        prior = np.append([0.0, 0.0], _RIGHT / (1 - point[2:]))
        gradient = weighted @ (q - y).ravel() + prior
        second = weighted @ slopes.T + np.diag(prior**2 / _RIGHT + 1e-9)
        free = ((point > low) | (gradient < 0)) & ((point < high) | (gradient > 0))
        result = np.zeros(4)
        result[free] = np.linalg.solve(second[np.ix_(free, free)], gradient[free])
        return result

    starts = (np.clip(np.array([log_factor, 0.0, _START, _START]), low, high) for log_factor in _LOG_STARTS)
    found = [newton(start, evaluate, step, lambda tried: np.clip(tried, low, high), 1e-6)[0] for start in starts]
    point = min(found, key=lambda point: evaluate(point)[0])
    factor, (bias, share, missing) = float(np.exp(point[0])), point[1:].tolist()
    likely = factor * logits.astype(np.float64) + bias
    if_there = np.log(share * odds / (1 - missing)) - likely
    if_missing = np.log(missing / (1 - share * odds)) + likely
    surprise = np.where(labels, if_there, if_missing)
    return LabelNoise(sigmoid(surprise), surprise, share, factor, missing)


@dataclass(frozen=True, eq=False)
class JudgedLabels:
    """By what the labels of N images of C classes were judged, and how.

    basis            "left-out images"; "class names", if nothing could be left out; "nothing"
    logits           (N, C)
    scored           (N,) bool, which images have logits that have not seen them
    wrong, surprise  (N, C), as of LabelNoise; NaN for what can't be judged, and with one label an image for all classes
                     but its own
    expected         how many labels are wrong or missing
    suspicion        (N,) the probability that a label of the image is wrong or missing; NaN where none can be judged
    most_suspicious  the images by it, falling
    """

    basis: str
    logits: np.ndarray
    scored: np.ndarray
    wrong: np.ndarray
    surprise: np.ndarray
    expected: float
    suspicion: np.ndarray
    most_suspicious: list[int]


def judge_labels(support: SupportSet, left_out: OutOfFold) -> JudgedLabels:
    """Judge the labels of a support set by its left-out logits, or by the class names if there are none. Where images
    may have several labels, those of a class of which nothing can be left out are not judged."""
    several = support.owners is not None
    logits = left_out.by_image()
    scored = np.isfinite(logits[:, 0])
    judged = left_out.folds.distinct > 1 if several else scored  # classes (C,), or images (N,)
    basis = "left-out images"
    if not judged.any():
        basis, scored = "nothing", np.zeros(len(logits), bool)
        if support.text is not None and len(logits):
            basis, judged = "class names", np.ones(len(judged), bool)
            logits = TextModel(support).scores(support.as_queries)
            if several:
                logits = Platt.fit(logits, support.indicator, judged).logits(logits)
    wrong, surprise = np.full((2, *logits.shape), np.nan)
    if several:
        noise = fit_missing_labels(logits[:, judged], support.indicator[:, judged])
        wrong[:, judged], surprise[:, judged] = noise.wrong, noise.surprise
        right = np.where(judged, 1.0 - wrong, 1.0).prod(1)
        suspicion = 1.0 - right if judged.any() else np.full(len(logits), np.nan)
        most = np.where(judged, surprise, -np.inf).max(1)
        order = np.lexsort((-most, -suspicion))
    else:
        own = np.arange(len(logits)), support.labels
        noise = fit_label_noise(logits[judged], own[1][judged])
        pairs = own[0][judged], own[1][judged]
        wrong[pairs], surprise[pairs] = noise.wrong, noise.surprise
        suspicion, order = wrong[own], np.argsort(-surprise[own], kind="stable")
    expected = float(noise.wrong.sum())
    return JudgedLabels(basis, logits, scored, wrong, surprise, expected, suspicion, order.tolist())
