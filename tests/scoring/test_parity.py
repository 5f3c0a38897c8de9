"""Every path without a GPU against the float64 reference: shapes, terms, constants, precisions of the keys."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.scoring.fields import LARGEST, RANGES
from iosr_fast.scoring.key_precision import PRECISIONS, KeyPrecision
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.reducers import Reducer
from iosr_fast.scoring.reference import score_reference
from iosr_fast.scoring.score import score_with_path
from tests.conftest import EXTENDED, TERMS, random_embeddings, random_plan, unit_rows
from tests.scoring.numerics import (
    PATHS,
    allowed_error,
    assert_as_good_as_eager,
    assert_close_to_truth,
    eager_float32,
    run_path,
)

WIDTHS = (1, 3, 8, 15, 16, 17, 33, 64, 123)
BATCHES = (1, 2, 3, 5, 7, 12, 17, 24, 33)
TERM_SETS = [terms for n in (1, 2, 3) for terms in itertools.combinations(TERMS, n)]
# Class layouts: ragged, empty classes at both ends and between, one class, one key, more keys than one tile holds.
LAYOUTS = ([3, 1, 4, 1, 5], [0, 0, 2, 0, 7, 0], [9], [0, 1, 0], [1] * 70, [150, 0, 61])
# The largest and smallest constants, and arrays whose largest element is that.
BOUNDS = (
    {"tau": LARGEST},
    {"alpha": 1e13},
    {"alpha": 0.0},
    {"beta": 0.0},
    {"beta": 1000.0, "alpha": 1e13},
    {"temperature": 0.01},
    {"temperature": 100.0},
    {"linear": 0.999 * LARGEST},
    {"bias": 0.999 * LARGEST},
    {"weights": 1e13},
    {"values": 1e12},
)
pytestmark = pytest.mark.usefixtures("one_torch_thread")

each_path = pytest.mark.parametrize("path", PATHS)
each_precision = pytest.mark.parametrize("precision", PRECISIONS)


@each_precision
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dense", [False, True], ids=["classes", "values"])
def test_odd_shapes(dense: bool, width: int, precision: KeyPrecision, rng: np.random.Generator) -> None:
    for counts in LAYOUTS:
        plan = random_plan(rng, list(counts), width, precision=precision, dense=dense)
        for batch in BATCHES:
            assert_close_to_truth(PATHS, plan, random_embeddings(rng, batch, width))


@each_precision
@pytest.mark.parametrize("name", EXTENDED)
def test_plans_of_every_kind(name: str, precision: KeyPrecision, rng: np.random.Generator) -> None:
    widths, batches = itertools.cycle(WIDTHS[1:]), itertools.cycle((*BATCHES, 0))
    for counts in LAYOUTS:
        width, batch = next(widths), next(batches)
        plan = random_plan(rng, list(counts), width, **EXTENDED[name], precision=precision)
        assert_close_to_truth(PATHS, plan, random_embeddings(rng, batch, width))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("dense", [False, True], ids=["classes", "values"])
@pytest.mark.parametrize("shape", [(252, 507, 123), (65, 4200, 17), (1030, 33, 9)])
def test_more_than_one_tile(
    shape: tuple[int, int, int], dense: bool, precision: KeyPrecision, rng: np.random.Generator
) -> None:
    batch, n_keys, width = shape
    counts = np.diff([0, *np.sort(rng.integers(0, n_keys + 1, 66)), n_keys]).tolist()
    plan = random_plan(rng, counts, width, precision=precision, dense=dense)
    assert_close_to_truth(PATHS, plan, random_embeddings(rng, batch, width))


@each_path
@pytest.mark.parametrize("terms", TERM_SETS, ids="+".join)
def test_each_combination_of_terms(path: str, terms: tuple[str, ...], rng: np.random.Generator) -> None:
    embeddings = random_embeddings(rng, 5, 33)
    for query, feature, weighted in itertools.product(("plain", "adapted"), ("plain", "adapted"), (True, False)):
        plan = random_plan(rng, [2, 0, 3, 1], 33, terms, query=query, feature=feature, weighted=weighted)
        assert_close_to_truth(path, plan, embeddings)


@pytest.mark.parametrize("case", BOUNDS, ids=str)
@each_precision
def test_constants_and_arrays_at_their_bounds(
    case: dict[str, float], precision: KeyPrecision, rng: np.random.Generator
) -> None:
    feature = "text-distribution" if "temperature" in case else "plain"
    plan = random_plan(rng, [3, 0, 4], 40, feature=feature, dense="values" in case, precision=precision)
    change: dict[str, Any] = {}
    for name, value in case.items():
        array = getattr(plan, name)
        change[name] = value if name in RANGES else value * (array.astype(np.float64) / np.abs(array).max())
    plan = replace(plan, **change)
    # A query that is a key has affinity 1, where the exponent's rounding shows most.
    near = plan.dequantize()[[0, 1, 2, 3, 4, 5, 6, 0, 1]]
    near = near / np.linalg.norm(near, axis=1, keepdims=True)
    for embeddings in (random_embeddings(rng, 30, 40), replace(random_embeddings(rng, 9, 40), adapted=near)):
        assert_close_to_truth(PATHS, plan, embeddings)


@settings(max_examples=120, deadline=None)
@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=90).filter(any),
    width=st.integers(1, 140),
    batch=st.integers(1, 80),
    parts=st.sampled_from([*({"terms": terms} for terms in TERM_SETS), *EXTENDED.values()]),
    beta=st.floats(0.0, 100.0),
    precision=st.sampled_from(PRECISIONS),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_and_layout(
    counts: list[int], width: int, batch: int, parts: dict[str, Any], beta: float, precision: KeyPrecision, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    plan = random_plan(rng, counts, width, **{**parts, "beta": beta, "precision": precision})
    assert_close_to_truth(PATHS, plan, random_embeddings(rng, batch, width))


def test_the_reference_is_the_formula_by_hand() -> None:
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
        bias=[0.25, -0.25],
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
        6.25 + 0.5 * (first + 3 * 2 * second) + np.dot(feature, [1, 2, 3]),
        7.75 + 0.5 * (-2 * first + 4 * 2 * second) + np.dot(feature, [4, 5, 6]),
    ]
    np.testing.assert_allclose(score_reference(plan, embeddings), [expected], rtol=1e-6)
    logits, path = score_with_path(plan, embeddings, "reference")
    assert path == "reference" and logits.dtype == np.float32
    classes = replace(plan, values=None, class_offsets=[0, 1, 2])
    by_class = [6.25 + 0.5 * first + np.dot(feature, [1, 2, 3]), 7.75 + 0.5 * 2 * second + np.dot(feature, [4, 5, 6])]
    np.testing.assert_allclose(score_reference(classes, embeddings), [by_class], rtol=1e-6)


@each_precision
def test_the_reference_takes_stored_keys_for_what_they_stand_for(
    precision: KeyPrecision, rng: np.random.Generator
) -> None:
    plan, embeddings = random_plan(rng, [3, 0, 5], 24, precision=precision), random_embeddings(rng, 4, 24)
    np.testing.assert_allclose(score_reference(plan, embeddings), eager_float32(plan, embeddings), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", [*PATHS, "eager"])
def test_the_yardstick_catches_a_wrong_kernel(path: str, rng: np.random.Generator) -> None:
    """Logits of a plan with one key's code moved by one are refused, so that the tests above can fail."""
    plan = random_plan(rng, [3, 2], 16, ("cache",), precision="int8")
    embeddings = Embeddings(
        unit_rows(rng, 5, 16), plan.dequantize() / np.linalg.norm(plan.dequantize(), axis=1)[:, None]
    )
    codes = np.array(plan.keys)
    codes[1, 2] += 1 if codes[1, 2] < 100 else -1
    other = replace(plan, keys=codes)
    truth = score_reference(plan, embeddings)
    wrong = eager_float32(other, embeddings) if path == "eager" else run_path(path, other, embeddings)
    with pytest.raises(AssertionError):
        assert_as_good_as_eager(wrong, truth, allowed_error(truth, plan, embeddings))
