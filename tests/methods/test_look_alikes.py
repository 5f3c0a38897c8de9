"""Pictures that look alike: average linkage, bursts by any encoder, and what left-out ones of a burst count."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods.folds import make_folds, unit_weights
from iosr_fast.methods.look_alikes import LookAlikes, average_linkage, find_look_alikes
from iosr_fast.methods.support_set import SupportSet, make_support_set
from tests.methods.support_sets import unit


def first_images(groups: np.ndarray) -> list[int]:
    """The first image of each image's group."""
    return [groups.tolist().index(group) for group in groups.tolist()]


@pytest.mark.parametrize(("n", "groups"), [(2, 1), (17, 4), (40, 9), (75, 75)])
@pytest.mark.parametrize("levels", [None, 5])
def test_groups_are_those_of_average_linkage(n: int, groups: int, levels: int | None) -> None:
    import scipy.cluster.hierarchy as hierarchy

    rng = np.random.default_rng(n)
    rows = unit(rng.standard_normal((groups, 8))[rng.integers(groups, size=n)] + 0.6 * rng.standard_normal((n, 8)))
    cosines = rows @ rows.T
    if levels:  # many pairs are equally near: cuts between the levels leave the same groups, whoever is joined first
        cosines = np.round(cosines * levels) / levels
        cosines = np.where(cosines > 0.5, 1.0, -1.0)
    distances = (1 - (cosines + cosines.T) / 2)[np.triu_indices(n, 1)].astype(float)
    expected = hierarchy.fcluster(hierarchy.linkage(distances, "average"), 1 - 0.35, "distance")
    found = average_linkage(cosines.copy(), 0.35)
    if levels is None:
        assert first_images(found) == first_images(expected)
    else:  # of ties others may be joined first; no two groups are left that are near enough
        for one in np.unique(found):
            for other in np.unique(found[found > one]):
                assert cosines[np.ix_(found == one, found == other)].mean() < 0.35


def sessions(rng: np.random.Generator, counts: list[int], burst: int, offset: float = 0.0) -> SupportSet:
    """Sessions of `burst` pictures, counts[c] of class c; `offset` is what all images of an encoder share."""
    labels = np.repeat(np.arange(len(counts)), counts)
    centres = rng.standard_normal((len(counts), 64))[labels] + rng.standard_normal((len(labels), 64))
    rows = np.repeat(centres, burst, 0) + 0.5 * rng.standard_normal((burst * len(labels), 64)) + offset
    return make_support_set(Embeddings(unit(rows)), np.repeat(labels, burst), None, 1.0, len(counts))


@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_bursts_are_found_whatever_the_encoder_and_independent_pictures_are_not(
    offset: float, rng: np.random.Generator
) -> None:
    for counts, burst in (([4] * 6, 4), ([8, 3, 5, 2], 3), ([16] * 4, 2)):
        support = sessions(rng, counts, burst, offset)
        alike = find_look_alikes(support)
        assert first_images(alike.groups) == (np.arange(sum(counts) * burst) // burst * burst).tolist()
        folds = make_folds(support, alike.groups)
        assert folds.distinct.tolist() == counts and folds.scored.all()
        assert (folds.fold.reshape(-1, burst) == folds.fold[::burst, None]).all()  # left out together
        assert alike.many and alike.siblings == len(support.labels) and "in bursts" in alike.warning[0]
        assert make_folds(support).distinct.sum() > sum(counts)  # weights are fitted without
    independent = sessions(rng, [16] * 6, 1, offset)
    alike = find_look_alikes(independent)
    assert len(np.unique(alike.groups)) > 85 and not alike.many and not alike.warning


@pytest.mark.parametrize(("alike", "many"), [(119, False), (121, True)])
def test_many_are_two_standard_errors_more_than_usual(alike: int, many: bool) -> None:
    nearest = np.where(np.arange(1000) < alike, 0.6, 0.4)
    assert LookAlikes(np.arange(1000), nearest, 100.0).many is many


def test_classes_of_two_pictures_and_of_one_session(rng: np.random.Generator) -> None:
    """Centred cosines say nothing of them; near duplicates are joined all the same, and then nothing is scored."""
    support = sessions(rng, [2, 2, 8, 8, 8], 1)
    plain = support.embeddings.plain.copy()
    plain[2:4] = unit(plain[2] + 0.01 * rng.standard_normal((2, 64)))
    plain[4:12] = unit(plain[4] + 0.01 * rng.standard_normal((8, 64)))
    changed = replace(support, embeddings=Embeddings(plain))
    folds = make_folds(changed, find_look_alikes(changed).groups)
    assert folds.distinct[:3].tolist() == [2, 1, 1]
    assert np.unique(support.labels[folds.rows]).tolist() == [0, 3, 4] and (folds.fold[2:12] == -1).all()
    nothing = find_look_alikes(support.only(np.zeros(28, bool)))
    assert len(nothing.groups) == 0 and not nothing.warning


def test_a_burst_counts_as_many_images_as_it_says_something_of(rng: np.random.Generator) -> None:
    units = np.repeat(np.arange(400), 4)
    for agreement, least, most in ((1.0, 399, 401), (0.0, 1350, 1600), (0.5, 550, 1100)):
        shared, own = np.repeat(rng.random(400) < 0.1, 4), rng.random(1600) < 0.1
        values = np.where(rng.random(1600) < agreement, shared, own)
        assert least <= unit_weights(units, values).sum() <= most, agreement
    copies = np.concatenate([np.zeros(100, int), np.arange(1, 21)])  # one right picture a hundred times
    assert unit_weights(copies, np.arange(120) != 119).sum() == pytest.approx(21)
    assert unit_weights(units, np.ones(1600)).sum() == pytest.approx(400)  # all are right: it can't be estimated
    assert unit_weights(np.arange(5), np.arange(5) < 3).tolist() == [1.0] * 5
    assert len(unit_weights(units[:0], units[:0])) == 0
    levels = np.stack([np.ones(1600), units % 7 > 0, np.arange(1600) % 7 > 0], 1)  # the second is alike in a unit
    assert unit_weights(units, levels).sum() == unit_weights(units, levels[:, 1]).sum() == pytest.approx(400)
