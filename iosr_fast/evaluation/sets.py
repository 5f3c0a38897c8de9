"""The evaluation sets of the field by name: their files, what is missing, and their images and labels.

    dtd = open_evaluation_set("dtd", root)
    dtd.splits["test"].image(0), dtd.splits["test"].labels[0], dtd.class_names

sets.toml is the catalog.
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iosr_fast.evaluation import readers
from iosr_fast.exceptions import IosrFastError
from iosr_fast.images.preprocess import open_image
from iosr_fast.training.pictures import digest

if TYPE_CHECKING:
    from PIL.Image import Image

    from iosr_fast.images.geometry import Geometry

PHOTO = "a photo of a {}."


@dataclass(frozen=True)
class FileSplit:
    """Image files FOLDER/KEY: labels (N,) int64, keys relative paths with forward slashes.

    `times` (N,) int64 are the files' times of change in nanoseconds. A cache of what is derived from an image should
    depend on its time, because copies of a set have the same fingerprint.
    """

    folder: Path
    keys: list[str]
    labels: np.ndarray
    times: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    def image(self, row: int, geometry: Geometry | None = None) -> Image:
        """The image as `open_image` reads it. Raises BadImageError with its path if it can't be read."""
        return open_image(self.folder / self.keys[row], row, geometry=geometry)


@dataclass(frozen=True)
class EvaluationSet:
    """`splits` has "test", and "train" and "val" where the set has them; `layout` says which split that is.

    `class_ids` are as `class_names`, but never equal: ImageNet's WordNet ids. `fingerprint` is a hex digest of keys,
    labels, class names and sizes of files. Copies of a set have the same.
    """

    name: str
    class_names: list[str]
    class_ids: list[str]
    templates: list[str]
    splits: dict[str, FileSplit]
    fingerprint: str
    layout: str


def catalog() -> dict[str, dict[str, Any]]:
    """sets.toml, which says what its fields are."""
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def open_evaluation_set(name: str, root: str | Path) -> EvaluationSet:
    """The set of this name under `root`, whose image files must all exist.

    Raises IosrFastError for an unknown name or a damaged file (naming it); FileNotFoundError that lists each missing
    file or folder with its URL and its place, or counts and names missing images.
    """
    sets = catalog()
    if name not in sets:
        raise IosrFastError(f"expected an evaluation set of {', '.join(sets)}, got {name!r}")
    entry, root, found, lacking = sets[name], Path(root), list[Path](), list[str]()
    for *paths, url in entry["needs"]:
        existing = [root / path for path in paths if (root / path).exists()]
        found += existing[:1]
        lacking += [] if existing else [f"  {root / paths[0]}  from {url}"]
    title = entry["title"]
    if lacking:
        raise FileNotFoundError("\n".join([f"{title} ({entry['layout']}) is incomplete under {root}:", *lacking]))
    content: readers.Content = getattr(readers, entry["reader"])(found)
    splits: dict[str, FileSplit] = {}
    facts: list[str | np.ndarray] = [*content.class_names]
    missing: list[str] = []
    for split, rows in content.rows.items():
        if not rows:
            raise IosrFastError(f"the split {split!r} of {title} in {content.folder} has no images")
        keys = [Path(key).as_posix() for key, _ in rows]
        labels = np.array([label for _, label in rows], np.int64)
        sizes, times = np.full((2, len(keys)), -1, np.int64)
        for row, key in enumerate(keys):
            try:
                file = os.stat(content.folder / key)
                sizes[row], times[row] = file.st_size, file.st_mtime_ns
            except OSError:
                missing.append(key)
        splits[split] = FileSplit(content.folder, keys, labels, times)
        facts += [split, *keys, labels, sizes]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} images of {title} are missing from {content.folder}: {', '.join(missing[:10])}"
            f"{', ...' if len(missing) > 10 else ''}; download them from {entry['needs'][-1][-1]}"
        )
    names, templates = content.class_names, entry.get("prompts", [PHOTO])
    return EvaluationSet(name, names, content.class_ids, templates, splits, digest(facts), entry["layout"])
