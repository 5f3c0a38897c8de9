"""Conformal sets of labels: log-odds in float64, coverage on synthetic images; reliability of probabilities."""

from __future__ import annotations

import math

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods import compile_method
from iosr_fast.methods.conformal import BINS, LeftOutLabels, leave_out_labels, log_odds, of_logits, sets_of_labels
from iosr_fast.methods.support_set import SupportSet, make_support_set
from iosr_fast.methods.tune import tune
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.score import score

CLASSES, WIDTH = 12, 48
CENTRES = np.random.default_rng(5).standard_normal((CLASSES, WIDTH))


def images_of(each: int, seed: int) -> tuple[Embeddings, np.ndarray]:
    labels = np.repeat(np.arange(CLASSES), each)
    rows = CENTRES[labels] + 1.6 * np.random.default_rng(seed).standard_normal((len(labels), WIDTH))
    return Embeddings((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)), labels


def support_of(shots: int, seed: int) -> SupportSet:
    return make_support_set(*images_of(shots, seed), text=None, tau=100.0, n_classes=CLASSES)


def gda(support: SupportSet) -> ScoringPlan:
    return compile_method("gda", support, alpha=1.0)


def test_log_odds_are_those_of_softmax_and_do_not_saturate(rng: np.random.Generator) -> None:
    logits = 3 * rng.standard_normal((20, 5))
    odds = log_odds(logits)
    for b in range(20):
        for c in range(5):
            p = math.exp(logits[b, c]) / sum(math.exp(z) for z in logits[b])
            assert odds[b, c] == pytest.approx(math.log(p / (1 - p)), abs=1e-7)
    np.testing.assert_allclose(log_odds(np.array([[900.0, 0.0, 0.0]])), [[900 - np.log(2), -900, -900]])
    np.testing.assert_allclose(log_odds(np.array([[1.0, 1.0]])), 0.0, atol=1e-12)
    assert log_odds(np.zeros((0, 3))).shape == (0, 3)


@pytest.mark.parametrize("coverage", [0.8, 0.9, 0.95])
def test_sets_cover_what_they_promise_on_new_images(coverage: float) -> None:
    """The mean over support sets: a single one scatters about the promise."""
    queries, labels = images_of(60, 3)
    covered, sizes, right = [], [], []
    for seed in range(8):
        support = support_of(8, 100 + seed)
        tuned = tune("stack", support)
        logits = score(tuned.compile(support), queries)
        sets = leave_out_labels(support, tuned.compile).sets(logits, coverage)
        covered.append(sets[np.arange(len(labels)), labels].mean())
        sizes.append(sets.sum(1).mean())
        right.append((logits.argmax(1) == labels).mean())
    assert abs(np.mean(covered) - coverage) < 0.025, covered
    assert np.mean(sizes) < CLASSES / 2 and (coverage < np.mean(right) or np.mean(sizes) > 1)


def test_split_conformal_sets_by_validation_images() -> None:
    queries, labels = images_of(100, 3)
    plan = gda(support_of(4, 1))
    validation, known = images_of(40, 2)
    sets = of_logits(score(plan, validation), known).sets(score(plan, queries), 0.9)
    assert abs(sets[np.arange(len(labels)), labels].mean() - 0.9) < 0.03


