"""score_cuda against the float64 reference: its kernels on a GPU, and emulated on the CPU where there is none.

The emulation (conftest.py) is csrc/cuda/bindings.cpp with host_launch.cpp in place of score.cu: the same checks of
arguments, choice of tiles and block programs, on host memory. So all that Python does around a launch is tested without
a GPU too.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.scoring import cuda_scorer as cuda
from iosr_fast.scoring import dispatch
from iosr_fast.scoring.device_plan import _derived, device_plan
from iosr_fast.scoring.fields import EMBEDDINGS
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.reference import score_reference
from tests.conftest import EXTENDED, REDUCERS, random_embeddings, random_plan, random_reducer, unit_rows
from tests.scoring.numerics import allowed_error, cache_size, linear_size, needs_gpu
from tests.scoring.test_cuda_binding import linear_arguments
from tests.scoring.test_precision import correlated_rows

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow  # compiles the emulation

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
# Queries that are as wide as the keys take one part.
UNSPLIT = {("fp16", "fp16"), ("bf16", "bf16"), ("int8", "fp16"), ("int8", "bf16"), ("fp16", "bf16")}


def expected_path(keys: str, queries: str, batch: int) -> str:
    kind = "fp32" if keys == "fp32" else "mma" if (keys, queries) in UNSPLIT else "mma-split"
    return f"cuda/{kind}{'-small' if batch <= 16 else ''}"


@pytest.fixture
def emulated(emulation: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """score_cuda on CPU tensors."""
    monkeypatch.setattr(cuda, "_module", lambda: emulation)
    monkeypatch.setattr(cuda, "_place", lambda device: (0, 0))
    yield emulation


def rounded(embeddings: Embeddings, dtype: Any) -> Embeddings:
    """Embeddings in float32 that a dtype of torch holds exactly."""
    return Embeddings(*(torch.from_numpy(x).to(dtype).float().numpy() for x in (embeddings.plain, embeddings.adapted)))


def run(plan: ScoringPlan, embeddings: Embeddings, dtype: Any, device: str) -> tuple[np.ndarray, str]:
    tensors = [torch.from_numpy(x).to(device=device, dtype=dtype) for x in (embeddings.plain, embeddings.adapted)]
    logits, path = cuda.score_cuda(device_plan(plan, device), *tensors)
    assert logits.dtype == torch.float32 and tuple(logits.shape) == (len(embeddings), plan.n_classes)
    return logits.cpu().numpy(), path


def assert_right(plan: ScoringPlan, embeddings: Embeddings, queries: str, device: str, expected: str = "") -> None:
    """At most twice eager's error at the same precision, and the path that should have run."""
    dtype = DTYPES[queries]
    embeddings = rounded(embeddings, dtype)
    logits, path = run(plan, embeddings, dtype, device)
    assert path == (expected or expected_path(plan.key_precision or "", queries, len(embeddings)))
    truth, eager = score_reference(plan, embeddings), None
    if device == "cuda":
        from iosr_fast.scoring.torch_scorer import score_torch

        tensors = [torch.from_numpy(x).to(device=device, dtype=dtype) for x in (embeddings.plain, embeddings.adapted)]
        eager = score_torch(device_plan(plan, device), *tensors)[0].cpu().numpy()
    allowed = allowed_error(truth, plan, embeddings, meeting(plan, queries), eager)
    # Tensor cores cut sums off rather than round them, so the cosine itself may be off by some units in the last place,
    # which beta multiplies. Beside values it is the text's.
    if "mma" in path or (path == "cuda/dense-torch" and queries != "fp32" and plan.text is not None):
        scale = np.abs(truth).max(initial=0.0) + linear_size(plan) + (plan.tau if plan.text is not None else 0.0)
        scale += 0.0 if plan.values is None else cache_size(plan, embeddings)
        allowed += 4 * plan.beta * np.finfo(np.float32).eps * scale
    assert np.abs(logits - truth).max(initial=0.0) <= allowed


def meeting(plan: ScoringPlan, queries: str) -> Any:
    """The type in which moved queries meet the keys: DevicePlan.query_rows."""
    if "fp32" in (queries, plan.key_precision):
        return torch.float32
    return torch.bfloat16 if plan.key_precision == "bf16" else torch.float16


