"""The probe of embeddings: against an independent optimum, chance, separable classes, and rows in another order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from iosr_fast.training.overlap import auroc, overlap_area, pair_cosines
from tests.conftest import unit_rows

pytest.importorskip("torch")

from iosr_fast.training.probe import RIDGE, Probe, fit_linear_probe, probe


def clusters(
    rng: np.random.Generator, classes: int, each: int, width: int, noise: float
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of any length about `classes` random centres, in random order."""
    labels = rng.permutation(np.repeat(np.arange(classes), each))
    centres = rng.standard_normal((classes, width))
    rows = centres[labels] + noise * rng.standard_normal((len(labels), width))
    return (7 * rows).astype(np.float32), labels


def objective(rows: np.ndarray, labels: np.ndarray, weight: np.ndarray, bias: np.ndarray, ridge: float) -> float:
    """The docstring's formula, written anew."""
    logits = rows @ weight + bias
    top = logits.max(1, keepdims=True)
    log_sum = top[:, 0] + np.log(np.exp(logits - top).sum(1))
    return float((log_sum - logits[np.arange(len(rows)), labels]).mean() + ridge / 2 * (weight**2).sum())


@pytest.mark.parametrize("ridge", [1e-1, 1e-3, RIDGE])
@pytest.mark.parametrize("shape", [(60, 5, 4), (25, 40, 3)], ids=["more rows", "more channels"])
def test_the_linear_probe_is_at_the_minimum(
    rng: np.random.Generator, shape: tuple[int, int, int], ridge: float
) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    n, width, classes = shape
    rows = unit_rows(rng, n, width).astype(np.float64) + 0.5  # off centre, as CLIP's are
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, n - classes)])

    def flat(x: np.ndarray) -> tuple[float, np.ndarray]:
        weight, bias = x[: width * classes].reshape(width, classes), x[width * classes :]
        logits = rows @ weight + bias
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(n), labels] -= 1
        gradient = np.concatenate([(rows.T @ p / n + ridge * weight).ravel(), p.mean(0)])
        return objective(rows, labels, weight, bias, ridge), gradient

    start = np.zeros(width * classes + classes)
    options = {"maxiter": 20_000, "maxfun": 50_000, "ftol": 1e-15, "gtol": 1e-9}
    best = optimize.minimize(flat, start, jac=True, method="L-BFGS-B", options=options)
    weight, bias = fit_linear_probe(rows, labels, classes, ridge)
    assert weight.shape == (width, classes) and bias.shape == (classes,) and weight.dtype == bias.dtype == np.float64
    assert objective(rows, labels, weight, bias, ridge) == pytest.approx(best.fun, rel=1e-5)
    wanted = best.x[: width * classes].reshape(width, classes)
    assert np.abs(weight - wanted).max() <= 2e-2 * np.abs(wanted).max()
    assert bias.mean() == pytest.approx(0, abs=1e-6 * np.abs(bias).max())


def test_separable_classes_are_all_right_and_random_labels_are_chance(rng: np.random.Generator) -> None:
    rows, labels = clusters(rng, 20, 30, 64, noise=0.1)
    found = probe(rows, labels)
    assert found == Probe(overlap_area=0.0, auroc=1.0, linear_probe=1.0, pictures=600, classes=20)
    chance = probe(rows, rng.permutation(labels))
    # 300 test pictures at 1/20: a standard deviation of 0.0126.
    assert abs(chance.linear_probe - 1 / 20) < 5 * 0.0126
    assert chance.auroc == pytest.approx(0.5, abs=0.03)
    assert chance.overlap_area > 0.9
    blurred = probe(*clusters(rng, 20, 30, 64, noise=3.0))
    assert 0.1 < blurred.linear_probe < 0.99
    assert 0.5 < blurred.auroc < 1.0


def test_overlap_is_that_of_all_pairs(rng: np.random.Generator) -> None:
    rows, labels = clusters(rng, 9, 10, 16, noise=1.0)
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    pairs = pair_cosines(units.astype(np.float64), labels)
    found = probe(rows, labels)
    assert found.auroc == pytest.approx(auroc(*pairs), abs=1e-6)
    assert found.overlap_area == pytest.approx(overlap_area(*pairs), abs=2e-3)  # a cosine may lie on a bin's border


