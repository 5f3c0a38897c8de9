"""tools/bench/score on the device, case by case, with the GEMM rate of this minute as the ceiling; and, for few
queries, our kernels with float16 keys as CUDA graphs.

Of what is wrong, ours makes the part fail; a rival is left out and named.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.scoring.graphed_scorer import GraphedScorer
from tools.bench import harness
from tools.bench import score as bench
from tools.gpu import device as gpu
from tools.gpu.ceiling import gemm_flops
from tools.gpu.report import Report, Setting

TINY = ("q2-k64-d32-c4",)
GRAPHED_QUERIES = 64  # above, kernels take longer than their launches
LARGE_KEYS, LARGE_MEMORY, LARGE_S = 500_000, 16e9, 40
PRODUCT = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "int8": "fp16"}  # int8 keys are multiplied in float16


def run(report: Report, setting: Setting) -> None:
    cases = TINY if setting.tiny else bench.DEFAULT_CASES
    report.plan(*(f"scoring {text}" for text in cases))
    for text in cases:
        case = bench.Case.parse(text)
        if (why := too_large(case, setting)) is not None:
            report.skip(f"scoring {text}: {why}")
        else:
            try:
                report.add_rows(time_case(case, text, setting, report))
            except torch.cuda.OutOfMemoryError as error:
                report.skip(f"scoring {text}: {str(error).splitlines()[0]}")
        report.done(f"scoring {text}")


def too_large(case: bench.Case, setting: Setting) -> str | None:
    """Why a case of a million keys is left out here, or None."""
    if case.keys < LARGE_KEYS:
        return None
    if setting.left() < LARGE_S:
        return f"{setting.left():.0f} s are left of the part's time, and making its keys takes {LARGE_S}"
    memory = torch.cuda.get_device_properties(0).total_memory if setting.device == "cuda" else LARGE_MEMORY
    if memory < LARGE_MEMORY:
        return f"it takes {LARGE_MEMORY / 1e9:.0f} GB, and the GPU has {memory / 1e9:.0f}"
    return None


def time_case(case: bench.Case, text: str, setting: Setting, report: Report) -> list[dict[str, Any]]:
    device = setting.device
    plan, embeddings = case.build()
    ours, rivals = bench.ours(plan, embeddings, device), bench.rivals(plan, embeddings, device)
    if case.queries <= GRAPHED_QUERIES:
        halves = {name: candidate for name, candidate in ours.items() if candidate.precision == "fp16"}
        ours |= graphed(halves, embeddings, device, report)
    if "papers-formula" not in rivals:
        report.skip(f"papers-formula in {text}: its one-hot matrix and affinity would take too much memory")
    runs: dict[str, bench.Candidate] = {}
    for name, candidate in {**ours, **rivals}.items():
        try:
            if candidate.verified:
                bench.verify(name, candidate, embeddings, device)
            runs[name] = candidate
        except ArithmeticError as error:
            (report.fail if name in ours else report.skip)(f"{text}: {error}")
    times = harness.measure(
        {name: gpu.synced(candidate.call, device) for name, candidate in runs.items()}, 2 if setting.tiny else 10
    )
    flops = {name: case.flops if candidate.verified else case.product_flops for name, candidate in runs.items()}
    kinds = {name: PRODUCT[candidate.precision] for name, candidate in runs.items()}
    ceilings = {kind: gemm_flops(kind, device) / 1e9 for kind in set(kinds.values())}
    return harness.rows(
        "gpu-score",
        text,
        times,
        rivals=[name for name in bench.RIVALS if name in runs],
        threads=1,
        precision={name: candidate.precision for name, candidate in runs.items()},
        rates={name: flops[name] / (statistics.median(taken) * 1e-3) / 1e9 for name, taken in times.items()},
        rate_unit="GFLOP/s",
        ceiling={name: ceilings[kind] for name, kind in kinds.items()},
        packages=("numpy", "torch", "triton"),
        device=gpu.name_of(device),
        extra=gpu.extra_of(times),
    )


def graphed(
    ours: Mapping[str, bench.Candidate], embeddings: Embeddings, device: str, report: Report
) -> dict[str, bench.Candidate]:
    """Each of ours again, as GraphedScorer launches it, from and to the device's memory; none where there are no
    graphs."""
    found: dict[str, bench.Candidate] = {}
    rows = [torch.tensor(part).to(device) for part in (embeddings.plain, embeddings.adapted)]
    for name, candidate in ours.items():
        recorder = gpu.make_recorder(device)
        if recorder is None:
            break
        impl = name.split(":")[0].split("/")[0]
        try:
            scorer = GraphedScorer(candidate.plan, (len(embeddings),), impl, device, recorder)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            report.fail(f"{name} can't be recorded as a CUDA graph: {str(error).splitlines()[0]}")
            continue
        found[f"{name}:graph"] = bench.Candidate(
            partial(scorer, Embeddings(*rows)), candidate.plan, candidate.precision
        )
    return found
