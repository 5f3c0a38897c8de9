"""How well logits z + alpha * s say how sure they are: log-loss under the temperature that suits them best."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Elements of z: beyond them, every n-th sample stands for all.
_LARGEST = 1 << 18
_STEPS = 30
_ENOUGH = 1e-6  # nats: a step that gains less is the last
_SMALL = 1e-9
_PENALTY = 0.01


@dataclass(frozen=True)
class Fit:
    """softmax(factor * (z + alpha * s)) has this mean log-loss in nats, the penalty of fit_alpha included."""

    alpha: float
    factor: float
    loss: float


def fit_alpha(base: np.ndarray, slope: np.ndarray, labels: np.ndarray) -> Fit:
    """The alpha >= 0 and the factor > 0 of the least log-loss.

    Mean over samples of -log softmax(t z + u s)[y], which is convex in (t, u) = (factor, factor * alpha), plus
    0.01 / (2 V) of their squares in units of the spreads of z and s: else the factor would grow without end where all
    samples are right, and every such choice would be as good as another. Newton's method with step halving, both kept
    above zero. base, slope (V, C), labels (V,).
    """
    return _minimise(base, slope, labels, None)


def fit_factor(base: np.ndarray, slope: np.ndarray, labels: np.ndarray, alpha: float) -> Fit:
    """The factor > 0 of the least log-loss at a given alpha."""
    return _minimise(base, slope, labels, alpha)


def _minimise(base: np.ndarray, slope: np.ndarray, labels: np.ndarray, alpha: float | None) -> Fit:
    every = max(1, -(-base.size // _LARGEST))
    base, slope, labels = base[::every], slope[::every], labels[::every]
    parts = [base, slope] if alpha is None else [base + np.float32(alpha) * slope]
    # In units of their own spread the two directions are alike to Newton's method.
    spreads = [max(float(part.std()), _SMALL) for part in parts]
    features = [(part / np.float32(spread)).astype(np.float32) for part, spread in zip(parts, spreads, strict=True)]
    own = np.stack([part[np.arange(len(labels)), labels] for part in features]).astype(np.float64)
    weights = np.ones(len(parts))
    loss, shares = _loss(features, own, weights)
    for _ in range(_STEPS):
        gradient, curvature = _derivatives(features, own, shares, weights)
        step = np.linalg.solve(curvature + _SMALL * np.eye(len(parts)), gradient)
        size = 1.0
        while size > 1e-4:
            tried = np.maximum(weights - size * step, _SMALL)
            found, found_shares = _loss(features, own, tried)
            if found < loss:
                break
            size /= 2
        if size <= 1e-4:
            break
        gained, weights, loss, shares = loss - found, tried, found, found_shares
        if gained < _ENOUGH:
            break
    factor = float(weights[0] / spreads[0])
    return Fit(float(weights[1] / spreads[1]) / factor if alpha is None else alpha, factor, loss)


def _loss(features: list[np.ndarray], own: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray]:
    """The mean log-loss, and the softmax that it is taken of."""
    logits = np.float32(weights[0]) * features[0]
    for weight, part in zip(weights[1:], features[1:], strict=True):
        logits += np.float32(weight) * part
    top = logits.max(1, keepdims=True)
    logits -= top
    powers = np.exp(logits, out=logits)
    sums = powers.sum(1, keepdims=True)
    loss = float((np.log(sums) + top)[:, 0].mean(dtype=np.float64) - (weights @ own).mean())
    loss += _PENALTY / (2 * own.shape[1]) * float(weights @ weights)
    powers /= sums
    return loss, powers


def _derivatives(
    features: list[np.ndarray], own: np.ndarray, shares: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The gradient and the matrix of second derivatives of the loss in the weights."""
    means = np.stack([np.einsum("vc,vc->v", shares, part) for part in features]).astype(np.float64)
    second = np.empty((len(features), len(features)))
    for k, left in enumerate(features):
        weighted = shares * left
        second[k] = [np.vdot(weighted, right) for right in features]
    gradient = (means - own).mean(1) + _PENALTY / own.shape[1] * weights
    return gradient, (second - means @ means.T + _PENALTY * np.eye(len(weights))) / own.shape[1]
