"""Scoring tensors: inputs without a copy, plans on a device, eager operations."""

from __future__ import annotations

import gc
import itertools
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from iosr_fast import _C
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.scoring import inputs
from iosr_fast.scoring import torch_scorer as torch_scoring
from iosr_fast.scoring.device_plan import as_tensor, device_plan
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.precision import PRECISIONS, Precision
from iosr_fast.scoring.reducers import Reducer
from iosr_fast.scoring.reference import score_reference, softmax
from iosr_fast.scoring.score import score, score_with_path
from tests.conftest import EXTENDED, REDUCERS, random_embeddings, random_plan, unit_rows
from tests.scoring.numerics import allowed_error, assert_as_good_as_eager, assert_close_to_truth, needs_gpu, tensors

pytestmark = pytest.mark.slow

CPP = f"cpp/{next(name for name, supported in _C.simd_paths() if supported)}"


class Capsule:
    """An array that offers nothing but DLPack."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, **arguments: Any) -> Any:
        return self.array.__dlpack__(**arguments)

    def __dlpack_device__(self) -> tuple[int, int]:
        device: tuple[int, int] = self.array.__dlpack_device__()
        return device


# Inputs


@pytest.mark.parametrize("impl", ["auto", "numpy", "cpp", "torch", "reference"])
def test_tensors_give_a_tensor_and_arrays_an_array(impl: str, rng: np.random.Generator) -> None:
    plan, embeddings = random_plan(rng, [3, 0, 2], 24), random_embeddings(rng, 5, 24)
    from_array, path = score_with_path(plan, embeddings, impl)
    assert isinstance(from_array, np.ndarray)
    from_tensor, path_of_tensor = score_with_path(plan, tensors(embeddings), impl)
    assert isinstance(from_tensor, torch.Tensor) and from_tensor.device.type == "cpu"
    assert path == path_of_tensor == {"auto": CPP, "cpp": CPP, "torch": "torch/cpu"}.get(impl, impl)
    np.testing.assert_array_equal(from_tensor.numpy(), from_array)
    from_dlpack = score(plan, Embeddings(Capsule(embeddings.plain), Capsule(embeddings.adapted)), impl)
    assert isinstance(from_dlpack, np.ndarray)
    np.testing.assert_array_equal(from_dlpack, from_array)
    # A tensor that needs a gradient is scored like any other.
    graded = Embeddings(*(rows.requires_grad_() for rows in (tensors(embeddings).plain, tensors(embeddings).adapted)))
    assert not score(plan, graded, impl).requires_grad


def test_tensors_and_dlpack_meet_the_cpu_kernels_without_a_copy(rng: np.random.Generator) -> None:
    plan, rows = random_plan(rng, [3, 2], 16, query="plain"), unit_rows(rng, 4, 16)
    tensor = torch.from_numpy(rows)
    for queries in (rows, tensor, Capsule(rows), Capsule(tensor)):
        checked = inputs.scoring_inputs(plan, Embeddings(queries))
        assert np.shares_memory(checked.embeddings.plain, rows)
        assert checked.device == "cpu" and checked.torch == (queries is tensor)
    columns = torch.from_numpy(np.asfortranarray(rows))
    assert inputs.scoring_inputs(plan, Embeddings(columns)).embeddings.plain.flags.c_contiguous


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_become_float32_on_the_cpu(dtype: torch.dtype, rng: np.random.Generator) -> None:
    plan, embeddings = random_plan(rng, [3, 2], 16), random_embeddings(rng, 4, 16)
    queries = tensors(embeddings, dtype=dtype)
    expected = score(plan, Embeddings(queries.plain.float(), queries.adapted.float()), check=False)
    assert torch.equal(score(plan, queries), expected) and expected.dtype == torch.float32


def test_tensors_are_checked_like_arrays(rng: np.random.Generator) -> None:
    plan, embeddings = random_plan(rng, [3, 2], 16), tensors(random_embeddings(rng, 4, 16))
    nan = embeddings.plain.clone()
    nan[1, 2] = torch.nan
    bad = [
        (Embeddings(embeddings.plain), "adapted embeddings, which this plan reads"),
        (Embeddings(embeddings.plain[:, :8], embeddings.adapted), r"plain embeddings of shape \(4, 16\), got \(4, 8\)"),
        (Embeddings(nan, embeddings.adapted), "row 1 has norm nan.*NaN or infinite"),
        (Embeddings(embeddings.plain, 2 * embeddings.adapted), "adapted rows of unit norm, got 4 of 4"),
        (Embeddings(embeddings.plain, embeddings.adapted.numpy()), "of one kind in one place, got {'plain': 'cpu'"),
        (Embeddings(embeddings.plain.to("meta"), embeddings.adapted.to("meta")), "on the CPU or on a CUDA device"),
        (Embeddings(Capsule(embeddings.plain.bfloat16())), "adapted embeddings"),
    ]
    for queries, message in bad:
        with pytest.raises(ValueError, match=message):
            score(plan, queries)
    with pytest.raises(ValueError, match="NumPy can read through DLPack, got Capsule"):
        score(replace(plan, query="plain"), Embeddings(Capsule(embeddings.plain.bfloat16())))


def test_norms_of_tensors_are_checked_where_they_are(rng: np.random.Generator) -> None:
    """The check that runs on a GPU, on the CPU's tensors."""
    rows = torch.from_numpy(unit_rows(rng, 6, 32))
    inputs._check_unit_tensors({"plain": rows, "adapted": rows.half()}, {"plain": "fp32", "adapted": "fp16"})
    for change, message in ((2.0, r"row 3 has norm 2\); divide"), (torch.nan, r"row 3 has norm nan\); it holds NaN")):
        wrong = rows.clone()
        wrong[3] *= change
        with pytest.raises(ValueError, match=f"adapted rows of unit norm, got 1 of 6.*{message}"):
            inputs._check_unit_tensors({"plain": rows, "adapted": wrong}, {"plain": "fp32", "adapted": "fp32"})


