"""Every evaluation set, in every layout, opened from a tiny copy in its true format on disk."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

for module in ("torch", "torchvision", "scipy"):
    pytest.importorskip(module, reason=f"{module} comes with the train extra")

from iosr_fast.evaluation.sets import IMAGENET_SEVEN, catalog, describe, open_evaluation_set  # noqa: E402

WNIDS = {"n01440764": "tench", "n01443537": "goldfish", "n02012849": "crane bird"}
Expected = tuple[list[str], dict[str, list[tuple[str, int]]]]


def put_image(path: Path, label: int) -> None:
    """A picture whose first channel tells the label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (10, 8), (40 * label, 99, 0)).save(path, quality=100)


def put_text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def put_split_json(root: Path, name: str, classes: list[tuple[str, str]]) -> Expected:
    """A split file of the set's first layout: `classes` are folder and class name of each label."""
    needs = describe(name).layouts[0].needs
    file, folder = root / needs[0].paths[0], root / needs[1].paths[0]
    for need in needs[2:]:
        (root / need.paths[0]).mkdir(parents=True, exist_ok=True)
    expected: dict[str, list[tuple[str, int]]] = {}
    content: dict[str, list[tuple[str, int, str]]] = {}
    for split in ("train", "val", "test"):
        rows = [(f"{place}/{split}é_{label}.jpg", label, text) for label, (place, text) in enumerate(classes)]
        rows.reverse()
        for path, label, _ in rows:
            put_image(folder / path, label)
        content[split], expected[split] = rows, [(path, label) for path, label, _ in rows]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")
    return [], expected


def coop(name: str, *classes: tuple[str, str, str]) -> Callable[[Path], Expected]:
    def make(root: Path) -> Expected:
        _, rows = put_split_json(root, name, [(place, text) for place, text, _ in classes])
        return [spoken for _, _, spoken in classes], rows

    return make


def dtd(root: Path) -> Expected:
    rows = {
        split: [(f"dtd/dtd/images/{c}/{c}_{split}.jpg", i) for i, c in enumerate(("banded", "zigzagged"))]
        for split in SPLITS
    }
    for split, listed in rows.items():
        put_text(root / f"dtd/dtd/labels/{split}1.txt", *(key.removeprefix("dtd/dtd/images/") for key, _ in listed))
    return ["banded", "zigzagged"], rows


def food(root: Path) -> Expected:
    for split in ("train", "test"):
        put_text(
            root / f"food-101/meta/{split}.json",
            json.dumps({"waffles": [f"waffles/{split}1"], "apple_pie": [f"apple_pie/{split}2"]}),
        )
    rows = {
        s: [(f"food-101/images/waffles/{s}1.jpg", 1), (f"food-101/images/apple_pie/{s}2.jpg", 0)]
        for s in ("train", "test")
    }
    return ["apple pie", "waffles"], rows


def flowers(root: Path) -> Expected:
    from scipy.io import savemat

    (root / "flowers-102/jpg").mkdir(parents=True)
    savemat(root / "flowers-102/imagelabels.mat", {"labels": np.array([[1, 2, 3, 1, 2, 3]], np.uint8)})
    savemat(root / "flowers-102/setid.mat", {"trnid": [[2, 1]], "valid": [[4, 3]], "tstid": [[5, 6]]})
    rows = {"train": [(2, 1), (1, 0)], "val": [(4, 0), (3, 2)], "test": [(5, 1), (6, 2)]}
    return ["pink primrose", "hard-leaved pocket orchid", "canterbury bells"], {
        split: [(f"flowers-102/jpg/image_{i:05d}.jpg", label) for i, label in listed] for split, listed in rows.items()
    }


def pets(root: Path) -> Expected:
    images, lists = "oxford-iiit-pet/images", root / "oxford-iiit-pet/annotations"
    put_text(lists / "trainval.txt", "Abyssinian_1 1 1 1", "american_bulldog_7 2 2 1")
    put_text(lists / "test.txt", "american_bulldog_8 2 2 1", "Abyssinian_2 1 1 1")
    return ["Abyssinian", "American Bulldog"], {
        "train": [(f"{images}/Abyssinian_1.jpg", 0), (f"{images}/american_bulldog_7.jpg", 1)],
        "test": [(f"{images}/american_bulldog_8.jpg", 1), (f"{images}/Abyssinian_2.jpg", 0)],
    }


