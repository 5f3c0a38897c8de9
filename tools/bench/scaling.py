"""How time grows: the encoder with its batch, scoring with classes, keys and queries. What the plots are drawn from.

scaling-encoder  both embeddings of 1 to 64 pictures, fused in ONNX Runtime and OpenVINO, and two passes in ONNX Runtime
scaling-score    64 queries x 16,000 keys x 1,000 classes, 512 channels, with one of the three varied at a time
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.clip.fuse import build_dual_encoder
from iosr_fast.clip.load import load_clip
from iosr_fast.export.export import random_adapter
from iosr_fast.utils.machine import usable_threads
from tools.bench import encoder, encoder_rivals, harness, score

IMPLEMENTATIONS = ("eager-best", "papers-formula")  # beside ours


@dataclass(frozen=True)
class Sizes:
    """What is varied. `encoders` has models, their first adapted block and the batches."""

    encoders: tuple[tuple[str, int, tuple[int, ...]], ...]
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    classes: tuple[int, ...]

    @property
    def cases(self) -> list[str]:
        made = [
            *(f"q{queries}-k16000-d512-c1000" for queries in self.queries),
            *(f"q64-k{keys}-d512-c1000" for keys in self.keys),
            *(f"q64-k16000-d512-c{classes}" for classes in self.classes),
        ]
        return list(dict.fromkeys(made))


BATCHES = (1, 2, 4, 8, 16, 32, 64)
SIZES = Sizes(
    (("ViT-B-32", 8, BATCHES), ("demo", 3, BATCHES)),
    queries=(1, 8, 64, 256, 1024),
    keys=(1000, 4000, 16_000, 64_000, 256_000, 1_000_000),
    classes=(10, 100, 1000, 10_000),
)
QUICK = Sizes((("demo", 3, (1, 2)),), queries=(1, 2), keys=(1000,), classes=(10,))


def run(threads: int | None = None, repeats: int = 5, sizes: Sizes = SIZES) -> list[dict[str, Any]]:
    """Both kinds of rows, verified and timed."""
    threads = threads or usable_threads()
    made: list[dict[str, Any]] = []
    for model, first, batches in sizes.encoders:
        made += encoders(model, first, batches, threads, repeats)
    return made + scoring(sizes.cases, threads, repeats)


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
                    encoder_rivals.in_onnxruntime(plain, given, threads, spin=False),
                    encoder_rivals.in_onnxruntime(adapted, given, threads, spin=False),
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


def scoring(cases: Sequence[str], threads: int, repeats: int) -> list[dict[str, Any]]:
    return score.run(
        cases,
        threads,
        repeats,
        bench="scaling-score",
        wanted=lambda name: name in IMPLEMENTATIONS or name.partition("/")[0] == "cpp",
    )
