"""The log of changes: one SQLite file, from which the state of a classifier is made again.

    meta      base, JSON about the state that the log begins with; last, the version of SQLite that wrote last and the
              chain of the newest change
    changes   a row a change; chain is the SHA-256 over the chain before (at first, over base) and the other fields
    snapshot  the newest state that was written whole, so that a start makes few changes again

A change is acknowledged when its transaction is complete. Only its owner can read the file: it holds pictures.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from iosr_fast.exceptions import DamagedFileError, IosrFastError
from iosr_fast.head.head import Head
from iosr_fast.head.ids import class_id, example_id
from iosr_fast.store import sqlite_file
from iosr_fast.store.changes import Change, Record
from iosr_fast.store.head_files import fingerprint, head_from_bytes, head_to_bytes
from iosr_fast.store.sqlite_file import PAGE, ReadPage
from iosr_fast.utils.files import sync_folder
from iosr_fast.utils.outputs import check_writable
from iosr_fast.utils.schema import Natural, Positive, Sha256, Strict

TABLES = {
    "meta": "base TEXT NOT NULL, last BLOB NOT NULL",
    "changes": "version INTEGER NOT NULL, time TEXT NOT NULL, op TEXT NOT NULL, record BLOB NOT NULL,"
    " chain BLOB NOT NULL",
    "snapshot": "part BLOB NOT NULL",
}
_COLUMNS, _TYPES = "version, time, op, record, chain", [int, str, str, bytes, bytes]
# A snapshot is written after so many changes, or bytes of them.
MOST_CHANGES = 256
MOST_BYTES = 64 << 20
_PART = 1 << 16  # bytes of a row of the snapshot, of which none is ever removed
_FIX = "restore it from a copy, or begin a new log with a saved classifier; `iosr-fast info` lists what can be read"
_log = logging.getLogger("iosr_fast")


class LogWriteError(OSError):
    """A change could not be written to the log, and was not made."""


class Base(Strict, frozen=True, kw_only=True):
    """What a log begins with: the fingerprint, the version, the classes and images of a state."""

    format: Literal[3]  # 1 and 2 were lines of JSON
    fingerprint: Sha256
    version: Positive
    classes: Natural
    images: Natural


@dataclass(frozen=True)
class LoggedChange:
    """A change of a log: the version that it made and when, what it did (`op`), the id of its class ("" for none) and
    the name that it gave it, the ids of the images that it added or removed, and how many classes and images there are
    after it."""

    version: int
    time: str
    op: str
    class_id: str
    name: str
    example_ids: tuple[str, ...]
    classes: int
    images: int


class Row(NamedTuple):
    """A row of `changes`."""

    version: int
    time: str
    op: str
    record: bytes
    chain: bytes

    def logged(self) -> LoggedChange:
        """It as callers see it. Raises ValueError for a record that is none."""
        record = msgspec.msgpack.decode(self.record, type=Record)
        uid, numbers = "" if record.uid is None else class_id(record.uid), tuple(map(example_id, record.numbers))
        return LoggedChange(self.version, self.time, self.op, uid, record.name, numbers, record.classes, record.images)


class LogReader:
    """What a file holds; `page` reads its bytes, in all `size`. All methods raise DamagedFileError."""

    def __init__(self, db: sqlite3.Connection, page: ReadPage, size: int) -> None:
        self._db, self._page, self._size = db, page, size
        rows = db.execute("SELECT rowid, base, last FROM meta").fetchall()
        if len(rows) != 1 or [*map(type, rows[0])] != [int, str, bytes] or rows[0][0] != 1:
            raise DamagedFileError("it does not say what it begins with")
        text, self._last = rows[0][1].encode(), rows[0][2]
        try:
            self.base = msgspec.json.decode(text, type=Base)
        except ValueError as error:
            raise DamagedFileError(f"it does not say what it begins with ({error})") from error
        self.chain = hashlib.sha256(text).digest()  # of the rows that were read

    def snapshot(self) -> tuple[int, bytes, bytes]:
        """The version, the chain and the bytes of the head that was written; without one, of the base, and b""."""
        parts = self._db.execute("SELECT rowid, part FROM snapshot ORDER BY rowid").fetchall()
        if not parts:
            return self.base.version, self.chain, b""
        whole = all(type(part) is bytes and len(part) == _PART for _, part in parts)
        content = b"".join(part for _, part in parts) if whole else b""
        if hashlib.sha256(content[32:]).digest() != content[:32] or parts[-1][0] != len(parts) or parts[0][0] != 1:
            raise DamagedFileError("its snapshot was changed")
        body = memoryview(content)[40 : 40 + int.from_bytes(content[32:40])]
        version, chain, state = msgspec.msgpack.decode(body, type=tuple[int, bytes, bytes])
        return version, chain, state

    def rows(self) -> Iterator[Row]:
        """The changes, each after its chain was compared; then the rest of the file is checked."""
        version = self.base.version
        for rowid, *fields in self._db.execute(f"SELECT rowid, {_COLUMNS} FROM changes ORDER BY rowid"):
            row, version = Row(*fields), version + 1
            if [*map(type, row)] != _TYPES or not rowid == row.version == version:
                raise DamagedFileError(f"expected the change to version {version}, got another row")
            self.chain = _link(self.chain, *row[:4])
            if row.chain != self.chain:
                raise DamagedFileError(f"the change to version {version} was changed, or one before it")
            yield row
        if self._last[4:] != self.chain:
            raise DamagedFileError(f"it should not end with the change to version {version}")
        sqlite_file.check_bytes(self._page, self._size, self._last[:4], 1 + len(TABLES))
        sqlite_file.check_structure(self._db, TABLES)


class ChangeLog:
    """An open log, made by `ChangeLog.open`. Not safe between threads: a classifier changes one step at a time.

    `failure` says why the last change could not be written; "" where it could.
    """

    def __init__(self, path: Path, file: int) -> None:
        self.path, self.failure = path, ""
        self._file, self._db = file, sqlite_file.connect(path, "rw")
        self._chain, self._size = b"", 0  # of the newest change, and of the file
        self._changes, self._bytes = 0, 0  # since the snapshot
        self._pending: tuple[bytes, Head] | None = None  # the chain and the head of a change that was begun

    @classmethod
    def open(cls, path: str | Path, state: Head) -> tuple[ChangeLog, Head]:
        """Open a log for writing and make its changes on `state`; a new log begins with `state`.

        Everything is checked and nothing is written; SQLite takes back a change that a crash cut off. Raises
        DamagedFileError for damage, IosrFastError for the log of another state and for a file that is no log,
        BlockingIOError where another process has it open, OSError where it can't be read or written.
        """
        path = Path(os.path.abspath(path))
        sqlite_file.check_place(path)
        with sqlite_file.naming(path, _FIX), ExitStack() as stack:
            if path.exists():
                check_writable(path.parent, path)  # where SQLite needs a file while it writes
            file = sqlite_file.lock(path) if path.exists() else _begin(path, state)
            stack.callback(os.close, file)
            _check_ours(path, file)
            log = cls(path, file)
            stack.callback(log._db.close)
            state = log._replay(state)
            stack.pop_all()
            return log, state

    def _replay(self, state: Head) -> Head:
        """Check the file and make the changes since its snapshot."""
        self._db.execute("PRAGMA journal_mode=DELETE")
        self._db.execute("BEGIN IMMEDIATE")
        self._size = os.fstat(self._file).st_size
        reader = LogReader(self._db, _pages(self._file), self._size)
        if reader.base.fingerprint != (own := fingerprint(state)):
            raise IosrFastError(
                f"{self.path} is the log of another state: expected one that begins from {own[:12]}, got "
                f"{reader.base.fingerprint[:12]}; load the bundle it was begun with, or begin a new log"
            )
        version, chain, snapshot = reader.snapshot()
        chains, recent = {reader.base.version: reader.chain}, []
        for row in reader.rows():
            if row.version > version:
                recent.append(row)
            chains[row.version] = row.chain
        self._db.execute("ROLLBACK")
        if chains.get(version) != chain:
            raise DamagedFileError("its snapshot is of another log")
        try:
            state = head_from_bytes(snapshot).one_label("a log") if snapshot else state
            for row in recent:
                state = msgspec.msgpack.decode(row.record, type=Record).apply(row.op, state)
        except (ValueError, ArithmeticError) as error:
            raise DamagedFileError(f"the change to version {state.version + 1} can't be made ({error})") from error
        self._chain, self._changes, self._bytes = reader.chain, len(recent), sum(len(row.record) for row in recent)
        return state.compiled()

    def append(self, change: Change, before: Head, after: Head) -> None:
        """Write the change that leads from one head to the other, and wait until it is on the disk.

        Raises LogWriteError where that fails: the caller keeps the head that it has.
        """
        if self._changes >= MOST_CHANGES or self._bytes >= MOST_BYTES:
            self._write_snapshot(before)
        record, time = change.encode(after), datetime.now(UTC).isoformat(timespec="milliseconds")
        chain = _link(self._chain, after.version, time, change.op, record)
        self._pending = chain, after
        try:
            with self._writing(chain) as db:
                row = after.version, after.version, time, change.op, record, chain
                db.execute(f"INSERT INTO changes(rowid, {_COLUMNS}) VALUES(?, ?, ?, ?, ?, ?)", row)
        except (OSError, sqlite3.Error) as error:
            cause = self._cause(error)
            self.failure = cause.strerror or str(cause)
            message = f"the change was not made: it can't be logged ({self.failure})"
            raise LogWriteError(cause.errno, message, str(self.path)) from error
        self.failure = ""
        self._changes, self._bytes = self._changes + 1, self._bytes + len(record)

    def settle(self, head: Head) -> Head:
        """The head that the file leads to: `head`, unless an interrupt came after the last change was written and
        before the caller had its head. Raises LogWriteError where the file can't be read."""
        if self._pending is not None:
            chain, after = self._pending
            try:
                if after is head or self._last() == chain:
                    self._chain, head = chain, after
            except sqlite3.Error as error:
                raise LogWriteError(errno.EIO, f"the log can't be read ({error})", str(self.path)) from error
            self._pending = None
        return head

    def close(self) -> None:
        """Close the file."""
        self._db.close()
        os.close(self._file)

    def _write_snapshot(self, state: Head) -> None:
        """Write the state in place of the last snapshot. Logs a failure, and tries again after as many changes."""
        try:
            body = msgspec.msgpack.encode((state.version, self._chain, head_to_bytes(state)))
            with self._writing(self._chain) as db:
                (there,) = db.execute("SELECT count(*) FROM snapshot").fetchone()
                parts = max(there, -(-(len(body) + 40) // _PART))
                content = len(body).to_bytes(8) + body.ljust(parts * _PART - 40, b"\0")
                content = hashlib.sha256(content).digest() + content
                for i in range(parts):
                    change = "UPDATE snapshot SET part = ? WHERE rowid = ?"
                    change = change if i < there else "INSERT INTO snapshot(part, rowid) VALUES(?, ?)"
                    db.execute(change, (content[i * _PART : (i + 1) * _PART], i + 1))
        except (OSError, sqlite3.Error) as error:
            _log.warning("%s: the state can't be written (%s), so that a start takes longer", self.path, error)
        self._changes = self._bytes = 0

    @contextmanager
    def _writing(self, chain: bytes) -> Iterator[sqlite3.Connection]:
        """A transaction on the file as this process left it, which is on the disk at the end; the `chain` after it."""
        db = self._db
        try:
            if not sqlite_file.is_at(self._file, self.path) or os.fstat(self._file).st_size != self._size:
                raise OSError(errno.ESTALE, f"{self.path.name} was changed, moved or removed while it was in use")
            db.execute("BEGIN IMMEDIATE")
            if self._last() != self._chain:
                raise OSError(errno.ESTALE, f"somebody else wrote to {self.path.name} while it was in use")
            yield db
            db.execute("UPDATE meta SET last = ?", (sqlite_file.WRITER + chain,))
            db.execute("COMMIT")
        finally:
            if db.in_transaction:
                with suppress(sqlite3.Error):  # then the next transaction takes it back
                    db.execute("ROLLBACK")
            self._size = os.fstat(self._file).st_size

    def _last(self) -> bytes:
        last: bytes = self._db.execute("SELECT last FROM meta").fetchone()[0]
        return last[4:]

    def _cause(self, error: Exception) -> OSError:
        """Why a transaction failed, as the system says of another file of this size: SQLite does not pass it on."""
        if isinstance(error, OSError):
            return error
        if sqlite_file.code_of(error) == sqlite3.SQLITE_FULL:
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        try:
            with tempfile.TemporaryFile(dir=self.path.parent) as file:
                file.seek(self._size)
                file.write(bytes(16 * PAGE))
                file.flush()
                os.fsync(file.fileno())
        except OSError as cause:
            return cause
        return OSError(errno.EIO, str(error))


def read_log(path: str | Path) -> list[LoggedChange]:
    """The changes of a log, in their order, after checking the whole file. Raises IosrFastError for damage.

    >>> from tempfile import TemporaryDirectory
    >>> from iosr_fast import Classifier
    >>> classifier = Classifier("demo", method="zero-shot").fit(class_names=["lemon", "pear"])
    >>> with TemporaryDirectory() as folder:
    ...     classifier.open_log(Path(folder, "changes.db"))
    ...     _ = classifier.rename_class("pear", "apple")
    ...     [(change.version, change.op, change.name) for change in read_log(Path(folder, "changes.db"))]
    [(2, 'rename_class', 'apple')]
    """
    with reading(path) as reader:
        return [row.logged() for row in reader.rows()]


@contextmanager
def reading(path: str | Path) -> Iterator[LogReader]:
    """The reader of a log, which may be in use. Raises as `read_log`, and at the end for a damaged snapshot."""
    path = Path(os.path.abspath(path))
    sqlite_file.check_place(path)
    with sqlite_file.naming(path, _FIX), path.open("rb") as file:
        _check_ours(path, file.fileno())
        with closing(sqlite_file.connect(path, "ro")) as db:
            db.execute("BEGIN")
            reader = LogReader(db, _pages(file.fileno()), os.fstat(file.fileno()).st_size)
            yield reader
            reader.snapshot()


def _pages(file: int) -> ReadPage:
    return lambda number: os.pread(file, PAGE, (number - 1) * PAGE)


def _link(chain: bytes, version: int, time: str, op: str, record: bytes) -> bytes:
    return hashlib.sha256(b"%b%d %b %b %b" % (chain, version, time.encode(), op.encode(), record)).digest()


def _check_ours(path: Path, file: int) -> None:
    """Raise IosrFastError unless the file begins as a log, before SQLite touches it."""
    header = os.pread(file, 100, 0)
    if header.startswith(b'{"base":"'):
        raise IosrFastError(
            f"{path} is a log of version 0.2 (lines of JSON), which this version does not read: open it with version "
            "0.2, save the classifier, and begin a new log with that"
        )
    if not sqlite_file.is_ours(header):
        database = header.startswith(sqlite_file.MAGIC)
        other = "another SQLite database" if database else "another file" if header else "an empty file"
        raise IosrFastError(
            f"expected {path} to be a log of changes or not to exist, got {other}: name another, or remove it to begin "
            "a new log"
        )


def _begin(path: Path, state: Head) -> int:
    """A new log, which has its name when it is whole; returns its lock."""
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")  # of all that begin this log
    file = sqlite_file.lock(new, os.O_CREAT)
    try:
        new.with_name(f"{new.name}-journal").unlink(missing_ok=True)  # of one that was killed
        os.ftruncate(file, 0)
        with closing(sqlite_file.create(new, TABLES)) as db:
            counts = {"classes": len(state.uids), "images": len(state.examples)}
            text = msgspec.json.encode(Base(format=3, fingerprint=fingerprint(state), version=state.version, **counts))
            last = sqlite_file.WRITER + hashlib.sha256(text).digest()
            db.execute("INSERT INTO meta VALUES(?, ?)", (text.decode(), last))
        if path.exists():
            raise sqlite_file.in_use(path)
        os.replace(new, path)
        for folder in (path, *made):
            sync_folder(folder.parent)
    except BaseException:
        new.unlink(missing_ok=True)
        os.close(file)
        raise
    return file
