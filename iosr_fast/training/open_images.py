"""A balanced subset of Open Images, chosen from the official label files, as a list of pictures to train on.

The official files (https://storage.googleapis.com/openimages/web/download_v7.html): class descriptions, `LabelName,
DisplayName` with a header (oidv7-class-descriptions.csv) or without (class-descriptions-boxable.csv), and image labels,
`ImageID,Source,LabelName,Confidence`.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from iosr_fast.exceptions import IosrFastError
from iosr_fast.sealed.files import new_file
from iosr_fast.utils.csv_text import escaped
from iosr_fast.utils.require import require

SPLITS = ("train", "validation", "test")
LABEL_COLUMNS = ("ImageID", "LabelName", "Confidence")
IMAGE_ID = "^[0-9a-f]{16}$"
# A pair of image and class: the id as a number, the class, the split.
CANDIDATE = np.dtype([("id", np.uint64), ("class", np.int32), ("split", np.uint8)])


@dataclass(frozen=True)
class Subset:
    """Rows of (image id, class name, official split), and the omitted classes with their numbers of images."""

    image_ids: list[str]
    class_names: list[str]
    types: list[str]
    left_out: dict[str, int]


def balanced_subset(
    class_csv: str | Path,
    label_csvs: Sequence[str | Path],
    images_a_class: int,
    seed: int,
    min_confidence: float = 1.0,
    images: str | Path | None = None,
) -> Subset:
    """Exactly `images_a_class` images of every class that has enough, each image in one class only.

    Classes with few images choose first, because an image serves one class only. The choice
    depends on image ids and the seed, not on the order of lines or files. With `images`, only images in that folder
    count. Classes with the same DisplayName are merged. A candidate is a label with at least `min_confidence` (1:
    verified by people). The label files are streamed; each candidate takes 13 bytes of memory (several times that
    during sorting).

    The official split (`type`) comes from the name of a label file. Raises FileNotFoundError for missing files,
    ValueError for files of another format or without train, validation or test in their names, before any is read.
    """
    if images_a_class < 1:
        raise IosrFastError(f"expected at least one image a class, got {images_a_class}")
    if not 0 < min_confidence <= 1:  # confidence 0: the class is not in the image
        raise IosrFastError(f"expected min_confidence above 0 and up to 1, got {min_confidence}")
    paths = [Path(path) for path in label_csvs]
    for path in [Path(class_csv), *paths]:
        if not path.is_file():
            raise FileNotFoundError(f"expected a CSV file of Open Images, found none at {path}")
    splits = [_check_label_csv(path) for path in paths]
    if not paths:
        raise IosrFastError("expected at least one file of image labels, got none")
    by_label = read_class_descriptions(class_csv)
    names = sorted(set(by_label.values()))
    number = {name: i for i, name in enumerate(names)}
    classes = {label: number[name] for label, name in by_label.items()}
    present = None
    if images is not None:
        present = np.sort(_ids([name for name in _find_images(images) if re.match(IMAGE_ID, name)]))
    parts = [
        part
        for path, split in zip(paths, splits, strict=True)
        for part in _stream(path, split, classes, min_confidence, present)
    ]
    candidates = _without_repeats(parts, seed)
    counts = np.bincount(candidates["class"], minlength=len(names))
    start = np.concatenate([[0], np.cumsum(counts)])
    taken: set[int] = set()
    chosen: list[int] = []
    left_out: dict[str, int] = {}
    for c in np.argsort(counts, kind="stable"):
        free = (i for i in range(start[c], start[c + 1]) if int(candidates["id"][i]) not in taken)
        mine = list(islice(free, images_a_class))
        if len(mine) < images_a_class:
            left_out[names[c]] = int(counts[c])
            continue
        taken.update(int(candidates["id"][i]) for i in mine)
        chosen += mine
    subset = candidates[np.sort(np.array(chosen, np.int64))]
    return Subset(
        [f"{int(i):016x}" for i in subset["id"]],
        [names[c] for c in subset["class"]],
        [SPLITS[s] for s in subset["split"]],
        dict(sorted(left_out.items())),
    )


def read_class_descriptions(path: str | Path) -> dict[str, str]:
    """LabelName -> DisplayName, from a file with or without header. Raises ValueError naming an invalid line."""
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file))
    if rows and rows[0][:2] == ["LabelName", "DisplayName"]:
        rows[0] = []
    for line, row in enumerate(rows, 1):
        if row and (len(row) != 2 or not all(row)):
            raise IosrFastError(f"expected LabelName,DisplayName in line {line} of {path}, got {','.join(row)!r}")
    classes = {row[0]: row[1] for row in rows if row}
    if not classes:
        raise IosrFastError(f"expected classes (LabelName,DisplayName a line) in {path}, found none")
    return classes


def _check_label_csv(path: Path) -> int:
    """The index in SPLITS of the split in its name, after a check of its header."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = next(csv.reader(file), [])
    if missing := [name for name in LABEL_COLUMNS if name not in header]:
        raise IosrFastError(f"expected the columns ImageID,Source,LabelName,Confidence in {path}, missing: {missing}")
    # V7's are called oidv7-train-..., oidv7-val-... and oidv7-test-..., older ones validation-annotations-... .
    words = re.split("[^a-z]+", path.name.lower())
    splits = [i for i, split in enumerate(SPLITS) if split in words or (split == "validation" and "val" in words)]
    if len(splits) != 1:
        raise IosrFastError(
            f"expected exactly one of the words {', '.join(SPLITS)} in the name of {path}, as in the official files"
        )
    return splits[0]


