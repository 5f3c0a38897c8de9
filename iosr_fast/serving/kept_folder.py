"""A folder of uploads, which are other people's pictures, and of what is known of them."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import sqlite3
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path, PurePath

from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.labels import SEPARATOR
from iosr_fast.images.limits import image_kind
from iosr_fast.sealed.files import lock_folder, open_regular
from iosr_fast.store import sqlite_file
from iosr_fast.utils.csv_text import check_columns, escaped, line_writer, read_rows

LABELS = "labels.csv"  # of other people, which the server only reads
SECRET = "secret"  # random bytes, by which pictures are drawn and clients named
STATE = "state.db"
COLLECTED, CHECKS = "collected", "checks"
TABLES = {
    COLLECTED: ("path", "guess", "probability", "reason", "time", "client"),
    CHECKS: ("path", "answered", "max_error", "classifier", "version", "checked", "time", "client"),
}
_FIX = "restore it from a copy, or remove it: the next start then takes the rows of the CSV files"
_SECRET_BYTES = 32
_PICTURE = re.compile(r"[0-9a-f]{32}\.(?:png|jpeg|webp|image)")
_TEMPORARY = ".tmp"  # the one file that is being written
log = logging.getLogger(__name__)


def picture_name(image: bytes) -> str:
    """The name of a picture's file: 32 hexadecimal digits of the SHA-256 of its bytes, and its kind.

    >>> picture_name(b"GIF89a")
    '610f5ae4d76e332636a17bd357fd6ce9.image'
    """
    return f"{hashlib.sha256(image).hexdigest()[:32]}.{image_kind(image).lower() or 'image'}"


def time_text(seconds: float | None = None) -> str:
    """A time since 1970, or now, as tables have it."""
    moment = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return moment.isoformat(timespec="seconds")


class KeptFolder:
    """The files of one server. All are opened below the folder's descriptor, never through a link, and only their owner
    can read them. Nothing is removed but pictures, and what a killed server had half written.

    STATE has the rows of TABLES, by the `path` of a picture. A CSV file of each is written after its changes and never
    read, but where there is no STATE yet: a folder of an earlier version has its rows there.

    Raises IosrFastError where another server has the folder or SECRET is damaged, DamagedFileError for a damaged STATE,
    and OSError if the folder can't be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(0o700, parents=True, exist_ok=True)
        try:
            lock = lock_folder(path)
        except BlockingIOError as error:
            raise IosrFastError(f"another server collects into {path}: choose another folder") from error
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW) if lock is None else lock
        try:
            with open(path / SECRET, "rb", opener=self._open) as file:
                self._secret = file.read()
        except FileNotFoundError:
            self._secret = secrets.token_bytes(_SECRET_BYTES)
            self.write(SECRET, self._secret)
        if (size := len(self._secret)) != _SECRET_BYTES:
            raise IosrFastError(f"expected {_SECRET_BYTES} bytes in {path / SECRET}, got {size}: restore or remove it")
        self._state = self._open_state()

    def keyed(self, text: str) -> str:
        """The HMAC-SHA256 of a text by SECRET, in hexadecimal digits: the same after a restart, and nobody without it
        can foresee them, or tell the text from them."""
        return hmac.digest(self._secret, text.encode(), "sha256").hex()

    def pictures(self) -> dict[str, float]:
        """The pictures in the folder, with the times of their last change."""
        with os.scandir(self._descriptor) as entries:
            files = [one for one in entries if _PICTURE.fullmatch(one.name) and one.is_file(follow_symlinks=False)]
            return {one.name: one.stat(follow_symlinks=False).st_mtime for one in files}

    def remove(self, names: Iterable[str]) -> None:
        """Remove pictures that are in the folder."""
        for name in names:
            os.unlink(name, dir_fd=self._descriptor)

    def write(self, name: str, content: bytes) -> None:
        """Write a file whole or not at all; it replaces a file, or a link itself, of this name."""
        try:
            with suppress(FileNotFoundError):
                os.unlink(_TEMPORARY, dir_fd=self._descriptor)  # of a write that failed
            with open(self.path / _TEMPORARY, "xb", opener=self._open) as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(_TEMPORARY, name, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)
            os.fsync(self._descriptor)
        except OSError as error:
            raise OSError(
                f"expected to write {self.path / name}, got {error.strerror or error}: make room, allow it, or choose "
                "another folder"
            ) from error

    def rows(self, table: str) -> dict[str, dict[str, str]]:
        """The rows of a table by path, the oldest first."""
        with sqlite_file.naming(self.path / STATE, _FIX):
            rows = self._state.execute(f"SELECT {', '.join(TABLES[table])} FROM {table} ORDER BY rowid").fetchall()
        return {row[0]: dict(zip(TABLES[table], row, strict=True)) for row in rows}

    def change(self, table: str, rows: Iterable[dict[str, str]] = (), gone: Iterable[str] = ()) -> None:
        """Write rows, in place of earlier ones of their paths, remove those of the paths `gone`, and write the CSV file
        of the table."""
        with sqlite_file.naming(self.path / STATE, _FIX), self._state as db:
            db.execute("BEGIN IMMEDIATE")
            db.executemany(f"DELETE FROM {table} WHERE path = ?", ([path] for path in gone))
            _put(db, table, rows)
        text = StringIO()
        lines = [TABLES[table], *(row.values() for row in self.rows(table).values())]
        line_writer(text).writerows(map(escaped, line) for line in lines)
        self.write(f"{table}.csv", text.getvalue().encode())

    def labels(self, several: bool) -> dict[str, str]:
        """The labels in LABELS, by the last parts of its paths. Where pictures may have `several`, a column `labels` in
        place of `label` has all of each, joined by SEPARATOR; that alone is returned of a picture that has none."""
        columns, rows = self._read_rows(LABELS)
        name = "labels" if several and "label" not in columns else "label"
        if columns:
            check_columns(columns, self.path / LABELS, ("path", name), ", or remove the table")
        texts = [(row["path"], row[name].strip() or SEPARATOR * (name == "labels")) for row in rows]
        return {PurePath(path).name: text for path, text in texts if text}

    def close(self) -> None:
        self._state.close()
        os.close(self._descriptor)

    def _open_state(self) -> sqlite3.Connection:
        """A connection to STATE; a new one has the rows of the CSV files."""
        place = (self.path / STATE).absolute()
        is_new = STATE not in os.listdir(self._descriptor)
        taken = {table: self._rows_of_file(table) for table in TABLES} if is_new else {}
        os.close(self._open(str(place), os.O_RDWR | os.O_CREAT))  # not through a link, which SQLite would follow
        with sqlite_file.naming(place, _FIX):
            db = sqlite_file.connect(place, "rw")
            sqlite_file.check_structure(db)
            sqlite_file.trust(db)
            with db:
                db.execute("BEGIN IMMEDIATE")
                for table, rows in taken.items():
                    _, *others = TABLES[table]
                    db.execute(f"CREATE TABLE {table}(path TEXT PRIMARY KEY, {' TEXT, '.join(others)} TEXT)")
                    _put(db, table, rows)
        return db

    def _rows_of_file(self, table: str) -> list[dict[str, str]]:
        """Those of pictures that are whole: earlier versions added lines, of which the last one may be cut off."""
        path = self.path / f"{table}.csv"
        _, rows = self._read_rows(path.name)
        if any(row.get("label") for row in rows):
            raise IosrFastError(f"expected labels in {LABELS} alone, got some in {path}: move its column label there")
        taken = [row for row in rows if _PICTURE.fullmatch(row.get("path", "")) and row.get("time")]
        if rows:
            log.warning("%s takes %d of the %d rows of %s", STATE, len(taken), len(rows), path)
        return taken

    def _read_rows(self, name: str) -> tuple[list[str], list[dict[str, str]]]:
        """The columns and rows of a table (csv_text.read_rows); none without a file."""
        try:
            return read_rows(self.path / name, opener=self._open)
        except FileNotFoundError:
            return [], []

    def _open(self, path: str, flags: int) -> int:
        return open_regular(path, flags | os.O_NOFOLLOW, self._descriptor)


def _put(db: sqlite3.Connection, table: str, rows: Iterable[dict[str, str]]) -> None:
    names = TABLES[table]
    into = f"INSERT OR REPLACE INTO {table} VALUES({', '.join('?' * len(names))})"
    db.executemany(into, ([row.get(name, "") for name in names] for row in rows))
