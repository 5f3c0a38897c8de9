"""The fused encoder in fewer bits: speed, and what it costs in the embeddings and in the demo's accuracy.

    onnxruntime-fp32, -int8      one encoder.onnx, and its quantised form (iosr_fast/export/quantize)
    openvino-fp32, -bf16, -int8  the same two files; in bf16 OpenVINO rounds by itself, where the processor has bf16

Cosines are with the fp32 encoder in PyTorch. The demo is calibrated on generic pictures and judged on its test
concepts, keys and queries encoded alike, parameters by leave-one-out on each support set. Any other CLIP has random
weights, which change no speed but say little about the loss of trained ones; its pictures resemble photographs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ceilings import GEMM, gemm
from benchmarks.encoder import Encoders, compare, late_block
from benchmarks.encoder_rivals import Embed
from benchmarks.harness import Candidate, Run, torch_threads
from iosr_fast.clip.adapter import random_adapter
from iosr_fast.clip.demo.pictures import held_out
from iosr_fast.clip.load import LoadedClip, load_clip
from iosr_fast.clip.prompts import embed_classes
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.encoders.runtimes.openvino import openvino_core
from iosr_fast.evaluation.demo import evaluate_few_shot, torch_encoder
from iosr_fast.evaluation.tasks import Encoded
from iosr_fast.export.pretrained import choose_adapter

BATCHES = {"demo": 64}
BATCH = 8  # of other CLIPs
SHOTS, SEEDS = (4, 1), (0, 1, 2)
METHODS = ("tip-adapter++", "proker++")
PACKAGES = ("onnxruntime", "openvino", "onnx")


def run(run: Run, models: Sequence[str] = ("demo", "ViT-B-32")) -> None:
    """Verify and time each model: the demo with its own adapter in batches of 64, any other with a random one in its
    last third, in batches of 8."""
    for model in models:
        clip = load_clip(model, None if model == "demo" else "none")
        adapter = choose_adapter(clip, "auto") if model == "demo" else None
        adapter = random_adapter(clip, late_block(clip)) if adapter is None else adapter
        with tempfile.TemporaryDirectory() as folder, torch_threads(run.threads):
            judged = Judged(Encoders(clip, adapter, run, Path(folder)), BATCHES.get(model, BATCH))
            run.case(f"{model.lower()}-b{judged.batch}", dict(judged.candidates()), packages=PACKAGES)


class Judged:
    """One CLIP's fused encoder by runtime and precision, each judged on all pictures."""

    def __init__(self, encoders: Encoders, batch: int) -> None:
        self.encoders, self.batch = encoders, batch

    def candidates(self) -> Iterator[tuple[str, Candidate]]:
        yield GEMM, gemm(self.encoders.run.threads)
        kinds: dict[str, Callable[[], Embed]] = {
            "onnxruntime-fp32": lambda: self.encoders.onnxruntime("fused"),
            "onnxruntime-int8": lambda: self.encoders.onnxruntime("int8"),
        }
        if find_spec("openvino") is None:
            self.encoders.run.say("left out: openvino is not installed: pip install openvino")
        else:
            kinds["openvino-fp32"] = lambda: self.encoders.openvino("fused")
            kinds["openvino-int8"] = lambda: self.encoders.openvino("int8")
            if "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
                kinds["openvino-bf16"] = lambda: self.encoders.openvino("fused", precision="bf16")
        gflop = self.batch * self.encoders.gflop
        for name, open_it in kinds.items():
            precision, ready = name.rpartition("-")[2], []
            prepare, check = partial(self._open, open_it, ready), partial(self._check, precision, ready)
            yield name, Candidate(prepare, check, gflop, precision, GEMM, rival=precision == "fp32")

    def _open(self, open_it: Callable[[], Embed], ready: list[Embed]) -> Callable[[], Any]:
        ready.append(open_it())
        return partial(ready[0], self.encoders.pictures[: self.batch])

    def _check(self, precision: str, ready: Sequence[Embed], _: Any) -> dict[str, Any]:
        embeddings = self.in_batches(lambda pixels: Embeddings(*ready[0](pixels)))
        facts = compare(precision, (embeddings.plain, embeddings.adapted), (self.truth.plain, self.truth.adapted))
        folder = self.encoders.file("int8" if precision == "int8" else "fused").parent
        facts["pictures"] = len(embeddings.plain)
        facts["file_mb"] = round(sum(path.stat().st_size for path in folder.iterdir()) / 1e6, 2)
        clip = self.encoders.clip
        return facts | (accuracy(clip, embeddings) if clip.name == "demo" else {})

    @cached_property
    def truth(self) -> Embeddings:
        return self.in_batches(torch_encoder(self.encoders.clip, self.encoders.adapter))

    def in_batches(self, encode: Callable[[np.ndarray], Embeddings]) -> Embeddings:
        """The embeddings of the pictures that are judged."""
        pictures = self.encoders.pictures
        starts = range(0, len(pictures), self.batch)
        return Embeddings.concatenate([encode(pictures[start : start + self.batch]) for start in starts])


def accuracy(clip: LoadedClip, embeddings: Embeddings) -> dict[str, Any]:
    """Few-shot accuracy on the demo's test concepts; `accuracy` is that of the first of METHODS and SHOTS."""
    pictures, _ = held_out()
    text = embed_classes(clip, pictures.names)
    encoded = Encoded(embeddings, pictures.concepts, text, clip.logit_scale)
    results = {method: evaluate_few_shot(encoded, method, "none", SHOTS, SEEDS) for method in METHODS}
    first = results[METHODS[0]][SHOTS[0]]
    facts = {
        "accuracy": first.mean,
        "accuracy_std": first.std,
        "accuracy_of": f"{METHODS[0]}, {SHOTS[0]} shots",
        "test_images": first.draws[0].images,
        "seeds": len(SEEDS),
    }
    return facts | {
        f"accuracy_{method.rstrip('+')}_{shots}_shot": round(of_shots[shots].mean, 6)
        for method, of_shots in results.items()
        for shots in SHOTS
    }
