"""Images with their labels, from folders and tables; and images of none of the classes."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.calibration import check_calibration
from iosr_fast.head.labels import SEPARATOR, class_ids
from iosr_fast.images.listing import list_folder, list_images, refuse_url
from iosr_fast.utils.csv_text import check_columns, read_rows

_LabelledFile = tuple[Path, str | frozenset[str], str | None]
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
    CSV file of corrected labels, as the page of `iosr-fast audit` saves it, follows the folder. Each counts once.

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
    found: dict[str, _LabelledFile] = {}  # by file, links resolved where there are several places to compare
    for place in map(Path, (folder, *more)):
        is_table = place.suffix.lower() == ".csv" and not place.is_dir()
        here = dict[str, _LabelledFile]()
        for path, label, group in _read_table(place) if is_table else _read_class_folders(place):
            first = here.setdefault(os.path.realpath(path) if more else str(path), (path, label, group))
            if first[1] != label:
                two = f"{first[1]!r} and {label!r}"
                raise IosrFastError(f"expected one label for a file of {place}, got {two} for {path}: remove a row")
        if again := found.keys() & here.keys():
            log.warning("%s: its labels replace those of %d images that were listed before", place, len(again))
            here |= {file: (found[file][0], here[file][1], here[file][2] or found[file][2]) for file in again}
        found |= here
    rows = list(found.values())
    several = any(isinstance(label, frozenset) for _, label, _ in rows)
    sets = [frozenset({label}) if isinstance(label, str) else label for _, label, _ in rows]
    labels = sets if several else [label for _, label, _ in rows]
    names = sorted(frozenset().union(*sets))
    return LabelledImages([path for path, _, _ in rows], labels, names, [group for _, _, group in rows])


def _read_class_folders(folder: Path) -> list[_LabelledFile]:
    return [(path, name.replace("_", " ").strip(), None) for path, name in zip(*list_folder(folder)[:2], strict=True)]


def _read_table(file: Path) -> list[_LabelledFile]:
    if not file.is_file():
        raise FileNotFoundError(f"expected a CSV file of path and label, found no file {file}")
    columns, rows = read_rows(file)
    several = "labels" in columns and "label" not in columns
    name = "labels" if several else "label"
    check_columns(columns, file, ("path", name), " (labels in place of label where pictures may have several)")
    named = [(row["path"], row[name].strip(), row.get("group", "").strip() or None) for row in rows]
    if not any(label for _, label, _ in named):
        raise IosrFastError(f"expected labels in {file}, got {len(rows)} rows without one; fill in the column {name}")
    labelled = list[_LabelledFile]()
    for path, label, group in named:
        if not (label or several):
            continue
        if not path:
            raise IosrFastError(f"expected a path in each row of {file}, got none for the label {label!r}")
        refuse_url(path)
        parts = frozenset(part.strip() for part in label.split(SEPARATOR) if part.strip())
        labelled.append((file.parent / path, parts if several else label, group))
    return labelled


def calibration_images(place: str | Path, support: LabelledImages) -> LabelledImages:
    """The images of a folder or CSV file, for `calibrate_on` after a fit on `support`. What can be refused now is."""
    given = labelled_images(place)
    for one in (support, given):
        class_ids(one.paths, one.labels, support.class_names)
    check_calibration(len(given.paths), len(given.paths))
    return given


def unknown_folder(folder: str | Path) -> list[str]:
    """The paths of all images in a folder and below, pictures of none of the classes."""
    paths = list_images(folder).paths
    if not paths:
        raise IosrFastError(f"expected pictures of none of the classes in {folder}, found no image")
    return paths