# Plans on a device


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.filterwarnings("error")
def test_a_plan_on_the_cpu_is_the_plans_own_memory(precision: Precision, rng: np.random.Generator) -> None:
    plan = random_plan(rng, [3, 0, 2], 24, precision=precision)
    moved = device_plan(plan, "cpu")
    assert device_plan(plan, torch.device("cpu")) is moved
    for name in ("text", "keys", "key_scales", "weights", "linear", "bias"):
        array, tensor = getattr(plan, name), getattr(moved, name)
        assert (array is None) == (tensor is None)
        if array is not None:
            assert tensor.data_ptr() == array.ctypes.data and tuple(tensor.shape) == array.shape
    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
    assert moved.keys.dtype == dtypes[precision] and moved.class_offsets.dtype == torch.int32
    scales = 1.0 if moved.key_scales is None else moved.key_scales[:, None]
    np.testing.assert_array_equal((moved.keys.float() * scales).numpy(), plan.dequantize())
    facts = ("n_classes", "width", "tau", "alpha", "beta", "query", "feature", "needs_adapted")
    assert [getattr(moved, name) for name in facts] == [getattr(plan, name) for name in facts]


def test_a_reducer_and_values_are_shared_and_carried(rng: np.random.Generator) -> None:
    plan = random_plan(rng, [3, 0, 2], 24, reducer="projection", dense=True, feature="text-distribution")
    plan = replace(plan, temperature=0.25)
    moved = device_plan(plan, "cpu")
    assert moved.values.data_ptr() == plan.values.ctypes.data and moved.class_offsets is None
    assert moved.reducer_shift.data_ptr() == plan.reducer.shift.ctypes.data
    assert moved.reducer_projection.data_ptr() == plan.reducer.projection.ctypes.data
    assert (moved.temperature, moved.feature, moved.needs_adapted) == (0.25, "text-distribution", True)
    channels = device_plan(replace(plan, reducer=random_plan(rng, [1], 24, reducer="diagonal").reducer), "cpu")
    assert channels.reducer_shift is None and channels.reducer_projection.shape == (24,)
    assert not device_plan(replace(plan, query="plain"), "cpu").needs_adapted


