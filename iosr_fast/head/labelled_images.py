"""Images with their labels, from folders and tables; and images of none of the classes."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.calibration import check_calibration
from iosr_fast.head.class_tree import paths_of
from iosr_fast.head.labels import SEPARATOR, are_label_sets, class_ids, read_label_sets
from iosr_fast.head.names import mistyped
from iosr_fast.images.choices import read_choices
from iosr_fast.images.crop import listed_paths, picture_of
from iosr_fast.images.detector_files import DetectorFile, Selection, is_detector_file, list_boxes
from iosr_fast.images.keywords import KINDS, list_keywords
from iosr_fast.images.listing import list_folder, list_images
from iosr_fast.methods.tree import Path as Nodes
from iosr_fast.utils.csv_text import check_columns, read_rows
from iosr_fast.utils.text import abbreviate

_LabelledFile = tuple[Path, str | frozenset[str], str | None]
log = logging.getLogger(__name__)


class LabelledImages(NamedTuple):
    """`paths`, `labels` and `groups` of N images, the names of all classes, and of nested folders the parent of each
    class and node below another (labelled_images)."""

    paths: list[Path]
    labels: list[Any]
    class_names: list[str]
    groups: list[str | None]
    tree: dict[str, str]


def labelled_images(
    folder: str | Path,
    *more: str | Path,
    nested: bool = False,
    skip_bad: bool = False,
    root: str | Path | None = None,
    label_column: str | None = None,
    similar_names: bool = True,
    keywords: str | None = None,
) -> LabelledImages:
    """The images of a folder with one sub-folder for each class, those that a CSV file lists, the labelled boxes of a
    detector file (.json, whose pictures are below `root`; images.detector_files) or the choices of Label Studio
    (images.choices), or of several of these.

    Returns the paths, sorted within a class; the label of each; all class names, sorted: the names of the sub-folders,
    with blanks for underscores; the group of each image, or None; and a tree. Files that are no images are left out
    with a warning (images.listing).

    With `nested` each folder that holds images itself, however deep, is a class, and the folders above it are nodes of
    the tree, of which the root is none. Folders of one name are called by their path, as far up as they differ, with a
    warning: "apple/other", "pear/other". A class that only a CSV file has is below the root.

    A CSV file has the columns `path`, relative to its folder, and `label`, as `iosr-fast suggest` and `classify` write
    them; rows without a label are left out. `label_column` names the column of labels in a table that has several of
    them, and a warning counts its rows without a label. A column `group` names images that have more in common than
    their class, as those of one video. With `labels` in place of `label` pictures may have several, joined by ";" or in
    a row each, or none: labels are then frozensets, those of a folder of a class too. So they are where not every task
    of Label Studio has one choice, and with `keywords`: the labels of an image in a folder, and in all below it, are
    then its XMP keywords (images.keywords), "tagged" leaves out images without any, with "all" these have no label.

    With the columns x, y, width and height, in pixels or (neither side exceeds 1) in shares of the picture's sides, a
    row is a part of the upright picture, the whole one where they are empty. Its path has the box as a fragment
    ("photo.jpg#xywh=10,20,100,50"), which a CSV file may have, too. With `skip_bad` a path with a wrong box is returned
    as well, and can't be read later.

    An image (a file, links resolved, or a box in one) that a later place lists again has the later label, and a warning
    counts these: a CSV file of corrected labels, as the page of `iosr-fast audit` saves it, follows the folder. Each
    counts once. A warning names classes that may be others mistyped (names.mistyped), or without `similar_names` an
    error does.

    Raises FileNotFoundError without the folder or file; IosrFastError for fewer than two classes of a folder, a class
    without images, a folder of splits (train/, test/), a path under two labels in one place, and a CSV file without
    these columns, without a label, or with a wrong box; with `nested` for a folder that holds images and class folders;
    with `label_column` for anything but CSV files; with `keywords` and no folder, or `nested`, for damaged XMP (with
    `skip_bad` a warning), and where no image has keywords.

    >>> paths, labels, class_names, groups, tree = labelled_images("support", "labels.csv")
    >>> paths[8].as_posix(), labels[8], labels[-1]
    ('support/green_apple/0.jpg', 'green apple', 'pear')
    """
    Selection(root).check((folder, *more))
    places = [*map(Path, (folder, *more))]
    if label_column is not None and (other := [place for place in places if not is_table(place)]):
        raise IosrFastError(
            f"expected CSV files alone with label_column={label_column!r} (--label-column), got {other[0]}, which has "
            "no columns"
        )
    files = [place for place in places if is_table(place) or (not place.is_dir() and is_detector_file(place))]
    folders = [place for place in places if place not in files]
    if keywords is not None and (keywords not in KINDS or nested or not folders):
        raise IosrFastError(
            f"expected keywords (--keywords) {' or '.join(KINDS)}, of a folder that is not nested, got {keywords!r}"
        )
    of_folders = {} if keywords else {place: _read_class_folders(place, nested) for place in folders}
    called = _names_of({parts for listed in of_folders.values() for _, parts in listed})
    found: dict[str, _LabelledFile] = {}  # by file and box, links resolved where there are several places to compare
    for place in places:
        here = dict[str, _LabelledFile]()
        listed: list[_LabelledFile]
        if place in of_folders:
            listed = [(path, called[parts], None) for path, parts in of_folders[place]]
        elif place in folders:
            listed = [(path, words, None) for path, words in list_keywords(place, str(keywords), skip_bad)]
        elif is_table(place):
            listed = _read_table(place, skip_bad, label_column)
        else:
            listed = _read_json(place, root)
        for path, label, group in listed:
            key = _resolved(path) if more else str(path)
            first = here.setdefault(key, (path, label, group))
            if is_table(place) and isinstance(label, frozenset):
                here[key] = first[0], label.union(first[1]), first[2] or group
            elif first[1] != label:
                two = " and ".join(repr(one if isinstance(one, str) else sorted(one)) for one in (first[1], label))
                more_labels = "; where pictures may have several, call the column labels" * is_table(place)
                raise IosrFastError(
                    f"expected one label for a file of {place}, got {two} for {path}: remove a row{more_labels}"
                )
        if again := found.keys() & here.keys():
            log.warning("%s: its labels replace those of %d images that were listed before", place, len(again))
            here |= {file: (found[file][0], here[file][1], here[file][2] or found[file][2]) for file in again}
        found |= here
    rows = list(found.values())
    labels: list[Any] = [label for _, label, _ in rows]
    sets = _as_sets(labels)
    _ask_about_typos(Counter(chain.from_iterable(sets)), similar_names)
    if not all(isinstance(label, str) for label in labels):
        labels = sets
    names = sorted(frozenset().union(*sets))
    used = [parts for parts, name in called.items() if name in names]
    tree = {called[parts[:n]]: called[parts[: n - 1]] for parts in used for n in range(2, len(parts) + 1)}
    return LabelledImages([path for path, _, _ in rows], labels, names, [group for _, _, group in rows], tree)


def _as_sets(labels: Iterable[str | frozenset[str]]) -> list[frozenset[str]]:
    return [frozenset({label}) if isinstance(label, str) else label for label in labels]


def _ask_about_typos(pictures: Mapping[str, int], similar_names: bool) -> None:
    pairs = [f"{one!r} ({pictures[one]}) beside {other!r} ({pictures[other]})" for one, other in mistyped(pictures)]
    if not pairs:
        return
    found = f"names a letter apart, of few pictures beside many: {'; '.join(pairs[:5])}"
    if len(pairs) > 5:
        found += f" and {len(pairs) - 5} more"
    if not similar_names:
        raise IosrFastError(
            f"expected names of different classes, got {found}. Correct a folder or label that is mistyped, or accept "
            "all by --similar-names (similar_names=True)"
        )
    log.warning("%s: is one class meant? Then correct the folder or label", found)


def is_table(place: str | Path) -> bool:
    """Whether it is a CSV file, by its name."""
    return Path(place).suffix.lower() == ".csv" and not Path(place).is_dir()


def _read_class_folders(folder: Path, nested: bool) -> list[tuple[Path, tuple[str, ...]]]:
    """Each image, and the names of its class's folder and of those above it, with blanks for underscores."""
    listed = list_folder(folder, nested)
    return [(path, tuple(part.replace("_", " ").strip() for part in name.split("/"))) for path, name in listed]


