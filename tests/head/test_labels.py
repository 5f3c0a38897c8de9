"""Labels and class names that are refused before any image is decoded."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.labelled_images import labelled_images
from iosr_fast.head.labels import check_labels, class_ids, read_groups
from iosr_fast.head.names import check_names, mistyped
from iosr_fast.images.crop import Crop
from tests.cli.runs import refused

NAN = float("nan")


def ids_of(labels: Any, names: list[str] | None = None) -> tuple[list[str], list[int]]:
    found, ids, _, _ = check_labels([None] * len(labels), labels, names)
    return found, ids.tolist()


@pytest.mark.parametrize(
    "missing", [NAN, None, np.float32("nan"), Decimal("NaN"), complex(NAN, 0), np.datetime64("NaT"), "pandas"]
)
def test_a_missing_label_is_refused_by_position(missing: Any) -> None:
    if missing == "pandas":
        import pandas as pd

        labels = [pd.Series(["a", pd.NA, "b"], dtype="string"), pd.Series([0, None, 1], dtype="Int64"), [0, pd.NaT, 1]]
    else:
        labels = [["a", missing, "b"], np.array(["a", missing, "b"], dtype=object), np.array([0.0, NAN, 1.0])]
    for one in (*labels, np.ma.masked_array([0, 1, 1], mask=[False, True, False])):
        with pytest.raises(ValueError, match=r"expected a label for every image, got .* at position 1"):
            ids_of(one, ["a", "b", "nan", "None"])
    with pytest.raises(ValueError, match="got 'nan', which is what a missing value becomes as text"):
        ids_of(np.asarray(["a", NAN, "b"]))
    assert ids_of(["nan", "roti"], ["nan", "roti"]) == (["nan", "roti"], [0, 1])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, "1", 0], "all class names or all integers, got '1' at position 1 and 1 at position 0"),
        ([0, 1.0, 1], r"got float \(1.0\) at position 1; integers are made by"),
        (np.array([True, False, True]), r"got bool_? \(.*True.*\) at position 0"),
        (np.array([["a"], ["b"], ["a"]]), r"got labels of shape \(3, 1\)"),
        (["a", "b"], "one label for each of 3 images, got 2"),
    ],
)
def test_invalid_labels_are_refused_by_position(labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_ids([None] * 3, labels, ["a", "b"])
    with pytest.raises(ValueError, match=r"got set .* fitted with one label an image takes one"):
        class_ids([None], [{"a"}], ["a", "b"])


def test_parts_of_a_picture_and_class_are_a_group() -> None:
    array, box = np.zeros((8, 8, 3), np.uint8), (0, 0, 4, 4)
    images = ["a.jpg#xywh=0,0,4,4", Path("b.jpg"), Crop("a.jpg", box), Path("a.jpg"), Crop(array, box), array]
    assert read_groups(None, 6, images, np.zeros(6, int)).tolist() == [0, 1, 0, 0, 2, 2]
    assert read_groups(None, 6, images, [0, 0, 1, 0, 0, 1]).tolist() == [0, 1, 2, 0, 3, 4]
    assert read_groups(["v", "v", *[None] * 4], 6, images, [0] * 6).tolist() == [0, 0, 1, 1, 2, 2]
    assert read_groups(None, 2, ["a.jpg", "a.jpg"]) is None  # whole pictures are not grouped by their files


def test_groups_are_numbered_and_a_missing_one_is_its_own() -> None:
    for groups in (["b", "a", None, "b", None], np.array([7.0, 1.0, NAN, 7.0, NAN]), [(1, 2), "a", NAN, (1, 2), None]):
        assert read_groups(groups, 5).tolist() == [0, 1, 2, 0, 3]
    assert read_groups(None, 5) is None and read_groups(["a", "b", None], 3) is None  # each its own
    wrong = (
        ("ab", "each of 2 images, got 1"),
        ([1, 2, 3], "each of 2 images, got 3"),
        ([[], 1], "unhashable"),
        (5, "iterable"),
    )
    for groups, message in wrong:
        with pytest.raises(ValueError, match=message):
            read_groups(groups, 2)


def test_valid_labels_of_every_type_are_read() -> None:
    import torch

    for numbers in ([1, 0, 1], np.array([1, 0, 1], np.uint8), (np.int64(1), 0, 1), torch.tensor([1, 0, 1])):
        assert ids_of(numbers, ["a", "b"]) == (["a", "b"], [1, 0, 1])
    for names in (["b", "a", "b"], np.array(["b", "a", "b"]), np.array(["b", "a", "b"], dtype=object)):
        assert ids_of(names) == (["a", "b"], [1, 0, 1])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", " "], "got ' ', which is blank"),
        (["a", " b"], "which has blanks around it"),
        (["a", "b\x1b[31mc"], "control characters"),
        (["a", "b\u202ec"], "invisible characters or marks of direction"),
        (["a", "b" * 513], "more than 512 characters"),
        (["a", "~7"], "how ids of classes look"),
        (["a", "a"], "got 'a' more than once"),
        (["caf\u00e9", "cafe\u0301"], "look alike: .*u0301"),
        (["cat", "c\u0430t"], "look alike: 'cat' and 'c.u0430t'"),
        (["Apple", "apple", "pear"], "got 'Apple' and 'apple', which differ in case or typography alone"),
        (["H\u2082O", "h2o"], "differ in case or typography alone"),
        (["it's", "it\u2019s"], "differ in case or typography alone"),
        (["oat\u2013milk", "Oat_milk", "fig"], "differ in case or typography alone"),
        (["\u0412\u043e\u0434\u0430", "\u0432\u043e\u0434\u0430"], "differ in case or typography alone"),
        (["a", NAN], r"text, got nan \(float\) at position 1"),
        ("ab", "a list of names, in order, got str"),
        (["a"], "at least two classes"),
    ],
)
def test_invalid_class_names_are_refused(names: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_labels([], [], names)


def test_saved_classes_that_differ_in_case_alone_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    assert check_names(["Apple", "apple", "pear"], saved=True) == ["Apple", "apple", "pear"]
    assert "'Apple' and 'apple', which differ in case" in caplog.text and len(caplog.records) == 1
    assert check_names(["\U0001f468\u200d\U0001f33e farmer", "p\u00eache"])  # joined emoji are names
    assert check_names(["B", "B-", "B+", "1 mm", "1 \u00b5m", "1-mm plate"], saved=True) and len(caplog.records) == 1


def test_tables_of_labels_join_folders(tmp_path: Path) -> None:
    for name in ("lemon", "pear"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").touch()
    table = tmp_path / "more.csv"
    table.write_text("path,labels\na.png,pear; lime\nb.png,\nc.png,lime;\n")
    _, labels, names, *_ = labelled_images(tmp_path, table)
    assert labels == [{"lemon"}, {"pear"}, {"pear", "lime"}, set(), {"lime"}] and names == ["lemon", "lime", "pear"]
    table.write_text("path,labels,group\na.png,pear,\nb.png,,\na.png,lime,v1\na.png,pear,\n")
    _, labels, _, groups, _ = labelled_images(table)
    assert labels == [{"pear", "lime"}, set()] and groups == ["v1", None], "a row for each label"
    table.write_text("path,label,,\na.png,cat,,\nb.png,dog,,\n")  # as spreadsheets write
    assert labelled_images(table)[1] == ["cat", "dog"]
    table.write_text("path,label,group\na.png,cat,v1\nb.png,dog,\nc.png,cat, v1\n")
    assert labelled_images(table, tmp_path).groups == ["v1", None, "v1", None, None]
    for text, message in {
        "path,labels\na.png,\n": r"expected labels in .*more\.csv, got 1 rows without one",
        "path,label,label\na.png,cat,dog\n": r"columns of different names in .*more\.csv, got 'label' more than once",
        "path,class\na.png,cat\n": "expected the columns path and label",
        "path,label\na.png,cat\n,dog\n": "expected a path in each row of .*more.csv, got none for the label 'dog'",
        "path,label\na.png,caf\xe9\n": "can't read .*more.csv as CSV in UTF-8: .*0xe9",
        "path,label,,\na.png,cat\n0.png,Salt, fine\n": r"2 cells in line 3 of .*more.csv, got 3, .*' fine': put a text",
        "path;label\na.png;cat\n": r"commas between columns of .*more.csv, got ';': separate by commas",
        "path\tlabel\na.png\tcat\n": "separate by commas",
    }.items():
        table.write_text(text, "latin-1")
        with pytest.raises(ValueError, match=message):
            labelled_images(table)


def test_a_table_may_hold_the_labels_of_several_questions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table, folder = tmp_path / "fruit.csv", tmp_path / "pear"
    folder.mkdir()
    table.write_text(
        "path,kind,colour,labels,group\na.png,lemon,yellow,ripe;clean,v1\nb.png,pear,,ripe,\nc.png,,red,,v1\n"
    )
    paths, labels, names, groups, _ = labelled_images(table, label_column="kind")
    assert [path.name for path in paths] == ["a.png", "b.png"] and labels == names == ["lemon", "pear"]
    assert groups == ["v1", None] and caplog.messages == [f"{table}: left out 1 of 3 rows, which have no kind"]
    assert labelled_images(table, label_column="labels").labels == [{"ripe", "clean"}, {"ripe"}, set()]
    with pytest.raises(IosrFastError, match=r"path and taste in .*, got path, kind, colour, labels, group; add"):
        labelled_images(table, label_column="taste")
    for other in (folder, tmp_path / "boxes.json"):
        with pytest.raises(IosrFastError, match=f"CSV files alone with label_column='kind' .*, got {other}"):
            labelled_images(table, other, label_column="kind")


def test_mistyped_names_are_refused_before_a_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    typed = {"longsleve": "longsleeve", "longsleeves": "longsleeve", "outware": "outwear", "shrit": "shirt"}
    typed |= {"shrt": "shirt", "dres": "dress", "icecream": "ice cream"}
    meant = {"cat": "cart", "class 1": "class 2", "class A": "class B", "unripe fig": "ripe fig", "Eastern": "Western"}
    counts = dict.fromkeys([*typed, *meant], 2) | dict.fromkeys([*typed.values(), *meant.values()], 6) | {"skirt": 3}
    table, folder = tmp_path / "labels.csv", tmp_path / "in"
    files = [(name, f"{name}/{k}.png") for name, times in counts.items() for k in range(times)]
    for _, path in files:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    table.write_text("\n".join(["path,label", *(f"in/{path},{name}" for name, path in files)]))
    shown = "; ".join([f"{name!r} (2) beside {other!r} (6)" for name, other in sorted(typed.items())][:5])
    for place in (folder, table):
        fit = "fit", place, "--model", "demo", "--out", tmp_path / "out"
        assert f"{shown} and 2 more. Correct a folder or label that is mistyped, or accept" in refused(*fit)
        caplog.clear()
        assert labelled_images(place).class_names == sorted(counts) and shown in caplog.text
        assert "87 of 87 images can't be read" in refused(*fit, "--similar-names")
    assert mistyped({"a" * 513: 1, "a" * 514: 9}) == [], "too long for any class: left to check_names"


def test_a_later_place_corrects_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("support/lemon/1.png", "support/lemon/2.png", "support/pear/1.png", "new.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to("support")
    table = tmp_path / "labels.csv"
    table.write_text(f"path,label\nlink/lemon/2.png,lime\n{tmp_path}/support/pear/1.png,plum\nnew.png,pear\n")
    paths, labels, names, *_ = labelled_images(tmp_path / "support", table)
    assert labels == ["lemon", "lime", "plum", "pear"] and names == ["lemon", "lime", "pear", "plum"]
    assert paths[1] == tmp_path / "support/lemon/2.png" and "labels replace those of 2 images" in caplog.text
    table.write_text("path,label\nnew.png,pear\nnew.png,plum\n")
    for places in ([table], [tmp_path / "support", table]):
        with pytest.raises(
            ValueError,
            match=r"one label for a file of .*labels\.csv, got 'pear' and 'plum' for .*new.*call the column labels",
        ):
            labelled_images(*places)
