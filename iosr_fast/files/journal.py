"""Results of a long run, stored beside the output until that is written, in a file of lines that survives a kill.

The first line describes the run; each further line is a chunk of results, in order. A line has a SHA-256 and then JSON.
A line that a kill or a power cut truncated is dropped, and its chunk is computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from iosr_fast.exceptions import IosrFastError
from iosr_fast.files.resume import differences
from iosr_fast.utils.temporaries import is_open_at, try_lock

_SYNC_S = 1.0  # a power cut loses the results of at most this time; a kill loses none


class Journal:
    """Chunks of one run in a file that this process has locked. `open_journal` creates one."""

    def __init__(self, path: Path, file: BinaryIO, chunks: int) -> None:
        self.path, self.chunks = path, chunks
        self._file = file
        self._synced = time.monotonic()

    def append(self, rows: list[Any]) -> None:
        """Write the next chunk, of JSON values."""
        self._file.write(_line(rows))
        self._file.flush()
        self.chunks += 1
        if time.monotonic() - self._synced > _SYNC_S:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def read(self) -> Iterator[list[Any]]:
        """The chunks in order, one in memory at a time."""
        with self.path.open("rb") as file:
            file.readline()
            for _ in range(self.chunks):
                rows: list[Any] = _content(file.readline())
                yield rows

    def remove(self) -> None:
        self.path.unlink()


@contextmanager
def open_journal(path: Path, facts: Mapping[str, Any]) -> Iterator[Journal]:
    """The new or existing journal of the run that `facts` (JSON values by name) describe.

    Raises ValueError for another run's journal and for other files, FileExistsError while another process uses it.
    """
    with path.open("a+b") as file:
        if try_lock(file.fileno()) is False:
            raise FileExistsError(f"another run holds {path}; wait for it or choose another output")
        if not is_open_at(file.fileno(), path):
            raise FileExistsError(f"another run has just finished and removed {path}; its output exists")
        file.seek(0)
        first = file.readline()
        if first.endswith(b"\n"):
            if different := differences(_facts(path, first), facts):
                raise IosrFastError(
                    f"{path} holds the results of another run, which differs in {different}: resume with that run's "
                    "input and options, or remove the file to start again"
                )
        else:  # new, or killed while the first line was written
            if first and not _line(dict(facts)).startswith(first):
                raise IosrFastError(
                    f"expected a journal of iosr-fast classify at {path}, found another file; move it away"
                )
            file.truncate(0)
            file.write(_line(dict(facts)))
            file.flush()
            os.fsync(file.fileno())
        yield Journal(path, file, _complete_chunks(file))


def _complete_chunks(file: BinaryIO) -> int:
    """Count the complete lines after the first, and cut off the rest."""
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
        raise IosrFastError("incomplete line")
    return json.loads(text)


def _facts(path: Path, line: bytes) -> dict[str, Any]:
    try:
        return dict(_content(line))
    except (ValueError, TypeError) as error:
        raise IosrFastError(
            f"{path} is damaged or not a journal of iosr-fast classify; remove it to start again, or choose another "
            "output"
        ) from error
