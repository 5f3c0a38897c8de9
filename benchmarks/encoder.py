"""Both embeddings of a batch: fused in one pass, against every way that takes two, all in one run.

    onnxruntime, openvino, torch   ours: the dual encoder in three runtimes (on a GPU torch alone, in float16)
    openvino-int8                  ours in 8 bits
    ...-two-pass, ...-one-pass     encoder_rivals; a one-pass has the plain embedding alone

Weights are random, which changes no speed; pictures resemble photographs. Everything is checked against two literal
passes before it is timed; `min_cosine` of fewer bits is with them. share_of_ceiling counts the fused encoder's FLOP.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import encoder_rivals as rivals
from benchmarks.ceilings import GEMM, gemm, gpu_gemm
from benchmarks.encoder_rivals import Embed
from benchmarks.harness import Candidate, Run, torch_threads
from benchmarks.photographs import photograph
from iosr_fast.clip.adapter import Adapter, random_adapter
from iosr_fast.clip.demo.pictures import held_out, load_pictures
from iosr_fast.clip.fuse import build_dual_encoder
from iosr_fast.clip.load import LoadedClip, load_clip
from iosr_fast.clip.two_pass import two_passes
from iosr_fast.clip.vision_tower import vision_tower
from iosr_fast.export.check import FP32_MAX_ERROR, MIN_COSINES, calibration_pictures
from iosr_fast.export.quantize.encoder import quantize_onnx
from iosr_fast.images.preprocess import resize_and_crop

CHECKED = 4  # pictures
CALIBRATED, JUDGED = 32, 24  # pictures of a CLIP without pictures of its own
DEFAULT_BATCHES = {"cpu": (1, 8), "cuda": (1, 256)}
PACKAGES = ("onnxruntime", "openvino", "torch", "open_clip_torch")


def run(
    run: Run, model: str = "ViT-B-32", batches: Sequence[int] | None = None, first_adapted_block: int | None = None
) -> None:
    """Verify and time one model, a case a batch. `first_adapted_block`: None for that of the last third of blocks."""
    clip = load_clip(model, None if model == "demo" else "none")
    adapter = random_adapter(clip, late_block(clip) if first_adapted_block is None else first_adapted_block)
    first = adapter.config.first_adapted_block
    with tempfile.TemporaryDirectory() as folder, torch_threads(run.threads):
        made = Encoders(clip, adapter, run, Path(folder))
        for batch in batches or DEFAULT_BATCHES[run.device.name]:
            run.case(f"{model.lower()}-b{batch}-s{first}", made.candidates(batch), packages=PACKAGES)


def late_block(clip: LoadedClip) -> int:
    """The first of the last third of a CLIP's blocks."""
    return 2 * len(vision_tower(clip.model.visual, clip.name).blocks) // 3


def pictures_of(clip: LoadedClip) -> tuple[np.ndarray, np.ndarray]:
    """Pictures to calibrate and to judge on, uint8 (N, S, S, 3): of generic concepts and of test concepts."""
    if clip.name == "demo":
        return calibration_pictures(clip), held_out()[0].images
    sets = []
    for pictures, count in ((load_pictures("generic").images, CALIBRATED), (held_out()[0].images, JUDGED)):
        chosen = np.linspace(0, len(pictures) - 1, count).astype(int)
        views = [resize_and_crop(photograph(pictures[i], seed=int(i)), clip.geometry) for i in chosen]
        sets.append(np.stack(views))
    return sets[0], sets[1]


