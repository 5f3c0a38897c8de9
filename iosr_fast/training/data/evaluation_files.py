"""Evaluation sets as files: splits of image files, and the JSON split files of CoOp."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from iosr_fast.images.listing import Skipped, walk
from iosr_fast.images.preprocess import open_image

if TYPE_CHECKING:
    from PIL.Image import Image

Rows = list[tuple[str, int]]  # (path relative to the folder, label)


@dataclass(frozen=True)
class FileSplit:
    """Image files FOLDER/KEY: labels (N,) int64, keys relative paths with forward slashes.

    `times` (N,) int64 are the files' times of change in nanoseconds: what is derived from an image and kept should
    depend on its file's, as a set's fingerprint, which is the same for copies of the set, does not.
    """

    folder: Path
    keys: list[str]
    labels: np.ndarray
    times: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    def image(self, row: int) -> Image:
        """The image, decoded as RGB. Raises BadImageError with its path if it can't be read."""
        return open_image(self.folder / self.keys[row], row)


@dataclass(frozen=True)
class Content:
    """What a layout's reader found: class names, and for each split rows of (key, label) in `folder`."""

    folder: Path
    class_names: list[str]
    rows: dict[str, Rows]


@dataclass(frozen=True)
class Need:
    """A file or folder that a layout needs: `paths` under the root, any of which will do, and where it comes from."""

    paths: tuple[str, ...]
    url: str

    def find(self, root: Path) -> Path | None:
        return next((root / path for path in self.paths if (root / path).exists()), None)


@dataclass(frozen=True)
class Layout:
    """One way in which a set may lie on disk. `images` counts those of "train", "val" and "test" where they are known.

    `read` gets the root and where each need was found.
    """

    title: str
    needs: tuple[Need, ...]
    images: Mapping[str, int]
    read: Callable[[Path, list[Path]], Content]


def split_json(root: Path, found: list[Path]) -> Content:
    """A split file in CoOp's format, {"train" | "val" | "test": [[relative path, label, class name], ...]}.

    `found`: the file, and the folder that its paths are relative to (and more that must be there). Underscores in class
    names become spaces, as CoOp does for prompts; CUB's leading numbers go.

    Raises ValueError for a damaged file, labels with two names or none, and paths that leave the folder.
    """
    file, folder = found[:2]
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        splits = {
            name: [(str(path), int(label), str(text)) for path, label, text in content[name]]
            for name in ("train", "val", "test")
            if content.get(name)
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{file} is damaged or no split file ({error}); expected {{"train": [[path, label, class name], ...], ...}}'
        ) from error
    if "test" not in splits:
        raise ValueError(f"expected a split 'test' in {file}, found {', '.join(splits) or 'none'}")
    names: dict[int, str] = {}
    for split, rows in splits.items():
        for path, label, text in rows:
            if names.setdefault(label, text) != text:
                raise ValueError(f"{file} gives label {label} two names, {names[label]!r} and {text!r} (in {split})")
            if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
                raise ValueError(f"{file} has a path that leaves the folder of images: {path!r} (in {split})")
    if sorted(names) != list(range(len(names))):
        raise ValueError(f"{file} has {len(names)} classes, expected labels 0 to {len(names) - 1}, got {sorted(names)}")
    return Content(
        folder,
        [spoken(names[label]) for label in range(len(names))],
        {split: [(path, label) for path, label, _ in rows] for split, rows in splits.items()},
    )


def spoken(name: str) -> str:
    """A folder's name as a class name: "012.Yellow_headed_Blackbird" -> "Yellow headed Blackbird"."""
    return re.sub(r"^\d{3}\.", "", name).replace("_", " ")


def folder_rows(folder: Path, prefix: str, classes: Iterable[tuple[str, int]]) -> Rows:
    """Rows of every image in FOLDER/PREFIX/CLASS, sorted by name within a class. Raises ValueError for an empty one."""
    rows: Rows = []
    skipped = Skipped()
    for name, label in classes:
        place = folder / prefix / name
        images = sorted(Path(path).relative_to(place).as_posix() for path, _ in walk(place, skipped=skipped))
        if not images:
            raise ValueError(f"expected images in the class folder {place}, found none")
        rows += [((PurePosixPath(prefix) / name / image).as_posix(), label) for image in images]
    skipped.warn(folder / prefix, len(rows))
    return rows


def read_lines(path: Path) -> list[str]:
    """Lines of a text file without those that are blank. Raises ValueError if it is not UTF-8."""
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged or no text file ({error})") from error


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """Lines of "first rest of the line", as pairs. Raises ValueError naming a line with one word only."""
    pairs: list[tuple[str, str]] = []
    for number, line in enumerate(read_lines(path), 1):
        first, _, rest = line.partition(" ")
        if not rest.strip():
            raise ValueError(f"expected two words at least in line {number} of {path}, got {line!r}")
        pairs.append((first, rest.strip()))
    return pairs


def look_up(table: Mapping[str, int], name: str, file: Path) -> int:
    """The label of a class. Raises ValueError naming the file for an unknown one."""
    if name not in table:
        raise ValueError(f"{file} names {name!r}, which is none of the {len(table)} classes")
    return table[name]
