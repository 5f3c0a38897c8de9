"""Writing an audit log: changes line by line, and from time to time a snapshot of the state.

    changes.jsonl          lines since the last snapshot
    changes.jsonl.head     how far acknowledged changes go (log_format.LogHead)
    changes.jsonl.7.state  the state that changes.jsonl begins from, where that is not the bundle's own
    changes.jsonl.6.gz     the lines before that; only recovery and `read_log` read them

All are readable by their owner alone: they hold pictures.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import logging
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from iosr_fast.exceptions import DamagedFileError
from iosr_fast.head.head import Head
from iosr_fast.head.head_data import HeadData
from iosr_fast.store.bundle_schema import HeadFacts
from iosr_fast.store.changes import Change
from iosr_fast.store.head_files import head_from_files, head_to_files
from iosr_fast.store.log_format import FORMAT, Lines, LogHead, Mark, lock, make_line, write_all
from iosr_fast.utils.files import sync_folder
from iosr_fast.utils.temporaries import replacing


def private_file(target: Path) -> AbstractContextManager[Path]:
    """A temporary file that replaces `target`, readable by its owner alone. The head's lock keeps other writers out."""
    return replacing(target, target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp"), 0o600)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, on the disk when this returns."""
    if not folder.exists():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def numbered(path: Path, kind: str) -> dict[int, Path]:
    """The files NAME.<number>.<kind> beside a log, by their rising number."""
    form = re.compile(rf"{re.escape(path.name)}\.([0-9]+)\.{kind}")
    matches = ((form.fullmatch(other.name), other) for other in path.parent.iterdir())
    return dict(sorted((int(match[1]), other) for match, other in matches if match))


def file_of(path: Path, number: int, kind: str) -> Path:
    return path.with_name(f"{path.name}.{number}.{kind}")


def next_number(path: Path) -> int:
    """A number that no closed lines and no snapshot of this log have."""
    return 1 + max([0, *numbered(path, "gz"), *numbered(path, "state")])


def write_closed(path: Path, number: int, text: bytes) -> None:
    """Store lines that a snapshot replaces, compressed."""
    with (
        private_file(file_of(path, number, "gz")) as temporary,
        gzip.open(temporary, "wb", compresslevel=1) as file,
    ):
        file.write(text)


def write_state(path: Path, number: int, state: Head, facts: dict[str, Any]) -> dict[str, Any]:
    """Write a state beside the log, with `facts` of its place in the log; returns the log's entry for it."""
    from safetensors.numpy import save, save_file

    state_facts, arrays = head_to_files(state)
    content = json.dumps({**facts, "version": state.version, "state": state_facts}, sort_keys=True)
    files = {name: np.frombuffer(save(part), np.uint8) for name, part in arrays.items()}
    seal = _seal(content, files)
    with private_file(file_of(path, number, "state")) as temporary:
        save_file(files, temporary, {"about": content, "sha256": seal})
    return {"number": number, "sha256": seal}


def read_state(path: Path) -> tuple[Head, dict[str, Any]]:
    """A state that `write_state` wrote, bit-equal, and its facts with "sha256". OSError or ValueError if it is missing
    or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata()
            files = {name: file.get_tensor(name) for name in sorted(file.keys())}
        if _seal(metadata["about"], files) != metadata["sha256"]:
            raise DamagedFileError(f"{path} is damaged: it does not match its own checksum")
        about = json.loads(metadata["about"])
        facts = msgspec.convert(about.pop("state"), HeadFacts)
        head = head_from_files(facts, lambda name: files[name].tobytes() if name in files else None)
        state = head.one_label("a log")
    except (KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise DamagedFileError(f"{path} is damaged or no state of an audit log ({error})") from error
    return state, {**about, "sha256": metadata["sha256"]}


def _seal(about: str, files: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(about.encode())
    for name in sorted(files):
        digest.update(f"{name} {files[name].dtype} {files[name].shape}".encode())
        digest.update(files[name].data)
    return digest.hexdigest()


# A snapshot is written after so many changes, or bytes of them: what a restart has to make again.
MOST_LINES = 256
MOST_BYTES = 64 << 20
_log = logging.getLogger("iosr_fast")


class LogWriteError(OSError):
    """A change could not be written to the log, and was not made."""


@dataclass(frozen=True, eq=False)
class _End:
    """Where the file of lines ends when all up to `mark` is in it."""

    mark: Mark
    size: int


class AuditLog:
    """An open log. Made by `open_log`; not safe between threads: a classifier changes one step at a time.

    The caller's state decides: `append` writes the line that leads from it to another, and until the caller has that
    one, `settle` (which `append` begins with) takes the line back. So an interrupt at any moment leaves a log that goes
    with the state. `failure` says why the last change could not be written; "" where it could.
    """

    def __init__(self, path: Path, head: LogHead, base: str) -> None:
        self.path, self.failure = path, ""
        self.base = base
        self._head = head
        self._file = -1
        self._number = 0  # of the file of lines that is written to
        self._due = (0, 0)  # lines in all, or bytes of the file, at which the next snapshot is written
        self._ends: dict[int, _End] = {}  # by version: of the caller's state, and of the one it is about to have
        self._at: _End | None = None  # where files and head are known to end
        self._next: tuple[int, int, _End] | None = None  # a file that may have taken the log's place

    def append(self, update: Change, before: Head, after: Head) -> None:
        """Write the change that leads from one state to the other, and wait until it is on the disk.

        Raises LogWriteError where that fails: the caller keeps the state it has.
        """
        try:
            self.settle(before)
            end = self._ends[before.version]
            self._check_in_place(end, end.size)
            line, chain = make_line({**update.to_json(), "version": after.version}, end.mark.chain)
            appended = _End(Mark(end.mark.lines + 1, chain, after.version, self.base), end.size + len(line))
            self._at = None
            self._ends = {before.version: end, after.version: appended}
            os.lseek(self._file, end.size, os.SEEK_SET)
            write_all(self._file, line)
            os.fsync(self._file)
            self._head.put(appended.mark)
            self._at = appended
        except OSError as error:
            self.failure = error.strerror or str(error)
            message = f"the change was not made: it can't be logged ({self.failure})"
            raise LogWriteError(error.errno, message, str(self.path)) from error
        self.failure = ""

    def settle(self, state: HeadData) -> None:
        """Have the files end at `state`: takes back a line that leads on from it. Does nothing where they do."""
        if self._next is not None:
            file, number, end = self._next
            needless = file
            if self.path.exists() and os.path.samestat(os.fstat(file), self.path.stat()):
                needless, self._file = self._file, file
                self._number, self._due, self._at = number, _due_after(end), None
                self._ends = {end.mark.version: end}
            self._next = None
            if needless not in (-1, self._file):  # equal after an interrupt between these two steps
                os.close(needless)
        end = self._ends[state.version]
        if self._at is not end:
            self._check_in_place(end)
            self._head.put(end.mark)  # before the line goes: a head never counts more than there is
            os.ftruncate(self._file, end.size)
            os.fsync(self._file)
            self._at = end

    def compact(self, state: Head) -> None:
        """Where it is time, write `state` beside the log, which begins again from it. Logs a failure, and tries again
        after as many changes more."""
        end = self._ends[state.version]
        if end.mark.lines < self._due[0] and end.size < self._due[1]:
            return
        try:
            self.settle(state)
            self._check_in_place(end, end.size)
            write_closed(self.path, self._number, self.path.read_bytes())
            self.begin(state, end.mark, self._number + 1, snapshot=True)
        except OSError as error:
            _log.warning("%s grows on: the state can't be written beside it (%s)", self.path, error)
            self._due = _due_after(end)

    def begin(self, state: Head, mark: Mark, number: int, snapshot: bool, **facts: Any) -> None:
        """Put a file of lines in the log's place that begins at `mark`, and from a snapshot of `state` or its base."""
        about = {"base": self.base, "lines": mark.lines, "previous": mark.chain}
        entry = write_state(self.path, number, state, about) if snapshot else None
        opening = {
            "op": "open",
            "format": FORMAT,
            "number": number,
            "version": state.version,
            "snapshot": entry,
        }
        line, chain = make_line({**opening, **about, **facts}, mark.chain)
        self._head.put(mark)
        with private_file(self.path) as temporary:
            temporary.write_bytes(line)
            end = _End(Mark(mark.lines + 1, chain, state.version, self.base), len(line))
            self._next = (os.open(temporary, os.O_RDWR), number, end)
        self.settle(state)
        for other, path in numbered(self.path, "state").items():
            if other != number:
                path.unlink()

    def resume(self, lines: Lines, state: Head) -> None:
        """Continue with the file that is there, at the end of its whole lines."""
        flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0)
        self._file = os.open(self.path, flags)
        lock(self._file, self.path)  # which a process of an earlier version, that knows no head, holds
        self._number = lines.records[0].get("number") or next_number(self.path)
        if lines.records[0]["format"] == FORMAT:
            self._due = (lines.start[0] + 1 + MOST_LINES, MOST_BYTES)
        self._ends = {state.version: _End(Mark(lines.end, lines.chains[-1], state.version, self.base), lines.size)}
        self.settle(state)

    def _check_in_place(self, end: _End, most: float = float("inf")) -> None:
        """Raise OSError where somebody removed, replaced or cut a file while it was in use, or made it longer than
        `most`: a change that is written to such a file would be lost."""
        for path, file in ((self.path, self._file), (self._head.path, self._head.descriptor)):
            if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file)):
                raise OSError(errno.ESTALE, f"{path.name} was moved, replaced or removed while it was in use")
        if not end.size <= os.fstat(self._file).st_size <= most:
            raise OSError(errno.ESTALE, "somebody else wrote to it or cut it while it was in use")

    def try_to_settle(self, state: HeadData) -> None:
        """`settle`; where the disk fails, the next change does it, or is refused."""
        try:
            self.settle(state)
        except OSError as error:
            _log.warning("%s may end in a change that was not made (%s)", self.path, error)

    def close(self, state: HeadData) -> None:
        """Settle at `state`, where that is possible, and close the files."""
        try:
            self.try_to_settle(state)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close the files as they are."""
        for file in {self._file, self._next[0] if self._next else -1} - {-1}:
            os.close(file)
        self._head.close()


def _due_after(end: _End) -> tuple[int, int]:
    return end.mark.lines + MOST_LINES, end.size + MOST_BYTES
