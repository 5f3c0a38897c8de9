"""Tables of predictions as CSV or Parquet, written in bounded memory; the same rows give the same bytes."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from iosr_fast.head.labels import SEPARATOR
from iosr_fast.utils.csv_text import escaped, line_writer, recovered
from iosr_fast.utils.files import new_file
from iosr_fast.utils.outputs import check_new_file
from iosr_fast.utils.require import require

SUFFIXES = (".csv", ".parquet")
_ROW_GROUP = 65_536  # rows of a Parquet file that are in memory at once
_FACTS = b"iosr_fast"  # entry of a Parquet schema's metadata
SEVERAL = 0  # in place of the number of classes: those that a picture has, where it may have several labels
UNKNOWN_SCORE = "unknown_score"  # the column that tables have where unknown pictures are rejected


class Result(NamedTuple):
    """An image's classes as [label, probability], best first; and its unknown score and whether that rejects it, where
    unknown pictures are rejected. Where pictures may have several labels, the classes are those that it has."""

    classes: list[list[Any]]
    unknown_score: float | None = None
    rejected: bool = False


Row = tuple[str, Result | str]  # (path, its result, or why it could not be read)


class Labelled(NamedTuple):
    """An image of a table: its label and the probability of its best class, or why it could not be read; and its
    unknown score, where unknown pictures are rejected. NaN for what is missing."""

    path: str
    label: str
    probability: float
    unknown_score: float
    error: str


def check_output(out: Path) -> None:
    """Raise ValueError for another suffix, OSError for a path that can't be written, ImportError without pyarrow."""
    check_new_file(out, SUFFIXES)
    if out.suffix == ".parquet":
        require("pyarrow.parquet", "parquet")


def write_table(out: Path, rows: Iterable[Row], top: int, unknown_label: str | None = None) -> None:
    """Write `out` atomically. Columns: path, label and probability (4 digits in CSV) of the best class, then

    .csv      label_2, probability_2 and so on to `top`; error
    .parquet  top, a list of structs of label and probability (float32), best first; error

    The error is the reason why an image could not be read; for other images it is empty (null). With `unknown_label`,
    the label of rejected pictures, a column unknown_score is before the error; the other columns say the most likely
    classes of a rejected picture as of any other.

    With `top` = SEVERAL (.csv alone): path, labels and probabilities of the labels that the picture has, each joined by
    SEPARATOR, most likely first; error.
    """
    with new_file(out) as temporary:
        if out.suffix == ".csv":
            with temporary.open("w", encoding="utf-8", newline="") as file:
                writer = csv_writer(file, top, unknown_label)
                writer.writerows(csv_cells(path, result, top, unknown_label) for path, result in rows)
        else:
            _write_parquet(temporary, iter(rows), unknown_label)


def csv_writer(file: TextIO, top: int, unknown_label: str | None = None) -> Any:
    """A csv.writer that has written the header. `top` is SEVERAL where pictures may have several labels."""
    writer = line_writer(file)
    more = [f"{name}_{place}" for place in range(2, top + 1) for name in ("label", "probability")]
    more += [] if unknown_label is None else [UNKNOWN_SCORE]
    first = ["label", "probability"] if top else ["labels", "probabilities"]
    writer.writerow(["path", *first, *more, "error"])
    return writer


def csv_cells(path: str, result: Result | str, top: int, unknown_label: str | None = None) -> list[str]:
    """One row with `escaped` texts and `top` classes."""
    if isinstance(result, str):
        blank = 2 * (top or 1) + (unknown_label is not None)
        return [escaped(path), *[""] * blank, escaped(result)]
    cells = [cell for label, probability in result.classes for cell in (escaped(label), f"{probability:.4f}")]
    if top == SEVERAL:
        labels = SEPARATOR.join(label for label, _ in result.classes)
        cells = [escaped(labels), SEPARATOR.join(f"{probability:.4f}" for _, probability in result.classes)]
    if unknown_label is not None:
        cells.append(f"{result.unknown_score:.4f}")
        if result.rejected:
            cells[0] = escaped(unknown_label)
    return [escaped(path), *cells, ""]


def read_csv(file: TextIO) -> Iterator[Labelled]:
    """The rows of `csv_writer`."""
    for row in csv.DictReader(file):
        path, label, error = (recovered(row.get(name) or "") for name in ("path", "label", "error"))
        probability, score = (float(row.get(name) or "nan") for name in ("probability", UNKNOWN_SCORE))
        yield Labelled(path, label, probability, score, error)


