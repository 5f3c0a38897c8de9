"""`iosr-fast evaluate CLASSIFIER IMAGES`, a part of the command `iosr-fast evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from iosr_fast.cli.options import Runtime, SavedClassifier, SkipBad
from iosr_fast.exceptions import IosrFastError
from iosr_fast.utils.command import new_file, new_page, say, write_new
from iosr_fast.utils.outputs import check_utf8
from iosr_fast.utils.text import abbreviate

_SHOWN = 10  # lines of each kind on standard output


def saved(
    classifier: SavedClassifier,
    images: Annotated[
        Path,
        typer.Argument(metavar="IMAGES", help="Folder with one sub-folder a class, or a CSV file of path and label."),
    ],
    html: Annotated[
        Path | None, typer.Option(callback=new_page, help="Write a page with the pictures here, one file.")
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", callback=new_file, help="Write the figures here, as JSON.")
    ] = None,
    unknown_images: Annotated[
        Path | None,
        typer.Option(
            "--unknown-images",
            "--unknown",
            metavar="FOLDER",
            help="Images of none of the classes, also in folders below.",
        ),
    ] = None,
    keep: Annotated[float, typer.Option(help="Share of known images that a rejection of unknown ones keeps.")] = 0.95,
    coverage: Annotated[float, typer.Option(help="Share of label sets that have the label.")] = 0.9,
    runtime: Runtime = "auto",
    skip_bad: SkipBad = False,
) -> None:
    """Measure a saved classifier on labelled images that it was not fitted on.

    Accuracy with its 95% interval, the classes and pairs of classes with the most mistakes, log-loss, calibration, and
    what the promises of label sets and of rejection are worth. --html shows the mistakes with their pictures and the
    nearest examples.

    Also written without `saved`: iosr-fast evaluate CLASSIFIER IMAGES.
    """
    from iosr_fast.classifier import Classifier
    from iosr_fast.head.labelled_images import labelled_images, unknown_folder
    from iosr_fast.reports.evaluation_report import evaluation_page

    if not classifier.is_dir():
        raise FileNotFoundError(
            "expected the folder of a saved classifier, or one of the commands features, demo and paper, found no "
            f"folder {classifier}"
        )
    paths, labels, names = labelled_images(images)
    others = [] if unknown_images is None else unknown_folder(unknown_images)
    check_utf8([*map(str, paths), *others])
    loaded = Classifier.load(classifier, runtime=runtime).set_params(progress=True)
    known = [info.name for info in loaded.classes()]
    if foreign := sorted(set(names) - set(known)):
        raise IosrFastError(
            f"expected labels among the {len(known)} classes of {classifier} ({abbreviate(known)}), got "
            f"{abbreviate(foreign)}: rename these or leave them out; images of no class go to --unknown-images"
        )
    found = loaded.evaluate(paths, labels, others, coverage=coverage, keep=keep, skip_bad=skip_bad)
    say(*found.summary().split("\n"))
    worst = sorted((one for one in found.class_results if one.right < one.images), key=lambda one: one.recall)
    _echo("least often right:", [f"{one.label}: {one.right} of {one.images}" for one in worst])
    mixups = [f"{one.label} taken for {one.other}: {one.mistaken} of {one.images}" for one in found.mixups]
    _echo("most confused:", mixups)
    wrong = [f"{one.image}: {one.label} taken for {one.predicted} ({one.probability:.0%})" for one in found.mistakes]
    _echo("most probable mistakes:", wrong, found.wrong)
    _echo("unreadable:", [str(error) for error in found.errors])
    if html is not None:
        title = f"Evaluation of {classifier.name} on {images.name}"
        write_new(html, evaluation_page(found, loaded.picture, title, loaded.exif_orientation_))
    if json_path is not None:
        write_new(json_path, json.dumps(found.to_dict(), indent=1, ensure_ascii=False) + "\n")


def _echo(title: str, lines: list[str], count: int | None = None) -> None:
    """The first lines below a title, and how many more there are of `count` in all."""
    if lines:
        say(title)
    for line in lines[:_SHOWN]:
        say(f"  {line}")
    if (more := (len(lines) if count is None else count) - _SHOWN) > 0:
        say(f"  and {more} more; --html or --json lists them")
