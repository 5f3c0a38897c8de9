"""The fused encoder against two passes: eager, and recorded as CUDA graphs; images/s, and the share of the GEMM rate.

fused, two-pass          launched kernel by kernel
fused-graph, two-pass-graph  recorded once, launched as one

share_of_ceiling is the FLOP that each one does / its time / the fp16 GEMM rate of this minute (model FLOP utilisation).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from tools.bench import harness
from tools.bench.encoder import fused_flops
from tools.gpu import device as gpu
from tools.gpu.ceiling import gemm_flops
from tools.gpu.models import WITHOUT_OPEN_CLIP, Models, make, two_pass_flops
from tools.gpu.report import Report, Setting

CASES = {"ViT-B-16": (64, 256), "ViT-B-32": (64, 256)}
TINY = {"demo": (5,)}
RIVALS = ("two-pass", "two-pass-graph")


def candidates(models: Models, pixels: torch.Tensor, device: str, report: Report) -> dict[str, gpu.Run]:
    """Both forms, eager and (on a GPU) as graphs; each gives (plain, adapted) on the device."""
    modules = {"fused": models.fused, "two-pass": models.two}
    runs: dict[str, gpu.Run] = {}
    for name, module in modules.items():
        if module is None:
            continue
        runs[name] = partial(module, pixels)
        with torch.inference_mode():
            graph = gpu.recorded(runs[name], f"{name} of {models.name}", device, report)
        if graph is not None:
            runs[f"{name}-graph"] = graph
    return {name: gpu.synced(run, device) for name, run in runs.items()}


def time_rows(
    bench: str,
    models: Models,
    batch: int,
    runs: Mapping[str, gpu.Run],
    setting: Setting,
    repeats: int = 20,
    extra: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Verify, then time, interleaved. Raises ArithmeticError for a wrong one, before anything is timed."""
    device, shapes = setting.device, models.fused.shapes
    cosines = {name: models.verify(name, run()) for name, run in runs.items()}
    flops = {name: (two_pass_flops if name.startswith("two-pass") else fused_flops)(shapes, batch) for name in runs}
    before = gemm_flops("fp16", device)
    times = harness.measure(runs, 2 if setting.tiny else repeats, warmup=1 if setting.tiny else 5)
    # A clock that rose or fell meanwhile would give a share of another ceiling.
    ceiling = max(before, gemm_flops("fp16", device))
    notes = {
        name: {
            "images_per_s": round(batch / (statistics.median(taken) * 1e-3), 1),
            "min_cosine": round(cosines[name], 6),
            "verified_against": models.verified_against,
            "cuda": torch.version.cuda,
            **(extra or {}).get(name, {}),
        }
        for name, taken in times.items()
    }
    return harness.rows(
        bench,
        f"{models.case}-b{batch}",
        times,
        rivals=[name for name in ("fused-graph", *RIVALS) if name in runs],
        threads=1,
        precision="fp16",
        flops=flops,
        ceiling_flops=ceiling,
        packages=("numpy", "torch", "triton", "tensorrt", "tensorrt_rtx"),
        device=gpu.name_of(device),
        extra=notes,
    )


def run(report: Report, setting: Setting) -> None:
    cases = TINY if setting.tiny else CASES
    report.plan(*(f"{name} in batches of {batch}" for name, batches in cases.items() for batch in batches))
    if gpu.make_recorder(setting.device) is None:
        report.skip(f"CUDA graphs: a {setting.device} has none")
    for name, batches in cases.items():
        models = make(name, setting.device)
        if models.two is None:
            report.skip(f"two passes of {name}: {WITHOUT_OPEN_CLIP}")
        for batch in batches:
            case = f"{name} in batches of {batch}"
            if not report.reaches(case, setting, 0 if setting.tiny else 12):
                continue
            try:
                runs = candidates(models, models.batch(batch, setting.device), setting.device, report)
                report.add_rows(time_rows("gpu-encoder", models, batch, runs, setting))
            except torch.cuda.OutOfMemoryError as error:
                report.skip(f"{case}: {str(error).splitlines()[0]}")
            except ArithmeticError as error:
                report.fail(str(error))
            report.done(case)
