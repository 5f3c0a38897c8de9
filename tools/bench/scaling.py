"""How time grows: the encoder with its batch, scoring with classes, keys and queries. The data of the plots.

scaling-encoder  both embeddings of 1 to 64 pictures, fused in ONNX Runtime and OpenVINO, and two passes in ONNX Runtime
scaling-score    64 queries x 16,000 keys x 1,000 classes, 512 channels, with one of the three varied at a time
"""

from __future__ import annotations

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
from tools.bench import encoder, harness, score
from tools.bench import encoder_rivals as rivals

IMPLEMENTATIONS = ("eager-best", "papers-formula")  # beside ours


@dataclass(frozen=True)
class Sizes:
    """The sizes that vary; `encoders` has models, their first adapted block and the batches."""

    encoders: tuple[tuple[str, int, tuple[int, ...]], ...]
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    classes: tuple[int, ...]

    @property
    def cases(self) -> list[str]:
        cases = [
            *(f"q{queries}-k16000-d512-c1000" for queries in self.queries),
            *(f"q64-k{keys}-d512-c1000" for keys in self.keys),
            *(f"q64-k16000-d512-c{classes}" for classes in self.classes),
        ]
        return list(dict.fromkeys(cases))


BATCHES = (1, 2, 4, 8, 16, 32, 64)
SIZES = Sizes(
    (("ViT-B-32", 8, BATCHES), ("demo", 3, BATCHES)),
    queries=(1, 8, 64, 256, 1024),
    keys=(1000, 4000, 16_000, 64_000, 256_000, 1_000_000),
    classes=(10, 100, 1000, 10_000),
)
QUICK = Sizes((("demo", 3, (1, 2)),), queries=(1, 2), keys=(1000,), classes=(10,))


def run(threads: int | None = None, repeats: int = 5, quick: bool = False) -> list[dict[str, Any]]:
    """Both kinds of rows, verified and timed."""
    threads = threads or usable_threads()
    sizes = QUICK if quick else SIZES
    rows: list[dict[str, Any]] = []
    for model, first, batches in sizes.encoders:
        rows += encoders(model, first, batches, threads, repeats)
    return rows + scoring(sizes.cases, threads, repeats)


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
    return score.run(
        cases,
        threads,
        repeats,
        bench="scaling-score",
        wanted=lambda name: name in IMPLEMENTATIONS or name.partition("/")[0] == "cpp",
    )
