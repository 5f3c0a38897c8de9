"""Tables of predictions: no cell is a formula, Parquet keeps names as they are, and groups of rows change no byte."""

from __future__ import annotations

import csv
import sys
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pandas as pd
import pytest

from iosr_fast.files import tables
from iosr_fast.files.tables import (
    ACCEPTED,
    PROMISE,
    SCORES,
    TREE_PROMISE,
    CsvTable,
    ParquetTable,
    TableRow,
    read_table,
    row_of,
)
from iosr_fast.head.predictions import ClassScore, Prediction
from iosr_fast.head.verdict import Rejection
from iosr_fast.utils.csv_text import recovered

FORMULAS = (
    *('=HYPERLINK("http://x","y")', "+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1", '"=1', "'=1", "\u00a0=1"),
    *("\ufeff=1", "\u200b=1", "\uff1d1", "\uff20x", "-1", "''+1"),
)
HARMLESS = ("cat", "a=b", "3-1", "'s", '"quoted"', "", "  ", "caf\u00e9", "x@y", "#1", "1e5")


def test_no_cell_is_a_formula(tmp_path: Path) -> None:
    names, table, out = (*FORMULAS, *HARMLESS), CsvTable(top=2), tmp_path / "labels.csv"
    rows = [TableRow(name, [[name, 0.5], ["plain", 0.25]]) for name in names]
    out.write_bytes(table.encode([*rows, TableRow("photos/a.jpg", error="=error")], first=True))
    with out.open(newline="", encoding="utf-8") as file:
        _, *found, bad = csv.reader(file)
    for name, cells in zip(names, found, strict=True):
        expected = f"'{name}" if name in FORMULAS else name
        assert cells == [expected, expected, "0.5000", "plain", "0.2500", ""]
        assert recovered(cells[0]) == name, "programs get every name back"
    assert bad == ["photos/a.jpg", "", "", "", "", "'=error"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_groups_of_rows_change_no_byte(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_ROW_GROUP", 5)
    table = (CsvTable if suffix == ".csv" else ParquetTable)(unknown_label="?", promise=(ACCEPTED,))
    said = [[{"label": "a", "probability": i / 31}.get(name) for name in table.fields] for i in range(23)]
    rows = [TableRow(f"{i}\u00e4\n.png", [said[i]], Rejection(float(i), i > 20), "", i > 9) for i in range(23)]
    rows[7] = TableRow("7.png", error="no picture")
    written = []
    for size in (1, 4, 23):
        groups = [rows[start : start + size] for start in range(0, len(rows), size)]
        encoded = [table.encode(group, first=group is groups[0]) for group in groups]
        (tmp_path / "groups").write_bytes(b"".join(encoded))
        table.finish(tmp_path / "groups", map(len, encoded), out := tmp_path / f"{size}{suffix}")
        assert not (tmp_path / "groups").exists()
        written.append(out.read_bytes())
    assert written[0] == written[1] == written[2]
    found = list(read_table(out))
    assert [row.path for row in found] == [row.key for row in rows] and found[7].error == "no picture"
    assert [row.label for row in found if not row.error] == ["a"] * 20 + ["?"] * 2
    assert [row.accepted for row in found] == [*[False] * 7, None, *[False] * 2, *[True] * 13]
    assert found[22].probability == round(22 / 31, 4) and found[22].unknown_score == 22


def test_columns_and_types_depend_on_the_options_alone() -> None:
    """Not on errors and rejected pictures, nor on whether there is any row."""
    score = ClassScore("cat", "~0", 0.75, 1.0, 0.0, 1.0, 0.0)
    plain = Prediction(**vars(score), top=(score,), nearest=(), version=1, accepted=True)
    node = replace(plain, label="pet", class_id=None, level=1, path=("animal",))
    rejected = replace(plain, label=None, class_id=None, unknown=Rejection(2.0, True), accepted=False)
    rows = [*(row_of("a.png", one, SCORES) for one in (plain, node, rejected)), TableRow("b.png", error="bad")]
    table = ParquetTable("?", TREE_PROMISE)
    files = [table.encode(some, first=True) for some in ([], rows, *([row] for row in rows))]
    frames = [pd.read_parquet(BytesIO(file)) for file in files]
    assert all(frame.dtypes.equals(frames[0].dtypes) for frame in frames)
    assert frames[1]["level"].tolist()[:2] == [0, 1] and frames[1]["level"].isna().sum() == 2
    assert frames[1][frames[1].accepted].label[1] == "pet"


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_picture_of_several_labels_is_one_row(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_ROW_GROUP", 2)
    scores = [ClassScore(name, f"~{k}", 0.75 - k / 4, 1.0, 0.0, 1.0, 0.0) for k, name in enumerate(("=cat", "dog"))]
    both = Prediction(**vars(scores[0]), top=(*scores,), nearest=(), version=1, accepted=(True, False))
    answers = [both, replace(both, top=(scores[1],), accepted=(True,)), replace(both, label=None, top=(), accepted=())]
    for promise in ((), PROMISE):
        table = CsvTable(1, None, True, promise) if suffix == ".csv" else ParquetTable(None, promise, True)
        given = [one if promise else replace(one, accepted=None) for one in answers]
        rows = [row_of(f"{k}.png", one, table.fields) for k, one in enumerate(given)] + [TableRow("b.png", error="bad")]
        groups = [table.encode(some, first=k == 0) for k, some in enumerate((rows[:1], rows[1:]))]
        (tmp_path / "groups").write_bytes(b"".join(groups))
        table.finish(tmp_path / "groups", map(len, groups), out := tmp_path / f"out{suffix}")
        found = [row.several for row in read_table(out)]
        first, second = (True, False) if promise else (None, None)
        assert found[0] == (("=cat", 0.75, first), ("dog", 0.5, second)) and found[2:] == [(), ()]
        assert found[1] == (("dog", 0.5, first),) and [row.error for row in read_table(out)] == ["", "", "", "bad"]
        if suffix == ".csv":
            expected = ["'=cat;dog", "0.7500;0.5000", *["true;false"] * len(promise), ""]
            assert list(csv.reader(out.open()))[1] == ["0.png", *expected]
            continue
        columns = pd.read_parquet(out)
        assert columns.columns.tolist() == ["path", "labels", "top", *promise, "error"]
        assert [one["label"] for one in columns.top[0]] == columns.labels[0].tolist() == ["=cat", "dog"]
        assert len(columns.labels[2]) == len(columns.top[2]) == 0 and columns.labels[3] is columns.top[3] is None
        assert not promise or [one if one is None else one.tolist() for one in columns.accepted] == [
            *([True, False], [True], []),
            None,
        ]


def test_parquet_keeps_names_as_they_are_and_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.parquet as pq

    table, out = ParquetTable(), tmp_path / "labels.parquet"
    out.write_bytes(table.encode([TableRow(name, [[name, "~0", 0.5, 0, 0, 0]]) for name in FORMULAS], first=True))
    assert pq.read_table(out)["label"].to_pylist() == pq.read_table(out)["path"].to_pylist() == list(FORMULAS)
    assert [row.label for row in read_table(out)] == list(FORMULAS)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'iosr_fast\[parquet\]' brings it"):
        table.encode([], first=True)
