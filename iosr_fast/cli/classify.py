"""The command `iosr-fast classify`."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from iosr_fast.exceptions import BadImageError, IosrFastError
from iosr_fast.utils.command import stop_message


def classify(
    classifier: Path = typer.Argument(..., help="a folder that `iosr-fast fit` or Classifier.save wrote"),
    images: list[Path] = typer.Argument(..., help="images, or folders of images"),
    out: Path = typer.Option(None, help="a .csv or .parquet file to write instead; an interrupted run resumes"),
    top: int = typer.Option(1, help="classes to report per image"),
    batch: int = typer.Option(None, help="images encoded at a time [default: 16 on a CPU, 64 on a GPU]"),
    threads: int = typer.Option(None, help="cores to use on a CPU [default: all]"),
    decoder: str = typer.Option("auto", help="auto, cpu, cpu-exact, torchvision-cuda or nvimagecodec"),
    runtime: str = typer.Option("auto"),
    skip_bad: bool = typer.Option(False, "--skip-bad", help="leave unreadable images out (with --out: say why)"),
) -> None:
    """Classify images; writes CSV (path, label, probability) to standard output, or a file with --out."""
    from iosr_fast.classifier import Classifier
    from iosr_fast.images.decoders import choose_decoder
    from iosr_fast.pipeline.job import Job, check_place
    from iosr_fast.pipeline.stream import choose_batch

    if top < 1:
        raise IosrFastError(f"expected --top of at least 1, got {top}")
    with stop_message("stopped" + ("" if out is None else f"; the same command resumes {out}"), "iosr-fast"):
        paths = _list(images, skip_bad)
        if out is not None:
            check_place(out, paths)
        loaded = Classifier.load(classifier, runtime=runtime, threads=threads)
        encoder = loaded.encoder
        job = Job(
            loaded.snapshot(),
            encoder,
            loaded.engine_,
            choose_decoder(decoder, encoder.runtime, loaded.exif_orientation_),
            paths,
            choose_batch(encoder, batch),
            min(top, len(loaded.classes_)),
            threads,
            skip_bad,
        )
        try:
            unread = job.stream(sys.stdout, lambda line: typer.echo(line, err=True)) if out is None else job.write(out)
        except BadImageError as error:
            if out is None:
                raise
            advice = "earlier results are kept: repair the image or give --skip-bad, and start again"
            raise IosrFastError(f"{error}; {advice}") from error
    if unread:
        typer.echo(f"{'left out' if out is None else 'could not read'} {unread} of {len(paths)} images", err=True)
    if unread == len(paths):
        raise IosrFastError("none of the images could be read")


def _list(images: list[Path], skip_bad: bool) -> list[str]:
    """Paths of the images, folders expanded.

    Raises ValueError for no images and, unless `skip_bad`, FileNotFoundError naming all missing ones.
    """
    from iosr_fast.images.listing import list_images
    from iosr_fast.utils.text import abbreviate

    paths = [path for place in images for path in (list_images(place).paths if place.is_dir() else [str(place)])]
    if not paths:
        raise IosrFastError(
            f"expected images to classify, found none in {abbreviate([str(place) for place in images])}"
        )
    missing = [str(place) for place in images if not place.exists()]
    if missing and not skip_bad:
        raise FileNotFoundError(f"no such file or folder: {abbreviate(missing)}")
    return paths
