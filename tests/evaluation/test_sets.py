"""Evaluation sets, opened from tiny copies in the published layouts; what is missing or damaged is named."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iosr_fast.evaluation.sets import PHOTO, catalog, open_evaluation_set
from iosr_fast.exceptions import BadImageError, IosrFastError

WNIDS = {"n01440764": "tench", "n01443537": "goldfish", "n02012849": "crane bird"}
SPLITS = ("train", "val", "test")
Expected = tuple[list[str], dict[str, list[tuple[str, int]]]]  # class names, and (path, label) by split
Make = Callable[[Path], Expected]


def put_image(path: Path, label: int) -> None:
    """A picture whose first channel is the label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (10, 8), (40 * label, 99, 0)).save(path, quality=100)


def put_text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def in_folder(folder: Path, class_names: list[str], rows: dict[str, list[tuple[str, int]]]) -> Expected:
    for listed in rows.values():
        for key, label in listed:
            put_image(folder / key, label)
    return class_names, rows


def split_file(name: str) -> Make:
    """The layout of CoOp's split file, with a class name that has an underscore and one with CUB's number."""

    def make(root: Path) -> Expected:
        needs = catalog()[name]["needs"]
        file, folder = root / needs[0][0], root / needs[1][0]
        for need in needs[2:]:
            (root / need[0]).mkdir(parents=True, exist_ok=True)
        classes = [("a", "apple_pie"), ("b/c", "002.Tern")]
        content = {s: [(f"{f}/{s}é_{k}.jpg", k, text) for k, (f, text) in enumerate(classes)][::-1] for s in SPLITS}
        put_text(file, json.dumps(content))
        rows = {split: [(path, label) for path, label, _ in listed] for split, listed in content.items()}
        return in_folder(folder, ["apple pie", "Tern"], rows)

    return make


def aircraft(root: Path) -> Expected:
    folder = "fgvc-aircraft-2013b/data"
    put_text(root / folder / "variants.txt", "707-320", "F/A-18")
    for i, split in enumerate(SPLITS):
        put_text(root / folder / f"images_variant_{split}.txt", f"000000{i} F/A-18", f"100000{i} 707-320")
    rows = {s: [(f"images/000000{i}.jpg", 1), (f"images/100000{i}.jpg", 0)] for i, s in enumerate(SPLITS)}
    return in_folder(root / folder, ["707-320", "F/A-18"], rows)


def imagenet(root: Path) -> Expected:
    put_text(root / "imagenet/classnames.txt", *(f"{wnid} {name}" for wnid, name in reversed(WNIDS.items())))
    rows = {
        "train": [(f"train/{wnid}/{wnid}_{i}.JPEG", label) for label, wnid in enumerate(WNIDS) for i in range(2)],
        "test": [(f"val/{wnid}/ILSVRC2012_val_{label}.JPEG", label) for label, wnid in enumerate(WNIDS)],
    }
    return in_folder(root / "imagenet/images", list(WNIDS.values()), rows)


def shift(folder: str, wnids: tuple[str, ...] = tuple(WNIDS), numbered: bool = False) -> Make:
    def make(root: Path) -> Expected:
        put_text(root / "imagenet/classnames.txt", *(f"{wnid} {name}" for wnid, name in WNIDS.items()))
        place = root / folder
        put_text(place / "README.txt", "not an image")
        rows = {"test": [(f"{place.name}/{k if numbered else wnid}/x.jpg", k) for k, wnid in enumerate(wnids)]}
        return in_folder(place.parent, [WNIDS[wnid] for wnid in wnids], rows)

    return make


TWO = ("n01440764", "n02012849")
V2 = "imagenetv2/imagenetv2-matched-frequency-format-val"
CASES: dict[str, Make] = {
    **{name: split_file(name) for name, entry in catalog().items() if entry["reader"] == "split_json"},
    "fgvc_aircraft": aircraft,
    "imagenet": imagenet,
    "imagenet_v2": shift(V2, numbered=True),
    "imagenet_sketch": shift("imagenet-sketch/sketch"),
    "imagenet_a": shift("imagenet-adversarial/imagenet-a", TWO),
    "imagenet_r": shift("imagenet-rendition/imagenet-r", TWO),
}


@pytest.mark.parametrize("name", CASES)
def test_a_set_opens_in_its_published_layout(name: str, tmp_path: Path) -> None:
    class_names, rows = CASES[name](tmp_path)
    opened = open_evaluation_set(name, tmp_path)
    assert opened.class_names == class_names and len(opened.class_ids) == len(class_names)
    assert set(opened.splits) == set(rows)
    for split, listed in rows.items():
        got = opened.splits[split]
        assert (got.keys, got.labels.tolist()) == ([key for key, _ in listed], [label for _, label in listed])
        for row in range(len(got)):
            image = got.image(row)
            assert image.mode == "RGB" and image.size == (10, 8)
            assert abs(np.asarray(image)[4, 4, 0].item() - 40 * got.labels[row]) <= 3
    assert len(opened.templates) == (7 if name.startswith("imagenet") else 1)


def test_every_set_is_tried_and_its_prompts_have_a_place_for_the_class() -> None:
    entries = catalog()
    assert set(CASES) == set(entries)
    prompts = [prompt for entry in entries.values() for prompt in entry.get("prompts", [PHOTO])]
    assert all(prompt.count("{}") == 1 for prompt in prompts)
    assert len(entries) == 18


