"""The log-loss of logits z + alpha * s at the best temperature, and of a weighted sum of logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from iosr_fast.methods.method import MAX_ALPHA, ROUNDING

# Elements of z; if there are more, every n-th sample is used.
_LARGEST = 1 << 18
_STEPS = 30
_MIN_GAIN = 1e-6  # nats; a step with a smaller gain is the last
_SMALL = 1e-9
_PENALTY = 0.01
# The smallest weight of a direction, in units of its spread; it is negligible compared with the other one.
_LEAST = 1e-4


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


@dataclass(frozen=True)
class Fit:
    """softmax(factor * (z + alpha * s)) has this mean log-loss in nats, including the penalty of fit_alpha."""

    alpha: float
    factor: float
    loss: float


def fit_alpha(base: np.ndarray, slope: np.ndarray, labels: np.ndarray) -> Fit:
    """The alpha from 0 to MAX_ALPHA and the factor > 0 with the least log-loss.

    Mean over samples of -log softmax(t z + u s)[y], which is convex in (t, u) = (factor, factor * alpha), plus
    0.01 / (2 V) of their squares in units of the spreads of z and s: without it the factor would grow without bound if
    all samples are right. Newton's method with step halving, both kept above zero. base, slope (V, C), labels (V,).

    A direction that is constant over classes (spread 0) is left out: alpha is 0 if s is constant, and 1 if only z is.
    """
    if not spread(slope):
        return fit_factor(base, slope, labels, 0.0)
    if not spread(base):
        return fit_factor(base, slope, labels, 1.0)
    some = _sample(base)
    (t, u), loss = _minimise([base[some], slope[some]], labels[some])
    return Fit(u / t, t, loss) if u <= MAX_ALPHA * t else fit_factor(base, slope, labels, MAX_ALPHA)


def fit_factor(base: np.ndarray, slope: np.ndarray, labels: np.ndarray, alpha: float) -> Fit:
    """The factor > 0 with the least log-loss at this alpha; 1 if the logits are constant over classes."""
    some = _sample(base)
    logits = base[some] + alpha * slope[some].astype(np.float64)
    if not spread(logits):
        return Fit(alpha, 1.0, float(np.log(logits.shape[1])))
    (factor,), loss = _minimise([logits], labels[some], MAX_ALPHA / max(1.0, alpha))
    return Fit(alpha, factor, loss)


def fit_weights(
    parts: Sequence[np.ndarray], labels: np.ndarray, prior: np.ndarray | None = None, strength: float = _PENALTY
) -> tuple[np.ndarray, float]:
    """The weights w >= 0 (K,) of K parts (V, C) with the least log-loss, and that loss in nats a sample.

    Mean over samples of -log softmax(sum_k w_k parts[k])[y] plus strength / (2 V) |w - prior|^2 (prior None: 0):
    convex, so the minimum is unique if strength > 0. Newton's method on the weights that are above 0 or whose gradient
    leads there, with step halving and projection on w >= 0. A weight of exactly 0 says that its part adds nothing. The
    loss that is returned has no penalty. The parts should be of one scale, as spread by classes.

    >>> rng = np.random.default_rng(0)
    >>> labels = rng.integers(0, 3, 200)
    >>> good, bad = rng.normal(size=(2, 200, 3)) + np.array([[[1.0]], [[-1.0]]]) * np.eye(3)[labels]
    >>> weights, loss = fit_weights([good, bad], labels)
    >>> bool(weights[0] > 0.5), float(weights[1]), bool(loss < np.log(3))
    (True, 0.0, True)
    """
    rows = np.arange(len(labels))
    features = [(part - part[rows, labels][:, None]).astype(np.float32) for part in parts]
    centre = np.zeros(len(parts)) if prior is None else np.asarray(prior, np.float64)
    weights = np.maximum(centre, 1.0 / len(parts))
    loss, shares = _loss(features, weights, centre, strength)
    for _ in range(_STEPS):
        gradient, curvature = _derivatives(features, shares, weights, centre, strength)
        free = (weights > 0) | (gradient < 0)
        step = np.zeros(len(parts))
        step[free] = np.linalg.solve(curvature[np.ix_(free, free)] + _SMALL * np.eye(free.sum()), gradient[free])
        size, better = 1.0, False
        while size > 1e-4 and not better:
            tried = np.maximum(weights - size * step, 0.0)
            next_loss, next_shares = _loss(features, tried, centre, strength)
            better, size = next_loss < loss, size / 2
        if not better:
            break
        gained, weights, loss, shares = loss - next_loss, tried, next_loss, next_shares
        if gained < _MIN_GAIN:
            break
    return weights, loss - strength / (2 * len(labels)) * float(((weights - centre) ** 2).sum())


def _minimise(parts: list[np.ndarray], labels: np.ndarray, largest: float = MAX_ALPHA) -> tuple[list[float], float]:
    """The factor of each part (each has a spread), up to `largest`, and the loss."""
    rows = np.arange(len(labels))
    # In units of their own spread the directions are of one scale for Newton's method.
    spreads = np.array([spread(part) for part in parts])
    exact = [part.astype(np.float64) for part in parts]
    # The label's own logit is then 0, so the loss is the logarithm of a sum with a term of 1: never below 0.
    features = [
        ((part - part[rows, labels][:, None]) / one).astype(np.float32)
        for part, one in zip(exact, spreads, strict=True)
    ]
    most = largest * spreads
    weights = np.minimum(np.ones(len(parts)), most)
    loss, shares = _loss(features, weights)
    for _ in range(_STEPS):
        gradient, curvature = _derivatives(features, shares, weights)
        step = np.linalg.solve(curvature + _SMALL * np.eye(len(parts)), gradient)
        size = 1.0
        while size > 1e-4:
            tried = np.minimum(np.maximum(weights - size * step, _LEAST), most)
            next_loss, next_shares = _loss(features, tried)
            if next_loss < loss:
                break
            size /= 2
        if size <= 1e-4:
            break
        gained, weights, loss, shares = loss - next_loss, tried, next_loss, next_shares
        if gained < _MIN_GAIN:
            break
    assert loss >= 0, f"a log-loss is never below 0, got {loss}"
    return (weights / spreads).tolist(), loss


def _loss(
    features: list[np.ndarray], weights: np.ndarray, centre: np.ndarray | float = 0.0, strength: float = _PENALTY
) -> tuple[float, np.ndarray]:
    """The mean log-loss and the softmax it is taken of. The label's own features are 0."""
    logits = np.float32(weights[0]) * features[0]
    for weight, part in zip(weights[1:], features[1:], strict=True):
        logits += np.float32(weight) * part
    top = logits.max(1, keepdims=True)
    logits -= top
    powers = np.exp(logits, out=logits)
    sums = powers.sum(1, keepdims=True)
    loss = float((np.log(sums) + top).mean(dtype=np.float64))
    loss += strength / (2 * len(top)) * float(((weights - centre) ** 2).sum())
    powers /= sums
    return loss, powers


def _derivatives(
    features: list[np.ndarray],
    shares: np.ndarray,
    weights: np.ndarray,
    centre: np.ndarray | float = 0.0,
    strength: float = _PENALTY,
) -> tuple[np.ndarray, np.ndarray]:
    """The gradient and the matrix of second derivatives of the loss in the weights."""
    means = np.stack([np.einsum("vc,vc->v", shares, part) for part in features]).astype(np.float64)
    second = np.empty((len(features), len(features)))
    for k, left in enumerate(features):
        weighted = shares * left
        second[k] = [np.vdot(weighted, right) for right in features]
    n_samples = means.shape[1]
    gradient = means.mean(1) + strength / n_samples * (weights - centre)
    return gradient, (second - means @ means.T + strength * np.eye(len(weights))) / n_samples
