"""A SQLite file of ours that may be damaged, in use, or made by somebody else: how it is opened and what is checked.

SQLite notices damage of its own structure, not of what rows hold (the log has hashes for that) nor of bytes that it
does not use. Our tables only grow, and a row is overwritten by one of the same length, so unused bytes are zero. The
format: https://www.sqlite.org/fileformat2.html
"""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from iosr_fast.exceptions import DamagedFileError, IosrFastError

PAGE = 4096
MAGIC = b"SQLite format 3\0"
APPLICATION_ID = 0x494F5352  # "IOSR", which tells our files from those of other programs
# The beginning of page 1, the header, less what changes: bytes 0 to 23, and 32 to 91 (of three tables, in UTF-8).
_BEGIN = MAGIC + bytes.fromhex("1000010100402020")
_REST = bytes(8) + b"".join(n.to_bytes(4) for n in (3, 4, 0, 0, 1, 0, 0, APPLICATION_ID)) + bytes(20)
_LEAF, _INNER = 13, 5  # pages of a table; those on which a long row goes on begin with a 0
_MOST, _LEAST = PAGE - 35, (PAGE - 12) * 32 // 255 - 23  # bytes of a row on its leaf
_SAFE = ("trusted_schema=OFF", "cell_size_check=ON", "mmap_size=0", "secure_delete=ON", "synchronous=FULL")
_MAJOR, _MINOR, _PATCH = sqlite3.sqlite_version_info
WRITER = (_MAJOR * 1_000_000 + _MINOR * 1_000 + _PATCH).to_bytes(4)  # as SQLite writes it into the header
_NOT_DAMAGE = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_FULL)
ReadPage = Callable[[int], bytes]  # by its number, from 1


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
    """A connection that runs no code of the file and begins no transaction by itself; `mode` is "ro" or "rw"."""
    if sqlite3.sqlite_version_info < (3, 31):
        raise IosrFastError(f"expected SQLite 3.31 or later, got {sqlite3.sqlite_version}: use a newer Python")
    db = sqlite3.connect(f"{path.as_uri()}?mode={mode}", uri=True, isolation_level=None, check_same_thread=False)
    protect(db)
    return db


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
    return header[:24] == _BEGIN and header[68:72] == _REST[36:40]


@contextmanager
def naming(path: Path, fix: str) -> Iterator[None]:
    """Raises damage as a DamagedFileError, and other errors of SQLite as OSErrors, that name the file."""
    try:
        yield
    except (DamagedFileError, IndexError, UnicodeDecodeError) as error:  # SQLite quotes a damaged schema
        raise DamagedFileError(f"{path} is damaged: {error}; {fix}") from error
    except sqlite3.Error as error:
        code = code_of(error)
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise in_use(path) from error
        if code in _NOT_DAMAGE:
            cut = "a start of the classifier takes back a change that was cut off"
            raise OSError(errno.EIO, f"the log can't be read ({error}); {cut}", str(path)) from error
        raise DamagedFileError(f"{path} is damaged: {error}; {fix}") from error


def code_of(error: Exception) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def check_bytes(page: ReadPage, size: int, writer: bytes, roots: int) -> None:
    """Raise DamagedFileError (or IndexError) unless a file of `size` bytes has our header with this WRITER of the last
    transaction, and zeros where nothing is. Of inner pages only roots are checked, pages 2 to `roots`: SQLite leaves
    old numbers on those below."""
    first = page(1)
    change, pages = first[24:28], (size // PAGE).to_bytes(4)
    header = _BEGIN + change + pages + _REST + change + writer
    if first[:100] != header or size % PAGE:
        raise DamagedFileError("its header is not that of a log, or of a log of another length")
    for number in range(1, size // PAGE + 1):
        data, at = page(number), 100 if number == 1 else 0
        kind = data[at]
        if kind != _LEAF and (kind != _INNER or number > roots):
            continue
        cells = at + (8 if kind == _LEAF else 12)
        end = cells + 2 * _number(data, at + 3)
        if any(data[end : _number(data, at + 5)]):
            raise DamagedFileError(f"page {number} has bytes where nothing was written")
        for cell in range(cells, end, 2) if kind == _LEAF else ():
            _check_tail(data, _number(data, cell), page)


def check_structure(db: sqlite3.Connection, tables: Mapping[str, str]) -> None:
    """Raise DamagedFileError unless these tables, and nothing else, are there and sound."""
    rows = db.execute("SELECT rowid, type, name, tbl_name, rootpage, sql FROM sqlite_schema").fetchall()
    made = enumerate(tables.items(), 1)
    if rows != [(i, "table", name, name, i + 1, f"CREATE TABLE {name}({columns})") for i, (name, columns) in made]:
        raise DamagedFileError("it has other tables than a log")
    if (found := db.execute("PRAGMA quick_check").fetchall()) != [("ok",)]:
        raise DamagedFileError(f"SQLite finds {found[0][0]}")


def _check_tail(leaf: bytes, cell: int, page: ReadPage) -> None:
    """That the last page of a long row has nothing after the row."""
    if leaf[cell] < 0x80 or (leaf[cell] < 0x9F and leaf[cell + 1] < 0x80):
        return  # shorter than a page
    length, cell = _varint(leaf, cell)
    if length <= _MOST:
        return
    _, cell = _varint(leaf, cell)
    here = _LEAST + (length - _LEAST) % (PAGE - 4)
    here = here if here <= _MOST else _LEAST
    following, rest, data = _number(leaf, cell + here, 4), length - here, b""
    while rest > 0:
        data = page(following)
        following, rest = _number(data, 0, 4), rest - (PAGE - 4)
    if following or any(data[PAGE + rest :]):
        raise DamagedFileError("a row has bytes after its end")


def _number(data: bytes, at: int, size: int = 2) -> int:
    return int.from_bytes(data[at : at + size])


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of up to nine bytes, of seven bits each but for the ninth, and the place after it."""
    value = 0
    for place in range(at, at + 8):
        value = value << 7 | data[place] & 0x7F
        if data[place] < 0x80:
            return value, place + 1
    return value << 8 | data[at + 8], at + 9
