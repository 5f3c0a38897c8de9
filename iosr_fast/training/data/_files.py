"""What the formats share: digests, stamps of files, and files written whole or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import numpy as np

from iosr_fast.utils.files import new_file


def digest(parts: Iterable[str | np.ndarray]) -> str:
    """SHA-256 over texts and arrays, each preceded by its length, so that no two lists of parts run together."""
    hasher = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else np.ascontiguousarray(part).data
        hasher.update(f"{memoryview(data).nbytes}:".encode())
        hasher.update(data)
    return hasher.hexdigest()


def stamp(path: str | Path) -> str:
    """Size in bytes and time of change in nanoseconds of a file. Raises FileNotFoundError without it."""
    found = os.stat(path)
    return f"{found.st_size} {found.st_mtime_ns}"


@contextmanager
def new_text_file(path: Path) -> Iterator[TextIO]:
    """A temporary file (UTF-8, line ends as written) that takes the place of `path` when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        yield file
