"""The Triton kernel: parity in its interpreter and on a GPU, launches through its own launcher."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from iosr_fast.scoring.device_plan import device_plan
from iosr_fast.scoring.key_precision import PRECISIONS
from tests import ROOT
from tests.scoring.numerics import needs_gpu
from tests.scoring.sums import KINDS, SHAPES, make_plan, random_queries

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install 'iosr_fast[gpu]'"
)
torch = pytest.importorskip("torch")


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize(("file", "interpret", "least"), [("parity", "1", 60), ("launches", "0", 12)])
def test_in_a_process_of_its_own(file: str, interpret: str, least: int) -> None:
    """These files say why. They need no GPU, and see none."""
    environment = os.environ | {"TRITON_INTERPRET": interpret, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/kernels/{file}.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"^(\d+) passed in", done.stdout, re.MULTILINE)
    # Neither a skip nor an empty collection may pass for parity.
    assert passed is not None and int(passed[1]) >= least, done.stdout[-2000:]


@pytest.mark.gpu
@needs_triton
@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keys", PRECISIONS)
def test_parity_on_a_gpu(keys: str, kind: str, rng: np.random.Generator) -> None:
    from tests.kernels.parity import assert_triton

    cuts = np.diff([0, *np.sort(rng.integers(0, 5001, 96)), 5000]).tolist()
    large = (
        ([16] * 100, 1, 512),
        ([16] * 500, 300, 512),
        (cuts, 257, 512),
        ([9000, 1, 0, 5], 70, 123),
        ([1] * 999, 70, 768),
    )
    for counts, batch, width in (*SHAPES, *large):
        plan, queries = (
            make_plan(rng, counts, width, keys, kind, weighted=batch != 70),
            random_queries(rng, batch, width),
        )
        first = assert_triton(plan, queries, "cuda")
        assert torch.equal(first, assert_triton(plan, queries, "cuda"))


@pytest.mark.gpu
@needs_triton
@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_cuda_graph_records_a_call_after_the_first(kind: str, rng: np.random.Generator) -> None:
    from iosr_fast.kernels.affinity_sums import affinity_sums

    plan = device_plan(make_plan(rng, [16, 700, 0, 3], 64, "fp16", kind), "cuda")
    queries, logits = random_queries(rng, 40, 64).cuda(), torch.zeros(40, 4, device="cuda")
    graph, other = torch.cuda.CUDAGraph(), random_queries(rng, 40, 64).cuda()
    with pytest.raises(RuntimeError, match="scored with Triton once before"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        affinity_sums(plan, queries, logits)
    affinity_sums(plan, other, expected := torch.zeros_like(logits))
    with torch.cuda.graph(graph):
        affinity_sums(plan, queries, logits)
    queries.copy_(other)
    logits.zero_()
    graph.replay()
    assert torch.equal(logits, expected)
