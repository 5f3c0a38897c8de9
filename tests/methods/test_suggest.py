"""What to label next: diverse without labels, uncertain with them, the same on every run."""

from __future__ import annotations

import numpy as np
import pytest

from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods.suggest import entropy, suggest
from tests.methods.support_sets import Clusters


def test_a_budget_of_one_a_class_finds_most_classes(rng: np.random.Generator) -> None:
    images, labels = Clusters(20, width=32, noise=0.5).queries(40)
    some = np.arange(len(labels)) % 40 < rng.integers(4, 40, 20)[labels]  # some classes are rare
    rows, labels = images.plain[some], labels[some]
    chosen = suggest(rows, 20)
    at_random = np.mean([len(np.unique(labels[rng.permutation(len(rows))[:20]])) for _ in range(20)])
    assert len(np.unique(labels[chosen.rows])) >= 18 > at_random
    assert chosen.stands.sum() == len(rows) and len(set(chosen.rows)) == 20


def test_classes_that_no_known_class_explains_come_first() -> None:
    images, labels = Clusters(10, width=32, noise=0.5).queries(20)
    known = images.plain[labels < 5][::20]
    first = labels[suggest(images.plain, 10, entropy(30.0 * images.plain @ known.T)).rows[:5]]
    assert (first >= 5).all() and len(np.unique(first)) >= 3


def test_entropy_is_that_of_the_softmax() -> None:
    values = entropy(np.array([[0.0, 0.0, 0.0], [50.0, 0.0, 0.0], [1.0, 0.0, -np.inf]]))
    p = np.array([np.e / (1 + np.e), 1 / (1 + np.e)])
    assert values == pytest.approx([np.log(3), 0.0, -(p * np.log(p)).sum()], abs=1e-9)


def test_medoids_are_the_nearest_rows_of_their_clusters_centres() -> None:
    """At a fixed point of k-means: recomputed from the clusters that the medoids' own centres make."""
    rows = Clusters(6, width=32, noise=0.3).queries(30)[0].plain
    chosen = suggest(rows, 6)
    centred = rows - rows.mean(0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    cluster = (centred @ centred[chosen.rows].T).argmax(1)
    for k, row in enumerate(chosen.rows):
        inside = np.flatnonzero(cluster == k)
        centre = centred[inside].mean(0)
        assert row == inside[((centred[inside] - centre) ** 2).sum(1).argmin()] and chosen.stands[k] == len(inside)


def test_edges() -> None:
    rows = Clusters(10).queries(3)[0].plain
    assert sorted(suggest(rows, 1000).rows) == list(range(30)) and len(suggest(rows[:0], 5).rows) == 0
    assert len(set(suggest(np.tile(rows[:1], (7, 1)), 4).rows)) == 4
    np.testing.assert_array_equal(suggest(rows, 7).rows, suggest(rows, 7).rows)
    assert len(suggest(rows, 3, np.zeros(30)).rows) == 3
    with pytest.raises(IosrFastError, match="expected n of at least 1, got 0"):
        suggest(rows, 0)
