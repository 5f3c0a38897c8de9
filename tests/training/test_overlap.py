"""Overlap of cosines: pairs, areas, AUROC."""

from __future__ import annotations

import numpy as np
import pytest

from iosr_fast.training.overlap import _chosen, overlap_area, pair_cosines
from iosr_fast.utils.ranking import auroc
from tests.conftest import unit_rows


def test_pairs_equal_brute_force(rng: np.random.Generator) -> None:
    rows, labels = unit_rows(rng, 12, 5), rng.integers(0, 3, 12)
    paired, unpaired = pair_cosines(rows, labels)
    same = [float(rows[i] @ rows[j]) for i in range(12) for j in range(i + 1, 12) if labels[i] == labels[j]]
    other = [float(rows[i] @ rows[j]) for i in range(12) for j in range(i + 1, 12) if labels[i] != labels[j]]
    np.testing.assert_allclose(np.sort(paired), np.sort(same), atol=1e-6)
    np.testing.assert_allclose(np.sort(unpaired), np.sort(other), atol=1e-6)
    wins = np.mean([(a > b) + 0.5 * (a == b) for a in paired for b in unpaired])
    assert auroc(paired, unpaired) == pytest.approx(wins)
    with pytest.raises(ValueError, match="pairs of the same and of different classes"):
        pair_cosines(rows, np.zeros(12, int))


def test_overlap_area_of_known_densities(rng: np.random.Generator) -> None:
    low, high = rng.uniform(-0.5, 0.0, 200_000), rng.uniform(0.0, 0.5, 200_000)
    half = rng.uniform(-0.25, 0.25, 200_000)
    assert overlap_area(high, low) < 0.01
    assert overlap_area(low, low) == pytest.approx(1.0)
    assert overlap_area(half, low) == pytest.approx(0.5, abs=0.01)
    assert auroc(high, low) == pytest.approx(1.0) and auroc(low, low) == pytest.approx(0.5)


def test_many_pictures_are_drawn_evenly() -> None:
    sizes = np.array([1, 2, 5, 3000, 900, 800, 1])
    labels = np.repeat(np.arange(10, 10 + len(sizes)), sizes)
    rows = _chosen(labels)
    assert np.bincount(labels[rows])[10:].tolist() == np.minimum(sizes, 2000 // 7).tolist()
    assert np.unique(rows).size == rows.size and np.array_equal(rows, _chosen(labels))
    many = np.arange(4500) % 1500
    assert np.unique(many[_chosen(many)], return_counts=True)[1].tolist() == [2] * 1000