def test_per_class_sets_cover_each_class() -> None:
    """Half of the classes are noisier: one threshold for all covers them less, one for each class as promised."""
    noise = np.where(np.arange(CLASSES) < CLASSES // 2, 0.8, 2.4)

    def draw(each: int, seed: int) -> tuple[Embeddings, np.ndarray]:
        labels = np.repeat(np.arange(CLASSES), each)
        rng = np.random.default_rng(seed)
        rows = CENTRES[labels] + noise[labels, None] * rng.standard_normal((len(labels), WIDTH))
        return Embeddings((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)), labels

    queries, labels = draw(200, 3)
    covered = {False: np.zeros(CLASSES), True: np.zeros(CLASSES)}
    for seed in range(12):
        support = make_support_set(*draw(9, 100 + seed), text=None, tau=100.0, n_classes=CLASSES)
        left, logits = leave_out_labels(support, gda), score(gda(support), queries)
        for per_class, shares in covered.items():
            sets = left.sets(logits, 0.9, classes=range(CLASSES) if per_class else None)
            shares += np.bincount(labels, sets[np.arange(len(labels)), labels]) / 200 / 12
    halves = {per_class: shares.reshape(2, -1).mean(1) for per_class, shares in covered.items()}
    assert np.ptp(halves[False]) > 0.1 and np.abs(halves[True] - 0.9).max() < 0.04, halves
    assert covered[True].min() > 0.8, covered[True]


def test_per_class_thresholds_are_those_of_their_own_images() -> None:
    left = leave_out_labels(support_of(9, 1), gda)
    limits = left.thresholds(0.9, range(CLASSES))
    assert limits.tolist() == [left.class_odds[left.labels == c].min() for c in range(CLASSES)]
    few = leave_out_labels(support_of(9, 1).only(np.arange(9 * CLASSES) > 1), gda)
    names = [f"class {c}" for c in range(CLASSES)]
    with pytest.raises(
        IosrFastError, match=r"at least 9 support images of each class .* got fewer of 'class 0 \(7\)': "
    ):
        few.thresholds(0.9, names)
    assert few.thresholds(0.9) == pytest.approx(np.sort(few.odds)[int(0.1 * 107) - 1])


def test_left_out_images_are_scored_without_their_fold() -> None:
    support = support_of(3, 1)
    left = leave_out_labels(support, gda)
    folds = np.tile(np.arange(3), CLASSES)
    odds = {}
    for fold in range(3):
        logits = score(gda(support.only(folds != fold)), support.embeddings[folds == fold])
        odds |= dict(
            zip(np.flatnonzero(folds == fold), log_odds(logits)[np.arange(CLASSES), np.arange(CLASSES)], strict=True)
        )
    expected = np.array([odds[j] for fold in range(3) for j in np.flatnonzero(folds == fold)])
    assert np.ptp(left.odds - expected) < 1e-5  # a drift is the same for all
    assert left.reliability.n_images == 3 * CLASSES


def test_one_image_a_class_allows_no_promise() -> None:
    left = leave_out_labels(support_of(1, 1), gda)
    assert left.reliability.n_images == 0 and math.isnan(left.reliability.accuracy)
    with pytest.raises(IosrFastError, match=r"0\.9 of the pictures needs at least 9 .* got 0"):
        left.sets(np.zeros((2, CLASSES)), 0.9)


def test_sets_are_sorted_and_may_be_empty() -> None:
    left = LeftOutLabels(np.arange(9.0), np.full(9, 0.5), np.ones(9, bool), np.zeros(9), np.zeros(9, int), np.zeros(9))
    logits = np.array([[0.0, 3.0, 2.9, -9.0], [1.0, 1.0, 1.0, 1.0]])
    sets = left.sets(logits, 0.9)  # log p / (1 - p) >= 0
    assert sets.tolist() == [[False, True, False, False], [False] * 4]
    named = sets_of_labels(np.array(["a", "b", "c", "d"]), logits, log_odds(logits) >= -1)
    assert [one.tolist() for one in named] == [["b", "c"], []]


def test_reliability_is_what_its_bins_say() -> None:
    confidence, right = np.array([0.05, 0.1, 0.55, 0.6, 1.0]), np.array([False, True, True, False, True])
    table = LeftOutLabels(
        np.zeros(5), confidence, right, np.array([1.0, 2, 3, 4, 5]), np.zeros(5, int), np.zeros(5)
    ).reliability
    assert table.counts.tolist() == [2, 0, 0, 0, 0, 2, 0, 0, 0, 1] and len(table.counts) == BINS
    assert table.confidence[5] == pytest.approx(0.575) and table.right[5] == 0.5 and np.isnan(table.right[1])
    assert table.error == pytest.approx((2 * 0.425 + 2 * 0.075 + 0) / 5)
    assert (table.accuracy, table.log_loss, table.n_images) == (0.6, 3.0, 5)
    assert "5 left-out support images" in str(table) and "0.5 to 0.6        2  57.5%  50.0%" in str(table)
