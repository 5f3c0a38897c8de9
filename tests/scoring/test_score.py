"""Every implementation against the float64 reference, at every precision of the keys."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.precision import PRECISIONS, Precision
from iosr_fast.scoring.reference import score_reference
from iosr_fast.scoring.score import score, score_with_path
from iosr_fast.scoring.scorer import Scorer
from tests.conftest import EXTENDED, TERMS, random_embeddings, random_plan, unit_rows
from tests.memory import extra_memory_mb
from tests.scoring.numerics import (
    PATHS,
    allowed_error,
    assert_as_good_as_eager,
    assert_close_to_truth,
    eager_float32,
    run_path,
)

WIDTHS = (1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 123)
BATCHES = (1, 2, 3, 5, 7, 12, 17, 33)
TERM_SETS = [terms for n in (1, 2, 3) for terms in itertools.combinations(TERMS, n)]
# Class layouts: ragged, empty classes at both ends and between, one class, one key, more keys than one tile holds.
LAYOUTS = ([3, 1, 4, 1, 5], [0, 0, 2, 0, 7, 0], [9], [0, 1, 0], [1] * 70, [150, 0, 61])


pytestmark = pytest.mark.usefixtures("one_torch_thread")

each_path = pytest.mark.parametrize("path", PATHS)
each_precision = pytest.mark.parametrize("precision", PRECISIONS)


@each_precision
@pytest.mark.parametrize("width", WIDTHS)
def test_odd_widths_and_batches(precision: Precision, width: int, rng: np.random.Generator) -> None:
    for counts in LAYOUTS:
        plan = random_plan(rng, list(counts), width, precision=precision)
        for batch in BATCHES:
            assert_close_to_truth(PATHS, plan, random_embeddings(rng, batch, width))


@each_precision
@pytest.mark.parametrize("shape", [(252, 507, 123), (65, 4200, 17), (1030, 33, 9)])
def test_more_than_one_tile(precision: Precision, shape: tuple[int, int, int], rng: np.random.Generator) -> None:
    batch, n_keys, width = shape
    cuts = np.sort(rng.integers(0, n_keys + 1, 66))
    counts = np.diff([0, *cuts, n_keys]).tolist()
    plan = random_plan(rng, counts, width, precision=precision)
    assert_close_to_truth(PATHS, plan, random_embeddings(rng, batch, width))


@each_path
@pytest.mark.parametrize("terms", TERM_SETS, ids="+".join)
def test_each_combination_of_terms(path: str, terms: tuple[str, ...], rng: np.random.Generator) -> None:
    embeddings = random_embeddings(rng, 5, 33)
    for query, feature, weighted in itertools.product(("plain", "adapted"), ("plain", "adapted"), (True, False)):
        plan = random_plan(rng, [2, 0, 3, 1], 33, terms, query=query, feature=feature, weighted=weighted)
        assert_close_to_truth(path, plan, embeddings)
    if "linear" in terms:
        assert_close_to_truth(path, replace(plan, bias=None), embeddings)


@each_path
def test_adapted_embeddings_are_left_alone_where_no_term_reads_them(path: str, rng: np.random.Generator) -> None:
    plan = random_plan(rng, [2, 3], 16, query="plain")
    plain = unit_rows(rng, 4, 16)
    with_adapted = run_path(path, plan, Embeddings(plain, unit_rows(rng, 4, 16)))
    np.testing.assert_array_equal(run_path(path, plan, Embeddings(plain)), with_adapted)


@each_path
@each_precision
@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 5.5), (1.7, 0.0), (1.7, 100.0), (-0.5, 1.0), (1e4, 1e3)])
def test_constants_at_their_ends(
    path: str, precision: Precision, alpha: float, beta: float, rng: np.random.Generator
) -> None:
    embeddings = random_embeddings(rng, 33, 64)
    plan = random_plan(rng, [4, 0, 9, 1], 64, alpha=alpha, beta=beta, precision=precision)
    # A query that is a key has affinity 1, where the exponent's rounding shows most.
    keys = plan.dequantize()
    adapted = np.concatenate([keys / np.linalg.norm(keys, axis=1, keepdims=True), embeddings.adapted])[:33]
    embeddings = Embeddings(embeddings.plain, adapted)
    assert_close_to_truth(path, plan, embeddings)
    if beta == 0.0:
        cache = replace(plan, text=None, linear=None, bias=None, weights=None)
        np.testing.assert_allclose(run_path(path, cache, embeddings)[0], alpha * np.diff(plan.class_offsets), rtol=1e-6)
    if alpha == 0.0:
        without = replace(plan, keys=None, key_scales=None, class_offsets=None, weights=None, query_transform=None)
        np.testing.assert_array_equal(run_path(path, plan, embeddings), run_path(path, without, embeddings))


@each_path
@each_precision
def test_duplicate_keys_count_twice(path: str, precision: Precision, rng: np.random.Generator) -> None:
    key = unit_rows(rng, 1, 32)
    plan = ScoringPlan(2, keys=np.repeat(key, 3, axis=0), class_offsets=np.array([0, 1, 3]), beta=7.0)
    plan = plan.with_key_precision(precision)
    logits = run_path(path, plan, random_embeddings(rng, 5, 32))
    np.testing.assert_allclose(logits[:, 1], 2 * logits[:, 0], rtol=1e-6)


@each_path
@each_precision
def test_an_empty_batch_has_empty_logits(path: str, precision: Precision, rng: np.random.Generator) -> None:
    plan = random_plan(rng, [2, 1], 8, precision=precision)
    assert run_path(path, plan, random_embeddings(rng, 0, 8)).shape == (0, 2)


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
    counts: list[int], width: int, batch: int, parts: dict[str, Any], beta: float, precision: Precision, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    plan = random_plan(rng, counts, width, **{**parts, "beta": beta, "precision": precision})
    assert_close_to_truth(PATHS, plan, random_embeddings(rng, batch, width))


def test_the_reference_is_the_formula_by_hand() -> None:
    half = np.sqrt(0.5)
    plan = ScoringPlan(
        2,
        text=[[1, 0], [0, 1]],
        tau=10.0,
        keys=[[1, 0], [half, half], [0, 1]],
        class_offsets=[0, 2, 3],
        weights=[1, 2, 3],
        alpha=0.5,
        beta=2.0,
        linear=[[1, 2], [3, 4]],
        bias=[0.25, -0.25],
        feature="adapted",
    )
    embeddings = Embeddings(np.array([[1, 0]], np.float32), np.array([[0, 1]], np.float32))
    first = 10.0 + 0.5 * (1.0 + 2.0 * np.exp(-2.0 * (1.0 - half))) + 2.0 + 0.25
    second = 0.5 * 3.0 * np.exp(-2.0) + 4.0 - 0.25
    np.testing.assert_allclose(score_reference(plan, embeddings), [[first, second]], rtol=1e-6)
    logits, path = score_with_path(plan, embeddings, "reference")
    assert path == "reference"
    np.testing.assert_allclose(logits, [[first, second]], rtol=1e-6)


@each_precision
def test_the_reference_takes_stored_keys_for_what_they_stand_for(
    precision: Precision, rng: np.random.Generator
) -> None:
    plan = random_plan(rng, [3, 0, 5], 24, precision=precision)
    embeddings = random_embeddings(rng, 4, 24)
    np.testing.assert_allclose(score_reference(plan, embeddings), eager_float32(plan, embeddings), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", [*PATHS, "eager"])
def test_the_yardstick_catches_a_wrong_kernel(path: str, rng: np.random.Generator) -> None:
    """Logits of a plan with one key's code moved by one are refused, so that the tests above can fail."""
    plan = random_plan(rng, [3, 2], 16, ("cache",), precision="int8")
    embeddings = random_embeddings(rng, 5, 16)
    codes = np.array(plan.keys)
    codes[1, 2] += 1 if codes[1, 2] < 100 else -1
    other = replace(plan, keys=codes)
    truth = score_reference(plan, embeddings)
    wrong = eager_float32(other, embeddings) if path == "eager" else run_path(path, other, embeddings)
    with pytest.raises(AssertionError):
        assert_as_good_as_eager(wrong, truth, allowed_error(truth, plan, embeddings))


