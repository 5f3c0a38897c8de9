"""The command `iosr-fast classify`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from iosr_fast.images.preprocess import BadImageError

if TYPE_CHECKING:
    from iosr_fast.pipeline.job import Job


def classify(
    classifier: Path = typer.Argument(..., help="a folder that `iosr-fast fit` or Classifier.save wrote"),
    images: list[Path] = typer.Argument(..., help="images, or folders of images"),
    out: Path = typer.Option(None, help="a .csv or .parquet file to write instead; a killed run of it is gone on with"),
    top: int = typer.Option(1, help="classes to tell of each image"),
    batch: int = typer.Option(None, help="images encoded at a time [default: 16 on a CPU, 64 on a GPU]"),
    threads: int = typer.Option(None, help="cores to use on a CPU [default: all]"),
    decoder: str = typer.Option("auto", help="auto, cpu, cpu-exact, torchvision-cuda or nvimagecodec"),
    runtime: str = typer.Option("auto"),
    skip_bad: bool = typer.Option(False, "--skip-bad", help="leave unreadable images out (with --out: say why)"),
) -> None:
    """Classify images; writes CSV (path, label, probability) to standard output, or a file with --out."""
    from iosr_fast.pipeline.job import check_place

    try:
        if top < 1:
            raise ValueError(f"expected --top of at least 1, got {top}")
        paths = _list(images, skip_bad)
        if out is not None:
            check_place(out, paths)
        job = _job(classifier, paths, decoder, runtime, batch, top, threads, skip_bad)
        unread = job.stream(sys.stdout, lambda told: typer.echo(told, err=True)) if out is None else job.write(out)
    except BrokenPipeError:  # `| head` has seen enough: typer ends quietly
        raise
    except KeyboardInterrupt:
        typer.echo("iosr-fast: stopped" + ("" if out is None else f"; the same command goes on with {out}"), err=True)
        raise typer.Exit(130) from None
    except BadImageError as error:
        kept = (
            "" if out is None else "; what was classified before is kept: mend it or give --skip-bad, and start again"
        )
        typer.echo(f"iosr-fast: {error}{kept}", err=True)
        raise typer.Exit(2) from error
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        typer.echo(f"iosr-fast: {error}", err=True)
        raise typer.Exit(2) from error
    if unread:
        typer.echo(f"{'left out' if out is None else 'could not read'} {unread} of {len(job.paths)} images", err=True)
    if unread == len(job.paths):
        typer.echo("iosr-fast: none of the images could be read", err=True)
        raise typer.Exit(2)


def _list(images: list[Path], skip_bad: bool) -> list[str]:
    """The images, those of folders listed. Raises ValueError where there are none, FileNotFoundError unless
    `skip_bad` where some are missing; all of them by name, before the classifier is opened."""
    from iosr_fast.images.listing import list_images
    from iosr_fast.utils.text import abbreviate

    paths = [path for given in images for path in (list_images(given).paths if given.is_dir() else [str(given)])]
    if not paths:
        raise ValueError(f"expected images to classify, found none in {abbreviate([str(given) for given in images])}")
    missing = [str(given) for given in images if not given.exists()]
    if missing and not skip_bad:
        raise FileNotFoundError(f"no such file or folder: {abbreviate(missing)}")
    return paths


def _job(
    bundle: Path,
    paths: list[str],
    decoder: str,
    runtime: str,
    batch: int | None,
    top: int,
    threads: int | None,
    skip_bad: bool,
) -> Job:
    """The options, checked, with the classifier opened."""
    from iosr_fast.classifier import Classifier
    from iosr_fast.images.decoders import choose_decoder
    from iosr_fast.pipeline.job import Job
    from iosr_fast.pipeline.stream import choose_batch

    loaded = Classifier.load(bundle, runtime=runtime, threads=threads)
    chosen = choose_decoder(decoder, loaded.encoder.runtime, loaded.exif_orientation)
    batch = choose_batch(loaded.encoder, batch)
    return Job(loaded, paths, chosen, batch, min(top, len(loaded.classes_)), threads, skip_bad)
