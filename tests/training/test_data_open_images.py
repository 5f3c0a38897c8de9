"""Open Images: the official CSV files to a balanced subset, its own CSV, and the pictures it names."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

torch = pytest.importorskip("torch", reason="torch comes with the cpu extra")
pytest.importorskip("pyarrow", reason="pyarrow comes with the train extra")

from iosr_fast.cli.open_images_subset import open_images_subset  # noqa: E402
from iosr_fast.exceptions import BadImageError  # noqa: E402
from iosr_fast.images.geometry import Geometry  # noqa: E402
from iosr_fast.training.data.open_images import (  # noqa: E402
    OpenImagesPictures,
    balanced_subset,
    read_class_descriptions,
    read_subset_csv,
    write_download_list,
    write_subset_csv,
)
from iosr_fast.utils.command import command_app  # noqa: E402

CLASSES = {"/m/011k07": "Tortoise", "/m/0c9ph5": "Blåbär, fresh", "/m/02xwb": "Fruit", "/m/05z87": "Plantain/Banana"}
RARE, COMMON, FRUIT, BANANA = "/m/011k07", "/m/0c9ph5", "/m/02xwb", "/m/05z87"


def image_id(number: int) -> str:
    return f"{number * 0x9E3779B97F4A7C15 % (1 << 64):016x}"


def write_labels(path: Path, rows: list[tuple[str, str, str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ImageID", "Source", "LabelName", "Confidence"])
        writer.writerows((image, "verification", label, confidence) for image, label, confidence in rows)
    return path


@pytest.fixture
def class_csv(tmp_path: Path) -> Path:
    path = tmp_path / "oidv7-class-descriptions.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("LabelName", "DisplayName"), *CLASSES.items()])
    return path


@pytest.fixture
def label_csvs(tmp_path: Path) -> list[Path]:
    """Tortoises are the first 5 images, all fruit too; 40 of fruit; 30 of berries, 20 of them fruit; 3 bananas."""
    train = [(image_id(i), FRUIT, "1") for i in range(40)]
    train += [(image_id(i), RARE, "1.0") for i in range(5)]
    train += [(image_id(i), COMMON, "1") for i in range(20, 50)]
    train += [(image_id(i), BANANA, "0") for i in range(50, 60)]  # verified to be none
    train += [(image_id(i), "/m/unlisted", "1") for i in range(60)]
    validation = [(image_id(i), BANANA, "1") for i in range(100, 103)] + [(image_id(100), BANANA, "1")]
    return [
        write_labels(tmp_path / "oidv6-train-annotations-human-imagelabels.csv", train),
        write_labels(tmp_path / "validation-annotations-human-imagelabels.csv", validation),
    ]


def test_the_subset_is_balanced_and_no_image_is_in_two_classes(class_csv: Path, label_csvs: list[Path]) -> None:
    subset = balanced_subset(class_csv, label_csvs, 5, seed=0)
    counts = {name: subset.class_names.count(name) for name in set(subset.class_names)}
    assert counts == {"Tortoise": 5, "Blåbär, fresh": 5, "Fruit": 5}
    assert subset.left_out == {"Plantain/Banana": 3}
    assert len(set(subset.image_ids)) == 15
    labels = {(row[0], CLASSES.get(row[2])) for path in label_csvs for row in csv.reader(path.open(encoding="utf-8"))}
    assert set(zip(subset.image_ids, subset.class_names, strict=True)) <= labels
    # All tortoises are fruit: had fruit chosen first, there would be too few.
    assert {i for i, name in zip(subset.image_ids, subset.class_names, strict=True) if name == "Tortoise"} == {
        image_id(i) for i in range(5)
    }
    three = balanced_subset(class_csv, label_csvs, 3, seed=0)
    assert three.left_out == {} and three.types.count("validation") == 3 and three.types.count("train") == 9


def test_the_subset_is_a_function_of_the_seed(class_csv: Path, label_csvs: list[Path], tmp_path: Path) -> None:
    first = balanced_subset(class_csv, label_csvs, 3, seed=7)
    assert balanced_subset(class_csv, label_csvs, 3, seed=7) == first
    assert balanced_subset(class_csv, label_csvs, 3, seed=8).image_ids != first.image_ids
    rows = [tuple(row) for row in csv.reader(label_csvs[0].open(encoding="utf-8"))][1:]
    random.Random(0).shuffle(rows)
    shuffled = write_labels(tmp_path / "train-shuffled.csv", [(row[0], row[2], row[3]) for row in rows])
    assert balanced_subset(class_csv, [label_csvs[1], shuffled], 3, seed=7) == first


def test_confidence_and_the_folder_decide_which_images_count(
    class_csv: Path, label_csvs: list[Path], tmp_path: Path
) -> None:
    unsure = write_labels(tmp_path / "train-machine.csv", [(image_id(i), BANANA, "0.6") for i in range(50, 60)])
    files = [*label_csvs, unsure]
    assert balanced_subset(class_csv, files, 13, 0, min_confidence=0.6).left_out == {"Tortoise": 5}
    assert balanced_subset(class_csv, files, 13, 0, min_confidence=0.7).left_out == {
        "Plantain/Banana": 3,
        "Tortoise": 5,
    }
    for wrong in (0.0, 1.5):  # 0: what people verified not to be there
        with pytest.raises(ValueError, match=f"min_confidence above 0 and up to 1, got {wrong}"):
            balanced_subset(class_csv, files, 13, 0, min_confidence=wrong)
    (tmp_path / "images" / "train").mkdir(parents=True)
    for i in range(8, 40):
        (tmp_path / "images" / ("train" if i % 2 else "") / f"{image_id(i)}.jpg").touch()
    (tmp_path / "images" / "café.jpg").touch()
    subset = balanced_subset(class_csv, label_csvs, 4, 0, images=tmp_path / "images")
    assert set(subset.image_ids) <= {image_id(i) for i in range(8, 40)} and len(subset.image_ids) == 8
    assert subset.left_out == {"Plantain/Banana": 0, "Tortoise": 0}


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("oidv7-train-annotations-human-imagelabels.csv", "train"),
        ("oidv7-val-annotations-human-imagelabels.csv", "validation"),
        ("oidv7-test-annotations-human-imagelabels.csv", "test"),
        ("validation-annotations-human-imagelabels-boxable.csv", "validation"),
        ("train_latest.csv", "train"),
    ],
)
def test_the_split_is_read_off_the_official_names(class_csv: Path, tmp_path: Path, name: str, split: str) -> None:
    path = write_labels(tmp_path / name, [(image_id(0), FRUIT, "1")])
    assert balanced_subset(class_csv, [path], 1, 0).types == [split]


def test_classes_without_a_header_and_of_the_same_name(tmp_path: Path, label_csvs: list[Path]) -> None:
    path = tmp_path / "class-descriptions-boxable.csv"
    path.write_text(f'{RARE},Food\n{FRUIT},"Food"\n{COMMON},"Blåbär, fresh"\n', encoding="utf-8")
    assert read_class_descriptions(path)[COMMON] == "Blåbär, fresh"
    subset = balanced_subset(path, label_csvs, 20, 0)
    assert {name: subset.class_names.count(name) for name in set(subset.class_names)} == {
        "Food": 20,
        "Blåbär, fresh": 20,
    }
    path.write_text(f"{RARE},Food\n{FRUIT}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"LabelName,DisplayName in line 2 of .*boxable.csv"):
        read_class_descriptions(path)


def test_files_of_another_format_are_named(class_csv: Path, label_csvs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.csv"):
        balanced_subset(class_csv, [tmp_path / "absent.csv"], 3, 0)
    boxes = tmp_path / "train-boxes.csv"
    boxes.write_text("ImageID,XMin\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"columns .* in .*train-boxes.csv, missing: \['LabelName', 'Confidence'\]"):
        balanced_subset(class_csv, [boxes], 3, 0)
    with pytest.raises(ValueError, match=r"train, validation, test in the name of .*other.csv"):
        balanced_subset(class_csv, [write_labels(tmp_path / "other.csv", [])], 3, 0)
    torn = write_labels(tmp_path / "train-torn.csv", [(image_id(0), FRUIT, "1")])
    torn.write_text(torn.read_text(encoding="utf-8") + f"{image_id(1)},verifi", encoding="utf-8")
    with pytest.raises(ValueError, match=r"train-torn.csv can't be read as image labels"):
        balanced_subset(class_csv, [torn], 3, 0)
    for wrong in ("abc", "0123456789abcdef0", "0123456789abcdeg"):
        path = write_labels(tmp_path / "train-ids.csv", [(image_id(0), FRUIT, "1"), (wrong, FRUIT, "1")])
        with pytest.raises(ValueError, match=rf"16 hex digits in .*train-ids.csv, got '{wrong}'"):
            balanced_subset(class_csv, [path], 3, 0)
    with pytest.raises(ValueError, match="at least one image a class"):
        balanced_subset(class_csv, label_csvs, 0, 0)


def test_csv_and_download_list_are_what_others_read(class_csv: Path, label_csvs: list[Path], tmp_path: Path) -> None:
    subset = balanced_subset(class_csv, label_csvs, 3, 0)
    write_subset_csv(subset, tmp_path / "out" / "oi.csv")
    assert read_subset_csv(tmp_path / "out" / "oi.csv") == subset
    with (tmp_path / "out" / "oi.csv").open(encoding="utf-8") as file:
        assert next(csv.reader(file)) == ["ImageID", "DisplayName", "type"]
    write_download_list(subset, tmp_path / "images.txt")
    lines = (tmp_path / "images.txt").read_text(encoding="utf-8").splitlines()
    assert lines == [f"{t}/{i}" for i, t in zip(subset.image_ids, subset.types, strict=True)]
    with pytest.raises(RuntimeError):
        write_subset_csv(Failing(), tmp_path / "out" / "oi.csv")  # type: ignore[arg-type]
    assert read_subset_csv(tmp_path / "out" / "oi.csv") == subset
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["oi.csv"]


class Failing:
    image_ids = ("a",)
    class_names = ("b",)

    @property
    def types(self) -> list[str]:
        raise RuntimeError


@pytest.fixture
def paper_csv(tmp_path: Path) -> Path:
    """The paper's format: more columns than we read, classes in any order."""
    path = tmp_path / "oi_data.csv"
    path.write_text(
        ",ImageID,LabelName,DisplayName,type\n"
        "0,aa,/m/1,Zèbre,train\n1,bb,/m/2,Ax/Saw,train\n2,cc,/m/1,Zèbre,validation\n3,dd,/m/2,Ax/Saw,test\n",
        encoding="utf-8",
    )
    for split, name in (("", "aa"), ("train", "bb"), ("validation", "cc"), ("test", "dd")):
        (tmp_path / "images" / split).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (ord(name[0]), 0, 0)).save(tmp_path / "images" / split / f"{name}.jpg", quality=100)
    return path


