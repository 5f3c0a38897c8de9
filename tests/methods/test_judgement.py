"""Promises and expected accuracies against what labelled images say: no alarm but by chance, and none missed."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from iosr_fast.methods.judgement import PromiseResult, difference_of_shares
from iosr_fast.methods.paired_tests import is_level, lost_and_won, sign_test


@pytest.mark.parametrize("promised", [0.01, 0.1])
@pytest.mark.parametrize("accepted", [1, 28, 29, 300, 1500])
def test_a_promise_broke_where_a_binomial_test_rejects_it(promised: float, accepted: int) -> None:
    wrong = range(min(accepted, 250) + 1)
    results = [PromiseResult.of(promised, accepted, k) for k in wrong]
    p = [binomtest(k, accepted, promised, alternative="greater").pvalue for k in wrong]
    assert [one.judgement == "broke" for one in results] == [value <= 0.05 for value in p]
    enough = (1 - promised) ** accepted <= 0.05
    assert {one.judgement for one in results} - {"broke"} == {"held" if enough else "too few"}


def test_a_promise_says_its_counts() -> None:
    said = [str(PromiseResult.of(0.01, *counts)) for counts in ((1596, 42), (30, 0))]
    assert said[0] == "42 of 1,596 accepted labels are wrong (2.6%; chance explains 23)"
    assert said[1] == "0 of 30 accepted labels are wrong, and 299 are needed"


@pytest.mark.parametrize("share", [0.75, 0.97])
@pytest.mark.parametrize(("count", "other"), [(300, 1600), (60, 40)])
def test_equal_accuracies_differ_in_a_twentieth_of_draws(share: float, count: int, other: int) -> None:
    rng = np.random.default_rng(0)
    draws = zip(rng.binomial(count, share, 2000) / count, rng.binomial(other, share, 2000) / other, strict=True)
    ends = np.array([difference_of_shares(one, count, two, other) for one, two in draws])
    assert 0.005 < ((ends[:, 0] > 0) | (ends[:, 1] < 0)).mean() < 0.065
    assert difference_of_shares(share - 0.4, count, share, other)[1] < 0
    assert difference_of_shares(1.0, count, 1.0, other) == pytest.approx((-0.1, 0.1), abs=0.1)


@pytest.mark.parametrize(("lost", "won", "level"), [(4, 0, True), (5, 0, False), (0, 9, True), (12, 4, True)])
def test_a_paired_test_is_that_of_scipy_and_level_its_normal_approximation(lost: int, won: int, level: bool) -> None:
    best, right = np.arange(30) >= won, (np.arange(30) < won) | (np.arange(30) >= won + lost)
    assert lost_and_won(best, right) == (lost, won) and is_level(right, best) is level
    exact = binomtest(lost, lost + won, alternative="greater").pvalue
    assert sign_test(lost, won) == pytest.approx(exact) and level == (exact > 0.035)
