"""Tables of predictions as CSV or Parquet, in groups of rows: a part of a run holds a group, a file the groups of all.

`group` gives rows the form of the file (text, or a pyarrow.Table), `save` and `load` a part, and `write` the whole file
atomically. Memory is bounded by a group; the same rows give the same bytes, in whatever groups they come.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TextIO, TypeAlias

from iosr_fast.head.labels import SEPARATOR
from iosr_fast.head.predictions import MultiLabelPrediction, Prediction
from iosr_fast.head.verdict import Rejection
from iosr_fast.sealed.files import new_file
from iosr_fast.utils.csv_text import escaped, line_writer, recovered
from iosr_fast.utils.require import require

Answered: TypeAlias = Prediction | MultiLabelPrediction
SUFFIXES = (".csv", ".parquet")
LABELS = ("label", "probability")  # the fields of a class in a file
SCORES = ("label", "class_id", "probability", "zero_shot", "cache", "adapter")  # and in a folder of parts
UNKNOWN_SCORE = "unknown_score"  # the column that tables have where unknown pictures are rejected
ACCEPTED = "accepted"  # the column that they have where there is a promise about errors
_ROW_GROUP = 65_536  # rows of a Parquet file that are in memory at once


class TableRow(NamedTuple):
    """An image's `classes`, best first, each with the values of the table's fields, or why it can't be read. Where
    pictures may have several labels, the classes are those that it has."""

    key: str
    classes: Sequence[Sequence[Any]] = ()
    unknown: Rejection | None = None
    error: str = ""
    accepted: bool | None = None


class Labelled(NamedTuple):
    """An image of a table: its label and the probability of its best class, or why it could not be read; and its
    unknown score, where unknown pictures are rejected. NaN for what is missing. `accepted` is whether nobody needs to
    look at the label, None where that was not asked for."""

    path: str
    label: str
    probability: float
    unknown_score: float
    error: str
    accepted: bool | None = None


def row_of(key: str, answer: Answered, fields: Sequence[str]) -> TableRow:
    if isinstance(answer, MultiLabelPrediction):
        return TableRow(key, answer.pairs)
    classes = [[getattr(one, name) for name in fields] for one in answer.top]
    return TableRow(key, classes, answer.unknown, accepted=answer.accepted)


def count(rows: Iterable[TableRow]) -> tuple[int, int]:
    """How many pictures are rejected, and how many labels are accepted."""
    rows = list(rows)
    rejected = sum(row.unknown is not None and row.unknown.rejected for row in rows)
    return rejected, sum(row.accepted or 0 for row in rows)


@dataclass(frozen=True)
class CsvTable:
    """Columns: path; label and probability (4 digits) of the best class, then label_2, probability_2 and so on to
    `top`; unknown_score with `unknown_label`, the label of rejected pictures, whose other columns say their most likely
    classes; accepted, true or false, with `accepted`; error, why an image can't be read.

    With `multi_label`: path; labels and probabilities of those that a picture has, each joined by SEPARATOR, the most
    likely first; error. Texts are `escaped`.
    """

    top: int = 1
    unknown_label: str | None = None
    multi_label: bool = False
    accepted: bool = False
    suffix: ClassVar[str] = ".csv"
    fields: tuple[str, ...] = LABELS

    def header(self) -> str:
        names = ["labels", "probabilities"] if self.multi_label else list(LABELS)
        if not self.multi_label:
            names += [f"{name}_{place}" for place in range(2, self.top + 1) for name in LABELS]
        names += [UNKNOWN_SCORE] * (self.unknown_label is not None) + [ACCEPTED] * self.accepted
        return self._lines([["path", *names, "error"]])

    def group(self, rows: Iterable[TableRow]) -> str:
        return self._lines(map(self._cells, rows))

    def save(self, path: Path, group: str) -> None:
        path.write_text(group, encoding="utf-8", newline="")

    def load(self, path: Path) -> str:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()

    def write(self, out: Path, groups: Iterable[str]) -> None:
        with new_file(out) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            file.write(self.header())
            file.writelines(groups)

    def _lines(self, rows: Iterable[Sequence[str]]) -> str:
        text = StringIO()
        line_writer(text).writerows(rows)
        return text.getvalue()

    def _cells(self, row: TableRow) -> list[str]:
        if row.error:
            blank = 2 * (1 if self.multi_label else self.top) + (self.unknown_label is not None) + self.accepted
            return [escaped(row.key), *[""] * blank, escaped(row.error)]
        if self.multi_label:
            labels = SEPARATOR.join(label for label, _ in row.classes)
            cells = [escaped(labels), SEPARATOR.join(f"{probability:.4f}" for _, probability in row.classes)]
        else:
            cells = [cell for label, probability in row.classes for cell in (escaped(label), f"{probability:.4f}")]
        if self.unknown_label is not None and row.unknown is not None:
            cells.append(f"{row.unknown.score:.4f}")
            if row.unknown.rejected:
                cells[0] = escaped(self.unknown_label)
        if self.accepted:
            cells.append("true" if row.accepted else "false")
        return [escaped(row.key), *cells, ""]


@dataclass(frozen=True)
class ParquetTable:
    """Columns: the `key`; each of the `fields` of the best class, texts as they are, numbers float32; top, a list of
    structs of the same fields of all classes, best first; unknown_score, float32, with `unknown_label`; accepted, bool,
    with `accepted`; error.

    An unreadable image has its error, the rest is null; other errors are null. A rejected picture has the label
    `unknown_label`, no class_id, and the scores of its most likely class, top[0].
    """

    unknown_label: str | None = None
    key: str = "path"
    fields: tuple[str, ...] = LABELS
    accepted: bool = False
    suffix: ClassVar[str] = ".parquet"

    def group(self, rows: Iterable[TableRow]) -> Any:
        pa = require("pyarrow", "parquet")
        kinds = {name: pa.string() if name in ("label", "class_id") else pa.float32() for name in self.fields}
        rows = list(rows)
        best: dict[str, list[Any]] = {name: [] for name in self.fields}
        for row in rows:
            values = dict(zip(self.fields, row.classes[0], strict=True)) if row.classes else {}
            if row.unknown is not None and row.unknown.rejected:
                values |= {"label": self.unknown_label, "class_id": None}
            for name, column in best.items():
                column.append(values.get(name))
        tops = [
            [dict(zip(self.fields, values, strict=True)) for values in row.classes] if row.classes else None
            for row in rows
        ]
        columns = {self.key: pa.array([row.key for row in rows], pa.string())}
        columns |= {name: pa.array(best[name], kind) for name, kind in kinds.items()}
        columns["top"] = pa.array(tops, pa.list_(pa.struct(list(kinds.items()))))
        if self.unknown_label is not None:
            scores = [None if row.unknown is None else row.unknown.score for row in rows]
            columns[UNKNOWN_SCORE] = pa.array(scores, pa.float32())
        if self.accepted:
            columns[ACCEPTED] = pa.array([row.accepted for row in rows], pa.bool_())
        return pa.table({**columns, "error": pa.array([row.error or None for row in rows], pa.string())})

    def save(self, path: Path, group: Any) -> None:
        require("pyarrow.parquet", "parquet").write_table(group, path, write_page_checksum=True)

    def load(self, path: Path) -> Any:
        with require("pyarrow.parquet", "parquet").ParquetFile(path, page_checksum_verification=True) as file:
            return file.read()

    def write(self, out: Path, groups: Iterable[Any]) -> None:
        pa, pq = require("pyarrow", "parquet"), require("pyarrow.parquet", "parquet")
        empty = self.group([])
        waiting = [empty]
        with new_file(out) as temporary, pq.ParquetWriter(temporary, empty.schema, write_page_checksum=True) as writer:
            for group in groups:
                waiting.append(group)
                while sum(map(len, waiting)) >= _ROW_GROUP:
                    joined = pa.concat_tables(waiting)
                    writer.write_table(joined.slice(0, _ROW_GROUP))
                    waiting = [joined.slice(_ROW_GROUP)]
            writer.write_table(pa.concat_tables(waiting))


def read_csv(file: TextIO) -> Iterator[Labelled]:
    """The rows of a CsvTable."""
    for row in csv.DictReader(file):
        path, label, error = (recovered(row.get(name) or "") for name in ("path", "label", "error"))
        probability, score = (float(row.get(name) or "nan") for name in ("probability", UNKNOWN_SCORE))
        accepted = {"true": True, "false": False}.get((row.get(ACCEPTED) or "").lower())
        yield Labelled(path, label, probability, score, error, accepted)


def read_table(out: Path) -> Iterator[Labelled]:
    """The rows of a file, numbers with the 4 digits of CSV."""
    if out.suffix == ".csv":
        with out.open(encoding="utf-8", newline="") as file:
            yield from read_csv(file)
        return
    with require("pyarrow.parquet", "parquet").ParquetFile(out) as table:
        wanted = ("path", "label", "probability", UNKNOWN_SCORE, "error", ACCEPTED)
        names = [name for name in wanted if name in table.schema_arrow.names]
        for row in (row for batch in table.iter_batches(columns=names) for row in batch.to_pylist()):
            numbers = (row.get(name) for name in ("probability", UNKNOWN_SCORE))
            probability, score = (math.nan if number is None else round(number, 4) for number in numbers)
            yield Labelled(row["path"], row["label"] or "", probability, score, row["error"] or "", row.get(ACCEPTED))
