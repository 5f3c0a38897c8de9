"""The command `iosr-fast export-triton`."""

from __future__ import annotations

from pathlib import Path

import typer


def export_triton(
    classifier: Path = typer.Argument(..., help="a folder that `iosr-fast fit` or Classifier.save wrote"),
    out: Path = typer.Argument(..., help="the model repository to write"),
    max_batch: int = typer.Option(32, help="images per model call"),
    instances: int = typer.Option(1, help="copies of each model that run in parallel"),
    gpu: bool = typer.Option(False, "--gpu", help="encoder and scoring on GPUs, the encoder through TensorRT"),
    top: int = typer.Option(5, help="classes in the example in README.txt"),
) -> None:
    """Write a classifier as a model repository of NVIDIA Triton Inference Server."""
    from iosr_fast.serving.triton import export_triton as export

    export(classifier, out, max_batch=max_batch, instances=instances, gpu=gpu, top=top)
    typer.echo(f"{out}:")
    typer.echo((out / "README.txt").read_text(encoding="utf-8"), nl=False)
