"""Fuse a CLIP and its adapter into one encoder, compile it and check it against PyTorch.

    python tools/build_engine.py --model demo --runtime onnxruntime --out build/demo-engine
    python tools/build_engine.py --model ViT-B-16 --pretrained openai --adapter adapter.safetensors \\
        --runtime tensorrt --precision fp16 --max-batch 64 --out build/b16

    python tools/build_engine.py --model ViT-B-16 --pretrained openai --adapter adapter.safetensors \\
        --runtime onnxruntime --precision int8 --calibration photos/ --out build/b16-int8
    python tools/build_engine.py --add-plan --runtime tensorrt --out build/b16      # for this GPU, beside the others

The demo uses its shipped adapter. --first-adapted-block instead of --adapter fuses a random adapter, to measure speed.
Without either, or with --adapter none, the engine returns the plain embedding only. --runtime auto is TensorRT or
TensorRT-RTX on a GPU, PyTorch on a GPU without them, ONNX Runtime on a CPU.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import typer

from iosr_fast.utils.command import one_line_errors
from iosr_fast.utils.outputs import check_new_folder
from iosr_fast.utils.require import require_installed

with one_line_errors("iosr-fast"):
    require_installed("torch", "cpu")
    from iosr_fast.clip.architecture import check_architecture
    from iosr_fast.clip.demo.pictures import load_pictures
    from iosr_fast.clip.load import load_clip
    from iosr_fast.encoders.runtimes.plans import describe_target
    from iosr_fast.export.calibration import calibration_pictures
    from iosr_fast.export.engine_precision import QUANTISED, choose_builder
    from iosr_fast.export.export import add_plan, random_adapter, write_engine
    from iosr_fast.export.export_check import CHECKED_PICTURES
    from iosr_fast.export.pretrained import choose_adapter, read_adapter
    from iosr_fast.images.preprocess import to_pixels


def real_pictures(size: int) -> np.ndarray:
    """Some of the demo's pictures at the model's size: uint8 (N, size, size, 3)."""
    images = load_pictures("held-out").images
    return to_pixels(images[np.linspace(0, len(images) - 1, CHECKED_PICTURES).astype(int)], size)


def describe(manifest: dict[str, Any], out: Path) -> None:
    """Print the engine's files and its errors against two passes in fp32 PyTorch."""
    adapter = {
        None: "no adapter: plain embeddings only",
        "trained": "trained adapter",
        "random": "RANDOM adapter: this engine measures speed, its adapted embeddings mean nothing",
    }
    print(f"{manifest['model']} {manifest['precision']} for {manifest['runtime']}; {adapter[manifest['adapter']]}")
    for runtime, check in manifest["check"].items():
        if check is None:
            print(f"  {runtime:<12} not run: no GPU for it here (the same graph was checked in ONNX Runtime)")
            continue
        for kind, result in check.items():
            for name in ("plain", "adapted"):
                if name in result:
                    error, cosine = result[name]["max_abs_error"], result[name]["min_cosine"]
                    pictures = f"{result['pictures']} {kind} pictures"
                    print(f"  {runtime:<12} {name:<8} {pictures}: max error {error:.1e}, min cosine {cosine:.7f}")
    print(f"built in {manifest['build_seconds']:.1f} s, for batches of up to {manifest['max_batch']}:")
    for name, entry in manifest["files"].items():
        target = f", for {describe_target(manifest['plans'][name])}" if name in manifest["plans"] else ""
        print(f"  {out / name}  {entry['bytes'] / 1e6:.1f} MB{target}")
    print(f"  {out / 'manifest.json'}")


def build_engine(
    out: Path = typer.Option(..., help="the folder to write; replaces an engine"),
    model: str = typer.Option("demo", help="'demo' or a model of open_clip"),
    pretrained: str | None = typer.Option(
        None, help="tag, weights file, or 'none' for random weights; not needed for the demo"
    ),
    adapter: str | None = typer.Option(
        None, help="a file of tools/train_adapter.py, or 'none' [demo: the shipped one]"
    ),
    first_adapted_block: int | None = typer.Option(
        None, help="fuse a random adapter from this block on, to measure speed"
    ),
    runtime: str = typer.Option("auto", help="auto, onnxruntime, openvino, tensorrt, tensorrt_rtx or torch"),
    precision: str = typer.Option(
        "fp32", help="fp32, fp16 (GPUs), bf16 (openvino), int8 (all but torch) or fp8 (tensorrt, tensorrt_rtx)"
    ),
    calibration: Path | None = typer.Option(
        None, help="int8, fp8: a folder of pictures like those to be classified [demo: its generic ones]"
    ),
    max_batch: int = typer.Option(32, help="the largest batch of one run; larger ones are split"),
    add: bool = typer.Option(
        False, "--add-plan", help="add a plan for --runtime and this machine to the engine at --out"
    ),
    verbose: bool = typer.Option(False, "--verbose", "-v", help="log choices, and TensorRT's messages"),
) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s")
    if adapter not in (None, "none") and first_adapted_block is not None:
        raise typer.BadParameter("--first-adapted-block is for a random adapter; a file's adapter knows its own blocks")
    if calibration is not None and precision not in QUANTISED:
        raise typer.BadParameter(f"--calibration is for {' and '.join(QUANTISED)}, got --precision {precision}")
    if add and (adapter or pretrained or first_adapted_block is not None):
        raise typer.BadParameter("--add-plan compiles the engine at --out as it is; leave model and adapter out")
    if add:
        describe(add_plan(out, runtime), out)
        return
    check_new_folder(out, "engine")
    choose_builder(runtime, precision)
    check_architecture(model)
    file = None if adapter == "none" or first_adapted_block is not None else adapter or "auto"
    read_adapter(model, file)  # checks it before the CLIP is loaded
    clip = load_clip(model, pretrained)
    fused = choose_adapter(clip, file) if first_adapted_block is None else random_adapter(clip, first_adapted_block)
    pictures = calibration_pictures(clip, calibration) if precision in QUANTISED else None
    real = real_pictures(clip.image_size)
    describe(write_engine(clip, fused, out, runtime, precision, max_batch, real, pictures), out)
