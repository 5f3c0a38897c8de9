"""Launches of the Triton kernels through Triton's own launcher, compiled for an H100 and not executed.

compile_check compiles kernels with types and constants of its own; here Triton derives both from the arguments of
score_triton, as on a GPU: 1 becomes a constant, and addresses and sizes that 16 divides are compiled apart.
.ci/triton36 runs this file without TRITON_INTERPRET; the name keeps it out of the main run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from iosr_fast.kernels import cache_score, dense_values
from iosr_fast.kernels.launch import PRECISIONS
from iosr_fast.scoring.device_plan import device_plan
from tests.conftest import random_embeddings, random_plan
from tests.scoring.triton_parity import tensors

SHARED_BYTES = 227 * 1024  # a block's on an H100; Triton refuses kernels that take more
MULTIPROCESSORS = 132


class Utilities:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES, "multiprocessor_count": MULTIPROCESSORS}

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return (1, 1, 0, 0, 1024)  # module, function, registers, spills, threads

    def unload_module(self, _: Any) -> None:
        pass


LAUNCHED: list[str] = []


class Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = source.fn.__name__

    def __call__(self, x: int, y: int, z: int, *_: Any) -> None:
        assert 0 < x < 2**31 and 0 < y < 2**16 and z == 1
        LAUNCHED.append(self.name)


class Driver:
    utils, launcher_cls = Utilities(), Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture(autouse=True)
def _signal_stack_is_kept() -> None:
    """Not here: Triton's compiler leaves one of its own."""


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that were launched."""
    monkeypatch.setattr(cache_score, "has_tensor_memory_accelerator", lambda device: True)
    for module in (cache_score, dense_values):
        monkeypatch.setattr(module, "multiprocessors", lambda device: MULTIPROCESSORS)
    driver.set_active(Driver())
    LAUNCHED.clear()
    return LAUNCHED


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("counts", "width", "batch", "dtype", "path"),
    [
        ([16] * 100, 512, 1, torch.float32, "few"),
        ([16], 512, 1, torch.float16, "few"),
        ([5000, 0, 3], 768, 3, torch.float32, "few"),
        ([16] * 100, 512, 300, torch.float16, "aligned-tma"),
        ([16], 512, 40, torch.float32, "aligned-tma"),
        ([8] * 9, 123, 33, torch.float32, "aligned"),
        ([5000], 512, 40, torch.float32, "ragged"),
        ([3, 0, 70] * 30, 123, 33, torch.bfloat16, "ragged"),
        ([1], 1, 1, torch.float32, "few"),
    ],
)
def test_launches_compile(
    counts: list[int],
    width: int,
    batch: int,
    dtype: torch.dtype,
    path: str,
    precision: str,
    rng: np.random.Generator,
    launched: list[str],
) -> None:
    plan = random_plan(rng, counts, width).with_key_precision(precision)  # type: ignore[arg-type]
    rows = (one.to(dtype) for one in tensors(random_embeddings(rng, batch, width), "cpu"))
    assert cache_score.score_triton(device_plan(plan, "cpu"), *rows)[1] == f"triton/{path}"
    assert "cache_kernel" in launched


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("batch", [1, 40])
def test_launches_for_values_compile(batch: int, precision: str, rng: np.random.Generator, launched: list[str]) -> None:
    for counts, width in (([40] * 30, 512), ([9], 17)):
        plan = random_plan(rng, counts, width, dense=True, precision=precision)  # type: ignore[arg-type]
        rows = tensors(random_embeddings(rng, batch, width), "cpu")
        assert cache_score.score_triton(device_plan(plan, "cpu"), *rows)[1] == "triton/dense"
    assert "dense_kernel" in launched
