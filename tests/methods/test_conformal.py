"""Conformal sets of labels: log-odds in float64, coverage on new images, by class; reliability of probabilities."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods import METHODS
from iosr_fast.methods.config import Config
from iosr_fast.methods.conformal import Judged, images_needed, log_odds, of_logits, threshold
from iosr_fast.methods.folds import make_folds
from iosr_fast.methods.out_of_fold import out_of_fold
from iosr_fast.methods.support_set import SupportSet
from iosr_fast.methods.tune import tune
from iosr_fast.scoring.score import score
from iosr_fast.utils.numbers import check_share
from tests.methods.support_sets import Clusters

CLASSES = 12
WORLD = Clusters(CLASSES, width=48, noise=1.6, seed=5)


def left_out(support: SupportSet) -> Judged:
    found = out_of_fold(METHODS["gda"], support, make_folds(support), None, {"alpha": 1.0})
    return of_logits(found.logits, found.labels)


def test_log_odds_are_those_of_softmax_and_do_not_saturate(rng: np.random.Generator) -> None:
    logits = 3 * rng.standard_normal((20, 5))
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(log_odds(logits), np.log(shares / (1 - shares)), atol=1e-7)
    np.testing.assert_allclose(log_odds(np.array([[900.0, 0.0, 0.0]])), [[900 - np.log(2), -900, -900]])


@pytest.mark.parametrize("coverage", [0.8, 0.9, 0.95])
def test_sets_cover_what_they_promise_on_new_images(coverage: float) -> None:
    """The mean over support sets; a fold has fewer images than the classifier in use, so that more are covered."""
    queries, labels = WORLD.queries(60, seed=3)
    shares, sizes, right = [], [], []
    for seed in range(8):
        support = WORLD.support([8] * CLASSES, 100 + seed, text=False)
        tuned = tune(Config(method="stack"), support)[0]
        logits = score(tuned.compile(support), queries)
        found = out_of_fold(METHODS["stack"], support, make_folds(support), None, tuned.parameters)
        sets = of_logits(found.logits, found.labels).sets(logits, coverage)
        shares.append(sets[np.arange(len(labels)), labels].mean())
        sizes.append(sets.sum(1).mean())
        right.append((logits.argmax(1) == labels).mean())
    assert coverage - 0.015 < np.mean(shares) < coverage + 0.04, shares
    assert np.mean(sizes) < CLASSES / 2 and (coverage < np.mean(right) or np.mean(sizes) > 1)


def test_per_class_sets_cover_each_class(rng: np.random.Generator) -> None:
    """Half of the classes are noisier: one threshold for all covers them less, one for each class as promised."""

    def draw(each: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.repeat(np.arange(4), each)
        deviation = np.where(labels < 2, 0.7, 2.0)[:, None]
        return 4.0 * np.eye(4)[labels] + deviation * rng.standard_normal((len(labels), 4)), labels

    logits, labels = draw(2000)
    shares = {False: np.zeros(4), True: np.zeros(4)}
    for _ in range(10):
        known, truth = draw(50)
        left = of_logits(known, truth)
        assert left.sets(known, 0.9)[np.arange(200), truth].sum() == 200 - 20 + 1  # an image reaches its own threshold
        for per_class, share in shares.items():
            sets = left.sets(logits, 0.9, classes=range(4) if per_class else None)
            share += np.bincount(labels, sets[np.arange(8000), labels]) / 2000 / 10
    assert np.ptp(shares[False]) > 0.05 and np.abs(shares[True] - 0.9).max() < 0.03, shares


def test_per_class_thresholds_are_those_of_their_own_images_and_need_enough_of_them() -> None:
    left = left_out(WORLD.support([9] * CLASSES))
    assert left.thresholds(0.9, range(CLASSES)).tolist() == [
        left.label_odds[left.labels == c].min() for c in range(CLASSES)
    ]
    few = left_out(WORLD.support([7] + [9] * (CLASSES - 1)))
    names = [f"class {c}" for c in range(CLASSES)]
    with pytest.raises(
        IosrFastError, match=r"at least 9 left-out support images of each class, got fewer of 'class 0 \(7\)': "
    ):
        few.thresholds(0.9, names)
    assert few.thresholds(0.9) == pytest.approx(np.sort(few.label_odds)[int(0.1 * 107) - 1])
    for share in (0.5, 0.8, 0.95, 0.99):
        n = images_needed(share)
        assert threshold(np.arange(n, 0.0, -1), share) == 1.0
        with pytest.raises(IosrFastError, match=f"at least {n} "):
            threshold(np.arange(n - 1.0), share)
    ranks = [(7 * (n + 1) // 10, n) for n in range(1, 20)]
    assert [(threshold(np.arange(1.0, n + 1), 0.3), n) for _, n in ranks] == ranks
    none = left_out(WORLD.support([1] * CLASSES))
    assert math.isnan(none.reliability.accuracy) and "there are no left-out" in str(none.reliability)
    with pytest.raises(IosrFastError, match=r"0\.9 of the pictures needs at least 9 .* got 0"):
        none.sets(np.zeros((2, CLASSES)), 0.9)


def test_reliability_is_what_its_bins_say() -> None:
    confidence, right = np.array([0.05, 0.1, 0.55, 0.6, 1.0]), np.array([False, True, True, False, True])
    odds = np.log(confidence / (1 - confidence + 1e-12))
    one = Judged(np.zeros(5), odds[:, None], right[:, None], np.arange(1.0, 6.0), np.zeros(5, int))
    table = one.reliability
    assert table.counts.tolist() == [2, 0, 0, 0, 0, 2, 0, 0, 0, 1]
    assert table.confidence[5] == pytest.approx(0.575) and table.right[5] == 0.5 and np.isnan(table.right[1])
    assert table.error == pytest.approx((2 * 0.425 + 2 * 0.075 + 0) / 5)
    assert (table.accuracy, table.log_loss, table.n_images) == (0.6, 3.0, 5)
    burst = replace(one, weights=np.array([1.0, 1.0, 0.5, 0.5, 1.0])).reliability  # the third and fourth are one
    assert burst.accuracy == pytest.approx(2.5 / 4) and burst.log_loss == pytest.approx(11.5 / 4)
    assert burst.error == pytest.approx((2 * 0.425 + 0.075 + 0) / 4) and burst.n_images == 5
    assert "5 left-out support images" in str(table) and "0.5 to 0.6        2  57.5%  50.0%" in str(table)


@pytest.mark.parametrize("share", [0, 1, -0.5, math.nan, "0.9", None])
def test_a_share_is_a_number_between_0_and_1(share: object) -> None:
    with pytest.raises(IosrFastError, match=f"expected keep above 0 and below 1, like 0.95, got {share!r}"):
        check_share("keep", share)  # type: ignore[arg-type]
