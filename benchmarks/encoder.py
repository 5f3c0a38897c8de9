"""Both embeddings of a batch: fused in one pass, against every way that takes two, all in one run.

    onnxruntime, openvino, torch   ours: the dual encoder in three runtimes (on a GPU torch alone, in float16)
    ...-int8, openvino-bf16        ours in fewer bits; OpenVINO rounds to bf16 where the processor has it
    ...-two-pass, ...-one-pass     encoder_rivals; a one-pass has the plain embedding alone

Everything is checked against two literal passes before it is timed; share_of_ceiling counts the fused encoder's FLOP.
The demo has its own adapter. It is calibrated on generic pictures and judged on its test concepts: cosines with the two
passes and few-shot accuracy, keys and queries encoded alike, parameters by leave-one-out on each support set. Any other
CLIP has random weights, which change no speed but say little about the loss of trained ones; its pictures resemble
photographs.
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
from iosr_fast.clip.prompts import embed_classes
from iosr_fast.clip.two_pass import two_passes
from iosr_fast.clip.vision_tower import vision_tower
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.encoders.runtimes.openvino import openvino_core
from iosr_fast.evaluation.demo import evaluate_few_shot
from iosr_fast.evaluation.tasks import Encoded
from iosr_fast.export.check import FP32_MAX_ERROR, MIN_COSINES, calibration_pictures
from iosr_fast.export.pretrained import choose_adapter
from iosr_fast.export.quantize.encoder import quantize_onnx
from iosr_fast.images.preprocess import resize_and_crop

CHECKED = 4  # pictures
CALIBRATED, JUDGED = 32, 24  # pictures of a CLIP without pictures of its own
DEFAULT_BATCHES = {"cpu": (1, 8), "cuda": (1, 256)}
SHOTS, SEEDS = (4, 1), (0, 1, 2)
METHODS = ("tip-adapter++", "proker++")
PACKAGES = ("onnxruntime", "openvino", "torch", "open_clip_torch")


def run(
    run: Run, model: str = "ViT-B-32", batch: Sequence[int] | None = None, first_adapted_block: int | None = None
) -> None:
    """Verify and time one model, a case a batch. `first_adapted_block`: None for that of the last third of blocks."""
    clip = load_clip(model, None if model == "demo" else "none")
    adapter = choose_adapter(clip, "auto") if model == "demo" and first_adapted_block is None else None
    if adapter is None:
        adapter = random_adapter(clip, late_block(clip) if first_adapted_block is None else first_adapted_block)
    first = adapter.config.first_adapted_block
    with tempfile.TemporaryDirectory() as folder, torch_threads(run.threads):
        made = Encoders(clip, adapter, run, Path(folder))
        for size in batch or DEFAULT_BATCHES[run.device.name]:
            run.case(f"{model.lower()}-b{size}-s{first}", made.candidates(size), packages=PACKAGES)


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
        self.truth = two_passes(clip, adapter, self.pictures)
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
            judged: dict[str, Any] = {}

            def prepare() -> Callable[[], Any]:
                embed = open_it()
                if not self.run.device.is_gpu:
                    judged.update(self.judge(embed, batch, precision))
                return partial(embed, pixels)

            def check(result: Sequence[Any]) -> dict[str, Any]:
                return self.check(precision, result) | judged

            return Candidate(prepare, check, batch * self.gflop, precision, GEMM)

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
        own["onnxruntime-int8"] = ours(lambda: self.onnxruntime("int8"), "int8")
        if find_spec("openvino") is None:
            self.run.say("left out: openvino is not installed: pip install openvino")
        else:
            own["openvino"] = ours(lambda: self.openvino("fused"))
            own["openvino-int8"] = ours(lambda: self.openvino("int8"), "int8")
            if "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
                own["openvino-bf16"] = ours(lambda: self.openvino("fused", precision="bf16"), "bf16")
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
        """ArithmeticError where an embedding of the first pictures is off."""
        compare(precision, [rows_of(rows)[:CHECKED] for rows in result], self.truth)
        return {}

    def judge(self, embed: Embed, batch: int, precision: str) -> dict[str, Any]:
        """The cosines of all pictures with two passes, in batches; of the demo, few-shot accuracy, too."""
        starts = range(0, len(self.pictures), batch)
        parts = [[rows_of(rows) for rows in embed(self.pictures[start : start + batch])] for start in starts]
        embeddings = Embeddings(*(np.concatenate(rows) for rows in zip(*parts, strict=True)))
        facts = compare(precision, (embeddings.plain, embeddings.adapted), self.truth) | {"pictures": len(embeddings)}
        return facts | (accuracy(self.clip, embeddings) if self.clip.name == "demo" else {})


def rows_of(rows: Any) -> np.ndarray:
    return rows if isinstance(rows, np.ndarray) else rows.float().cpu().numpy()


def accuracy(clip: LoadedClip, embeddings: Embeddings) -> dict[str, Any]:
    """Few-shot accuracy on the demo's test concepts, of each of METHODS and SHOTS."""
    pictures, _ = held_out()
    text = embed_classes(clip, pictures.names)
    encoded = Encoded(embeddings, pictures.concepts, text, clip.logit_scale)
    facts: dict[str, Any] = {"seeds": len(SEEDS)}
    for method in METHODS:
        for shots, result in evaluate_few_shot(encoded, method, "none", SHOTS, SEEDS).items():
            name = f"accuracy_{method.rstrip('+')}_{shots}_shot"
            facts |= {name: round(result.mean, 6), f"{name}_std": result.std, "test_images": result.draws[0].images}
    return facts


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
