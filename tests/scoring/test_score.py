"""score(): what it takes and refuses, threads, memory."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.score import score
from tests.conftest import EXTENDED, random_embeddings, random_plan, unit_rows
from tests.memory import extra_memory_mb
from tests.scoring.numerics import PATHS, needs_gpu, tensors

WIDTH = 40
SPOILED = {
    "long": (lambda rows: rows * np.float32(1.01), r"rows of unit norm, got 4 of 4 .*norm 1.01\); divide by"),
    "NaN": (lambda rows: rows * np.where(np.arange(4) == 1, np.nan, 1.0)[:, None], "row 1 has norm nan.*NaN or inf"),
    "overflow": (lambda rows: rows * np.float32(1e30), "rows of unit norm, got 4 of 4"),
    "zero": (lambda rows: 0 * rows, "rows of unit norm, got 4 of 4"),
    "width": (lambda rows: rows[:, 1:], r"embeddings of shape \(4, 40\), got \(4, 39\)"),
    "batch": (lambda rows: rows[:-1], r"embeddings of shape \(., 40\), got \(., 40\)"),
    "rank": (lambda rows: rows[0], "embeddings of shape"),
}
pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.mark.parametrize("which", ["plain", "adapted"])
@pytest.mark.parametrize("case", SPOILED)
def test_wrong_embeddings_are_refused_with_the_fix(case: str, which: str, rng: np.random.Generator) -> None:
    plan = random_plan(rng, [2, 3], WIDTH, query="plain")  # adapted is checked though nothing reads it
    good = random_embeddings(rng, 4, WIDTH)
    spoil, message = SPOILED[case]
    wrong = replace(good, **{which: np.asarray(spoil(getattr(good, which)), np.float32)})
    for given in (wrong, Embeddings(wrong.plain.tolist(), wrong.adapted.tolist())):
        with pytest.raises(IosrFastError, match=message):
            score(plan, given)
    if case == "long":
        assert score(plan, wrong, check=False).shape == (4, 2)
    if case == "width":
        with pytest.raises(IosrFastError, match=message):
            score(plan, wrong, check=False)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda rows: np.ma.masked_less(rows, 0.0), "without masked values, got"),
        (lambda rows: rows + 1j, "of real numbers, got complex"),
        (lambda rows: torch.tensor(rows + 1j), "of real numbers, got torch.complex"),
        (lambda rows: rows.astype(str), "of real numbers, got <U"),
        (lambda rows: rows.astype(object), "of real numbers, got object"),
    ],
)
def test_arrays_of_other_than_real_numbers_are_refused(spoil: Any, message: str, rng: np.random.Generator) -> None:
    rows = unit_rows(rng, 2, WIDTH)
    with pytest.raises(IosrFastError, match=f"plain embeddings {message}"):
        score(ScoringPlan(2, text=rows), Embeddings(spoil(rows)), check=False)
    with pytest.raises(IosrFastError, match=f"text {message}"):
        ScoringPlan(2, text=spoil(rows))


def test_norms_may_be_off_by_a_thousandth(rng: np.random.Generator) -> None:
    plan = ScoringPlan(2, text=unit_rows(rng, 2, WIDTH))
    for factor, good in ((0.9985, False), (0.9995, True), (1.0005, True), (1.0015, False)):
        embeddings = Embeddings(unit_rows(rng, 3, WIDTH) * np.float32(factor))
        if good:
            score(plan, embeddings)
        else:
            with pytest.raises(IosrFastError, match="unit norm, got 3 of 3"):
                score(plan, embeddings)


def test_adapted_embeddings_must_be_there_if_they_are_read(rng: np.random.Generator) -> None:
    for parts in ({"query": "adapted"}, EXTENDED["both and values"], {"dense": True}):
        plan = random_plan(rng, [2, 3], WIDTH, **parts)  # type: ignore[arg-type]
        with pytest.raises(IosrFastError, match="expected adapted embeddings, which this plan reads, got None"):
            score(plan, Embeddings(unit_rows(rng, 2, WIDTH)))
    plan, rows = random_plan(rng, [2, 3], WIDTH, query="plain"), random_embeddings(rng, 2, WIDTH)
    np.testing.assert_array_equal(score(plan, Embeddings(rows.plain)), score(plan, rows))


def test_arrays_of_any_kind_are_taken(rng: np.random.Generator) -> None:
    plan, embeddings = random_plan(rng, [2, 3], WIDTH), random_embeddings(rng, 3, WIDTH)
    expected = score(plan, embeddings)
    strided = np.asfortranarray(embeddings.plain), np.repeat(embeddings.adapted, 2, axis=0)[::2]
    for plain, adapted in (strided, (embeddings.plain.tolist(), embeddings.adapted.astype(np.float64))):
        np.testing.assert_array_equal(score(plan, Embeddings(plain, adapted)), expected)
    half = Embeddings(*(rows.astype(np.float16) for rows in (embeddings.plain, embeddings.adapted)))
    np.testing.assert_allclose(score(plan, half), expected, rtol=1e-2, atol=0.1)
    assert score(plan, random_embeddings(rng, 0, WIDTH)).shape == (0, 2)


class _DLPack:
    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_tensors_give_tensors_and_dlpack_an_array(impl: str, rng: np.random.Generator) -> None:
    plan, embeddings = random_plan(rng, [2, 3], WIDTH), random_embeddings(rng, 3, WIDTH)
    expected = score(plan, embeddings)
    of_tensors = score(plan, tensors(embeddings), impl)
    assert isinstance(of_tensors, torch.Tensor) and of_tensors.dtype == torch.float32
    np.testing.assert_allclose(of_tensors.numpy(), expected, rtol=1e-5, atol=1e-4)
    of_dlpack = score(plan, Embeddings(_DLPack(embeddings.plain), _DLPack(embeddings.adapted)), impl)
    assert isinstance(of_dlpack, np.ndarray)
    np.testing.assert_allclose(of_dlpack, expected, rtol=1e-5, atol=1e-4)
    half = score(plan, tensors(embeddings, dtype=torch.bfloat16), impl)
    assert isinstance(half, torch.Tensor) and half.dtype == torch.float32
    with pytest.raises(IosrFastError, match="of one kind in one place"):
        score(plan, Embeddings(torch.from_numpy(embeddings.plain), embeddings.adapted), impl)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("parts", [{}, EXTENDED["both and values"]], ids=["classes", "values"])
def test_several_callers_at_once_agree_with_one(path: str, parts: dict[str, Any], rng: np.random.Generator) -> None:
    plan, impl = random_plan(rng, [16] * 40, 128, **parts), path.split("/")[0]
    batches = [random_embeddings(rng, batch, 128) for batch in (1, 5, 17, 33) * 4]
    alone = [score(plan, batch, impl) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for left, right in zip(alone, pool.map(lambda batch: score(plan, batch, impl), batches), strict=True):
            np.testing.assert_array_equal(left, right)


def test_the_kernel_runs_without_the_gil(rng: np.random.Generator) -> None:
    """Another thread gets on while one long call is under way; with the GIL held it could not take a single step."""
    plan, embeddings = random_plan(rng, [64] * 512, 64), random_embeddings(rng, 512, 64)
    steps, started, done = [], threading.Event(), threading.Event()

    def count() -> None:
        while not done.is_set():
            if started.is_set():
                steps.append(1)
            done.wait(0.0005)

    counter = threading.Thread(target=count)
    counter.start()
    try:
        started.set()
        before = len(steps)
        score(plan, embeddings, "cpp")
        during = len(steps) - before
    finally:
        done.set()
        counter.join()
    # Waking the counter before and after the call may take a step each.
    assert during > 2


@pytest.mark.parametrize("impl", ["cpp", "torch"])
def test_a_plan_that_was_scored_is_freed_at_once(impl: str, rng: np.random.Generator) -> None:
    """No circle of references, which would hold gigabytes of keys until the collector's next run."""
    plan, embeddings = random_plan(rng, [2, 3], WIDTH), random_embeddings(rng, 2, WIDTH)
    logits = score(plan, embeddings, impl)
    other = replace(plan, weights=2 * plan.weights)
    assert not np.allclose(score(other, embeddings, impl), logits)
    np.testing.assert_array_equal(score(copy.deepcopy(plan), embeddings, impl), logits)
    keys, watched = weakref.ref(plan.keys), weakref.ref(plan)
    gc.disable()
    try:
        del plan, other
        assert watched() is None and keys() is None
    finally:
        gc.enable()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("dense", [False, True], ids=["classes", "values"])
