"""torch.compile of the fused encoder and of two passes.

Compiling takes what time it takes and can't be interrupted; the process is killed at its limit, and each case is
noted as soon as it is timed.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from tools.gpu import device as gpu
from tools.gpu.encoder import candidates, time_rows
from tools.gpu.models import WITHOUT_OPEN_CLIP, Models, make
from tools.gpu.report import Report, Setting

# What is worth most first: each is a compilation of its own. reduce-overhead records CUDA graphs, too, and takes
# cuBLAS's products; max-autotune tries kernels for each product, which takes minutes the first time.
MODES = ("reduce-overhead", "max-autotune")
CASES = [("ViT-B-16", 64, kind, mode) for mode in MODES for kind in ("fused", "two-pass")]
CASES += [("ViT-B-16", 256, "fused", "max-autotune"), ("ViT-B-32", 64, "fused", "max-autotune")]
TINY = [("demo", 5, kind, mode) for mode in MODES for kind in ("fused", "two-pass")]


def compiled(module: Any, pixels: torch.Tensor, device: str, mode: str) -> tuple[gpu.Run, float]:
    """`module` compiled for this batch and run once, and the seconds that this took."""
    started = time.monotonic()
    function = gpu.compile_module(module, mode)

    def run() -> tuple[torch.Tensor, ...]:
        # Each call of a graph that inductor recorded writes over what the last one gave.
        if device == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        return tuple(function(pixels))

    call = gpu.synced(run, device)
    call()
    return call, round(time.monotonic() - started, 1)


def run(report: Report, setting: Setting) -> None:
    cases = TINY if setting.tiny else CASES
    report.plan(*(label(*case) for case in cases))
    models: Models | None = None
    kept: dict[tuple[str, int], dict[str, tuple[gpu.Run, float]]] = {}
    for name, batch, kind, mode in cases:
        case, impl = label(name, batch, kind, mode), f"{kind}-{mode}"
        if models is None or models.name != name:
            models = make(name, setting.device)
        module = models.fused if kind == "fused" else models.two
        pixels, found = models.batch(batch, setting.device), kept.setdefault((name, batch), {})
        if module is None:
            report.skip(f"{case}: {WITHOUT_OPEN_CLIP}")
            report.done(case)
            continue
        try:
            made = compiled(module, pixels, setting.device, mode)
            models.verify(impl, made[0]())
            found[impl] = made
        except ArithmeticError as error:
            report.fail(str(error))
        except Exception as error:  # the compiler raises what it likes
            report.skip(f"{case}: {type(error).__name__}: {str(error).strip()[:400]}")
        if impl in found:
            runs = candidates(models, pixels, setting.device, report)
            runs |= {key: call for key, (call, _) in found.items()}
            notes = {key: {"compile_seconds": seconds} for key, (_, seconds) in found.items()}
            rows = time_rows("gpu-encoder-compiled", models, batch, runs, setting, extra=notes)
            # The rows of a case that is timed again, with one more in it, take the place of the first ones.
            report.rows = [row for row in report.rows if row["case"] != rows[0]["case"]]
            report.add_rows(rows)
        report.done(case)


def label(name: str, batch: int, kind: str, mode: str) -> str:
    return f"torch.compile ({mode}) of {kind}, {name} in batches of {batch}"
