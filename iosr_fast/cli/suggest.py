"""The command `iosr-fast suggest`."""

from __future__ import annotations

import sys
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from iosr_fast.cli import options as shared
from iosr_fast.cli.command import note, output, write_new
from iosr_fast.cli.options import Csv, Html, Runtime, SavedClassifier, SkipBad, argument, option, rows_in
from iosr_fast.images.detector_files import Selection
from iosr_fast.sealed.outputs import check_utf8
from iosr_fast.utils.csv_text import escaped, line_writer

if TYPE_CHECKING:
    from iosr_fast.files.suggest import FolderSuggestions


def suggest(
    classifier: SavedClassifier,
    folder: Annotated[
        Path,
        argument("FOLDER", "Folder of unlabelled images, CSV file with a column path, or detector file."),
    ],
    number: Annotated[int, option("Most images to suggest.", "--number", "-n", min=1)] = 20,
    out: Csv = None,
    html: Html = None,
    runtime: Runtime = "auto",
    skip_bad: SkipBad = False,
    root: shared.Root = None,
    min_confidence: shared.MinConfidence = None,
    category: shared.Category = None,
) -> None:
    """Choose the images of a folder that are worth labelling next.

    Diverse ones that the classifier is uncertain of, new classes first. The CSV has path, an empty label to fill in,
    what the classifier takes the image for with its probability, and how many images it stands for. Then

    \b
    iosr-fast fit support/ labels.csv --model ... --out ...

    fits on the old images and the labelled ones; rows without a label are left out.
    """
    from iosr_fast.classifier import Classifier
    from iosr_fast.files.embedding_files import read_rows
    from iosr_fast.files.source import read_source

    rows = rows_in(classifier)
    boxes = Selection(root, min_confidence, tuple(category or ()))
    given = None if rows is None else read_rows([folder], rows, html is not None)[0]
    images = given or read_source([str(folder)], False, skip_bad, boxes)
    loaded = Classifier.load(classifier, runtime)
    suggestions = loaded.suggest(images, number, skip_bad=skip_bad)
    check_utf8(map(str, suggestions.paths))
    if out is not None:
        write_new(out, _table(suggestions))
    elif html is None:
        output(sys.stdout).write(_table(suggestions))
    if html is not None:
        from iosr_fast.reports.suggest_report import suggest_page

        names = [info.name for info in loaded.classes()]
        title = f"What to label next in {folder.name or folder}"
        write_new(html, suggest_page(suggestions, names, title, loaded.exif_orientation_))
    for error in suggestions.errors:
        note(f"left out: {error}")


def _table(suggestions: FolderSuggestions) -> str:
    file = StringIO()
    writer = line_writer(file)
    writer.writerow(["path", "label", "guess", "probability", "stands_for"])
    for (path, label, probability), stands in zip(suggestions, suggestions.stands.tolist(), strict=True):
        name = path.resolve() if isinstance(path, Path) else path
        writer.writerow([escaped(str(name)), "", escaped(label), f"{probability:.4f}", stands])
    return file.getvalue()
