"""The fused encoder in fewer bits: speed, and what it costs in the embeddings and in the demo's accuracy.

    onnxruntime-fp32, -int8    one encoder.onnx, and its quantised form (iosr_fast/export/quantize.py)
    openvino-fp32, -bf16, -int8  the same two files; in bf16 OpenVINO rounds by itself, where the processor has bf16
    openvino-nncf-int8         encoder.onnx quantised by NNCF, where it is installed (pip install nncf)

Cosines are with the fp32 encoder in PyTorch. The demo is calibrated on generic pictures and judged on its test
concepts, keys and queries encoded alike, parameters by leave-one-out on each support set. Any other CLIP has random
weights, which change no speed but say little about the loss of trained ones; its pictures resemble photographs. A
model whose name ends in "-hard" gets outliers that leave its embeddings in fp32 unchanged (hard_weights.harden).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.benchmarks import harness
from iosr_fast.benchmarks.ceilings import measure_beside_gemm
from iosr_fast.benchmarks.encoder_gpu import fused_flops
from iosr_fast.benchmarks.hard_weights import harden
from iosr_fast.benchmarks.precision_nncf import NncfEncoder
from iosr_fast.clip.demo.pictures import held_out, load_pictures
from iosr_fast.clip.fuse import build_dual_encoder
from iosr_fast.clip.load import LoadedClip, load_clip
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.encoders.runtimes.batched import BatchedEncoder
from iosr_fast.encoders.runtimes.onnxruntime import FILE, OnnxRuntimeEncoder
from iosr_fast.encoders.runtimes.openvino import OpenVINOEncoder
from iosr_fast.evaluation.demo import evaluate_few_shot, torch_encoder
from iosr_fast.evaluation.tasks import Encoded
from iosr_fast.export.calibration import calibration_pictures
from iosr_fast.export.export import export_onnx, random_adapter
from iosr_fast.export.export_check import FP32_MAX_ERROR, MIN_COSINES
from iosr_fast.export.pretrained import choose_adapter
from iosr_fast.export.quantize import quantize_onnx
from iosr_fast.utils.machine import usable_threads

RIVALS = ("onnxruntime-fp32", "openvino-fp32")
HARD, NNCF = "-hard", "openvino-nncf-int8"
DEMO_BATCH = 64
SHOTS, SEEDS = (4, 1), (0, 1, 2)
METHODS = ("tip-adapter++", "proker++")
CALIBRATED, JUDGED = 32, 24  # pictures of a CLIP without pictures of its own


def run(
    model: str, batch: int = 8, threads: int | None = None, repeats: int = 7, first_adapted_block: int = 8
) -> list[dict[str, Any]]:
    """Verify and time one model, interleaved; one row a runtime and precision.

    The demo has its own adapter and batches of 64; any other CLIP one with random weights from `first_adapted_block`
    on. Raises ArithmeticError, and times nothing, where an embedding is off: by more than 1e-4 in fp32, by a cosine
    below 0.999 in bf16, 0.99 in int8. NNCF's cosines have no limit.
    """
    threads = threads or usable_threads()
    hard = HARD if model.endswith(HARD) else ""
    model = model.removesuffix(HARD)
    clip = load_clip(model, None if model == "demo" else "none")
    batch = DEMO_BATCH if model == "demo" else batch
    adapter = choose_adapter(clip, "auto") if model == "demo" else random_adapter(clip, first_adapted_block)
    calibration, judged = pictures_of(clip)
    run_exact = torch_encoder(clip, adapter)
    assert adapter is not None  # the demo's own, or the random one
    if hard:
        clip, adapter = harden(clip, adapter)
    with tempfile.TemporaryDirectory() as temporary, harness.torch_threads(threads):
        folder = Path(temporary)
        encoders = candidates(clip, adapter, calibration, threads, folder)
        truth = in_batches(run_exact, judged)
        embeddings = {name: in_batches(encoder.encode, judged) for name, encoder in encoders.items()}
        extra = {name: verify(name, each, truth) for name, each in embeddings.items()}
        for name in embeddings:
            extra[name]["file_mb"] = round(sum(p.stat().st_size for p in (folder / kind_of(name)).iterdir()) / 1e6, 2)
        if clip.name == "demo":
            for name, facts in accuracies(clip, embeddings).items():
                extra[name] |= facts
        pixels = judged[:batch]
        calls = {name: partial(encoder.encode, pixels) for name, encoder in encoders.items()}
        runtimes_ms, ceiling, library = measure_beside_gemm(calls, repeats, threads)
    for name in runtimes_ms:
        if precision_of(name) == "fp32":
            extra[name]["ceiling_library"] = library
    config = build_dual_encoder(clip, adapter).shapes
    flops = fused_flops(config, batch)
    return harness.rows(
        "precision",
        f"{clip.name.lower()}{hard}-b{batch}-s{config.first_adapted_block}",
        runtimes_ms,
        rivals=RIVALS,
        threads=threads,
        precision={name: precision_of(name) for name in runtimes_ms},
        work=flops / 1e9,
        ceiling={name: ceiling / 1e9 for name in runtimes_ms if precision_of(name) == "fp32"},
        packages=("onnxruntime", "openvino", "onnx", "nncf"),
        extra=extra,
    )


def pictures_of(clip: LoadedClip) -> tuple[np.ndarray, np.ndarray]:
    """Pictures to calibrate and to judge on, uint8 (N, S, S, 3): of generic concepts and of test concepts."""
    if clip.name == "demo":
        return calibration_pictures(clip), held_out()[0].images
    from iosr_fast.benchmarks.photographs import photograph
    from iosr_fast.images.preprocess import resize_and_crop

    sets = []
    for pictures, count in ((load_pictures("generic").images, CALIBRATED), (held_out()[0].images, JUDGED)):
        chosen = np.linspace(0, len(pictures) - 1, count).astype(int)
        views = [resize_and_crop(photograph(pictures[i], seed=int(i)), clip.geometry) for i in chosen]
        sets.append(np.stack(views))
    return sets[0], sets[1]


def candidates(
    clip: LoadedClip, adapter: Any, calibration: np.ndarray, threads: int, folder: Path
) -> dict[str, BatchedEncoder]:
    """Encoders by runtime and precision; OpenVINO's where it is installed, bf16 where this processor has it."""
    encoder = build_dual_encoder(clip, adapter)
    facts = {
        "model": clip.name,
        "image_size": clip.image_size,
        "width": encoder.shapes.embedding_width,
        "fingerprint": clip.fingerprint,
        "max_batch": DEMO_BATCH,
        "first_adapted_block": encoder.shapes.first_adapted_block,
    }
    for kind in ("fp32", "int8"):
        (folder / kind).mkdir()
    export_onnx(encoder, folder / "fp32" / FILE)
    quantize_onnx(folder / "fp32" / FILE, folder / "int8" / FILE, calibration)
    encoders: dict[str, BatchedEncoder] = {}
    for precision in ("fp32", "int8"):
        manifest = facts | {"precision": precision}
        encoders[f"onnxruntime-{precision}"] = OnnxRuntimeEncoder(folder / precision, manifest, threads)
    if find_spec("openvino") is not None:
        for precision in ("fp32", "bf16", "int8"):
            manifest = facts | {"precision": precision}
            in_openvino = OpenVINOEncoder(folder / kind_of(precision), manifest, threads)
            if precision != "bf16" or in_openvino.computes_in == "bf16":
                encoders[f"openvino-{precision}"] = in_openvino
        if find_spec("nncf") is not None:
            target = folder / kind_of(NNCF) / "encoder.xml"
            target.parent.mkdir()
            encoders[NNCF] = NncfEncoder(folder / "fp32" / FILE, target, manifest, calibration, threads)
    return encoders


