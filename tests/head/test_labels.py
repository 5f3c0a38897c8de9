"""Labels and class names that are refused before any image is decoded."""

from __future__ import annotations

import logging
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iosr_fast.head.labelled_images import labelled_images
from iosr_fast.head.labels import check_labels, class_ids
from iosr_fast.head.names import check_names

NAN = float("nan")


def ids_of(labels: Any, names: list[str] | None = None) -> tuple[list[str], list[int]]:
    found, ids, _, _ = check_labels([None] * len(labels), labels, names)
    return found, ids.tolist()


@pytest.mark.parametrize(
    "missing", [NAN, None, np.float32("nan"), Decimal("NaN"), complex(NAN, 0), np.datetime64("NaT"), "pandas"]
)
def test_a_missing_label_is_refused_by_position(missing: Any) -> None:
    if missing == "pandas":
        pd = pytest.importorskip("pandas", reason="pandas is not installed")
        labels = [pd.Series(["a", pd.NA, "b"], dtype="string"), pd.Series([0, None, 1], dtype="Int64"), [0, pd.NaT, 1]]
    else:
        labels = [made(["a", missing, "b"]) for made in (list, tuple, lambda values: np.array(values, dtype=object))]
    for one in (*labels, np.array([0.0, NAN, 1.0]), np.ma.masked_array([0, 1, 1], mask=[False, True, False])):
        with pytest.raises(ValueError, match=r"expected a label for every image, got .* at position 1"):
            ids_of(one, ["a", "b", "nan", "None"])


def test_a_missing_label_that_became_text_is_refused_unless_a_class_has_that_name() -> None:
    with pytest.raises(ValueError, match="got 'nan', which is what a missing value becomes as text"):
        ids_of(np.asarray(["a", NAN, "b"]))
    assert ids_of(["nan", "roti"], ["nan", "roti"]) == (["nan", "roti"], [0, 1])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, "1", 0], "all class names or all integers, got '1' at position 1 and 1 at position 0"),
        ([0, 1.0, 1], r"got float \(1.0\) at position 1; integers are made by"),
        (np.array([True, False, True]), r"got bool_? \(.*True.*\) at position 0"),
        ([b"a", b"b", b"a"], r"got bytes \(b'a'\) at position 0; decode it"),
        ([Path("a"), "b", "a"], "got Posix?.*Path"),
        (np.array([["a"], ["b"], ["a"]]), r"got labels of shape \(3, 1\)"),
        ("abc", r"got labels of shape \(\)"),
        (["a", "b"], "one label for each of 3 images, got 2"),
    ],
)
def test_invalid_labels_are_refused_by_position(labels: Any, message: str) -> None:
    for names in (None, ["a", "b"]):
        with pytest.raises(ValueError, match=message):
            check_labels([None] * 3, labels, names)
    with pytest.raises(ValueError, match=message):
        class_ids([None] * 3, labels, ["a", "b"])
    with pytest.raises(ValueError, match=r"got set .* fitted with one label an image takes one"):
        class_ids([None], [{"a"}], ["a", "b"])


def test_valid_labels_of_every_type_are_read() -> None:
    torch = pytest.importorskip("torch")
    for numbers in ([1, 0, 1], np.array([1, 0, 1], np.uint8), (np.int64(1), 0, 1), torch.tensor([1, 0, 1])):
        assert ids_of(numbers, ["a", "b"]) == (["a", "b"], [1, 0, 1])
    for names in (["b", "a", "b"], np.array(["b", "a", "b"]), np.array(["b", "a", "b"], dtype=object)):
        assert ids_of(names) == (["a", "b"], [1, 0, 1])
    assert ids_of([], ["a", "b"]) == (["a", "b"], [])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", " "], "got ' ', which is blank"),
        (["a", " b"], "which has blanks around it"),
        (["a", "b\x1b[31mc"], "control characters"),
        (["a", "caf\udce9"], "no valid Unicode"),
        (["a", "b\u202ec"], "invisible characters or marks of direction"),
        (["a", "b" * 513], "more than 512 characters"),
        (["a", "~7"], "how ids of classes look"),
        (["a", "a"], "got 'a' more than once"),
        (["caf\u00e9", "cafe\u0301"], "look alike: .*u0301"),
        (["hot dog", "hot\u00a0dog"], "look alike"),
        (["cat", "c\u200dat"], "look alike"),
        (["cat", "c\u0430t"], "look alike: 'cat' and 'c.u0430t'"),
        (["a", NAN], r"text, got nan \(float\) at position 1"),
        ("ab", "a list of names, in order, got str"),
        ({"a", "b"}, "in order, got set"),
        (["a"], "at least two classes"),
    ],
)
def test_invalid_class_names_are_refused(names: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_names(names)
    with pytest.raises(ValueError, match=message):
        check_labels([], [], names)


def test_classes_that_differ_in_case_alone_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "iosr_fast.head.names"):
        assert check_names(["Apple", "apple", "pear"]) == ["Apple", "apple", "pear"]
        assert check_names(["\ufb01g", "fig"]) == ["\ufb01g", "fig"]
    assert "'Apple' and 'apple' differ in case" in caplog.text and len(caplog.records) == 2
    with caplog.at_level(logging.WARNING, "iosr_fast.head.names"):
        check_names(["c\u0430t", "dog", "\u03b2-carotene", "\u0441\u043e\u043c"])
    assert "mixes scripts in the word 'c\\u0430t'" in caplog.text and len(caplog.records) == 3
    assert check_names(["\U0001f468\u200d\U0001f33e farmer", "p\u00eache"])  # joined emoji are names


@pytest.mark.parametrize("header", ["path,label,label", "path,path,label", "path,label,note,note"])
def test_a_table_with_two_columns_of_one_name_is_refused(header: str, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text(f"{header}\na.png,cat,dog\n")
    with pytest.raises(ValueError, match=r"columns of different names in .*labels\.csv, got '\w+' more than once"):
        labelled_images(tmp_path / "labels.csv")
    (tmp_path / "labels.csv").write_text("path,label,,\na.png,cat,,\nb.png,dog,,\n")  # as spreadsheets write
    assert labelled_images(tmp_path / "labels.csv")[1] == ["cat", "dog"]
