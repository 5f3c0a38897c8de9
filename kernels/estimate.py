"""Estimated times of the Triton kernels on an H100, from the instructions that `aot` counts. Nothing here is measured.

A tile of b queries and n keys, d channels wide, takes on one multiprocessor

    product = max(2 b n d / multiprocessor's FLOP per clock, (b + n) d bytes / bytes per clock from the L2 cache)
    sums    = max(instructions outside of the loop over channels * warps / 4, b n / 16)

clocks: 4 schedulers issue an instruction of a warp each, and 16 exponentials are computed. A program that has the
multiprocessor for itself takes product + sums; where several share one, the tile takes the larger of all instructions
and of the keys' bytes from memory. Tiles run in waves, one a multiprocessor; each launch of a CUDA graph adds LAUNCH_S,
and a kernel that waits for memory twice in a row LATENCY_S twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# An H100 SXM: assumed rates of torch.mm and of a copy, below the data sheet's 989 TFLOPS and 3.35 TB/s.
MULTIPROCESSORS, CLOCK_HZ = 132, 1.755e9
GEMM_FLOPS = 750e12
BYTES_PER_S, L2_BYTES_PER_CLOCK = 3.0e12, 64
LAUNCH_S, LATENCY_S = 1.5e-6, 0.7e-6
KEY_BYTES = {"fp16": 2, "int8": 1}

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """q queries against k keys of c classes in d channels; `kernel` of aot.kernel_names() computes its cache term, in
    one of `launches` launches."""

    name: str
    queries: int
    keys: int
    width: int
    classes: int
    precision: str
    kernel: str
    launches: int

    @property
    def floor_s(self) -> float:
        """The product of queries and keys at a GEMM's rate, or reading the keys once at a copy's, or two launches."""
        product = 2.0 * self.queries * self.keys * self.width / GEMM_FLOPS
        return max(product, self.key_bytes / BYTES_PER_S, 2 * LAUNCH_S)

    @property
    def key_bytes(self) -> float:
        return float(self.keys * self.width * KEY_BYTES[self.precision])


# Queries are float16 already. float32 ones, which encoders hand over, take two launches more where they are many.
CASES = (
    Case("a", 256, 16_000, 512, 1000, "fp16", "aligned/tma", 2),  # affine terms, class sums
    Case("b", 4096, 160_000, 768, 10_000, "fp16", "aligned/tma", 2),
    Case("c", 1, 1_000_000, 512, 1000, "int8", "few", 3),  # digits, all terms, pieces of classes
    Case("d", 1, 1600, 512, 100, "fp16", "few-terms", 1),
)


def estimate_s(case: Case, rows: Iterable[Row], arch: int = 90) -> float:
    """Seconds of a case from rows of aot.compile_ahead()."""
    found = {(row["kernel"], row["precision"]): row for row in rows if row["arch"] == arch}
    row = found[case.kernel, case.precision]
    launches_s = case.launches * LAUNCH_S
    if case.kernel.startswith("few"):
        return launches_s + 2 * LATENCY_S + _shared_s(case, row)
    return launches_s + _alone_s(case, row) + _affine_s(case, found["affine/many", "fp16"])


def _alone_s(case: Case, row: Row) -> float:
    b, n, _, warps = row["tile"]
    product = _product_clocks(b, n, case.width, case.precision)
    sums = max(row["sums"] * warps / 4, b * n / 16)
    tiles = math.ceil(case.queries / b) * math.ceil(case.keys / n)
    return math.ceil(tiles / MULTIPROCESSORS) * (product + sums) / CLOCK_HZ


def _shared_s(case: Case, row: Row) -> float:
    _, n, width, warps = row["tile"]
    tiles = math.ceil(case.keys / n)
    instructions = row["instructions"]["all"] * case.width / width * warps / 4
    issued_s = max(1.0, tiles / MULTIPROCESSORS) * instructions / CLOCK_HZ
    return max(issued_s, case.key_bytes / BYTES_PER_S)


def _affine_s(case: Case, row: Row) -> float:
    """Texts of two parts, for queries that are float16."""
    b, n, width, warps = row["tile"]
    tiles = math.ceil(case.queries / b) * math.ceil(case.classes / n)
    instructions = row["instructions"]["all"] * case.width / width * warps / 4
    product = 2 * _product_clocks(b, n, case.width, "fp16")
    return max(1.0, tiles / MULTIPROCESSORS) * max(instructions, product) / CLOCK_HZ


def _product_clocks(b: int, n: int, width: int, precision: str) -> float:
    flop_per_clock = GEMM_FLOPS / MULTIPROCESSORS / CLOCK_HZ
    return max(2.0 * b * n * width / flop_per_clock, (b + n) * width * KEY_BYTES[precision] / L2_BYTES_PER_CLOCK)
