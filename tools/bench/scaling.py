"""How time grows: the encoder with its batch, scoring with classes, keys and queries. What the plots are drawn from.

scaling-encoder  both embeddings of 1 to 64 pictures, fused in ONNX Runtime and OpenVINO, and two passes in ONNX Runtime
scaling-score    64 queries x 16,000 keys x 1,000 classes, 512 channels, with one of the three varied at a time
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.info import usable_threads
from iosr_fast.offline.clip import load_clip
from iosr_fast.offline.dual_encoder import build_dual_encoder
from iosr_fast.offline.export import random_adapter
from tools.bench import encoder, encoder_rivals, harness, score

# Model, first adapted block, batches.
ENCODERS = (("ViT-B-32", 8, (1, 2, 4, 8, 16, 32)), ("demo", 3, (1, 2, 4, 8, 16, 32, 64)))
QUERIES, KEYS, CLASSES = (1, 8, 64, 256, 1024), (1000, 4000, 16000, 64000, 256000), (10, 100, 1000, 10000)
IMPLEMENTATIONS = ("eager-best", "papers-formula")  # beside ours


def run(threads: int | None = None, repeats: int = 5) -> list[dict[str, Any]]:
    """Both kinds of rows, verified and timed."""
    threads = threads or usable_threads()
    made = [row for model, first, batches in ENCODERS for row in encoders(model, first, batches, threads, repeats)]
    return made + scoring(threads, repeats)


def encoders(model: str, first: int, batches: Sequence[int], threads: int, repeats: int) -> list[dict[str, Any]]:
    clip = load_clip(model, None if model == "demo" else "none")
    adapter = random_adapter(clip, first)
    size = clip.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (max(batches), size, size, 3), dtype=np.uint8)
    made: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name, harness.torch_threads(threads):
        folder = Path(name)
        truth = encoder_rivals.eagerly(clip, adapter, pixels)()
        fused = encoder_rivals.write(build_dual_encoder(clip, adapter), folder / "fused.onnx")
        plain, adapted = (
            encoder_rivals.write(encoder_rivals.Pass(clip, given).eval(), folder / f"{name}.onnx")
            for name, given in (("plain", None), ("adapted", adapter))
        )
        for batch in batches:
            given = pixels[:batch]
            runs = {
                f"onnxruntime-s{first}": encoder_rivals.in_onnxruntime(fused, given, threads),
                f"onnxruntime-two-pass-s{first}": encoder_rivals.both(
                    encoder_rivals.in_onnxruntime(plain, given, threads),
                    encoder_rivals.in_onnxruntime(adapted, given, threads),
                ),
            }
            if find_spec("openvino") is not None:
                runs[f"openvino-s{first}"] = encoder_rivals.in_openvino(fused, given, threads)
            encoder.verify(runs, {first: tuple(rows[:batch] for rows in truth)})
            runtimes_ms = harness.measure(runs, repeats)
            medians = {name: statistics.median(times) for name, times in runtimes_ms.items()}
            made += harness.rows(
                "scaling-encoder",
                f"{model.lower()}-b{batch}-s{first}",
                runtimes_ms,
                rivals=[f"onnxruntime-two-pass-s{first}"],
                threads=threads,
                rates={name: batch / ms * 1e3 for name, ms in medians.items()},
                rate_unit="images/s",
                packages=("onnxruntime", "openvino", "torch", "open_clip_torch"),
            )
    return made


def scoring(threads: int, repeats: int) -> list[dict[str, Any]]:
    cases = [
        *(f"q{queries}-k16000-d512-c1000" for queries in QUERIES),
        *(f"q64-k{keys}-d512-c1000" for keys in KEYS),
        *(f"q64-k16000-d512-c{classes}" for classes in CLASSES),
    ]
    return score.run(
        list(dict.fromkeys(cases)),
        threads,
        repeats,
        bench="scaling-score",
        wanted=lambda name: name in IMPLEMENTATIONS or name.partition("/")[0] == "cpp",
    )
