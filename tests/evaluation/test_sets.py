"""Evaluation sets: what is missing or damaged is named before any work."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

for module in ("torch", "scipy"):
    pytest.importorskip(module, reason=f"{module} comes with the train extra")

from iosr_fast.evaluation.readers import Content  # noqa: E402
from iosr_fast.evaluation.sets import (  # noqa: E402
    IMAGENET_SEVEN,
    PHOTO,
    _finish,
    catalog,
    describe,
    open_evaluation_set,
)
from iosr_fast.exceptions import BadImageError  # noqa: E402
from tests.evaluation.test_set_layouts import (  # noqa: E402
    aircraft,
    cars,
    coop,
    cub,
    dogs,
    dtd,
    imagenet,
    in_folder,
    plantdoc,
    put_text,
    shift,
    ucf,
)

EUROSAT = coop("eurosat", ("AnnualCrop", "Annual Crop Land", ""), ("Highway", "Highway or Road", ""))


@pytest.mark.parametrize("name", catalog())
def test_everything_missing_is_listed_with_its_url_and_place(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        open_evaluation_set(name, tmp_path)
    for layout in describe(name).layouts:
        assert layout.title in str(caught.value)
        for need in layout.needs:
            assert f"{tmp_path / need.paths[0]}  from {need.url}" in str(caught.value)
            assert need.url.startswith(("http://", "https://"))


def test_only_what_is_missing_is_listed(tmp_path: Path) -> None:
    aircraft(tmp_path)
    (tmp_path / "fgvc_aircraft/images_variant_val.txt").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        open_evaluation_set("fgvc_aircraft", tmp_path)
    assert str(caught.value).count("\n    ") == 1 and "images_variant_val.txt" in str(caught.value)


def test_missing_images_are_counted_and_named(tmp_path: Path) -> None:
    EUROSAT(tmp_path)
    for path in ("AnnualCrop/valé_0.jpg", "Highway/testé_1.jpg"):
        (tmp_path / "eurosat/2750" / path).unlink()
    expected = r"2 images of EuroSAT are missing from .*2750: AnnualCrop/valé_0.jpg, Highway/testé_1.jpg; download them"
    with pytest.raises(FileNotFoundError, match=expected):
        open_evaluation_set("eurosat", tmp_path)


def test_a_damaged_file_and_an_unknown_set_are_named(tmp_path: Path) -> None:
    EUROSAT(tmp_path)
    (tmp_path / "eurosat/split_zhou_EuroSAT.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"split_zhou_EuroSAT.json is damaged"):
        open_evaluation_set("eurosat", tmp_path)
    with pytest.raises(ValueError, match=r"expected an evaluation set of caltech101, .*, got 'cifar'"):
        open_evaluation_set("cifar", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"train": [["a.jpg", 0', "is damaged or not a split file"),
        ("[1, 2]", "is damaged or not a split file"),
        ('{"test": [["a.jpg", 0]]}', "is damaged or not a split file"),
        ('{"test": [["a.jpg", "x", "a"]]}', "is damaged or not a split file"),
        ('{"train": [["a.jpg", 0, "a"]]}', "expected a split 'test' in .*, found train"),
        ('{"test": [["a.jpg", 0, "a"], ["b.jpg", 0, "b"]]}', "gives label 0 two names, 'a' and 'b'"),
        ('{"test": [["a.jpg", 0, "a"], ["b.jpg", 2, "b"]]}', r"has 2 classes, expected labels 0 to 1, got \[0, 2\]"),
        ('{"test": [["../a.jpg", 0, "a"]]}', r"a path that leaves the folder of images: '../a.jpg'"),
        ('{"test": [["/etc/a.jpg", 0, "a"]]}', "a path that leaves the folder of images"),
    ],
)
def test_a_bad_split_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    EUROSAT(tmp_path)
    file = tmp_path / "eurosat/split_zhou_EuroSAT.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        open_evaluation_set("eurosat", tmp_path)
    assert str(file) in str(caught.value)


def test_a_split_file_without_val_has_no_val(tmp_path: Path) -> None:
    EUROSAT(tmp_path)
    file = tmp_path / "eurosat/split_zhou_EuroSAT.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**content, "val": []}), encoding="utf-8")
    assert set(open_evaluation_set("eurosat", tmp_path).splits) == {"train", "test"}


def test_coops_split_is_used_where_both_are_there(tmp_path: Path) -> None:
    class_names, rows = dtd(tmp_path)
    in_folder(tmp_path, class_names, rows)
    assert open_evaluation_set("dtd", tmp_path).layout == "official split 1, through torchvision"
    coop("dtd", ("banded", "banded", ""), ("dotted", "dotted", ""))(tmp_path)
    assert open_evaluation_set("dtd", tmp_path).layout == "CoOp's split"


def test_damaged_official_lists_are_named(tmp_path: Path) -> None:
    aircraft(tmp_path)
    put_text(tmp_path / "fgvc_aircraft/images_variant_test.txt", "1 F/A-18", "2 Spitfire")
    with pytest.raises(ValueError, match=r"images_variant_test.txt names 'Spitfire', which is not one of the 2"):
        open_evaluation_set("fgvc_aircraft", tmp_path)
    cub(tmp_path)
    put_text(tmp_path / "cub/CUB_200_2011/train_test_split.txt", "1 1", "2 0")
    with pytest.raises(ValueError, match=r"train_test_split.txt do not list the same images"):
        open_evaluation_set("cub", tmp_path)
    dogs(tmp_path)
    mat = tmp_path / "stanford_dogs/lists/test_list.mat"
    mat.write_bytes(mat.read_bytes()[:150])
    with pytest.raises(ValueError, match=r"test_list.mat is damaged"):
        open_evaluation_set("stanford_dogs", tmp_path)
    ucf(tmp_path)
    (tmp_path / "ucf101/ucfTrainTestlist/classInd.txt").write_bytes(b"1 \xff\xfe\n")
    with pytest.raises(ValueError, match=r"a text file in UTF-8 at .*classInd.txt, got another or a damaged one"):
        open_evaluation_set("ucf101", tmp_path)


def test_folders_of_imagenet_have_to_be_its_classes(tmp_path: Path) -> None:
    imagenet(tmp_path)
    (tmp_path / "imagenet/images/val/n99999999").mkdir()
    with pytest.raises(
        ValueError, match=r"folders in .*val that .*classnames.txt lists, got 1 others: \['n99999999'\]"
    ):
        open_evaluation_set("imagenet", tmp_path)
    (tmp_path / "imagenet/images/val/n99999999").rename(tmp_path / "elsewhere")
    for path in (tmp_path / "imagenet/images/train/n01443537").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"expected images in the class folder .*n01443537, found none"):
        open_evaluation_set("imagenet", tmp_path)
    (tmp_path / "imagenet/images/train/n01443537").rmdir()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 class folders are missing from .*train: \['n01443537'\]"):
        open_evaluation_set("imagenet", tmp_path)
    put_text(tmp_path / "imagenet/classnames.txt", "n01440764 tench", "n01443537")
    with pytest.raises(ValueError, match=r"at least two words in line 2 of .*classnames.txt"):
        open_evaluation_set("imagenet", tmp_path)


def test_imagenet_v2_needs_a_folder_for_each_number(tmp_path: Path) -> None:
    folder = "imagenetv2/imagenetv2-matched-frequency-format-val"
    shift(folder, ("n01440764", "n01443537"), numbered=True)(tmp_path)
    with pytest.raises(ValueError, match=r"expected folders 0 to 2 in .*format-val"):
        open_evaluation_set("imagenet_v2", tmp_path)


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    cub(tmp_path)
    image = tmp_path / "cub/CUB_200_2011/images/002.C/y.jpg"
    image.write_bytes(image.read_bytes()[:200])
    with pytest.raises(BadImageError, match=re.escape(str(image))):
        open_evaluation_set("cub", tmp_path).splits["test"].image(0)


def test_prompts() -> None:
    for name, entry in catalog().items():
        assert entry.templates == (list(IMAGENET_SEVEN) if name.startswith("imagenet") else [entry.prompt])
        assert all(template.count("{}") == 1 for template in (*entry.templates, entry.prompt))
    assert describe("imagenet").prompt == PHOTO and len(set(IMAGENET_SEVEN)) == 7
    assert describe("ucf101").prompt == "a photo of a person doing {}."


@pytest.mark.slow
def test_heavy_packages_are_imported_where_they_are_used(tmp_path: Path) -> None:
    code = (
        "import sys; from iosr_fast.evaluation import sets; from iosr_fast.training import open_images\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & "
        "{'pyarrow', 'ray', 'scipy', 'tensorboard', 'torchvision', 'webdataset'}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "make", "moved", "to"),
    [
        ("imagenet", imagenet, "imagenet/images/val", "imagenet/val"),
        ("plantdoc", plantdoc, "plantdoc/PlantDoc-Dataset/test", "plantdoc/test"),
    ],
)
def test_train_and_test_need_not_lie_side_by_side(
    tmp_path: Path, name: str, make: Callable[[Path], object], moved: str, to: str
) -> None:
    make(tmp_path)
    before = open_evaluation_set(name, tmp_path).splits
    pixels = {split: before[split].image(0).tobytes() for split in ("train", "test")}
    (tmp_path / moved).rename(tmp_path / to)
    after = open_evaluation_set(name, tmp_path).splits
    for split in ("train", "test"):
        assert after[split].labels.tolist() == before[split].labels.tolist()
        assert [Path(key).name for key in after[split].keys] == [Path(key).name for key in before[split].keys]
        assert after[split].image(0).tobytes() == pixels[split]


@pytest.mark.parametrize(
    ("name", "make", "file"),
    [
        ("stanford_dogs", dogs, "lists/test_list.mat"),
        ("stanford_cars", cars, "cars_test_annos_withlabels.mat"),
    ],
)
def test_a_damaged_mat_file_is_named(tmp_path: Path, name: str, make: object, file: str) -> None:
    expected = make(tmp_path)  # type: ignore[operator]
    if make is cars:
        in_folder(tmp_path, *expected)
    path = tmp_path / name / file
    good = path.read_bytes()
    open_evaluation_set(name, tmp_path)
    for end in (0, 60, 127, 128, 150, len(good) - 1):
        path.write_bytes(good[:end])
        with pytest.raises(ValueError, match=rf"{path.name}.*download it again"):
            open_evaluation_set(name, tmp_path)


def test_labels_that_name_no_class_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"")
    dtd = describe("dtd")
    content = Content(tmp_path, ["banded", "dotted"], {"test": [("a", 0), ("b", 2)]})
    with pytest.raises(ValueError, match=r"expected labels from 0 to 1 in the split 'test' of DTD .* got 0 to 2"):
        _finish(dtd, dtd.layouts[0], content)


def test_a_changed_image_of_the_same_size_shows_in_its_time(tmp_path: Path) -> None:
    coop("eurosat", ("AnnualCrop", "Annual Crop Land", ""), ("River", "River", ""))(tmp_path)
    before = open_evaluation_set("eurosat", tmp_path)
    file = before.splits["test"].folder / before.splits["test"].keys[0]
    os.utime(file, ns=(1, 10**18))
    after = open_evaluation_set("eurosat", tmp_path)
    assert after.fingerprint == before.fingerprint, "which is the same for copies of the set"
    assert after.splits["test"].times[0] == 10**18 != before.splits["test"].times[0]
    assert after.splits["train"].times.tolist() == before.splits["train"].times.tolist()
