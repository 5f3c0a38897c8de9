"""Readers of the evaluation sets' own official files, for who has no split file of CoOp's."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from iosr_fast.images.listing import class_folders
from iosr_fast.training.data.evaluation_files import (
    Content,
    Rows,
    folder_rows,
    look_up,
    read_lines,
    read_pairs,
    spoken,
)
from iosr_fast.utils.require import require


def torchvision_set(name: str, splits: dict[str, str]) -> Callable[[Path, list[Path]], Content]:
    """A reader through torchvision's class: `splits` maps our names of splits to its own. Nothing is downloaded."""

    def read(root: Path, found: list[Path]) -> Content:
        kind = getattr(require("torchvision.datasets", "train"), name)
        rows: dict[str, Rows] = {}
        class_names: list[str] = []
        for ours, theirs in splits.items():
            try:
                data = kind(root, split=theirs, download=False)
                listed = _files(data)
            except Exception as error:  # damaged .mat files make scipy raise all sorts
                files = ", ".join(str(path.relative_to(root)) for path in found)
                told = f"torchvision's {name} can't read {files} in {root} ({error}); fetch it again"
                raise ValueError(told) from error
            names = [spoken(str(text)) for text in data.classes]
            if class_names and names != class_names:
                raise ValueError(f"torchvision's {name} in {root} has other classes in {theirs!r} than in other splits")
            class_names = names
            rows[ours] = [(os.path.relpath(path, root), label) for path, label in listed]
        return Content(root, class_names, rows)

    return read


def _files(data: Any) -> list[tuple[str, int]]:
    """Paths and labels of a torchvision data set without opening an image."""
    if hasattr(data, "_samples"):
        return [(str(path), int(label)) for path, label in data._samples]
    paths = data._images if hasattr(data, "_images") else data._image_files
    return [(str(path), int(label)) for path, label in zip(paths, data._labels, strict=True)]


def aircraft(root: Path, found: list[Path]) -> Content:
    """FGVC-Aircraft: variants.txt, and images_variant_SPLIT.txt with lines of "image variant"."""
    classes, train, val, test, images = found
    names = read_lines(classes)
    index = {name: i for i, name in enumerate(names)}
    rows = {
        split: [(f"{image}.jpg", look_up(index, name, file)) for image, name in read_pairs(file)]
        for split, file in (("train", train), ("val", val), ("test", test))
    }
    return Content(images, names, rows)


def cub(root: Path, found: list[Path]) -> Content:
    """CUB-200-2011: images.txt, image_class_labels.txt, train_test_split.txt and classes.txt, joined by image id."""
    paths, labels, is_train = (dict(read_pairs(file)) for file in found[:3])
    classes = read_pairs(found[3])
    index = {number: i for i, (number, _) in enumerate(classes)}
    if not paths.keys() == labels.keys() == is_train.keys():
        raise ValueError(
            f"{found[0]}, {found[1].name} and {found[2].name} do not list the same images; fetch them again"
        )
    rows: dict[str, Rows] = {"train": [], "test": []}
    for image, path in paths.items():
        rows["train" if is_train[image] == "1" else "test"].append((path, look_up(index, labels[image], found[1])))
    return Content(found[4], [spoken(name) for _, name in classes], rows)


def dogs(root: Path, found: list[Path]) -> Content:
    """Stanford Dogs: train_list.mat and test_list.mat with `file_list` and `labels` from 1."""
    loadmat = require("scipy.io", "train").loadmat
    names: dict[int, str] = {}
    rows: dict[str, Rows] = {}
    for split, file in (("train", found[0]), ("test", found[1])):
        try:
            content = loadmat(file)
            files = [str(cell[0]) for cell in content["file_list"].ravel()]
            labels = [int(label) - 1 for label in content["labels"].ravel()]
            rows[split] = list(zip(files, labels, strict=True))
        except Exception as error:  # damaged .mat files make scipy raise all sorts
            raise ValueError(f"{file} is damaged or no list of Stanford Dogs ({error}); fetch it again") from error
        names |= {label: spoken(path.split("/")[0].split("-", 1)[-1]) for path, label in rows[split]}
    if sorted(names) != list(range(len(names))):
        raise ValueError(f"expected labels 1 to {len(names)} in {found[0]} and {found[1].name}, got others")
    return Content(found[2], [names[label] for label in range(len(names))], rows)


