"""The images of a run: a folder, a list of files and folders, or a CSV file; and the chunks into which they are cut."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from iosr_fast.exceptions import IosrFastError
from iosr_fast.images.listing import list_images, refuse_url
from iosr_fast.sealed.outputs import check_utf8
from iosr_fast.utils.csv_text import read_rows
from iosr_fast.utils.text import abbreviate


@dataclass(frozen=True)
class Chunk:
    """Consecutive images, of which one part is made: `start` is the position of the first one, `keys` name the images
    in the output."""

    number: int
    start: int
    keys: list[str]
    paths: list[str]

    def digest(self) -> str:
        """SHA-256 over the keys, sizes and times of change of the files: another one where an image was replaced."""
        stamped = [(key, _stamp(path)) for key, path in zip(self.keys, self.paths, strict=True)]
        return hashlib.sha256(json.dumps(stamped).encode()).hexdigest()


@dataclass(frozen=True)
class Source:
    """The images of a run, in order."""

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


def read_source(places: Sequence[str], relative: bool = False, skip_bad: bool = False) -> Source:
    """The images of files, of folders and all below them (images.listing), and of the column `path` of CSV files.

    Keys are paths; with `relative` those of a single folder are relative to it, so that they stay when it is moved.

    Raises IosrFastError for URLs, names that are not UTF-8, CSV files without a column `path`, and where there is no
    image; FileNotFoundError naming all places that are missing, unless `skip_bad`.
    """
    for place in places:
        refuse_url(place)
    missing = [place for place in places if not os.path.exists(place)]
    if missing and not skip_bad:
        raise FileNotFoundError(f"no such file or folder: {abbreviate(missing)}")
    if relative and len(places) == 1 and os.path.isdir(places[0]):
        folder = Path(places[0]).resolve()
        paths = list_images(folder).paths
        keys = [Path(path).relative_to(folder).as_posix() for path in paths]
    else:
        keys = paths = [path for place in places for path in _paths_of(Path(place))]
    if not paths:
        raise IosrFastError(f"expected images, found none in {abbreviate(places)}")
    check_utf8(keys)
    return Source(keys, paths)


def _paths_of(place: Path) -> list[str]:
    if place.is_dir():
        return list_images(place).paths
    return _listed(place) if place.suffix.lower() == ".csv" and place.is_file() else [str(place)]


def _listed(file: Path) -> list[str]:
    """The paths that a CSV file lists, relative to its folder."""
    columns, rows = read_rows(file)
    if "path" not in columns:
        raise IosrFastError(f"expected a column path in {file}, got {', '.join(columns) or 'no line'}")
    found = [row["path"] for row in rows if row["path"]]
    for path in found:
        refuse_url(path)
    return [str(file.parent / path) for path in found]


def _stamp(path: str) -> str:
    """Size in bytes and time of change in nanoseconds of a file; "none" without one."""
    try:
        status = os.stat(path)
    except OSError:
        return "none"
    return f"{status.st_size}-{status.st_mtime_ns}"
