"""The command `iosr-fast build-engine`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from iosr_fast.cli.command import note
from iosr_fast.cli.options import Adapter, Model, Runtime, option
from iosr_fast.sealed.folders import check_new_folder

if TYPE_CHECKING:
    import numpy as np

    from iosr_fast.images.geometry import Geometry


def build_engine(
    out: Annotated[Path, option("Folder to write. An engine that is there is replaced.")],
    model: Model = "demo",
    pretrained: Annotated[str | None, option("Tag of open_clip's weights, a file, or none: random.")] = None,
    adapter: Adapter = "auto",
    first_adapted_block: Annotated[int | None, option("A random adapter from this block on, to measure speed.")] = None,
    runtime: Runtime = "auto",
    precision: Annotated[
        str | None, option("fp32, fp16, bf16, int8, or fp8 (TensorRT) [default: fp16 on a GPU if right, or fp32].")
    ] = None,
    calibration: Annotated[Path | None, option("For int8 and fp8: images like yours [default: the demo's].")] = None,
    max_batch: Annotated[
        int | None, option("Images of one run at most; larger batches are split [default: by the processor].")
    ] = None,
) -> None:
    """Fuse a CLIP and its adapter into one encoder, compile it, and check it against PyTorch.

    Without an adapter the engine returns the plain embeddings only, as it does for an image encoder that can't have
    one: a convolutional network, or a model without texts (`iosr-fast models`). The runtime auto is TensorRT or
    TensorRT-RTX on a GPU, PyTorch on a GPU without them, OpenVINO on an x86-64 CPU, and ONNX Runtime on others.

    \b
    iosr-fast build-engine --model ViT-B-16 --pretrained openai \\
        --adapter adapter.safetensors --out engine
    """
    from iosr_fast.export.build import write_engine
    from iosr_fast.export.precision import first_right
    from iosr_fast.export.pretrained import sketch
    from iosr_fast.export.quantize.calibration import QUANTISED, calibration_pictures

    if adapter not in ("auto", "none") and first_adapted_block is not None:
        raise typer.BadParameter("--first-adapted-block is for a random adapter; a file's adapter knows its own blocks")
    if calibration is not None and precision not in QUANTISED:
        raise typer.BadParameter(f"--calibration is for --precision {' and '.join(QUANTISED)}, got {precision}")
    check_new_folder(out, "engine")
    file = None if adapter == "none" or first_adapted_block is not None else adapter
    named = sketch(model, pretrained, file, first_adapted_block)
    precisions = named.of.default_precisions(runtime) if precision is None else (precision,)
    named.of.check(runtime, precisions[0])
    source = named.load()
    if precision in QUANTISED:
        pictures = calibration_pictures(source.name, source.geometry, calibration)
    else:
        pictures = demo_pictures(source.geometry)
    given = max_batch, pictures
    describe(first_right(precisions, lambda name: write_engine(source, out, runtime, name, *given)), out)


def demo_pictures(geometry: Geometry) -> np.ndarray:
    """Some of the demo's pictures at the model's size, to check an engine on: uint8 (N, size, size, 3)."""
    from iosr_fast.backbones.demo.pictures import load_pictures
    from iosr_fast.export.check import CHECKED_PICTURES
    from iosr_fast.export.quantize.calibration import evenly
    from iosr_fast.images.preprocess import to_pixels

    return to_pixels(evenly(load_pictures("held-out").images, CHECKED_PICTURES), geometry)


def describe(manifest: dict[str, Any], out: Path) -> None:
    """Print the engine's files and its errors against two passes in fp32 PyTorch."""
    from msgspec import convert

    from iosr_fast.encoders.engine_folder import Target

    adapter = {
        None: "no adapter: plain embeddings only",
        "trained": "trained adapter",
        "random": "RANDOM adapter: this engine measures speed, its adapted embeddings mean nothing",
    }[manifest["adapter"]]
    lines = [f"{manifest['model']} {manifest['precision']} for {manifest['runtime']}; {adapter}"]
    if (quantised := manifest.get("quantised")) is not None:
        lines.append(f"  {quantised['products']} of {quantised['total_products']} products in {manifest['precision']}")
    for runtime, check in manifest["check"].items():
        if check is None:
            lines.append(f"  {runtime:<12} not run: no GPU for it here (the same graph was checked in ONNX Runtime)")
            continue
        for kind, result in check.items():
            for name in [name for name in ("plain", "adapted") if name in result]:
                error, cosine = result[name]["max_abs_error"], result[name]["min_cosine"]
                found = f"max error {error:.1e}, min cosine {cosine:.7f}"
                lines.append(f"  {runtime:<12} {name:<8} {result['pictures']} {kind} pictures: {found}")
    lines.append(f"built in {manifest['build_seconds']:.1f} s, for batches of up to {manifest['max_batch']}:")
    for name, entry in manifest["files"].items():
        target = f", for {convert(manifest['plans'][name], Target)}" if name in manifest["plans"] else ""
        lines.append(f"  {out / name}  {entry['bytes'] / 1e6:.1f} MB{target}")
    lines.append(f"  {out / 'manifest.json'}")
    note(*lines, err=False)
