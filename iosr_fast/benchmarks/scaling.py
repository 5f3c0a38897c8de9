"""How time grows: the encoder with its batch, scoring with classes, keys and queries. The data of the plots.

scaling-encoder  both embeddings of 1 to 64 pictures, fused in ONNX Runtime and OpenVINO, and two passes in ONNX Runtime
scaling-score    64 queries x 16,000 keys x 1,000 classes, 512 channels, with one of the three varied at a time
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.benchmarks import encoder, harness, score
from iosr_fast.benchmarks import encoder_rivals as rivals
from iosr_fast.clip.fuse import build_dual_encoder
from iosr_fast.clip.load import load_clip
from iosr_fast.export.export import random_adapter
from iosr_fast.utils.machine import usable_threads

IMPLEMENTATIONS = (score.PUBLIC, "eager-best", "papers-formula")  # beside those of the C++ kernel


def score_cases(queries: Sequence[int], keys: Sequence[int], classes: Sequence[int]) -> list[str]:
    """Each case once, though two of the sizes may share one."""
    cases = [
        *(f"q{q}-k16000-d512-c1000" for q in queries),
        *(f"q64-k{k}-d512-c1000" for k in keys),
        *(f"q64-k16000-d512-c{c}" for c in classes),
    ]
    return list(dict.fromkeys(cases))


BATCHES = (1, 2, 4, 8, 16, 32, 64)
ENCODERS = (("ViT-B-32", 8, BATCHES), ("demo", 3, BATCHES))  # models, their first adapted blocks and batches
QUERIES, KEYS = (1, 8, 64, 256, 1024), (1000, 4000, 16_000, 64_000, 256_000, 1_000_000)
CLASSES = (10, 100, 1000, 10_000)


def run(threads: int | None = None, repeats: int = 5, quick: bool = False) -> list[dict[str, Any]]:
    """Both kinds of rows, verified and timed."""
    threads = threads or usable_threads()
    models = (("demo", 3, (1, 2)),) if quick else ENCODERS
    cases = score_cases((1, 2), (1000,), (10,)) if quick else score_cases(QUERIES, KEYS, CLASSES)
    rows: list[dict[str, Any]] = []
    for model, first, batches in models:
        rows += encoders(model, first, batches, threads, repeats)
    return rows + scoring(cases, threads, repeats)


def encoders(model: str, first: int, batches: Sequence[int], threads: int, repeats: int) -> list[dict[str, Any]]:
    clip = load_clip(model, None if model == "demo" else "none")
    adapter = random_adapter(clip, first)
    size = clip.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (max(batches), size, size, 3), dtype=np.uint8)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name, harness.torch_threads(threads):
        folder = Path(name)
        truth = rivals.eagerly(clip, adapter, pixels)()
        fused = rivals.write(build_dual_encoder(clip, adapter), folder / "fused.onnx")
        passes = rivals.write_passes(clip, adapter, folder)
        for batch in batches:
            few = pixels[:batch]
            runs = {
                f"onnxruntime-s{first}": rivals.in_onnxruntime(fused, few, threads),
                f"onnxruntime-two-pass-s{first}": rivals.both(
                    *(rivals.in_onnxruntime(path, few, threads, spin=False) for path in passes)
                ),
            }
            if find_spec("openvino") is not None:
                runs[f"openvino-s{first}"] = rivals.in_openvino(fused, few, threads)
            encoder.verify(runs, {first: tuple(embeddings[:batch] for embeddings in truth)})
            rows += harness.rows(
                "scaling-encoder",
                f"{model.lower()}-b{batch}-s{first}",
                harness.measure(runs, repeats),
                rivals=[f"onnxruntime-two-pass-s{first}"],
                threads=threads,
                work=batch,
                rate_unit="images/s",
                packages=("onnxruntime", "openvino", "torch", "open_clip_torch"),
            )
    return rows


def scoring(cases: Sequence[str], threads: int, repeats: int) -> list[dict[str, Any]]:
    rows = score.run(
        cases,
        threads,
        repeats,
        wanted=lambda name: name in IMPLEMENTATIONS or name.partition("/")[0] == "cpp",
    )
    return [row | {"bench": "scaling-score"} for row in rows]