def cars(root: Path) -> Expected:
    from scipy.io import savemat

    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    names = np.empty((1, 2), object)
    names[0, :] = ["Acura RL Sedan 2012", "Ram C/V Cargo Van 2012"]
    savemat(folder / "devkit/cars_meta.mat", {"class_names": names})
    kind = [("fname", "O"), ("class", "O")]
    train = np.array([[("00001.jpg", 2), ("00002.jpg", 1)]], kind)
    test = np.array([[("00001.jpg", 1), ("00002.jpg", 2)]], kind)
    savemat(folder / "devkit/cars_train_annos.mat", {"annotations": train})
    savemat(folder / "cars_test_annos_withlabels.mat", {"annotations": test})
    return ["Acura RL Sedan 2012", "Ram C/V Cargo Van 2012"], {
        "train": [("stanford_cars/cars_train/00001.jpg", 1), ("stanford_cars/cars_train/00002.jpg", 0)],
        "test": [("stanford_cars/cars_test/00001.jpg", 0), ("stanford_cars/cars_test/00002.jpg", 1)],
    }


def aircraft(root: Path) -> Expected:
    folder = root / "fgvc_aircraft"
    put_text(folder / "variants.txt", "707-320", "F/A-18")
    for i, split in enumerate(SPLITS):
        put_text(folder / f"images_variant_{split}.txt", f"000000{i} F/A-18", f"100000{i} 707-320")
    rows = {split: [(f"000000{i}.jpg", 1), (f"100000{i}.jpg", 0)] for i, split in enumerate(SPLITS)}
    return in_folder(folder / "images", ["707-320", "F/A-18"], rows)


def aircraft_of_torchvision(root: Path) -> Expected:
    expected = aircraft(root)
    (root / "fgvc-aircraft-2013b").mkdir()
    (root / "fgvc_aircraft").rename(root / "fgvc-aircraft-2013b" / "data")
    return expected


def sun(root: Path) -> Expected:
    put_text(root / "sun397/ClassName.txt", "/a/abbey", "/c/church/indoor", "/a/art_studio")
    put_text(root / "sun397/Training_01.txt", "/c/church/indoor/sun_b.jpg", "/a/abbey/sun_a.jpg")
    put_text(root / "sun397/Testing_01.txt", "/a/art_studio/sun_c.jpg")
    rows = {
        "train": [("c/church/indoor/sun_b.jpg", 1), ("a/abbey/sun_a.jpg", 0)],
        "test": [("a/art_studio/sun_c.jpg", 2)],
    }
    return in_folder(root / "sun397/SUN397", ["abbey", "indoor church", "art studio"], rows)


def ucf(root: Path) -> Expected:
    lists = root / "ucf101/ucfTrainTestlist"
    put_text(lists / "classInd.txt", "1 ApplyEyeMakeup", "2 YoYo")
    put_text(lists / "trainlist01.txt", "ApplyEyeMakeup/v_a.avi 1", "YoYo/v_b.avi 2")
    put_text(lists / "testlist01.txt", "YoYo/v_c.avi")
    rows = {"train": [("Apply_Eye_Makeup/v_a.jpg", 0), ("Yo_Yo/v_b.jpg", 1)], "test": [("Yo_Yo/v_c.jpg", 1)]}
    return in_folder(root / "ucf101/UCF-101-midframes", ["Apply Eye Makeup", "Yo Yo"], rows)


def cub(root: Path) -> Expected:
    folder = root / "cub/CUB_200_2011"
    put_text(folder / "images.txt", "1 001.A_b/x.jpg", "2 002.C/y.jpg", "3 002.C/z.jpg")
    put_text(folder / "image_class_labels.txt", "1 1", "2 2", "3 2")
    put_text(folder / "train_test_split.txt", "1 1", "2 0", "3 1")
    put_text(folder / "classes.txt", "1 001.A_b", "2 002.C")
    rows = {"train": [("001.A_b/x.jpg", 0), ("002.C/z.jpg", 1)], "test": [("002.C/y.jpg", 1)]}
    return in_folder(folder / "images", ["A b", "C"], rows)


