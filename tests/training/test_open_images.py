"""Open Images: the official CSV files to a balanced subset, and its lists to train on and to download."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

from iosr_fast.cli.command import command_app
from iosr_fast.cli.open_images_subset import open_images_subset
from iosr_fast.cli.train_adapter import read_data
from iosr_fast.training.open_images import (
    balanced_subset,
    read_class_descriptions,
    write_download_list,
    write_list,
)

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
    assert "Plantain/Banana" in balanced_subset(class_csv, files, 13, 0, min_confidence=0.7).left_out
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


@pytest.mark.parametrize(("word", "split"), [("train", "train"), ("val", "validation"), ("test", "test")])
def test_the_split_is_read_off_the_official_names(class_csv: Path, tmp_path: Path, word: str, split: str) -> None:
    name = f"oidv7-{word}-annotations-human-imagelabels.csv"
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
    row = (image_id(0), FRUIT, "1")
    boxes, other, torn = (
        write_labels(tmp_path / f"{name}.csv", [row]) for name in ("train-boxes", "other", "train-torn")
    )
    boxes.write_text("ImageID,XMin\n", encoding="utf-8")
    torn.write_text(torn.read_text(encoding="utf-8") + f"{image_id(1)},verifi", encoding="utf-8")
    bad_id = write_labels(tmp_path / "train-ids.csv", [row, ("0123456789abcdeg", FRUIT, "1")])
    for path, message in (
        (boxes, r"columns .* in .*train-boxes.csv, missing: \['LabelName', 'Confidence'\]"),
        (other, "train, validation, test in the name of .*other.csv"),
        (torn, "train-torn.csv can't be read as image labels"),
        (bad_id, "16 hex digits in .*train-ids.csv, got '0123456789abcdeg'"),
    ):
        with pytest.raises(ValueError, match=message):
            balanced_subset(class_csv, [path], 1, 0)
    with pytest.raises(ValueError, match="at least one image a class"):
        balanced_subset(class_csv, label_csvs, 0, 0)


def test_the_list_is_read_for_training_and_the_download_list_by_the_official_script(
    class_csv: Path, label_csvs: list[Path], tmp_path: Path
) -> None:
    subset = balanced_subset(class_csv, label_csvs, 3, 0)
    (tmp_path / "images" / "train").mkdir(parents=True)
    found = tmp_path / "images" / "train" / f"{subset.image_ids[0]}.jpg"
    found.touch()
    write_list(subset, tmp_path / "out" / "oi.csv", tmp_path / "images")
    paths, names = read_data(tmp_path / "out" / "oi.csv")
    assert names == subset.class_names and [path.stem for path in paths] == subset.image_ids
    assert paths[0].resolve() == found and paths[1] == tmp_path / "out" / f"{subset.image_ids[1]}.jpg"
    write_download_list(subset, tmp_path / "images.txt")
    lines = (tmp_path / "images.txt").read_text(encoding="utf-8").splitlines()
    assert lines == [f"{t}/{i}" for i, t in zip(subset.image_ids, subset.types, strict=True)]


def test_the_command_line_writes_both_files(class_csv: Path, label_csvs: list[Path], tmp_path: Path) -> None:
    out, listed = tmp_path / "oi.csv", tmp_path / "list.txt"
    labels = [argument for path in label_csvs for argument in ("--labels", str(path))]
    app = command_app(open_images_subset)
    arguments = ["--classes", str(class_csv), *labels, "--out", str(out), "--download-list", str(listed)]
    run = CliRunner().invoke(app, [*arguments, "--images-a-class", "5"])
    assert run.exit_code == 0, run.output
    assert "15 images of 3 classes" in run.output and "1 classes left out" in run.output
    ids = [line.split("/")[1] for line in listed.read_text().splitlines()]
    assert read_data(out)[0] == [tmp_path / f"{image}.jpg" for image in ids]
    out.unlink()
    listed.unlink()
    for more, message in (
        (["--download-list", str(out)], "expected two files to write"),
        (["--download-list", str(tmp_path)], "expected a file to write, got the folder"),
        (["--images-a-class", "500"], "no class has 500 images"),
    ):
        refused = CliRunner().invoke(app, [*arguments, "--images-a-class", "5", *more])
        assert refused.exit_code == 2 and message in " ".join(refused.output.replace("│", " ").split())