def read_table(out: Path) -> Iterator[Labelled]:
    """The rows of `write_table`, numbers with the 4 digits of CSV."""
    if out.suffix == ".csv":
        with out.open(encoding="utf-8", newline="") as file:
            yield from read_csv(file)
        return
    with require("pyarrow.parquet", "parquet").ParquetFile(out) as table:
        wanted = ("path", "label", "probability", UNKNOWN_SCORE, "error")
        names = [name for name in wanted if name in table.schema_arrow.names]
        for row in (row for batch in table.iter_batches(columns=names) for row in batch.to_pylist()):
            numbers = (row.get(name) for name in ("probability", UNKNOWN_SCORE))
            probability, score = (math.nan if number is None else round(number, 4) for number in numbers)
            yield Labelled(row["path"], row["label"] or "", probability, score, row["error"] or "")


def prediction_columns(classes: Sequence[Sequence[Sequence[Any]] | None], scores: Sequence[str]) -> dict[str, Any]:
    """Parquet columns of predictions: each of `scores` for the best class, and top, a list of structs of all.

    classes  per image its classes, best first, each with one value per score; None for an unreadable image
    scores   label and class_id are strings, others float32
    """
    pa = require("pyarrow", "parquet")
    types = [(name, pa.string() if name in ("label", "class_id") else pa.float32()) for name in scores]
    columns = {
        name: pa.array([None if row is None else row[0][i] for row in classes], kind)
        for i, (name, kind) in enumerate(types)
    }
    top = [None if row is None else [dict(zip(scores, values, strict=True)) for values in row] for row in classes]
    return {**columns, "top": pa.array(top, pa.list_(pa.struct(types)))}


def with_rejections(
    columns: dict[str, Any], scores: Sequence[float | None], rejected: Sequence[bool], unknown_label: str
) -> dict[str, Any]:
    """Parquet columns of `prediction_columns` with UNKNOWN_SCORE, float32; a rejected picture has the label
    `unknown_label` and no class_id, and keeps its `top`. `scores` are None for unreadable images."""
    pa = require("pyarrow", "parquet")
    labels = columns["label"].to_pylist()
    marked = {"label": [unknown_label if out else label for label, out in zip(labels, rejected, strict=True)]}
    if "class_id" in columns:
        ids = columns["class_id"].to_pylist()
        marked["class_id"] = [None if out else class_id for class_id, out in zip(ids, rejected, strict=True)]
    arrays = {name: pa.array(values, pa.string()) for name, values in marked.items()}
    return {**columns, **arrays, UNKNOWN_SCORE: pa.array(scores, pa.float32())}


def _write_parquet(path: Path, rows: Iterator[Row], unknown_label: str | None) -> None:
    pa, pq = require("pyarrow", "parquet"), require("pyarrow.parquet", "parquet")

    def table(group: list[Row]) -> Any:
        results = [None if isinstance(result, str) else result for _, result in group]
        errors = [result if isinstance(result, str) else None for _, result in group]
        paths = pa.array([name for name, _ in group], pa.string())
        columns = prediction_columns([one and one.classes for one in results], ("label", "probability"))
        if unknown_label is not None:
            scores = [one and one.unknown_score for one in results]
            columns = with_rejections(columns, scores, [bool(one and one.rejected) for one in results], unknown_label)
        return pa.table({"path": paths, **columns, "error": pa.array(errors, pa.string())})

    with pq.ParquetWriter(path, table([]).schema, write_page_checksum=True) as writer:
        while group := list(islice(rows, _ROW_GROUP)):
            writer.write_table(table(group))


def write_part(path: Path, table: Any, facts: str, **options: Any) -> None:
    """Write a pyarrow.Table with its facts (JSON) in the schema's metadata. `options` are those of pyarrow."""
    pq = require("pyarrow.parquet", "parquet")
    pq.write_table(table.replace_schema_metadata({_FACTS: facts}), path, write_page_checksum=True, **options)


def read_part(path: Path) -> tuple[Any, dict[str, Any]]:
    """The table of `write_part`, with its pages verified, and its facts. Raises many types for a damaged file."""
    with require("pyarrow.parquet", "parquet").ParquetFile(path, page_checksum_verification=True) as file:
        table = file.read()
    return table.replace_schema_metadata(None), json.loads(table.schema.metadata[_FACTS])
