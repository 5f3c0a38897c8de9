"""The demo's classifier from pixels to labels: uint8 pictures of its size, both embeddings, the scores, the label.

    iosr_fast        Classifier.predict: the fused encoder in ONNX Runtime, the compiled kernel
    two-pass         the plain and the adapted encoder, each exported, in the same ONNX Runtime, and the papers' formula
                     in PyTorch
    eager-two-pass   the public way: open_clip's own forward, then the forward with the adapter, in eager PyTorch, and
                     the papers' formula

100 held-out concepts with 4 pictures each, tip-adapter++. Labels are compared before anything is timed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from iosr_fast.benchmarks import harness
from iosr_fast.benchmarks.encoder_rivals import Embed, both, eagerly, in_onnxruntime, write_passes
from iosr_fast.benchmarks.pipeline import PapersFormula, verify_labels
from iosr_fast.classifier import Classifier
from iosr_fast.clip.adapter import load_adapter
from iosr_fast.clip.load import load_clip
from iosr_fast.evaluation.demo_bundle import held_out_queries, make_demo_bundle
from iosr_fast.export.pretrained import DEMO_ADAPTER
from iosr_fast.utils.machine import usable_threads

RIVALS = ("eager-two-pass", "two-pass")
BATCHES = (1, 8, 64)
CLASSES, SHOTS = 100, 4
CALLS = 200  # of one picture, for percentiles
Label = Callable[[], np.ndarray]


def candidates(classifier: Classifier, pixels: np.ndarray, threads: int, folder: Path) -> dict[str, Label]:
    """What is timed: `pixels` (B, S, S, 3) to class numbers (B,), on the demo's CLIP and its shipped adapter."""
    clip, adapter = load_clip("demo", None), load_adapter(DEMO_ADAPTER)
    formula = PapersFormula(classifier.plan_)
    numbers = {name: number for number, name in enumerate(classifier.snapshot().class_names)}

    @torch.inference_mode()
    def by_formula(embed: Embed) -> np.ndarray:
        plain, adapted = (torch.from_numpy(part) for part in embed())
        labels: np.ndarray = formula(plain, adapted).argmax(1).numpy()
        return labels

    files = write_passes(clip, adapter, folder)
    two_passes = both(*(in_onnxruntime(file, pixels, threads, spin=False) for file in files))
    eager = eagerly(clip, adapter, pixels)
    return {
        "iosr_fast": lambda: np.array([numbers[name] for name in classifier.predict(pixels).tolist()]),
        "two-pass": lambda: by_formula(two_passes),
        "eager-two-pass": lambda: by_formula(eager),
    }


def percentiles(runs: Mapping[str, Label], calls: int = CALLS, block: int = 20) -> dict[str, dict[str, Any]]:
    """Milliseconds of single calls, in blocks that take turns, so that a slow spell meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    while min(map(len, times.values())) < calls:
        for name, run in runs.items():
            time.sleep(harness.PAUSE_S)
            run()
            for _ in range(block):
                start = time.perf_counter()
                run()
                times[name].append((time.perf_counter() - start) * 1e3)
    return {
        name: {"calls": len(each), **{f"p{q}_ms": round(float(np.percentile(each, q)), 4) for q in (50, 99)}}
        for name, each in times.items()
    }


def run(threads: int | None = None, repeats: int = 7) -> list[dict[str, Any]]:
    """Verify and time each batch size, interleaved; one row an implementation and a size, in pictures/s.

    Rows of one picture have p50_ms and p99_ms of CALLS calls each, too.
    """
    threads = threads or usable_threads()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name, harness.torch_threads(threads):
        folder = Path(name)
        bundle = make_demo_bundle(folder / "bundle", CLASSES, SHOTS, "tip-adapter++")
        classifier = Classifier.load(bundle, runtime="onnxruntime", threads=threads)
        queries, _ = held_out_queries(CLASSES, SHOTS)
        for batch in BATCHES:
            runs = candidates(classifier, queries[:batch], threads, folder)
            checked = candidates(classifier, queries, threads, folder) if batch == 1 else runs
            verify_labels({name: run() for name, run in checked.items()}, "eager-two-pass")
            runtimes_ms = harness.measure(runs, repeats)
            latencies = percentiles(runs) if batch == 1 else {}
            rows += harness.rows(
                "classifier",
                f"demo-b{batch}",
                runtimes_ms,
                rivals=RIVALS,
                threads=threads,
                work=batch,
                rate_unit="images/s",
                packages=("onnxruntime", "torch", "open_clip_torch"),
                extra={impl: {"images": batch, **latencies.get(impl, {})} for impl in runs},
            )
    return rows
