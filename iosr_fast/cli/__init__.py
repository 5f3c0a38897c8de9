"""The command `iosr-fast`: fit a folder, classify images, serve them over HTTP, and describe this machine."""

from __future__ import annotations

import logging
from pathlib import Path

import typer

from iosr_fast.cli.classify import classify
from iosr_fast.cli.fit import fit
from iosr_fast.cli.serve import serve
from iosr_fast.cli.serve_ray import serve_ray
from iosr_fast.utils.command import new_app

app = new_app("iosr-fast", no_args_is_help=True, help=__doc__)
app.command()(serve)
app.command("serve-ray")(serve_ray)
app.command()(classify)
app.command()(fit)


@app.callback()
def main(
    verbose: bool = typer.Option(False, "--verbose", "-v", help="say which runtimes and kernels are chosen"),
) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(name)s: %(message)s")


@app.command()
def info(
    folder: Path | None = typer.Argument(None, help="a saved classifier or an engine: its contents and its digest"),
) -> None:
    """Versions, runtimes and scoring kernels of this machine, or the contents of a saved classifier, verified."""
    if folder is None:
        from iosr_fast.info import format_info

        typer.echo(format_info())
    else:
        from iosr_fast.state.bundle import describe

        typer.echo(describe(folder))


@app.command("export-triton")
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
