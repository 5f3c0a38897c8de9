"""The alarm on checked labels, which is seldom false and comes soon, and the note on strange pictures."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods.checks import CheckedPromise, Strangers, check, checked, strange_odds
from iosr_fast.methods.conformal import Judged

RUNS = 1_000


def runs(rate: float, max_error: float, checks: int) -> list[CheckedPromise]:
    wrong = np.random.default_rng(int(1e4 * rate)).random((RUNS, checks)) < rate
    return [checked(row[:, None].tolist(), max_error) for row in wrong]


@pytest.mark.parametrize("max_error", [0.01, 0.05, 0.1])
def test_alarms_are_false_in_at_most_5_percent_of_runs_however_often_one_looks(max_error: float) -> None:
    assert sum(run.refuted for run in runs(max_error, max_error, 2_000)) <= 0.05 * RUNS
    assert sum(run.refuted for run in runs(max_error / 2, max_error, 2_000)) <= 0.005 * RUNS


@pytest.mark.parametrize(
    ("max_error", "times", "most"),
    [(0.01, 2, 900), (0.01, 3, 270), (0.05, 2, 180), (0.05, 3, 50), (0.1, 2, 85), (0.1, 3, 25)],
)
def test_half_of_the_broken_promises_are_found_after_so_many_checks(max_error: float, times: int, most: int) -> None:
    assert sum(run.refuted for run in runs(times * max_error, max_error, most)) > 0.5 * RUNS


def test_the_value_is_the_mean_of_likelihood_ratios_and_the_largest_stays() -> None:
    wrong = [False, True, True, False]
    rates = [f * 0.05 / (1 + (f - 1) * 0.05) for f in (1.25, 1.5, 2, 3, 4, 6, 8)]
    values = [1.0]
    for n in range(1, 5):
        ratios = [np.prod([(r if one else 1 - r) / (0.05 if one else 0.95) for one in wrong[:n]]) for r in rates]
        values.append(float(np.mean(ratios)))
    found = checked([[one] for one in wrong], 0.05)
    assert found.e_value == pytest.approx(max(values)) and found.at == (3, 2) and (found.checks, found.wrong) == (4, 2)
    assert checked([[True]] * 50 + [[False]] * 5_000, 0.05).refuted
    assert checked([[True]] * 10_000, 0.001).refuted  # no overflow
    assert checked([], 0.05) == CheckedPromise(0.05, 0, 0, 1.0, (0, 0))


def test_answers_are_compared_with_labels_and_those_withheld_say_nothing() -> None:
    answers, labels = np.array(["a", None, "b", "a"], object), np.array(["a", "b", "a", "c"])
    assert check(answers, labels, 0.1) == checked([[False], [True], [True]], 0.1)
    assert check([3, 4], [3, 5], 0.1).wrong == 1
    several = check([{"a", "b"}, set(), {"c"}], [{"a"}, {"a"}, {"c", "d"}], 0.1)  # a picture counts once
    assert several == checked([[False, True], [False]], 0.1) and (several.checks, several.wrong) == (3, 1)
    assert 1 < several.e_value < check(["b", "c"], ["a", "c"], 0.1).e_value
    said = "of 1 accepted label that you checked 0 were wrong: no sign that more than 0.5% are"
    assert str(check(["a"], ["a"], 0.005)) == said
    with pytest.raises(IosrFastError, match="a label for each answer, got 1 labels and 2 answers"):
        check(["a", "b"], ["a"], 0.1)
    with pytest.raises(IosrFastError, match="max_error"):
        check(["a"], ["a"], 1.0)


def noted(rate: float, seed: int, pictures: int = 1_000) -> bool:
    """Whether there was a note."""
    strangers, found = Strangers(), False
    for strange in np.random.default_rng([seed, int(100 * rate)]).random(pictures) < rate:
        strangers.add(bool(strange))
        found = found or bool(strangers.note)
    return found


@pytest.mark.parametrize(("rate", "least", "most"), [(0.1, 0, 0), (0.14, 0, 1), (0.3, 40, 40), (0.5, 40, 40)])
def test_strange_pictures_are_noted_beyond_a_guard_band(rate: float, least: int, most: int) -> None:
    assert least <= sum(noted(rate, seed) for seed in range(40)) <= most


def test_a_note_ends_and_few_pictures_make_none() -> None:
    strangers = Strangers()
    assert np.isnan(strangers.share)
    for _ in range(30):
        strangers.add(True)
    assert not strangers.note
    for _ in range(10):
        strangers.add(True)
    assert strangers.note == "100% of the last 40 pictures are stranger than 90% of your examples"
    for _ in range(350):
        strangers.add(False)
    assert not strangers.note and len(strangers.last) == 390
    for _ in range(400):
        strangers.add(False)
    assert strangers.share == 0.0 and len(strangers.last) == 400


def left_out_images(odds: np.ndarray, weights: np.ndarray | None = None) -> Judged:
    zeros = np.zeros(len(odds))
    return Judged(odds, odds[:, None], odds[:, None] > 0, zeros, zeros.astype(int), weights=weights)


@pytest.mark.parametrize("images", [29, 50, 300])
def test_the_odds_of_a_strange_picture_are_a_lower_bound_of_the_quantile(images: int) -> None:
    """At most a tenth of new pictures are as strange, in 95% of draws of the left-out images; a burst counts once."""
    odds = np.random.default_rng(0).normal(size=images)
    rank = int((odds <= strange_odds(left_out_images(odds))).sum())
    assert rank >= 1 and binom.cdf(rank - 1, images, 0.1) <= 0.05 < binom.cdf(rank, images, 0.1)
    bursts = left_out_images(np.repeat(odds, 3), np.full(3 * images, 1 / 3))
    assert strange_odds(bursts) == strange_odds(left_out_images(odds))


@pytest.mark.parametrize("images", [0, 12, 28])
def test_with_few_left_out_images_no_picture_is_strange(images: int) -> None:
    assert strange_odds(left_out_images(np.arange(1.0, images + 1))) == -np.inf


def noted_after(images: int, strangers: float, seed: int, pictures: int) -> int | None:
    """After how many pictures there is a note, where a share of `strangers` is stranger than all left-out `images`."""
    rng, counter = np.random.default_rng([images, seed]), Strangers()
    limit = strange_odds(left_out_images(rng.normal(size=images)))
    odds = rng.normal(size=pictures) - 10.0 * (rng.random(pictures) < strangers)
    for i, strange in enumerate((odds <= limit).tolist()):
        counter.add(strange)
        if counter.note:
            return i + 1
    return None


@pytest.mark.parametrize("images", [12, 30, 50, 100])
def test_pictures_like_the_left_out_ones_are_not_noted(images: int) -> None:
    assert sum(noted_after(images, 0.0, seed, 1_000) is not None for seed in range(100)) <= 1


def test_strangers_are_noted_after_few_pictures() -> None:
    found = [noted_after(100, 0.5, seed, 60) for seed in range(40)]
    assert all(found) and np.median([one for one in found if one]) == 40  # the fewest that may be noted
