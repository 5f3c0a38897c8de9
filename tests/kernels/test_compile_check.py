"""The Triton kernel compiled for each GPU generation, without a GPU: tensor cores in use, nothing spilt.

Compiling is done in processes of their own and without TRITON_INTERPRET, under which kernels aren't compiled. The
table is cached by the kernel's source and Triton's version.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from iosr_fast.kernels import compile_check
from tests import ROOT
from tests.demo_cache import build_once

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("triton", "torch")),
        reason="triton or torch is not installed: pip install 'iosr_fast[gpu]'",
    ),
]
SHARED_BYTES = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KB a block
INSTRUCTION = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}
# 8.6 and 8.9 have 8.0's tiles and instructions, so one kernel stands for all.
LARGE = [kernel for kernel in compile_check.KERNELS if not kernel.endswith("/few")]
JOBS = [
    *((90, [kernel], ("fp32", "fp16", "int8")) for kernel in compile_check.KERNELS),
    *((arch, [kernel], ("fp32", "fp16", "int8")) for arch in (80, 120) for kernel in LARGE),
    *((100, [kernel], ("fp32", "fp16")) for kernel in LARGE),
    *((arch, ["half values/wide"], ("fp16",)) for arch in (86, 89)),
    (90, ["classes/many", "half values/wide"], ("bf16",)),
]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    def build(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("TRITON_INTERPRET", raising=False)
            table = list(compile_check.compile_many(JOBS, workers=2))
        (folder / "rows.json").write_text(json.dumps(table), encoding="utf-8")

    facts = [json.dumps(JOBS), version("triton"), version("torch"), sys.version]
    folder = build_once("triton-compile-check", [ROOT / "kernels"], facts, build)
    table: list[dict[str, Any]] = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    return table


def test_tensor_cores_multiply(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        instruction, *machine = row["tensor_core_instruction"].split()
        # Tiles of few rows take the older instruction, which newer GPUs have too.
        wanted = "mma.sync" if row["tile"].startswith("16x") else INSTRUCTION[row["arch"]]
        assert instruction == wanted and any("MMA" in name for name in machine), row


def test_float32_is_multiplied_as_tf32_and_int8_as_float16(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["arch"] == 100:  # whose instruction doesn't name its types
            continue
        names = row["tensor_core_instruction"].replace(",", "").split()[1:]
        kinds = {next((kind for kind in ("TF32", "BF16") if kind in name), "F16") for name in names}
        products = {{"fp32": "TF32", "bf16": "BF16"}.get(row["precision"], "F16")}
        products.add({"values": "TF32", "half values": "F16"}.get(row["kernel"].split("/")[0], "BF16"))
        assert kinds == products, row


def test_nothing_is_spilt(rows: list[dict[str, Any]]) -> None:
    assert [row for row in rows if row["spills"] or not 0 < row["registers"] <= 255] == []


def test_tiles_fit_every_architecture(rows: list[dict[str, Any]]) -> None:
    assert [row for row in rows if row["shared_bytes"] > 1024 * SHARED_BYTES[row["arch"]]] == []


def test_every_architecture_and_kernel_was_compiled(rows: list[dict[str, Any]]) -> None:
    assert {row["arch"] for row in rows} == set(compile_check.ARCHITECTURES)
    assert {row["kernel"] for row in rows} == set(compile_check.KERNELS)
    assert {row["precision"] for row in rows} == set(compile_check.PRECISIONS)
    table = compile_check.format_rows(rows[:2]).splitlines()
    assert len(table) == 4 and len({len(line) for line in table}) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((75,), r"expected an architecture of 80, .* got 75"),
        ((80, ["diagonal"]), r"expected a kernel of .* got 'diagonal'"),
        ((80, ["classes/few"], ["fp8"]), r"expected a precision of .* got 'fp8'"),
    ],
)
def test_what_cannot_be_compiled_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compile_check.compile_ahead(*arguments)
