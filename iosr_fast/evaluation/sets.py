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

# CLIP's notebook found these the best subset of its 80 prompts for ImageNet (Radford et al., arXiv 2103.00020).
IMAGENET_SEVEN = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
PHOTO = "a photo of a {}."


@dataclass(frozen=True)
class Need:
    """A file or folder of a layout: alternative `paths` under the root, and the URL of its source."""

    paths: tuple[str, ...]
    url: str

    def find(self, root: Path) -> Path | None:
        return next((root / path for path in self.paths if (root / path).exists()), None)


@dataclass(frozen=True)
class Layout:
    """One arrangement of a set on disk."""

    title: str
    needs: tuple[Need, ...]
    reader: str
    splits: Mapping[str, str]

    def read(self, root: Path, paths: list[Path]) -> readers.Content:
        """The content; `paths` has the location of each need under `root`."""
        kind, _, name = self.reader.partition(":")
        if kind == "torchvision":
            return readers.torchvision_set(name, self.splits, root, paths)
        content: readers.Content = getattr(readers, kind)(root, paths)
        return content


@dataclass(frozen=True)
class Download:
    """A set of the catalog. The first of its layouts that is complete is read."""

    name: str
    title: str
    layouts: tuple[Layout, ...]
    prompt: str

    @property
    def templates(self) -> list[str]:
        """The prompts to average: CLIP's seven for ImageNet and its shifted versions, else `prompt` alone."""
        return list(IMAGENET_SEVEN) if self.name.startswith("imagenet") else [self.prompt]


@dataclass(frozen=True)
class FileSplit:
    """Image files FOLDER/KEY: labels (N,) int64, keys relative paths with forward slashes.

    Keys are stable names of the images. `times` (N,) int64 are the files' times of change in nanoseconds. A cache of
    what is derived from an image should depend on its time, because copies of a set have the same fingerprint.
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

    `fingerprint` is a hex digest of keys, labels, class names and sizes of files. Copies of a set have the same.
    """

    name: str
    class_names: list[str]
    templates: list[str]
    splits: dict[str, FileSplit]
    fingerprint: str
    layout: str = ""


@cache
def catalog() -> dict[str, Download]:
    """The evaluation sets by name, from sets.toml."""
    content = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))

    def layout(entry: dict[str, Any]) -> Layout:
        needs = tuple(Need(tuple(paths), url) for *paths, url in entry["needs"])
        return Layout(entry["title"], needs, entry["reader"], entry.get("splits", {}))

    return {
        name: Download(name, entry["title"], tuple(map(layout, entry["layouts"])), entry.get("prompt", PHOTO))
        for name, entry in content.items()
    }


def describe(name: str) -> Download:
    """The files of a set, where to download them and where to put them. Raises ValueError for an unknown name."""
    if name not in catalog():
        raise IosrFastError(f"expected an evaluation set of {', '.join(catalog())}, got {name!r}")
    return catalog()[name]


def open_evaluation_set(name: str, root: str | Path) -> EvaluationSet:
    """The set of this name under `root`, in the first of its layouts that is complete; every image file must exist.

    Raises ValueError for an unknown name or a damaged file (naming it); FileNotFoundError that lists each missing file
    or folder with its URL and its place, or counts and names missing images.
    """
    download, root = describe(name), Path(root)
    for layout in download.layouts:
        paths = [path for need in layout.needs if (path := need.find(root)) is not None]
        if len(paths) == len(layout.needs):
            return _finish(download, layout, layout.read(root, paths))
    raise FileNotFoundError(_missing(download, root))


def _finish(download: Download, layout: Layout, content: readers.Content) -> EvaluationSet:
    splits: dict[str, FileSplit] = {}
    facts: list[str | np.ndarray] = [*content.class_names]
    missing: list[str] = []
    for name, rows in content.rows.items():
        if not rows:
            raise IosrFastError(f"the split {name!r} of {download.title} in {content.folder} has no images")
        keys = [Path(key).as_posix() for key, _ in rows]
        labels = np.array([label for _, label in rows], np.int64)
        if labels.min() < 0 or labels.max() >= len(content.class_names):
            raise IosrFastError(
                f"expected labels from 0 to {len(content.class_names) - 1} in the split {name!r} of {download.title} "
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
            f"{len(missing)} images of {download.title} are missing from {content.folder}: {', '.join(missing[:10])}"
            f"{', ...' if len(missing) > 10 else ''}; download them from {layout.needs[-1].url}"
        )
    return EvaluationSet(download.name, content.class_names, download.templates, splits, digest(facts), layout.title)


def _missing(download: Download, root: Path) -> str:
    ways = []
    for layout in download.layouts:
        lines = [f"    {root / need.paths[0]}  from {need.url}" for need in layout.needs if need.find(root) is None]
        ways.append("\n".join([f"  {layout.title}:", *lines]))
    return f"{download.title} is missing or incomplete under {root}. Missing for\n" + "\n  or\n".join(ways)
