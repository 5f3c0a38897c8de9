"""A bound plan: the same logits, errors and paths as one call of score, from any thread."""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from iosr_fast import _C
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError, UnavailableError
from iosr_fast.scoring import cpp_scorer, dispatch
from iosr_fast.scoring.inputs import scoring_inputs
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.precision import PRECISIONS
from iosr_fast.scoring.reference import score_reference
from iosr_fast.scoring.score import score
from iosr_fast.scoring.scorer import Scorer
from tests.conftest import EXTENDED, random_embeddings, random_plan, unit_rows
from tests.scoring.numerics import (
    CPP_PATHS,
    PATHS,
    allowed_error,
    assert_as_good_as_eager,
    assert_close_to_truth,
    tensors,
)

WIDTH = 40
pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("batch", range(1, 26))
def test_few_queries_on_every_path(
    path: str, batch: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every blocking of queries and rows, with rows and channels left over."""
    impl, _, simd = path.partition("/")
    if impl == "cpp":
        monkeypatch.setenv("IOSR_FAST_SIMD", simd)
    for precision in PRECISIONS:
        for counts, width in (([3, 0, 8, 26, 90], 67), ([1, 2], 33), ([101, 100], 16)):
            plan = random_plan(rng, counts, width, precision=precision)
            embeddings = random_embeddings(rng, batch, width)
            logits, ran = Scorer(plan, impl).with_path(embeddings)
            assert ran == path
            truth = score_reference(plan, embeddings)
            assert_as_good_as_eager(logits, truth, allowed_error(truth, plan, embeddings), path)


@pytest.mark.parametrize("name", EXTENDED)
@pytest.mark.parametrize("impl", ["cpp", "numpy", "torch", "reference"])
def test_a_scorer_equals_score(name: str, impl: str, rng: np.random.Generator) -> None:
    plan = random_plan(rng, [2, 0, 3], WIDTH, **EXTENDED[name])
    scorer = Scorer(plan, impl)
    for batch in (0, 1, 9, 33):
        embeddings = random_embeddings(rng, batch, WIDTH)
        for given in (embeddings, tensors(embeddings)):
            bound, once = scorer(given), score(plan, given, impl)
            assert type(bound) is type(once) and bound.dtype == once.dtype
            np.testing.assert_array_equal(np.asarray(bound), np.asarray(once))


def _spoiled(case: str, rows: np.ndarray) -> Any:
    rows = rows.copy()
    if case == "long":
        rows[2] *= 1.01
    elif case == "nan":
        rows[1, 3] = np.nan
    elif case == "infinite":
        rows[1:3, 3] = np.inf
    elif case == "overflow":
        rows[0] *= 1e30
    elif case == "zero":
        rows[:] = 0.0
    elif case == "width":
        return rows[:, 1:]
    elif case == "batch":
        return rows[:-1]
    elif case == "rank":
        return rows[0]
    return rows


PARTS = {
    "classes": {"query": "plain", "feature": "plain"},  # adapted is checked though nothing reads it
    **{name: EXTENDED[name] for name in ("both and values", "tip-x")},
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("which", ["plain", "adapted"])
@pytest.mark.parametrize("case", ["long", "nan", "infinite", "overflow", "zero", "width", "batch", "rank"])
def test_errors_are_those_of_the_check_in_numpy(case: str, which: str, name: str, rng: np.random.Generator) -> None:
    plan = random_plan(rng, [2, 3], WIDTH, **PARTS[name])  # type: ignore[arg-type]
    embeddings = replace(good := random_embeddings(rng, 4, WIDTH), **{which: _spoiled(case, getattr(good, which))})
    with pytest.raises(IosrFastError, match="expected") as expected:
        scoring_inputs(plan, embeddings)
    for impl in ("cpp", "numpy"):
        with pytest.raises(IosrFastError) as raised:
            Scorer(plan, impl)(embeddings)
        assert str(raised.value) == str(expected.value)
    if case == "long":
        assert Scorer(plan, "cpp")(embeddings, check=False).shape == (4, 2)


def test_adapted_embeddings_must_be_there_if_they_are_read(rng: np.random.Generator) -> None:
    for parts in ({"query": "adapted"}, EXTENDED["both and values"], {"dense": True}):
        plan = random_plan(rng, [2, 3], WIDTH, **parts)  # type: ignore[arg-type]
        with pytest.raises(IosrFastError, match="expected adapted embeddings, which this plan reads, got None"):
            Scorer(plan)(Embeddings(unit_rows(rng, 2, WIDTH)))


@pytest.mark.parametrize("parts", [{}, {"reducer": "projection"}, {"feature": "both"}], ids=str)
def test_affinities_of_dense_values_come_in_blocks(
    parts: dict[str, Any], rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, embeddings = random_plan(rng, [20, 0, 21], WIDTH, dense=True, **parts), random_embeddings(rng, 90, WIDTH)
    for floats in (1, 410, 1640):  # blocks of 1, of 10 and of 40 queries
        monkeypatch.setattr(cpp_scorer, "_AFFINITIES", floats)
        assert_close_to_truth(CPP_PATHS, plan, embeddings)


def test_norms_may_be_off_as_far_as_in_numpy(rng: np.random.Generator) -> None:
    plan = random_plan(rng, [2, 3], WIDTH)
    for factor, good in ((0.9985, False), (0.9995, True), (1.0005, True), (1.0015, False)):
        embeddings = random_embeddings(rng, 3, WIDTH)
        embeddings = Embeddings(embeddings.plain * np.float32(factor), embeddings.adapted)
        scored = _bound(plan)(plan, embeddings, check=True)
        assert (scored is not None) == good


def _bound(plan: ScoringPlan) -> Any:
    Scorer(plan, "cpp")
    return vars(plan)["_bound"]


def test_other_embeddings_than_float32_arrays(rng: np.random.Generator) -> None:
    plan = random_plan(rng, [2, 3], WIDTH)
    embeddings = random_embeddings(rng, 3, WIDTH)
    scorer = Scorer(plan)
    expected = scorer(embeddings)
    rows = np.asfortranarray(embeddings.plain), np.repeat(embeddings.adapted, 2, axis=0)[::2]
    for plain, adapted in (rows, (embeddings.plain.tolist(), embeddings.adapted.astype(np.float64))):
        np.testing.assert_array_equal(scorer(Embeddings(plain, adapted)), expected)
    half = Embeddings(*(rows.astype(np.float16) for rows in (embeddings.plain, embeddings.adapted)))
    np.testing.assert_allclose(scorer(half), expected, rtol=1e-2, atol=0.1)
    assert isinstance(scorer(tensors(embeddings, dtype=torch.bfloat16)), torch.Tensor)


def test_without_the_extension_numpy_computes(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "iosr_fast._C", None)
    monkeypatch.delattr("iosr_fast._C")
    dispatch.cpp_unavailable_reason.cache_clear()
    dispatch._best.cache_clear()
    try:
        plan, embeddings = random_plan(rng, [2, 3], WIDTH), random_embeddings(rng, 3, WIDTH)
        logits, path = Scorer(plan).with_path(embeddings)
        assert path == "numpy"
        np.testing.assert_array_equal(logits, score(plan, embeddings, "numpy"))
        with pytest.raises(UnavailableError, match="can't be imported"):
            Scorer(plan, "cpp")
    finally:
        dispatch.cpp_unavailable_reason.cache_clear()


def test_the_choice_is_made_when_the_plan_is_bound(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, embeddings = random_plan(rng, [2, 3], WIDTH), random_embeddings(rng, 3, WIDTH)
    with pytest.raises(IosrFastError, match="expected an implementation of"):
        Scorer(plan, "fastest")
    monkeypatch.setenv(dispatch.ENVIRONMENT, "numpy")
    assert Scorer(plan).with_path(embeddings)[1] == "numpy"


def test_a_plan_is_bound_once_and_a_copy_anew(rng: np.random.Generator) -> None:
    plan, embeddings = random_plan(rng, [2, 3], WIDTH), random_embeddings(rng, 3, WIDTH)
    logits = score(plan, embeddings)
    bound = _bound(plan)
    score(plan, embeddings)
    assert _bound(plan) is bound and isinstance(bound.whole, _C.BoundPlan)
    assert plan.weights is not None
    for other in (
        replace(plan, weights=2 * plan.weights),
        plan.scaled(2.0),
    ):
        assert not np.allclose(score(other, embeddings), logits)
    for same in (copy.copy(plan), copy.deepcopy(plan)):
        assert "_bound" not in vars(same)
        np.testing.assert_array_equal(score(same, embeddings), logits)


@pytest.mark.parametrize("parts", [{}, EXTENDED["both and values"]], ids=["classes", "values"])
def test_a_plan_that_was_bound_is_freed_at_once(parts: dict[str, Any], rng: np.random.Generator) -> None:
    """No circle of references, which would hold gigabytes of keys until the collector's next run."""
    plan = random_plan(rng, [2, 3], WIDTH, **parts)
    Scorer(plan)(random_embeddings(rng, 2, WIDTH))
    keys, watched = weakref.ref(plan.keys), weakref.ref(plan)
    gc.disable()
    try:
        del plan
        assert watched() is None and keys() is None
    finally:
        gc.enable()


def test_a_scorer_keeps_the_arrays(rng: np.random.Generator) -> None:
    plan, embeddings = random_plan(rng, [2, 3], WIDTH), random_embeddings(rng, 3, WIDTH)
    scorer, expected = Scorer(plan, "cpp"), score(plan, embeddings, "numpy")
    del plan
    gc.collect()
    np.testing.assert_allclose(scorer(embeddings), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("batch", [1, 4, 9, 16, 24, 33])
def test_threads_change_no_bit(
    precision: Any, batch: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = random_plan(rng, [1, 1700, 0, 300, 99], 128, precision=precision)
    scorer, embeddings = Scorer(plan, "cpp"), random_embeddings(rng, batch, 128)
    monkeypatch.setenv("IOSR_FAST_THREADS", "1")
    alone = scorer(embeddings)
    for threads in ("2", "3", "7"):
        monkeypatch.setenv("IOSR_FAST_THREADS", threads)
        np.testing.assert_array_equal(scorer(embeddings), alone)


@pytest.mark.parametrize("impl", ["cpp", "numpy"])
def test_one_scorer_in_several_threads(impl: str, rng: np.random.Generator) -> None:
    scorer = Scorer(random_plan(rng, [16] * 40, 128), impl)
    batches = [random_embeddings(rng, batch, 128) for batch in (1, 2, 5, 8, 16, 17, 33, 64) * 4]
    alone = [scorer(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for left, right in zip(alone, pool.map(scorer, batches), strict=True):
            np.testing.assert_array_equal(left, right)
