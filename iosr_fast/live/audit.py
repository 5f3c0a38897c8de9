"""The audit log of a running classifier: JSON lines, one a change, from which its state can be made again.

Each line has the change (changes.Update), the version that it made, the time, and `chain`, the SHA-256 over the chain
of the line before and its own text, so that a line that was altered, left out or moved is found. The first line names
the state that the changes begin from. A line is on the disk before its change is seen by anybody.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from iosr_fast.live.changes import Update
from iosr_fast.live.state import State

FORMAT = 1
_log = logging.getLogger("iosr_fast")


class AuditLog:
    """An open log at its end. Made by `open_log`; not safe between threads: a classifier changes one step at a time."""

    def __init__(self, path: Path, file: IO[bytes], chain: str) -> None:
        self.path = path
        self._file = file
        self._chain = chain

    def append(self, update: Update, version: int) -> None:
        """Write a change and wait until it is on the disk. Raises OSError where that fails; the log is as before."""
        self._write({**update.to_json(), "version": version})

    def _write(self, record: dict[str, Any]) -> None:
        line, chain = _line(record, self._chain)
        before = self._file.tell()
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.seek(before)
            self._file.truncate()
            raise OSError(
                error.errno, f"the change was not made: it can't be logged ({error.strerror})", str(self.path)
            ) from error
        self._chain = chain

    def close(self) -> None:
        self._file.close()


def open_log(path: str | Path, state: State) -> tuple[AuditLog, State]:
    """Open a log for writing and make its changes on `state`; a new log begins with `state`.

    A last line that a crash cut short is dropped with a warning: its change was never seen. Raises ValueError for a log
    that begins from another state or is damaged, naming the line; BlockingIOError where another process has it open.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    file = os.fdopen(descriptor, "r+b", buffering=0)
    try:
        _lock(file, path)
        text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            _log.warning("%s ends in half a line, which is dropped: its change was never made", path)
            file.truncate(len(whole))
        file.seek(len(whole))
        if not whole:
            log = AuditLog(path, file, "")
            log._write({"op": "open", "format": FORMAT, "base": state.fingerprint(), "version": state.version})
            return log, state
        state, chain = _replay(path, whole, state)
        return AuditLog(path, file, chain), state
    except BaseException:
        file.close()
        raise


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a log as written, verified by their chain; the first is what it begins from. Raises ValueError."""
    path = Path(path)
    lines, _ = _verified(path, path.read_bytes())
    return lines


def _replay(path: Path, text: bytes, state: State) -> tuple[State, str]:
    lines, chain = _verified(path, text)
    first = lines[0]
    if first.get("op") != "open" or first.get("format") != FORMAT:
        raise ValueError(f"expected {path} to begin with a line of format {FORMAT}, got {first.get('format')}")
    if first["base"] != state.fingerprint():
        raise ValueError(
            f"{path} is the log of another state: expected one that begins from {state.fingerprint()[:12]}, got "
            f"{str(first['base'])[:12]}; load the bundle it was begun with, or begin a new log"
        )
    for number, line in enumerate(lines[1:], 2):
        try:
            state = Update.from_json(line, state.text.shape[1]).apply(state)
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            raise ValueError(f"line {number} of {path} can't be applied: {error}") from error
        if state.version != line["version"]:
            raise ValueError(f"line {number} of {path}: expected version {state.version}, got {line['version']}")
    return state, chain


def _verified(path: Path, text: bytes) -> tuple[list[dict[str, Any]], str]:
    made, chain = [], ""
    for number, raw in enumerate(text.split(b"\n")[:-1], 1):
        try:
            line = json.loads(raw)
            told = line.pop("chain")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"line {number} of {path} is damaged ({error})") from error
        chain = _chained(line, chain)
        if told != chain or raw != _text({**line, "chain": chain}):
            raise ValueError(f"line {number} of {path} was changed, or one before it is missing")
        made.append(line)
    return made, chain


def _line(record: dict[str, Any], chain: str) -> tuple[bytes, str]:
    dated = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **record}
    chain = _chained(dated, chain)
    return _text({**dated, "chain": chain}) + b"\n", chain


def _chained(record: dict[str, Any], chain: str) -> str:
    return hashlib.sha256(chain.encode() + _text(record)).hexdigest()


def _text(record: dict[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _lock(file: IO[bytes], path: Path) -> None:
    """So that two processes can't write one log. Not on Windows, which has no such lock."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(error.errno, "another process writes this log", str(path)) from error
