"""The command `iosr-fast export-triton`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from iosr_fast.cli.options import SavedClassifier


def export_triton(
    classifier: SavedClassifier,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Model repository to write.")],
    max_batch: Annotated[int, typer.Option(help="Images of a call to a model at most.")] = 32,
    instances: Annotated[int, typer.Option(help="Copies of each model that run in parallel.")] = 1,
    gpu: Annotated[bool, typer.Option("--gpu", help="Run on GPUs; the encoder through TensorRT.")] = False,
    top: Annotated[int, typer.Option(help="Classes that the example in README.txt reports.")] = 5,
    keep: Annotated[
        float | None,
        typer.Option(help="Add the unknown score, and the threshold that this share of known images does not exceed."),
    ] = None,
) -> None:
    """Write a saved classifier as a model repository of NVIDIA Triton Inference Server."""
    from iosr_fast.serving.triton import export_triton as export

    export(classifier, out, max_batch=max_batch, instances=instances, gpu=gpu, top=top, keep=keep)
    typer.echo(f"{out}:")
    typer.echo((out / "README.txt").read_text(encoding="utf-8"), nl=False)
