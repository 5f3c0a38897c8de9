"""A SQLite file of ours that may be damaged, in use, or made by somebody else: how it is opened and what is checked.

SQLite notices damage of its own structure, not of what rows hold: the log has hashes for that. Bytes that nothing reads
may change unnoticed. The format: https://www.sqlite.org/fileformat2.html
"""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from iosr_fast.exceptions import DamagedFileError, IosrFastError

PAGE = 4096
MAGIC = b"SQLite format 3\0"
APPLICATION_ID = 0x494F5352  # "IOSR", which tells our files from those of other programs
# Bytes 0 to 23 of a file of ours: pages of 4096 bytes, no write-ahead log, no bytes of a page reserved.
_BEGIN = MAGIC + bytes.fromhex("1000010100402020")
_SAFE = ("trusted_schema=OFF", "cell_size_check=ON", "mmap_size=0", "secure_delete=ON", "synchronous=FULL")
_STEPS = 1_000_000  # of a statement's program, besides one for each byte of the file; a log takes a fifth of that
_NOT_DAMAGE = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_FULL)


def check_place(path: Path) -> None:
    """Raise IosrFastError for links, folders and devices."""
    for one in (path, path.with_name(f"{path.name}-journal")):
        if os.path.lexists(one) and not stat.S_ISREG(one.lstat().st_mode):
            raise IosrFastError(
                f"expected {one} to be a regular file or not to exist, got something else: name another"
            )


def lock(path: Path, flags: int = 0) -> int:
    """A descriptor of the file that keeps other writers out (not on Windows, which has no such lock). Raises
    BlockingIOError where there is one."""
    file = os.open(path, flags | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0), 0o600)
    try:
        with suppress(ImportError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not is_at(file, path):
            raise BlockingIOError
    except BlockingIOError as error:
        os.close(file)
        raise in_use(path) from error
    return file


def in_use(path: Path) -> BlockingIOError:
    return BlockingIOError(errno.EWOULDBLOCK, "another process writes this log", str(path))


def is_at(file: int, path: Path) -> bool:
    """Whether the open file is the one at this place."""
    return path.exists() and os.path.samestat(os.fstat(file), path.stat())


def connect(path: Path, mode: str) -> sqlite3.Connection:
    """A connection that runs no code of the file and begins no transaction by itself; `mode` is "ro" or "rw".

    A statement that takes more steps than an honest file of this size needs is interrupted: pages of a forged one can
    be each other's children. `trust` ends that.
    """
    if sqlite3.sqlite_version_info < (3, 31):
        raise IosrFastError(f"expected SQLite 3.31 or later, got {sqlite3.sqlite_version}: use a newer Python")
    db = sqlite3.connect(f"{path.as_uri()}?mode={mode}", uri=True, isolation_level=None, check_same_thread=False)
    db.set_progress_handler(lambda: True, _STEPS + path.stat().st_size)
    protect(db)
    return db


def trust(db: sqlite3.Connection) -> None:
    """Count no more steps, after the file was checked: SQLite adds up those of a statement that runs again."""
    db.set_progress_handler(None, 0)


def protect(db: sqlite3.Connection) -> None:
    """Switch off what a file could make SQLite do."""
    if hasattr(db, "setconfig"):  # Python 3.12
        for name, value in (("DEFENSIVE", True), ("ENABLE_TRIGGER", False), ("ENABLE_VIEW", False)):
            db.setconfig(getattr(sqlite3, f"SQLITE_DBCONFIG_{name}"), value)
    for setting in _SAFE:
        db.execute(f"PRAGMA {setting}")


def create(path: Path, tables: Mapping[str, str]) -> sqlite3.Connection:
    """A connection to the empty file that is there, after making these tables, columns by name."""
    db = connect(path, "rw")
    for pragma in (f"page_size={PAGE}", "encoding='UTF-8'", "auto_vacuum=NONE", f"application_id={APPLICATION_ID}"):
        db.execute(f"PRAGMA {pragma}")
    for name, columns in tables.items():
        db.execute(f"CREATE TABLE {name}({columns})")
    return db


def is_ours(header: bytes) -> bool:
    """Whether the first 100 bytes may be of a file of ours, which SQLite opens without another file beside it."""
    return header[:24] == _BEGIN and header[68:72] == APPLICATION_ID.to_bytes(4)


@contextmanager
def naming(path: Path, fix: str) -> Iterator[None]:
    """Raises damage as a DamagedFileError, and other errors of SQLite as OSErrors, that name the file."""
    try:
        yield
    except (DamagedFileError, UnicodeDecodeError) as error:  # SQLite quotes a damaged schema
        raise DamagedFileError(f"{path} is damaged: {error}; {fix}") from error
    except sqlite3.Error as error:
        code = code_of(error)
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise in_use(path) from error
        if code in _NOT_DAMAGE:
            cut = "a start of the classifier takes back a change that was cut off"
            raise OSError(errno.EIO, f"it can't be read or written ({error}); {cut}", str(path)) from error
        reason = "reading it never ends" if code == sqlite3.SQLITE_INTERRUPT else str(error)
        raise DamagedFileError(f"{path} is damaged: {reason}; {fix}") from error


def code_of(error: Exception) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def check_schema(db: sqlite3.Connection, tables: Mapping[str, str]) -> None:
    """Raise DamagedFileError unless there are these tables and nothing else. Nothing else may be read before: a view
    with the name of a table is a program of whoever made the file."""
    rows = db.execute("SELECT rowid, type, name, tbl_name, rootpage, sql FROM sqlite_schema").fetchall()
    made = enumerate(tables.items(), 1)
    if rows != [(i, "table", name, name, i + 1, f"CREATE TABLE {name}({columns})") for i, (name, columns) in made]:
        raise DamagedFileError("it has other tables than a log")


def check_structure(db: sqlite3.Connection) -> None:
    """Raise DamagedFileError where SQLite finds the pages damaged."""
    ((verdict,), *_) = db.execute("PRAGMA quick_check")
    if verdict != "ok":
        raise DamagedFileError(f"SQLite finds {verdict.splitlines()[-1]}")
