"""The images of a run: a folder, a list of files and folders, or a CSV file; and the chunks into which they are cut."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from iosr_fast.encoders.rows import KeyedRow
from iosr_fast.exceptions import IosrFastError
from iosr_fast.images.crop import Crop, listed_paths, picture_of
from iosr_fast.images.detector_files import ALL_BOXES, Selection, is_detector_file, read_boxes
from iosr_fast.images.listing import list_images, refuse_url
from iosr_fast.sealed.outputs import check_utf8
from iosr_fast.utils.csv_text import check_columns, read_rows
from iosr_fast.utils.text import abbreviate


@dataclass(frozen=True)
class Chunk:
    """Consecutive images, of which one part is made: `start` is the position of the first one, `keys` name the images
    in the output."""

    number: int
    start: int
    keys: list[str]
    paths: list[str]

    def part(self, suffix: str) -> str:
        """The name of its part."""
        return f"part-{self.number:05d}{suffix}"

    def digest(self) -> str:
        """SHA-256 over the keys, sizes and times of change of the files: another one where an image was replaced."""
        stamped = [(key, _stamp(path)) for key, path in zip(self.keys, self.paths, strict=True)]
        return hashlib.sha256(json.dumps(stamped).encode()).hexdigest()


@dataclass(frozen=True)
class Source:
    """The images of a run, in order: paths, those of parts of pictures with a fragment (images.crop)."""

    keys: list[str]
    paths: list[str]

    def digest(self) -> str:
        """SHA-256 over the keys, in order."""
        return hashlib.sha256("".join(f"{key}\0" for key in self.keys).encode()).hexdigest()

    def cut(self, size: int) -> list[Chunk]:
        """Chunks of `size` images; the last one has the rest."""
        starts = range(0, len(self.paths), size)
        return [
            Chunk(number, start, self.keys[start : start + size], self.paths[start : start + size])
            for number, start in enumerate(starts)
        ]


def read_source(
    places: Sequence[str], relative: bool = False, skip_bad: bool = False, boxes: Selection = ALL_BOXES
) -> Source:
    """The images of files, of folders and all below them (images.listing), and of the column `path` of CSV files, whose
    columns x, y, width and height make parts of them (images.crop); and these `boxes` of detector files (.json).

    Keys are paths; with `relative` those of a single folder are relative to it, so that they stay when it is moved.

    Raises IosrFastError for URLs, names that are not UTF-8, CSV files without a column `path`, wrong boxes, and where
    there is no image; FileNotFoundError for files that are missing. With `skip_bad` boxes and files may be wrong, if a
    place is there.
    """
    boxes.check(places)
    for place in places:
        refuse_url(place)
    if not skip_bad or not any(os.path.exists(picture_of(place)) for place in places):
        check_files([place for place in places if not os.path.isdir(place)])
        for place in places:
            Crop.of(place)
    if relative and len(places) == 1 and os.path.isdir(places[0]):
        folder = Path(places[0]).resolve()
        paths = list_images(folder).paths
        keys = [Path(path).relative_to(folder).as_posix() for path in paths]
    else:
        keys = paths = [path for place in places for path in _paths_of(Path(place), skip_bad, boxes)]
    if not paths:
        raise IosrFastError(f"expected images, found none in {abbreviate(places)}")
    check_utf8(keys)
    return Source(keys, paths)


def check_files(paths: Iterable[str | Path], fix: str = "correct the paths, or give --skip-bad") -> None:
    """Raise FileNotFoundError naming the files that paths, those of parts too, name and that are no regular ones."""
    files = dict.fromkeys(str(picture_of(path)) for path in paths)
    if missing := [file for file in files if not os.path.isfile(file)]:
        raise FileNotFoundError(f"expected files, found none at {abbreviate(missing)}: {fix}")


def _paths_of(place: Path, skip_bad: bool, boxes: Selection) -> list[str]:
    if place.is_dir():
        return list_images(place).paths
    if is_detector_file(place):
        paths = [path for _, path in read_boxes(place, boxes)]
    elif place.suffix.lower() != ".csv" or not place.is_file():
        return [str(place)]
    else:
        columns, rows = read_rows(place)
        check_columns(columns, place, ("path",), "")
        paths = [path for path in listed_paths(place, columns, rows, skip_bad) if path]
    if not skip_bad:
        check_files(paths)
    return paths


def _stamp(path: str) -> str:
    """Size in bytes and time of change in nanoseconds of a file, "none" without one; the SHA-256 of a KeyedRow."""
    if isinstance(path, KeyedRow):
        return hashlib.sha256(path.numbers.tobytes()).hexdigest()
    try:
        status = os.stat(picture_of(path))
    except OSError:
        return "none"
    return f"{status.st_size}-{status.st_mtime_ns}"
