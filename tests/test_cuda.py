"""score_cuda against the float64 reference: its kernels on a GPU, and emulated on the CPU where there is none.

The emulation is csrc/cuda/bindings.cpp with host_launch.cpp in place of score.cu: the same checks of arguments, choice
of tiles and block programs, on host memory. So all that Python does around a launch is tested without a GPU too.
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from iosr_fast import cuda, cuda_layout
from iosr_fast.device_plan import device_plan
from iosr_fast.encoder import Embeddings
from iosr_fast.reference import score_reference
from iosr_fast.scoring import ScoringPlan
from tests.conftest import random_embeddings, random_plan
from tests.numerics import eager_float32, needs_gpu

torch = pytest.importorskip("torch")

SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
# Queries that are as wide as the keys take one part.
UNSPLIT = {("fp16", "fp16"), ("bf16", "bf16"), ("int8", "fp16"), ("int8", "bf16"), ("fp16", "bf16")}


def expected_path(keys: str, queries: str, batch: int) -> str:
    kind = "fp32" if keys == "fp32" else "mma" if (keys, queries) in UNSPLIT else "mma-split"
    return f"cuda/{kind}{'-small' if batch <= 16 else ''}"


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """_C_cuda for host memory."""
    pybind11 = pytest.importorskip("pybind11")
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler (g++ or clang++) on PATH")
    binary = tmp_path_factory.mktemp("emulation") / f"_C_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    sources = [str(SOURCES / name) for name in ("bindings.cpp", "host_launch.cpp")]
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", '-DIOSR_FAST_VERSION="emulation"', *includes]
    done = subprocess.run([*command, "-o", str(binary), *sources], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    spec = importlib.util.spec_from_file_location("_C_cuda", binary)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def assert_right(plan: ScoringPlan, embeddings: Embeddings, queries: str, device: str) -> None:
    """At most twice eager's error at the same precision, and the path that should have run."""
    dtype = DTYPES[queries]
    embeddings = rounded(embeddings, dtype)
    logits, path = run(plan, embeddings, dtype, device)
    assert plan.key_precision is not None
    assert path == expected_path(plan.key_precision, queries, len(embeddings))
    truth = score_reference(plan, embeddings)
    if device == "cuda":
        from iosr_fast.torch_scoring import score_torch

        tensors = [torch.from_numpy(x).to(device=device, dtype=dtype) for x in (embeddings.plain, embeddings.adapted)]
        eager = score_torch(device_plan(plan, device), *tensors)[0].cpu().numpy()
    else:
        eager = eager_float32(plan, embeddings)
    # Two roundings at the terms' magnitude; on the tensor cores, whose sums are cut off rather than rounded, the cosine
    # itself may be off by some units in the last place, which beta multiplies.
    scale = np.abs(truth).max() + (plan.tau if plan.text is not None else 0.0)
    scale += np.linalg.norm(plan.linear, axis=1).max() if plan.linear is not None else 0.0
    tiny = (2 + (4 * plan.beta if "mma" in path else 0)) * np.finfo(np.float32).eps * scale
    assert np.abs(logits - truth).max() <= 2 * np.abs(eager - truth).max() + tiny


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
        cache=lambda **given: (batches.append(given["n_queries"]), emulated.cache(**given))[1],
    )
    monkeypatch.setattr(cuda, "_module", lambda: counted)
    monkeypatch.setattr(cuda, "_WORKSPACE", 4 * 2 * 5 * 20)  # 5 chunks of keys, 20 queries
    sliced, _ = run(plan, embeddings, torch.float32, "cpu")
    assert batches == [17, 17, 16]
    np.testing.assert_array_equal(sliced, whole)


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
    before = len(cuda_layout._store())
    plan = random_plan(rng, [5, 6], width)
    embeddings = random_embeddings(rng, 4, width)
    run(plan, embeddings, torch.float16, "cpu")
    parts = device_plan(plan, "cpu")
    first = {
        name: dict(cuda_layout._store().get(getattr(parts, name), {})) for name in ("keys", "text", "class_offsets")
    }
    # Keys of 8 channels need no padding, and a copy of them would be waste.
    assert [list(made) for made in first.values()] == [["rows"] if width == 7 else [], ["split"], ["layout"]]
    run(plan, embeddings, torch.float16, "cpu")
    for name, made in first.items():
        assert all(cuda_layout._store()[getattr(parts, name)][kind] is thing for kind, thing in made.items())
    assert len(cuda_layout._store()) > before
    del plan, parts, first, made
    gc.collect()
    assert len(cuda_layout._store()) == before


