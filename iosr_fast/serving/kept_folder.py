"""A folder of uploads, which are other people's pictures, and of tables about them."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path, PurePath
from typing import Any

from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.labels import SEPARATOR
from iosr_fast.images.limits import image_kind
from iosr_fast.sealed.files import lock_folder, open_regular
from iosr_fast.utils.csv_text import check_columns, escaped, line_writer, read_rows

LABELS = "labels.csv"  # of other people, which the server only reads
SECRET = "secret"  # random bytes, by which pictures are drawn and clients named
_SECRET_BYTES = 32
_PICTURE = re.compile(r"[0-9a-f]{32}\.(?:png|jpeg|webp|image)")
_TEMPORARY = re.compile(rf"\.(?:{_PICTURE.pattern}|collected\.csv|checks\.csv|{SECRET})\.tmp")


def picture_name(image: bytes) -> str:
    """The name of a picture's file: 32 hexadecimal digits of the SHA-256 of its bytes, and its kind.

    >>> picture_name(b"GIF89a")
    '610f5ae4d76e332636a17bd357fd6ce9.image'
    """
    return f"{hashlib.sha256(image).hexdigest()[:32]}.{image_kind(image).lower() or 'image'}"


def is_picture_name(name: str) -> bool:
    return _PICTURE.fullmatch(name) is not None


def time_text(seconds: float | None = None) -> str:
    """A time since 1970, or now, as tables have it."""
    moment = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return moment.isoformat(timespec="seconds")


class KeptFolder:
    """The files of one server. All are opened below the folder's descriptor, never through a link, and only their owner
    can read them. Nothing is removed but pictures, and what a killed server had half written.

    Raises IosrFastError where another server has the folder or SECRET is damaged, and OSError if it can't be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._writing(""):
            path.mkdir(0o700, parents=True, exist_ok=True)
            try:
                lock = lock_folder(path)
            except BlockingIOError as error:
                raise IosrFastError(f"another server collects into {path}: choose another folder") from error
            self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW) if lock is None else lock
            for name in filter(_TEMPORARY.fullmatch, os.listdir(self._descriptor)):
                os.unlink(name, dir_fd=self._descriptor)
        try:
            with open(path / SECRET, "rb", opener=self._open) as file:
                self._secret = file.read()
        except FileNotFoundError:
            self._secret = secrets.token_bytes(_SECRET_BYTES)
            self.write(SECRET, self._secret)
        if (size := len(self._secret)) != _SECRET_BYTES:
            raise IosrFastError(f"expected {_SECRET_BYTES} bytes in {path / SECRET}, got {size}: restore or remove it")

    def keyed(self, text: str) -> str:
        """The HMAC-SHA256 of a text by SECRET, in hexadecimal digits: the same after a restart, and nobody without it
        can foresee them, or tell the text from them."""
        return hmac.digest(self._secret, text.encode(), "sha256").hex()

    def pictures(self) -> dict[str, float]:
        """The pictures in the folder, with the times of their last change."""
        with os.scandir(self._descriptor) as entries:
            files = [one for one in entries if is_picture_name(one.name) and one.is_file(follow_symlinks=False)]
            return {one.name: one.stat(follow_symlinks=False).st_mtime for one in files}

    def remove(self, names: Iterable[str]) -> None:
        """Remove those that are pictures in the folder."""
        for name in self.pictures().keys() & set(names):
            os.unlink(name, dir_fd=self._descriptor)

    def write(self, name: str, content: bytes) -> None:
        """Write a file whole or not at all; it replaces a file, or a link itself, of this name."""
        temporary = f".{name}.tmp"
        with self._writing(name):
            try:
                self._put(temporary, "wb", content)
                os.replace(temporary, name, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)
                os.fsync(self._descriptor)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=self._descriptor)

    def append(self, name: str, content: bytes) -> None:
        with self._writing(name):
            self._put(name, "ab", content)

    def stamp(self, name: str) -> tuple[int, int, int] | None:
        """Changes when a file is written; None without one."""
        with suppress(FileNotFoundError):
            status = os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
            return status.st_ino, status.st_size, status.st_mtime_ns
        return None

    def read_rows(self, name: str, *needed: str) -> tuple[list[str], list[dict[str, str]]]:
        """The columns and rows of a table (csv_text.read_rows), which has the columns `needed`; none without a file."""
        try:
            columns, rows = read_rows(self.path / name, opener=self._open)
        except FileNotFoundError:
            return [], []
        if columns:
            check_columns(columns, self.path / name, needed, ", or remove the table")
        return columns, rows

    def labels(self, several: bool) -> dict[str, str]:
        """The labels in LABELS, by the last parts of its paths. Where pictures may have `several`, a column `labels` in
        place of `label` has all of each, joined by SEPARATOR; that alone is returned of a picture that has none."""
        columns, rows = self.read_rows(LABELS)
        name = "labels" if several and "label" not in columns else "label"
        if columns:
            check_columns(columns, self.path / LABELS, ("path", name), ", or remove the table")
        texts = [(row["path"], row[name].strip() or SEPARATOR * (name == "labels")) for row in rows]
        return {PurePath(path).name: text for path, text in texts if text}

    def close(self) -> None:
        os.close(self._descriptor)

    def _put(self, name: str, mode: str, content: bytes) -> None:
        with open(self.path / name, mode, opener=self._open) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def _open(self, path: str, flags: int) -> int:
        return open_regular(path, flags | os.O_NOFOLLOW, self._descriptor)

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                f"expected to write {self.path / name}, got {error.strerror or error}: make room, allow it, or choose "
                "another folder"
            ) from error


