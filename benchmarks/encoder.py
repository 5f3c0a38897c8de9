"""Both embeddings of a batch: fused in one pass, against every way that takes two, all in one run.

    onnxruntime, openvino, torch   ours: the dual encoder in three runtimes (on a GPU torch alone, in float16)
    ...-int8, openvino-bf16        ours in fewer bits; OpenVINO rounds to bf16 where the processor has it
    torch-compile                  ours by torch.compile
    torch-fp32                     ours on a GPU in float32
    torch-engine, tensorrt-engine  ours as users open it: pictures are in the host's memory, and a GPU's upload counts
    ...-two-pass, ...-one-pass     encoder_rivals; a one-pass has the plain embedding alone

Everything is checked against two literal passes before it is timed; share_of_ceiling counts the fused encoder's FLOP.
The demo has its own adapter; it is calibrated on generic pictures and timed on pictures of its test concepts. Any other
CLIP has random weights, which change no speed but say little about the loss of trained ones; its pictures resemble
photographs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import encoder_rivals as rivals
from benchmarks.ceilings import GEMM, LAUNCH, gemm, launch
from benchmarks.encoder_rivals import Embed
from benchmarks.harness import Candidate, Run
from benchmarks.photographs import photograph
from iosr_fast.backbones.adapter import Adapter, random_adapter
from iosr_fast.backbones.demo.pictures import held_out, load_pictures
from iosr_fast.backbones.fuse import build_dual_encoder
from iosr_fast.backbones.load import LoadedModel, load_clip
from iosr_fast.backbones.two_pass import two_passes
from iosr_fast.backbones.vision_tower import vision_tower
from iosr_fast.encoders.engine_folder import EXTRAS, unavailable_reason
from iosr_fast.encoders.runtimes import open_engine
from iosr_fast.encoders.runtimes.openvino import openvino_core
from iosr_fast.export.build import write_engine
from iosr_fast.export.check import check_rows
from iosr_fast.export.onnx import export_onnx
from iosr_fast.export.pretrained import choose_adapter
from iosr_fast.export.quantize.calibration import calibration_pictures, evenly
from iosr_fast.export.quantize.encoder import quantize_onnx
from iosr_fast.export.source import source_of
from iosr_fast.images.preprocess import resize_and_crop

CALIBRATED, DIFFERENT = 32, 24  # pictures to calibrate on, of a CLIP without its own, and in a batch at most
DEFAULT_BATCHES = {"cpu": (1, 8), "cuda": (256, 1, 32, 128)}  # the largest first, whose rate is the GPU's
PACKAGES = ("onnxruntime", "openvino", "torch", "open_clip_torch")


def run(
    run: Run, model: str = "ViT-B-32", batch: Sequence[int] | None = None, first_adapted_block: int | None = None
) -> None:
    """Verify and time one model, a case a batch."""
    clip, adapter = open_model(model, first_adapted_block)
    first = adapter.config.first_adapted_block
    with tempfile.TemporaryDirectory() as folder:
        sizes = batch or DEFAULT_BATCHES[run.device.name]
        made = Encoders(clip, adapter, run, Path(folder), max(sizes))
        for size in sizes:
            run.case(f"{model.lower()}-b{size}-s{first}", made.candidates(size), packages=PACKAGES)


def open_model(model: str, first_adapted_block: int | None) -> tuple[LoadedModel, Adapter]:
    """The demo with its own adapter, or a CLIP and an adapter of random weights, from the last third of blocks on."""
    clip = load_clip(model, None if model == "demo" else "none")
    if first_adapted_block is None:
        if (own := choose_adapter(clip, "auto")) is not None:
            return clip, own
        first_adapted_block = 2 * len(vision_tower(clip.model.visual, clip.name).blocks) // 3
    return clip, random_adapter(clip, first_adapted_block)


def pictures_of(clip: LoadedModel) -> tuple[np.ndarray, np.ndarray]:
    """Pictures to calibrate on and to time, uint8 (N, S, S, 3): of generic concepts and of test concepts."""
    tested = evenly(held_out()[0].images, DIFFERENT)
    if clip.name == "demo":
        return calibration_pictures(clip.name, clip.geometry), tested

    def views(pictures: np.ndarray) -> np.ndarray:
        made = [photograph(picture, seed=i) for i, picture in enumerate(pictures)]
        return np.stack([resize_and_crop(view, clip.geometry) for view in made])

    return views(evenly(load_pictures("generic").images, CALIBRATED)), views(tested)


class Encoders:
    """The candidates of one CLIP and adapter. What they share, exported files, engines for up to `max_batch` pictures
    and the truth, is made once."""

    def __init__(self, clip: LoadedModel, adapter: Adapter, run: Run, folder: Path, max_batch: int) -> None:
        self.clip, self.adapter, self.run, self.folder, self.max_batch = clip, adapter, run, folder, max_batch
        self.calibration, self.pictures = pictures_of(clip)
        self.truth = two_passes(clip, adapter, self.pictures)
        fused = build_dual_encoder(clip, adapter)
        # PyTorch doesn't count the CPU's fused attention, but the spelled-out one.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            fused(torch.from_numpy(self.pictures[:1].copy()))
        self.gflop = counter.get_total_flops() / 1e9  # a picture
        self.precision = "fp16" if run.device.is_gpu else "fp32"
        self.fused = build_dual_encoder(clip, adapter, "fp16").for_gpu() if run.device.is_gpu else fused
        self.fused_fp32, self.built = fused, dict[str, dict[str, float]]()  # engines, by runtime: facts for rows

    def candidates(self, batch: int) -> dict[str, Candidate]:
        """By name: the ceiling, ours, then the rivals."""
        torch.compiler.reset()  # modules compiled before count towards Dynamo's limit, beyond which all stays eager
        device, rows = self.run.device, np.resize(np.arange(len(self.pictures)), batch)
        pixels: Any = self.pictures[rows]
        if device.is_gpu:
            pixels = torch.from_numpy(pixels).to(device.name)

        def check(precision: str, result: Sequence[Any], engine: str = "") -> dict[str, Any]:
            got = [torch.as_tensor(each).float().cpu().numpy() for each in result]
            return compare(precision, got, [each[rows] for each in self.truth]) | self.built.get(engine, {})

        def ours(open_it: Callable[[], Embed], precision: str = self.precision, pixels: Any = pixels) -> Candidate:
            work = batch * self.gflop
            return Candidate(lambda: partial(open_it(), pixels), partial(check, precision), work, precision, GEMM)

        def rival(open_it: Callable[[], Embed]) -> Candidate:
            return replace(ours(open_it), work=None, ceiling=None, rival=True)

        made = {GEMM: gemm(device, self.run.threads, self.precision)}
        if device.is_gpu:
            made[LAUNCH] = launch(device)
        for runtime in () if device.is_gpu else rivals.RUNTIMES:
            if find_spec(runtime) is None:
                self.run.say(f"left out: {runtime} is not installed: pip install {runtime}")
                continue
            made[runtime] = ours(partial(self.opened, runtime, "fused"))
            made[f"{runtime}-int8"] = ours(partial(self.opened, runtime, "int8"), "int8")
            if runtime == "openvino" and "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
                made["openvino-bf16"] = ours(partial(self.opened, runtime, "fused", precision="bf16"), "bf16")
            made[f"{runtime}-two-pass"] = rival(partial(self.opened, runtime, "plain", "adapted"))
            made[f"{runtime}-one-pass"] = rival(partial(self.opened, runtime, "plain"))
        made["torch"] = ours(lambda: rivals.in_torch(self.fused, device))
        if device.is_gpu:
            made["torch-fp32"] = ours(lambda: rivals.in_torch(self.fused_fp32, device), "fp32")
        made["eager-two-pass"] = rival(partial(self.literal, self.adapter))
        for runtime in ("torch", *EXTRAS):
            if (reason := unavailable_reason(runtime)) is not None:
                self.run.say(f"left out: {runtime}-engine: {reason}")
                continue
            engine = ours(partial(self.engine, runtime, batch), pixels=self.pictures[rows])
            facts = partial(check, self.precision, engine=runtime)
            made[f"{runtime}-engine"] = replace(engine, check=facts, recorded=False)
        # Last, because compiling takes longest.
        made["torch-compile"] = ours(lambda: rivals.in_torch(self.fused, device, compiled=True))
        made["torch-compile-two-pass"] = rival(partial(self.literal, self.adapter, compiled=True))
        if device.is_gpu:
            made["torch-compile-one-pass"] = rival(partial(self.literal, None, compiled=True))
        return made

    def engine(self, runtime: str, batch: int) -> Embed:
        """By open_engine, of a folder that is built when it is first asked for; pictures are in the host's memory."""
        folder = self.folder / f"{runtime}-engine"
        if runtime not in self.built:
            self.run.say(f"building an engine for {runtime}")
            made = write_engine(source_of(self.clip, self.adapter), folder, runtime, self.precision, self.max_batch)
            self.built[runtime] = {"build_seconds": made["build_seconds"]}
        encoder = open_engine(folder, runtime, threads=self.run.threads)
        encoder.warm([batch])

        def embed(pixels: np.ndarray) -> tuple[Any, ...]:
            self.run.device.synchronize()  # its stream would not wait for what is read before a turn
            embeddings = encoder.encode_on_device(pixels)
            return embeddings.plain, embeddings.adapted

        return embed

    def literal(self, adapter: Adapter | None, compiled: bool = False) -> Embed:
        return rivals.in_torch(rivals.literal_passes(self.clip, adapter, self.precision), self.run.device, compiled)

    def opened(self, runtime: str, *files: str, **options: str) -> Embed:
        return rivals.RUNTIMES[runtime]([self.file(name) for name in files], self.run.threads, **options)

    def file(self, name: str) -> Path:
        """fused, plain, adapted or int8 as ONNX, exported when it is first asked for."""
        path = self.folder / name / "encoder.onnx"
        if path.exists():
            return path
        path.parent.mkdir(exist_ok=True)
        self.run.say(f"exporting {name}")
        if name == "int8":
            quantize_onnx(self.file("fused"), path, self.calibration)
        elif name == "fused":
            export_onnx(self.fused, path)
        else:
            rivals.export_pass(self.clip, self.adapter if name == "adapted" else None, path)
        return path


def compare(precision: str, got: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> dict[str, Any]:
    """The smallest cosines of (plain, adapted), or (plain,), with `truth`. Raises as export.check.check_rows."""
    kinds = ("plain", "adapted")[: len(got)]
    found = [check_rows(f"{kind} embeddings", *rows, precision) for kind, *rows in zip(kinds, got, truth, strict=False)]
    least = {f"min_cosine_{kind}": round(one["min_cosine"], 7) for kind, one in zip(kinds, found, strict=True)}
    return {"pictures": len(got[0]), **least, "min_cosine": min(least.values())}