def _stream(
    path: Path, split: int, classes: dict[str, int], min_confidence: float, present: np.ndarray | None
) -> Iterator[np.ndarray]:
    pa, pa_csv, compute = (require(name, "train") for name in ("pyarrow", "pyarrow.csv", "pyarrow.compute"))
    labels = pa.array(list(classes))
    numbers = np.array(list(classes.values()), np.int32)
    types = {"ImageID": pa.string(), "LabelName": pa.string(), "Confidence": pa.float64()}
    convert = pa_csv.ConvertOptions(column_types=types, include_columns=list(LABEL_COLUMNS))
    try:
        for batch in pa_csv.open_csv(path, convert_options=convert):
            table = batch.filter(compute.greater_equal(batch["Confidence"], min_confidence))
            place = compute.index_in(table["LabelName"], value_set=labels)
            known = compute.is_valid(place)
            texts = table["ImageID"].filter(known)
            valid = compute.match_substring_regex(texts, IMAGE_ID)
            if not compute.all(valid, min_count=0).as_py():
                bad = texts.filter(compute.invert(valid))[0].as_py()
                raise IosrFastError(f"expected image ids of 16 hex digits in {path}, got {bad!r}")
            part = np.empty(len(texts), CANDIDATE)
            part["id"], part["class"], part["split"] = _ids(texts.to_pylist()), numbers[place.filter(known)], split
            yield part if present is None else part[_among(part["id"], present)]
    except pa.ArrowInvalid as error:
        raise IosrFastError(f"{path} can't be read as image labels of Open Images: {error}") from error


def _among(ids: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Which ids are in the sorted `present`, as bool (np.isin would sort that again for each batch)."""
    right = np.searchsorted(present, ids, side="right")
    return right > np.searchsorted(present, ids, side="left")


def _ids(texts: Sequence[str]) -> np.ndarray:
    """Image ids, 16 hex digits each, as uint64."""
    return np.frombuffer(bytes.fromhex("".join(texts)), ">u8").astype(np.uint64)


def _without_repeats(parts: Sequence[np.ndarray], seed: int) -> np.ndarray:
    """Each pair of image and class once, sorted by class, and in random order within a class."""
    pairs = np.concatenate([np.empty(0, CANDIDATE), *parts])
    pairs = pairs[np.lexsort((pairs["id"], _mix(pairs["id"], seed), pairs["class"]))]
    first = np.ones(len(pairs), bool)
    first[1:] = (np.diff(pairs["class"]) != 0) | (pairs["id"][1:] != pairs["id"][:-1])
    return pairs[first]


def _mix(ids: np.ndarray, seed: int) -> np.ndarray:
    """A pseudo-random number for each id (the finalizer of SplitMix64, https://doi.org/10.1145/2660193.2660195)."""
    x = ids ^ np.random.default_rng(seed).integers(0, 1 << 64, dtype=np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


def _find_images(folder: str | Path) -> dict[str, Path]:
    """Image id -> path of FOLDER/ID.jpg, FOLDER/train/ID.jpg and so on. Raises FileNotFoundError without the folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"expected a folder with images of Open Images (ID.jpg), found none at {folder}")
    paths: dict[str, Path] = {}
    for place in [folder, *(folder / split for split in SPLITS)]:
        if place.is_dir():
            with os.scandir(place) as entries:
                paths |= {entry.name[:-4]: place / entry.name for entry in entries if entry.name.endswith(".jpg")}
    return paths


def write_list(subset: Subset, path: str | Path, images: str | Path | None = None) -> None:
    """Write path,label (UTF-8, with header), atomically: a list to train on.

    Paths are relative to the list's folder: those of the pictures in `images`, or ID.jpg beside the list.
    """
    found = {} if images is None else _find_images(images)
    folder = Path(path).absolute().parent
    paths = [os.path.relpath(found[i], folder) if i in found else f"{i}.jpg" for i in subset.image_ids]
    rows = zip(paths, map(escaped, subset.class_names), strict=True)
    _write_lines(Path(path), [("path", "label"), *rows])


def write_download_list(subset: Subset, path: str | Path) -> None:
    """Write one `train/abcdef...` per line, the input of the official downloader.py."""
    _write_lines(Path(path), [(f"{t}/{i}",) for i, t in zip(subset.image_ids, subset.types, strict=True)])


def _write_lines(path: Path, rows: Sequence[Sequence[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
