"""Labels as callers give them, checked."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.multi_label import SEPARATOR
from iosr_fast.head.names import check_names
from iosr_fast.images.listing import list_folder, refuse_url
from iosr_fast.utils.csv_text import check_columns, recovered
from iosr_fast.utils.text import abbreviate

_HINTS: dict[type, str] = {
    float: "; integers are made by labels.astype(int)",
    bytes: "; decode it",
    **dict.fromkeys((set, frozenset), "; a classifier that was fitted with one label an image takes one"),
}
# What missing values become when NumPy or pandas turn a column into text.
_MISSING_AS_TEXT = frozenset({"nan", "NaN", "None", "null", "<NA>", "NaT"})


def check_labels(
    images: Sequence[Any], labels: Any, class_names: Sequence[str] | None
) -> tuple[list[str], np.ndarray, bool]:
    """The class names, each image's class id, and whether the labels are integers, for a fit.

    Raises ValueError for labels as `class_ids` does, and for class names that are no names or can't be told apart.
    """
    values = _label_values(labels, len(images))
    if class_names is None:
        if not values:
            raise IosrFastError(
                "expected labelled images or class_names, got neither: without them there are no classes"
            )
        if isinstance(values[0], int):
            raise IosrFastError(
                "integer labels have no names: pass class_names, the name of each class in order, to fit or to "
                "Classifier; cross-validation of predict_proba needs Classifier(class_names=sorted names)"
            )
        missing = sorted(_MISSING_AS_TEXT.intersection(values))
        if missing:
            raise IosrFastError(
                f"expected a label for every image, got {abbreviate(missing)}, which is what a missing value becomes "
                "as text; leave those images out, or pass class_names if a class is called so"
            )
        class_names = sorted(set(values))
    names = check_names(class_names)
    return names, _ids(values, names, range(len(names))), bool(values) and isinstance(values[0], int)


def class_ids(
    images: Sequence[Any], labels: Any, names: Sequence[str], numbers: Sequence[int] | None = None
) -> np.ndarray:
    """Each image's class id (N,) int64, the position of its class in `names`; `labels` are names, or integers: the
    classes' `numbers` (None: positions).

    Raises ValueError, naming the position, for a missing label (None, NaN, NaT), one that is neither text nor an
    integer, a mixture of both, one without a class, and for another number of labels than images.
    """
    return _ids(_label_values(labels, len(images)), names, range(len(names)) if numbers is None else numbers)


def _label_values(labels: Any, n_images: int) -> list[Any]:
    """Labels as Python's str or int, all of one kind. Nothing is turned into text that isn't."""
    if isinstance(labels, np.ma.MaskedArray):
        labels = list(labels)  # asarray would drop the mask
    if not isinstance(labels, list | tuple):
        labels = np.asarray([] if labels is None else labels)
        if labels.ndim != 1:
            raise IosrFastError(
                f"expected one label for each of {n_images} images in a sequence, got labels of shape {labels.shape}"
            )
    if len(labels) != n_images:
        raise IosrFastError(f"expected one label for each of {n_images} images, got {len(labels)} labels")
    plain = [value.item() if isinstance(value, np.generic) else value for value in labels]
    for i, value in enumerate(plain):
        if _is_missing(value):
            raise IosrFastError(
                f"expected a label for every image, got {labels[i]!r} at position {i}: leave that image out or label it"
            )
    values = [_label(value, labels[i], i) for i, value in enumerate(plain)]
    first: dict[type, int] = {}
    for i, value in enumerate(values):
        first.setdefault(type(value), i)
    if len(first) > 1:
        raise IosrFastError(
            f"expected labels to be all class names or all integers, got {values[first[str]]!r} at position "
            f"{first[str]} and {values[first[int]]!r} at position {first[int]}"
        )
    return values


def _label(value: Any, original: Any, position: int) -> str | int:
    """One label; `original` is the value before NumPy's scalars became Python's."""
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    hint = _HINTS.get(type(value), "")
    raise IosrFastError(
        f"expected labels to be class names or integers, got {type(original).__name__} ({original!r}) at position "
        f"{position}{hint}"
    )


def _is_missing(value: Any) -> bool:
    """None, NaN of any kind, NaT, a masked value and pandas.NA (whose comparison has no truth value)."""
    if value is None or type(value).__name__ in ("NAType", "NaTType", "MaskedConstant"):
        return True
    return isinstance(value, Number) and bool(value != value)


def _ids(values: Sequence[Any], names: Sequence[str], numbers: Sequence[int]) -> np.ndarray:
    if values and isinstance(values[0], int):
        position = {number: i for i, number in enumerate(numbers)}
        outside = sorted({number for number in values if number not in position})
        if outside:
            removed = numbers[-1] + 1 - len(numbers)
            but = f" except the {removed} of removed classes" if removed else ""
            shown = abbreviate([str(number) for number in outside])
            raise IosrFastError(f"expected labels in 0..{numbers[-1]}, one for each class name{but}, got {shown}")
        return np.array([position[number] for number in values], np.int64)
    index = {name: i for i, name in enumerate(names)}
    unknown = sorted({name for name in values if name not in index})
    if unknown:
        raise IosrFastError(f"the labels {abbreviate(unknown)} are not among the {len(names)} class names")
    return np.array([index[name] for name in values], np.int64)


def labelled_images(folder: str | Path, *more: str | Path) -> tuple[list[Path], list[Any], list[str]]:
    """The images of a folder with one sub-folder for each class, or those that a CSV file lists, or of several of both.

    Returns the paths, sorted within a class; the label of each; and all class names, sorted: the names of the
    sub-folders, with blanks for underscores. Files that are no images are left out with a warning (images.listing).

    A file that ends in .csv has the columns `path` and `label`; others are ignored, and so are rows without a label.
    Paths are relative to the file's folder; both texts are read as `iosr-fast suggest` and `classify` write them
    (utils.csv_text.recovered).

    With the column `labels` in place of `label` pictures may have several labels each, joined by ";", or none: labels
    are then frozensets, those of a folder of a class too.

    Raises FileNotFoundError without the folder or file; IosrFastError for fewer than two classes of a folder, a class
    without images, a folder that holds splits (train/, test/) instead of classes, and a CSV file without these columns
    or without a label.

    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     for name in ("lemon", "green_apple"):
    ...         Path(folder, name).mkdir()
    ...         Path(folder, name, "1.jpg").touch()
    ...     _ = Path(folder, "more.csv").write_text("path,label\\nnew/2.jpg,lime\\n")
    ...     paths, labels, class_names = labelled_images(folder, Path(folder, "more.csv"))
    >>> labels, class_names
    (['green apple', 'lemon', 'lime'], ['green apple', 'lemon', 'lime'])
    """
    paths: list[Path] = []
    labels: list[str | frozenset[str]] = []
    names: set[str] = set()
    for place in map(Path, (folder, *more)):
        is_table = place.suffix.lower() == ".csv" and not place.is_dir()
        found, of_found, classes = _read_table(place) if is_table else _read_class_folders(place)
        paths += found
        labels += of_found
        names |= set(classes)
    if any(isinstance(label, frozenset) for label in labels):
        return paths, [frozenset({one}) if isinstance(one, str) else one for one in labels], sorted(names)
    return paths, labels, sorted(names)


def _read_class_folders(folder: Path) -> tuple[list[Path], Sequence[str], list[str]]:
    paths, labels, classes = list_folder(folder)
    spoken = {name: name.replace("_", " ").strip() for name in classes}
    return paths, [spoken[name] for name in labels], [spoken[name] for name in classes]


def _read_table(file: Path) -> tuple[list[Path], Sequence[str | frozenset[str]], list[str]]:
    if not file.is_file():
        raise FileNotFoundError(f"expected a CSV file of path and label, found no file {file}")
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            reader = csv.DictReader(opened)
            columns, rows = list(reader.fieldnames or []), list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise IosrFastError(f"can't read {file} as CSV in UTF-8: {error}; save it as such") from error
    check_columns(columns, str(file))
    several = "labels" in columns and "label" not in columns
    name = "labels" if several else "label"
    if missing := {"path", name} - set(columns):
        raise IosrFastError(
            f"expected the columns path and label in {file}, got {', '.join(columns) or 'no line'}; "
            f"add {' and '.join(sorted(missing))} (labels in place of label where pictures may have several)"
        )
    named = [(recovered(row["path"] or ""), recovered((row[name] or "").strip())) for row in rows]
    if not any(label for _, label in named):
        raise IosrFastError(f"expected labels in {file}, got {len(rows)} rows without one; fill in the column {name}")
    labelled = [(path, label) for path, label in named if label or several]
    if without := [label for path, label in labelled if not path]:
        raise IosrFastError(f"expected a path in each row of {file}, got none for the label {without[0]!r}")
    for path, _ in labelled:
        refuse_url(path)
    paths, labels = [file.parent / path for path, _ in labelled], [label for _, label in labelled]
    if not several:
        return paths, labels, sorted(set(labels))
    sets = [frozenset(part.strip() for part in row.split(SEPARATOR) if part.strip()) for row in labels]
    return paths, sets, sorted(frozenset().union(*sets))