def _names_of(folders: set[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """What nested folders and those above them are called: by their last name, where several have one by as much of
    their paths as differs."""
    alike: dict[str, list[tuple[str, ...]]] = {}
    for node in sorted({parts[:n] for parts in folders for n in range(1, len(parts) + 1)}):
        alike.setdefault(node[-1], []).append(node)
    called: dict[tuple[str, ...], str] = {}
    for group in alike.values():
        least = next(n for n in count(1) if len({parts[-n:] for parts in group}) == len(group))
        called |= {parts: "/".join(parts[-least:]) for parts in group}
    if longer := [name for parts, name in called.items() if name != parts[-1]]:
        log.warning("folders of one name are called by their paths: %s", abbreviate(longer))
    return called


def _resolved(path: Path) -> str:
    """What tells whether two paths name one picture, or one part of it."""
    file = str(picture_of(path))
    return os.path.realpath(file) + str(path)[len(file) :]


def _read_table(file: Path, skip_bad: bool, label_column: str | None) -> list[_LabelledFile]:
    if not file.is_file():
        raise FileNotFoundError(f"expected a CSV file of path and label, found no file {file}")
    columns, rows = read_rows(file)
    name = label_column or ("labels" if "labels" in columns and "label" not in columns else "label")
    several = name == "labels"
    hint = "" if label_column else " (labels in place of label where pictures may have several)"
    check_columns(columns, file, ("path", name), hint)
    paths = listed_paths(file, columns, rows, skip_bad)
    others = ((row[name].strip(), row.get("group", "").strip() or None) for row in rows)
    named = [(path, *other) for path, other in zip(paths, others, strict=True)]
    if not any(label for _, label, _ in named):
        raise IosrFastError(f"expected labels in {file}, got {len(rows)} rows without one; fill in the column {name}")
    if label_column and (lacking := sum(not label for _, label, _ in named)) and not several:
        log.warning("%s: left out %d of %d rows, which have no %s", file, lacking, len(rows), name)
    labelled = list[_LabelledFile]()
    for path, label, group in named:
        if not (label or several):
            continue
        if not path:
            raise IosrFastError(f"expected a path in each row of {file}, got none for the label {label!r}")
        parts = frozenset(part.strip() for part in label.split(SEPARATOR) if part.strip())
        labelled.append((Path(path), parts if several else label, group))
    return labelled


def _read_json(file: Path, root: str | Path | None) -> list[_LabelledFile]:
    """The labelled boxes, or the choices of Label Studio: texts where each picture has one."""
    document = DetectorFile(file)
    if (choices := read_choices(document, root)) is None:
        return [(Path(path), name, None) for name, path in list_boxes(document, Selection(root), labelled=True)]
    one_each = all(len(labels) == 1 for _, labels in choices)
    return [(Path(path), next(iter(labels)) if one_each else labels, None) for path, labels in choices]


def labels_among(given: LabelledImages, names: Collection[str], several: bool, keywords: str | None) -> LabelledImages:
    """Labelled images for a classifier with these class names: with sets of labels where pictures may have `several`,
    of `keywords` those that are classes; a warning counts the others. Raises IosrFastError where none is a class."""
    if several and not are_label_sets(given.labels):
        given = given._replace(labels=_as_sets(given.labels))
    if keywords and (others := set(given.class_names).difference(names)):
        shown, kept = abbreviate(sorted(others)), sorted(set(given.class_names) - others)
        if not kept:
            raise IosrFastError(f"expected keywords among the classes, {abbreviate(sorted(names))}, got {shown}")
        log.warning("left out %d keywords that are none of the %d classes: %s", len(others), len(names), shown)
        given = given._replace(labels=[label - others for label in given.labels], class_names=kept)
    return given


def called_as(given: LabelledImages, names: Sequence[str], paths: Sequence[Nodes] | None) -> LabelledImages:
    """Images of nested folders, each with the name of the class (`names`, `paths`) that has the same folders, if one
    has: beside other folders one is called otherwise, "other" for "apple/other"."""
    classes = dict(zip(_folders(names, paths), names, strict=True))
    folders = _folders(given.class_names, paths_of(given.tree, given.class_names))
    called = {name: classes.get(parts, name) for name, parts in zip(given.class_names, folders, strict=True)}
    labels = [called.get(label, label) for label in given.labels]
    return given._replace(labels=labels, class_names=sorted(frozenset(called.values())))


def _folders(names: Sequence[str], paths: Sequence[Nodes] | None) -> list[Nodes]:
    """The names of the nested folders of these classes (_names_of), from the first down; of others their own names."""
    folders = list[Nodes]()
    for name, path in zip(names, [()] * len(names) if paths is None else paths, strict=True):
        parts = tuple(one.rpartition("/")[2] for one in (*path, name))
        folders.append(parts if "/".join(parts).endswith(name) else (name,))
    return folders


def calibration_images(
    place: str | Path,
    support: LabelledImages,
    nested: bool,
    skip_bad: bool,
    root: str | Path | None,
    label_column: str | None,
    keywords: str | None,
) -> LabelledImages:
    """The images of a place, for `calibrate_on` after a fit on `support`. What can be refused now is."""
    root = root if is_detector_file(place) else None
    column = label_column if is_table(place) else None
    kind = keywords if Path(place).is_dir() else None
    given = labelled_images(place, nested=nested, skip_bad=skip_bad, root=root, label_column=column, keywords=kind)
    if nested:
        given = called_as(given, support.class_names, paths_of(support.tree, support.class_names))
    several = are_label_sets(support.labels)
    given = labels_among(given, support.class_names, several, kind)
    for one in (support, given):
        if several:
            read_label_sets(one.labels, len(one.paths), support.class_names)
        else:
            class_ids(one.paths, one.labels, support.class_names)
    check_calibration(len(given.paths), len(given.paths))
    return given


def unknown_folder(folder: str | Path) -> list[str]:
    """The paths of all images in a folder and below, pictures of none of the classes."""
    paths = list_images(folder).paths
    if not paths:
        raise IosrFastError(f"expected pictures of none of the classes in {folder}, found no image")
    return paths
