"""The command `iosr-fast build-engine`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from iosr_fast.cli import options as shared
from iosr_fast.cli.command import note
from iosr_fast.cli.options import Adapter, Model, Runtime, option
from iosr_fast.sealed.folders import check_new_folder
from iosr_fast.utils.require import require_installed

if TYPE_CHECKING:
    import numpy as np

    from iosr_fast.images.geometry import Geometry


def build_engine(
    out: Annotated[Path, option("Folder to write. An engine, or plan, that is there is replaced.")],
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
    classifier: Annotated[
        Path | None, option("A saved classifier, in place of a CLIP: a TensorRT plan from pixels to probabilities.")
    ] = None,
    max_error: shared.PromisedError = None,
    reject_unknown: shared.RejectUnknown = False,
) -> None:
    """Fuse a CLIP and its adapter into one encoder, compile it, and check it against PyTorch.

    Without an adapter the engine returns the plain embeddings only, as it does for an image encoder that can't have
    one: a convolutional network, or a model without texts (`iosr-fast models`). The runtime auto is TensorRT or
    TensorRT-RTX on a GPU, PyTorch on a GPU without them, OpenVINO on an x86-64 CPU, and ONNX Runtime on others.

    --classifier compiles a saved classifier instead, encoder and head in one plan, for programs of TensorRT or Triton
    Inference Server: uint8 images of the encoder's size in, probabilities and labels out.

    \b
    iosr-fast build-engine --model ViT-B-16 --pretrained openai \\
        --adapter adapter.safetensors --out engine
    iosr-fast build-engine --classifier my-classifier \\
        --runtime tensorrt --out plan
    """
    if classifier is not None:
        of_clip = (model, pretrained, adapter, first_adapted_block, precision, calibration)
        if of_clip != ("demo", None, "auto", None, None, None):
            raise typer.BadParameter(
                "expected no --model, --pretrained, --adapter, --first-adapted-block, --precision and --calibration "
                "with --classifier, which has an engine"
            )
        build_classifier(classifier, out, runtime, max_batch, max_error, reject_unknown)
        return
    if max_error is not None or reject_unknown:
        raise typer.BadParameter("expected --max-error and --reject-unknown only with --classifier")
    if not model.endswith(".onnx"):
        require_installed("torch", "cpu")
    from iosr_fast.backbones.load import LoadedModel
    from iosr_fast.backbones.models import check_adaptable, check_model, is_fused
    from iosr_fast.export.build import write_engine
    from iosr_fast.export.check import calibration_pictures
    from iosr_fast.export.precision import QUANTISED, choose_builder, default_precisions, first_right
    from iosr_fast.export.pretrained import choose_adapter, load, read_adapter

    if adapter not in ("auto", "none") and first_adapted_block is not None:
        raise typer.BadParameter("--first-adapted-block is for a random adapter; a file's adapter knows its own blocks")
    if calibration is not None and precision not in QUANTISED:
        raise typer.BadParameter(f"--calibration is for --precision {' and '.join(QUANTISED)}, got {precision}")
    check_new_folder(out, "engine")
    check_model(model, pretrained, precision or "fp32")
    precisions = default_precisions(runtime, is_fused(model)) if precision is None else (precision,)
    choose_builder(runtime, precisions[0], is_fused(model))
    if first_adapted_block is not None:
        check_adaptable(model)
    file = None if adapter == "none" or first_adapted_block is not None else adapter
    read_adapter(model, file)  # checks it before the CLIP is loaded
    clip = load(model, pretrained, precision or "fp32")
    fused = None
    if isinstance(clip, LoadedModel):
        from iosr_fast.backbones.adapter import random_adapter

        fused = choose_adapter(clip, file) if first_adapted_block is None else random_adapter(clip, first_adapted_block)
    quantised = precision in QUANTISED
    pictures = calibration_pictures(clip, calibration) if quantised else demo_pictures(clip.geometry)
    given = max_batch, pictures
    describe(first_right(precisions, lambda name: write_engine(clip, fused, out, runtime, name, *given)), out)


def build_classifier(
    classifier: Path, out: Path, runtime: str, max_batch: int | None, max_error: float | None, reject_unknown: bool
) -> None:
    """Write a saved classifier's plan, and print what was checked."""
    from iosr_fast.delivery.one_plan import PLAN_KIND, plan_runtime, write_plan
    from iosr_fast.encoders.engine_folder import Target
    from iosr_fast.head.verdict import Abstention
    from iosr_fast.methods.unknown import KEEP
    from iosr_fast.store.bundle import load

    check_new_folder(out, PLAN_KIND)
    runtime = plan_runtime(runtime)
    abstention = Abstention.of("reject" if reject_unknown else None, None, KEEP, max_error)
    fit = load(classifier).open("auto", None, 1)
    manifest = write_plan(fit, out, runtime, max_batch, abstention)
    ran = "so does the plan, on the GPU here" if manifest["was_run"] else "the plan was not run: no GPU for it here"
    note(
        f"{len(manifest['class_names'])} classes: pixels to {', '.join(manifest['outputs'])}",
        f"  the graph in ONNX Runtime answers as the classifier; {ran}",
        f"built for batches of up to {manifest['max_batch']}:",
        *(f"  {out / name}  {entry['bytes'] / 1e6:.1f} MB" for name, entry in manifest["files"].items()),
        f"  {out / 'manifest.json'}, for {Target(**manifest['target'])}",
        err=False,
    )


def demo_pictures(geometry: Geometry) -> np.ndarray:
    """Some of the demo's pictures at the model's size, to check an engine on: uint8 (N, size, size, 3)."""
    from iosr_fast.backbones.demo.pictures import load_pictures
    from iosr_fast.export.check import CHECKED_PICTURES, evenly
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