def precision_of(name: str) -> str:
    return name.rpartition("-")[2]


def kind_of(name: str) -> str:
    """The folder of the file that an implementation executes."""
    return "nncf" if name == NNCF else "int8" if precision_of(name) == "int8" else "fp32"


def in_batches(run: Callable[[np.ndarray], Embeddings], pictures: np.ndarray) -> Embeddings:
    parts = [run(pictures[start : start + DEMO_BATCH]) for start in range(0, len(pictures), DEMO_BATCH)]
    return Embeddings(np.concatenate([p.plain for p in parts]), np.concatenate([p.adapted for p in parts]))


def verify(name: str, embeddings: Embeddings, truth: Embeddings) -> dict[str, Any]:
    """The cosines with `truth`; ArithmeticError where an embedding is off."""
    precision = precision_of(name)
    cosines: dict[str, float] = {}
    means: list[float] = []
    for kind in ("plain", "adapted"):
        got, expected = getattr(embeddings, kind), getattr(truth, kind)
        each = (got * expected).sum(1) / np.linalg.norm(got, axis=1)
        cosines[kind] = float(each.min())
        means.append(float(each.mean()))
        error = float(np.abs(got - expected).max())
        # Written so that a NaN is refused too.
        if name != NNCF and not (
            error <= FP32_MAX_ERROR if precision == "fp32" else cosines[kind] >= MIN_COSINES[precision]
        ):
            allowed = f"error <= {FP32_MAX_ERROR}" if precision == "fp32" else f"cosine >= {MIN_COSINES[precision]}"
            raise ArithmeticError(
                f"{name}: {kind} embeddings have an error of {error:.2g} and a cosine of {cosines[kind]:.6f} "
                f"(allowed: {allowed}); nothing is timed"
            )
    return {
        "min_cosine": round(min(cosines.values()), 7),
        "min_cosine_plain": round(cosines["plain"], 7),
        "min_cosine_adapted": round(cosines["adapted"], 7),
        "mean_cosine": round(min(means), 7),
        "pictures": len(embeddings.plain),
    }


def accuracies(clip: LoadedClip, embeddings: Mapping[str, Embeddings]) -> dict[str, dict[str, Any]]:
    """Few-shot accuracy on the demo's test concepts; `accuracy` is that of the first of METHODS and SHOTS."""
    from iosr_fast.clip.prompts import embed_classes

    pictures, _ = held_out()
    text = embed_classes(clip, pictures.names)
    facts: dict[str, dict[str, Any]] = {}
    for name, each in embeddings.items():
        encoded = Encoded(each, pictures.concepts, text, clip.logit_scale, pictures.styles)
        results = {method: evaluate_few_shot(encoded, method, "none", SHOTS, SEEDS) for method in METHODS}
        first = results[METHODS[0]][SHOTS[0]]
        facts[name] = {
            "accuracy": first.mean,
            "accuracy_std": first.std,
            "accuracy_of": f"{METHODS[0]}, {SHOTS[0]} shots",
            "test_images": first.draws[0].images,
            "seeds": len(SEEDS),
        } | {
            f"accuracy_{method.rstrip('+')}_{shots}_shot": round(of_shots[shots].mean, 6)
            for method, of_shots in results.items()
            for shots in SHOTS
        }
    return facts
