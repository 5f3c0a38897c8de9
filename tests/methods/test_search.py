"""The exact search for alpha against rational arithmetic, grids and float64."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods.tuning.search import EMPTY, Best, Intervals, cache_intervals, intervals, sweep
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.reference import score_reference
from iosr_fast.scoring.score import score
from tests.conftest import unit_rows
from tests.memory import extra_memory_mb

Problem = tuple[np.ndarray, np.ndarray, np.ndarray]


@st.composite
def whole_problems(draw: st.DrawFn) -> Problem:
    """base, slope and labels of small whole numbers: ties abound, and rational arithmetic is exact."""
    n_samples, n_classes = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    largest = draw(st.integers(0, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    base, slope = rng.integers(-largest, largest + 1, (2, n_samples, n_classes)).astype(np.float32)
    return base, slope, rng.integers(0, n_classes, n_samples)


def right_at(base: np.ndarray, slope: np.ndarray, labels: np.ndarray, alpha: Fraction) -> list[bool]:
    """Whether the first of the largest logits is the label's, in rational arithmetic."""
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


def best_by_counting(problem: Problem, alpha_max: Fraction) -> tuple[float, float, int, bool, bool]:
    """low, high, right, low_included, high_included: by counting at each critical alpha and between each two."""
    points = [Fraction(0), *(alpha for alpha in critical_alphas(*problem) if alpha < alpha_max)]
    points = points if alpha_max == 0 else [*points, alpha_max]
    # (low, high, count) of every point and of every open segment, in their order.
    pieces = [(points[0], points[0])]
    for left, right in pairwise(points):
        pieces += [(left, right), (right, right)]
    counts = [sum(right_at(*problem, (left + right) / 2)) for left, right in pieces]
    best: tuple[float, int, int] | None = None
    i = 0
    while i < len(pieces):
        last = i
        while last + 1 < len(pieces) and counts[last + 1] == counts[i]:
            last += 1
        width = float(pieces[last][1]) - float(pieces[i][0])  # as the sweep rounds it: it decides between equals
        if counts[i] == max(counts) and (best is None or width > best[0]):
            best = (width, i, last)
        i = last + 1
    assert best is not None
    first, last = best[1:]
    return float(pieces[first][0]), float(pieces[last][1]), max(counts), first % 2 == 0, last % 2 == 0


def fields(best: Best) -> list[list[Any]]:
    return [getattr(best, name).tolist() for name in ("low", "high", "right", "low_included", "high_included")]


def assert_same(left: Intervals | Best, right: Intervals | Best) -> None:
    for name in vars(left):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), name)


@settings(max_examples=100, deadline=None)
@given(whole_problems())
def test_against_rational_arithmetic(problem: Problem) -> None:
    found = intervals(*problem)
    points = [Fraction(0), *critical_alphas(*problem)]
    inner = [(left + right) / 2 for left, right in pairwise([*points, points[-1] + 2])]
    for alpha in [*points, *inner]:
        np.testing.assert_array_equal(inside(found, float(alpha))[0], right_at(*problem, alpha), str(alpha))
    # Of the critical alphas only those of samples that are right somewhere are ends of an interval.
    lower, upper = (getattr(found, name)[found.flags & EMPTY == 0] for name in ("lower", "upper"))
    ends = [end for end in [*lower, *upper] if 0 < end < np.inf]
    largest = max((alpha for alpha in points if float(alpha) in ends), default=Fraction(1))
    best = sweep(found)
    assert fields(best) == [[value] for value in best_by_counting(problem, 2 * largest)]
    assert best.alpha == best.low + (best.high - best.low) / 2


def inside(found: Intervals, alpha: float) -> np.ndarray:
    """(S, V) bool, whether alpha is in an interval."""
    above = np.where(found.flags & 1, found.lower < alpha, found.lower <= alpha)
    below = np.where(found.flags & 2, alpha < found.upper, alpha <= found.upper)
    return above & below & (found.flags & EMPTY == 0)


def test_ties_go_to_the_first_class() -> None:
    labels = np.array([0, 1, 2, 0])
    zero = np.zeros((4, 3))
    best = sweep(intervals(zero, zero, labels))
    assert fields(best) == [[0.0], [2.0], [2], [True], [True]] and best.alpha == [1.0]
    # Without a base every class ties at alpha 0, and beyond it the slopes decide.
    slope = np.eye(3)[labels]
    found = intervals(zero, slope, labels)
    assert inside(found, 0.0).tolist() == [[True, False, False, True]]
    assert inside(found, 1e-300).all()
    assert fields(sweep(found)) == [[0.0], [2.0], [4], [False], [True]]


