"""Both embeddings of a batch: fused in one pass, against every way that takes two, all in one run.

    onnxruntime-sN, openvino-sN    ours: the dual encoder with adapters from block N on, the same file in two runtimes
    openvino-bf16-sN, openvino-int8-sN    ours in fewer bits, for the last N at which rivals are measured
    encoder_rivals                 the rivals; "-sN" of a rival is where its adapters begin

Weights are random, which changes no speed; pictures and those that calibrate int8 are precision.pictures_of's.
Everything is checked against the eager two passes before it is timed; `min_cosine` of fewer bits is with them.

Rivals take two passes at the first and at one late first adapted block only: of twelve blocks an adapter less changes
two passes by less than a hundredth. Other rows are compared with those of the nearest block. ratios has

    eager-two-pass           the public way's time over this row's
    best-compiled-two-pass   the fastest of the compiled two passes
    best-compiled-one-pass   the fastest compiled plain pass: 1 / this is the cost of both embeddings in plain passes
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from iosr_fast.benchmarks import encoder_rivals as rivals
from iosr_fast.benchmarks import harness
from iosr_fast.benchmarks.ceilings import measure_beside_gemm
from iosr_fast.benchmarks.encoder_gpu import fused_flops
from iosr_fast.benchmarks.encoder_rivals import Embed
from iosr_fast.benchmarks.precision import pictures_of
from iosr_fast.clip.adapter import Adapter
from iosr_fast.clip.fuse import build_dual_encoder
from iosr_fast.clip.load import LoadedClip, load_clip
from iosr_fast.clip.vision_tower import vision_tower
from iosr_fast.encoders.runtimes.openvino import openvino_core
from iosr_fast.export.export import random_adapter
from iosr_fast.export.export_check import MIN_COSINES
from iosr_fast.export.quantize import quantize_onnx
from iosr_fast.utils.machine import usable_threads

TOLERANCE = 1e-4
# By the number of blocks: first adapted blocks of ours, and the two of them at which rivals take two passes.
FIRST_BLOCKS = {12: (0, 6, 8, 9), 6: (0, 3, 4)}
RIVALS_AT = {12: (0, 8), 6: (0, 3)}


def run(
    model: str = "ViT-B-16",
    batch: int | None = None,
    first_adapted_blocks: Sequence[int] | None = None,
    threads: int | None = None,
    repeats: int = 5,
) -> list[dict[str, Any]]:
    """Verify and time one model at one batch (8, and 64 for the demo), interleaved; one row an implementation.

    `first_adapted_blocks`: None for FIRST_BLOCKS. Rivals that can't run here are left out; standard error names them.
    """
    threads = threads or usable_threads()
    batch = batch or (64 if model == "demo" else 8)
    clip = load_clip(model, None if model == "demo" else "none")
    blocks = len(vision_tower(clip.model.visual, model).blocks)
    first_blocks = tuple(first_adapted_blocks or FIRST_BLOCKS.get(blocks, (0, 2 * blocks // 3)))
    late = [s for s in RIVALS_AT.get(blocks, first_blocks) if s in first_blocks]
    calibration, judged = pictures_of(clip)
    pixels = np.resize(judged, (batch, *judged.shape[1:]))
    with tempfile.TemporaryDirectory() as folder, harness.torch_threads(threads):
        adapters = {s: random_adapter(clip, s) for s in first_blocks}
        runs, flops = candidates(clip, adapters, late or first_blocks, pixels, threads, Path(folder))
        runs |= fewer_bits((late or first_blocks)[-1], pixels, calibration, threads, Path(folder))
        cosines = verify(runs, {s: rivals.eagerly(clip, adapter, pixels)() for s, adapter in adapters.items()})
        runtimes_ms, ceiling, library = measure_beside_gemm(runs, repeats, threads)
    rows = harness.rows(
        "encoder",
        f"{model.lower()}-b{batch}",
        runtimes_ms,
        rivals=(),
        threads=threads,
        work={name: flop * batch / 1e9 for name, flop in flops.items()},
        ceiling=ceiling / 1e9,
        packages=("onnxruntime", "openvino", "torch", "open_clip_torch"),
        precision={name: precision_of(name) for name in runtimes_ms},
        extra={name: {"ceiling_library": library} for name in flops}
        | {name: {"min_cosine": round(cosine, 7)} for name, cosine in cosines.items()},
    )
    medians = {name: statistics.median(times) for name, times in runtimes_ms.items()}
    for row in rows:
        row["ratios"] = ratios(row["impl"], medians)
        if (first := first_block(row["impl"])) is not None:
            row["first_adapted_block"] = first
    return rows


def candidates(
    clip: LoadedClip,
    adapters: Mapping[int, Adapter],
    late: Sequence[int],
    pixels: np.ndarray,
    threads: int,
    folder: Path,
) -> tuple[dict[str, Embed], dict[str, float]]:
    """What is timed, and the FLOP a picture of ours. Each returns (plain, adapted), a one-pass (plain,).

    Ours start at the first adapted block of each of `adapters`, rivals at those in `late`.
    """
    execute: dict[str, Callable[[Path], Embed]] = {
        "onnxruntime": lambda path: rivals.in_onnxruntime(path, pixels, threads)
    }
    if find_spec("openvino") is None:
        left_out("openvino", "it is not installed (pip install openvino)")
    else:
        execute["openvino"] = lambda path: rivals.in_openvino(path, pixels, threads)
    plain = rivals.Pass(clip, None).eval()
    files = {"plain": rivals.write(plain, folder / "plain.onnx")}
    files |= {f"s{s}": rivals.write(rivals.Pass(clip, adapters[s]).eval(), folder / f"adapted-s{s}.onnx") for s in late}
    runs: dict[str, Embed] = {}
    flops: dict[str, float] = {}
    for s, adapter in adapters.items():
        fused = build_dual_encoder(clip, adapter)
        path = rivals.write(fused, folder / f"fused-s{s}.onnx")
        for runtime, load in execute.items():
            runs[f"{runtime}-s{s}"] = load(path)
            flops[f"{runtime}-s{s}"] = fused_flops(fused.shapes, 1)
    for runtime, load in execute.items():
        one = runs[f"{runtime}-one-pass"] = load(files["plain"])
        if runtime == "onnxruntime":
            load = partial(rivals.in_onnxruntime, pixels=pixels, threads=threads, spin=False)
            one = load(files["plain"])
        for s in late:
            runs[f"{runtime}-two-pass-s{s}"] = rivals.both(one, load(files[f"s{s}"]))
    runs["open-clip-one-pass"] = rivals.eagerly(clip, None, pixels)
    compiled_plain: Embed | None = None
    torch.compiler.reset()  # each model compiled before counts towards Dynamo's limit, beyond which all stays eager
    for s in late:
        runs[f"eager-two-pass-s{s}"] = rivals.eagerly(clip, adapters[s], pixels)
        try:
            compiled_plain = compiled_plain or rivals.in_torch_compile(plain, pixels)
            compiled = rivals.both(
                compiled_plain, rivals.in_torch_compile(rivals.Pass(clip, adapters[s]).eval(), pixels)
            )
            compiled()
            runs[f"torch-compile-two-pass-s{s}"] = compiled
        except Exception as error:  # a missing C++ compiler, and whatever else a compiler raises
            reason = str(error).partition("\n")[0]
            left_out(f"torch-compile-two-pass-s{s}", f"{type(error).__name__}: {reason}")
    return runs, flops


def fewer_bits(first: int, pixels: np.ndarray, calibration: np.ndarray, threads: int, folder: Path) -> dict[str, Embed]:
    """The fused encoder of `candidates` with adapters from block `first` on, in OpenVINO in bf16 and int8."""
    if find_spec("openvino") is None:
        return {}
    path, quantised = folder / f"fused-s{first}.onnx", folder / f"int8-s{first}.onnx"
    quantize_onnx(path, quantised, calibration)
    runs = {f"openvino-int8-s{first}": rivals.in_openvino(quantised, pixels, threads)}
    if "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        runs[f"openvino-bf16-s{first}"] = rivals.in_openvino(path, pixels, threads, "bf16")
    else:
        left_out(f"openvino-bf16-s{first}", "this processor has no bf16 instructions")
    return runs


def precision_of(name: str) -> str:
    return next((precision for precision in ("bf16", "int8") if precision in name.split("-")), "fp32")


def left_out(name: str, reason: str) -> None:
    print(f"left out: {name}: {reason}", file=sys.stderr)


def first_block(name: str) -> int | None:
    """The first adapted block in an implementation's name; None for those with a plain pass only."""
    _, separator, digits = name.rpartition("-s")
    return int(digits) if separator and digits.isdigit() else None


