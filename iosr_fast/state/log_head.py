"""The head of an audit log: a small file beside it that proves how far acknowledged changes go.

Two slots of 512 bytes, each one sector, are written in turn and in place: a write that a power cut tears leaves the
other slot, and a full disk still takes it. The log's lock is on this file, which is never replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

from iosr_fast.state.log_lines import Mark

_SLOT = 512


class Head:
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
        wrong = [i for i, held in enumerate(self.marks) if held is None or (held.lines >= mark.lines and held != mark)]
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
        """Close it; one that was only just made, and says nothing, goes."""
        if self.blank:
            self.path.unlink(missing_ok=True)
        os.close(self.descriptor)


def open_head(path: Path) -> Head:
    """Open a head for writing, or make a blank one. BlockingIOError where another process has it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
        try:
            lock(descriptor, path)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return Head(path, descriptor)
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
