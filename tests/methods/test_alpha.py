"""The exact search for alpha against rational arithmetic, counting and grids."""

from __future__ import annotations

from fractions import Fraction
from itertools import groupby, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iosr_fast.methods import alpha as alpha_module
from iosr_fast.methods.alpha import Intervals, Plateau, intervals
from iosr_fast.methods.log_loss import MAX_ALPHA

Problem = tuple[np.ndarray, np.ndarray, np.ndarray]
EPS = np.finfo(np.float32).eps


@st.composite
def whole_problems(draw: st.DrawFn) -> Problem:
    """base, slope and labels of small whole numbers: ties abound, and rational arithmetic is exact."""
    n_samples, n_classes, largest = draw(st.integers(1, 12)), draw(st.integers(1, 5)), draw(st.integers(0, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    base, slope = rng.integers(-largest, largest + 1, (2, n_samples, n_classes)).astype(np.float32)
    return base, slope, rng.integers(0, n_classes, n_samples)


def right_at(problem: Problem, alpha: Fraction) -> list[bool]:
    """Whether the first of the largest logits is the label's, in rational arithmetic."""
    base, slope, labels = problem
    logits = [[int(z) + alpha * int(s) for z, s in zip(*rows, strict=True)] for rows in zip(base, slope, strict=True)]
    return [row.index(max(row)) == label for row, label in zip(logits, labels, strict=True)]


def critical_alphas(base: np.ndarray, slope: np.ndarray, labels: np.ndarray) -> list[Fraction]:
    """Every alpha > 0 at which the order of the label's logit and another's changes."""
    found = set()
    for z, s, label in zip(base, slope, labels, strict=True):
        for e, d in zip(z - z[label], s[label] - s, strict=True):
            if d != 0 and Fraction(int(e), int(d)) > 0:
                found.add(Fraction(int(e), int(d)))
    return sorted(found)


def somewhere(found: Intervals) -> np.ndarray:
    """Which samples are right at some alpha."""
    return found.start < found.stop


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(whole_problems())
def test_intervals_and_the_best_plateau_are_those_of_rational_arithmetic(problem: Problem) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alpha_module, "_CHUNK", 9)  # a few samples a block
        found, points = intervals(*problem), [Fraction(0), *critical_alphas(*problem)]
    inner = [(left + right) / 2 for left, right in pairwise([*points, points[-1] + 2])]
    for alpha in [*points, *inner]:
        np.testing.assert_array_equal(found.right_at(float(alpha)), right_at(problem, alpha), str(alpha))
    # Points and open segments in their order, up to twice the last end of an interval; the longest run of most right.
    some = found.only(somewhere(found))
    ends = [end for end in np.concatenate([some.start >> 1, some.stop >> 1]).view(float) if 0 < end < np.inf]
    last = 2 * max((alpha for alpha in points if float(alpha) in ends), default=Fraction(1))
    points = [*(alpha for alpha in points if alpha < last), last]
    pieces = sorted([(one, one) for one in points] + [*pairwise(points)])
    runs = []
    for count, run in groupby(pieces, lambda piece: sum(right_at(problem, sum(piece) / 2))):
        low, *_, high = [end for piece in run for end in piece]
        runs.append(Plateau(float(low), float(high), count))
    best = max((run for run in runs if run.right == max(run.right for run in runs)), key=lambda run: run.high - run.low)
    assert found.best() == best and found.best().alpha == pytest.approx((best.low + best.high) / 2)


def test_edges() -> None:
    base, labels = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]), np.array([1, 1, 1])
    found = intervals(base, np.zeros((3, 2)), labels)  # loses, ties with an earlier class, wins
    assert somewhere(found).tolist() == [False, False, True]
    assert found.only(np.array([0, 1])).best() == Plateau(0.0, 2.0, 0)
    assert intervals(np.zeros((0, 4)), np.zeros((0, 4)), np.zeros(0, int)).best() == Plateau(0.0, 2.0, 0)
    base, slope = np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]), np.array([[1.0, 0.0], [1e-9, 0.0], [0.0, 1e-9]])
    found = intervals(base, slope, np.array([0, 0, 0]))  # beyond MAX_ALPHA an interval is empty, an end infinite
    assert somewhere(found).tolist() == [True, False, True] and found.best().alpha <= MAX_ALPHA
    assert found.right_at(1.0).tolist() == [True, False, True] and not found.right_at(0.999)[0]
    assert found.right_at(1e300).tolist() == [True, False, True]
    assert intervals(np.ones((5, 1)), np.ones((5, 1)), np.zeros(5, int)).best() == Plateau(0.0, 2.0, 5)


@pytest.mark.parametrize("size", [1e-3, 1 / 3, 4.0, 1e6])
def test_slopes_that_differ_by_rounding_choose_no_alpha(size: float, rng: np.random.Generator) -> None:
    """As the sums of classes with the same keys do, in another way on each processor."""
    base, labels = (10 * rng.standard_normal((40, 10))).astype(np.float32), rng.integers(0, 10, 40)
    slope = (size * (1 + EPS * rng.integers(-8, 9, base.shape))).astype(np.float32)
    found, right = intervals(base, slope, labels), base.argmax(1) == labels
    assert (somewhere(found) == right).all() and found.best().right == right.sum()
    assert all((found.right_at(alpha) == right).all() for alpha in (0.0, 1.0, 1e9))
