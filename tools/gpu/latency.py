"""One picture at a time, from its bytes in host memory to its label: median and 99th percentile of single calls.

eager        the fused encoder and the scoring kernels, launched one by one
graphs       TorchEncoder's graph of a batch of one, then GraphedScorer: what iosr_fast serves with on a GPU
graph-cpu    the same encoder, scored by the CPU's kernels: what Classifier does by itself
one-graph    encoder and scoring recorded as one
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from time import perf_counter
from typing import Any

import numpy as np
import torch

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.encoders.runtimes.batched import BatchedEncoder
from iosr_fast.encoders.runtimes.torch import FILE, TorchEncoder
from iosr_fast.scoring.graphed_scorer import GraphedScorer
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.score import score
from tools.bench import harness
from tools.bench.score import Case
from tools.gpu import device as gpu
from tools.gpu.models import Models, make
from tools.gpu.report import Report, Setting

CALLS, BLOCK = 500, 50
KEYS, CLASSES = 1600, 100
TOLERANCE = 4e-3  # of the largest logit: half precision, in another order
Logits = Callable[[np.ndarray], np.ndarray]


def manifest(models: Models, max_batch: int) -> dict[str, Any]:
    """What runtimes read of an engine's manifest."""
    shapes = models.fused.shapes
    return {
        "model": models.name,
        "image_size": shapes.image_size,
        "width": shapes.embedding_width,
        "fingerprint": hashlib.sha256(models.name.encode()).hexdigest(),
        "precision": shapes.precision,
        "max_batch": max_batch,
        "first_adapted_block": shapes.first_adapted_block,
        "dual_encoder": asdict(shapes),
        "plans": {},
        "files": {},
    }


def make_plan(models: Models) -> ScoringPlan:
    """Tip-Adapter++ of 100 classes with 16 keys each, in float16."""
    return Case(1, KEYS, models.fused.shapes.embedding_width, CLASSES).build()[0].with_key_precision("fp16")


def candidates(models: Models, plan: ScoringPlan, setting: Setting, report: Report) -> dict[str, Logits]:
    """Each takes uint8 (1, S, S, 3) and gives logits (1, C) in host memory."""
    device = setting.device

    def eager(pixels: np.ndarray) -> np.ndarray:
        found: np.ndarray = whole_way(models, plan, torch.from_numpy(pixels).to(device)).cpu().numpy()
        return found

    runs: dict[str, Logits] = {"eager": eager}
    if gpu.make_recorder(device) is None:
        report.skip(f"latency under CUDA graphs: a {device} has none")
        return runs
    still = torch.zeros(models.pixels[:1].shape, dtype=torch.uint8, device=device)
    whole = partial(whole_way, models, plan, still)
    replay = gpu.recorded(whole, f"{models.name} with its scoring", device, report)
    if replay is not None:
        runs["one-graph"] = partial(replayed, still, replay)
    if find_spec("safetensors") is None:
        report.skip("latency of TorchEncoder: safetensors is not installed")
        return runs
    encoder = open_torch(models, setting)
    if encoder.buckets is not None and 1 not in encoder._replay:
        report.fail(f"TorchEncoder recorded no CUDA graph of {models.name}")
    runs["graphs"] = classifier(encoder, GraphedScorer(plan, (1,), device=device, recorder=gpu.make_recorder(device)))
    runs["graph-cpu"] = classifier(encoder, lambda embeddings: score(plan, embeddings, check=False))
    return runs