def test_a_single_point_wins_only_where_more_are_right() -> None:
    lower, upper = np.array([[0.0, 1.0, 3.0]]), np.array([[1.0, 3.0, 4.0]])
    touching = Intervals(lower, upper, np.zeros((1, 3), np.uint8))
    assert fields(sweep(touching)) == [[1.0], [1.0], [2], [True], [True]]
    # Half open, one goes on where the other ends: a plateau from 0 to 4.
    half_open = Intervals(lower, upper, np.array([[2, 2, 0]], np.uint8))
    assert fields(sweep(half_open)) == [[0.0], [4.0], [1], [True], [True]]
    assert sweep(half_open).alpha == [2.0]


def test_a_sample_that_is_never_right() -> None:
    base = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    found = intervals(base, np.zeros((3, 2)), np.array([1, 1, 1]))  # loses, ties with an earlier class, wins
    assert (found.flags & EMPTY != 0).tolist() == [[True, True, False]]
    never = intervals(base[:2], np.zeros((2, 2)), np.array([1, 1]))
    assert fields(sweep(never)) == [[0.0], [2.0], [0], [True], [True]]


@pytest.mark.parametrize("seed", range(2))
def test_no_grid_finds_more(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 7, 400)
    base, slope = rng.standard_normal((2, 400, 7)).astype(np.float32)
    base[np.arange(400), labels] += 0.5
    slope[np.arange(400), labels] += 0.8
    best = sweep(intervals(base, slope, labels))

    def right(alpha: float) -> int:
        return int(((base.astype(np.float64) + alpha * slope).argmax(axis=1) == labels).sum())

    assert best.right[0] >= max(right(alpha) for alpha in [*np.linspace(0, 10, 2000), *np.geomspace(1e-3, 1e3, 500)])
    assert best.low < best.high and right(best.alpha[0]) == best.right[0]


def test_folds_lie_side_by_side(rng: np.random.Generator) -> None:
    base, slope = rng.standard_normal((2, 30, 3))
    labels = rng.integers(0, 3, 30)
    whole = intervals(base, slope, labels)
    parts = [intervals(base[rows], slope[rows], labels[rows]) for rows in (slice(0, 7), slice(7, 7), slice(7, 30))]
    joined = Intervals.concatenate(parts)
    assert_same(joined, whole)
    assert joined.n_samples == 30


# (V, N by class, D, K, G); with G come extra terms and weights.
SHAPES = [
    (1, [1], 1, 1, 0),
    (3, [1], 4, 2, 2),
    (7, [0, 0, 2, 0, 7, 0], 9, 3, 0),
    (8, [2, 0, 3, 1], 17, 2, 3),
    (33, [1] * 40, 31, 2, 2),
    (65, [150, 0, 61, 96], 64, 4, 2),
    (130, [5, 9, 200, 1, 16], 123, 3, 0),
]


def cache_problem(rng: np.random.Generator, n_samples: int, counts: list[int], width: int, k: int, g: int) -> dict:
    keys = unit_rows(rng, sum(counts), width)
    problem: dict[str, Any] = {
        "base": rng.standard_normal((n_samples, len(counts))).astype(np.float32),
        "query": unit_rows(rng, n_samples, width),
        "keys": keys,
        "class_offsets": np.concatenate([[0], np.cumsum(counts)]),
        "labels": rng.integers(0, len(counts), n_samples),
        "betas": [0.0, 5.5, 1.0, 60.0][:k],
    }
    if g:
        problem["extra"] = rng.standard_normal((n_samples, len(counts))).astype(np.float32)
        problem["gammas"] = [0.0, 1.3, -0.4][:g]
        problem["weights"] = rng.uniform(0.1, 3.0, (k, len(keys))).astype(np.float32)
    return problem


