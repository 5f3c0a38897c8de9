"""What an audit log consists of: lines in a chain of hashes, and a head that counts the acknowledged ones.

Lines are JSON, each with the SHA-256 over the chain of the line before and its own text. The chain and the count of
lines run through all files of a log (AuditLog.compact). The first line of a file says where in the chain it begins.

The head is a small file beside the log that proves how far acknowledged changes go. Its two slots of 512 bytes, each
one sector, are written in turn and in place: a torn write leaves the other slot, and a full disk still takes it. The
log's lock is on this file, which is never replaced.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from iosr_fast.exceptions import DamagedFileError

FORMAT = 2  # format 1 has no head, and its first line no place in the chain
OURS = b'{"base":"'  # how the first line of every format begins


class LogDamagedError(DamagedFileError):
    """Acknowledged changes are missing from a log, or it can't be proved that none are. Recovery opens it."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}; restore the log from a copy, or open it with recover=True (`iosr-fast serve --recover`), which "
            "keeps what is whole, says what it drops and leaves the files as they are now beside it"
        )


@dataclass(frozen=True)
class Mark:
    """A place between two lines: the `lines` before it, their `chain`, and the `version` of the state there; `base` is
    the fingerprint of the state that the log began from."""

    lines: int
    chain: str
    version: int
    base: str


@dataclass(frozen=True)
class Lines:
    """The verified part of a file of lines: `records` in order, `chains` after each, beginning at `start` (a count of
    lines and their chain), `size` bytes; `error`, why the next line is not valid; `rest`, half a line at the end."""

    start: tuple[int, str]
    records: list[dict[str, Any]]
    chains: list[str]
    size: int
    error: str
    rest: bytes

    @property
    def end(self) -> int:
        """The number of lines up to the end of the file."""
        return self.start[0] + len(self.records)

    def chain_at(self, lines: int) -> str | None:
        """The chain of the first `lines` lines; None if that place is not in this file."""
        at = lines - self.start[0]
        return ([self.start[1], *self.chains])[at] if 0 <= at <= len(self.chains) else None


def parse(path: Path, text: bytes) -> Lines:
    """Verify lines up to the first damaged one; never raises for their content."""
    start, chain, error, size = (0, ""), "", "", 0
    records: list[dict[str, Any]] = []
    chains: list[str] = []
    *whole, rest = text.split(b"\n")
    for number, raw in enumerate(whole, 1):
        try:
            record = json.loads(raw)
            claimed = record.pop("chain")
            if number == 1 and record["format"] != 1:
                start = int(record["lines"]), str(record["previous"])
                chain = start[1]
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as problem:
            error = f"line {number} of {path} is damaged ({problem})"
            break
        chain = _chained(record, chain)
        if claimed != chain or raw != _text({**record, "chain": chain}):
            error = f"line {number} of {path} was changed, or one before it is missing"
            break
        records.append(record)
        chains.append(chain)
        size += len(raw) + 1
    return Lines(start, records, chains, size, error, b"" if error else rest)


def make_line(record: dict[str, Any], chain: str) -> tuple[bytes, str]:
    """A record with the time as a line that follows `chain`, and the chain after it."""
    dated = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **record}
    chain = _chained(dated, chain)
    return _text({**dated, "chain": chain}) + b"\n", chain


def read_lines(path: Path) -> bytes:
    """The bytes of a file of lines, be it in use or closed (.gz). OSError, or ValueError for a damaged one."""
    data = path.read_bytes()
    try:
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DamagedFileError(f"{path} is damaged ({error})") from error


def _chained(record: dict[str, Any], chain: str) -> str:
    return hashlib.sha256(chain.encode() + _text(record)).hexdigest()


def _text(record: dict[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


_SLOT = 512


class LogHead:
    """An open head, locked. `marks` are its two slots, None where one is damaged; `blank` says that nothing was ever
    written to it."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor
        data = os.read(descriptor, 2 * _SLOT + 1)
        self.blank = not data.strip(b"\0")
        self.marks = [_mark(data[i * _SLOT : (i + 1) * _SLOT]) for i in (0, 1)]
        if len(data) > 2 * _SLOT:
            self.marks = [None, None]

    @property
    def mark(self) -> Mark | None:
        """The newest slot; None where both are damaged or they contradict one another."""
        whole = [mark for mark in self.marks if mark is not None]
        newest = max(whole, key=lambda mark: mark.lines, default=None)
        return None if any(mark != newest and mark.lines == newest.lines for mark in whole if newest) else newest

    def put(self, mark: Mark) -> None:
        """Have the head say `mark` and nothing newer, and wait until that is on the disk. Writes no slot in vain."""
        wrong = [i for i, old in enumerate(self.marks) if old is None or (old.lines >= mark.lines and old != mark)]
        if not wrong and mark not in self.marks:
            wrong = [min((0, 1), key=lambda i: self.marks[i].lines)]  # type: ignore[union-attr]
        if not wrong:
            return
        for i in wrong:
            self.marks[i] = None
        if len(wrong) == 2:
            os.ftruncate(self.descriptor, 2 * _SLOT)
        os.lseek(self.descriptor, wrong[0] * _SLOT, os.SEEK_SET)
        write_all(self.descriptor, _slot(mark) * len(wrong))
        os.fsync(self.descriptor)
        for i in wrong:
            self.marks[i] = mark
        self.blank = False

    def close(self) -> None:
        """Close it, and remove it if nothing was written to it."""
        if self.blank:
            self.path.unlink(missing_ok=True)
        os.close(self.descriptor)


def open_head(path: Path) -> LogHead:
    """Open a head for writing, or make a blank one. BlockingIOError where another process has it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
        try:
            lock(descriptor, path)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return LogHead(path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # it was blank, and was removed before this process had the lock


def read_head(path: Path) -> Mark | None:
    """What the head says, without a lock; None where there is none or it is damaged."""
    if not path.is_file():
        return None
    data = path.read_bytes()
    whole = [mark for i in (0, 1) if (mark := _mark(data[i * _SLOT : (i + 1) * _SLOT])) is not None]
    return max(whole, key=lambda mark: mark.lines, default=None)


def write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _slot(mark: Mark) -> bytes:
    facts = asdict(mark)
    return _sealed(facts).ljust(_SLOT - 1) + b"\n"


def _sealed(facts: dict[str, object]) -> bytes:
    content = json.dumps(facts, sort_keys=True)
    return json.dumps({**facts, "sha256": hashlib.sha256(content.encode()).hexdigest()}, sort_keys=True).encode()


def _mark(data: bytes) -> Mark | None:
    try:
        facts = json.loads(data)
        del facts["sha256"]
        mark = Mark(**facts)
        return mark if _slot(mark) == data else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def lock(descriptor: int, path: Path) -> None:
    """Keep other processes out, until the file is closed. Not on Windows, which has no such lock."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(error.errno, "another process writes this log", str(path)) from error
