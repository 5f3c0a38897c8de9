"""Reading a log of changes (change_log), whoever wrote it: a row is used after its hash was compared.

meta      base, JSON about the state that the log begins with; last, four bytes that earlier versions compare (the
          version of SQLite that wrote) and the chain of the newest change
changes   a row a change; chain is the SHA-256 over the chain before (at first, over base) and the other fields
snapshot  the newest state that was written whole, so that a start makes few changes again
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from iosr_fast.exceptions import DamagedFileError, IosrFastError
from iosr_fast.head.ids import class_id, example_id
from iosr_fast.sealed.schema import Natural, Positive, Sha256, Strict
from iosr_fast.store import sqlite_file
from iosr_fast.store.changes import decode

TABLES = {
    "meta": "base TEXT NOT NULL, last BLOB NOT NULL",
    "changes": "version INTEGER NOT NULL, time TEXT NOT NULL, op TEXT NOT NULL, record BLOB NOT NULL,"
    " chain BLOB NOT NULL",
    "snapshot": "part BLOB NOT NULL",
}
# What a chain covers, as bytes whatever a damaged row holds.
_LINKED = "CAST(ifnull(version || ' ' || time || ' ' || op || ' ', '') AS BLOB), CAST(ifnull(record, '') AS BLOB)"
_TYPES = "version IS rowid AND typeof(time) || typeof(op) || typeof(record) || typeof(chain) IS 'texttextblobblob'"
PART = 1 << 16  # bytes of a row of the snapshot, of which none is ever removed
FIX = "restore it from a copy, or begin a new log with a saved classifier; `iosr-fast info` lists what can be read"


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
    the name that it gave it, the ids of the images that it added or removed, how many classes and images there are
    after it, and the nodes above the class where it was added or moved below some.

    >>> LoggedChange(2, "2026-11-29T12:00:00.000+00:00", "rename_class", "~1", "apple", (), classes=2, images=0).op
    'rename_class'
    """

    version: int
    time: str
    op: str
    class_id: str
    name: str
    example_ids: tuple[str, ...]
    classes: int
    images: int
    path: tuple[str, ...] = ()


class LogRow(NamedTuple):
    """A row of `changes`."""

    version: int
    time: str
    op: str
    record: bytes
    chain: bytes

    def logged(self) -> LoggedChange:
        """It as callers see it. Raises ValueError for a record that is none."""
        fields = msgspec.structs.asdict(decode(self.op, self.record))
        uid = class_id(fields["uid"]) if "uid" in fields else ""
        ids = tuple(map(example_id, fields.get("numbers", ())))
        after = fields["classes"], fields["images"], fields.get("path", ())
        return LoggedChange(self.version, self.time, self.op, uid, fields.get("name", ""), ids, *after)


class LogReader:
    """What a file holds. All methods raise DamagedFileError."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        sqlite_file.check_schema(db, TABLES)
        rows = db.execute("SELECT rowid, base, last FROM meta LIMIT 2").fetchall()
        if len(rows) != 1 or [*map(type, rows[0])] != [int, str, bytes] or rows[0][0] != 1:
            raise DamagedFileError("it does not say what it begins with")
        text = rows[0][1].encode()
        self._last = rows[0][2][4:]
        try:
            self.base = msgspec.json.decode(text, type=Base)
        except ValueError as error:
            raise DamagedFileError(f"it does not say what it begins with ({error})") from error
        self.chain = hashlib.sha256(text).digest()  # of the rows that were read

    def snapshot(self) -> tuple[int, bytes, bytes]:
        """The version, the chain and the bytes of the head that was written; without one, of the base, and b""."""
        content = bytearray()
        for row, part in self._db.execute("SELECT rowid, part FROM snapshot ORDER BY rowid"):
            if type(part) is not bytes or len(part) != PART or row * PART != len(content) + PART:
                raise DamagedFileError("its snapshot was changed")
            content += part
        if not content:
            return self.base.version, self.chain, b""
        if hashlib.sha256(content[32:]).digest() != content[:32]:
            raise DamagedFileError("its snapshot was changed")
        body = memoryview(content)[40 : 40 + int.from_bytes(content[32:40])]
        version, chain, state = msgspec.msgpack.decode(body, type=tuple[int, bytes, bytes])
        return version, chain, state

    def rows(self, since: int = 0) -> Iterator[LogRow]:
        """The changes from version `since` on, after the chain of each was compared; then the structure of the file is
        checked."""
        version = self.base.version
        link = self.chain
        hashed = hashlib.sha256
        for row in self._db.execute(f"SELECT {_LINKED}, chain, version, time, op FROM changes ORDER BY rowid"):
            version += 1
            link = hashed(link + row[0] + row[1]).digest()  # _link, at half its time
            if row[2] != link or row[3] != version:
                raise DamagedFileError(f"the change to version {version} is missing or was changed, or one before it")
            if version >= since:
                yield LogRow(*row[3:], *row[1:3])
        self.chain = link
        if self._db.execute(f"SELECT 1 FROM changes WHERE NOT ({_TYPES})").fetchone():
            raise DamagedFileError("a change has values of other types")
        if self._last != self.chain:
            raise DamagedFileError(f"it should not end with the change to version {version}")
        sqlite_file.check_structure(self._db)


def read_log(path: str | Path) -> list[LoggedChange]:
    """The changes of a log, in their order, after checking the file. Raises IosrFastError for damage.

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
    with sqlite_file.naming(path, FIX), path.open("rb") as file:
        check_ours(path, file.fileno())
        with closing(sqlite_file.connect(path, "ro")) as db:
            db.execute("BEGIN")
            reader = LogReader(db)
            yield reader
            reader.snapshot()


def check_ours(path: Path, file: int) -> None:
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
