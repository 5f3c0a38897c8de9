"""The reported accuracy is not the best of many tries: random labels are at chance; its interval; its summary."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods.support_set import make_support_set
from iosr_fast.methods.tune import tune
from iosr_fast.methods.tuned import Tuned, wilson
from iosr_fast.scoring.score import score
from tests.conftest import unit_rows
from tests.methods.support_sets import Clusters, unit


@pytest.mark.parametrize("method", ["tip-adapter", "gda", "proker", "ape", "stack"])
@pytest.mark.parametrize("validation", [False, True])
def test_random_labels_are_reported_at_chance(method: str, validation: bool) -> None:
    """Four classes without any difference: over ten draws the mean is about chance."""
    reported, best = [], []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        rows = Embeddings(unit_rows(rng, 32, 16))
        support = make_support_set(rows, np.repeat(np.arange(4), 8), unit_rows(rng, 4, 16), 30.0)
        asked = (Embeddings(unit_rows(rng, 32, 16)), rng.integers(0, 4, 32)) if validation else ()
        tuned = tune(method, support, *asked)
        assert tuned.right is not None and tuned.accuracy == tuned.right.mean() and tuned.scored == 32
        reported.append(tuned.accuracy)
        best.append(tuned.search_accuracy)
    assert abs(np.mean(reported) - 0.25) < 0.09  # three standard errors of 320 images are 0.073
    assert np.mean(best) >= np.mean(reported)
    if method == "tip-adapter" and validation:  # the best of its tries would not pass
        assert np.mean(best) > 0.25 + 0.09


@pytest.mark.parametrize("method", ["tip-adapter", "gda", "proker", "stack"])
def test_the_accuracy_by_leave_one_out_is_about_that_of_new_images(method: str) -> None:
    world, reported, reached = Clusters(8, width=32, noise=1.6), [], []
    for seed in range(5):
        support, (queries, labels) = world.support([5] * 8, seed=seed), world.queries(40)
        tuned = tune(method, support)
        reported.append(tuned.accuracy)
        reached.append((score(tuned.compile(support), queries).argmax(1) == labels).mean())
    assert 0.5 < np.mean(reached) < 0.97 and abs(np.mean(reported) - np.mean(reached)) < 0.08


@pytest.mark.parametrize("method", ["tip-adapter", "gda", "proker", "stack"])
def test_the_accuracy_of_series_of_pictures_is_that_of_other_series_if_they_are_groups(method: str) -> None:
    world, found = Clusters(8, width=32, noise=1.6), []
    for seed in range(4):
        series, labels = world.queries(8, seed=seed)
        rows = np.repeat(series.plain, 3, 0) + 0.09 * np.random.default_rng(seed).standard_normal((192, 32))
        support = make_support_set(Embeddings(unit(rows)), np.repeat(labels, 3), None, 30.0, 8)
        grouped = tune(method, replace(support, groups=np.arange(192) // 3))
        queries, truth = world.queries(40)
        reached = (score(grouped.compile(support), queries).argmax(1) == truth).mean()
        found.append((tune(method, support).accuracy, grouped.accuracy, reached))
    alone, together, reached = np.mean(found, axis=0)
    assert alone > reached + 0.15 and abs(together - reached) < 0.1 and "of the group of others" in grouped.note


def test_the_interval_is_wilsons() -> None:
    """The ends solve |share - p| = z sqrt(p (1 - p) / n)."""
    for right, count in ((0, 5), (3, 5), (5, 5), (70, 100), (1, 1)):
        low, high = wilson(right / count, count)
        assert 0 <= low < high <= 1
        for end in (low, high):
            if 0 < end < 1:
                assert abs(right / count - end) == pytest.approx(1.959964 * np.sqrt(end * (1 - end) / count))
    tuned = Tuned("gda", "none", {}, 0.9, 10, "validation", note="alpha 0: nothing", stale=True, version=3)
    assert tuned.interval == wilson(0.9, 10) and tuned.summary() == (
        "90.0% of 10 validation images right (95%: 60% to 98%); alpha 0: nothing; as of version 3; the classifier has "
        "changed since"
    )