def dogs(root: Path) -> Expected:
    from scipy.io import savemat

    rows = {
        "train": [("n02085620-Chihuahua/n02085620_1.jpg", 0), ("n02105855-Shetland_sheepdog/n02105855_2.jpg", 1)],
        "test": [("n02105855-Shetland_sheepdog/n02105855_3.jpg", 1)],
    }
    (root / "stanford_dogs/lists").mkdir(parents=True)
    for split, listed in rows.items():
        files = np.empty((len(listed), 1), object)
        files[:, 0] = [path for path, _ in listed]
        labels = np.array([[label + 1] for _, label in listed], np.uint8)
        savemat(root / f"stanford_dogs/lists/{split}_list.mat", {"file_list": files, "labels": labels})
    return in_folder(root / "stanford_dogs/Images", ["Chihuahua", "Shetland sheepdog"], rows)


def plantdoc(root: Path) -> Expected:
    rows = {
        "train": [("train/Apple_leaf/é?b=1.jpg", 0), ("train/Tomato mites/b.jpg", 1)],
        "test": [("test/Apple_leaf/c.JPG", 0)],
    }
    return in_folder(root / "plantdoc/PlantDoc-Dataset", ["Apple leaf", "Tomato mites"], rows)


def imagenet(root: Path) -> Expected:
    put_text(root / "imagenet/classnames.txt", *(f"{wnid} {name}" for wnid, name in reversed(WNIDS.items())))
    rows = {
        "train": [(f"train/{wnid}/{wnid}_{i}.JPEG", label) for label, wnid in enumerate(WNIDS) for i in range(2)],
        "test": [(f"val/{wnid}/ILSVRC2012_val_{label}.JPEG", label) for label, wnid in enumerate(WNIDS)],
    }
    return in_folder(root / "imagenet/images", list(WNIDS.values()), rows)


def shift(folder: str, wnids: tuple[str, ...], numbered: bool = False) -> Callable[[Path], Expected]:
    def make(root: Path) -> Expected:
        put_text(root / "imagenet/classnames.txt", *(f"{wnid} {name}" for wnid, name in WNIDS.items()))
        place = root / folder
        rows = {
            "test": [(f"{place.name}/{label if numbered else wnid}/x.jpg", label) for label, wnid in enumerate(wnids)]
        }
        put_text(place / "README.txt", "not an image")
        return in_folder(place.parent, [WNIDS[wnid] for wnid in wnids], rows)

    return make


def in_folder(folder: Path, class_names: list[str], rows: dict[str, list[tuple[str, int]]]) -> Expected:
    for listed in rows.values():
        for key, label in listed:
            put_image(folder / key, label)
    return class_names, rows


SPLITS = ("train", "val", "test")
ALL, TWO = tuple(WNIDS), ("n01440764", "n02012849")
CASES: list[tuple[str, int, Callable[[Path], Expected]]] = [
    ("caltech101", 0, coop("caltech101", ("Leopards", "leopard", "leopard"), ("yin_yang", "yin_yang", "yin yang"))),
    ("dtd", 0, coop("dtd", ("banded", "banded", "banded"), ("dotted", "dotted", "dotted"))),
    ("dtd", 1, dtd),
    (
        "eurosat",
        0,
        coop("eurosat", ("AnnualCrop", "Annual Crop Land", "Annual Crop Land"), ("River", "River", "River")),
    ),
    ("fgvc_aircraft", 0, aircraft),
    ("fgvc_aircraft", 0, aircraft_of_torchvision),
    ("food101", 0, coop("food101", ("apple_pie", "apple_pie", "apple pie"), ("waffles", "waffles", "waffles"))),
    ("food101", 1, food),
    ("flowers102", 0, coop("flowers102", (".", "pink primrose", "pink primrose"), (".", "bee balm", "bee balm"))),
    ("flowers102", 1, flowers),
    ("oxford_pets", 0, coop("oxford_pets", (".", "abyssinian", "abyssinian"), (".", "basset_hound", "basset hound"))),
    ("oxford_pets", 1, pets),
    ("sun397", 0, coop("sun397", ("a/abbey", "abbey", "abbey"), ("c/church/indoor", "indoor church", "indoor church"))),
    ("sun397", 1, sun),
    (
        "stanford_cars",
        0,
        coop("stanford_cars", ("cars_train", "2012 Ram C/V", "2012 Ram C/V"), ("cars_test", "b", "b")),
    ),
    ("stanford_cars", 1, cars),
    ("ucf101", 0, coop("ucf101", ("Apply_Lipstick", "Apply_Lipstick", "Apply Lipstick"), ("Yo_Yo", "Yo_Yo", "Yo Yo"))),
    ("ucf101", 1, ucf),
    ("imagenet", 0, imagenet),
    ("cub", 0, coop("cub", ("001.A_b", "001.A_b", "A b"), ("002.C", "002.C", "C"))),
    ("cub", 1, cub),
    ("stanford_dogs", 0, coop("stanford_dogs", ("n1-Pug", "Pug", "Pug"), ("n2-a", "Afghan hound", "Afghan hound"))),
    ("stanford_dogs", 1, dogs),
    (
        "plantdoc",
        0,
        coop("plantdoc", ("Apple leaf", "Apple leaf", "Apple leaf"), ("grape leaf", "grape leaf", "grape leaf")),
    ),
    ("plantdoc", 1, plantdoc),
    ("imagenet_v2", 0, shift("imagenetv2/imagenetv2-matched-frequency-format-val", ALL, numbered=True)),
    ("imagenet_sketch", 0, shift("imagenet-sketch/sketch", ALL)),
    ("imagenet_a", 0, shift("imagenet-adversarial/imagenet-a", TWO)),
    ("imagenet_r", 0, shift("imagenet-rendition/imagenet-r", TWO)),
]


