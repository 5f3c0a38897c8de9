"""Weights of parts and a bias for each class by the log-loss of each class for itself (logistic regression)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_STEPS = 50
_MIN_GAIN = 1e-9  # of the loss a pair of image and class, in nats; a step with a smaller gain is the last
_SMALL = 1e-9
# Of the squares of the weights: without it they would grow without bound if parts separate the classes.
_PENALTY = 0.01


@dataclass(frozen=True, eq=False)
class BinaryFit:
    """sigmoid(sum_k weights[k] parts[k] + bias) has this mean log-loss over pairs of image and class, in nats."""

    weights: np.ndarray
    bias: np.ndarray
    common: float
    loss: float


def fit_binary(parts: Sequence[np.ndarray], labels: np.ndarray, used: np.ndarray, shrinkage: float) -> BinaryFit:
    """The weights w >= 0 (K,) and biases (C,) of K parts (N, C) that minimise

        sum over images n and classes c of `used`: log(1 + exp(z[n, c])) - y[n, c] z[n, c]
        + shrinkage / 2 * sum_c (bias[c] - common)^2 + 0.005 |w|^2,   z = sum_k w[k] parts[k] + bias[c].

    Convex: Newton's method with step halving and projection on w >= 0; the differences bias[c] - common are eliminated
    (their block of second derivatives is diagonal), so that a step costs N C K^2. A class whose images say little, as
    it has few with the label, keeps the common bias; so does a class that `used` (C,) bool leaves out. Parts should be
    of one scale. labels (N, C) bool.

    Source: Platt scaling (1999) with partial pooling of the intercepts (Gelman & Hill, 2007, section 12.2).

    >>> rng = np.random.default_rng(0)
    >>> labels = rng.random((200, 3)) < 0.2
    >>> good, bad = rng.normal(size=(2, 200, 3)) + np.array([[[2.0]], [[-1.0]]]) * labels
    >>> fit = fit_binary([good, bad], labels, np.ones(3, bool), shrinkage=4.0)
    >>> fit.weights.round(1), fit.bias.round(1), round(fit.loss, 2)
    (array([2.1, 0. ]), array([-3.7, -3.3, -3.2]), 0.26)
    """
    chosen = np.stack([np.asarray(part, np.float64)[:, used] for part in parts])
    # About 0: far from it the loss is flat, Newton's steps overshoot, and weights at 0 leave the bias where it is.
    centres = chosen.mean((1, 2), keepdims=True)
    problem = _Problem(chosen - centres, labels[:, used], shrinkage)
    weights, common, differences = np.full(len(parts), 1.0 / len(parts)), problem.prevalence, np.zeros(used.sum())
    loss = problem.loss(weights, common + differences, differences)
    for _ in range(_STEPS):
        step = problem.step(weights, common, differences)
        size, better = 1.0, False
        while size > 1e-4 and not better:
            tried = (np.maximum(weights - size * step[0], 0.0), common - size * step[1], differences - size * step[2])
            next_loss = problem.loss(tried[0], tried[1] + tried[2], tried[2])
            better, size = next_loss < loss, size / 2
        if not better:
            break
        gained, loss = loss - next_loss, next_loss
        weights, common, differences = tried
        if gained < _MIN_GAIN * max(problem.labels.size, 1):
            break
    loss = problem.log_loss(weights, common + differences)
    common -= float(weights @ centres.ravel())
    bias = np.full(len(used), common)
    bias[used] += differences
    return BinaryFit(weights, bias, float(common), loss)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-logits)), without overflow.

    >>> sigmoid(np.array([-1000.0, 0.0, 1000.0]))
    array([0. , 0.5, 1. ])
    """
    with np.errstate(over="ignore"):
        shares: np.ndarray = 1 / (1 + np.exp(-logits))
    return shares


@dataclass(frozen=True, eq=False)
class _Problem:
    """The sum that fit_binary minimises, on parts (K, N, C) and labels (N, C)."""

    parts: np.ndarray
    labels: np.ndarray
    shrinkage: float

    @property
    def prevalence(self) -> float:
        """The log-odds of the share of labels that are there, with one more of each kind."""
        there = int(self.labels.sum())
        return float(np.log((there + 1) / (self.labels.size - there + 1)))

    def log_loss(self, weights: np.ndarray, bias: np.ndarray) -> float:
        """The mean over pairs, without the penalties; 0 of no pair."""
        logits = self._logits(weights, bias)
        losses = np.logaddexp(0.0, logits) - self.labels * logits
        return float(losses.mean()) if losses.size else 0.0

    def loss(self, weights: np.ndarray, bias: np.ndarray, differences: np.ndarray) -> float:
        penalty = self.shrinkage * (differences**2).sum() + _PENALTY * (weights**2).sum()
        return self.log_loss(weights, bias) * self.labels.size + float(penalty) / 2

    def step(self, weights: np.ndarray, common: float, differences: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
        """Newton's step of weights, common bias and differences; weights at 0 that would fall stay."""
        shares = sigmoid(self._logits(weights, common + differences))
        residual, curvature = shares - self.labels, shares * (1 - shares)
        weighted = self.parts * curvature
        k, by_class = len(weights), curvature.sum(0)
        # Weights, then the common bias; `cross` (K + 1, C) with the differences, whose own block is `diagonal` (C,).
        gradient = np.append(np.einsum("knc,nc->k", self.parts, residual) + _PENALTY * weights, residual.sum())
        second = np.zeros((k + 1, k + 1))
        second[:k, :k] = np.einsum("knc,lnc->kl", weighted, self.parts) + _PENALTY * np.eye(k)
        second[:k, k] = second[k, :k] = weighted.sum((1, 2))
        second[k, k] = by_class.sum() + _SMALL
        cross = np.vstack([weighted.sum(1), by_class])
        diagonal = by_class + self.shrinkage
        of_classes = residual.sum(0) + self.shrinkage * differences
        reduced = second - (cross / diagonal) @ cross.T
        right = gradient - cross @ (of_classes / diagonal)
        free = np.append((weights > 0) | (gradient[:k] < 0), True)
        step = np.zeros(k + 1)
        step[free] = np.linalg.solve(reduced[np.ix_(free, free)] + _SMALL * np.eye(free.sum()), right[free])
        return step[:k], float(step[k]), (of_classes - step @ cross) / diagonal

    def _logits(self, weights: np.ndarray, bias: np.ndarray) -> np.ndarray:
        logits: np.ndarray = np.einsum("k,knc->nc", weights, self.parts) + bias
        return logits
