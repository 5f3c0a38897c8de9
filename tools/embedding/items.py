"""What is to be embedded, as a sorted list of items, and its cut into chunks: one chunk becomes one part file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.images.listing import IMAGE_SUFFIXES, Skipped, walk
from iosr_fast.images.preprocess import BadImageError, open_bytes, resize_and_crop


@dataclass(frozen=True, slots=True)
class Item:
    """One image: `size` bytes from `offset` of the file `path`; -1 is to the end.

    `key` names it for good; `stamp` (sizes and times) changes when the bytes do, as far as the file system tells;
    `fault` says why there is nothing to read.
    """

    key: str
    path: str
    stamp: str
    offset: int = 0
    size: int = -1
    fault: str | None = None


@dataclass(frozen=True)
class Chunk:
    """Items of fixed membership. `rows` holds what their rows carry over from the input, as an Arrow IPC stream."""

    number: int
    items: list[Item]
    rows: bytes = field(default=b"", repr=False)

    def digest(self) -> str:
        """Changes with the keys, with the images' stamps and with the rows carried over."""
        digest = hashlib.sha256(json.dumps([(item.key, item.stamp, item.fault) for item in self.items]).encode())
        digest.update(self.rows)
        return digest.hexdigest()


@dataclass(frozen=True)
class Source:
    """An input: how to name it in a plan, its items in order, where chunks must not cross (starts of the groups), and
    the table (pyarrow, a row an item) whose rows are carried over."""

    described: dict[str, Any]
    items: list[Item]
    group_starts: tuple[int, ...] = (0,)
    rows: Any = None

    def keys_digest(self) -> str:
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(item.key.encode() + b"\0")
        return digest.hexdigest()

    def faults(self) -> list[Item]:
        return [item for item in self.items if item.fault is not None]

    def cut(self, size: int) -> list[Chunk]:
        """Contiguous runs of at most `size` items, which end where a group (a shard) ends."""
        bounds = [*self.group_starts, len(self.items)]
        chunks: list[Chunk] = []
        for first, end in pairwise(bounds):
            for start in range(first, end, size):
                stop = min(start + size, end)
                rows = b"" if self.rows is None else _ipc(self.rows.slice(start, stop - start))
                chunks.append(Chunk(len(chunks), self.items[start:stop], rows))
        return chunks


def _ipc(table: Any) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return bytes(sink.getvalue())


def check_keys(items: Iterable[Item], what: str) -> None:
    """Raise ValueError for a key that occurs twice or that is not UTF-8: keys are how one sees that nothing is lost."""
    seen: set[str] = set()
    for item in items:
        try:
            item.key.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"expected names in UTF-8 in {what}, got {item.key!r}; rename it") from error
        if item.key in seen:
            raise ValueError(f"expected each image once in {what}, got {item.key} more than once; leave one of them")
        seen.add(item.key)


def folder_source(folder: Path) -> Source:
    """The images of a folder and of all below it (pipeline.listing); a warning says what was left out."""
    skipped = Skipped()
    items = [
        Item(Path(path).relative_to(folder).as_posix(), path, stamp_of(status))
        for path, status in walk(folder, skipped=skipped)
    ]
    if not items:
        told = f"; skipped {skipped.summary()}" if skipped.total else ""
        raise ValueError(f"expected images ({', '.join(sorted(IMAGE_SUFFIXES))}) in {folder}, found none{told}")
    skipped.warn(folder, len(items))
    items.sort(key=lambda item: item.key)
    check_keys(items, str(folder))
    return Source({"kind": "folder", "path": str(folder)}, items)


def stamp_of(status: os.stat_result) -> str:
    return f"{status.st_size}-{status.st_mtime_ns}"


def load_pixels(item: Item, size: int, exif_orientation: bool = True) -> np.ndarray | BadImageError:
    """(size, size, 3) uint8 as iosr_fast.images.preprocess makes them, or why there are none."""
    where = Path(item.key if item.offset or item.size >= 0 else item.path)
    if item.fault is not None:
        return BadImageError(where, 0, item.fault)
    try:
        with open(item.path, "rb") as file:
            file.seek(item.offset)
            data = file.read(item.size)
        if item.size >= 0 and len(data) != item.size:
            return BadImageError(where, 0, f"expected {item.size} bytes of it in {item.path}, found {len(data)}")
        return resize_and_crop(open_bytes(data, where, 0, exif_orientation), size)
    except BadImageError as error:
        return error
    except OSError as error:
        return BadImageError(where, 0, str(error))
