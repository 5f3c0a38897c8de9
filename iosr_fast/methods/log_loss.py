"""Weights with the least log-loss: of a softmax over classes, or of each class by itself; by Newton's method."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from iosr_fast.methods.support_set import ROUNDING

# The largest alpha, and the largest factor of logits: float32 logits then stay far from overflow (fields.LARGEST).
MAX_ALPHA = 1e8
_STEPS = 50
_SMALL = 1e-9
# Of half the squares of weights, divided by the samples: without it they would grow without bound if all are right.
PENALTY = 0.01
# The smallest weight of one of two directions, in units of its spread: it is negligible compared with the other one.
_LEAST = 1e-4
# The largest logarithm of a temperature in units of the spread of the logits, and of its inverse.
_WIDEST = math.log(1e4)
# How firmly the bias of a class is held at the common one, in images with and without the label. From the demo's
# validation concepts, pasted two to an image: from 0.5 to 1e6 the log-loss of other images changes by less than 1%.
SHRINKAGE = 4.0
_PAIRS = 1 << 21  # of image and class that `fit_binary` takes; if there are more, every n-th image is used
# Elements of logits; if there are more, every n-th sample is used.
_LARGEST = 1 << 18


# The loss with its penalty, the loss without, and the probabilities of which it is taken.
Evaluated = tuple[float, float, np.ndarray]


class Weights(NamedTuple):
    """The logits sum_k weights[k] parts[k] + bias have this mean log-loss, in nats. The biases (C,) of classes are near
    a common one; None: there is none."""

    weights: np.ndarray
    loss: float
    bias: np.ndarray | None = None


def newton(
    start: np.ndarray,
    evaluate: Callable[[np.ndarray], Evaluated],
    step: Callable[[np.ndarray, np.ndarray], np.ndarray],
    project: Callable[[np.ndarray], np.ndarray],
    least_gain: float,
) -> tuple[np.ndarray, float]:
    """The point that minimises a convex loss, and the loss there without penalty: Newton's method with step halving and
    projection.

    `evaluate` gives what a point is Evaluated to, `step` the inverse second derivatives times the gradient at a point
    with these probabilities, `project` the allowed point that is nearest. A step that gains less than `least_gain`, or
    none however short, is the last.
    """
    point = start
    best = evaluate(start)
    for _ in range(_STEPS):
        direction = step(point, best[2])
        size = 1.0
        better = False
        while size > 1e-4 and not better:
            tried = project(point - size * direction)
            evaluated = evaluate(tried)
            better = evaluated[0] < best[0]
            size = size / 2
        if not better:
            break
        gained = best[0] - evaluated[0]
        point, best = tried, evaluated
        if gained < least_gain:
            break
    return point, best[1]


def fit_weights(
    parts: Sequence[np.ndarray],
    labels: np.ndarray,
    prior: np.ndarray | None = None,
    strength: float = PENALTY,
    least: float = 0.0,
    most: np.ndarray | float = np.inf,
    offset: np.ndarray | None = None,
) -> tuple[np.ndarray, float]:
    """The weights w, from `least` to `most`, of K parts (V, C) with the least log-loss, and that loss in nats a sample.

    Mean over samples of -log softmax(offset + sum_k w_k parts[k])[y] plus strength / (2 V) |w - prior|^2 (None: 0):
    convex, so the minimum is unique if strength > 0. A weight of exactly 0 says that its part adds nothing. The loss
    that is returned has no penalty. The parts should be of one scale, as spread by classes. offset (C,), None: 0.
    """
    rows = np.arange(len(labels))
    samples = len(labels)
    # The label's own logit is then 0, so the loss is the logarithm of a sum with a term of 1: never below 0.
    features = [(part - part[rows, labels][:, None]).astype(np.float32) for part in parts]
    centre = np.zeros(len(parts)) if prior is None else np.asarray(prior, np.float64)
    offsets = 0.0 if offset is None else (offset - offset[labels][:, None]).astype(np.float32)

    def evaluate(weights: np.ndarray) -> Evaluated:
        logits = np.float32(weights[0]) * features[0] + offsets
        for weight, part in zip(weights[1:], features[1:], strict=True):
            logits += np.float32(weight) * part
        top = logits.max(1, keepdims=True)
        logits -= top
        powers = np.exp(logits, out=logits)
        sums = powers.sum(1, keepdims=True)
        loss = float((np.log(sums) + top).mean(dtype=np.float64))
        powers /= sums
        return loss + strength / (2 * samples) * float(((weights - centre) ** 2).sum()), loss, powers

    def step(weights: np.ndarray, of_classes: np.ndarray) -> np.ndarray:
        means = np.stack([np.einsum("vc,vc->v", of_classes, part) for part in features]).astype(np.float64)
        second = np.array([[np.vdot(of_classes * left, right) for right in features] for left in features], np.float64)
        gradient = means.mean(1) + strength / samples * (weights - centre)
        curvature = (second - means @ means.T + strength * np.eye(len(weights))) / samples
        free = (weights > least) | (gradient < 0)
        result = np.zeros(len(weights))
        result[free] = np.linalg.solve(curvature[np.ix_(free, free)] + _SMALL * np.eye(free.sum()), gradient[free])
        return result

    start = np.minimum(np.maximum(centre, max(1.0 / len(parts), least)), most)
    return newton(start, evaluate, step, lambda point: np.minimum(np.maximum(point, least), most), 1e-6)


def fit_alpha(base: np.ndarray, slope: np.ndarray, labels: np.ndarray) -> tuple[float, float, float]:
    """The alpha from 0 to MAX_ALPHA and the factor > 0 with the least log-loss of softmax(factor * (z + alpha * s)),
    and that loss. It is convex in factor and factor * alpha (`fit_weights`). base, slope (V, C), labels (V,).

    A direction that is constant over classes (spread 0) is left out: alpha is 0 if s is constant, and 1 if only z is.
    """
    some = _sample(base)
    parts = [base[some].astype(np.float64), slope[some].astype(np.float64)]
    labels = labels[some]
    spreads = np.array([spread(part) for part in parts])
    alpha = 1.0 if spreads[1] else 0.0
    if spreads.all():
        scaled = [part / one for part, one in zip(parts, spreads, strict=True)]
        weights, loss = fit_weights(scaled, labels, least=_LEAST, most=MAX_ALPHA * spreads)
        factor, product = weights / spreads
        if product <= MAX_ALPHA * factor:
            return float(product / factor), float(factor), loss
        alpha = MAX_ALPHA
    return alpha, *fit_factor(parts[0] + alpha * parts[1], labels, MAX_ALPHA / max(1.0, alpha))


def fit_factor(logits: np.ndarray, labels: np.ndarray, most: float = MAX_ALPHA) -> tuple[float, float]:
    """The factor from above 0 to `most` with the least log-loss of softmax(factor * logits), and that loss; 1 if the
    logits (V, C) are constant over classes."""
    some = _sample(logits)
    exact = logits[some].astype(np.float64)
    if not (unit := spread(exact)):
        return 1.0, float(np.log(exact.shape[1]))
    (weight,), loss = fit_weights([exact / unit], labels[some], least=_LEAST, most=most * unit)
    return float(weight) / unit, loss


def fit_temperature(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    """The temperature T that minimises the log-loss of softmax(logits / T), mean over images by their weights (V,);
    1 without images, and where the logits (V, C) are constant over classes.

    The label has the target 1 - e and each other class e / (C - 1), e = 1 / (2 n + 2) with n the sum of the weights:
    n right labels do not say that the next one is, and without e they would ask for T = 0. The derivative rises with
    1 / T, and is halved in until 1 / T has 6 digits.

    Sources: Guo et al., On calibration of modern neural networks, ICML 2017; targets as of Platt, 1999, by the estimate
    (n + 1/2) / (n + 1) of Krichevsky and Trofimov, 1981.

    >>> logits = np.array([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    >>> temperature = fit_temperature(logits, np.zeros(4, int), np.ones(4))  # three of four are right
    >>> round(1.0 / (1.0 + math.exp(-4.0 / temperature)), 3)  # 0.9 * 3 / 4 + 0.1 / 4
    0.7
    """
    some = _sample(logits)
    exact, labels, weights = logits[some].astype(np.float64), labels[some], weights[some]
    if not len(labels) or not (unit := spread(exact)):
        return 1.0
    smoothing = 0.5 / (weights.sum() + 1.0)
    own = exact[np.arange(len(labels)), labels]
    target = (1.0 - smoothing) * own + smoothing * (exact.sum(1) - own) / (exact.shape[1] - 1)
    centred = (exact - target[:, None]) / unit
    low, high = -_WIDEST, _WIDEST
    while high - low > 1e-6:
        middle = (low + high) / 2
        slope = weights @ (np.exp(log_softmax(math.exp(middle) * centred)) * centred).sum(1)
        low, high = (low, middle) if slope > 0 else (middle, high)
    return unit * math.exp(-(low + high) / 2)


def spread(part: np.ndarray) -> float:
    """The standard deviation over classes of logits (V, C), or 0 if it is no larger than their rounding in float32.

    A part that is constant over classes changes no softmax and no label; its measured deviation is noise, and dividing
    by it would amplify that noise.
    """
    exact = part[_sample(part)].astype(np.float64)
    deviation = float((exact - exact.mean(1, keepdims=True)).std())
    return deviation if deviation > max(ROUNDING * float(np.abs(exact).max()), 1e-12) else 0.0


def _sample(logits: np.ndarray) -> slice:
    """All rows, or every n-th of many."""
    return slice(None, None, max(1, -(-logits.size // _LARGEST)))


def fit_binary(
    parts: Sequence[np.ndarray], labels: np.ndarray, used: np.ndarray, shrinkage: float = SHRINKAGE
) -> Weights:
    """The weights w >= 0 (K,) and biases (C,) of K parts (N, C) that minimise

        sum over images n and classes c of `used`: log(1 + exp(z[n, c])) - y[n, c] z[n, c]
        + shrinkage / 2 * sum_c (bias[c] - common)^2 + 0.005 |w|^2,   z = sum_k w[k] parts[k] + bias[c].

    The differences bias[c] - common are eliminated from Newton's step (their block of second derivatives is diagonal),
    so that it costs N C K^2. A class whose images say little, as it has few with the label, keeps the common bias; so
    does a class that `used` (C,) bool leaves out. Parts should be of one scale. labels (N, C) bool.

    Source: Platt scaling (1999) with partial pooling of the intercepts (Gelman & Hill, 2007, section 12.2).
    """
    some = slice(None, None, -(-labels.size // _PAIRS))
    chosen = np.stack([np.asarray(part[some], np.float64)[:, used] for part in parts])
    y = labels[some][:, used]
    k = len(parts)
    # About 0: far from it the loss is flat, Newton's steps overshoot, and weights at 0 leave the bias where it is.
    centres = chosen.mean((1, 2), keepdims=True)
    centred = chosen - centres

    def evaluate(point: np.ndarray) -> Evaluated:  # weights (K), the common bias, and the differences
        z = np.einsum("k,knc->nc", point[:k], centred) + point[k] + point[k + 1 :]
        loss = float((np.logaddexp(0.0, z) - y * z).sum())
        penalty = shrinkage * (point[k + 1 :] ** 2).sum() + PENALTY * (point[:k] ** 2).sum()
        return loss + float(penalty) / 2, loss, sigmoid(z)

    def step(point: np.ndarray, shares: np.ndarray) -> np.ndarray:
        weights = point[:k]
        differences = point[k + 1 :]
        residual = shares - y
        curvature = shares * (1 - shares)
        weighted = centred * curvature
        by_class = curvature.sum(0)
        # Weights, then the common bias; `cross` (K + 1, C) with the differences, whose own block is `diagonal` (C,).
        gradient = np.append(np.einsum("knc,nc->k", centred, residual) + PENALTY * weights, residual.sum())
        second = np.zeros((k + 1, k + 1))
        second[:k, :k] = np.einsum("knc,lnc->kl", weighted, centred) + PENALTY * np.eye(k)
        second[:k, k] = second[k, :k] = weighted.sum((1, 2))
        second[k, k] = by_class.sum() + _SMALL
        cross = np.vstack([weighted.sum(1), by_class])
        diagonal = by_class + shrinkage
        of_classes = residual.sum(0) + shrinkage * differences
        reduced = second - (cross / diagonal) @ cross.T
        right = gradient - cross @ (of_classes / diagonal)
        free = np.append((weights > 0) | (gradient[:k] < 0), True)  # weights at 0 that would fall stay
        result = np.zeros(k + 1)
        result[free] = np.linalg.solve(reduced[np.ix_(free, free)] + _SMALL * np.eye(free.sum()), right[free])
        return np.concatenate([result, (of_classes - result @ cross) / diagonal])

    def project(point: np.ndarray) -> np.ndarray:
        return np.concatenate([np.maximum(point[:k], 0.0), point[k:]])

    labelled = int(y.sum())
    prevalence = float(np.log((labelled + 1) / (y.size - labelled + 1)))
    start = np.concatenate([np.full(k, 1.0 / k), [prevalence], np.zeros(int(used.sum()))])
    point, loss = newton(start, evaluate, step, project, 1e-9 * max(y.size, 1))
    common = float(point[k] - point[:k] @ centres.ravel())
    bias = np.full(len(used), common)
    bias[used] += point[k + 1 :]
    return Weights(point[:k], loss / max(y.size, 1), bias)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-logits)), without overflow."""
    with np.errstate(over="ignore"):
        shares: np.ndarray = 1 / (1 + np.exp(-logits))
    return shares


def log_losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(V,) -log softmax(logits)[label], in nats, of logits (V, C)."""
    return log_sum_exp(logits) - logits[np.arange(len(labels)), labels]


def log_sum_exp(logits: np.ndarray) -> np.ndarray:
    """(B,) of (B, C); -inf where all are."""
    top = logits.max(1)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        sums: np.ndarray = top + np.log(np.exp(logits - top[:, None]).sum(1))
    return sums


def log_odds_of_largest(logits: np.ndarray) -> np.ndarray:
    """log p / (1 - p) of the largest p = softmax(logits), (B,) float64; it does not saturate as p does."""
    rows = np.arange(len(logits))
    top = logits.argmax(1)
    others = logits.astype(np.float64)
    others[rows, top] = -np.inf
    odds: np.ndarray = logits[rows, top] - log_sum_exp(others)
    return odds


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """log softmax of finite logits (B, C), of their dtype; the largest comes off first, as float32 has few digits."""
    shifted: np.ndarray = logits - logits.max(1, keepdims=True)
    return shifted - log_sum_exp(shifted)[:, None]
