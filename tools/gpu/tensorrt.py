"""TensorRT and TensorRT-RTX, where one is installed and fits this GPU: plans of the fp16 graph, checked, then timed
against the same encoder as PyTorch's CUDA graph; large batches on the device, single pictures from host memory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from iosr_fast.clip.dual_encoder import DualEncoder
from iosr_fast.encoders.runtimes.batched import BatchedEncoder
from iosr_fast.encoders.runtimes.engine import unavailable_reason
from iosr_fast.encoders.runtimes.tensorrt import EXTRAS, TensorRTEncoder, build_plan, target
from iosr_fast.export.export import export_onnx
from iosr_fast.scoring.graphed_scorer import GraphedScorer
from tools.gpu import device as gpu
from tools.gpu import latency
from tools.gpu.encoder import candidates, time_rows
from tools.gpu.models import Models, make
from tools.gpu.report import Report, Setting

CASES = (("ViT-B-16", (64, 256)), ("ViT-B-32", (64, 256)))
TINY = (("demo", (5,)),)


def run(report: Report, setting: Setting) -> None:
    cases = TINY if setting.tiny else CASES
    runtimes = []
    for runtime in EXTRAS:
        refused = unavailable_reason(runtime)
        if refused is None:
            runtimes.append(runtime)
        else:
            report.skip(f"{runtime}: {refused}")
    report.plan(*(f"{runtime} with {name}" for name, _ in cases for runtime in runtimes))
    for name, batches in cases:
        wanted = [f"{runtime} with {name}" for runtime in runtimes]
        wanted = [case for case in wanted if report.reaches(case, setting, 0 if setting.tiny else 50)]
        if not wanted:
            continue
        models = make(name, setting.device)
        folder = setting.work / f"onnx-{name}"
        folder.mkdir(exist_ok=True)
        started = time.monotonic()
        export_onnx(on_cpu(models), folder / "encoder.onnx")
        report.fact(**{f"export_seconds_{name}": round(time.monotonic() - started, 1)})
        for runtime in (case.split()[0] for case in wanted):
            try:
                throughput(runtime, models, folder, batches, setting, report)
                single(runtime, models, folder, setting, report)
            except (ArithmeticError, RuntimeError) as error:  # also what its parser and builder refuse
                report.fail(f"{runtime} with {name}: {error}")
            report.done(f"{runtime} with {name}")


def on_cpu(models: Models) -> DualEncoder:
    """The fused encoder once more, for the exporter."""
    encoder = DualEncoder.from_config(models.fused.config)
    encoder.load_state_dict(models.fused.state_dict())
    return encoder


def open_plan(runtime: str, models: Models, folder: Path, buckets: tuple[int, ...], report: Report) -> BatchedEncoder:
    """Build a plan for batches up to the largest of `buckets`, open it, warm it up."""
    facts = latency.manifest(models, max(buckets))
    here = target(runtime)
    plan, built = build_plan(folder / "encoder.onnx", runtime, max(buckets))
    path = folder / f"b{max(buckets)}" / here.file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(plan)
    facts["plans"][here.file] = {**here.facts(), **built}
    report.add_table("plans", [{"model": models.name, **here.facts(), **built}])
    encoder = TensorRTEncoder(folder / f"b{max(buckets)}", facts, runtime, buckets)
    encoder.warm()
    return encoder


def throughput(
    runtime: str, models: Models, folder: Path, batches: tuple[int, ...], setting: Setting, report: Report
) -> None:
    encoder = open_plan(runtime, models, folder, batches, report)
    if missing := [batch for batch in batches if not recorded(encoder, batch)]:
        report.skip(f"{runtime} under CUDA graphs in batches of {missing}: none was recorded")
    for batch in batches:
        pixels = models.batch(batch, setting.device)
        runs = {
            name: run for name, run in candidates(models, pixels, setting.device, report).items() if name != "two-pass"
        }
        runs[runtime] = gpu.synced(on_device(encoder, pixels, setting.device), setting.device)
        report.add_rows(time_rows("gpu-encoder-tensorrt", models, batch, runs, setting))


def single(runtime: str, models: Models, folder: Path, setting: Setting, report: Report) -> None:
    encoder, plan = open_plan(runtime, models, folder, (1,), report), latency.make_plan(models)
    with torch.inference_mode():
        runs = latency.candidates(models, plan, setting, report)
    recorder = gpu.make_recorder(setting.device)
    if recorder is not None:
        runs[runtime] = latency.classifier(encoder, GraphedScorer(plan, (1,), device=setting.device, recorder=recorder))
    good = latency.verify(runs, latency.pictures(models), report)
    report.add_rows(latency.time_rows(f"{models.case}-{runtime}", good, models, setting))


def recorded(encoder: Any, batch: int) -> bool:
    return batch in encoder._replay


def on_device(encoder: Any, pixels: torch.Tensor, device: str) -> gpu.Run:
    """A TensorRTEncoder's launch of this batch, from its pixels on the device to its results there: its `encode` copies
    both ways, which the others are not timed with."""
    batch = len(pixels)
    encoder._pixels[:batch].copy_(pixels)
    gpu.synchronise(device)

    def run() -> list[torch.Tensor]:
        with torch.cuda.stream(encoder._stream):
            encoder._replay[batch]() if batch in encoder._replay else encoder._launch(batch)
        return [result[:batch] for result in encoder._results]

    return run
