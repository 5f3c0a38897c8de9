"""Tables of predictions: no cell is a formula, and Parquet keeps names as they are."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest

from iosr_fast.files.tables import Result, escaped, write_table

FORMULAS = (
    *('=HYPERLINK("http://x","y")', "+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1", '"=1', "'=1", "\u00a0=1"),
    *("\ufeff=1", "\u200b=1", "\uff1d1", "\uff20x", "-1", "''+1"),
)
HARMLESS = ("cat", "a=b", "3-1", "'s", '"quoted"', "", "  ", "caf\u00e9", "x@y", "#1", "1e5")


def test_no_cell_is_a_formula(tmp_path: Path) -> None:
    rows: list[Any] = [(name, Result([[name, 0.5], ["plain", 0.25]])) for name in (*FORMULAS, *HARMLESS)]
    rows.append(("photos/a.jpg", "=error"))
    write_table(tmp_path / "labels.csv", rows, top=2)
    with (tmp_path / "labels.csv").open(newline="", encoding="utf-8") as file:
        found = list(csv.reader(file))[1:]
    for (name, _), cells in zip(rows[:-1], found, strict=False):
        expected = f"'{name}" if name in FORMULAS else name
        assert cells == [expected, expected, "0.5000", "plain", "0.2500", ""]
    assert found[-1][-1] == "'=error"
    for name in (*FORMULAS, *HARMLESS):  # and programs get every name back
        told = escaped(name)
        assert (told[1:] if told[:1] == "'" and escaped(told[1:]) == told else told) == name


def test_parquet_keeps_names_as_they_are_and_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    rows: list[Any] = [(name, Result([[name, 0.5]])) for name in FORMULAS]
    write_table(tmp_path / "labels.parquet", rows, top=1)
    assert pq.read_table(tmp_path / "labels.parquet")["label"].to_pylist() == list(FORMULAS)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'iosr_fast\[parquet\]' brings it"):
        write_table(tmp_path / "again.parquet", rows, top=1)
