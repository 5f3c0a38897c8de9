"""The CUDA kernel against the float64 reference: on a GPU, and on the CPU through csrc/tests/host.h, which runs the
same source with a fiber for each of a GPU's threads."""

from __future__ import annotations

import importlib.util
import itertools
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from iosr_fast.exceptions import IosrFastError
from iosr_fast.scoring.backends import cuda
from iosr_fast.scoring.device_plan import device_plan
from iosr_fast.scoring.key_precision import PRECISIONS
from tests import ROOT
from tests.demo_cache import build_once
from tests.interpreter import printed
from tests.scoring.compilers import CSRC, cpp_compiler, version_of
from tests.scoring.numerics import needs_gpu
from tests.scoring.sums import KINDS, SHAPES, assert_right, make_plan, random_queries


def assert_few(plan: Any, queries: torch.Tensor, device: str = "cpu") -> torch.Tensor:
    return assert_right(cuda.affinity_sums, "cuda/few", plan, queries, device=device, half_queries=True)


@pytest.fixture(scope="module")
def host_module() -> Any:
    """_C_cuda for host memory: few_queries.cu compiled for the CPU, with the same bindings."""
    pybind11 = pytest.importorskip("pybind11")
    compiler, name = cpp_compiler(), f"_C_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-DIOSR_FAST_HOST", "-Wno-unknown-pragmas"]
    includes = [f"-I{CSRC}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]

    def build(folder: Path) -> None:
        sources = [CSRC / "cuda" / "few_queries.cu", CSRC / "cuda" / "bindings.cpp"]
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
    binary = build_once("cuda-host", [CSRC / "cuda", CSRC / "tests"], facts, build) / name
    spec = importlib.util.spec_from_file_location("_C_cuda", binary)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def on_host(host_module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_module", lambda: host_module)
    monkeypatch.setattr(cuda, "_stream", lambda device: 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keys", PRECISIONS)
def test_odd_shapes(keys: str, kind: str, on_host: None, rng: np.random.Generator) -> None:
    for index, (counts, batch, width) in enumerate(SHAPES):
        plan = make_plan(rng, counts, width, keys, kind, weighted=index % 2 == 0, beta=1.0 + 5 * index)
        assert_few(plan, random_queries(rng, min(batch, 16), width))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [[1] * 1030, [40, 2, 300]])
def test_more_classes_than_a_block_sums_at_once_and_large_classes(
    counts: list[int], kind: str, on_host: None, rng: np.random.Generator
) -> None:
    queries = random_queries(rng, 2, 8)
    assert_few(make_plan(rng, counts, 8, "fp32", kind), queries)


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_a_second_plan_leaves_the_first_its_shared_memory(batch: int, on_host: None, rng: np.random.Generator) -> None:
    """Whose queries are larger than it."""
    wide, narrow = (make_plan(rng, [2, 7], width, "fp16", "classes") for width in (26_001, 8))
    for plan in (wide, narrow, wide):
        assert_few(plan, random_queries(rng, batch, plan.width))


def test_equal_calls_give_equal_bits_whatever_the_workspace_held(
    on_host: None, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in KINDS:
        parts = device_plan(make_plan(rng, [150, 0, 61], 24, "fp16", kind), "cpu")
        results = []
        for fill in (0.0, float("nan")):
            monkeypatch.setattr(torch, "empty", lambda n, fill=fill, **options: torch.full((n,), fill, **options))
            results.append(torch.zeros(3, 3))
            cuda.affinity_sums(parts, torch.ones(3, 24) / 5, results[-1])
        assert torch.equal(*results)


def test_queries_are_rounded_to_the_type_of_the_keys(on_host: None, rng: np.random.Generator) -> None:
    """As Triton rounds them, so that a query's logits don't depend on the size of its batch."""
    queries = random_queries(rng, 5, 24)
    for keys, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("int8", torch.float16)):
        plan = replace(make_plan(rng, [2, 7], 24, keys, "values"), query_transform=None)
        logits = [assert_few(plan, rows) for rows in (queries, queries.to(dtype), queries.to(dtype).float())]
        assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def test_a_plan_is_bound_once_and_its_arrays_are_copied_only_to_pad_them(
    on_host: None, rng: np.random.Generator
) -> None:
    for width, padded in ((8, False), (7, True)):
        parts = device_plan(make_plan(rng, [2, 7], width, "fp16", "classes"), "cpu")
        cuda.affinity_sums(parts, torch.zeros(1, width), torch.zeros(1, 2))
        bound = parts.cached("cuda", lambda: pytest.fail("bound twice"))
        assert (bound.tensors["keys"] is not parts.keys) == padded


def test_larger_batches_are_refused(rng: np.random.Generator) -> None:
    parts = device_plan(make_plan(rng, [2, 7], 8, "fp32", "classes"), "cpu")
    with pytest.raises(IosrFastError, match="expected 1 to 16 queries, got 17"):
        cuda.affinity_sums(parts, torch.zeros(17, 8), torch.zeros(17, 2))


@pytest.fixture(scope="module")
def built() -> Path:
    """_C_cuda as cmake/cuda.cmake builds it, with machine code for no GPU that is here."""
    for tool in ("nvcc", "cmake"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not on PATH")
    pybind11 = pytest.importorskip("pybind11")
    options = ["-DIOSR_FAST_MODULE=OFF", "-DIOSR_FAST_CUDA=ON", f"-DPython_EXECUTABLE={sys.executable}"]
    options.append(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")

    def build(folder: Path) -> None:
        subprocess.run(["cmake", "-S", ROOT, "-B", folder, *options], check=True)
        subprocess.run(["cmake", "--build", folder, "--target", "_C_cuda"], check=True)

    sources = [CSRC / "cuda", ROOT / "cmake" / "cuda.cmake", ROOT / "CMakeLists.txt"]
    folder = build_once("cuda-build", sources, [*options, version_of("nvcc"), version_of("cmake")], build)
    return next(folder.glob("_C_cuda.*"))


@pytest.mark.slow
def test_every_gpu_since_8_0_has_code_without_spills(built: Path) -> None:
    triton = importlib.util.find_spec("triton")
    path = None if triton is None else str(Path(str(triton.origin)).parent / "backends" / "nvidia" / "bin")
    cuobjdump = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=path)
    if cuobjdump is None:
        pytest.skip("no cuobjdump: it comes with CUDA's toolkit and with triton")

    def dump(option: str) -> str:
        return subprocess.run([cuobjdump, option, built], capture_output=True, text=True, check=True).stdout

    assert set(re.findall(r"\.(sm_\d+)\.cubin", dump("-lelf"))) >= {"sm_80", "sm_90", "sm_120"}
    # PTX of the oldest serves GPUs between those, PTX of the newest the ones after them.
    assert set(re.findall(r"\.(sm_\d+)\.ptx", dump("-lptx"))) == {"sm_80", "sm_120"}
    usage = re.findall(r"STACK:(\d+).* LOCAL:(\d+)", dump("-res-usage"))
    assert len(usage) >= 36 and set(usage) == {("0", "0")}


@pytest.mark.slow
def test_the_module_imports_without_a_gpu_and_errors_have_cudas_words(built: Path) -> None:
    code = "import _C_cuda; _C_cuda.tile_keys(4096, 5)"
    done = subprocess.run([sys.executable, "-c", code], cwd=built.parent, capture_output=True, text=True)
    assert "RuntimeError: CUDA device 4096: " in done.stderr


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keys", PRECISIONS)
def test_shapes_on_a_gpu(keys: str, kind: str, rng: np.random.Generator) -> None:
    large = ([16] * 100, [3, 40000, 0, 7000], [8] * 1030)
    for counts, width in itertools.product((*(counts for counts, _, _ in SHAPES), *large), (1, 33, 512)):
        plan = make_plan(rng, counts, width, keys, kind)
        for batch in (1, 3, 9, 16):
            queries = random_queries(rng, batch, width)
            assert_few(plan, queries, "cuda")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_and_streams_at_once_give_the_bits_of_one_call(kind: str, rng: np.random.Generator) -> None:
    parts = device_plan(make_plan(rng, [4000] * 40, 256, "fp16", kind), "cuda")
    queries = random_queries(rng, 16, 256).cuda()
    expected, recorded = torch.zeros(16, 40, "cuda"), torch.zeros(16, 40, "cuda")
    cuda.affinity_sums(parts, queries, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda.affinity_sums(parts, queries, recorded)
    graph.replay()
    streams, results = [torch.cuda.Stream() for _ in range(4)], []
    torch.cuda.synchronize()
    for stream in streams * 5:
        with torch.cuda.stream(stream):
            results.append(torch.zeros(16, 40, "cuda"))
            cuda.affinity_sums(parts, queries, results[-1])
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in (recorded, *results))


@pytest.mark.gpu
@needs_gpu
def test_a_second_gpu_leaves_the_first_alone() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("a second GPU is needed")
    code = (
        "import torch, numpy as np; from iosr_fast import Embeddings, ScoringPlan, score; "
        "plan = ScoringPlan(2, keys=np.eye(8)[:3], class_offsets=[0, 1, 3]); "
        "score(plan, Embeddings(torch.eye(8, device='cuda:1')), 'cuda', check=False); torch.cuda.synchronize(1); "
        "raise SystemExit(torch._C._cuda_hasPrimaryContext(0))"
    )
    printed(code)