def extended_path(plan: ScoringPlan, queries: str, batch: int) -> str:
    """What a plan out of EXTENDED takes: moved queries meet keys in one part, and moved features aren't halves."""
    if batch == 0 or plan.values is not None:
        return "cuda/empty" if batch == 0 else "cuda/dense-torch"
    moved = plan.reducer is not None
    if plan.keys is not None:
        met = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[meeting(plan, queries)]
        return expected_path(str(plan.key_precision), met if moved else queries, batch)
    in_kernel = plan.text is not None or plan.feature in EMBEDDINGS
    halves = queries != "fp32" and in_kernel and (not moved or plan.feature not in EMBEDDINGS)
    return f"cuda/linear{'-mma' if halves else ''}{'-small' if batch <= 16 else ''}"


def counts_of(rng: np.random.Generator, n_keys: int, n_classes: int) -> list[int]:
    cuts = np.sort(rng.integers(0, n_keys + 1, n_classes - 1))
    return np.diff([0, *cuts, n_keys]).tolist()


LAYOUTS = ([3, 1, 4, 1, 5], [0, 0, 2, 0, 7, 0], [1], [1] * 70, [150, 0, 61], [16] * 9, [0, 700])


@pytest.mark.parametrize("queries", DTYPES)
@pytest.mark.parametrize("keys", PRECISIONS)
def test_odd_shapes_emulated(keys: Any, queries: str, emulated: Any, rng: np.random.Generator) -> None:
    widths = itertools.cycle((1, 3, 7, 17, 33, 64, 123))
    for counts, batch in zip(LAYOUTS, (1, 2, 16, 17, 5, 131, 3), strict=True):
        width = next(widths)
        plan = random_plan(rng, list(counts), width).with_key_precision(keys)
        assert_right(plan, random_embeddings(rng, batch, width), queries, "cpu")