def plantdoc(root: Path, found: list[Path]) -> Content:
    """PlantDoc as published: folders train and test with one sub-folder a class; classes are those of both."""
    train, test = found
    names = sorted({*class_folders(train), *class_folders(test)})
    index = {name: i for i, name in enumerate(names)}
    folder = _above(train, test)
    rows = {
        split: folder_rows(folder, _below(folder, place), [(name, index[name]) for name in class_folders(place)])
        for split, place in (("train", train), ("test", test))
    }
    return Content(folder, [spoken(name) for name in names], rows)


def _above(*places: Path) -> Path:
    """The folder that holds both: where one lies is no reason for the other to lie beside it."""
    return Path(os.path.commonpath([place.parent for place in places]))


def _below(folder: Path, place: Path) -> str:
    return place.relative_to(folder).as_posix()


def ucf101(root: Path, found: list[Path]) -> Content:
    """UCF101's first official split on CoOp's middle frames: "ApplyLipstick/v_x.avi" is Apply_Lipstick/v_x.jpg."""
    classes, train, test, frames = found
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


def sun397(root: Path, found: list[Path]) -> Content:
    """SUN397's first official partition: lines of "/a/abbey/sun_x.jpg"; "/c/church/indoor" is "indoor church"."""
    classes, train, test, images = found
    folders = read_lines(classes)
    index = {folder: i for i, folder in enumerate(folders)}
    rows = {
        split: [(line.lstrip("/"), look_up(index, line.rpartition("/")[0], file)) for line in read_lines(file)]
        for split, file in (("train", train), ("test", test))
    }
    names = [spoken(" ".join(reversed(folder.strip("/").split("/")[1:]))) for folder in folders]
    return Content(images, names, rows)


def imagenet(root: Path, found: list[Path]) -> Content:
    """ImageNet: classnames.txt ("wnid name" a line), and train and val with one folder a wnid; val is the test."""
    names, train, val = _wnids(found[0]), found[1], found[2]
    classes = [(wnid, label) for label, wnid in enumerate(names)]
    for place in (train, val):
        _check_wnids(place, names, found[0])
        if missing := [wnid for wnid in names if not (place / wnid).is_dir()]:
            raise FileNotFoundError(
                f"{len(missing)} of {len(names)} class folders are missing from {place}: {missing[:10]}"
            )
    folder = _above(train, val)
    rows = {
        split: folder_rows(folder, _below(folder, place), classes) for split, place in (("train", train), ("test", val))
    }
    return Content(folder, list(names.values()), rows)


def imagenet_part(root: Path, found: list[Path]) -> Content:
    """Test images in folders named by wnid: the classes are those that have a folder, in the order of their wnids."""
    names = _wnids(found[0])
    _check_wnids(found[1], names, found[0])
    wnids = class_folders(found[1])
    rows = folder_rows(found[1].parent, found[1].name, [(wnid, label) for label, wnid in enumerate(wnids)])
    return Content(found[1].parent, [names[wnid] for wnid in wnids], {"test": rows})


def imagenet_v2(root: Path, found: list[Path]) -> Content:
    """ImageNet-V2: folders named 0 to 999, numbers into the sorted wnids."""
    names = list(_wnids(found[0]).values())
    folders = class_folders(found[1])
    if sorted(folders) != sorted(str(i) for i in range(len(names))):
        raise ValueError(f"expected folders 0 to {len(names) - 1} in {found[1]}, as {found[0]} has classes, got others")
    rows = folder_rows(found[1].parent, found[1].name, [(str(i), i) for i in range(len(names))])
    return Content(found[1].parent, names, {"test": rows})


def _wnids(file: Path) -> dict[str, str]:
    """wnid -> class name, by wnid, which is how every ImageNet list numbers them."""
    return dict(sorted(read_pairs(file)))


def _check_wnids(folder: Path, names: dict[str, str], file: Path) -> None:
    if unknown := [wnid for wnid in class_folders(folder) if wnid not in names]:
        raise ValueError(f"{len(unknown)} class folders of {folder} are not in {file}: {unknown[:10]}")
