"""The Triton kernels compiled for each GPU generation, without a GPU: tensor cores in use, nothing spilt.

Each batch is compiled in a process of its own, as pytest-xdist may spread them, and without TRITON_INTERPRET, under
which kernels aren't compiled. Rows are cached by the kernels' source and Triton's version.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from iosr_fast.kernels import compile_check
from tests import ROOT
from tests.demo_cache import build_once
from tests.interpreter import printed

Job = tuple[int, list[str], list[str]]  # the arguments of compile_ahead
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("triton", "torch")),
        reason="triton or torch is not installed: pip install 'iosr_fast[gpu]'",
    ),
]
SHARED_BYTES = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KB a block
INSTRUCTION = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}
KERNELS = list(compile_check.KERNELS)
# 8.6 and 8.9 have 8.0's tiles and instructions, so one kernel stands for all.
LARGE = [kernel for kernel in KERNELS if not kernel.endswith("/few")]
JOBS: list[Job] = [
    *((90, [kernel], list(compile_check.PRECISIONS)) for kernel in KERNELS),
    *((arch, [kernel], ["fp32", "fp16", "int8"]) for arch in (80, 100, 120) for kernel in LARGE),
    *((arch, ["classes/many"], ["fp16"]) for arch in (86, 89)),
]
# PyTorch 2.11 brings this one, whose compiler takes more registers; these kernels are the nearest to the limit.
OLDER = "3.6.0"
OLDER_JOBS: list[Job] = [
    (90, ["classes/some", "affinities/many"], ["fp32"]),
    (90, ["classes/many", "affinities/many"], ["fp16"]),
    (100, ["classes/many", "affinities/many"], ["fp16", "int8"]),
    (120, ["classes/few"], ["int8"]),
]
COMPILE = """
import json, os, sys
os.environ.pop("TRITON_INTERPRET", None)
root, older, jobs = sys.argv[1:]
sys.path[:0] = [older] if older else []
import iosr_fast
iosr_fast.__path__.append(root)
from iosr_fast.kernels.compile_check import compile_ahead
print(json.dumps([row for job in json.loads(jobs) for row in compile_ahead(*job)]))
"""


def batch_of(job: Job) -> str:
    """By architecture and kernel: "90 classes"."""
    return f"{job[0]} {job[1][0].split('/')[0]}"


def compiled(jobs: list[Job], older: str = "") -> list[dict[str, Any]]:
    """compile_ahead() of each job, by the Triton in the folder `older`, or by the installed one."""

    def build(folder: Path) -> None:
        (folder / "rows.json").write_text(printed(COMPILE, str(ROOT), older, json.dumps(jobs)), encoding="utf-8")

    facts = [json.dumps(jobs), older or version("triton"), version("torch"), sys.version]
    folder = build_once("triton-compile-check", [ROOT / "kernels"], facts, build)
    rows: list[dict[str, Any]] = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    return rows


def assert_tensor_cores_multiply(row: dict[str, Any]) -> None:
    """Float32 as TF32, int8 as float16."""
    if row["arch"] == 100 and row["precision"] == "fp32" and row["triton"].startswith("3.6."):
        return  # product_precision() takes none
    instruction, *machine = row["tensor_core_instruction"].replace(",", "").split()
    # Tiles of few rows take the older instruction, which newer GPUs have too.
    wanted = "mma.sync" if row["tile"].startswith("16x") else INSTRUCTION[row["arch"]]
    assert instruction == wanted and any("MMA" in name for name in machine), row
    if row["arch"] == 100:  # whose instruction doesn't name its types
        return
    kinds = {next((kind for kind in ("TF32", "BF16") if kind in name), "F16") for name in machine}
    products = {{"fp32": "TF32", "bf16": "BF16"}.get(row["precision"], "F16")}
    if row["kernel"].startswith("classes"):  # sums of affinities, in three parts of bfloat16 or one of float16
        products.add("BF16" if row["precision"] == "fp32" else "F16")
    assert kinds == products, row


def assert_good(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert row["spills"] == 0 and 0 < row["registers"] <= 255, row
        assert row["shared_bytes"] <= 1024 * SHARED_BYTES[row["arch"]], row
        assert_tensor_cores_multiply(row)


@pytest.mark.parametrize("batch", dict.fromkeys(map(batch_of, JOBS)))
def test_nothing_is_spilt_and_tensor_cores_multiply(batch: str) -> None:
    assert_good(compiled([job for job in JOBS if batch_of(job) == batch]))


def test_an_older_triton_spills_nothing_either() -> None:
    if version("triton") == OLDER:
        pytest.skip(f"Triton {OLDER} is the installed one, which the tests above compile with")

    def install(folder: Path) -> None:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, f"triton=={OLDER}"]
        done = subprocess.run(pip, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"pip does not bring triton {OLDER} here: {done.stderr[-200:]}")

    rows = compiled(OLDER_JOBS, str(build_once(f"triton-{OLDER}", [], [sys.version], install)))
    assert {row["triton"] for row in rows} == {OLDER}
    assert_good(rows)


def test_every_architecture_and_kernel_is_compiled() -> None:
    assert {arch for arch, _, _ in JOBS} == set(compile_check.ARCHITECTURES)
    assert {kernel for _, kernels, _ in JOBS for kernel in kernels} == set(KERNELS)
    assert {precision for _, _, precisions in JOBS for precision in precisions} == set(compile_check.PRECISIONS)
    table = compile_check.format_rows(compiled([job for job in JOBS if job[0] == 86])).splitlines()
    assert len(table) == 3 and len({len(line) for line in table}) == 1


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