class Encoders:
    """The candidates of one CLIP and adapter. What they share, exported files and the truth, is made once."""

    def __init__(self, clip: LoadedClip, adapter: Adapter, run: Run, folder: Path) -> None:
        self.clip, self.adapter, self.run, self.folder = clip, adapter, run, folder
        self.calibration, self.pictures = pictures_of(clip)
        self.truth = two_passes(clip, adapter, self.pictures[:CHECKED])
        fused = build_dual_encoder(clip, adapter)
        # PyTorch doesn't count the CPU's fused attention, but the spelled-out one.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            fused(torch.from_numpy(self.pictures[:1].copy()))
        self.gflop = counter.get_total_flops() / 1e9  # a picture
        self.precision = "fp16" if run.device.is_gpu else "fp32"
        self.fused = build_dual_encoder(clip, adapter, "fp16") if run.device.is_gpu else fused

    def candidates(self, batch: int) -> dict[str, Candidate]:
        """By name: the ceiling, ours, then the rivals."""
        torch.compiler.reset()  # modules compiled before count towards Dynamo's limit, beyond which all stays eager
        pixels: Any = np.resize(self.pictures, (batch, *self.pictures.shape[1:]))
        if self.run.device.is_gpu:
            pixels = torch.from_numpy(pixels).to(self.run.device.name)

        def ours(open_it: Callable[[], Embed], precision: str = self.precision) -> Candidate:
            check = partial(self.check, precision)
            return Candidate(lambda: partial(open_it(), pixels), check, batch * self.gflop, precision, GEMM)

        def rival(open_it: Callable[[], Embed]) -> Candidate:
            prepare = lambda: partial(open_it(), pixels)  # noqa: E731
            return Candidate(prepare, partial(self.check, self.precision), precision=self.precision, rival=True)

        of_torch = {
            "torch": ours(lambda: rivals.in_torch(self.fused, self.run.device)),
            "eager-two-pass": rival(lambda: self.literal(self.adapter)),
        }
        # Last, because compiling takes longest.
        compiled = {"torch-compile-two-pass": rival(lambda: self.literal(self.adapter, compiled=True))}
        if self.run.device.is_gpu:
            compiled["torch-compile-one-pass"] = rival(lambda: self.literal(None, compiled=True))
            return {GEMM: gpu_gemm(self.run.device, self.precision), **of_torch, **compiled}
        of_files = {"onnxruntime-two-pass": rival(lambda: self.onnxruntime("plain", "adapted"))}
        own = {"onnxruntime": ours(lambda: self.onnxruntime("fused"))}
        if find_spec("openvino") is None:
            self.run.say("left out: openvino is not installed: pip install openvino")
        else:
            own["openvino"] = ours(lambda: self.openvino("fused"))
            own["openvino-int8"] = ours(lambda: self.openvino("int8"), "int8")
            of_files["openvino-two-pass"] = rival(lambda: self.openvino("plain", "adapted"))
            of_files["openvino-one-pass"] = rival(lambda: self.openvino("plain"))
        return {GEMM: gemm(self.run.threads), **own, **of_torch, **of_files, **compiled}

    def literal(self, adapter: Adapter | None, compiled: bool = False) -> Embed:
        return rivals.in_torch(rivals.literal_passes(self.clip, adapter, self.precision), self.run.device, compiled)

    def onnxruntime(self, *files: str) -> Embed:
        return rivals.in_turn(
            [rivals.in_onnxruntime(self.file(name), self.run.threads, spin=len(files) == 1) for name in files]
        )

    def openvino(self, *files: str, precision: str = "f32") -> Embed:
        return rivals.in_turn([rivals.in_openvino(self.file(name), self.run.threads, precision) for name in files])

    def file(self, name: str) -> Path:
        """fused, plain, adapted or int8 as ONNX, exported when it is first asked for."""
        path = self.folder / name / "encoder.onnx"
        if path.exists():
            return path
        path.parent.mkdir()
        self.run.say(f"exporting {name}")
        if name == "int8":
            quantize_onnx(self.file("fused"), path, self.calibration)
        else:
            adapter = self.adapter if name == "adapted" else None
            rivals.write(self.fused if name == "fused" else rivals.Pass(self.clip, adapter), path)
        return path

    def check(self, precision: str, result: Sequence[Any]) -> dict[str, Any]:
        """The cosines of the first pictures with two literal passes; ArithmeticError where one is off."""
        arrays = [np.asarray(rows if isinstance(rows, np.ndarray) else rows.float().cpu()) for rows in result]
        facts = compare(precision, [rows[:CHECKED] for rows in arrays], self.truth)
        return {} if precision == "fp32" else {"min_cosine": facts["min_cosine"]}


def compare(precision: str, got: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> dict[str, Any]:
    """The cosines of (plain, adapted), or (plain,), with `truth`, which may have more rows.

    Raises ArithmeticError for an error above 1e-4 in fp32, or a cosine below 0.999 in fp16 and bf16, 0.99 in int8.
    """
    facts: dict[str, Any] = {}
    for kind, rows, expected in zip(("plain", "adapted"), got, truth, strict=False):
        expected = expected[: len(rows)]
        cosines = (rows * expected).sum(1) / np.linalg.norm(rows, axis=1)
        error, least = float(np.abs(rows - expected).max()), float(cosines.min())
        # Written so that a NaN is refused too.
        if not (error <= FP32_MAX_ERROR if precision == "fp32" else least >= MIN_COSINES[precision]):
            allowed = f"error <= {FP32_MAX_ERROR}" if precision == "fp32" else f"cosine >= {MIN_COSINES[precision]}"
            raise ArithmeticError(f"{kind} embeddings are off by {error:.2g}, cosine {least:.6f} (allowed: {allowed})")
        facts |= {f"min_cosine_{kind}": round(least, 7), f"mean_cosine_{kind}": round(float(cosines.mean()), 7)}
    return facts | {"min_cosine": min(value for name, value in facts.items() if name.startswith("min"))}
