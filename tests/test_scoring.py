"""Every implementation against the float64 reference, and what a plan or a batch is refused for."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iosr_fast import _C
from iosr_fast.encoder import Embeddings
from iosr_fast.reference import score_reference
from iosr_fast.scoring import ScoringPlan, score, score_with_path
from tests.conftest import TERMS, random_embeddings, random_plan, unit_rows

WIDTHS = (1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 123)
BATCHES = (1, 2, 5, 33)
PATHS = ["numpy", *(f"cpp/{name}" for name, supported in _C.simd_paths() if supported)]
TERM_SETS = [terms for n in (1, 2, 3) for terms in itertools.combinations(TERMS, n)]
# Class layouts: ragged, empty classes at both ends and between, one class, one key, more keys than one tile holds.
LAYOUTS = ([3, 1, 4, 1, 5], [0, 0, 2, 0, 7, 0], [9], [0, 1, 0], [1] * 70, [150, 0, 61])


def eager_float32(plan: ScoringPlan, embeddings: Embeddings) -> np.ndarray:
    """The papers' code in float32: the full affinity, then a product with the one-hot matrix."""
    rows = {"plain": embeddings.plain, "adapted": embeddings.adapted}
    logits = np.zeros((len(embeddings), plan.n_classes), dtype=np.float32)
    if plan.text is not None:
        logits += np.float32(plan.tau) * rows["plain"] @ plan.text.T
    if plan.keys is not None:
        affinity = np.exp(-np.float32(plan.beta) * (np.float32(1) - rows[plan.query] @ plan.keys.T))
        affinity *= np.float32(1) if plan.weights is None else plan.weights
        labels = np.repeat(np.arange(plan.n_classes), np.diff(plan.class_offsets))
        logits += np.float32(plan.alpha) * affinity @ np.eye(plan.n_classes, dtype=np.float32)[labels]
    if plan.linear is not None:
        logits += rows[plan.feature] @ plan.linear.T
    return logits if plan.bias is None else logits + plan.bias


def run_path(path: str, plan: ScoringPlan, embeddings: Embeddings) -> np.ndarray:
    """Score by one path ("cpp/scalar" forces the instruction set too) and see that it is the one that ran."""
    impl, _, simd = path.partition("/")
    with pytest.MonkeyPatch.context() as patch:
        if simd:
            patch.setenv("IOSR_FAST_SIMD", simd)
        logits, ran = score_with_path(plan, embeddings, impl)
    assert ran == path
    assert logits.dtype == np.float32 and logits.shape == (len(embeddings), plan.n_classes)
    return logits


def assert_close_to_truth(path: str, plan: ScoringPlan, embeddings: Embeddings) -> None:
    truth = score_reference(plan, embeddings)
    logits = run_path(path, plan, embeddings)
    error = np.abs(logits - truth)
    eager_error = np.abs(eager_float32(plan, embeddings) - truth).max()
    # `tiny` is two roundings at the terms' magnitude, which Cauchy and Schwarz bound: where terms cancel, or a logit is
    # alone, eager is now and then right to the last bit by luck.
    scale = np.abs(truth).max(initial=0.0) + (plan.tau if plan.text is not None else 0.0)
    scale += np.linalg.norm(plan.linear, axis=1).max() if plan.linear is not None else 0.0
    tiny = 2 * np.finfo(np.float32).eps * scale
    assert error.max() <= 2 * eager_error + tiny
    if plan.n_classes > 1:
        best = np.sort(truth, axis=1)
        clear = best[:, -1] - best[:, -2] > 2 * error.max(axis=1)
        np.testing.assert_array_equal(logits.argmax(1)[clear], truth.argmax(1)[clear])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("width", WIDTHS)
def test_odd_widths_and_batches(path: str, width: int, rng: np.random.Generator) -> None:
    for batch, counts in itertools.product(BATCHES, LAYOUTS):
        plan = random_plan(rng, list(counts), width)
        assert_close_to_truth(path, plan, random_embeddings(rng, batch, width))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(252, 507, 123), (65, 4200, 17), (1030, 33, 9)])
def test_more_than_one_tile(path: str, shape: tuple[int, int, int], rng: np.random.Generator) -> None:
    batch, n_keys, width = shape
    cuts = np.sort(rng.integers(0, n_keys + 1, 66))
    counts = np.diff([0, *cuts, n_keys]).tolist()
    assert_close_to_truth(path, random_plan(rng, counts, width), random_embeddings(rng, batch, width))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("terms", TERM_SETS, ids="+".join)
def test_each_combination_of_terms(path: str, terms: tuple[str, ...], rng: np.random.Generator) -> None:
    embeddings = random_embeddings(rng, 5, 33)
    for query, feature, weighted in itertools.product(("plain", "adapted"), ("plain", "adapted"), (True, False)):
        plan = random_plan(rng, [2, 0, 3, 1], 33, terms, query=query, feature=feature, weighted=weighted)
        assert_close_to_truth(path, plan, embeddings)
    if "linear" in terms:
        assert_close_to_truth(path, replace(plan, bias=None), embeddings)