@pytest.mark.parametrize("workers", [0, 1])
def test_pictures_of_the_papers_csv(paper_csv: Path, tmp_path: Path, workers: int) -> None:
    source = OpenImagesPictures(paper_csv, tmp_path / "images", Geometry(8), workers)
    assert source.class_names == ["Zèbre", "Ax/Saw"] and source.labels.tolist() == [0, 1, 0, 1]
    assert source.missing == []
    ((rows, pixels),) = source.iterate(torch.tensor([3, 0]), 5)
    assert rows.tolist() == [3, 0]
    assert (pixels[:, 0, 4, 4].int() - torch.tensor([ord("d"), ord("a")])).abs().max() <= 2
    fingerprint, moved = source.fingerprint, tmp_path / "elsewhere"
    (tmp_path / "images").rename(moved)
    assert OpenImagesPictures(paper_csv, moved, Geometry(8)).fingerprint == fingerprint


def test_missing_images_are_counted_and_named_or_left_out(paper_csv: Path, tmp_path: Path) -> None:
    (tmp_path / "images" / "train" / "bb.jpg").unlink()
    (tmp_path / "images" / "test" / "dd.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of 4 images of .*oi_data.csv are missing from .*images \(bb, dd\)"):
        OpenImagesPictures(paper_csv, tmp_path / "images", Geometry(8))
    source = OpenImagesPictures(paper_csv, tmp_path / "images", Geometry(8), leave_out_missing=True)
    assert source.missing == ["bb", "dd"] and source.labels.tolist() == [0, 0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="4 of 4 images"):
        OpenImagesPictures(paper_csv, tmp_path / "empty", Geometry(8), leave_out_missing=True)


