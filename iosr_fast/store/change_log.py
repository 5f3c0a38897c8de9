"""The log of changes: one SQLite file (log_reader), from which the state of a classifier is made again.

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
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from iosr_fast.exceptions import DamagedFileError, IosrFastError
from iosr_fast.head.head import Head
from iosr_fast.sealed.files import sync_folder
from iosr_fast.sealed.outputs import check_writable
from iosr_fast.store import sqlite_file
from iosr_fast.store.changes import Change, decode
from iosr_fast.store.head_files import fingerprint, head_from_bytes, head_to_bytes
from iosr_fast.store.log_reader import FIX, PART, TABLES, Base, LogReader, check_ours

# A snapshot is written after so many changes, or bytes of them.
MOST_CHANGES = 256
MOST_BYTES = 64 << 20
# Before the chain in `meta.last`: the version of SQLite, which earlier versions compare with the file's header.
_WRITER = int("{}{:03}{:03}".format(*sqlite3.sqlite_version_info)).to_bytes(4)
_open = set[int]()  # descriptors of the logs that this process has open
_log = logging.getLogger("iosr_fast")


class LogWriteError(OSError):
    """A change could not be written to the log, and was not made."""


class ChangeLog:
    """An open log, made by `ChangeLog.open`. Not safe between threads: a classifier changes one step at a time.

    `failure` says why the last change could not be written; "" where it could.
    """

    def __init__(self, path: Path, file: int) -> None:
        self.path = path
        self.failure = ""
        self._file = file
        self._db = sqlite_file.connect(path, "rw")
        self._size = 0  # of the file
        self._chain = b""  # of the newest change
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
        if any(sqlite_file.is_at(file, path) for file in [*_open]):
            fix = "this process has this log open: use the classifier that has it, or close its log first (close_log)"
            raise BlockingIOError(errno.EWOULDBLOCK, fix, str(path))
        with sqlite_file.naming(path, FIX), ExitStack() as stack:
            if path.exists():
                check_writable(path.parent, path)  # where SQLite needs a file while it writes
            file = sqlite_file.lock(path) if path.exists() else _begin(path, state)
            stack.callback(os.close, file)
            check_ours(path, file)
            log = cls(path, file)
            stack.callback(log._db.close)
            state = log._replay(state)
            stack.pop_all()
            _open.add(file)
            return log, state

    def _replay(self, state: Head) -> Head:
        """Check the file and make the changes since its snapshot."""
        # The journal stays, empty, while the log is open. Where it were deleted, a power cut could bring it back, which
        # undoes the last change; that it is empty is on the disk when a change is acknowledged.
        self._db.execute("PRAGMA journal_mode=TRUNCATE")
        self._db.execute("BEGIN IMMEDIATE")
        self._size = os.fstat(self._file).st_size
        reader = LogReader(self._db)
        if reader.base.fingerprint != (expected := fingerprint(state)):
            raise IosrFastError(
                f"{self.path} is the log of another state: expected one that begins from {expected[:12]}, got "
                f"{reader.base.fingerprint[:12]}; load the bundle it was begun with, or begin a new log"
            )
        version, chain, snapshot = reader.snapshot()
        recent = [*reader.rows(version)]
        self._db.execute("ROLLBACK")
        sqlite_file.trust(self._db)
        if snapshot and (not recent or recent.pop(0).chain != chain):
            raise DamagedFileError("its snapshot is of another log")
        try:
            state = head_from_bytes(snapshot) if snapshot else state
            if state.version != version:
                raise DamagedFileError(f"its snapshot is of version {state.version}, not {version}")
            for row in recent:
                state = decode(row.op, row.record).replay(state)
        except (ValueError, ArithmeticError) as error:
            raise DamagedFileError(f"the change to version {state.version + 1} can't be made ({error})") from error
        self._chain = reader.chain
        self._changes = len(recent)
        self._bytes = sum(len(row.record) for row in recent)
        return state.compiled()

    def append(self, change: Change, before: Head, after: Head) -> None:
        """Write the change that leads from one head to the other, and wait until it is on the disk.

        Raises LogWriteError where that fails: the caller keeps the head that it has.
        """
        if self._changes >= MOST_CHANGES or self._bytes >= MOST_BYTES:
            self._write_snapshot(before)
        record = change.encode(after)
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        chain = _link(self._chain, after.version, time, change.op, record)
        self._pending = chain, after
        try:
            with self._writing(chain) as db:
                row = after.version, after.version, time, change.op, record, chain
                db.execute("INSERT INTO changes(rowid, version, time, op, record, chain) VALUES(?, ?, ?, ?, ?, ?)", row)
        except (OSError, sqlite3.Error) as error:
            cause = self._cause(error)
            self.failure = cause.strerror or str(cause)
            message = f"the change was not made: it can't be logged ({self.failure})"
            raise LogWriteError(cause.errno, message, str(self.path)) from error
        self.failure = ""
        self._changes = self._changes + 1
        self._bytes = self._bytes + len(record)

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
        return head

    def close(self) -> None:
        """Close the file."""
        _open.discard(self._file)
        with suppress(sqlite3.Error):  # then an empty journal stays
            self._db.execute("PRAGMA journal_mode=DELETE")
        self._db.close()
        os.close(self._file)

    def _write_snapshot(self, state: Head) -> None:
        """Write the state in place of the last snapshot. Logs a failure, and tries again after as many changes."""
        try:
            body = msgspec.msgpack.encode((state.version, self._chain, head_to_bytes(state)))
            with self._writing(self._chain) as db:
                (rows,) = db.execute("SELECT count(*) FROM snapshot").fetchone()
                parts = max(rows, -(-(len(body) + 40) // PART))
                content = len(body).to_bytes(8) + body.ljust(parts * PART - 40, b"\0")
                content = hashlib.sha256(content).digest() + content
                for i in range(parts):
                    change = "UPDATE snapshot SET part = ? WHERE rowid = ?"
                    change = change if i < rows else "INSERT INTO snapshot(part, rowid) VALUES(?, ?)"
                    db.execute(change, (content[i * PART : (i + 1) * PART], i + 1))
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
            db.execute("UPDATE meta SET last = ?", (_WRITER + chain,))
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
                file.write(bytes(16 * sqlite_file.PAGE))
                file.flush()
                os.fsync(file.fileno())
        except OSError as cause:
            return cause
        return OSError(errno.EIO, str(error))


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
            last = _WRITER + hashlib.sha256(text).digest()
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


def _link(chain: bytes, version: int, time: str, op: str, record: bytes) -> bytes:
    return hashlib.sha256(b"%b%d %b %b %b" % (chain, version, time.encode(), op.encode(), record)).digest()