@pytest.mark.parametrize("path", PATHS)
def test_adapted_embeddings_are_left_alone_where_no_term_reads_them(path: str, rng: np.random.Generator) -> None:
    plan = random_plan(rng, [2, 3], 16, query="plain")
    plain = unit_rows(rng, 4, 16)
    with_adapted = run_path(path, plan, Embeddings(plain, unit_rows(rng, 4, 16)))
    np.testing.assert_array_equal(run_path(path, plan, Embeddings(plain)), with_adapted)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 5.5), (1.7, 0.0), (1.7, 100.0), (-0.5, 1.0), (1e4, 1e3)])
def test_constants_at_their_ends(path: str, alpha: float, beta: float, rng: np.random.Generator) -> None:
    embeddings = random_embeddings(rng, 33, 64)
    plan = random_plan(rng, [4, 0, 9, 1], 64, alpha=alpha, beta=beta)
    # A query that is a key has affinity 1, where the exponent's rounding shows most.
    adapted = np.concatenate([plan.keys, embeddings.adapted])[:33]
    embeddings = Embeddings(embeddings.plain, adapted)
    assert_close_to_truth(path, plan, embeddings)
    if beta == 0.0:
        cache = replace(plan, text=None, linear=None, bias=None, weights=None)
        np.testing.assert_allclose(run_path(path, cache, embeddings)[0], alpha * np.diff(plan.class_offsets), rtol=1e-6)
    if alpha == 0.0:
        without = replace(plan, keys=None, class_offsets=None, weights=None)
        np.testing.assert_array_equal(run_path(path, plan, embeddings), run_path(path, without, embeddings))


