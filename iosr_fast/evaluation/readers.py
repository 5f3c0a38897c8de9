"""Readers of the evaluation sets: CoOp's JSON split files, and the sets' own official files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from iosr_fast.exceptions import IosrFastError
from iosr_fast.images.listing import Skipped, class_folders, walk
from iosr_fast.utils.require import require

Rows = list[tuple[str, int]]  # (path relative to the folder, label)


@dataclass(frozen=True)
class Content:
    """What a reader returns: class names, and for each split rows of (key, label) in `folder`."""

    folder: Path
    class_names: list[str]
    rows: dict[str, Rows]


def split_json(root: Path, needs: list[Path]) -> Content:
    """A split file in CoOp's format, {"train" | "val" | "test": [[relative path, label, class name], ...]}.

    `needs`: the file, and the folder that its paths are relative to (and more that must exist). Underscores in class
    names become spaces, as CoOp does for prompts; CUB's leading numbers are removed.

    Raises ValueError for a damaged file, labels with two names or none, and paths that leave the folder.
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
    return Content(
        folder,
        [spoken(names[label]) for label in range(len(names))],
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
            listed = _files(data)
        except Exception as error:  # damaged .mat files make scipy raise many types
            files = ", ".join(str(path.relative_to(root)) for path in needs)
            raise IosrFastError(
                f"torchvision's {name} can't read {files} in {root} ({error}); download it again"
            ) from error
        names = [spoken(str(text)) for text in data.classes]
        if class_names and names != class_names:
            raise IosrFastError(
                f"expected the same classes in all splits of torchvision's {name} in {root}, got others in {theirs!r}; "
                "download it again"
            )
        class_names = names
        rows[ours] = [(os.path.relpath(path, root), label) for path, label in listed]
    return Content(root, class_names, rows)


def _files(data: Any) -> list[tuple[str, int]]:
    """Paths and labels of a torchvision data set without opening an image."""
    if hasattr(data, "_samples"):
        return [(str(path), int(label)) for path, label in data._samples]
    paths = data._images if hasattr(data, "_images") else data._image_files
    return [(str(path), int(label)) for path, label in zip(paths, data._labels, strict=True)]


def aircraft(root: Path, needs: list[Path]) -> Content:
    """FGVC-Aircraft: variants.txt, and images_variant_SPLIT.txt with lines of "image variant"."""
    classes, train, val, test, images = needs
    names = read_lines(classes)
    index = {name: i for i, name in enumerate(names)}
    rows = {
        split: [(f"{image}.jpg", look_up(index, name, file)) for image, name in read_pairs(file)]
        for split, file in (("train", train), ("val", val), ("test", test))
    }
    return Content(images, names, rows)


def cub(root: Path, needs: list[Path]) -> Content:
    """CUB-200-2011: images.txt, image_class_labels.txt, train_test_split.txt and classes.txt, joined by image id."""
    paths, labels, is_train = (dict(read_pairs(file)) for file in needs[:3])
    classes = read_pairs(needs[3])
    index = {number: i for i, (number, _) in enumerate(classes)}
    if not paths.keys() == labels.keys() == is_train.keys():
        raise IosrFastError(
            f"{needs[0]}, {needs[1].name} and {needs[2].name} do not list the same images; download them again"
        )
    rows: dict[str, Rows] = {"train": [], "test": []}
    for image, path in paths.items():
        rows["train" if is_train[image] == "1" else "test"].append((path, look_up(index, labels[image], needs[1])))
    return Content(needs[4], [spoken(name) for _, name in classes], rows)


def dogs(root: Path, needs: list[Path]) -> Content:
    """Stanford Dogs: train_list.mat and test_list.mat with `file_list` and `labels` from 1."""
    loadmat = require("scipy.io", "train").loadmat
    names: dict[int, str] = {}
    rows: dict[str, Rows] = {}
    for split, file in (("train", needs[0]), ("test", needs[1])):
        try:
            content = loadmat(file)
            files = [str(cell[0]) for cell in content["file_list"].ravel()]
            labels = [int(label) - 1 for label in content["labels"].ravel()]
            rows[split] = list(zip(files, labels, strict=True))
        except Exception as error:  # damaged .mat files make scipy raise many types
            raise IosrFastError(
                f"{file} is damaged or not a list of Stanford Dogs ({error}); download it again"
            ) from error
        names |= {label: spoken(path.split("/")[0].split("-", 1)[-1]) for path, label in rows[split]}
    if sorted(names) != list(range(len(names))):
        raise IosrFastError(f"expected labels 1 to {len(names)} in {needs[0]} and {needs[1].name}, got others")
    return Content(needs[2], [names[label] for label in range(len(names))], rows)


def plantdoc(root: Path, needs: list[Path]) -> Content:
    """PlantDoc as published: folders train and test with one sub-folder a class; classes are those of both."""
    train, test = needs
    names = sorted({*class_folders(train), *class_folders(test)})
    index = {name: i for i, name in enumerate(names)}
    folder = _above(train, test)
    rows = {
        split: folder_rows(folder, place, [(name, index[name]) for name in class_folders(place)])
        for split, place in (("train", train), ("test", test))
    }
    return Content(folder, [spoken(name) for name in names], rows)


def _above(*places: Path) -> Path:
    """The lowest folder that contains all of them; they need not lie side by side."""
    return Path(os.path.commonpath([place.parent for place in places]))


def ucf101(root: Path, needs: list[Path]) -> Content:
    """UCF101's first official split on CoOp's middle frames: "ApplyLipstick/v_x.avi" is Apply_Lipstick/v_x.jpg."""
    classes, train, test, frames = needs
    index = {name: int(number) - 1 for number, name in read_pairs(classes)}
    rows: dict[str, Rows] = {}
    for split, file in (("train", train), ("test", test)):
        videos = [line.split(" ")[0].partition("/") for line in read_lines(file)]
        rows[split] = [
            (f"{_apart(action)}/{video.removesuffix('.avi')}.jpg", look_up(index, action, file))
            for action, _, video in videos
        ]
    return Content(frames, [spoken(_apart(name)) for name in sorted(index, key=index.__getitem__)], rows)


def _apart(action: str) -> str:
    return "_".join(re.findall("[A-Z][^A-Z]*", action))


def sun397(root: Path, needs: list[Path]) -> Content:
    """SUN397's first official partition: lines of "/a/abbey/sun_x.jpg"; "/c/church/indoor" is "indoor church"."""
    classes, train, test, images = needs
    folders = read_lines(classes)
    index = {folder: i for i, folder in enumerate(folders)}
    rows = {
        split: [(line.lstrip("/"), look_up(index, line.rpartition("/")[0], file)) for line in read_lines(file)]
        for split, file in (("train", train), ("test", test))
    }
    names = [spoken(" ".join(reversed(folder.strip("/").split("/")[1:]))) for folder in folders]
    return Content(images, names, rows)


def imagenet(root: Path, needs: list[Path]) -> Content:
    """ImageNet: classnames.txt ("wnid name" a line), and train and val with one folder a wnid; val is the test."""
    names, train, val = _wnids(needs[0]), needs[1], needs[2]
    classes = [(wnid, label) for label, wnid in enumerate(names)]
    for place in (train, val):
        _check_wnids(place, names, needs[0])
        if missing := [wnid for wnid in names if not (place / wnid).is_dir()]:
            raise FileNotFoundError(
                f"{len(missing)} of {len(names)} class folders are missing from {place}: {missing[:10]}"
            )
    folder = _above(train, val)
    rows = {split: folder_rows(folder, place, classes) for split, place in (("train", train), ("test", val))}
    return Content(folder, list(names.values()), rows)


def imagenet_part(root: Path, needs: list[Path]) -> Content:
    """Test images in folders named by wnid. The classes are those with a folder, in the order of their wnids."""
    names = _wnids(needs[0])
    _check_wnids(needs[1], names, needs[0])
    wnids = class_folders(needs[1])
    rows = folder_rows(needs[1].parent, needs[1], [(wnid, label) for label, wnid in enumerate(wnids)])
    return Content(needs[1].parent, [names[wnid] for wnid in wnids], {"test": rows})


def imagenet_v2(root: Path, needs: list[Path]) -> Content:
    """ImageNet-V2: folders named 0 to 999, which index the sorted wnids."""
    names = list(_wnids(needs[0]).values())
    folders = class_folders(needs[1])
    if sorted(folders) != sorted(str(i) for i in range(len(names))):
        raise IosrFastError(
            f"expected folders 0 to {len(names) - 1} in {needs[1]}, as {needs[0]} has classes, got others"
        )
    rows = folder_rows(needs[1].parent, needs[1], [(str(i), i) for i in range(len(names))])
    return Content(needs[1].parent, names, {"test": rows})


def _wnids(file: Path) -> dict[str, str]:
    """wnid -> class name, sorted by wnid: the numbering of every ImageNet list."""
    return dict(sorted(read_pairs(file)))


def _check_wnids(folder: Path, names: dict[str, str], file: Path) -> None:
    if unknown := [wnid for wnid in class_folders(folder) if wnid not in names]:
        raise IosrFastError(
            f"expected class folders in {folder} that {file} lists, got {len(unknown)} others: {unknown[:10]}"
        )


def spoken(name: str) -> str:
    """A folder's name as a class name: "012.Yellow_headed_Blackbird" -> "Yellow headed Blackbird"."""
    return re.sub(r"^\d{3}\.", "", name).replace("_", " ")


def folder_rows(folder: Path, split: Path, classes: Iterable[tuple[str, int]]) -> Rows:
    """Rows of every image in SPLIT/CLASS, sorted by name within a class. Raises ValueError for an empty class."""
    rows: Rows = []
    skipped = Skipped()
    for name, label in classes:
        place = split / name
        images = sorted(Path(path).relative_to(folder).as_posix() for path, _ in walk(place, skipped=skipped))
        if not images:
            raise IosrFastError(f"expected images in the class folder {place}, found none")
        rows += [(image, label) for image in images]
    skipped.warn(split, len(rows))
    return rows


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank, stripped. Raises ValueError if it is not UTF-8."""
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise IosrFastError(
            f"expected a text file in UTF-8 at {path}, got another or a damaged one ({error})"
        ) from error


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """Lines of "first rest of the line", as pairs. Raises ValueError naming a line with one word only."""
    pairs: list[tuple[str, str]] = []
    for number, line in enumerate(read_lines(path), 1):
        first, _, rest = line.partition(" ")
        if not rest.strip():
            raise IosrFastError(f"expected at least two words in line {number} of {path}, got {line!r}")
        pairs.append((first, rest.strip()))
    return pairs


def look_up(table: Mapping[str, int], name: str, file: Path) -> int:
    """The label of a class. Raises ValueError naming the file for an unknown one."""
    if name not in table:
        raise IosrFastError(f"{file} names {name!r}, which is not one of the {len(table)} classes")
    return table[name]
