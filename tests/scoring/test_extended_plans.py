"""Plans with a reducer, dense values, or a linear term over both embeddings or the distribution over texts, on every
path without a GPU."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.precision import PRECISIONS, Precision
from iosr_fast.scoring.reducers import Reducer
from iosr_fast.scoring.reference import score_reference
from tests.conftest import EXTENDED, random_embeddings, random_plan, random_reducer, unit_rows
from tests.scoring.numerics import PATHS, allowed_error, assert_as_good_as_eager, assert_close_to_truth, run_path
from tests.scoring.test_precision import correlated_rows
from tests.scoring.test_score import BATCHES, LAYOUTS, WIDTHS

pytestmark = pytest.mark.usefixtures("one_torch_thread")

each_path = pytest.mark.parametrize("path", PATHS)
each_precision = pytest.mark.parametrize("precision", PRECISIONS)


@each_precision
@pytest.mark.parametrize("name", EXTENDED)
def test_odd_shapes(name: str, precision: Precision, rng: np.random.Generator) -> None:
    widths, batches = itertools.cycle(WIDTHS), itertools.cycle((*BATCHES, 0))
    for counts in (*LAYOUTS, *LAYOUTS[:5]):
        width, batch = next(widths), next(batches)
        plan = random_plan(rng, list(counts), width, **EXTENDED[name], precision=precision)
        assert_close_to_truth(PATHS, plan, random_embeddings(rng, batch, width))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("name", ["values", "both and values", "tip-x", "all"])
@pytest.mark.parametrize("shape", [(65, 4200, 17), (1030, 33, 9)])
def test_more_than_one_tile(
    name: str, shape: tuple[int, int, int], precision: Precision, rng: np.random.Generator
) -> None:
    batch, n_keys, width = shape
    counts = np.diff([0, *np.sort(rng.integers(0, n_keys + 1, 66)), n_keys]).tolist()
    plan = random_plan(rng, counts, width, **EXTENDED[name], precision=precision)
    assert_close_to_truth(PATHS, plan, random_embeddings(rng, batch, width))


@each_path
@pytest.mark.parametrize("reducer", ["projection", "diagonal"])
def test_a_reduced_query_meets_int8_keys_in_a_basis_of_their_own(
    path: str, reducer: str, rng: np.random.Generator
) -> None:
    keys = correlated_rows(rng, 701, 48)
    plan = ScoringPlan(4, keys=keys, class_offsets=[0, 400, 400, 700, 701], query="adapted", beta=8.0)
    plan = replace(plan.with_key_precision("int8"), reducer=random_reducer(rng, reducer, 48))
    assert plan.query_transform is not None
    dense = replace(plan, class_offsets=None, values=rng.standard_normal((701, 4)))
    for batch in (0, 1, 5):
        embeddings = Embeddings(unit_rows(rng, batch, 48), correlated_rows(rng, 40, 48)[:batch])
        assert_close_to_truth(path, plan, embeddings)
        assert_close_to_truth(path, dense, embeddings)


@each_path
def test_one_hot_values_are_classes(path: str, rng: np.random.Generator) -> None:
    plan, embeddings = random_plan(rng, [3, 0, 4], 24), random_embeddings(rng, 5, 24)
    onehot = np.eye(3)[np.repeat(np.arange(3), [3, 0, 4])]
    dense = replace(plan, class_offsets=None, values=onehot)
    np.testing.assert_allclose(run_path(path, dense, embeddings), run_path(path, plan, embeddings), atol=2e-5)


@each_path
def test_a_reducer_leaves_what_meets_text_alone(path: str, rng: np.random.Generator) -> None:
    plan, embeddings = random_plan(rng, [3, 4], 24, ("text",)), random_embeddings(rng, 5, 24)
    reduced = replace(plan, reducer=random_reducer(rng, "projection", 24))
    np.testing.assert_array_equal(run_path(path, reduced, embeddings), run_path(path, plan, embeddings))
    spread = replace(plan, linear=rng.standard_normal((2, 3)), feature="text-distribution")
    reduced = replace(spread, reducer=reduced.reducer)
    np.testing.assert_array_equal(run_path(path, reduced, embeddings), run_path(path, spread, embeddings))


@each_path
@pytest.mark.parametrize("reducer", [None, "projection"])
def test_both_embeddings_are_one_linear_term_after_the_other(
    path: str, reducer: str | None, rng: np.random.Generator
) -> None:
    plan = random_plan(rng, [1] * 9, 33, ("linear",), feature="both", reducer=reducer)
    assert plan.width == 33 and plan.embeddings_read == ("plain", "adapted")
    plain = replace(plan, feature="plain", linear=plan.linear[:, :33], bias=None)
    adapted = replace(plan, feature="adapted", linear=plan.linear[:, 33:])
    embeddings = random_embeddings(rng, 5, 33)
    expected = run_path(path, plain, embeddings) + run_path(path, adapted, embeddings)
    np.testing.assert_allclose(run_path(path, plan, embeddings), expected, atol=2e-5)
    with pytest.raises(ValueError, match="adapted embeddings, which this plan reads, got None"):
        run_path(path, plan, Embeddings(embeddings.plain))


@each_path
@pytest.mark.parametrize("temperature", [0.01, 0.5, 30.0])
def test_temperatures(path: str, temperature: float, rng: np.random.Generator) -> None:
    plan = random_plan(rng, [1] * 9, 33, ("text", "linear"), feature="text-distribution")
    assert_close_to_truth(path, replace(plan, temperature=temperature), random_embeddings(rng, 33, 33))


def test_the_reference_is_the_extended_formula_by_hand() -> None:
    plan = ScoringPlan(
        2,
        text=[[1, 0], [0, 1]],
        tau=10.0,
        keys=[[1, 0], [0, 1]],
        values=[[1, -2], [3, 4]],
        weights=[1, 2],
        alpha=0.5,
        beta=2.0,
        linear=[[1, 2, 3], [4, 5, 6]],
        feature="text-distribution",
        temperature=0.25,
        query="adapted",
        reducer=Reducer([0.5, 0.5], [[0, 1], [2, 0]]),
    )
    embeddings = Embeddings(np.array([[0.6, 0.8]], np.float32), np.array([[0, 1]], np.float32))
    # (0, 1) - (0.5, 0.5) = (-0.5, 0.5), projected to (0.5, -1), of norm sqrt(1.25).
    first, second = np.exp(-2.0 * (1.0 - np.array([0.5, -1.0]) / np.sqrt(1.25)))
    share = np.exp([2.4, 3.2]) / np.exp([2.4, 3.2]).sum()
    feature = [*share, share @ np.log(2 * share)]
    expected = [
        6.0 + 0.5 * (first + 3 * 2 * second) + np.dot(feature, [1, 2, 3]),
        8.0 + 0.5 * (-2 * first + 4 * 2 * second) + np.dot(feature, [4, 5, 6]),
    ]
    np.testing.assert_allclose(score_reference(plan, embeddings), [expected], rtol=1e-6)
    for path in PATHS:
        np.testing.assert_allclose(run_path(path, plan, embeddings), [expected], rtol=1e-5)


@pytest.mark.parametrize(
    ("part", "feature"),
    [(part, "text-distribution") for part in ("reducer", "values", "temperature", "linear")] + [("linear", "both")],
)
def test_the_yardstick_sees_each_part_of_an_extended_plan(part: str, feature: str, rng: np.random.Generator) -> None:
    plan = random_plan(rng, [3, 2], 16, dense=True, reducer="centre", feature=feature)
    embeddings = random_embeddings(rng, 5, 16)
    changed = {
        "reducer": Reducer(1.01 * plan.reducer.shift),
        "values": plan.values * np.float32(1.001),
        "temperature": 0.51,
        "linear": plan.linear * np.float32(1.001),
    }
    truth = score_reference(plan, embeddings)
    for path in PATHS:
        wrong = run_path(path, replace(plan, **{part: changed[part]}), embeddings)
        with pytest.raises(AssertionError):
            assert_as_good_as_eager(wrong, truth, allowed_error(truth, plan, embeddings))
