"""Launches through Triton's own launcher, compiled for an H100 and not executed.

compile_check states types and constants itself; here Triton derives both from the arguments, as on a GPU: None and 1
become constants, and addresses and sizes that 16 divides are compiled apart. test_triton.py runs this file without
TRITON_INTERPRET; the name keeps it out of the main run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from iosr_fast.kernels import affinity_sums as kernels
from iosr_fast.scoring.device_plan import device_plan
from iosr_fast.scoring.key_precision import PRECISIONS
from tests.scoring.sums import KINDS, make_plan, random_queries

LAUNCHED: list[str] = []


class Utilities:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132}

    def load_binary(self, name: str, *_: Any) -> tuple[int, ...]:
        return (1, 1, 0, 0, 1024)  # module, function, registers, spills, threads

    def unload_module(self, _: Any) -> None:
        pass


class Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self.key = str(source.signature) + str(source.constants)

    def __call__(self, x: int, y: int, z: int, *_: Any) -> None:
        assert 0 < x < 2**31 and (y, z) == (1, 1)
        LAUNCHED.append(self.key)


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


@pytest.fixture(autouse=True)
def _h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "gpu", lambda device: (132, 90))
    driver.set_active(Driver())
    LAUNCHED.clear()


def launch(rng: np.random.Generator, counts: list[int], width: int, keys: str, kind: str, batch: int) -> None:
    plan = device_plan(make_plan(rng, counts, width, keys, kind), "cpu")
    kernels.affinity_sums(plan, random_queries(rng, batch, width), torch.zeros(batch, len(counts)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keys", PRECISIONS)
def test_launches_compile(keys: str, kind: str, rng: np.random.Generator) -> None:
    launch(rng, [16] * 100, 512, keys, kind, 300)
    launch(rng, [5, 0, 7], 17, keys, kind, 1)
    assert len(set(LAUNCHED)) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_another_batch_another_number_of_keys_or_of_classes_compiles_nothing(
    kind: str, rng: np.random.Generator
) -> None:
    for counts, batch in (([16] * 8, 40), ([20] * 9, 64), ([1000] + 7 * [8], 33)):
        launch(rng, counts, 64, "fp16", kind, batch)
    assert len(LAUNCHED) == 3 and len(set(LAUNCHED)) == 1
