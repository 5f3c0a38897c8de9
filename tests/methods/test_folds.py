"""Support sets, near duplicates among their images, and the folds that leave them out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods.folds import NearSupport, class_distances, group_near_duplicates, make_folds, near_pairs
from iosr_fast.methods.out_of_fold import HeldOut
from iosr_fast.methods.support_set import SupportSet, make_support_set
from tests.conftest import random_embeddings, unit_rows
from tests.methods.support_sets import Clusters, unit
from tests.store.live_parts import random_head


def random_support(rng: np.random.Generator, counts: list[int], width: int = 16) -> SupportSet:
    labels = np.repeat(np.arange(len(counts)), counts)
    return make_support_set(Embeddings(unit_rows(rng, len(labels), width)), labels, None, 1.0, len(counts))


def test_folds_leave_one_image_of_each_class_out_and_are_16_at_most(rng: np.random.Generator) -> None:
    support = random_support(rng, [3, 1, 2, 40])
    folds = make_folds(support)
    assert folds.fold[:6].tolist() == [0, 1, 2, -1, 0, 1]
    assert folds.number == 16 and np.bincount(folds.fold[6:]).tolist() == [3] * 8 + [2] * 8
    assert folds.scored.tolist() == [True] * 3 + [False] + [True] * 42 and folds.distinct.tolist() == [3, 1, 2, 40]
    for rows, out in folds.splits:
        np.testing.assert_array_equal(rows, np.flatnonzero(out))
    assert sorted(np.concatenate([rows for rows, _ in folds.splits])) == folds.rows.tolist()
    halves = HeldOut.of_support(support, folds).halves
    np.testing.assert_array_equal(halves, [folds.fold[folds.rows] % 2 == half for half in (0, 1)])


def test_the_first_folds_have_about_as_many_images_as_are_asked_for(rng: np.random.Generator) -> None:
    for counts, most, number in (([16] * 50, 100, 2), ([300] * 4, 100, 2), ([16] * 4, 1000, 16), ([2] * 50, 10, 1)):
        folds = make_folds(random_support(rng, counts))
        first = folds.first(most)
        assert len(first.splits) == number and len(first.rows) <= 2 * max(most, len(counts))
        np.testing.assert_array_equal(first.rows, np.flatnonzero(folds.scored & (folds.fold < number)))


def test_near_duplicates_are_left_out_together(rng: np.random.Generator) -> None:
    twice = np.repeat(unit_rows(rng, 24, 32), 2, axis=0)
    near = Embeddings(unit(twice + 0.1 * unit_rows(rng, 48, 32)))
    support = replace(random_support(rng, [8] * 6), embeddings=near)
    groups, folds = group_near_duplicates(support), make_folds(support)
    assert groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] * 6
    np.testing.assert_array_equal(folds.fold, groups)
    assert folds.distinct.tolist() == [4] * 6 and folds.scored.all()
    for noise in (0.8, 0.05):  # where all classes are tight, that is usual
        assert make_folds(Clusters(9, 32, noise).support([16] * 9)).distinct.tolist() == [16] * 9


def test_a_class_of_duplicates_loses_images_as_the_others_do_but_none_is_scored(rng: np.random.Generator) -> None:
    support = random_support(rng, [3] * 4)
    plain = support.embeddings.plain.copy()
    plain[3:6] = unit(plain[3] + 0.01 * unit_rows(rng, 3, 16))
    folds = make_folds(replace(support, embeddings=Embeddings(plain)))
    assert folds.distinct.tolist() == [3, 1, 3, 3] and folds.fold.tolist() == [0, 1, 2] * 4
    assert folds.rows.tolist() == [0, 1, 2, 6, 7, 8, 9, 10, 11]
    nothing = make_folds(replace(support, embeddings=Embeddings(np.repeat(plain[::3], 3, axis=0))))  # one image each
    assert (nothing.fold == -1).all() and not nothing.splits


def test_groups_and_near_duplicates_of_their_images_are_left_out_together(rng: np.random.Generator) -> None:
    support = random_support(rng, [8] * 5)
    plain, groups = support.embeddings.plain.copy(), np.arange(40) // 2 + 7
    plain[3] = plain[0]  # of the second group, and of the first
    grouped = replace(support, groups=groups, embeddings=Embeddings(plain))
    folds = make_folds(grouped)
    assert not make_folds(grouped, look_alikes=(np.arange(40) + 1) // 2).units.any(), "each joins two groups"
    assert folds.units.tolist() == [0, 0, 0, 0, *(np.arange(36) // 2 + 1)]
    assert folds.distinct.tolist() == [3] + [4] * 4
    assert (np.bincount(folds.fold[8:] * 5 + support.labels[8:], minlength=20).reshape(4, 5)[:, 1:] == 2).all()
    mixed = make_support_set(support.embeddings[::-1], support.labels[::-1], None, 1.0, 5, groups=groups[::-1])
    assert mixed.only(mixed.labels > 0).of_classes(np.arange(5) > 3).groups.tolist() == groups[:31:-1].tolist()


@pytest.mark.parametrize(("seed", "most"), [(0, 200), (1, 40), (2, 12), (3, 3)])
def test_folds_of_groups_of_any_classes_are_whole_and_leave_images_of_each_class_they_score(
    seed: int, most: int
) -> None:
    rng = np.random.default_rng(seed)
    support, groups = random_support(rng, [40, 40, 1, 12, 5, 30]), rng.integers(0, most, 128)
    groups[81:93] = 500  # a class of a single group, which no other class has
    folds = make_folds(replace(support, groups=groups))
    for own in (folds.fold, folds.units):
        assert len({*zip(groups.tolist(), own.tolist(), strict=True)}) == len(np.unique(groups))
    assert folds.distinct[3] == 1 and not folds.scored[80:93].any() and (folds.fold[81:93] == -1).all()
    for rows, out in folds.splits:
        assert set(support.labels[rows]) <= set(support.labels[~out])
    sizes = np.bincount(folds.fold[folds.fold >= 0])
    assert len(sizes) <= 16 and (most == 3 or sizes.max() <= 2 * sizes.mean() + 1)


def test_near_images_and_pairs_are_those_of_all_distances(rng: np.random.Generator) -> None:
    support = Clusters(4, noise=0.6).support([5, 1, 7, 4])
    plain = support.embeddings.plain.copy()
    plain[9] = unit(plain[2] + 0.02 * unit_rows(rng, 1, 24)[0])  # of another class
    plain[14] = plain[13]
    support = replace(support, embeddings=Embeddings(plain))
    distances, labels = 1.0 - plain.astype(np.float64) @ plain.T, support.labels
    within = [distances[np.ix_(labels == c, labels == c)] for c in (0, 2, 3)]
    limit = np.median([np.median(one[np.triu_indices(len(one), 1)]) for one in within]) / 10
    pairs = near_pairs(plain, support)
    assert [pair[:2] for pair in pairs] == [(13, 14), (2, 9)] and (distances[np.triu_indices(17, 1)] < limit).sum() == 2
    assert [pair[2] for pair in pairs] == pytest.approx([1.0, 1 - distances[2, 9]], abs=1e-6)
    asked = np.vstack([unit(plain[:3] + 0.02 * unit_rows(rng, 3, 24)), unit_rows(rng, 3, 24)])
    np.testing.assert_array_equal(NearSupport(support)(asked), (1.0 - asked @ plain.T).min(1) < limit)
    assert NearSupport(support.only(np.zeros(17, bool)))(asked).tolist() == [False] * 6
    single = support.only(np.arange(17) == 5)
    assert NearSupport(single)(np.vstack([plain[5:6], asked])).tolist() == [True] + [False] * 6


def test_images_with_several_labels_have_as_many_units_as_they_have_groups(rng: np.random.Generator) -> None:
    labels = np.zeros((80, 3), bool)
    labels[:, 0], labels[::4, 1], labels[8:10, 2] = True, True, True
    support = make_support_set(random_embeddings(rng, 80, 64), labels, None, 1.0, groups=np.arange(80) // 2)
    folds = make_folds(support)
    assert folds.number == 16 and folds.distinct.tolist() == [40, 20, 1]
    plain = support.embeddings.plain.copy()
    plain[50] = plain[13]
    assert [pair[:2] for pair in near_pairs(plain, support)] == [(13, 50)]
    of_last = 1.0 - plain[8] @ plain[9]
    assert class_distances(plain, support, np.mean)[2] == pytest.approx(of_last)


def test_the_distance_of_near_duplicates_is_computed_once_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    head, measured = random_head(np.random.default_rng(0), 4, 5, "gda"), []
    monkeypatch.setattr(
        "iosr_fast.methods.folds.class_distances", lambda *given: measured.append(1) or class_distances(*given)
    )
    assert all(head.near_support(head.examples.embeddings.plain[:2]).all() for _ in range(3)) and measured == [1]


def test_a_support_set_is_sorted_stably(rng: np.random.Generator) -> None:
    embeddings, labels = random_embeddings(rng, 6, 4), np.array([2, 0, 2, 0, 0, 3])
    support = make_support_set(embeddings, labels, unit_rows(rng, 4, 4), 1.0, queries=embeddings[::-1])
    np.testing.assert_array_equal(support.class_offsets, [0, 3, 3, 5, 6])
    np.testing.assert_array_equal(support.labels, [0, 0, 0, 2, 2, 3])
    np.testing.assert_array_equal(support.embeddings.plain, embeddings.plain[[1, 3, 4, 0, 2, 5]])
    np.testing.assert_array_equal(support.as_queries.plain, embeddings.plain[::-1][[1, 3, 4, 0, 2, 5]])
    some = support.only(np.array([True, False, True, False, True, True]))
    np.testing.assert_array_equal(some.labels, [0, 0, 2, 3])
    np.testing.assert_array_equal(some.embeddings.adapted, embeddings.adapted[[1, 4, 2, 5]])
    np.testing.assert_array_equal(some.as_queries.plain, embeddings.plain[::-1][[1, 4, 2, 5]])


def test_a_support_set_of_label_sets_keeps_the_order_of_images(rng: np.random.Generator) -> None:
    labels = np.array([[1, 1, 0], [0, 0, 0], [0, 1, 0], [1, 0, 0]], bool)
    embeddings = random_embeddings(rng, 4, 4)
    support = make_support_set(embeddings, labels, None, 1.0, queries=embeddings[::-1], groups=np.arange(4))
    np.testing.assert_array_equal(support.indicator, labels)
    np.testing.assert_array_equal(support.embeddings.plain, embeddings.plain)
    assert support.counts.tolist() == [2, 2, 0] and support.of_labels(np.arange(4)).tolist() == [0, 3, 0, 2]
    kept = np.array([False, True, True, True])
    some = support.only(kept)
    np.testing.assert_array_equal(some.indicator, labels[kept])
    np.testing.assert_array_equal(some.as_queries.plain, embeddings.plain[::-1][kept])
    assert some.groups.tolist() == [1, 2, 3]


def test_a_support_set_refuses_what_does_not_fit(rng: np.random.Generator) -> None:
    rows, text = random_embeddings(rng, 3, 4), unit_rows(rng, 2, 4)
    assert make_support_set(rows, np.array([0, 1, 1]), None, 1.0, 3).n_classes == 3
    for words, labels, texts in (
        ("one label for each of 3", [0, 1], text),
        (r"labels in 0\.\.1, got 0\.\.2", [0, 1, 2], text),
        ("as wide as the text's, 5, got 4", [0, 1, 1], unit_rows(rng, 2, 5)),
        ("text embeddings or n_classes", [0, 1, 1], None),
        ("row of labels for each of 3 images, got 2", np.eye(2), None),
        ("text for each of 3 classes, got 2", np.eye(3), text),
    ):
        with pytest.raises(ValueError, match=words):
            make_support_set(rows, np.array(labels), texts, 1.0)