def ratios(name: str, medians: Mapping[str, float]) -> dict[str, float]:
    """The rivals' medians over this row's, by the names in the module's docstring."""
    first = first_block(name)
    ones = [other for other in medians if other.endswith("-one-pass") and not other.startswith("open-clip")]
    compared = {"best-compiled-one-pass": min(ones, key=medians.__getitem__)}
    if first is not None:
        starts = [s for other in medians if "-two-pass-" in other and (s := first_block(other)) is not None]
        nearest = min(starts, key=lambda s: (abs(s - first), s))
        compiled = [other for kind in rivals.COMPILED if (other := f"{kind}-two-pass-s{nearest}") in medians]
        best = min(compiled, key=medians.__getitem__)
        compared = {"eager-two-pass": f"eager-two-pass-s{nearest}", "best-compiled-two-pass": best, **compared}
    return {rival: round(medians[other] / medians[name], 3) for rival, other in compared.items() if other != name}


def verify(runs: Mapping[str, Embed], truths: Mapping[int, tuple[np.ndarray, ...]]) -> dict[str, float]:
    """Raise ArithmeticError unless every candidate agrees with `truths`, eager two passes by first adapted block.

    Returns the least cosine of each candidate in fewer bits.
    """
    cosines = {}
    for name, run in runs.items():
        first, precision = first_block(name), precision_of(name)
        expected = next(iter(truths.values()))[:1] if first is None else truths[first]
        pairs = list(zip(run(), expected, strict=True))
        error = max(float(np.abs(got - right).max()) for got, right in pairs)
        cosine = min(float(((got * right).sum(1) / np.linalg.norm(got, axis=1)).min()) for got, right in pairs)
        if precision == "fp32" and not error <= TOLERANCE:
            raise ArithmeticError(f"{name} is off by {error:.2g} (allowed: {TOLERANCE}); not timed")
        if precision != "fp32":
            if not cosine >= MIN_COSINES[precision]:
                raise ArithmeticError(f"{name} has a cosine of {cosine:.5f} (>= {MIN_COSINES[precision]}); not timed")
            cosines[name] = cosine
    return cosines
