"""Images with their labels, from folders and tables; and images of none of the classes."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.labels import SEPARATOR
from iosr_fast.images.listing import list_folder, list_images, refuse_url
from iosr_fast.utils.csv_text import check_columns, read_rows

log = logging.getLogger(__name__)


class LabelledImages(NamedTuple):
    """`paths`, `labels` and `groups` of N images, and the names of all classes (labelled_images)."""

    paths: list[Path]
    labels: list[Any]
    class_names: list[str]
    groups: list[str | None]


def labelled_images(folder: str | Path, *more: str | Path) -> LabelledImages:
    """The images of a folder with one sub-folder for each class, or those that a CSV file lists, or of several of both.

    Returns the paths, sorted within a class; the label of each; all class names, sorted: the names of the sub-folders,
    with blanks for underscores; and the group of each image, or None. Files that are no images are left out with a
    warning (images.listing).

    A CSV file has the columns `path`, relative to its folder, and `label`, as `iosr-fast suggest` and `classify` write
    them; rows without a label are ignored. A column `group` names images that have more in common than their class, as
    those of one video. With `labels` in place of `label` pictures may have several, joined by ";", or none: labels are
    then frozensets, those of a folder of a class too.

    An image (a file, links resolved) that a later place lists again has the later label, and a warning counts these: a
    CSV file of corrected labels, as the page of `iosr-fast audit` saves it, follows the folder.

    Raises FileNotFoundError without the folder or file; IosrFastError for fewer than two classes of a folder, a class
    without images, a folder of splits (train/, test/), a path under two labels in one place, and a CSV file without
    these columns or without a label.

    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     for name in ("lemon", "green_apple"):
    ...         Path(folder, name).mkdir()
    ...         Path(folder, name, "1.jpg").touch()
    ...     _ = Path(folder, "more.csv").write_text("path,label\\nnew/2.jpg,lime\\n")
    ...     paths, labels, class_names, groups = labelled_images(folder, Path(folder, "more.csv"))
    >>> labels, class_names
    (['green apple', 'lemon', 'lime'], ['green apple', 'lemon', 'lime'])
    """
    paths: list[Path] = []
    files: list[str] = []  # the paths, links resolved where there are several places to compare
    labels: list[str | frozenset[str]] = []
    groups: list[str | None] = []
    for place in map(Path, (folder, *more)):
        is_table = place.suffix.lower() == ".csv" and not place.is_dir()
        found, of_found, of_groups = _read_table(place) if is_table else _read_class_folders(place)
        here, known = [os.path.realpath(path) if more else str(path) for path in found], set(files)
        given = dict(zip(here, of_found, strict=True))
        for path, file, label in zip(found, here, of_found, strict=True):
            if given[file] != label:
                two = f"{label!r} and {given[file]!r}"
                raise IosrFastError(f"expected one label for a file of {place}, got {two} for {path}: remove a row")
        grouped = {file: group for file, group in zip(here, of_groups, strict=True) if group is not None}
        labels = [given.get(file, label) for file, label in zip(files, labels, strict=True)]
        groups = [grouped.get(file, group) for file, group in zip(files, groups, strict=True)]
        new = [i for i, file in enumerate(here) if file not in known]
        paths += [found[i] for i in new]
        files += [here[i] for i in new]
        labels += [of_found[i] for i in new]
        groups += [of_groups[i] for i in new]
        if again := len(known & given.keys()):
            log.warning("%s: its labels replace those of %d images that were listed before", place, again)
    sets = [frozenset({label}) if isinstance(label, str) else label for label in labels]
    several = any(isinstance(label, frozenset) for label in labels)
    return LabelledImages(paths, sets if several else labels, sorted(frozenset().union(*sets)), groups)


_Found = tuple[list[Path], Sequence[str | frozenset[str]], Sequence[str | None]]


def _read_class_folders(folder: Path) -> _Found:
    paths, labels, _ = list_folder(folder)
    return paths, [name.replace("_", " ").strip() for name in labels], [None] * len(paths)


def _read_table(file: Path) -> _Found:
    if not file.is_file():
        raise FileNotFoundError(f"expected a CSV file of path and label, found no file {file}")
    columns, rows = read_rows(file)
    check_columns(columns, str(file))
    several = "labels" in columns and "label" not in columns
    name = "labels" if several else "label"
    if missing := {"path", name} - set(columns):
        raise IosrFastError(
            f"expected the columns path and label in {file}, got {', '.join(columns) or 'no line'}; "
            f"add {' and '.join(sorted(missing))} (labels in place of label where pictures may have several)"
        )
    named = [(row["path"], row[name].strip(), row.get("group", "").strip()) for row in rows]
    if not any(label for _, label, _ in named):
        raise IosrFastError(f"expected labels in {file}, got {len(rows)} rows without one; fill in the column {name}")
    labelled = [row for row in named if row[1] or several]
    for path, label, _ in labelled:
        if not path:
            raise IosrFastError(f"expected a path in each row of {file}, got none for the label {label!r}")
        refuse_url(path)
    paths, labels = [file.parent / path for path, _, _ in labelled], [label for _, label, _ in labelled]
    groups = [group or None for _, _, group in labelled]
    if not several:
        return paths, labels, groups
    sets = [frozenset(part.strip() for part in row.split(SEPARATOR) if part.strip()) for row in labels]
    return paths, sets, groups


def unknown_folder(folder: str | Path) -> list[str]:
    """The paths of all images in a folder and below, pictures of none of the classes."""
    paths = list_images(folder).paths
    if not paths:
        raise IosrFastError(f"expected pictures of none of the classes in {folder}, found no image")
    return paths
