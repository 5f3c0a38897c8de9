"""What may be automated: thresholds by the Clopper-Pearson bound, and errors of accepted labels as promised."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binom

from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods.automation import (
    PROMISES,
    automation,
    binomial_cdf,
    check_promise,
    explained_by_chance,
    images_needed_for,
    least_odds,
)
from iosr_fast.methods.conformal import Judged, of_logits
from iosr_fast.methods.folds import unit_weights


def left_out(odds: np.ndarray, right: np.ndarray) -> Judged:
    return Judged(odds, odds[:, None], right[:, None], np.zeros(len(odds)), np.zeros(len(odds), int))


def labelled(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits (count, 5) and labels; sure images are right more often."""
    labels = rng.integers(5, size=count)
    return 4.0 * np.eye(5)[labels] + 1.6 * rng.standard_normal((count, 5)), labels


@pytest.mark.parametrize("max_error", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("images", [40, 300, 1501])
def test_thresholds_pass_while_the_clopper_pearson_bound_is_below_the_promise(images: int, max_error: float) -> None:
    rng = np.random.default_rng(images)
    one = of_logits(*labelled(rng, images))
    found, needed = least_odds(one, max_error), images_needed_for(max_error)
    falling, passed = np.sort(one.odds[:, 0])[::-1], np.inf
    for count in np.unique(np.linspace(needed, images, 41).round().astype(int)) if images >= needed else []:
        wrong = int((~one.right[:, 0][one.odds[:, 0] >= falling[count - 1]]).sum())
        if beta.ppf(0.95, wrong + 1, count - wrong) > max_error:
            break
        passed = falling[count - 1]
    assert found == passed
    curve = automation(one)
    at = PROMISES.index(max_error)
    accepted = one.odds[:, 0] >= found
    assert curve.shares[at] == accepted.mean() and curve.images == images
    if accepted.any():
        assert curve.errors[at] == (~one.right[accepted, 0]).mean()
        assert curve.thresholds[at] == pytest.approx(one.confidence[accepted].min())


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 4]), st.floats(0.0, 0.2))
@settings(max_examples=150, deadline=None)
def test_a_wrong_answer_in_place_of_a_right_one_never_loosens_a_promise(seed: int, burst: int, wrong: float) -> None:
    rng = np.random.default_rng(seed)
    units = np.arange(400) // burst
    odds, right = rng.normal(3.0, 2.0, 400), (rng.random(400) < 1 - wrong) & (rng.random(100)[units % 100] < 1 - wrong)
    worse = right & (rng.random(400) < rng.choice([0.005, 0.1]))
    before, after = (replace(left_out(odds, one), weights=unit_weights(units)) for one in (right, right & ~worse))
    assert all(least_odds(before, promised) <= least_odds(after, promised) for promised in PROMISES)
    assert automation(before).least_error <= automation(after).least_error


@pytest.mark.parametrize("max_error", [0.02, 0.05, 0.1])
def test_of_accepted_labels_of_new_images_no_more_are_wrong_than_promised(max_error: float) -> None:
    """In at least 95% of the draws of the left-out images, and not by accepting nothing."""
    rng, broken, shares = np.random.default_rng(0), 0, []
    new = of_logits(*labelled(rng, 50_000))
    for _ in range(100):
        accepted = new.odds[:, 0] >= least_odds(of_logits(*labelled(rng, 600)), max_error)
        broken += bool(accepted.any()) and float((~new.right[accepted, 0]).mean()) > max_error
        shares.append(accepted.mean())
    assert broken <= 5 and np.mean(shares) > 0.2, (broken, np.mean(shares))


def test_an_answer_is_wrong_where_its_node_is() -> None:
    odds, none = np.stack([np.zeros(400), np.linspace(3, 5, 400)], 1), np.zeros(400, int)  # of classes, and of nodes
    right = np.stack([np.arange(400) % 2 > 0, np.ones(400, bool)], 1)
    assert least_odds(Judged(odds[:, 0], odds, right, odds[:, 0], none), 0.01) == 3.0
    assert least_odds(Judged(odds[:, 0], odds, right[:, ::-1], odds[:, 0], none), 0.01) == np.inf


def test_too_few_images_promise_nothing_and_say_how_many_are_needed() -> None:
    for max_error, needed in ((0.01, 299), (0.1, 29)):
        enough, few = (left_out(np.arange(n, 0.0, -1), np.ones(n, bool)) for n in (needed, needed - 1))
        check_promise(enough, max_error)
        assert least_odds(enough, max_error) == 1.0 and least_odds(few, max_error) == np.inf
        with pytest.raises(
            IosrFastError, match=rf"{max_error} wrong labels needs at least {needed} .* got {needed - 1}"
        ):
            check_promise(few, max_error)
        smallest = automation(enough).smallest
        assert smallest <= max_error < automation(few).smallest and images_needed_for(smallest) == needed
    none = automation(left_out(np.zeros(0), np.zeros(0, bool)))
    assert none.smallest == 1.0 and not none.shares.any()
    assert "0 left-out support images can promise nothing" in str(none)


def test_images_of_equal_confidence_are_accepted_together_or_not_at_all() -> None:
    """60 sure images are right; of 240 equal ones a tenth is wrong: no half of these passes a promise of 5%."""
    odds, right = np.repeat([3.0, 1.0], [60, 240]), np.ones(300, bool)
    right[60::10] = False
    assert least_odds(left_out(odds, right), 0.05) == 3.0
    assert least_odds(left_out(odds, right), 0.2) == 1.0


@pytest.mark.parametrize(
    ("right", "said"),
    [
        (300, "300 left-out support images can promise errors of 1.0% and more with 95% confidence"),
        (40, "can promise errors of 7.2% and more with 95% confidence (1.0% if all were right)"),
        (0, "can promise nothing (1.0% if all were right)"),
    ],
)
def test_what_is_said_to_be_promised_is_what_thresholds_allow(right: int, said: str) -> None:
    """Of 300 images the `right` surest are right, all others wrong."""
    images = left_out(np.arange(300, 0.0, -1), np.arange(300) < right)
    curve = automation(images)
    assert curve.can.endswith(said)
    assert (np.isfinite(curve.thresholds) == (curve.max_errors >= curve.least_error)).all()
    if right:
        assert least_odds(images, curve.least_error * 1.001) < np.inf == least_odds(images, curve.least_error * 0.999)


@pytest.mark.parametrize("share", [0.005, 0.1, 0.5])
@pytest.mark.parametrize("count", [1, 30, 20_000])
def test_the_binomial_distribution_is_that_of_scipy(count: int, share: float) -> None:
    exact = binom.cdf(np.arange(count + 1), count, share)
    np.testing.assert_allclose(binomial_cdf(count, share, count), exact, rtol=1e-8, atol=1e-300)
    assert explained_by_chance(count, share) == binom.ppf(0.95, count, share)
