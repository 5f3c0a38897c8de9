"""Pictures that look alike: average linkage, bursts by any encoder of enough directions, siblings, effective counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods.folds import make_folds, unit_weights
from iosr_fast.methods.look_alikes import LookAlikes, average_linkage, find_look_alikes, independent_directions
from iosr_fast.methods.support_set import SupportSet, make_support_set
from tests.methods.made_up import Population
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


def made_up_support(population: Population, rng: np.random.Generator, per_class: int, burst: int) -> SupportSet:
    """Images of a class in bursts of `burst`."""
    images = population.images(rng, population.sessions(rng, per_class // burst), burst)
    return make_support_set(*images, None, 1.0, population.classes)


@pytest.mark.parametrize(("dimensions", "draws"), [(16, 50), (64, 50), (128, 50), (512, 10), (1280, 2)])
def test_independent_images_are_not_warned_of(dimensions: int, draws: int, rng: np.random.Generator) -> None:
    """At most 2% of draws are. With the same cosine for any encoder it was all of them in 16 and 64 dimensions."""
    population = Population(20, dimensions)
    for per_class in (4, 16):
        found = [find_look_alikes(made_up_support(population, rng, per_class, 1)) for _ in range(draws)]
        assert sum(one.many for one in found) <= 0.02 * draws


@pytest.mark.parametrize(("per_class", "burst"), [(4, 2), (8, 2), (8, 4), (16, 2), (16, 4)])
def test_bursts_are_found_in_512_dimensions(per_class: int, burst: int, rng: np.random.Generator) -> None:
    population = Population(10, 512)
    for _ in range(5):
        found = find_look_alikes(made_up_support(population, rng, per_class, burst))
        sessions = np.arange(10 * per_class) // burst * burst
        assert found.told and found.many and "in bursts" in found.warning[0]
        assert np.mean(first_images(found.groups) == sessions) > 0.9


def test_few_directions_do_not_tell_bursts(rng: np.random.Generator) -> None:
    """Independent images are as much alike. Near duplicates are still left out together; a few more directions tell."""
    support = made_up_support(Population(10, 16), rng, 8, 1)
    found = find_look_alikes(support)
    assert not found.told and found.directions < 16 and not found.many and not found.warning
    assert "independent directions do not tell bursts from other pictures" in found.doubt[0]
    assert found.groups.tolist() == list(range(80)) and found.siblings == 0
    assert make_folds(support, found.groups).distinct.tolist() == make_folds(support).distinct.tolist()
    told = [find_look_alikes(made_up_support(Population(10, 32), rng, 8, burst)) for burst in (1, 4)]
    assert [one.many for one in told] == [False, True] and told[0].directions < 30


@pytest.mark.parametrize(("classes", "per_class"), [(1, 32), (10, 4), (40, 40)])
@pytest.mark.parametrize("burst", [1, 2])
def test_independent_directions_are_those_of_the_covariance(
    classes: int, per_class: int, burst: int, rng: np.random.Generator
) -> None:
    """Whatever the number of images and classes, with and without bursts."""
    deviations = np.repeat([1.0, 0.5], [100, 200])
    directions = (deviations**2).sum() ** 2 / (deviations**4).sum()
    shared = np.repeat(rng.standard_normal((classes, per_class // burst, 300)), burst, axis=1)
    rows = deviations * (shared + 0.5 * rng.standard_normal(shared.shape))
    centred = unit(rows - rows.mean(1, keepdims=True)).reshape(-1, 300)
    support = make_support_set(Embeddings(centred), np.repeat(np.arange(classes), per_class), None, 1.0, classes)
    assert independent_directions(centred, support) == pytest.approx(directions, rel=0.25)


@pytest.mark.parametrize(("per_class", "burst"), [(4, 2), (8, 4), (16, 4), (8, 1)])
def test_siblings_of_other_images_are_many_and_images_of_new_sessions_are_not(
    per_class: int, burst: int, rng: np.random.Generator
) -> None:
    population = Population(10, 512)
    for _ in range(3):
        sessions = population.sessions(rng, per_class // burst)
        support, labels = population.images(rng, sessions, burst)
        new, new_labels = population.images(rng, population.sessions(rng, 10), 1)
        for siblings in (0, 10):
            repeated = np.repeat(sessions, -(-siblings // sessions.shape[1]), 1)[:, :siblings]
            more, more_labels = population.images(rng, repeated, 1)
            all_labels = np.concatenate([labels, new_labels, more_labels])
            beside = np.arange(len(all_labels)) >= len(labels)
            joint = make_support_set(Embeddings.concatenate([support, new, more]), all_labels, None, 1.0, 10)
            found = find_look_alikes(joint, beside[np.argsort(all_labels, kind="stable")])
            assert found.many == (siblings > 0)
            assert found.usual == pytest.approx(0.045 * 10 * (10 + siblings) * np.log2(1 + per_class))


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


def test_a_unit_counts_once() -> None:
    units = np.concatenate([np.repeat(np.arange(400), 4), np.full(100, 400), 401 + np.arange(5)])
    weights = unit_weights(units)
    assert np.bincount(units, weights) == pytest.approx(np.ones(406))
    assert len(unit_weights(units[:0])) == 0
