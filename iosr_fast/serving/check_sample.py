"""A random sample of accepted answers, for somebody to check, and what the checks say of the promise."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from iosr_fast.head.predictions import Prediction
from iosr_fast.methods.checks import checked
from iosr_fast.serving.kept_folder import KeptFolder, picture_name
from iosr_fast.utils.csv_text import check_columns, escaped, line_writer

TABLE, LABELS, LOG = "checks.csv", "labels.csv", "checks.jsonl"
COLUMNS = ("path", "label", "answered", "max_error", "version", "time")
_READ_S = 5.0  # between two readings of the labels
log = logging.getLogger(__name__)


class Promise(NamedTuple):
    """What is checked: of the labels that a classifier accepts, at most a share `max_error` is wrong. `digest` is that
    of the classifier's folder."""

    max_error: float
    digest: str

    def in_place_of(self, last: Promise) -> str:
        """What has changed, in words."""
        if self.max_error == last.max_error:
            return "another classifier is served"
        return f"errors of at most {self.max_error:.4g} are promised in place of {last.max_error:.4g}"


class CheckSample:
    """Keeps a share of accepted pictures, drawn by the SHA-256 of their bytes, and counts the labels that they get.

    TABLE lists them, with an empty `label` to fill in, there or in the table LABELS, whose `path` counts by its last
    part. LOG has, as lines of JSON, all that was drawn and counted, and is read at the start. TABLE is only appended
    to; rows that somebody removed before they were judged come back. A picture counts once, by its first label that two
    readings agree on, so that none is read while it is written; every text but the answer is another label. A `promise`
    that differs from the last one starts anew. At most `limit` pictures wait for a label; meanwhile none is drawn.

    For one thread; `result` and `beside` may be read in any. `beside` counts labels of pictures that were not drawn, in
    the table `others`, too: as somebody chose them, they say nothing of the promise. Raises OSError where the folder
    can't be read or written, IosrFastError for a table that is no CSV.
    """

    def __init__(self, folder: KeptFolder, share: float, limit: int, promise: Promise, others: str) -> None:
        self._folder, self._share, self._limit, self._promise, self._others = folder, share, limit, promise, others
        self._drawn: dict[str, dict[str, Any]] = {}  # rows of TABLE, by the names of pictures
        self._wrong: dict[str, bool] = {}  # of the pictures that are counted, in the order of checking
        self._labels: dict[str, str] = {}  # of the last reading
        self._next_reading, self.beside = 0.0, 0
        last = self._replay()
        if last != promise:
            self._drawn, self._wrong = {}, {}
            self._log(promise=promise._asdict())
            if last is not None:
                log.warning("checks of accepted labels start anew: %s", promise.in_place_of(last))
        self.result = checked([], promise.max_error)
        self._judge()

    def __contains__(self, name: str) -> bool:
        return name in self._drawn

    def offer(self, image: bytes, prediction: Prediction) -> bool:
        """Keep a picture whose label was accepted, if it is drawn, for the first time."""
        name, digest = picture_name(image), hashlib.sha256(image).digest()
        drawn = int.from_bytes(digest[-8:], "big") < self._share * 2.0**64
        if not drawn or name in self or len(self._waiting()) >= self._limit:
            return False
        self._folder.write(name, image)
        values = name, "", prediction.label, self._promise.max_error, prediction.version, _now()
        row = dict(zip(COLUMNS, values, strict=True))
        self._log(drawn=row)
        self._drawn[name] = row
        self._append([row])
        return True

    def read_labels(self) -> None:
        """Count new labels, unless the last reading was just now."""
        if time.monotonic() < self._next_reading:
            return
        self._next_reading = time.monotonic() + _READ_S
        tables = {table: self._read(table) for table in (self._others, TABLE, LABELS)}
        missing = self._waiting() - tables[TABLE].keys()
        self._append(row for name, row in self._drawn.items() if name in missing)
        labelled = {name for rows in tables.values() for name, label in rows.items() if label}
        self.beside = len(labelled - self._drawn.keys())
        labels = {name: label for rows in (tables[TABLE], tables[LABELS]) for name, label in rows.items() if label}
        agreed = dict(labels.items() & self._labels.items())
        self._labels = labels
        new = [name for name in self._drawn if name in agreed and name not in self._wrong]
        for name in new:
            wrong = agreed[name] != self._drawn[name]["answered"]
            self._log(counted={"path": name, "label": agreed[name], "wrong": wrong, "time": _now()})
            self._wrong[name] = wrong
        if new:
            self._judge()

    def _judge(self) -> None:
        before, self.result = self.result, checked(list(self._wrong.values()), self._promise.max_error)
        if self.result.refuted and not before.refuted:
            log.warning("%s", self.result)

    def _waiting(self) -> set[str]:
        """The pictures that nobody has judged, and that are still there."""
        return {name for name in self._drawn if name not in self._wrong and self._folder.has(name)}

    def _read(self, table: str) -> dict[str, str]:
        """The labels of a table, by the names of pictures."""
        columns, rows = self._folder.read_rows(table)
        if columns:
            check_columns(columns, Path(table), ("path", "label"), ", or remove the table")
        rows.sort(key=lambda row: bool(row["label"]))  # stable: of two rows of a picture, one with a label counts
        return {PurePath(row["path"]).name: row["label"].strip() for row in rows}

    def _append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows to TABLE."""
        text = StringIO()
        line_writer(text).writerows([escaped(str(value)) for value in row.values()] for row in rows)
        if text.getvalue():
            self._folder.append(TABLE, text.getvalue(), f"{','.join(COLUMNS)}\n")

    def _log(self, **event: Any) -> None:
        self._folder.append(LOG, f"{json.dumps(event)}\n")

    def _replay(self) -> Promise | None:
        """Read LOG; returns its last promise. A line that was cut off when a process ended says nothing."""
        last = None
        for line in self._folder.read_lines(LOG):
            with suppress(json.JSONDecodeError):
                match json.loads(line):
                    case {"promise": promise}:
                        last, self._drawn, self._wrong = Promise(**promise), {}, {}
                    case {"drawn": row}:
                        self._drawn[row["path"]] = row
                    case {"counted": row}:
                        self._wrong[row["path"]] = row["wrong"]
        return last


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