@pytest.mark.parametrize("kind", [None, *REDUCERS])
@pytest.mark.parametrize("keys", PRECISIONS)
@pytest.mark.parametrize("rows", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_are_moved_in_float32_and_rounded_for_the_keys(
    rows: torch.dtype, keys: Precision, kind: str | None, rng: np.random.Generator
) -> None:
    plan = random_plan(rng, [3, 2], 24, precision=keys, reducer=kind, feature="adapted")
    on_device, queries = device_plan(plan, "cpu"), tensors(random_embeddings(rng, 5, 24), dtype=rows)
    query = on_device.query_rows(queries.plain, queries.adapted)
    feature = on_device.feature_rows(queries.plain, queries.adapted)
    if kind is None:
        assert query is queries.adapted and feature is queries.adapted
        return
    half = torch.bfloat16 if keys == "bf16" else torch.float16
    assert query.dtype == (torch.float32 if rows == torch.float32 or keys == "fp32" else half)
    assert feature.dtype == torch.float32
    expected = torch.from_numpy(plan.reducer(queries.adapted.float().numpy()))
    torch.testing.assert_close(feature, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(query, feature.to(query.dtype), rtol=0, atol=0)


def test_a_row_that_a_reducer_takes_to_zero_stays_zero(rng: np.random.Generator) -> None:
    rows = unit_rows(rng, 3, 8)
    plan = replace(random_plan(rng, [2, 1], 8, query="plain"), reducer=Reducer(rows[1]))
    moved = device_plan(plan, "cpu").query_rows(torch.from_numpy(rows), None)
    assert torch.isfinite(moved).all() and not moved[1].any()
    # Such a query is as far from all keys as from any other.
    np.testing.assert_allclose(
        score(plan, Embeddings(rows), "torch"), score(plan, Embeddings(rows), "numpy"), atol=2e-5
    )


def test_a_distribution_over_texts_is_float32_whatever_comes(rng: np.random.Generator) -> None:
    plan = random_plan(rng, [1] * 7, 24, ("text", "linear"), feature="text-distribution", reducer="centre")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        queries = tensors(random_embeddings(rng, 5, 24), dtype=dtype)
        feature = device_plan(plan, "cpu").feature_rows(queries.plain, None)
        assert feature.dtype == torch.float32 and feature.shape == (5, 8)
        shares = softmax(queries.plain.double().numpy() @ plan.text.T.astype(np.float64) / plan.temperature)
        np.testing.assert_allclose(feature[:, :7], shares, rtol=1e-5)
        np.testing.assert_allclose(feature[:, 7], (shares * np.log(7 * shares)).sum(1), rtol=1e-4)


def test_memory_of_a_read_only_array_is_shared_without_a_warning(rng: np.random.Generator) -> None:
    array = unit_rows(rng, 3, 4)
    array.flags.writeable = False
    assert as_tensor(array).data_ptr() == array.ctypes.data
    assert as_tensor(array[1:]).data_ptr() == array.ctypes.data + 16


def test_plans_with_the_same_array_share_its_copy_on_a_device(rng: np.random.Generator) -> None:
    """A live change of texts or weights uploads no key again. The meta device stands in for a GPU."""
    plan = random_plan(rng, [3, 2], 8)
    before = device_plan(plan, "meta")
    changed = replace(plan, text=unit_rows(rng, 2, 8), weights=np.ones(5))
    after = device_plan(changed, "meta")
    assert after.keys is before.keys and after.linear is before.linear
    assert after.text is not before.text and after.weights is not before.weights
    keys = weakref.ref(after.keys)
    del plan, before
    assert keys() is not None
    del changed, after
    gc.collect()
    assert keys() is None


def test_a_plan_on_a_device_goes_with_the_plan(rng: np.random.Generator) -> None:
    plan = random_plan(rng, [3, 2], 8)
    moved = weakref.ref(device_plan(plan, "cpu"))
    keys = device_plan(plan, "cpu").keys
    expected = plan.keys.copy()
    assert moved() is not None
    del plan
    gc.collect()
    assert moved() is None
    # A tensor keeps the memory that it shares.
    np.testing.assert_array_equal(keys.numpy(), expected)


# Eager


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_tile_of_keys_and_queries_is_summed(
    precision: Precision, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles that cut classes anywhere, with empty classes at their edges."""
    for elements in (1, 40, 330):
        for name in ("_TILE", "_KEY_TILE", "_SUMS"):
            monkeypatch.setattr(torch_scoring, name, elements)
        for counts in ([5, 0, 0, 9, 1, 0], [0, 0, 17], [1] * 11, [30]):
            for parts in ({}, EXTENDED["values"], EXTENDED["both"], EXTENDED["tip-x"]):
                plan = random_plan(rng, counts, 10, **parts, precision=precision)
                assert_close_to_truth("torch/cpu", plan, random_embeddings(rng, 7, 10))


@pytest.mark.parametrize("parts", [{}, {"dense": True}, {"reducer": "projection", "query": "plain"}], ids=str)
def test_eager_needs_little_memory(parts: dict[str, Any], rng: np.random.Generator) -> None:
    """Chunks of keys go through one after another, whatever their number."""
    plan = random_plan(rng, [4000] * 10, 64, ("cache",), precision="int8", **parts)
    assert peak_bytes(plan, 1024) <= 36e6  # 32 MB and the logits


def test_distributions_over_many_texts_need_little_memory(rng: np.random.Generator) -> None:
    plan = random_plan(rng, [1] * 1000, 32, ("text", "linear"), feature="text-distribution")
    assert peak_bytes(plan, 8192) <= 32e6 + 4 * 8192 * 1000  # beside the logits


def peak_bytes(plan: ScoringPlan, batch: int) -> int:
    rows = device_plan(plan, "cpu")
    query = torch.nn.functional.normalize(torch.randn(batch, plan.width))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        torch_scoring.score_torch(rows, query, query)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    assert live.max() > 0
    return int(live.max())


# On a GPU


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_eager_on_a_gpu(precision: Precision, dtype: torch.dtype, rng: np.random.Generator) -> None:
    for counts, width, n in (([3, 0, 200, 1], 65, 33), ([0, 1], 8, 1), ([16] * 300, 512, 252)):
        plan = random_plan(rng, list(counts), width, precision=precision)
        queries = tensors(random_embeddings(rng, n, width), device="cuda", dtype=dtype)
        logits, path = score_with_path(plan, queries, "torch")
        assert path == "torch/cuda" and logits.device == queries.plain.device and logits.dtype == torch.float32
        exact = Embeddings(queries.plain.float().cpu().numpy(), queries.adapted.float().cpu().numpy())
        truth = score_reference(plan, exact)
        assert_as_good_as_eager(logits.cpu().numpy(), truth, allowed_error(truth, plan, exact), path)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", EXTENDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_extended_plans_on_a_gpu(name: str, dtype: torch.dtype, rng: np.random.Generator) -> None:
    """Each half type of queries beside keys of its own, where the term is a product of halves, and beside float32."""
    precisions = ("fp32", {torch.float32: "int8", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype])
    for precision, (counts, width, n) in itertools.product(
        precisions, (([3, 0, 200, 1], 65, 33), ([16] * 30, 512, 252))
    ):
        plan = random_plan(rng, counts, width, **EXTENDED[name], precision=precision)
        queries = tensors(random_embeddings(rng, n, width), device="cuda", dtype=dtype)
        logits, path = score_with_path(plan, queries, "torch")
        assert path == "torch/cuda" and logits.device == queries.plain.device and logits.dtype == torch.float32
        exact = Embeddings(queries.plain.float().cpu().numpy(), queries.adapted.float().cpu().numpy())
        truth = score_reference(plan, exact)
        moved = dtype if precision != "fp32" else None
        assert_as_good_as_eager(logits.cpu().numpy(), truth, allowed_error(truth, plan, exact, moved), path)


@pytest.mark.gpu
@needs_gpu
def test_arrays_go_to_the_gpu_and_back(rng: np.random.Generator) -> None:
    plan, embeddings = random_plan(rng, [16] * 20, 64), random_embeddings(rng, 33, 64)
    for impl in ("cuda", "triton"):
        from iosr_fast.scoring import dispatch

        if next(entry.unavailable_reason() for entry in dispatch.REGISTRY if entry.name == impl) is not None:
            continue
        logits, path = score_with_path(plan, embeddings, impl)
        assert path.startswith(f"{impl}/") and isinstance(logits, np.ndarray)
        assert score(plan, tensors(embeddings), impl).device.type == "cpu"
    for impl in ("cpp", "numpy", "reference"):
        with pytest.raises(RuntimeError, match=f"{impl} executes on cpu, and the embeddings are on cuda"):
            score(plan, tensors(embeddings, device="cuda"), impl)
    wrong = tensors(embeddings, device="cuda")
    wrong.adapted[3] *= 2
    with pytest.raises(ValueError, match="adapted rows of unit norm, got 1 of 33"):
        score(plan, wrong)
    with pytest.raises(ValueError, match="of one kind in one place"):
        score(plan, Embeddings(wrong.plain, wrong.adapted.cpu()))
