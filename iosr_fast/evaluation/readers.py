"""Readers of the evaluation sets: CoOp's split files, torchvision's classes, and ImageNet's folders."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from iosr_fast.exceptions import IosrFastError
from iosr_fast.images.listing import Skipped, class_folders, walk
from iosr_fast.utils.require import require

Rows = list[tuple[str, int]]  # (path relative to the folder, label)


@dataclass(frozen=True)
class Content:
    """What a reader returns: names and ids of the classes, and for each split rows of (path, label) in `folder`."""

    folder: Path
    class_names: list[str]
    class_ids: list[str]
    rows: dict[str, Rows]


def split_json(needs: list[Path]) -> Content:
    """A split file in CoOp's format, {"train" | "val" | "test": [[relative path, label, class name], ...]}.

    `needs`: the file, and the folder that its paths are relative to. Underscores in class names become spaces, as CoOp
    does for prompts; CUB's leading numbers are removed.

    Raises IosrFastError for a damaged file, labels with two names or none, and paths that leave the folder.
    """
    file, folder = needs[:2]
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        splits = {
            name: [(str(path), int(label), str(text)) for path, label, text in content[name]]
            for name in ("train", "val", "test")
            if content.get(name)
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise IosrFastError(
            f"{file} is damaged or not a split file ({error}); expected "
            '{"train": [[path, label, class name], ...], ...}'
        ) from error
    if "test" not in splits:
        raise IosrFastError(f"expected a split 'test' in {file}, found {', '.join(splits) or 'none'}")
    names: dict[int, str] = {}
    for split, rows in splits.items():
        for path, label, text in rows:
            if names.setdefault(label, text) != text:
                raise IosrFastError(f"{file} gives label {label} two names, {names[label]!r} and {text!r} (in {split})")
            if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
                raise IosrFastError(f"{file} has a path that leaves the folder of images: {path!r} (in {split})")
    if sorted(names) != list(range(len(names))):
        raise IosrFastError(
            f"{file} has {len(names)} classes, expected labels 0 to {len(names) - 1}, got {sorted(names)}"
        )
    class_names = [_class_name(names[label]) for label in range(len(names))]
    return Content(
        folder,
        class_names,
        class_names,
        {split: [(path, label) for path, label, _ in rows] for split, rows in splits.items()},
    )


def torchvision_set(name: str, splits: Mapping[str, str], root: Path, needs: list[Path]) -> Content:
    """Read a set with torchvision's class; `splits` maps our names of splits to torchvision's. Downloads nothing."""
    kind = getattr(require("torchvision.datasets", "train"), name)
    rows: dict[str, Rows] = {}
    class_names: list[str] = []
    for ours, theirs in splits.items():
        try:
            data = kind(root, split=theirs, download=False)
            rows[ours] = [(os.path.relpath(path, root), label) for path, label in _paths_and_labels(data)]
        except Exception as error:  # damaged .mat files make scipy raise many types
            files = ", ".join(str(path.relative_to(root)) for path in needs)
            raise IosrFastError(
                f"torchvision's {name} can't read {files} in {root} ({error}); download it again"
            ) from error
        class_names = [_class_name(str(text)) for text in data.classes]
    return Content(root, class_names, class_names, rows)


def _paths_and_labels(data: Any) -> Rows:
    """Those of a torchvision data set, without opening an image."""
    if hasattr(data, "_samples"):
        return [(str(path), int(label)) for path, label in data._samples]
    paths = data._images if hasattr(data, "_images") else data._image_files
    return [(str(path), int(label)) for path, label in zip(paths, data._labels, strict=True)]


def imagenet(needs: list[Path]) -> Content:
    """ImageNet and its shifted versions: classnames.txt ("wnid name" a line), then the folder of test images, or those
    of training and test images, with one sub-folder a class.

    Sub-folders are named by wnid, or by number into the sorted wnids (ImageNet-V2). Train and test need a folder of
    every class; a shifted version has the classes that have a folder, in the order of their wnids.
    """
    file, *places = needs
    names = _read_wnids(file)
    splits = dict(zip(("train", "test") if len(places) == 2 else ("test",), places, strict=True))
    folder = Path(os.path.commonpath([place.parent for place in places]))
    rows: dict[str, Rows] = {}
    for split, place in splits.items():
        found = set(class_folders(place))
        numbered = all(name.isdecimal() for name in found)
        known = [str(number) for number in range(len(names))] if numbered else list(names)
        whole = numbered or len(places) == 2
        if wrong := sorted(found.symmetric_difference(known) if whole else found.difference(known)):
            raise IosrFastError(
                f"expected {'a folder of every class' if whole else 'class folders'} that {file} lists in {place}; "
                f"{len(wrong)} are missing or have other names: {', '.join(wrong[:10])}"
            )
        if not numbered:
            names = {wnid: names[wnid] for wnid in known if wnid in found}
        rows[split] = _folder_rows(folder, place, known if numbered else list(names))
    return Content(folder, list(names.values()), list(names), rows)


def _read_wnids(file: Path) -> dict[str, str]:
    """wnid -> class name, sorted by wnid: the numbering of every ImageNet list."""
    try:
        pairs = [line.split(maxsplit=1) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        return dict(sorted((wnid, name.strip()) for wnid, name in pairs))
    except ValueError as error:  # fewer than two words, or not UTF-8
        raise IosrFastError(f"expected lines of a wnid and a class name in {file}, got others ({error})") from error


def _folder_rows(folder: Path, place: Path, classes: list[str]) -> Rows:
    """Rows of every image in PLACE/CLASS, sorted by name within a class. Raises IosrFastError for an empty class."""
    rows: Rows = []
    skipped = Skipped()
    for label, name in enumerate(classes):
        images = sorted(Path(path).relative_to(folder).as_posix() for path in walk(place / name, skipped))
        if not images:
            raise IosrFastError(f"expected images in the class folder {place / name}, found none")
        rows += [(image, label) for image in images]
    skipped.warn(place, len(rows))
    return rows


def _class_name(name: str) -> str:
    """A class name for prompts: "012.Yellow_headed_Blackbird" -> "Yellow headed Blackbird"."""
    return re.sub(r"^\d{3}\.", "", name).replace("_", " ")
