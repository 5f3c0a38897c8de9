"""Rank launch configurations of the Triton kernels by their machine code, without a GPU, for tools/tune_kernels.py.

    python tools/rank_kernels.py

compiles the grid of each case of benchmarks.gpu_parts.TUNED for an H100 and writes the best six of each into
tools/tuning_candidates.json. A configuration that spills, or doesn't fit, is left out.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from iosr_fast.benchmarks.gpu_parts import TUNED
from iosr_fast.utils import command
from tools.source_tree import use_source_tree

use_source_tree()

from iosr_fast.kernels.launch import Config  # noqa: E402

ARCHITECTURE = 90
CANDIDATES_FILE = Path(__file__).with_name("tuning_candidates.json")
MOST = 6  # candidates that are timed, beside the configuration in use: each compiles for seconds
SHAPES = 4  # of them with different tiles
BATCHES = {"few": (1, 32), "many": (256, 1024)}
SHARED_BYTES = 227 * 1024  # of a block, on an H100
# A multiprocessor of an H100, per cycle: instructions issued, multiply-adds of tensor cores, bytes from the L2 cache.
ISSUED, MULTIPLIED, LOADED = 4, {"fp32": 1024, "fp16": 2048, "bf16": 2048, "int8": 4096}, 64
PRODUCTS = {"fp32": 3, "int8": 2}  # of tensor cores, for each of the formula
KEY_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
HIDDEN = 0.1  # share of the other two units' cycles that isn't hidden behind the slowest's


def candidates(path: str, precision: str, load: str) -> Iterator[Config]:
    """The grid of one path: tile shapes, warps and stages within reason; the compiler refuses what doesn't fit."""
    rows, columns = ((16, 32), (32, 64, 128)) if load == "few" else ((64, 128), (64, 128, 256))
    channels = (32,) if path == "affine" or precision == "fp32" else (64, 128)
    # The swap is for tiles of few queries, and for int8 keys with values: Hopper reads operands from registers on the
    # longer side alone, and int8 keys are converted there.
    swaps = (False, True) if path in ("affine", "dense") and (load == "few" or precision == "int8") else (False,)
    programs = (1, 2) if path.endswith("-tma") else (1,)
    for block_b, block_n, block_d, warps, stages, swap in itertools.product(
        rows, columns, channels, (4, 8), (3, 4), swaps
    ):
        accumulators = block_b * block_n // (32 * warps)
        if not 4 <= accumulators <= 128:
            continue  # idle warps, or more accumulators than registers
        for block_v, count in itertools.product((64, 128) if path == "dense" else (64,), programs):
            yield Config(block_b, block_n, block_d, warps, stages, swap, block_v=block_v, programs=count)


def kernel_of(path: str, load: str) -> str:
    """The kernel's name in kernels.aot."""
    if path in ("affine", "dense"):
        return f"{path}/{load}"
    if path == "few":
        return path
    return f"{path.removesuffix('-tma')}/{'tma' if path.endswith('-tma') else 'pointers'}"


def cycles(row: dict[str, Any], precision: str, load: str) -> float:
    """Cycles of a multiprocessor per key, the geometric mean over BATCHES: those of the slowest of issuing, multiplying
    and loading a tile, and HIDDEN of the others'.

    `row` is that of aot.compile_config. A tile of B queries takes ceil(batch / B) turns per key.
    """
    queries, keys, width, warps = row["tile"]
    units = (
        row["instructions"]["all"] * warps / ISSUED,
        queries * keys * width * PRODUCTS.get(precision, 1) / MULTIPLIED[precision],
        (queries + keys) * width * KEY_BYTES[precision] / LOADED,
    )
    tile = (1 - HIDDEN) * max(units) + HIDDEN * sum(units)
    turns = [math.ceil(batch / queries) for batch in BATCHES[load]]
    return float(math.prod(turns) ** (1 / len(turns)) * tile / keys)


def rank(path: str, precision: str, load: str) -> list[Config]:
    """The best of candidates(): SHAPES tiles with the most stages that fit, then the best two's other variants."""
    from iosr_fast.kernels.aot import compile_config

    ranked: list[tuple[float, list[Config]]] = []
    variants: dict[Config, list[Config]] = {}
    for config in candidates(path, precision, load):
        variants.setdefault(replace(config, num_stages=1, programs=1), []).append(config)
    for group in variants.values():
        group.sort(key=lambda config: (config.programs, -config.num_stages))
        try:
            row = compile_config(ARCHITECTURE, kernel_of(path, load), precision, group[0])
        except Exception as error:  # what Triton and its assembler raise for tiles that they can't compile
            print(f"  {group[0]}: {type(error).__name__}")
            continue
        stage = row["shared_bytes"] / group[0].num_stages
        fitting = [config for config in group if stage * config.num_stages <= SHARED_BYTES]
        if row["spills"] or not fitting:
            continue
        ranked.append((cycles(row, precision, load), fitting))
    groups = [group for _, group in sorted(ranked, key=lambda pair: pair[0])]
    first = [group[0] for group in groups[:SHAPES]]
    others = [
        config for pair in itertools.zip_longest(*(group[1:] for group in groups[:2])) for config in pair if config
    ]
    return (first + others)[:MOST]


def main() -> None:
    """Compile the grid of each case for an H100 and write the best six of each."""
    ranks: dict[str, Any] = {}
    for path, precision, load in TUNED:
        best = rank(path, precision, load)
        print(f"{path} {precision} {load}:", *best, sep="\n  ", flush=True)
        ranks.setdefault(path, {}).setdefault(precision, {})[load] = [asdict(config) for config in best]
        # A configuration a line.
        text = re.sub(
            r'\{\s+("block_b"[^}]*?)\s+\}',
            lambda match: f"{{{' '.join(match[1].split())}}}",
            json.dumps(ranks, indent=1),
        )
        CANDIDATES_FILE.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    command.run(main)