def whole_way(models: Models, plan: ScoringPlan, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels on the device to logits there."""
    logits: torch.Tensor = score(plan, Embeddings(*models.fused(pixels)), check=False)
    return logits


def replayed(still: torch.Tensor, replay: gpu.Run, pixels: np.ndarray) -> np.ndarray:
    """Pixels to logits, both in host memory, by a graph that reads `still`."""
    still.copy_(torch.from_numpy(pixels))
    logits: np.ndarray = replay().cpu().numpy()
    return logits


def open_torch(models: Models, setting: Setting) -> TorchEncoder:
    """TorchEncoder for batches of one, recorded."""
    from safetensors.torch import save_file

    folder = setting.work / f"torch-{models.name}"
    folder.mkdir(exist_ok=True)
    save_file({name: value.cpu() for name, value in models.fused.state_dict().items()}, folder / FILE)
    encoder = TorchEncoder(folder, manifest(models, 1), device=setting.device)
    encoder.warm()
    return encoder


def classifier(encoder: BatchedEncoder, scorer: Callable[[Embeddings], Any]) -> Logits:
    return lambda pixels: np.asarray(scorer(encoder.encode(pixels)))


def pictures(models: Models) -> list[np.ndarray]:
    """So unlike each other that an answer for the wrong one is seen: black, white, noise."""
    shape = models.pixels[:1].shape
    return [np.zeros(shape, np.uint8), np.full(shape, 255, np.uint8), models.pixels[:1].copy()]


@torch.inference_mode()
def verify(runs: Mapping[str, Logits], shown: list[np.ndarray], report: Report) -> dict[str, Logits]:
    """Those that give the logits of the first, eager one, for each picture in turn; the others are noted as wrong."""
    truth = [runs["eager"](picture) for picture in shown]
    largest = max(float(np.abs(logits).max()) for logits in truth)
    apart = min(float(np.abs(truth[i] - truth[i - 1]).max()) for i in range(len(truth)))
    report.fact(largest_logit=largest, pictures_apart=apart / largest)
    good = {}
    for name, run in runs.items():
        error = max(float(np.abs(run(shown[i]) - truth[i]).max()) for i in (0, 1, 2, 1, 0)) / largest
        if error <= TOLERANCE:
            good[name] = run
        else:
            report.fail(f"{name} is off by {error:.2g} of the largest logit (allowed: {TOLERANCE}); not timed")
    return good


@torch.inference_mode()
def single_calls_ms(runs: Mapping[str, Logits], picture: np.ndarray, calls: int, block: int) -> dict[str, list[float]]:
    """Milliseconds of every call, in blocks by turns: what comes before each is a call of its own kind. The label is
    read on the host, which waits for the device."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(max(1, calls // block)):
        for name, run in runs.items():
            for _ in range(3):
                run(picture)
            for _ in range(block):
                started = perf_counter()
                int(run(picture).argmax())
                taken[name].append((perf_counter() - started) * 1e3)
    return taken


def time_rows(name: str, runs: Mapping[str, Logits], models: Models, setting: Setting) -> list[dict[str, Any]]:
    calls, block = (4, 2) if setting.tiny else (CALLS, BLOCK)
    taken = single_calls_ms(runs, models.pixels[:1].copy(), calls, block)
    extra = {
        impl: {
            "p50_ms": round(float(np.percentile(times, 50)), 4),
            "p99_ms": round(float(np.percentile(times, 99)), 4),
            "calls": len(times),
            "cuda": torch.version.cuda,
        }
        for impl, times in taken.items()
    }
    return harness.rows(
        "gpu-latency",
        f"{name}-b1-k{KEYS}-c{CLASSES}",
        taken,
        rivals=["eager"],
        threads=1,
        precision="fp16",
        packages=("numpy", "torch", "triton", "tensorrt", "tensorrt_rtx"),
        device=gpu.name_of(setting.device),
        extra=extra,
    )


def run(report: Report, setting: Setting) -> None:
    names = ("demo",) if setting.tiny else ("ViT-B-16", "ViT-B-32")
    report.plan(*(f"latency of {name}" for name in names))
    for name in names:
        if not report.reaches(f"latency of {name}", setting, 0 if setting.tiny else 15):
            continue
        models = make(name, setting.device)
        with torch.inference_mode():
            runs = candidates(models, make_plan(models), setting, report)
        good = verify(runs, pictures(models), report)
        report.add_rows(time_rows(models.case, good, models, setting))
        report.done(f"latency of {name}")