def make_case(root: Path, name: str, make: Callable[[Path], Expected], monkeypatch: pytest.MonkeyPatch) -> Expected:
    class_names, rows = make(root)
    if make in (dtd, food, flowers, pets, cars):  # keys from the root, as torchvision's classes give them
        in_folder(root, class_names, rows)
    if make is flowers:
        import torchvision.datasets as torchvision

        # The official files are checked by their MD5, which those of a fixture can't have.
        files = {key: (file, None) for key, (file, _) in torchvision.Flowers102._file_dict.items()}
        monkeypatch.setattr(torchvision.Flowers102, "_file_dict", files)
    return class_names, rows


@pytest.mark.parametrize(("name", "layout", "make"), CASES, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(CASES)])
def test_a_set_opens_in_its_true_layout(
    name: str, layout: int, make: Callable[[Path], Expected], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class_names, rows = make_case(tmp_path, name, make, monkeypatch)
    opened = open_evaluation_set(name, tmp_path)
    assert opened.layout == describe(name).layouts[layout].title
    # torchvision knows all flowers by name; the others have the classes of the fixture.
    assert opened.class_names[: len(class_names)] == class_names
    assert len(opened.class_names) == (102 if make is flowers else len(class_names))
    assert set(opened.splits) == set(rows)
    for split, listed in rows.items():
        got = opened.splits[split]
        assert len(got) == len(listed) and got.labels.dtype == np.int64
        keys = [str(Path(key)) for key, _ in listed]
        assert (got.keys, got.labels.tolist()) == (keys, [label for _, label in listed])
        for row in range(len(got)):
            image = got.image(row)
            assert image.mode == "RGB" and image.size == (10, 8)
            assert abs(np.asarray(image)[4, 4, 0].item() - 40 * got.labels[row]) <= 3
    expected = list(IMAGENET_SEVEN) if name.startswith("imagenet") else opened.templates[:1]
    assert opened.templates == expected and all(template.count("{}") == 1 for template in opened.templates)


def test_every_layout_of_every_set_is_among_the_cases() -> None:
    tried = {(name, layout) for name, layout, _ in CASES}
    assert tried == {(name, i) for name, entry in catalog().items() for i in range(len(entry.layouts))}
    assert len(catalog()) == 18


def test_the_same_set_elsewhere_has_the_same_fingerprint(tmp_path: Path) -> None:
    archive = tmp_path / "sets.tar"
    (tmp_path / "a").mkdir()
    cub(tmp_path / "a")
    with tarfile.open(archive, "w") as tar:
        tar.add(tmp_path / "a", ".")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "b", filter="data")
    first, second = (open_evaluation_set("cub", tmp_path / place) for place in "ab")
    assert first.fingerprint == second.fingerprint
    image = tmp_path / "b/cub/CUB_200_2011/images/002.C/z.jpg"
    image.write_bytes(image.read_bytes() + b"\0")
    resized = open_evaluation_set("cub", tmp_path / "b").fingerprint
    put_text(tmp_path / "b/cub/CUB_200_2011/classes.txt", "1 001.A_b", "2 002.D")
    assert len({first.fingerprint, resized, open_evaluation_set("cub", tmp_path / "b").fingerprint}) == 3
