"""Promises and expected accuracies against what labelled images say: no alarm but by chance, and none missed."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from iosr_fast.methods.automation import PROMISES
from iosr_fast.methods.conformal import Judged
from iosr_fast.methods.judgement import PromiseResult, accuracy_at, difference_of_shares, judge_promises
from iosr_fast.methods.paired_tests import is_level, lost_and_won, sign_test


def judged(*promises: tuple[float, int, int]) -> tuple[PromiseResult, ...]:
    """Promises with the labels that they accept, of which so many are wrong."""
    counts = np.array([one[1:] for one in promises])
    return judge_promises([one[0] for one in promises], counts, counts)


@pytest.mark.parametrize("promised", [0.01, 0.1])
@pytest.mark.parametrize("accepted", [1, 28, 29, 300, 1500])
def test_one_promise_broke_where_a_binomial_test_rejects_it(promised: float, accepted: int) -> None:
    wrong = range(min(accepted, 250) + 1)
    results = [judged((promised, accepted, k))[0] for k in wrong]
    p = [binomtest(k, accepted, promised, alternative="greater").pvalue for k in wrong]
    assert [one.judgement == "broke" for one in results] == [value <= 0.05 for value in p]
    enough = (1 - promised) ** accepted <= 0.05
    for one in results:
        unbroken = "too few" if not enough else "held" if one.wrong / accepted <= promised else "not refuted"
        assert one.judgement in ("broke", unbroken) and (one.wrong > one.explained) == (one.judgement == "broke")


def test_several_promises_are_judged_by_the_step_down_procedure_of_holm() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        accepted = rng.integers(100, 900, 9)
        wrong = rng.binomial(accepted, np.array(PROMISES) * rng.choice([1.0, 1.5, 2.5], 9))
        results = judged(*zip(PROMISES, accepted.tolist(), wrong.tolist(), strict=True))
        tests = zip(wrong, accepted, PROMISES, strict=True)
        p = np.array([binomtest(*one, alternative="greater").pvalue for one in tests])
        rejected = set[int]()
        for step, row in enumerate(np.argsort(p).tolist()):
            if p[row] > 0.05 / (9 - step):
                break
            rejected.add(row)
        assert {row for row, one in enumerate(results) if one.judgement == "broke"} == rejected
        assert all((one.wrong > one.explained) == (one.judgement == "broke") for one in results)


@pytest.mark.parametrize("images", [300, 1600])
def test_of_honest_families_one_in_twenty_at_most_is_said_to_have_broken_a_promise(images: int) -> None:
    """Each promise accepts a part of what the next one accepts, and is as often wrong as it promises."""
    rng, accepted = np.random.default_rng(0), np.round(np.linspace(0.2, 1.0, 9) * images).astype(int)
    each = np.diff(accepted, prepend=0)
    rates = np.diff(accepted * PROMISES, prepend=0) / each
    broke = 0
    for _ in range(500):
        wrong = np.cumsum(rng.binomial(each, rates)).tolist()
        results = judged(*zip(PROMISES, accepted.tolist(), wrong, strict=True))
        broke += any(one.judgement == "broke" for one in results)
    assert broke <= 35  # 5% and three standard errors; one at a time the tests say so of 13 to 16%


@pytest.mark.parametrize("size", [1, 4])
def test_a_burst_is_judged_as_one_label(size: int) -> None:
    """Whatever is photographed several times breaks no promise by that."""
    rng, broke = np.random.default_rng(0), 0
    for _ in range(500):
        counts = np.array([[300, rng.binomial(300, 0.05)]])
        (one,) = judge_promises([0.05], size * counts, counts.astype(float))
        broke += one.judgement == "broke"
        assert (one.accepted, one.count, one.share) == (300 * size, 300, counts[0, 1] / 300)
        assert (one.wrong > one.explained) == (one.judgement == "broke")
    assert broke <= 40


def test_a_promise_says_its_counts() -> None:
    said = [str(judged((0.01, *counts))[0]) for counts in ((596, 10), (30, 0))]
    assert (
        said[0] == "10 of 596 accepted labels are wrong (1.7%); up to 10 wrong would still agree with the promise of 1%"
    )
    assert said[1] == "0 of 30 accepted labels are wrong; a judgement needs 299 accepted labels"
    (burst,) = judge_promises([0.1], np.array([[90, 12]]), np.array([[30.0, 2.0]]))
    assert str(burst) == (
        "12 of 90 accepted labels (effective sample size 30: look-alikes are not independent) are wrong "
        "(6.7% if a burst counts once); up to 18 wrong would still agree with the promise of 10%"
    )
    assert judge_promises([0.1], np.array([[0, 0]]), np.zeros((1, 2))) == ()


def test_an_accuracy_is_expected_at_the_class_sizes_of_new_pictures() -> None:
    """As of pictures drawn by class; a burst counts once, and a class without left-out images says nothing."""
    labels, right = np.repeat([0, 1], [20, 10]), np.repeat([True, False, True], [18, 2, 10])
    zeros = np.zeros(30)
    left_out = Judged(zeros, zeros[:, None], right[:, None], zeros, labels)
    assert accuracy_at(left_out, np.array([20, 10, 0])) == accuracy_at(left_out, np.array([21, 10, 0])) == (28 / 30, 30)
    assert accuracy_at(left_out, np.array([0, 7, 5])) == pytest.approx((1.0, 10))
    accuracy, count = accuracy_at(left_out, np.array([90, 10, 5]))
    share = np.where(labels == 0, 0.9 / 20, 0.1 / 10)
    assert accuracy == pytest.approx(0.91) and count == pytest.approx(1 / (share**2).sum())
    assert accuracy_at(left_out, np.array([0, 0, 5])) == (28 / 30, 30)  # nothing else is known
    rows = np.repeat(np.arange(30), 3)
    each = Judged(
        zeros[rows], zeros[rows, None], right[rows, None], zeros[rows], labels[rows], weights=zeros[rows] + 1 / 3
    )
    assert accuracy_at(each, np.array([90, 10, 5])) == pytest.approx((accuracy, count))


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
