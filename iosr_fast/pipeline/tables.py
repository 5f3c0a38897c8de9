"""Rows of predictions as CSV or Parquet. Either is written in one go, in bounded memory, and is the same each time."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from iosr_fast.utils.files import new_file
from iosr_fast.utils.outputs import check_new_file
from iosr_fast.utils.require import require

SUFFIXES = (".csv", ".parquet")
# Spreadsheets skip blanks, quotes and invisible characters, and some read the full-width signs as well.
_FORMULA = re.compile("[\\s\"'\u200b\u2060\ufeff]*[=+\\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n]")
_GROUP = 65_536  # rows of a Parquet file that are in memory at once
# (path, its classes as [label, probability], best first, or why it could not be read)
Row = tuple[str, list[list[Any]] | str]


def check_output(out: Path) -> None:
    """Raise ValueError for a file that is neither, OSError for a place that can't be written to, ImportError for
    Parquet without pyarrow."""
    check_new_file(out, SUFFIXES)
    if out.suffix == ".parquet":
        require("pyarrow.parquet", "parquet")


def escaped(text: str) -> str:
    """`text` with an apostrophe before it where a spreadsheet would take it for a formula (OWASP, CSV injection).

    Programs get `text` back by taking one apostrophe away where what follows is such a text.
    """
    return f"'{text}" if _FORMULA.match(text) else text


def write_table(out: Path, rows: Iterable[Row], top: int) -> None:
    """Write `out` whole or not at all. Columns: path, label and probability (4 digits in CSV) of the best class, then

    .csv      label_2, probability_2 and so on to `top`; error
    .parquet  top, a list of structs of label and probability (float32), best first; error

    The error says why an image could not be read; else it is empty (null).
    """
    with new_file(out) as temporary:
        if out.suffix == ".csv":
            with temporary.open("w", encoding="utf-8", newline="") as file:
                writer = csv_writer(file, top, errors=True)
                writer.writerows(csv_cells(path, told, top, errors=True) for path, told in rows)
        else:
            _write_parquet(temporary, iter(rows))


class _LineFeeds:
    """Ends rows with a line feed. csv quotes only the line ends that it writes, and names of files may hold both."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, row: str) -> int:
        return self._file.write(row.removesuffix("\r\n") + "\n")


def csv_writer(file: TextIO, top: int, errors: bool) -> Any:
    """A csv.writer that has written the head."""
    writer = csv.writer(_LineFeeds(file), lineterminator="\r\n")
    more = [f"{name}_{place}" for place in range(2, top + 1) for name in ("label", "probability")]
    writer.writerow(["path", "label", "probability", *more, *(["error"] if errors else [])])
    return writer


def csv_cells(path: str, told: list[list[Any]] | str, top: int, errors: bool) -> list[str]:
    """One row, its texts `escaped`; `top` classes wide where it is an error, too."""
    if isinstance(told, str):
        return [escaped(path), *[""] * (2 * top), *([escaped(told)] if errors else [])]
    cells = [cell for label, probability in told for cell in (escaped(label), f"{probability:.4f}")]
    return [escaped(path), *cells, *([""] if errors else [])]


def _write_parquet(path: Path, rows: Iterator[Row]) -> None:
    pa, pq = require("pyarrow", "parquet"), require("pyarrow.parquet", "parquet")
    scored = [("label", pa.string()), ("probability", pa.float32())]
    schema = pa.schema([("path", pa.string()), *scored, ("top", pa.list_(pa.struct(scored))), ("error", pa.string())])
    with pq.ParquetWriter(path, schema, write_page_checksum=True) as writer:
        while group := list(islice(rows, _GROUP)):
            told = [None if isinstance(given, str) else given for _, given in group]
            columns = {
                "path": [name for name, _ in group],
                "label": [None if given is None else given[0][0] for given in told],
                "probability": [None if given is None else given[0][1] for given in told],
                "top": [
                    None if given is None else [{"label": label, "probability": p} for label, p in given]
                    for given in told
                ],
                "error": [given if isinstance(given, str) else None for _, given in group],
            }
            writer.write_table(pa.table(columns, schema=schema))