@pytest.mark.parametrize("terms", [("cache",), ("text",), ("linear",), ("text", "linear"), ("text", "cache", "linear")])
@pytest.mark.parametrize("batch", [3, 20])
@pytest.mark.parametrize("queries", DTYPES)
def test_each_combination_of_terms_emulated(
    queries: str, batch: int, terms: tuple[str, ...], emulated: Any, rng: np.random.Generator
) -> None:
    embeddings = rounded(random_embeddings(rng, batch, 33), DTYPES[queries])
    for counts, query, weighted in itertools.product(([2, 0, 3, 1], [1, 2]), ("plain", "adapted"), (True, False)):
        other = "plain" if query == "adapted" else "adapted"
        plan = random_plan(rng, counts, 33, terms, query=query, feature=other, weighted=weighted)
        logits, path = run(plan, embeddings, DTYPES[queries], "cpu")
        linear = "cuda/linear" if queries == "fp32" else "cuda/linear-mma"
        assert path == ("cuda/fp32" if "cache" in terms else linear) + ("-small" if batch <= 16 else "")
        np.testing.assert_allclose(logits, score_reference(plan, embeddings), atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("name", EXTENDED)
@pytest.mark.parametrize("queries", DTYPES)
def test_extended_plans_emulated(queries: str, name: str, emulated: Any, rng: np.random.Generator) -> None:
    widths, precisions = itertools.cycle((33, 1, 17, 64, 123)), itertools.cycle(PRECISIONS)
    for counts, batch in zip((*LAYOUTS, [2, 1]), (1, 2, 16, 17, 5, 131, 3, 0), strict=True):
        width = next(widths)
        plan = random_plan(rng, list(counts), width, **EXTENDED[name], precision=next(precisions))
        assert_right(plan, random_embeddings(rng, batch, width), queries, "cpu", extended_path(plan, queries, batch))


@pytest.mark.parametrize("queries", DTYPES)
def test_reduced_queries_meet_int8_keys_in_a_basis_of_their_own(
    queries: str, emulated: Any, rng: np.random.Generator
) -> None:
    plan = random_plan(rng, [90, 0, 60], 48, ("text", "cache"), query="plain", beta=8.0)
    plan = replace(plan, keys=correlated_rows(rng, 150, 48)).with_key_precision("int8")
    assert plan.query_transform is not None
    dense = replace(plan, class_offsets=None, values=rng.standard_normal((150, 3)))
    for reducer in (None, *(random_reducer(rng, kind, 48) for kind in REDUCERS)):
        embeddings = Embeddings(correlated_rows(rng, 200, 48)[:20], unit_rows(rng, 20, 48))
        path = expected_path("int8", queries, 20)
        assert_right(replace(plan, reducer=reducer), embeddings, queries, "cpu", path)
        assert_right(replace(dense, reducer=reducer), embeddings, queries, "cpu", "cuda/dense-torch")


@pytest.mark.parametrize("size", [1e-9, 1.0, 3e4, 1e9])
def test_linear_rows_of_any_size_meet_half_queries(size: float, emulated: Any, rng: np.random.Generator) -> None:
    plan = replace(random_plan(rng, [0] * 5, 70, ("linear",)), bias=None)
    plan = replace(plan, linear=plan.linear * np.float32(size) * rng.choice([1.0, 1e-3], (5, 1)))
    embeddings = rounded(random_embeddings(rng, 20, 70), torch.float16)
    logits, path = run(plan, embeddings, torch.float16, "cpu")
    assert path == "cuda/linear-mma"
    truth = score_reference(plan, embeddings)
    assert np.abs(logits - truth).max() <= 1e-6 * np.linalg.norm(plan.linear, axis=1).max()


def test_a_batch_beyond_the_workspace_is_scored_in_slices(
    emulated: Any, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    plan = random_plan(rng, [200, 0, 100], 24)
    embeddings = random_embeddings(rng, 50, 24)
    whole, _ = run(plan, embeddings, torch.float32, "cpu")
    batches = []
    counted = SimpleNamespace(
        chunk=emulated.chunk,
        linear=emulated.linear,
        cache=lambda **arguments: (batches.append(arguments["n_queries"]), emulated.cache(**arguments))[1],
    )
    monkeypatch.setattr(cuda, "_module", lambda: counted)
    monkeypatch.setattr(cuda, "_WORKSPACE", 4 * 2 * 5 * 20)  # 5 chunks of keys, 20 queries
    sliced, _ = run(plan, embeddings, torch.float32, "cpu")
    assert batches == [17, 17, 16]
    np.testing.assert_array_equal(sliced, whole)


def test_the_plans_device_is_current_in_every_launch(
    emulated: Any, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """PyTorch's guard, unlike cudaSetDevice, makes no context on the device that was current before."""
    current: list[torch.device] = []
    launched: list[torch.device] = []

    @contextlib.contextmanager
    def guard(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    def seen(function: Any) -> Any:
        return lambda **arguments: (launched.append(current[-1]), function(**arguments))[1]

    module = SimpleNamespace(chunk=emulated.chunk, cache=seen(emulated.cache), linear=seen(emulated.linear))
    monkeypatch.setattr(cuda, "_module", lambda: module)
    monkeypatch.setattr(cuda, "on_gpu", guard)
    run(random_plan(rng, [3, 2], 8), random_embeddings(rng, 4, 8), torch.float32, "cpu")
    assert launched == [torch.device("cpu")] * 2 and not current


def test_an_empty_batch_has_empty_logits(emulated: Any, rng: np.random.Generator) -> None:
    logits, path = run(random_plan(rng, [2, 1], 8), random_embeddings(rng, 0, 8), torch.float32, "cpu")
    assert logits.shape == (0, 2) and path == "cuda/empty"


def test_rows_that_begin_anywhere(emulated: Any, rng: np.random.Generator) -> None:
    plan = random_plan(rng, [5, 6], 16, query="plain")
    embeddings = random_embeddings(rng, 4, 16)
    memory = torch.zeros(4 * 16 + 1)
    memory[1:] = torch.from_numpy(embeddings.plain).flatten()
    plain = memory[1:].view(4, 16)
    assert plain.data_ptr() % 16 != 0
    logits, _ = cuda.score_cuda(device_plan(plan, "cpu"), plain, torch.from_numpy(embeddings.adapted))
    np.testing.assert_allclose(logits.numpy(), score_reference(plan, embeddings), atol=3e-5)


@pytest.mark.parametrize("width", [7, 8])
def test_what_is_made_for_a_plan_is_made_once_and_goes_with_it(
    width: int, emulated: Any, rng: np.random.Generator
) -> None:
    gc.collect()
    before = len(_derived())
    plan = random_plan(rng, [5, 6], width)
    embeddings = random_embeddings(rng, 4, width)
    run(plan, embeddings, torch.float16, "cpu")
    parts = device_plan(plan, "cpu")
    first = {name: dict(_derived().get(getattr(parts, name), {})) for name in ("keys", "text", "class_offsets")}
    # Keys of 8 channels need no padding, and a copy of them would be waste.
    assert [list(values) for values in first.values()] == [
        ["padded"] if width == 7 else [],
        ["split"],
        [("classes", 64)],
    ]
    run(plan, embeddings, torch.float16, "cpu")
    for name, values in first.items():
        assert all(_derived()[getattr(parts, name)][kind] is thing for kind, thing in values.items())
    assert len(_derived()) > before
    del plan, parts, first, values
    gc.collect()
    assert len(_derived()) == before


@pytest.fixture
def gpu() -> None:
    (entry,) = (entry for entry in dispatch.REGISTRY if entry.name == "cuda")
    reason = entry.unavailable_reason()
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("queries", DTYPES)
@pytest.mark.parametrize("keys", PRECISIONS)
def test_odd_shapes_on_a_gpu(keys: Any, queries: str, gpu: None, rng: np.random.Generator) -> None:
    for width, counts in itertools.product((1, 3, 7, 8, 17, 33, 64, 123), LAYOUTS):
        for batch in (1, 16, 17, 129):
            plan = random_plan(rng, list(counts), width).with_key_precision(keys)
            assert_right(plan, random_embeddings(rng, batch, width), queries, "cuda")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("keys", PRECISIONS)
@pytest.mark.parametrize("shape", [(252, 507, 123, 31), (1030, 16000, 512, 1000), (3, 50001, 768, 7)])
def test_large_shapes_on_a_gpu(keys: Any, shape: tuple[int, ...], gpu: None, rng: np.random.Generator) -> None:
    batch, n_keys, width, n_classes = shape
    plan = random_plan(rng, counts_of(rng, n_keys, n_classes), width).with_key_precision(keys)
    assert_right(plan, random_embeddings(rng, batch, width), "bf16" if keys == "bf16" else "fp16", "cuda")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", EXTENDED)
@pytest.mark.parametrize("queries", DTYPES)
def test_extended_plans_on_a_gpu(queries: str, name: str, gpu: None, rng: np.random.Generator) -> None:
    for keys, (batch, counts, width) in itertools.product(PRECISIONS, ((300, [16] * 100, 512), (5, [9, 0, 200], 33))):
        plan = random_plan(rng, counts, width, **EXTENDED[name], precision=keys)  # type: ignore[arg-type]
        assert_right(plan, random_embeddings(rng, batch, width), queries, "cuda", extended_path(plan, queries, batch))


@pytest.mark.gpu
@needs_gpu
def test_equal_calls_give_equal_bits_and_a_graph_records_them(gpu: None, rng: np.random.Generator) -> None:
    plan = random_plan(rng, counts_of(rng, 5000, 40), 96).with_key_precision("fp16")
    parts = device_plan(plan, "cuda")
    plain, adapted = (torch.from_numpy(x).cuda() for x in vars(random_embeddings(rng, 70, 96)).values())
    # Kernels are loaded at their first launch, which a graph can't record: another plan of this kind goes first.
    other = random_plan(rng, counts_of(rng, 5000, 40), 96).with_key_precision("fp16")
    cuda.score_cuda(device_plan(other, "cuda"), plain, adapted)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded, path = cuda.score_cuda(parts, plain, adapted)  # the first call for this plan
    assert path == "cuda/mma-split"
    first = cuda.score_cuda(parts, plain, adapted)[0]
    assert torch.equal(first, cuda.score_cuda(parts, plain, adapted)[0])
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(recorded, first)


@pytest.mark.gpu
@needs_gpu
def test_scoring_on_a_second_gpu_leaves_the_first_alone(gpu: None) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("a second GPU is needed")
    code = (
        "import torch, numpy as np; from iosr_fast.scoring.cuda_scorer import score_cuda; "
        "from iosr_fast import ScoringPlan; from iosr_fast.scoring.device_plan import device_plan; "
        "plan = ScoringPlan(2, keys=np.eye(8)[:3], class_offsets=[0, 1, 3]); "
        "score_cuda(device_plan(plan, 'cuda:1'), torch.eye(8, device='cuda:1'), None); torch.cuda.synchronize(1); "
        "raise SystemExit(torch._C._cuda_hasPrimaryContext(0))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.gpu
@needs_gpu
def test_a_failed_launch_is_an_error_with_cudas_words(gpu: None) -> None:
    with pytest.raises(RuntimeError, match=r"CUDA device 4096 can't be used: .*invalid device"):
        cuda._module().linear(**{**linear_arguments(), "device": 4096})