def test_an_unreadable_image_and_a_bad_csv_are_named(paper_csv: Path, tmp_path: Path) -> None:
    bad = tmp_path / "images" / "train" / "bb.jpg"
    bad.write_bytes(bad.read_bytes()[:100])
    source = OpenImagesPictures(paper_csv, tmp_path / "images", Geometry(8), workers=1)
    with pytest.raises(BadImageError, match=str(bad)):
        list(source.iterate(torch.arange(4), 2))
    for text, message in (
        ("ImageID,DisplayName\naa,x\n", r"columns ImageID, DisplayName, type in .*, missing: type"),
        ("ImageID,DisplayName,type\naa,x,train\n,y,train\n", "an ImageID and a DisplayName in line 3"),
        ("ImageID,DisplayName,type\n", "found none below its header"),
    ):
        paper_csv.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            OpenImagesPictures(paper_csv, tmp_path / "images", Geometry(8))


def test_the_command_line_writes_both_files(class_csv: Path, label_csvs: list[Path], tmp_path: Path) -> None:
    out, listed = tmp_path / "oi.csv", tmp_path / "list.txt"
    labels = [argument for path in label_csvs for argument in ("--labels", str(path))]
    app = command_app(open_images_subset)
    arguments = ["--classes", str(class_csv), *labels, "--out", str(out), "--download-list", str(listed)]
    run = CliRunner().invoke(app, [*arguments, "--images-a-class", "5"])
    assert run.exit_code == 0, run.output
    assert "15 images of 3 classes" in run.output and "1 classes left out" in run.output
    assert read_subset_csv(out).image_ids == [line.split("/")[1] for line in listed.read_text().splitlines()]
    written = out.read_bytes()
    folder = CliRunner().invoke(app, [*arguments, "--images-a-class", "5", "--download-list", str(tmp_path)])
    assert folder.exit_code == 2 and "expected a file to write, got the folder" in " ".join(folder.output.split())
    for more, message in (
        (["--download-list", str(out)], "expected two files to write"),
        (["--out", str(out / "deeper" / "oi.csv")], "expected a folder to write"),
    ):
        refused = CliRunner().invoke(app, [*arguments, "--images-a-class", "5", *more, "--labels", "absent.csv"])
        assert refused.exit_code == 2 and message in " ".join(refused.output.replace("│", " ").split())
    too_many = CliRunner().invoke(app, [*arguments, "--images-a-class", "500"])
    assert too_many.exit_code == 2 and "no class has 500 images" in too_many.output and out.read_bytes() == written
