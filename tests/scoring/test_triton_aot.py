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

from iosr_fast.kernels import aot
from tests import ROOT
from tests.scoring.build_cache import build_once

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("triton", "torch")),
        reason="triton or torch is not installed: pip install 'iosr_fast[gpu]'",
    ),
]
# The smallest limit of those architectures a block, 8.6's, 8.9's and 12.0's: 99 KB.
SHARED_BYTES = 99 * 1024
INSTRUCTION = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}
# Every kernel for each kind of instruction; 8.6, 8.9 and 12.0 compile 8.0's, so the larger kernels stand for the rest.
MANY = [name for name in aot.kernel_names() if name.endswith("/many") and name != "aligned-large/many"]
REST = [name for name in aot.kernel_names() if name not in MANY]
LARGE = ["aligned/many", "ragged/many", "dense/many"]
JOBS = [
    *((arch, [kernel], ("fp16", "int8")) for arch in (80, 90, 100) for kernel in MANY),
    *((arch, [kernel], ("fp16", "int8")) for arch in (86, 89, 120) for kernel in LARGE),
    *((90, [kernel], ("fp16", "int8")) for kernel in REST),
    *((90, [kernel], ("fp32", "bf16")) for kernel in LARGE),
    (80, ["aligned/many"], ("fp32",)),
]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    def build(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("TRITON_INTERPRET", raising=False)
            table = list(aot.compile_many(JOBS, workers=2))
        (folder / "rows.json").write_text(json.dumps(table), encoding="utf-8")

    facts = [json.dumps(JOBS), version("triton"), version("torch"), sys.version]
    folder = build_once("triton-aot", [ROOT / "kernels"], facts, build)
    table: list[dict[str, Any]] = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    return table


def test_tensor_cores_multiply(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        instruction = row["tensor_core_instruction"]
        if row["kernel"] == "merge":
            assert instruction == ""
            continue
        assert "MMA" in instruction, row
        # Small tiles and 3xTF32 may fall back on the older instruction, which newer GPUs have too.
        if row["kernel"].endswith("/many") and row["precision"] != "fp32":
            assert instruction.startswith(INSTRUCTION[row["arch"]]), row


def test_the_keys_are_multiplied_at_their_precision(rows: list[dict[str, Any]]) -> None:
    """The segmented sum of the ragged kernel uses bfloat16 products, so that any instruction alone says too little."""
    for row in rows:
        if row["kernel"] == "merge" or row["arch"] == 100:  # 10.0's instruction doesn't name its types
            continue
        names = row["tensor_core_instruction"].replace(",", "").split()[1:]
        kinds = {"TF32" if "TF32" in name else "BF16" if "BF16" in name else "F16" for name in names}
        wanted = {"fp32": "TF32", "bf16": "BF16", "fp16": "F16", "int8": "F16"}[row["precision"]]
        assert wanted in kinds, row


def test_nothing_is_spilt(rows: list[dict[str, Any]]) -> None:
    assert [row for row in rows if row["spills"]] == []


def test_tiles_fit_every_architecture(rows: list[dict[str, Any]]) -> None:
    assert [row for row in rows if row["shared_bytes"] > SHARED_BYTES] == []
    assert all(0 < row["registers"] <= 255 for row in rows)


def test_every_architecture_and_kernel_was_compiled(rows: list[dict[str, Any]]) -> None:
    assert {row["arch"] for row in rows} == set(aot.ARCHITECTURES)
    assert {row["kernel"] for row in rows} == set(aot.kernel_names())
    assert {row["precision"] for row in rows} == set(aot.PRECISIONS)
    table = aot.format_rows(rows[:2]).splitlines()
    assert len(table) == 4 and len({len(line) for line in table}) == 1


def test_what_cannot_be_compiled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"expected an architecture of 80, .* got 75"):
        aot.compile_ahead(75)
    with pytest.raises(ValueError, match=r"expected a kernel of .* got 'diagonal'"):
        aot.compile_ahead(80, ["diagonal"])
    with pytest.raises(ValueError, match=r"expected a precision of .* got 'fp8'"):
        aot.compile_ahead(80, ["merge"], ["fp8"])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET unset"):
        aot.compile_ahead(80, ["merge"])