def good_arguments() -> dict[str, Any]:
    return {
        "device": 0,
        "stream": 0,
        "key_precision": "fp16",
        "n_queries": 3,
        "n_keys": 4,
        "n_classes": 2,
        "queries": 4096,
        "query_bytes": 32,
        "query_parts": 1,
        "part_scale": 1.0,
        "keys": 4096,
        "key_bytes": 32,
        "key_class": 4096,
        "class_offsets": 4096,
        "weights": None,
        "key_scales": None,
        "scale": 1.0,
        "alpha": 1.0,
        "edges": None,
        "logits": 4096,
    }


def linear_arguments() -> dict[str, Any]:
    return {
        "device": 0,
        "stream": 0,
        "precision": "fp16",
        "n_queries": 3,
        "n_classes": 2,
        "operands": [(4096, 32, 8192, 128, 1.0)],
        "row_parts": 2,
        "part_scale": 1.0,
        "bias": None,
        "class_offsets": None,
        "logits": 4096,
    }


BAD_ARGUMENTS = [
    ({"keys": 4104}, "keys at a device address that is a multiple of 16, got 4104"),
    ({"logits": 0}, "logits at a device address"),
    ({"n_keys": 0}, "n_keys in 1"),
    ({"key_bytes": 40}, "key_bytes to be a multiple of 16, got 40"),
    ({"query_parts": 4}, "query_parts in 1..3, got 4"),
    ({"query_parts": 2}, "2 parts of 64 bytes in a query, got 32 bytes"),
    ({"key_precision": "int8"}, "key_scales with int8 keys and only there, got int8 without"),
    ({"key_precision": "fp8"}, "a key precision of fp32, fp16, bf16 or int8, got fp8"),
]


@pytest.mark.parametrize(("change", "message"), BAD_ARGUMENTS)
def test_the_binding_refuses_what_cannot_be_right(change: dict[str, Any], message: str, emulation: Any) -> None:
    with pytest.raises(ValueError, match=message):
        emulation.cache(**{**good_arguments(), **change})


BAD_LINEAR_ARGUMENTS = [
    ({"precision": "bf16"}, "a precision of fp32 or fp16, got bf16"),
    ({"precision": "fp32"}, "row_parts in 1..1, got 2"),
    ({"operands": [(4096, 32, 8192, 96, 1.0)]}, "2 parts of 64 bytes in a row, got 96 bytes"),
    ({"operands": [(4096, 32, 8192, 128, 1.0)] * 3}, "at most 2 operands, got 3"),
    ({"n_classes": 0}, "n_classes in 1"),
]


@pytest.mark.parametrize(("change", "message"), BAD_LINEAR_ARGUMENTS)
def test_the_binding_refuses_wrong_linear_terms(change: dict[str, Any], message: str, emulation: Any) -> None:
    with pytest.raises(ValueError, match=message):
        emulation.linear(**{**linear_arguments(), **change})


def test_refusal_says_how_to_build_what_is_missing_or_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise ImportError("No module named 'iosr_fast._C_cuda'")

    cuda._build_refusal.cache_clear()
    monkeypatch.setattr(cuda, "_module", missing)
    assert "IOSR_FAST_CUDA=1 pip install ." in (cuda.refusal() or "")
    cuda._build_refusal.cache_clear()
    monkeypatch.setattr(cuda, "_module", lambda: SimpleNamespace(version="0.0.0"))
    said = cuda.refusal() or ""
    assert "0.0.0" in said and "IOSR_FAST_CUDA=1 pip install ." in said
    cuda._build_refusal.cache_clear()


def test_refusal_names_torchs_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_build_refusal", lambda: None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "sees no CUDA device" in (cuda.refusal() or "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "8.0 or newer is needed, got Old GPU (7.5)" in (cuda.refusal() or "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    assert cuda.refusal() is None


def test_importing_loads_neither_torch_nor_the_extension() -> None:
    code = (
        "import sys, iosr_fast.cuda; "
        "raise SystemExit(any(name in sys.modules for name in ('torch', 'iosr_fast._C_cuda')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def gpu() -> None:
    refused = cuda.refusal()
    if refused is not None:
        pytest.skip(refused)


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
def test_equal_calls_give_equal_bits_and_a_graph_records_them(gpu: None, rng: np.random.Generator) -> None:
    plan = random_plan(rng, counts_of(rng, 5000, 40), 96).with_key_precision("fp16")
    parts = device_plan(plan, "cuda")
    plain, adapted = (torch.from_numpy(x).cuda() for x in vars(random_embeddings(rng, 70, 96)).values())
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
def test_a_failed_launch_is_an_error_with_cudas_words(gpu: None) -> None:
    with pytest.raises(RuntimeError, match=r"CUDA device 4096 can't be used: .*invalid device"):
        cuda._module().linear(**{**linear_arguments(), "device": 4096})
