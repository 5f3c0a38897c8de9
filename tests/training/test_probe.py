"""The probe of embeddings: separable classes, chance, and the choice of pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from iosr_fast.training.overlap import overlap_area, pair_cosines
from iosr_fast.training.probe import Probe, probe, probed_rows
from iosr_fast.utils.ranking import auroc

pytestmark = pytest.mark.slow


def clusters(
    rng: np.random.Generator, classes: int, each: int, width: int, noise: float
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of any length about `classes` random centres, in random order."""
    labels = rng.permutation(np.repeat(np.arange(classes), each))
    centres = rng.standard_normal((classes, width))
    rows = centres[labels] + noise * rng.standard_normal((len(labels), width))
    return (7 * rows).astype(np.float32), labels


def test_separable_classes_are_all_right_and_random_labels_are_chance(rng: np.random.Generator) -> None:
    rows, labels = clusters(rng, 20, 30, 64, noise=0.1)
    measured = probe(rows, labels)
    assert measured == Probe(overlap_area=0.0, auroc=1.0, linear_probe=1.0, pictures=600, classes=20)
    chance = probe(rows, rng.permutation(labels))
    # 300 test pictures at 1/20: a standard deviation of 0.0126.
    assert abs(chance.linear_probe - 1 / 20) < 5 * 0.0126
    assert chance.auroc == pytest.approx(0.5, abs=0.03)
    assert chance.overlap_area > 0.9


def test_overlap_is_that_of_all_pairs(rng: np.random.Generator) -> None:
    rows, labels = clusters(rng, 9, 10, 16, noise=1.0)
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    pairs = pair_cosines(units.astype(np.float64), labels)
    measured = probe(rows, labels)
    assert measured.auroc == pytest.approx(auroc(*pairs), abs=1e-6)
    assert measured.overlap_area == pytest.approx(overlap_area(*pairs), abs=2e-3)  # a cosine may lie on a bin's border


def test_encoders_are_compared_on_the_same_pictures(rng: np.random.Generator) -> None:
    rows, labels = clusters(rng, 20, 150, 8, noise=1.5)
    measured = probe(rows, labels)
    assert probe(4 * rows, labels + 50) == measured, "lengths and names of classes change nothing"
    moved = (rows + 1e-3 * rng.standard_normal(rows.shape)).astype(np.float32)
    assert abs(probe(moved, labels).linear_probe - measured.linear_probe) < 0.005
    chosen = probed_rows(labels)
    assert len(chosen) == measured.pictures == 2000 and (np.diff(chosen) > 0).all()
    assert probe(rows[chosen], labels[chosen]).overlap_area == measured.overlap_area


def test_many_pictures_are_drawn_evenly(rng: np.random.Generator) -> None:
    sizes = np.array([1, 2, 5, 3000, 900, 800, 1])
    labels = np.repeat(np.arange(10, 10 + len(sizes)), sizes)
    measured = probe(rng.standard_normal((len(labels), 4)), labels)
    assert measured.classes == 5
    assert measured.pictures == 2 + 5 + 3 * 664  # the largest limit for all that stays within 2,000
    many = probe(rng.standard_normal((4500, 4)).astype(np.float16), np.arange(4500) % 1500)
    assert (many.pictures, many.classes) == (2000, 1000)


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        (np.diag([1.0, 0.0, 1.0, 0.0]), np.arange(4), "finite embeddings other than zero, got 2 .* in row 1"),
        (np.array([[1.0, np.nan]] * 4), np.arange(4), "finite embeddings other than zero, got 4 .* in row 0"),
        (np.ones((4, 2)), np.array([0, 0, 1, 2]), "two classes with two pictures or more, got 1 among 3 classes"),
    ],
)
def test_bad_input_is_refused(rows: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        probe(rows, labels)