@pytest.mark.parametrize("shape", [(4096, 4096), (20000, 64), (3, 8192)])
def test_scoring_takes_little_memory_beside_inputs_and_logits(
    shape: tuple[int, int], dense: bool, rng: np.random.Generator
) -> None:
    batch, width = shape
    keys = unit_rows(rng, 40, width)
    cache: dict[str, Any] = {"values": np.ones((40, 2))} if dense else {"class_offsets": [0, 11, 40]}
    plan = ScoringPlan(2, text=keys[:2], keys=keys, **cache)
    embeddings = Embeddings(np.resize(keys, (batch, width)))
    extra = extra_memory_mb(lambda: score(plan, embeddings, "cpp"))
    assert extra is not None and extra - 8 * batch / 1e6 < 64


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("parts", [{}, EXTENDED["both and values"]], ids=["classes", "values"])
@pytest.mark.parametrize("batch", [1, 16, 17, 300])
def test_embeddings_on_a_gpu_are_scored_there(batch: int, parts: dict[str, Any], rng: np.random.Generator) -> None:
    plan = random_plan(rng, [20, 0, 21], WIDTH, **parts).with_key_precision("fp32")
    embeddings = random_embeddings(rng, batch, WIDTH)
    expected = score(plan, embeddings, "reference")
    on_gpu = tensors(embeddings, device="cuda")
    logits = score(plan, on_gpu)
    assert logits.is_cuda
    np.testing.assert_allclose(logits.cpu().numpy(), expected, rtol=1e-4, atol=1e-3)
    # Arrays may be named to go there and come back; a tensor never leaves the GPU.
    assert isinstance(score(plan, embeddings, "torch"), np.ndarray)
    for impl in ("cpp", "reference"):
        with pytest.raises(RuntimeError, match=f"{impl} executes on cpu, and the embeddings are on cuda"):
            score(plan, on_gpu, impl)
    with pytest.raises(ValueError, match=f"adapted rows of unit norm, got {batch} of {batch}"):
        score(plan, replace(on_gpu, adapted=2 * on_gpu.adapted))
    # CUDA graphs record a call after the first one.
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = score(plan, on_gpu, check=False)
    graph.replay()
    torch.testing.assert_close(recorded, logits, rtol=0, atol=0)