@pytest.mark.parametrize("name", catalog())
def test_everything_missing_is_listed_with_its_url_and_place(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        open_evaluation_set(name, tmp_path)
    assert catalog()[name]["layout"] in str(caught.value)
    for *paths, url in catalog()[name]["needs"]:
        assert f"{tmp_path / paths[0]}  from {url}" in str(caught.value)


def test_missing_images_are_counted_and_named(tmp_path: Path) -> None:
    split_file("eurosat")(tmp_path)
    for path in ("a/valé_0.jpg", "b/c/testé_1.jpg"):
        (tmp_path / "eurosat/2750" / path).unlink()
    with pytest.raises(FileNotFoundError, match=r"2 images of EuroSAT are missing from .*2750: .*; download") as caught:
        open_evaluation_set("eurosat", tmp_path)
    assert "a/valé_0.jpg" in str(caught.value) and "b/c/testé_1.jpg" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"train": [["a.jpg", 0', "is damaged or not a split file"),
        ("[1, 2]", "is damaged or not a split file"),
        ('{"test": [["a.jpg", "x", "a"]]}', "is damaged or not a split file"),
        ('{"train": [["a.jpg", 0, "a"]]}', "expected a split 'test' in .*, found train"),
        ('{"test": [["a.jpg", 0, "a"], ["b.jpg", 0, "b"]]}', "gives label 0 two names, 'a' and 'b'"),
        ('{"test": [["a.jpg", 0, "a"], ["b.jpg", 2, "b"]]}', r"has 2 classes, expected labels 0 to 1, got \[0, 2\]"),
        ('{"test": [["../a.jpg", 0, "a"]]}', r"a path that leaves the folder of images: '../a.jpg'"),
        ('{"test": [["/etc/a.jpg", 0, "a"]]}', "a path that leaves the folder of images"),
    ],
)
def test_a_bad_split_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    split_file("eurosat")(tmp_path)
    file = tmp_path / "eurosat/split_zhou_EuroSAT.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(IosrFastError, match=message) as caught:
        open_evaluation_set("eurosat", tmp_path)
    assert str(file) in str(caught.value)


def test_lists_of_aircraft_name_classes(tmp_path: Path) -> None:
    aircraft(tmp_path)
    put_text(tmp_path / "fgvc-aircraft-2013b/data/images_variant_val.txt", "0000001 747")
    with pytest.raises(IosrFastError, match=r"names of variants.txt in .*images_variant_val.txt, got 747"):
        open_evaluation_set("fgvc_aircraft", tmp_path)


def test_folders_of_imagenet_have_to_be_its_classes(tmp_path: Path) -> None:
    imagenet(tmp_path)
    folder = tmp_path / "imagenet/images"
    (folder / "val/n99999999").mkdir()
    with pytest.raises(IosrFastError, match=r"every class that .*classnames.txt lists in .*val; 1 .*: n99999999"):
        open_evaluation_set("imagenet", tmp_path)
    (folder / "val/n99999999").rmdir()
    for path in (folder / "train/n01443537").iterdir():
        path.unlink()
    with pytest.raises(IosrFastError, match=r"expected images in the class folder .*n01443537, found none"):
        open_evaluation_set("imagenet", tmp_path)
    (folder / "train/n01443537").rmdir()
    with pytest.raises(IosrFastError, match=r"lists in .*train; 1 .*: n01443537"):
        open_evaluation_set("imagenet", tmp_path)
    put_text(tmp_path / "imagenet/classnames.txt", "n01440764 tench", "n01443537")
    with pytest.raises(IosrFastError, match=r"expected lines of a wnid and a class name in .*classnames.txt"):
        open_evaluation_set("imagenet", tmp_path)
    shift(V2, TWO, numbered=True)(tmp_path)
    with pytest.raises(IosrFastError, match=r"lists in .*format-val; 1 are missing or have other names: 2"):
        open_evaluation_set("imagenet_v2", tmp_path)
    shift("imagenet-rendition/imagenet-r", TWO)(tmp_path)
    (tmp_path / "imagenet-rendition/imagenet-r/n99999999").mkdir()
    with pytest.raises(IosrFastError, match=r"expected class folders that .* lists in .*imagenet-r; 1 .*: n99999999"):
        open_evaluation_set("imagenet_r", tmp_path)


def test_unreadable_images_and_unknown_sets_are_refused(tmp_path: Path) -> None:
    _, rows = split_file("dtd")(tmp_path)
    image = tmp_path / "dtd/images" / rows["test"][0][0]
    image.write_bytes(image.read_bytes()[:200])
    with pytest.raises(BadImageError, match=re.escape(str(image))):
        open_evaluation_set("dtd", tmp_path).splits["test"].image(0)
    with pytest.raises(IosrFastError, match=r"expected an evaluation set of caltech101, .*, got 'cifar'"):
        open_evaluation_set("cifar", tmp_path)


def test_copies_have_one_fingerprint_and_a_changed_image_another_time(tmp_path: Path) -> None:
    split_file("cub")(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first, second = (open_evaluation_set("cub", tmp_path / place) for place in "ab")
    assert first.fingerprint == second.fingerprint
    image = second.splits["test"].folder / second.splits["test"].keys[0]
    os.utime(image, ns=(1, 10**18))
    touched = open_evaluation_set("cub", tmp_path / "b")
    assert touched.fingerprint == first.fingerprint and touched.splits["test"].times[0] == 10**18
    image.write_bytes(image.read_bytes() + b"\0")
    assert open_evaluation_set("cub", tmp_path / "b").fingerprint != first.fingerprint