@each_path
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_several_threads_at_once_agree_with_one(path: str, precision: Precision, rng: np.random.Generator) -> None:
    plan = random_plan(rng, [16] * 40, 128, precision=precision)
    batches = [random_embeddings(rng, 33, 128) for _ in range(16)]
    impl = path.split("/")[0]
    alone = [score(plan, batch, impl) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda batch: score(plan, batch, impl), batches))
    for left, right in zip(alone, together, strict=True):
        np.testing.assert_array_equal(left, right)


def test_the_kernel_runs_without_the_gil(rng: np.random.Generator) -> None:
    """Another thread gets on while one long call is under way; with the GIL held it could not take a single step."""
    plan = random_plan(rng, [64] * 512, 64)
    embeddings = random_embeddings(rng, 512, 64)
    steps, started, done = [], threading.Event(), threading.Event()

    def count() -> None:
        while not done.is_set():
            if started.is_set():
                steps.append(1)
            done.wait(0.0005)

    counter = threading.Thread(target=count)
    counter.start()
    scorer = Scorer(plan, "cpp")
    try:
        started.set()
        before = len(steps)
        scorer(embeddings)
        during = len(steps) - before
    finally:
        done.set()
        counter.join()
    # Waking the counter before and after the call may take a step each.
    assert during > 2


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("shape", [(4096, 4096), (20000, 64), (3, 8192)])
def test_scoring_takes_little_memory_beside_inputs_and_logits(shape: tuple[int, int], rng: np.random.Generator) -> None:
    batch, width = shape
    keys = unit_rows(rng, 40, width)
    transform = np.eye(width)
    plan = ScoringPlan(2, text=keys[:2], keys=keys, class_offsets=[0, 11, 40], query_transform=transform)
    embeddings = Embeddings(np.resize(keys, (batch, width)))
    extra = extra_memory_mb(lambda: score(plan, embeddings, "cpp"))
    assert extra is not None and extra - 8 * batch / 1e6 < 64
