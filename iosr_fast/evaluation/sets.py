"""The evaluation sets of the field by name: their files, what is missing, and their images and labels.

    dtd = open_evaluation_set("dtd", root)
    dtd.splits["test"].image(0), dtd.splits["test"].labels[0], dtd.class_names

sets.toml is the catalog.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iosr_fast.evaluation import readers
from iosr_fast.exceptions import IosrFastError
from iosr_fast.images.preprocess import open_image
from iosr_fast.training.pictures import digest

if TYPE_CHECKING:
    from PIL.Image import Image

PHOTO = "a photo of a {}."


@dataclass(frozen=True)
class Need:
    """A file or folder of a layout: alternative `paths` under the root, and the URL of its source."""

    paths: tuple[str, ...]
    url: str

    def find(self, root: Path) -> Path | None:
        """Where it lies under `root`; None if it is missing."""
        return next((root / path for path in self.paths if (root / path).exists()), None)


@dataclass(frozen=True)
class Layout:
    """One arrangement of a set on disk, and its reader (readers.py)."""

    title: str
    needs: tuple[Need, ...]
    reader: str
    splits: Mapping[str, str]

    def read(self, root: Path, paths: list[Path]) -> readers.Content:
        """The content; `paths` has the location of each need under `root`."""
        kind, _, name = self.reader.partition(":")
        if kind == "torchvision":
            return readers.torchvision_set(name, self.splits, root, paths)
        content: readers.Content = getattr(readers, kind)(paths)
        return content


@dataclass(frozen=True)
class CatalogEntry:
    """A set of the catalog. The first of its layouts that is complete is read; `templates` are averaged."""

    name: str
    title: str
    layouts: tuple[Layout, ...]
    templates: list[str]


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

    def image(self, row: int) -> Image:
        """The image, decoded as RGB. Raises BadImageError with its path if it can't be read."""
        return open_image(self.folder / self.keys[row], row)


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


@cache
def catalog() -> dict[str, CatalogEntry]:
    """The evaluation sets by name, from sets.toml."""
    content = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))

    def layout(entry: dict[str, Any]) -> Layout:
        needs = tuple(Need(tuple(paths), url) for *paths, url in entry["needs"])
        return Layout(entry["title"], needs, entry["reader"], entry.get("splits", {}))

    return {
        name: CatalogEntry(name, entry["title"], tuple(map(layout, entry["layouts"])), entry.get("prompts", [PHOTO]))
        for name, entry in content.items()
    }


def open_evaluation_set(name: str, root: str | Path) -> EvaluationSet:
    """The set of this name under `root`, in the first of its layouts that is complete; every image file must exist.

    Raises IosrFastError for an unknown name or a damaged file (naming it); FileNotFoundError that lists each missing
    file or folder with its URL and its place, or counts and names missing images.
    """
    if name not in catalog():
        raise IosrFastError(f"expected an evaluation set of {', '.join(catalog())}, got {name!r}")
    entry, root, ways = catalog()[name], Path(root), []
    for layout in entry.layouts:
        found = [(need, need.find(root)) for need in layout.needs]
        missing = [need for need, path in found if path is None]
        if not missing:
            return _finish(entry, layout, layout.read(root, [path for _, path in found if path is not None]))
        lines = [f"    {root / need.paths[0]}  from {need.url}" for need in missing]
        ways.append("\n".join([f"  {layout.title}:", *lines]))
    raise FileNotFoundError(
        f"{entry.title} is missing or incomplete under {root}. Missing for\n" + "\n  or\n".join(ways)
    )


def _finish(entry: CatalogEntry, layout: Layout, content: readers.Content) -> EvaluationSet:
    """Check labels and files."""
    splits: dict[str, FileSplit] = {}
    facts: list[str | np.ndarray] = [*content.class_names]
    missing: list[str] = []
    for name, rows in content.rows.items():
        if not rows:
            raise IosrFastError(f"the split {name!r} of {entry.title} in {content.folder} has no images")
        keys = [Path(key).as_posix() for key, _ in rows]
        labels = np.array([label for _, label in rows], np.int64)
        if labels.min() < 0 or labels.max() >= len(content.class_names):
            raise IosrFastError(
                f"expected labels from 0 to {len(content.class_names) - 1} in the split {name!r} of {entry.title} "
                f"in {content.folder}, got {labels.min()} to {labels.max()}; download its lists again"
            )
        sizes, times = np.full((2, len(keys)), -1, np.int64)
        for row, key in enumerate(keys):
            try:
                file = os.stat(content.folder / key)
                sizes[row], times[row] = file.st_size, file.st_mtime_ns
            except OSError:
                missing.append(key)
        splits[name] = FileSplit(content.folder, keys, labels, times)
        facts += [name, *keys, labels, sizes]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} images of {entry.title} are missing from {content.folder}: {', '.join(missing[:10])}"
            f"{', ...' if len(missing) > 10 else ''}; download them from {layout.needs[-1].url}"
        )
    names, ids = content.class_names, content.class_ids
    return EvaluationSet(entry.name, names, ids, entry.templates, splits, digest(facts), layout.title)
