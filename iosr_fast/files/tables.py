"""Tables of predictions as CSV or Parquet, in groups of rows: a part of a folder is a group, a file is made of groups.

`encode` gives the bytes of a group. Those of a file are appended to one another, and `finish` makes the file of them.
Memory is bounded by a group; the same rows give the same bytes, in whatever groups they come.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TextIO

from iosr_fast.head.labels import SEPARATOR
from iosr_fast.head.predictions import Prediction
from iosr_fast.head.verdict import Rejection
from iosr_fast.sealed.files import new_file, sync_file, sync_folder
from iosr_fast.utils.csv_text import escaped, line_writer, recovered
from iosr_fast.utils.require import require

SUFFIXES = (".csv", ".parquet")
LABELS = ("label", "probability")  # the fields of a class in CSV
SCORES = ("label", "class_id", "probability", "zero_shot", "cache", "adapter")  # and in Parquet
UNKNOWN_SCORE = "unknown_score"  # the column that tables have where unknown pictures are rejected
ACCEPTED = "accepted"
PROMISE = (ACCEPTED,)  # the columns that they have where there is a promise about errors
TREE_PROMISE = (ACCEPTED, "level", "label_path")  # and by a classifier with a tree
_ACCEPTED = {"true": True, "false": False, True: True, False: False}  # in CSV and in Parquet
# The types in pandas that may be null: its bool and int32 would become object and float64 with the first null.
_NULLABLE = [
    {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": nullable, "metadata": None}
    for name, kind, nullable in ((ACCEPTED, "bool", "boolean"), ("level", "int32", "Int32"))
]
_PANDAS = {"pandas": json.dumps({"columns": _NULLABLE, "index_columns": [], "column_indexes": []})}
_ROW_GROUP = 65_536  # rows of a Parquet file that are in memory at once


class TableRow(NamedTuple):
    """An image's `classes`, best first, each with the values of the table's fields, or why it can't be read. Where
    pictures may have several labels, the classes are those that it has, and `accepted` is of each. `node` has the
    columns of the best class that a node of a tree changes, and those of its own."""

    key: str
    classes: Sequence[Sequence[Any]] = ()
    unknown: Rejection | None = None
    error: str = ""
    accepted: bool | tuple[bool, ...] | None = None
    node: Mapping[str, Any] | None = None

    def values(self, unknown_label: str | None) -> dict[str, Any]:
        """Those of the columns that are not of classes, and of those that a rejected picture changes."""
        values: dict[str, Any] = {"path": self.key, ACCEPTED: self.accepted, "error": self.error or None}
        values |= self.node or {}
        if self.unknown is not None:
            values[UNKNOWN_SCORE] = self.unknown.score
            if self.unknown.rejected:
                values |= {"label": unknown_label, "class_id": None}
        return values


class Answer(NamedTuple):
    """A label of an image, its probability, and whether it is accepted: None where that was not asked for."""

    label: str
    probability: float
    accepted: bool | None = None


class Labelled(NamedTuple):
    """An image of a table: its label and the probability of its best class, or why it could not be read; and its
    unknown score, where unknown pictures are rejected. NaN for what is missing. `accepted` is whether nobody needs to
    look at the label, None where that was not asked for. Where pictures may have several labels, `several` has all, and
    `label` is the first, "" of none."""

    path: str
    label: str
    probability: float
    unknown_score: float
    error: str
    accepted: bool | None = None
    several: tuple[Answer, ...] | None = None

    @property
    def answers(self) -> tuple[Answer, ...]:
        """Its labels: one, or where there may be several any number."""
        return (Answer(self.label, self.probability, self.accepted),) if self.several is None else self.several


def row_of(key: str, answer: Prediction, fields: Sequence[str]) -> TableRow:
    classes = [[getattr(one, name) for name in fields] for one in answer.top]
    node: dict[str, Any] | None = None
    if answer.label is not None:
        node = {"label": answer.label, "class_id": answer.class_id, "probability": answer.probability}
        node |= {"level": answer.level, "label_path": " > ".join((*answer.path, answer.label))}
    return TableRow(key, classes, answer.unknown, accepted=answer.accepted, node=node)


@dataclass(frozen=True)
class CsvTable:
    """Columns: path; label and probability (4 digits) of the best class, then label_2, probability_2 and so on to
    `top`; unknown_score with `unknown_label`, the label of rejected pictures, whose other columns say their most likely
    classes; the columns `promise`; error, why an image can't be read.

    Those of a promise are accepted, true or false, and with a tree level, 0 of a class, 1 of the deepest nodes,
    and label_path, the names from the root down to the label, joined by " > "; both are blank of rejected pictures.
    Label and probability are those of an accepted node, and label_2 stays the second class.

    With `multi_label`: path; labels and probabilities of those that a picture has, and with a promise whether each is
    accepted, joined by SEPARATOR, the most likely first; error. Texts are `escaped`.
    """

    top: int = 1
    unknown_label: str | None = None
    multi_label: bool = False
    promise: tuple[str, ...] = ()
    suffix: ClassVar[str] = ".csv"
    fields: ClassVar[tuple[str, ...]] = LABELS

    def encode(self, rows: Iterable[TableRow], first: bool) -> bytes:
        """Lines of text in UTF-8; the `first` group begins with the names of the columns."""
        of_classes = [f"{name}_{place}" if place > 1 else name for place in range(1, self.top + 1) for name in LABELS]
        if self.multi_label:
            of_classes = ["labels", "probabilities"]
        names = ["path", *of_classes, *[UNKNOWN_SCORE] * (self.unknown_label is not None), *self.promise]
        writer = line_writer(text := StringIO())
        if first:
            writer.writerow([*names, "error"])
        for row in rows:
            classes: Iterable[Any] = chain.from_iterable(row.classes)
            if self.multi_label:
                labels, probabilities = zip(*row.classes, strict=True) if row.classes else ((), ())
                classes = SEPARATOR.join(labels), probabilities
            values = dict(zip(of_classes, classes, strict=False)) | row.values(self.unknown_label)
            writer.writerow([_text(values.get(name)) for name in (*names, "error")])
        return text.getvalue().encode()

    def finish(self, groups: Path, sizes: Iterable[int], out: Path) -> None:
        """The file is what the groups are, one after another: it gets its name."""
        sync_file(groups)
        os.replace(groups, out)
        sync_folder(out.parent)


@dataclass(frozen=True)
class ParquetTable:
    """Columns: path; each of SCORES of the best class, texts as they are, numbers float32; top, a list of structs of
    the same fields of all classes, best first; unknown_score, float32, with `unknown_label`; the columns
    `promise`, as of CsvTable: accepted, bool, level, int32, and label_path; error.

    An accepted node above classes has no class_id; zero_shot, cache and adapter stay those of the most likely class,
    top[0]. An unreadable image has its error, the rest is null; other errors are null. A rejected picture has the label
    `unknown_label`, no class_id, and the scores of its most likely class. Columns and types depend on the options
    alone, in pandas too, whatever is null.

    With `multi_label`: path; labels, a list of texts; top, as above, of these labels; accepted, with a promise, a list
    of bool; error. A picture without a label has empty lists, not null.
    """

    unknown_label: str | None = None
    promise: tuple[str, ...] = ()
    multi_label: bool = False
    suffix: ClassVar[str] = ".parquet"
    fields: ClassVar[tuple[str, ...]] = SCORES

    def encode(self, rows: Sequence[TableRow], first: bool) -> bytes:
        """A Parquet file of one row group."""
        sink = require("pyarrow", "parquet").BufferOutputStream()
        require("pyarrow.parquet", "parquet").write_table(self._arrow(rows), sink, write_page_checksum=True)
        return bytes(sink.getvalue())

    def finish(self, groups: Path, sizes: Iterable[int], out: Path) -> None:
        """The file of all groups, in row groups of their own size."""
        pa, pq = require("pyarrow", "parquet"), require("pyarrow.parquet", "parquet")
        waiting = [self._arrow([])]
        with (
            groups.open("rb") as file,
            new_file(out) as temporary,
            pq.ParquetWriter(temporary, waiting[0].schema, write_page_checksum=True) as writer,
        ):
            for size in sizes:
                group = pq.ParquetFile(pa.BufferReader(file.read(size)), page_checksum_verification=True)
                waiting.append(group.read())
                while sum(map(len, waiting)) >= _ROW_GROUP:
                    joined = pa.concat_tables(waiting)
                    writer.write_table(joined.slice(0, _ROW_GROUP))
                    waiting = [joined.slice(_ROW_GROUP)]
            writer.write_table(pa.concat_tables(waiting))
        groups.unlink()

    def _arrow(self, rows: Sequence[TableRow]) -> Any:
        pa = require("pyarrow", "parquet")
        kinds = [(name, pa.string() if name in ("label", "class_id") else pa.float32()) for name in self.fields]
        best = [("labels", pa.list_(pa.string()))] if self.multi_label else kinds
        columns = [("path", pa.string()), *best, ("top", pa.list_(pa.struct(kinds)))]
        columns += [(UNKNOWN_SCORE, pa.float32())] * (self.unknown_label is not None)
        types = {ACCEPTED: pa.list_(pa.bool_()) if self.multi_label else pa.bool_(), "level": pa.int32()}
        columns += [(name, types.get(name, pa.string())) for name in self.promise]
        metadata = _PANDAS if self.promise and not self.multi_label else None
        schema = pa.schema([*columns, ("error", pa.string())], metadata)
        return pa.Table.from_pylist([*map(self._record, rows)], schema=schema)

    def _record(self, row: TableRow) -> dict[str, Any]:
        """The values of the columns; those that are left out are null."""
        top = [dict(zip(self.fields, values, strict=True)) for values in row.classes]
        if self.multi_label:
            lists = {} if row.error else {"labels": [one["label"] for one in top], "top": top}
            return lists | row.values(self.unknown_label)
        return {**(top[0] if top else {}), "top": top or None, **row.values(self.unknown_label)}


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return SEPARATOR.join(map(_text, value))
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:.4f}" if isinstance(value, float) else escaped("" if value is None else str(value))


def read_table(source: Path | TextIO) -> Iterator[Labelled]:
    """The rows of a file, or of CSV text; numbers with the 4 digits of CSV."""
    for row in _read(source):
        path, label, error = (row.get(name) or "" for name in ("path", "label", "error"))
        if "labels" in row:
            several = _answers(row)
            yield Labelled(path, *(several or [Answer("", math.nan)])[0][:2], math.nan, error, None, several)
            continue
        probability, score = map(_number, (row.get(name) for name in ("probability", UNKNOWN_SCORE)))
        yield Labelled(path, label, probability, score, error, _ACCEPTED.get(row.get(ACCEPTED)))


def _number(value: Any) -> float:
    return math.nan if value in (None, "") else round(float(value), 4)


def _answers(row: Mapping[str, Any]) -> tuple[Answer, ...]:
    """The labels of a row that may have several."""
    if "top" in row:
        labels, shares = row["labels"] or (), [one["probability"] for one in row["top"] or ()]
        accepted = row.get(ACCEPTED) or ()
    else:
        texts = (row.get(name) or "" for name in ("labels", "probabilities", ACCEPTED))
        labels, shares, accepted = (text.split(SEPARATOR) if text else [] for text in texts)
    of_each = map(_ACCEPTED.get, accepted or [None] * len(labels))
    return tuple(map(Answer, labels, map(_number, shares), of_each))


def _read(source: Path | TextIO) -> Iterator[dict[str, Any]]:
    if not isinstance(source, Path):
        for row in csv.DictReader(source):
            yield {name: recovered(text or "") for name, text in row.items()}
    elif source.suffix == ".csv":
        with source.open(encoding="utf-8", newline="") as file:
            yield from _read(file)
    else:
        with require("pyarrow.parquet", "parquet").ParquetFile(source) as table:
            for batch in table.iter_batches():
                several = "labels" in batch.schema.names
                yield from (batch if several else batch.drop_columns(["top"])).to_pylist()
