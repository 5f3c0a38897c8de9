"""What to label next: diverse without labels, uncertain with them, the same on every run."""

from __future__ import annotations

import numpy as np
import pytest

from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods.suggest import entropy, suggest
from tests.methods.test_support_audit import clusters


def test_a_budget_of_one_a_class_finds_most_classes() -> None:
    rng = np.random.default_rng(0)
    rows, labels = clusters(40, spread=0.5, classes=20)
    sizes = rng.integers(4, 40, 20)  # some classes are rare
    keep = np.concatenate([np.flatnonzero(labels == c)[: sizes[c]] for c in range(20)])
    chosen = suggest(rows[keep], 20)
    at_random = np.mean([len(np.unique(labels[keep][rng.permutation(len(keep))[:20]])) for _ in range(20)])
    assert len(np.unique(labels[keep][chosen.rows])) >= 18 > at_random
    assert chosen.stands.sum() == len(keep) and len(set(chosen.rows)) == 20


def test_classes_that_no_known_class_explains_come_first() -> None:
    rows, labels = clusters(20, spread=0.5, classes=10)
    known = rows[labels < 5][::20]
    logits = 30.0 * rows @ known.T
    chosen = suggest(rows, 10, entropy(logits))
    first = labels[chosen.rows[:5]]
    assert (first >= 5).all() and len(np.unique(first)) >= 3


def test_entropy_is_that_of_the_softmax() -> None:
    values = entropy(np.array([[0.0, 0.0, 0.0], [50.0, 0.0, 0.0], [1.0, 0.0, -np.inf]]))
    p = np.array([np.e / (1 + np.e), 1 / (1 + np.e)])
    assert values == pytest.approx([np.log(3), 0.0, -(p * np.log(p)).sum()], abs=1e-9)


def test_medoids_are_the_nearest_rows_of_their_clusters_centres() -> None:
    """At a fixed point of k-means: recomputed from the clusters that the medoids' own centres make."""
    rows, _ = clusters(30, spread=0.3, classes=6)
    chosen = suggest(rows, 6)
    centred = rows - rows.mean(0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    cluster = (centred @ centred[chosen.rows].T).argmax(1)
    for k, row in enumerate(chosen.rows):
        inside = np.flatnonzero(cluster == k)
        centre = centred[inside].mean(0)
        assert row == inside[((centred[inside] - centre) ** 2).sum(1).argmin()]
        assert chosen.stands[k] == len(inside)


def test_edges() -> None:
    rows, _ = clusters(3)
    assert sorted(suggest(rows, 1000).rows) == list(range(30))
    same = np.tile(rows[:1], (7, 1))
    assert len(set(suggest(same, 4).rows)) == 4
    assert len(suggest(rows[:0], 5).rows) == 0
    np.testing.assert_array_equal(suggest(rows, 7).rows, suggest(rows, 7).rows)
    zeros = suggest(rows, 3, np.zeros(30))
    assert len(zeros.rows) == 3
    with pytest.raises(IosrFastError, match="expected n of at least 1, got 0"):
        suggest(rows, 0)
