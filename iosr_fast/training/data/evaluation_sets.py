"""The evaluation sets of the field by name: what each needs, what is missing, and their images and labels.

    problems = check(root, ["dtd", "imagenet"])           # before any work
    dtd = open_evaluation_set("dtd", root)
    dtd.splits["test"].image(0), dtd.splits["test"].labels[0], dtd.class_names

docs/datasets.md is the table of all of them, made by `iosr_fast.training.data.datasets_page`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from iosr_fast.training.data._files import digest
from iosr_fast.training.data.evaluation_catalog import CATALOG, Download
from iosr_fast.training.data.evaluation_files import Content, FileSplit, Layout
from iosr_fast.training.data.templates import templates_for

if TYPE_CHECKING:
    from PIL.Image import Image


class Split(Protocol):
    """`labels` (N,) int64 index the set's class names; `keys` (N,) are stable names of the images, relative paths."""

    @property
    def labels(self) -> np.ndarray: ...

    @property
    def keys(self) -> list[str]: ...

    def __len__(self) -> int: ...

    def image(self, row: int) -> Image:
        """The image as RGB. Raises BadImageError, with its path, if it can't be read."""
        ...


@dataclass(frozen=True)
class EvaluationSet:
    """`splits` has "test", and "train" and "val" where the set has them; `layout` says which split that is.

    `fingerprint` is a hex digest of keys, labels, class names and sizes of files. It is the same wherever the set lies.
    """

    name: str
    class_names: list[str]
    templates: list[str]
    splits: dict[str, Split]
    fingerprint: str
    layout: str = ""


def names() -> list[str]:
    """The names of all evaluation sets."""
    return list(CATALOG)


def describe(name: str) -> Download:
    """What to download for a set and where to put it. Raises ValueError for an unknown name."""
    if name not in CATALOG:
        raise ValueError(f"expected an evaluation set among {', '.join(CATALOG)}, got {name!r}")
    return CATALOG[name]


def open_evaluation_set(name: str, root: str | Path) -> EvaluationSet:
    """The set of this name under `root`, in the first of its layouts that is there; every image file is looked for.

    Raises ValueError for an unknown name or a damaged file (naming it), FileNotFoundError that lists every missing
    thing, its URL and where to put it, or counts and names missing images.
    """
    download, root = describe(name), Path(root)
    for layout in download.layouts:
        found = [path for need in layout.needs if (path := need.find(root)) is not None]
        if len(found) == len(layout.needs):
            return _finish(download, layout, layout.read(root, found))
    raise FileNotFoundError(_missing(download, root))


def check(root: str | Path, names: Iterable[str]) -> dict[str, str | None]:
    """For each name what keeps the set from being opened, or None. Looks for every file, decodes none.

    Raises ValueError for an unknown name, before it looks for any.
    """
    problems: dict[str, str | None] = {}
    for name in [describe(name).name for name in names]:
        try:
            open_evaluation_set(name, root)
            problems[name] = None
        except (OSError, ValueError, ImportError) as error:
            problems[name] = str(error)
    return problems


def _finish(download: Download, layout: Layout, content: Content) -> EvaluationSet:
    splits: dict[str, Split] = {}
    facts: list[str | np.ndarray] = [*content.class_names]
    missing: list[str] = []
    for name, rows in content.rows.items():
        if not rows:
            raise ValueError(f"the split {name!r} of {download.title} in {content.folder} has no images")
        keys = [Path(key).as_posix() for key, _ in rows]
        labels = np.array([label for _, label in rows], np.int64)
        if labels.min() < 0 or labels.max() >= len(content.class_names):
            raise ValueError(
                f"expected labels from 0 to {len(content.class_names) - 1} in the split {name!r} of {download.title} "
                f"in {content.folder}, got {labels.min()} to {labels.max()}; fetch its lists again"
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
            f"{', ...' if len(missing) > 10 else ''}; get them from {layout.needs[-1].url}"
        )
    templates = templates_for(download.name)
    return EvaluationSet(download.name, content.class_names, templates, splits, digest(facts), layout.title)


def _missing(download: Download, root: Path) -> str:
    ways = []
    for layout in download.layouts:
        lines = [f"    {root / need.paths[0]}  from {need.url}" for need in layout.needs if need.find(root) is None]
        ways.append("\n".join([f"  {layout.title}:", *lines]))
    return f"{download.title} is not (all) under {root}. Missing for\n" + "\n  or\n".join(ways)
