"""The command `iosr-fast optimize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from iosr_fast.cli.command import note, stop_message
from iosr_fast.cli.options import Adapter, Nested, Runtime, SavedClassifier, option
from iosr_fast.sealed.folders import check_new_folder
from iosr_fast.utils.progress import progress

EngineGoal = Literal["latency", "throughput", "size"]


def optimize(
    folder: SavedClassifier,
    images: Annotated[Path, option("The images that it was fitted on: one sub-folder for each class.")],
    nested: Nested = False,
    unknown_images: Annotated[Path | None, option("Pictures of no class, if it was fitted with some.")] = None,
    objective: Annotated[EngineGoal, option("latency, throughput, or size in bytes.", metavar="NAME")] = "latency",
    tolerance: Annotated[float, option("Loss of accuracy that is accepted, in points.")] = 0.5,
    out: Annotated[Path | None, option("Folder to write [default: the classifier's own].")] = None,
    runtime: Runtime = "auto",
    precision: Annotated[str, option("Only this precision: fp32, bf16, fp16, int8 or fp8.")] = "auto",
    pretrained: Annotated[str | None, option("Tag of the weights, a file, or the model's name: its own.")] = None,
    adapter: Adapter = "auto",
    smaller_images: Annotated[bool, option("Try smaller images; needs --pretrained.", "--smaller-images")] = False,
) -> None:
    """Choose the fastest engine for a saved classifier that this machine can run and that keeps the accuracy.

    Engines are built, calibrated on the images, timed, and judged by the labels of left-out images. The images are
    encoded again with the chosen engine; classes, ids and the method stay. A log of changes that began before belongs
    to the old classifier: save a classifier with its changes first.

    It needs no PyTorch, except with --pretrained, which names the weights of the CLIP (and --adapter its adapter), for
    engines that are exported again: fp16, int8 and fp8 on a GPU, and any other of a classifier that is not in fp32.

    \b
    iosr-fast optimize my-classifier --images support/
    """
    from iosr_fast.classifier import Classifier
    from iosr_fast.delivery.engine_choice import OptimizeOptions
    from iosr_fast.head.labelled_images import labelled_images, unknown_folder

    OptimizeOptions(objective, tolerance, runtime, precision)  # checks them
    if smaller_images and pretrained is None:
        raise typer.BadParameter("--smaller-images exports from the CLIP: name its weights by --pretrained")
    target = folder if out is None else out
    with stop_message("stopped; nothing was written"):
        if out is not None:
            check_new_folder(out, "classifier")
        paths, labels, *_ = labelled_images(images, nested=nested)
        classifier = Classifier.load(folder)
        classifier.progress = True
        others = None if unknown_images is None else unknown_folder(unknown_images)
        how = objective, tolerance, runtime, precision, pretrained, None if adapter == "none" else adapter
        choice = classifier.optimize(paths, labels, *how, smaller_images, others)
        with progress("save", None):
            classifier.save(target)
    note(f"{target}: {len(classifier.classes_)} classes, {len(classifier.support_.embeddings)} images", err=False)
    note(*choice.lines(), err=False)
