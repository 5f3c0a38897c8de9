"""Instructions counted in disassembled code, and the times estimated from them, on code and rows written here."""

from __future__ import annotations

import json

import pytest

from iosr_fast.kernels import estimate, sass
from tests import ROOT


def code(*lines: str) -> str:
    """Text as nvdisasm's: a line that ends in a colon is a label."""
    return "\n".join(
        line if line.endswith(":") else f"        /*{16 * i:04x}*/    {line} ;" for i, line in enumerate(lines)
    )


# A loop over tiles, in it a loop over channels; the sums of a tile follow it.
NESTED = code(
    "S2R R0, SR_CTAID.X",
    ".L_x_0:",
    "IADD3 R1, R1, 0x1, RZ",
    ".L_x_1:",
    "UTMALDG.2D [UR8], [UR4]",
    "HGMMA.64x256x16.F32 R24, gdesc[UR4], R24",
    "HGMMA.64x256x16.F32 R24, gdesc[UR8], R24",
    "@P0 BRA `(.L_x_1)",
    "FFMA R2, R2, R3, R4",
    "MUFU.EX2 R2, R2",
    "@P1 BRA `(.L_x_0)",
    "EXIT",
)
# One loop for both, as the compiler flattens them: the sums are skipped but in a tile's last step, and the code that
# waits for a load stands behind the end.
FLAT = code(
    ".L_x_0:",
    "@!P0 BRA `(.L_x_3)",
    ".L_x_1:",
    "IMMA.16832.S8.S8 R4, R8, R10, R4",
    "@P1 BRA `(.L_x_2)",
    "MUFU.EX2 R2, R2",
    "STL [R1], R2",
    ".L_x_2:",
    "IADD3 R1, R1, 0x1, RZ",
    "@P2 BRA `(.L_x_0)",
    "EXIT",
    ".L_x_3:",
    "NANOSLEEP 0x20",
    "BRA `(.L_x_1)",
)
UNROLLED = code(
    "LDG.E R1, [R2]", "HMMA.1688.F32.TF32 R4, R8, R10, R4", "LDS R3, [R4]", "HMMA.1688.F32.TF32 R4, R8, R10, R4", "EXIT"
)


def test_a_step_is_the_innermost_loop_with_products() -> None:
    counts = sass.count(NESTED)
    assert counts.multiplied == 2 * 64 * 256 * 16 // 4  # a warp's quarter of a warpgroup's
    assert {kind: n for kind, n in counts.step.items() if n} == {"tensor": 2, "load": 1, "other": 1, "all": 4}
    assert {kind: n for kind, n in counts.tile.items() if n} == {"special": 1, "other": 3, "all": 4}


def test_what_a_step_may_skip_belongs_to_the_tile() -> None:
    counts = sass.count(FLAT)
    assert counts.multiplied == 16 * 8 * 32
    assert counts.step["tensor"] == 1 and counts.step["special"] == counts.step["spill"] == 0
    assert counts.tile["special"] == counts.tile["spill"] == 1 and counts.tile["tensor"] == 0


def test_without_a_loop_a_step_is_all_between_the_products() -> None:
    counts = sass.count(UNROLLED)
    assert counts.multiplied == 2 * 16 * 8 * 8
    assert counts.step == dict.fromkeys((*sass.KINDS, "other", "all"), 0) | {"tensor": 2, "shared": 1, "all": 3}
    assert counts.tile["load"] == 1 and counts.tile["all"] == 2
    assert sass.count(code("FADD R1, R1, R2", "EXIT")).step["all"] == 0


def test_kinds_of_opcodes() -> None:
    kinds = {
        "tensor": (
            "HGMMA.64x256x16.F32",
            "IGMMA.64x16x32.S8.S8",
            "HMMA.16816.F32.BF16",
            "IMMA.16832.S8.S8.SAT",
            "UTCHMMA",
        ),
        "load": ("LDG.E.128", "LDGSTS.E.BYPASS.128", "UTMALDG.2D"),
        "shared": ("LDS.64", "LDSM.16.M88.4", "STS"),
        "move": ("MOV", "IMAD.MOV.U32", "SHFL.BFLY", "PRMT"),
        "special": ("MUFU.EX2",),
        "spill": ("LDL.64", "STL"),
        "other": ("FFMA", "IMAD.WIDE", "LDGDEPBAR", "BRA", "LDC.64"),
    }
    assert {kind: {sass.kind_of(opcode) for opcode in opcodes} for kind, opcodes in kinds.items()} == {
        kind: {kind} for kind in kinds
    }


@pytest.mark.parametrize("case", estimate.CASES, ids=lambda case: case.name)
def test_no_estimate_is_below_the_floor_or_far_above(case: estimate.Case) -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "aot-triton.json").read_text(encoding="utf-8"))
    least = {"a": 0.4, "b": 0.65, "c": 0.8, "d": 0.5}[case.name]  # the share of the floor's rate
    assert least <= case.floor_s / estimate.estimate_s(case, rows) < 1
