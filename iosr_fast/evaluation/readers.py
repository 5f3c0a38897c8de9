"""Readers of the evaluation sets: CoOp's split files, FGVC-Aircraft's lists, and ImageNet's folders."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from iosr_fast.exceptions import IosrFastError
from iosr_fast.images.listing import Skipped, class_folders, walk

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


def aircraft(needs: list[Path]) -> Content:
    """FGVC-Aircraft's lists: variants.txt has a class name a line, images_variant_SPLIT.txt "number name"."""
    (folder,) = needs
    names = (folder / "variants.txt").read_text(encoding="utf-8").splitlines()
    number_of = {name: number for number, name in enumerate(names)}
    rows: dict[str, Rows] = {}
    for split in ("train", "val", "test"):
        listed = _read_pairs(file := folder / f"images_variant_{split}.txt", "number")
        if unknown := {name for _, name in listed} - set(names):
            raise IosrFastError(f"expected class names of variants.txt in {file}, got {', '.join(sorted(unknown))}")
        rows[split] = [(f"images/{image}.jpg", number_of[name]) for image, name in listed]
    return Content(folder, names, names, rows)


def imagenet(needs: list[Path]) -> Content:
    """ImageNet and its shifted versions: classnames.txt ("wnid name" a line), then the folder of test images, or those
    of training and test images, with one sub-folder a class.

    Sub-folders are named by wnid, or by number into the sorted wnids (ImageNet-V2). Train and test need a folder of
    every class; a shifted version has the classes that have a folder, in the order of their wnids.
    """
    file, *places = needs
    names = dict(sorted(_read_pairs(file, "wnid")))  # the numbering of every ImageNet list
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


def _read_pairs(file: Path, kind: str) -> list[tuple[str, str]]:
    """The lines of a file: an id of this `kind`, and a class name."""
    try:
        lines = [line.split(maxsplit=1) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [(number, name.strip()) for number, name in lines]
    except ValueError as error:  # fewer than two words, or not UTF-8
        raise IosrFastError(f"expected lines of a {kind} and a class name in {file}, got others ({error})") from error


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