def slopes(problem: dict[str, Any], k: int) -> np.ndarray:
    """The slopes in float64, of the plan that has the k-th beta and weights."""
    weights = problem.get("weights")
    plan = ScoringPlan(
        problem["base"].shape[1],
        keys=problem["keys"],
        class_offsets=problem["class_offsets"],
        weights=None if weights is None else weights[k],
        beta=problem["betas"][k],
    )
    return score_reference(plan, Embeddings(problem["query"]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_cache_at_many_settings(shape: tuple[Any, ...], rng: np.random.Generator) -> None:
    """In an interval the label's logit is the largest, outside it isn't, up to the rounding of float32 sums."""
    problem = cache_problem(rng, *shape)
    found = cache_intervals(**problem)
    gammas, labels = problem.get("gammas", [0.0]), problem["labels"]
    assert found.lower.shape == (len(problem["betas"]) * len(gammas), len(labels))
    for k in range(len(problem["betas"])):
        slope = slopes(problem, k)
        for g, gamma in enumerate(gammas):
            base = problem["base"] + gamma * problem.get("extra", np.zeros(1)).astype(np.float64)
            row = Intervals(*(getattr(found, name)[None, k * len(gammas) + g] for name in ("lower", "upper", "flags")))
            for alpha in [*np.linspace(0, 5, 31), 100.0]:
                logits = base + alpha * slope
                own = logits[np.arange(len(labels)), labels].copy()
                logits[np.arange(len(labels)), labels] = -np.inf
                margin = own - logits.max(axis=1)
                doubt = 4e-6 * alpha * (1 + np.abs(slope).max())
                clear = np.abs(margin) > doubt
                assert clear.mean() > 0.9 or alpha == 0 or len(labels) < 10
                np.testing.assert_array_equal(inside(row, alpha)[0][clear], margin[clear] > 0)


def test_the_cache_equals_intervals_of_scored_slopes(rng: np.random.Generator) -> None:
    problem = cache_problem(rng, 300, [4] * 20, 64, 3, 0)
    found = cache_intervals(**problem)
    for k, beta in enumerate(problem["betas"]):
        plan = ScoringPlan(20, keys=problem["keys"], class_offsets=problem["class_offsets"], beta=beta)
        scored = intervals(problem["base"], score(plan, Embeddings(problem["query"])), problem["labels"])
        if beta > 0:  # at 0 all slopes are 4, so that the last bit decides whether any alpha is right
            assert ((found.flags[k] ^ scored.flags[0]) & EMPTY == 0).all()
            kept = found.flags[k] & EMPTY == 0
            assert kept.sum() > 20
            np.testing.assert_allclose(found.lower[k][kept], scored.lower[0][kept], rtol=1e-3)
            np.testing.assert_allclose(found.upper[k][kept], scored.upper[0][kept], rtol=1e-3)
        else:
            assert_same(Intervals(found.lower[:1], found.upper[:1], found.flags[:1]), scored)


def test_classes_with_the_same_keys_follow_the_texts(rng: np.random.Generator) -> None:
    """Their slopes differ by rounding at most, in another way on each processor: no alpha lets that outweigh a base."""
    keys = np.tile(unit_rows(rng, 5, 33), (4, 1))
    problem = cache_problem(rng, 50, [5] * 4, 33, 3, 0) | {"keys": keys}
    found = cache_intervals(**problem)
    right = problem["base"].argmax(1) == problem["labels"]
    assert 0 < right.sum() < 50
    assert ((found.flags & EMPTY == 0) == right).all()
    assert (found.lower[:, right] == 0).all() and (found.upper[:, right] == np.inf).all()


def test_no_affinity_is_ever_held(rng: np.random.Generator) -> None:
    n_samples, n_keys = 6_000, 4_000
    problem = cache_problem(rng, n_samples, [80] * 50, 8, 1, 0)
    cache_intervals(**problem)
    used = extra_memory_mb(lambda: cache_intervals(**problem))
    if used is None:
        pytest.skip("the peak of memory can be reset on Linux only")
    assert used < n_samples * n_keys * 4 / 1e6 / 2  # half of the affinity's 96 MB: a chunk takes some 32 MB


@pytest.mark.parametrize("n_classes", [1, 4])
def test_without_samples(n_classes: int) -> None:
    empty = np.zeros((0, n_classes))
    found = intervals(empty, empty, np.zeros(0, int))
    cached = cache_intervals(
        empty, np.zeros((0, 2)), np.eye(1, 2), np.array([0] + [1] * n_classes), np.zeros(0, int), [1.0, 2.0]
    )
    assert found.lower.shape == (1, 0) and cached.lower.shape == (2, 0)
    assert fields(sweep(cached)) == [[0.0] * 2, [2.0] * 2, [0] * 2, [True] * 2, [True] * 2]


def test_one_class_is_always_right(rng: np.random.Generator) -> None:
    best = sweep(intervals(rng.standard_normal((5, 1)), rng.standard_normal((5, 1)), np.zeros(5, int)))
    assert fields(best) == [[0.0], [2.0], [5], [True], [True]]
