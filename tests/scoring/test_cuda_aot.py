"""The CUDA kernels compiled for every architecture: tensor cores where they should be, and no spilled register."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.scoring.build_cache import CSRC, build_once, version_of
from tools import cuda_aot

KERNELS = {
    "iosr_cache_fp32",
    "iosr_cache_fp32_small",
    "iosr_linear_fp32",
    "iosr_linear_fp32_small",
    "iosr_linear_fp16_mma",
    "iosr_linear_fp16_mma_small",
    "iosr_merge",
    *(f"iosr_cache_{keys}_mma{size}" for keys in ("fp16", "bf16", "int8") for size in ("", "_small")),
}

PTXAS = """
ptxas info    : Compiling entry function 'first_mma' for 'sm_90'
ptxas info    : Function properties for first_mma
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 49152 bytes smem
ptxas info    : Compiling entry function 'second' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers
"""
SASS = """
    Function : first_mma
  /*0040*/ HMMA.16816.F32 R8, R88, R4, R8 ;
  /*0050*/ IMMA.16832.S8.S8 R8, R88, R4, R8 ;
    Function : second
  /*0040*/ FFMA R8, R88, R4, R8 ;
"""


def test_reports_are_read() -> None:
    text = cuda_aot.split_report(PTXAS)
    assert list(text) == ["first_mma", "second"] and "49152 bytes smem" in text["first_mma"]
    assert cuda_aot.tensor_core_instructions(SASS) == {"first_mma": "HMMA, IMMA", "second": ""}


@pytest.fixture(scope="module")
def costs() -> list[dict[str, Any]]:
    reason = cuda_aot.missing()
    if reason is not None:
        pytest.skip(reason)

    def build(folder: Path) -> None:
        (folder / "costs.json").write_text(json.dumps(cuda_aot.compile_all()), encoding="utf-8")

    sources = [CSRC / "cuda", Path(cuda_aot.__file__)]
    folder = build_once("cuda-aot", sources, [version_of("nvcc"), str(cuda_aot.find_cuobjdump())], build)
    rows: list[dict[str, Any]] = json.loads((folder / "costs.json").read_text(encoding="utf-8"))
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("arch", cuda_aot.ARCHITECTURES)
def test_every_kernel_fits_its_architecture(arch: int, costs: list[dict[str, Any]]) -> None:
    rows = {row["kernel"]: row for row in costs if row["arch"] == arch}
    assert set(rows) == KERNELS
    for name, row in rows.items():
        assert row["spills"] == 0, row
        assert bool(row["tensor_core_instruction"]) == ("_mma" in name), row
        assert 0 < row["registers"] <= 255, row
        # Two blocks of the large tiles fit a multiprocessor: 64 K registers, and 100 KB of shared memory on sm_86.
        assert row["shared_bytes"] <= 48 * 1024, row
        if name.startswith("iosr_cache") and name.endswith("_mma"):
            assert row["registers"] <= 128, row