@pytest.mark.parametrize("each", [6, 150], ids=["all", "subsample"])
def test_the_order_of_the_rows_means_nothing(rng: np.random.Generator, each: int) -> None:
    rows, labels = clusters(rng, 20, each, 8, noise=1.5)
    ids = [f"picture {i}" for i in range(len(rows))]
    order = rng.permutation(len(rows))
    assert probe(rows[order], labels[order]) == probe(rows, labels)
    named = probe(rows, labels, ids=ids)
    assert probe(rows[order], labels[order], ids=[ids[i] for i in order]) == named
    assert probe(rows, labels, seed=1) != probe(rows, labels) != named  # other halves
    assert probe(4 * rows, labels + 50, ids=ids) == named  # nor do lengths, and names of classes


def test_ids_hold_the_pictures_still_when_the_encoder_moves(rng: np.random.Generator) -> None:
    rows, labels = clusters(rng, 20, 150, 8, noise=1.5)
    ids = range(len(rows))
    moved = (rows + 1e-3 * rng.standard_normal(rows.shape)).astype(np.float32)
    by_id = abs(probe(rows, labels, ids=ids).linear_probe - probe(moved, labels, ids=ids).linear_probe)
    assert by_id < 0.005
    assert abs(probe(rows, labels).linear_probe - probe(moved, labels).linear_probe) > by_id


def test_many_pictures_are_drawn_evenly(rng: np.random.Generator) -> None:
    sizes = np.array([1, 2, 5, 3000, 900, 800, 1])
    labels = np.repeat(np.arange(10, 10 + len(sizes)), sizes)
    found = probe(rng.standard_normal((len(labels), 4)), labels)
    assert (found.classes, found.classes_left_out) == (5, 2)
    assert found.pictures == 2 + 5 + 3 * 664  # the largest limit for all that stays within 2,000
    many = probe(rng.standard_normal((4500, 4)).astype(np.float16), np.arange(4500) % 1500)
    assert (many.pictures, many.classes, many.classes_left_out) == (2000, 1000, 0)


def test_torch_s_settings_are_left_alone_and_do_not_matter(rng: np.random.Generator) -> None:
    import torch

    rows, labels = clusters(rng, 5, 8, 8, noise=2.0)
    expected, state = probe(rows, labels), torch.get_rng_state()
    with torch.no_grad():
        assert probe(rows, labels) == expected
    with torch.inference_mode():
        assert probe(rows, labels) == expected
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("rows", "labels", "ids", "message"),
    [
        (np.ones(4, np.float32), np.arange(4), None, r"expected embeddings \(N, D\) of floats, got \(4,\)"),
        (np.ones((4, 2), np.int64), np.arange(4), None, "of floats, got .* of int64"),
        (np.ones((4, 2)), np.arange(3), None, r"expected labels \(4,\) of integers, got \(3,\)"),
        (np.ones((4, 2)), np.zeros(4), None, "of integers, got .* of float64"),
        (np.diag([1.0, 0.0, 1.0, 0.0]), np.arange(4), None, "finite embeddings other than zero, got 2 .* in row 1"),
        (np.array([[1.0, np.nan]] * 4), np.arange(4), None, "finite embeddings other than zero, got 4 .* in row 0"),
        (np.ones((4, 2)), np.array([0, 0, 1, 2]), None, "two classes of two pictures or more, got 1 among 3 classes"),
        (np.ones((0, 2)), np.zeros(0, int), None, "two classes of two pictures or more, got 0 among 0 classes"),
        (np.ones((4, 2)), np.array([0, 0, 1, 1]), [1, 2, 3], "an id for each of the 4 rows, .* got 3 ids"),
        (np.ones((4, 2)), np.array([0, 0, 1, 1]), [1, 2, 3, 1], "no two the same"),
    ],
)
def test_bad_input_is_refused(rows: Any, labels: Any, ids: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        probe(rows, labels, ids=ids)