@pytest.mark.parametrize("path", PATHS)
def test_duplicate_keys_count_twice(path: str, rng: np.random.Generator) -> None:
    key = unit_rows(rng, 1, 32)
    plan = ScoringPlan(2, keys=np.repeat(key, 3, axis=0), class_offsets=np.array([0, 1, 3]), beta=7.0)
    logits = run_path(path, plan, random_embeddings(rng, 5, 32))
    np.testing.assert_allclose(logits[:, 1], 2 * logits[:, 0], rtol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_an_empty_batch_has_empty_logits(path: str, rng: np.random.Generator) -> None:
    assert run_path(path, random_plan(rng, [2, 1], 8), random_embeddings(rng, 0, 8)).shape == (0, 2)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=90).filter(any),
    width=st.integers(1, 140),
    batch=st.integers(1, 80),
    terms=st.sampled_from(TERM_SETS),
    beta=st.floats(0.0, 100.0),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_and_layout(
    counts: list[int], width: int, batch: int, terms: tuple[str, ...], beta: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    plan = random_plan(rng, counts, width, terms, beta=beta)
    embeddings = random_embeddings(rng, batch, width)
    for path in PATHS:
        assert_close_to_truth(path, plan, embeddings)


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


def test_several_threads_at_once_agree_with_one(rng: np.random.Generator) -> None:
    plan = random_plan(rng, [16] * 40, 128)
    batches = [random_embeddings(rng, 33, 128) for _ in range(16)]
    alone = [run_path(PATHS[-1], plan, batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda batch: score(plan, batch, "cpp"), batches))
    for left, right in zip(alone, together, strict=True):
        np.testing.assert_array_equal(left, right)


def test_the_kernel_runs_without_the_gil(rng: np.random.Generator) -> None:
    """Another thread gets on while one long call is under way; with the GIL held it could not take a single step."""
    import threading

    plan = random_plan(rng, [64] * 128, 256)
    embeddings = random_embeddings(rng, 256, 256)
    steps, started, done = [], threading.Event(), threading.Event()

    def count() -> None:
        while not done.is_set():
            if started.is_set():
                steps.append(1)
            done.wait(0.0005)

    counter = threading.Thread(target=count)
    counter.start()
    arrays = {"query": embeddings.adapted, "keys": plan.keys, "class_offsets": plan.class_offsets}
    try:
        started.set()
        before = len(steps)
        _C.score(n_classes=plan.n_classes, alpha=1.0, beta=1.0, **arrays)
        during = len(steps) - before
    finally:
        done.set()
        counter.join()
    # Waking the counter before and after the call may take a step each.
    assert during > 2


def good_parts(rng: np.random.Generator) -> dict[str, object]:
    return {
        "n_classes": 3,
        "text": unit_rows(rng, 3, 8),
        "keys": unit_rows(rng, 5, 8),
        "class_offsets": np.array([0, 2, 2, 5]),
        "weights": np.ones(5),
        "linear": np.ones((3, 8)),
        "bias": np.zeros(3),
    }


NAN = np.full((5, 8), np.nan)
BAD_PLANS = {
    "no class": ({"n_classes": 0}, "n_classes >= 1"),
    "no term": ({"text": None, "keys": None, "class_offsets": None, "weights": None, "linear": None}, "at least one"),
    "text of another class count": ({"text": np.eye(8)[:2]}, r"text of shape \(3, 8\), got \(2, 8\)"),
    "text of another width": ({"text": np.eye(9)[:3]}, "one width"),
    "keys unnormalised": ({"keys": 2 * np.eye(8)[:5]}, "keys rows of unit norm.*row 0 has norm 2.*divide"),
    "text unnormalised": ({"text": np.ones((3, 8))}, "text rows of unit norm"),
    "keys NaN": ({"keys": NAN}, "keys to be finite"),
    "bias infinite": ({"bias": np.array([0, np.inf, 0])}, "bias to be finite"),
    "keys one-dimensional": ({"keys": np.ones(5)}, r"keys of shape \(5, 8\), got \(5,\)"),
    "no keys": ({"keys": np.zeros((0, 8)), "class_offsets": np.zeros(4, int), "weights": None}, "at least one key"),
    "keys without offsets": ({"class_offsets": None}, "keys and class_offsets together"),
    "weights alone": ({"keys": None, "class_offsets": None}, "weights"),
    "weights of another length": ({"weights": np.ones(4)}, r"weights of shape \(5,\), got \(4,\)"),
    "offsets of another length": ({"class_offsets": np.array([0, 2, 5])}, r"class_offsets of shape \(4,\)"),
    "offsets that end early": ({"class_offsets": np.array([0, 2, 2, 4])}, "rise from 0 to the number of keys, 5"),
    "offsets that fall": ({"class_offsets": np.array([0, 4, 2, 5])}, "fall between"),
    "offsets of floats": ({"class_offsets": np.array([0.0, 2.0, 2.0, 5.0])}, "integers"),
    "beta negative": ({"beta": -1.0}, "beta finite and >= 0"),
    "alpha NaN": ({"alpha": float("nan")}, "alpha finite"),
    "unknown query": ({"query": "both"}, '"plain" or "adapted"'),
    "bias of another length": ({"bias": np.zeros(2)}, r"bias of shape \(3,\), got \(2,\)"),
}


@pytest.mark.parametrize("case", BAD_PLANS)
def test_a_wrong_plan_is_refused(case: str, rng: np.random.Generator) -> None:
    change, message = BAD_PLANS[case]
    ScoringPlan(**good_parts(rng))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        ScoringPlan(**{**good_parts(rng), **change})  # type: ignore[arg-type]


def test_wrong_embeddings_are_refused(rng: np.random.Generator) -> None:
    plan = ScoringPlan(**good_parts(rng), query="adapted")  # type: ignore[arg-type]
    good = random_embeddings(rng, 4, 8)
    nan = good.plain.copy()
    nan[2, 3] = np.nan
    bad = [
        (Embeddings(good.plain), "adapted embeddings, which this plan reads, got None"),
        (random_embeddings(rng, 4, 9), r"plain embeddings of shape \(4, 8\), got \(4, 9\)"),
        (Embeddings(good.plain, good.plain[:3]), r"adapted embeddings of shape \(4, 8\), got \(3, 8\)"),
        (Embeddings(nan, good.adapted), "row 2 has norm nan.*NaN or infinite"),
        (Embeddings(good.plain, 3 * good.plain), "adapted rows of unit norm, got 4 of 4"),
    ]
    for embeddings, message in bad:
        with pytest.raises(ValueError, match=message):
            score(plan, embeddings)


def test_a_plan_is_a_frozen_copy(rng: np.random.Generator) -> None:
    keys = unit_rows(rng, 5, 8)
    plan = ScoringPlan(3, keys=keys, class_offsets=np.array([0, 2, 2, 5], dtype=np.int32))
    kept = keys.copy()
    keys[:] = 0
    np.testing.assert_array_equal(plan.keys, kept)
    assert plan.class_offsets.dtype == np.int64 and not plan.keys.flags.writeable
    assert replace(plan, alpha=2.0).keys is plan.keys


def test_the_binding_refuses_what_would_read_out_of_bounds(rng: np.random.Generator) -> None:
    keys, query = unit_rows(rng, 5, 8), unit_rows(rng, 2, 8)
    offsets = np.array([0, 2, 5])
    bad = [
        {"keys": keys, "query": query, "class_offsets": np.array([0, 2, 6])},
        {"keys": keys, "query": query, "class_offsets": np.array([0, 2])},
        {"keys": keys.astype(np.float64), "query": query, "class_offsets": offsets},
        {"keys": np.asfortranarray(keys), "query": query, "class_offsets": offsets},
        {"keys": keys, "query": unit_rows(rng, 2, 7), "class_offsets": offsets},
        {"keys": keys, "class_offsets": offsets},
        {"keys": keys, "plain": query, "class_offsets": offsets},
        {"text": keys, "plain": query},
        {},
    ]
    for arguments in bad:
        with pytest.raises(ValueError, match="expected"):
            _C.score(n_classes=2, **arguments)