class KeptTable:
    """A table of pictures in a KeptFolder, which only the server writes; `rows` are by path, the oldest first.

    Rows are appended; of a path the last one counts. Should somebody save another table over it, their columns and
    rows stay, and those that are missing come back.
    """

    def __init__(self, folder: KeptFolder, name: str, columns: Sequence[str]) -> None:
        self._folder, self._name, self._columns = folder, name, list(columns)
        self._stamp: tuple[int, int, int] | None = None
        self.rows: dict[str, dict[str, str]] = {}
        self._read_changes()

    def add(self, *rows: dict[str, Any]) -> None:
        """Write rows, in place of earlier ones of their paths."""
        if self._read_changes():
            self.drop(())
        self._folder.append(self._name, self._lines(rows))
        self._stamp = self._folder.stamp(self._name)
        for row in rows:
            self.rows.pop(row["path"], None)
            self.rows[row["path"]] = {name: str(value) for name, value in row.items()}

    def drop(self, paths: Collection[str]) -> None:
        """Write the table anew, whole or not at all, without the rows of these paths."""
        self._read_changes()
        left = {path: row for path, row in self.rows.items() if path not in paths}
        header = {name: name for name in self._columns}
        self._folder.write(self._name, self._lines([header, *left.values()]))
        self.rows, self._stamp = left, self._folder.stamp(self._name)

    def _read_changes(self) -> bool:
        """Read the file, unless it is as this object has written it."""
        stamp = self._folder.stamp(self._name)
        if stamp == self._stamp:
            return False
        columns, rows = self._folder.read_rows(self._name, "path")
        self._columns = list(dict.fromkeys([*columns, *self._columns]))
        blank, read, ours, self._stamp = dict.fromkeys(self._columns, ""), dict[str, dict[str, str]](), self.rows, stamp
        for row in rows:
            read.pop(row["path"], None)
            if row.get("time") or row.get("label"):  # else it was cut off when the machine stopped
                read[row["path"]] = row
        self.rows = {
            path: blank | read.get(path, {}) | {name: value for name, value in ours.get(path, {}).items() if value}
            for path in [*ours, *read]
        }
        return True

    def _lines(self, rows: Iterable[dict[str, Any]]) -> bytes:
        text = StringIO()
        line_writer(text).writerows([escaped(str(row.get(name, ""))) for name in self._columns] for row in rows)
        return text.getvalue().encode()
