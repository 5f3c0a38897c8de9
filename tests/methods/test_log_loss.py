"""Weights, factors and biases with the least log-loss, against scipy's minimiser and fine grids."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from iosr_fast.methods.log_loss import (
    MAX_ALPHA,
    PENALTY,
    SHRINKAGE,
    fit_alpha,
    fit_binary,
    fit_factor,
    fit_temperature,
    fit_weights,
    log_softmax,
    spread,
)

EPS = np.finfo(np.float32).eps


def log_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    exact = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return float((np.log(np.exp(exact).sum(1)) - exact[np.arange(len(labels)), labels]).mean())


@pytest.mark.parametrize("prior", [None, np.array([0.5, 0.0, 2.0, 1.0])])
def test_weights_are_the_minimum(rng: np.random.Generator, prior: np.ndarray | None) -> None:
    labels = rng.integers(0, 5, 300)
    parts = [rng.standard_normal((300, 5)) + k * np.eye(5)[labels] for k in (1.0, -1.0, 0.5, 2.0)]
    strength = PENALTY if prior is None else 5.0
    weights, loss = fit_weights(parts, labels, prior, strength)

    def penalised(w: np.ndarray) -> float:
        penalty = strength / 600 * ((w - (0 if prior is None else prior)) ** 2).sum()
        return log_loss(np.einsum("k,kvc->vc", w, parts), labels) + penalty

    least = minimize(penalised, np.ones(4), bounds=[(0, None)] * 4, method="L-BFGS-B")
    np.testing.assert_allclose(weights, least.x, atol=0.02)
    assert penalised(weights) <= least.fun + 1e-5
    assert weights[1] == 0 and (weights[[0, 2, 3]] > 0).all()  # a part that misleads has exactly none
    assert loss == pytest.approx(log_loss(np.einsum("k,kvc->vc", weights, parts), labels), rel=1e-4)


def test_alpha_and_factor_are_the_minimum_of_a_fine_grid(rng: np.random.Generator) -> None:
    labels, rows = rng.integers(0, 5, 80), np.arange(80)
    base, slope = rng.standard_normal((80, 5)), rng.standard_normal((80, 5))
    base[rows, labels] += 0.8
    slope[rows, labels] += 1.5
    base, slope = (100 * base).astype(np.float32), (0.01 * slope).astype(np.float32)

    def loss(factor: float, alpha: float) -> float:
        return log_loss(factor * (base + alpha * slope.astype(float)), labels)

    around, (alpha, factor, least) = np.linspace(0.5, 2, 31), fit_alpha(base, slope, labels)
    assert least == pytest.approx(loss(factor, alpha), rel=2e-3)
    assert least <= min(loss(factor * f, alpha * a) for f in around for a in around) + 1e-3
    given, its_loss = fit_factor(base + 3 * alpha * slope, labels)
    assert least < its_loss <= min(loss(given * f, 3 * alpha) for f in around) + 1e-3


@pytest.mark.parametrize("right", [0.0, 0.6, 1.0])
def test_a_temperature_is_the_minimum_of_its_loss_and_is_finite(right: float, rng: np.random.Generator) -> None:
    labels, weights = rng.integers(0, 5, 60), rng.uniform(0.2, 1.0, 60)
    logits = 3.0 * rng.standard_normal((60, 5)) + 40.0 * np.eye(5)[np.where(rng.random(60) < right, labels, labels - 1)]
    smoothing = 0.5 / (weights.sum() + 1.0)
    targets = np.where(np.arange(5) == labels[:, None], 1 - smoothing, smoothing / 4)

    def loss(temperature: float) -> float:
        return float(-(weights @ (targets * log_softmax(logits / temperature)).sum(1)))

    temperature = fit_temperature(logits, labels, weights)
    assert loss(temperature) <= min(map(loss, np.geomspace(0.01, 9_000, 400))) + 1e-9
    assert fit_temperature(7.0 * logits, labels, weights) == pytest.approx(7.0 * temperature, rel=1e-4)
    twice = [np.repeat(part, 2, 0) for part in (logits, labels, weights / 2)]  # a burst of two counts once
    assert fit_temperature(*twice) == pytest.approx(temperature, rel=1e-5)


def test_without_images_and_of_constant_logits_the_temperature_is_1() -> None:
    zeros = np.zeros(0, int)
    assert fit_temperature(np.zeros((0, 3)), zeros, np.zeros(0)) == 1.0
    assert fit_temperature(np.full((4, 3), 0.1, np.float32), np.arange(4) % 3, np.ones(4)) == 1.0


@pytest.mark.parametrize("size", [1e-3, 1 / 3, 4.0, 1e6])
def test_a_direction_that_is_constant_but_for_rounding_is_left_out(size: float, rng: np.random.Generator) -> None:
    labels = rng.integers(0, 10, 40)
    base = (10 * rng.standard_normal((40, 10))).astype(np.float32)
    constant = (size * (1 + EPS * rng.integers(-8, 9, base.shape))).astype(np.float32)
    assert spread(constant) == 0 and fit_alpha(base, constant, labels) == (0.0, *fit_factor(base, labels))
    assert fit_alpha(constant, base, labels)[0] == 1.0  # images alone
    assert fit_factor(constant, labels) == (1.0, pytest.approx(np.log(10)))


def test_binary_weights_and_biases_are_the_minimum(rng: np.random.Generator) -> None:
    labels = rng.random((57, 4)) < 0.3
    parts = rng.normal(size=(3, 57, 4)) + np.array([1.0, 0.5, -0.8])[:, None, None] * labels
    used = np.array([True, True, False, True])
    fit = fit_binary(list(parts), labels, used, SHRINKAGE)

    def loss(point: np.ndarray) -> float:  # weights (3), biases (3), the common bias
        logits = np.einsum("k,knc->nc", point[:3], parts[:, :, used]) + point[3:6]
        pairs = np.logaddexp(0, logits) - labels[:, used] * logits
        return float(
            pairs.sum() + SHRINKAGE / 2 * ((point[3:6] - point[6]) ** 2).sum() + 0.005 * (point[:3] ** 2).sum()
        )

    found = np.r_[fit.weights, fit.bias[used], fit.bias[2]]  # a class that is not used has the common bias
    least = minimize(loss, np.zeros(7), bounds=[(0, None)] * 3 + [(None, None)] * 4, method="L-BFGS-B")
    np.testing.assert_allclose(found, least.x, atol=1e-2)
    assert loss(found) <= least.fun + 1e-6 and fit.weights[2] == 0


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e9])
def test_fits_stay_finite_whatever_the_scale(size: float, rng: np.random.Generator) -> None:
    labels = rng.integers(0, 4, 50)
    right = np.eye(4, dtype=np.float32)[labels]
    for base in (size * right, np.full((50, 4), size), size + right, size * rng.random((50, 4))):
        for slope in (right, np.full((50, 4), 1e8), 1e-6 * rng.random((50, 4)), 1e8 + right):
            alpha, factor, loss = fit_alpha(base, slope, labels)
            assert loss >= 0 and 0 <= alpha <= MAX_ALPHA and 0 < factor * max(1, alpha) <= 1.001 * MAX_ALPHA
            factor, loss = fit_factor(base + MAX_ALPHA * slope, labels, most=1.0)
            assert loss >= 0 and 0 < factor <= 1.001
