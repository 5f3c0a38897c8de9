"""The backend of PyTorch's own operations, on the CPU and on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from iosr_fast.scoring.backends import torch as backend
from iosr_fast.scoring.device_plan import device_plan
from iosr_fast.scoring.key_precision import PRECISIONS
from tests.scoring.numerics import needs_gpu
from tests.scoring.sums import KINDS, SHAPES, assert_right, make_plan, random_queries


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keys", PRECISIONS)
def test_odd_shapes_whatever_the_tile(
    keys: str, kind: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles cut classes anywhere, with empty classes at their edges."""
    for elements in (40, 330, 1 << 20):
        for name in ("_TILE", "_ROWS", "_SUMS"):
            monkeypatch.setattr(backend, name, elements)
        for counts, batch, width in SHAPES:
            plan = make_plan(rng, counts, width, keys, kind, weighted=batch % 2 == 1)
            queries = random_queries(rng, batch, width, torch.bfloat16 if batch == 5 else torch.float32)
            logits = assert_right(backend.affinity_sums, "torch/cpu", plan, queries)
    assert torch.equal(logits, assert_right(backend.affinity_sums, "torch/cpu", plan, queries))


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_bounded_whatever_the_number_of_keys(kind: str, rng: np.random.Generator) -> None:
    plan = device_plan(make_plan(rng, [4000] * 10, 64, "int8", kind), "cpu")
    queries, logits = random_queries(rng, 1024, 64), torch.zeros(1024, 10)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        backend.affinity_sums(plan, queries, logits)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    assert 0 < live.max() <= 36e6


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keys", PRECISIONS)
def test_on_a_gpu(keys: str, kind: str, rng: np.random.Generator) -> None:
    for (counts, batch, width), dtype in zip(
        (*SHAPES, ([16] * 300, 252, 512)), 4 * (torch.float32, torch.float16), strict=True
    ):
        plan, queries = make_plan(rng, counts, width, keys, kind), random_queries(rng, batch, width, dtype)
        assert_right(backend.affinity_sums, "torch/cuda", plan, queries, device="cuda", half_queries=keys != "fp32")
