"""Results of a long run, kept where a kill can't take them: a file of lines beside the output, until that is written.

The first line says what the run is; each further one is a chunk of results, in order. A line is the SHA-256 of the rest
of it and JSON. What a kill or a power cut leaves of a line is no line, and the chunk is computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

_SYNC_S = 1.0  # results of the last second may be computed again after a power cut; a kill loses none


class Journal:
    """Chunks of one run in a file that this process holds. Make one with `open_journal`."""

    def __init__(self, path: Path, file: BinaryIO, chunks: int) -> None:
        self.path, self.chunks = path, chunks
        self._file = file
        self._synced = time.monotonic()

    def append(self, rows: list[Any]) -> None:
        """Write the next chunk: JSON values, which come back as they are."""
        self._file.write(_line(rows))
        self._file.flush()
        self.chunks += 1
        if time.monotonic() - self._synced > _SYNC_S:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def read(self) -> Iterator[list[Any]]:
        """The chunks in order, from the file: one at a time is held."""
        with self.path.open("rb") as file:
            file.readline()
            for _ in range(self.chunks):
                rows: list[Any] = _content(file.readline())
                yield rows

    def remove(self) -> None:
        self.path.unlink()


@contextmanager
def open_journal(path: Path, facts: Mapping[str, Any]) -> Iterator[Journal]:
    """The journal of the run that `facts` (JSON values by their names) describe: a new one, or the one that is there.

    Raises ValueError where that is of another run or no journal, FileExistsError where another process holds it.
    """
    with path.open("a+b") as file:
        _lock(file, path)
        file.seek(0)
        first = file.readline()
        if first.endswith(b"\n"):
            _compare(path, _facts(path, first), dict(facts))
        else:  # new, or killed before it began
            if first and not _line(dict(facts)).startswith(first):
                raise ValueError(
                    f"expected a journal of iosr-fast classify at {path}, found another file; move it away"
                )
            file.truncate(0)
            file.write(_line(dict(facts)))
            file.flush()
            os.fsync(file.fileno())
        yield Journal(path, file, _whole_chunks(file))


def _whole_chunks(file: BinaryIO) -> int:
    """Count the whole lines after the first, and cut off what is behind them."""
    file.seek(0)
    end, chunks = len(file.readline()), 0
    for line in file:
        try:
            _content(line)
        except ValueError:
            break
        end, chunks = end + len(line), chunks + 1
    file.truncate(end)
    file.seek(end)
    return chunks


def _line(content: Any) -> bytes:
    text = json.dumps(content, separators=(",", ":")).encode()
    return hashlib.sha256(text).hexdigest().encode() + b" " + text + b"\n"


def _content(line: bytes) -> Any:
    digest, _, text = line.partition(b" ")
    if not text.endswith(b"\n") or hashlib.sha256(text[:-1]).hexdigest().encode() != digest:
        raise ValueError("not a whole line")
    return json.loads(text)


def _facts(path: Path, line: bytes) -> dict[str, Any]:
    try:
        return dict(_content(line))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged or no journal of iosr-fast classify; remove it to begin again, or choose another output"
        ) from error


def _compare(path: Path, there: dict[str, Any], now: dict[str, Any]) -> None:
    told = [
        f"{name} (there {there.get(name)}, now {now.get(name)})"
        for name in sorted({*there, *now})
        if there.get(name) != now.get(name)
    ]
    if told:
        raise ValueError(
            f"{path} holds the results of another run, which differs in {'; '.join(told)}: give what that run was "
            "given to go on with it, or remove the file to begin again"
        )


def _lock(file: BinaryIO, path: Path) -> None:
    """Keep a second run out while this one lives; the system lets go of it whatever this one dies of."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise FileExistsError(f"another run holds {path}; wait for it or choose another output") from error
    except OSError:
        return  # a file system without locks
    with suppress(FileNotFoundError):
        if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
            return
    raise FileExistsError(f"another run has just finished with {path}; its output is there")
