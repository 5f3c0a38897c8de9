"""The CUDA kernel against the float64 reference: on a GPU, and on the CPU through csrc/cuda/host.h, which runs the same
source with a fiber for each of a GPU's threads."""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iosr_fast.exceptions import IosrFastError
from iosr_fast.scoring.device_plan import DevicePlan, device_plan
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.reference import score_reference
from tests.conftest import random_embeddings, random_plan
from tests.scoring.build_cache import CSRC, build_once, cpp_compiler, version_of
from tests.scoring.numerics import allowed_error, needs_gpu

torch = pytest.importorskip("torch")
from iosr_fast.scoring.backends import cuda  # noqa: E402

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
KINDS = ("classes", "values", "half values")
LAYOUTS = ([3, 1, 4, 1, 5], [0, 0, 2, 0, 7, 0], [1], [1] * 70, [150, 0, 61], [16] * 9, [0, 700])


@pytest.fixture(scope="module")
def host_module() -> Any:
    """_C_cuda for host memory: few_queries.cu compiled for the CPU, with the same bindings."""
    pybind11 = pytest.importorskip("pybind11")
    compiler, name = cpp_compiler(), f"_C_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-DIOSR_FAST_HOST", "-Wno-unknown-pragmas"]
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]

    def build(folder: Path) -> None:
        sources = [CSRC / "cuda" / "few_queries.cu", CSRC / "cuda" / "few_bindings.cpp"]
        command = [
            compiler,
            *flags,
            '-DIOSR_FAST_VERSION="host"',
            *includes,
            "-o",
            folder / name,
            "-x",
            "c++",
            *sources,
        ]
        subprocess.run(command, check=True)

    facts = [*flags, version_of(compiler), pybind11.__version__]
    binary = build_once("cuda-host", [CSRC / "cuda"], facts, build) / name
    spec = importlib.util.spec_from_file_location("_C_cuda", binary)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def on_host(host_module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_module", lambda: host_module)
    monkeypatch.setattr(cuda, "_stream", lambda device: 0)


def make_plan(rng: np.random.Generator, counts: list[int], width: int, keys: str, kind: str, **options: Any) -> Any:
    """A plan with a cache term alone, whose values float16 holds exactly."""
    plan = random_plan(rng, counts, width, ("cache",), query="plain", dense=kind != "classes", **options)
    if plan.values is not None:
        plan = replace(plan, values=plan.values.astype(np.float16).astype(np.float32))
    return plan.with_key_precision(keys)  # type: ignore[arg-type]


def on_device(plan: ScoringPlan, kind: str, device: str) -> DevicePlan:
    if kind == "half values":
        plan = replace(plan, values=plan.values.astype(np.float16))  # type: ignore[union-attr]
    return device_plan(plan, device)


def assert_right(plan: ScoringPlan, kind: str, batch: int, device: str, rng: np.random.Generator) -> None:
    embeddings = random_embeddings(rng, batch, plan.width)
    rows = embeddings.plain if plan.query_transform is None else embeddings.plain @ plan.query_transform.T
    before = rng.standard_normal((batch, plan.n_classes)).astype(np.float32)
    logits = torch.from_numpy(before).to(device, copy=True)
    assert cuda.affinity_sums(on_device(plan, kind, device), torch.from_numpy(rows).to(device), logits) == "cuda/few"
    truth = score_reference(plan, embeddings)
    allowed = allowed_error(truth, plan, embeddings) + 2 * np.finfo(np.float32).eps * np.abs(before).max()
    assert np.abs(logits.cpu().numpy() - before - truth).max() <= allowed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keys", PRECISIONS)
def test_odd_shapes(keys: str, kind: str, on_host: None, rng: np.random.Generator) -> None:
    widths = (1, 3, 7, 17, 33, 64, 123)
    for counts, batch, width in zip(LAYOUTS, (1, 2, 16, 1, 4, 13, 3), widths, strict=True):
        plan = make_plan(rng, counts, width, keys, kind, weighted=batch != 4, beta=1.0 + 2 * batch)
        assert_right(plan, kind, batch, "cpu", rng)


@pytest.mark.parametrize("counts", [[1] * 1030, [40, 2, 300]])
def test_more_classes_than_a_block_sums_at_once_and_large_classes(
    counts: list[int], on_host: None, rng: np.random.Generator
) -> None:
    for kind in KINDS:
        assert_right(make_plan(rng, counts, 8, "fp32", kind), kind, 2, "cpu", rng)


def test_queries_larger_than_shared_memory(on_host: None, rng: np.random.Generator) -> None:
    assert_right(make_plan(rng, [2, 7], 1501, "fp16", "classes"), "classes", 16, "cpu", rng)


def test_equal_calls_give_equal_bits_whatever_the_workspace_held(
    on_host: None, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in KINDS:
        parts = on_device(make_plan(rng, [150, 0, 61], 24, "fp16", kind), kind, "cpu")
        results = []
        for fill in (0.0, float("nan")):
            monkeypatch.setattr(torch, "empty", lambda n, fill=fill, **options: torch.full((n,), fill, **options))
            results.append(torch.zeros(3, 3))
            cuda.affinity_sums(parts, torch.ones(3, 24) / 5, results[-1])
        assert torch.equal(*results)


def test_half_queries_are_those_rows_in_float32(on_host: None, rng: np.random.Generator) -> None:
    parts = on_device(make_plan(rng, [2, 7], 24, "fp16", "values"), "values", "cpu")
    for dtype in (torch.float16, torch.bfloat16):
        queries = torch.from_numpy(random_embeddings(rng, 5, 24).plain).to(dtype)
        half, full = torch.zeros(5, 2), torch.zeros(5, 2)
        cuda.affinity_sums(parts, queries, half)
        cuda.affinity_sums(parts, queries.float(), full)
        assert torch.equal(half, full)


def test_a_plan_is_bound_once_and_its_arrays_are_copied_only_to_pad_them(
    on_host: None, rng: np.random.Generator
) -> None:
    for width, padded in ((8, False), (7, True)):
        parts = on_device(make_plan(rng, [2, 7], width, "fp16", "classes"), "classes", "cpu")
        cuda.affinity_sums(parts, torch.zeros(1, width), torch.zeros(1, 2))
        bound = parts.cached("cuda", lambda: pytest.fail("bound twice"))
        assert (bound.tensors[0] is not parts.keys) == padded


def test_what_it_cannot_take_is_refused(rng: np.random.Generator) -> None:
    parts = on_device(make_plan(rng, [2, 7], 8, "fp32", "classes"), "classes", "cpu")
    with pytest.raises(IosrFastError, match="expected 1 to 16 queries, got 17"):
        cuda.affinity_sums(parts, torch.zeros(17, 8), torch.zeros(17, 2))
    with pytest.raises(IosrFastError, match="expected a plan on a CUDA device, got one on cpu"):
        cuda.affinity_sums(parts, torch.zeros(1, 8), torch.zeros(1, 2))


ARGUMENTS: dict[str, Any] = {
    **{"device": 0, "precision": "fp16", "n_keys": 4, "n_classes": 2, "width": 12, "keys": 4096, "key_bytes": 32},
    **{"key_scales": None, "weights": None, "class_offsets": 4096, "tile_classes": 4096, "values": None},
    **{"value_bytes": 0, "half_values": False, "alpha": 1.0, "beta": 1.0},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": 4104}, "keys at a device address that is a multiple of 16, got 4104"),
        ({"keys": 0}, "keys at a device address"),
        ({"n_keys": 0}, "n_keys in 1"),
        ({"key_bytes": 24}, "key_bytes of 32, got 24"),
        ({"precision": "int8", "key_bytes": 16}, "key_scales with int8 keys and only there, got int8 without"),
        ({"precision": "fp8"}, "a precision of fp32, fp16, bf16 or int8, got fp8"),
        ({"values": 4096, "value_bytes": 16}, "values, or class_offsets with tile_classes"),
    ],
)
def test_the_module_refuses_wrong_arguments(change: dict[str, Any], message: str, host_module: Any) -> None:
    host_module.BoundPlan(**ARGUMENTS)
    with pytest.raises(ValueError, match=message):
        host_module.BoundPlan(**{**ARGUMENTS, **change})


def gpu_module() -> Any:
    return pytest.importorskip("iosr_fast._C_cuda")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keys", PRECISIONS)
def test_shapes_on_a_gpu(keys: str, kind: str, rng: np.random.Generator) -> None:
    gpu_module()
    large = ([16] * 100, [3, 40000, 0, 7000], [8] * 1030)
    for counts, width, batch in itertools.product((*LAYOUTS, *large), (1, 33, 512, 1501), (1, 3, 9, 16)):
        assert_right(make_plan(rng, counts, width, keys, kind), kind, batch, "cuda", rng)


@pytest.mark.gpu
@needs_gpu
def test_graphs_and_streams_at_once_give_the_bits_of_one_call(rng: np.random.Generator) -> None:
    gpu_module()
    parts = on_device(make_plan(rng, [4000] * 40, 256, "fp16", "values"), "values", "cuda")
    queries = torch.from_numpy(random_embeddings(rng, 16, 256).plain).cuda()
    expected, recorded = torch.zeros(16, 40, device="cuda"), torch.zeros(16, 40, device="cuda")
    cuda.affinity_sums(parts, queries, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda.affinity_sums(parts, queries, recorded)
    graph.replay()
    streams, results = [torch.cuda.Stream() for _ in range(4)], []
    torch.cuda.synchronize()
    for stream in streams * 5:
        with torch.cuda.stream(stream):
            results.append(torch.zeros(16, 40, device="cuda"))
            cuda.affinity_sums(parts, queries, results[-1])
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in (recorded, *results))


@pytest.mark.gpu
@needs_gpu
def test_a_second_gpu_leaves_the_first_alone() -> None:
    gpu_module()
    if torch.cuda.device_count() < 2:
        pytest.skip("a second GPU is needed")
    code = (
        "import torch, numpy as np; from iosr_fast.scoring.backends.cuda import affinity_sums; "
        "from iosr_fast import ScoringPlan; from iosr_fast.scoring.device_plan import device_plan; "
        "plan = device_plan(ScoringPlan(2, keys=np.eye(8)[:3], class_offsets=[0, 1, 3]), 'cuda:1'); "
        "affinity_sums(plan, torch.eye(8, device='cuda:1'), torch.zeros(8, 2, device='cuda:1')); "
        "torch.cuda.synchronize(1); raise SystemExit(torch._C._cuda_hasPrimaryContext(0))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.gpu
@needs_gpu
def test_an_error_of_cuda_comes_with_its_words() -> None:
    with pytest.raises(RuntimeError, match=r"CUDA device 4096: .*invalid device"):
        gpu_module().BoundPlan(**{**ARGUMENTS, "device": 4096})
