"""The Triton kernels compiled for each GPU generation, without a GPU: tensor cores in use, nothing spilt.

Compiling is done in processes of their own and without TRITON_INTERPRET, under which kernels aren't compiled. The
table is cached by the kernels' sources and Triton's version.
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
from tests.scoring.build_cache import build_once

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("triton", "torch")),
        reason="triton or torch is not installed: pip install 'iosr_fast[gpu]'",
    ),
]
# Limits a block: the smallest of those architectures, 8.6's, 8.9's and 12.0's, and that of the ones with descriptors.
SHARED_BYTES, TMA_SHARED_BYTES = 99 * 1024, 227 * 1024
INSTRUCTION = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}
# Every kernel for Hopper, the larger ones for each kind of instruction; 8.6 and 8.9 compile 8.0's, so one stands for
# all.
POINTERS = ["few", "aligned/pointers", "ragged/pointers", "affine/many", "dense/many"]
TMA = ["few", "aligned/tma", "ragged/tma", "affine/many", "dense/many"]
REST = [name for name in compile_check.kernel_names() if name not in TMA and "pointers" not in name]
JOBS = [
    *((80, [kernel], ("fp16", "int8")) for kernel in POINTERS),
    *((arch, [kernel], ("fp16", "int8")) for arch in (90, 100) for kernel in TMA),
    *((120, [kernel], ("fp16", "int8")) for kernel in POINTERS[:3]),
    *((arch, ["aligned/pointers"], ("fp16",)) for arch in (86, 89)),
    *((90, [kernel], ("fp16", "int8")) for kernel in REST),
    *((90, [kernel], ("fp32", "bf16")) for kernel in ("aligned/tma", "dense/many", "affine/many", "affine/few")),
    (80, ["aligned/pointers"], ("fp32",)),
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
        instruction = row["tensor_core_instruction"]
        if row["kernel"] in ("merge", "digits", "parts"):
            assert instruction == ""
            continue
        assert "MMA" in instruction, row
        # Small tiles and 3xTF32 may fall back on the older instruction, which newer GPUs have too.
        if "few" not in row["kernel"] and row["precision"] != "fp32":
            assert instruction.startswith(INSTRUCTION[row["arch"]]), row


def test_the_keys_are_multiplied_at_their_precision(rows: list[dict[str, Any]]) -> None:
    """The segmented sum of the ragged kernel uses bfloat16 products, so that any instruction alone says too little."""
    for row in rows:
        if (
            row["kernel"] in ("merge", "digits", "parts") or row["arch"] == 100
        ):  # 10.0's instruction doesn't name its types
            continue
        names = row["tensor_core_instruction"].replace(",", "").split()[1:]
        kinds = {next((kind for kind in ("TF32", "BF16", "S8") if kind in name), "F16") for name in names}
        wanted = {"fp32": "TF32", "bf16": "BF16", "fp16": "F16", "int8": "S8"}[row["precision"]]
        if row["kernel"].startswith("affine") or (row["kernel"].startswith("dense") and wanted == "S8"):
            wanted = "F16"  # float32 in two parts; int8 keys are converted
        assert wanted in kinds, row


def test_nothing_is_spilt(rows: list[dict[str, Any]]) -> None:
    assert [row for row in rows if row["spills"]] == []


def test_tiles_fit_every_architecture(rows: list[dict[str, Any]]) -> None:
    limits = [TMA_SHARED_BYTES if row["kernel"].endswith("/tma") else SHARED_BYTES for row in rows]
    assert [row for row, limit in zip(rows, limits, strict=True) if row["shared_bytes"] > limit] == []
    assert all(0 < row["registers"] <= 255 for row in rows)


def test_every_architecture_and_kernel_was_compiled(rows: list[dict[str, Any]]) -> None:
    assert {row["arch"] for row in rows} == set(compile_check.ARCHITECTURES)
    assert {row["kernel"] for row in rows} == set(compile_check.kernel_names())
    assert {row["precision"] for row in rows} == set(compile_check.PRECISIONS)
    table = compile_check.format_rows(rows[:2]).splitlines()
    assert len(table) == 4 and len({len(line) for line in table}) == 1


def test_what_cannot_be_compiled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"expected an architecture of 80, .* got 75"):
        compile_check.compile_ahead(75)
    with pytest.raises(ValueError, match=r"expected a kernel of .* got 'diagonal'"):
        compile_check.compile_ahead(80, ["diagonal"])
    with pytest.raises(ValueError, match=r"expected a precision of .* got 'fp8'"):
        compile_check.compile_ahead(80, ["merge"], ["fp8"])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET unset"):
        compile_check.compile_ahead(80, ["merge"])
