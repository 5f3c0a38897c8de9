"""The input of a run: a sorted list of images, cut into chunks. One chunk becomes one part file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.exceptions import BadImageError, IosrFastError
from iosr_fast.images.decode import DecodedBatch, decode_pixels
from iosr_fast.images.geometry import Geometry


@dataclass(frozen=True, slots=True)
class Item:
    """One image: `size` bytes from `offset` of the file `path`; -1 is to the end.

    `key` identifies it in the output; `stamp` (size and time of change of its file) changes with its bytes; `fault` is
    the reason why it can't be read, or None.
    """

    key: str
    path: str
    stamp: str
    offset: int = 0
    size: int = -1
    fault: str | None = None


@dataclass(frozen=True)
class Chunk:
    """Consecutive items. `rows` has the carried columns of the input, as an Arrow IPC stream."""

    number: int
    items: list[Item]
    rows: bytes = field(default=b"", repr=False)

    def digest(self) -> str:
        """Changes with the keys, the images' stamps and the carried rows."""
        digest = hashlib.sha256(json.dumps([(item.key, item.stamp, item.fault) for item in self.items]).encode())
        digest.update(self.rows)
        return digest.hexdigest()

    def columns(self) -> Any:
        """The carried rows as a pyarrow.Table, or None."""
        if not self.rows:
            return None
        import pyarrow as pa

        with pa.ipc.open_stream(self.rows) as reader:
            return reader.read_all()


@dataclass(frozen=True)
class Source:
    """An input.

    described     its entry in the plan
    items         in order
    group_starts  where groups (shards) start: no chunk crosses one
    rows          a pyarrow.Table with the carried columns, one row per item, or None
    """

    described: dict[str, Any]
    items: list[Item]
    group_starts: tuple[int, ...] = (0,)
    rows: Any = None

    def keys_digest(self) -> str:
        """SHA-256 over the keys, in order."""
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(item.key.encode() + b"\0")
        return digest.hexdigest()

    def check_faults(self, skip_bad: bool) -> None:
        """Raise ValueError, unless `skip_bad`, for images that the listing already shows to be unreadable."""
        faults = [item for item in self.items if item.fault is not None]
        if faults and not skip_bad:
            raise IosrFastError(
                f"{len(faults)} of {len(self.items)} images can't be read, the first is {faults[0].key}: "
                f"{faults[0].fault}; repair the input, or pass --skip-bad"
            )

    def cut(self, size: int) -> list[Chunk]:
        """Contiguous runs of at most `size` items within the groups."""
        chunks: list[Chunk] = []
        for first, end in pairwise([*self.group_starts, len(self.items)]):
            for start in range(first, end, size):
                stop = min(start + size, end)
                rows = b"" if self.rows is None else _arrow_stream(self.rows.slice(start, stop - start))
                chunks.append(Chunk(len(chunks), self.items[start:stop], rows))
        return chunks


def _arrow_stream(table: Any) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return bytes(sink.getvalue())


class ItemDecoder:
    """A Decoder of items with `resize_and_crop`'s pixels, to the last bit."""

    name = "items"

    def __init__(self, exif_orientation: bool = True) -> None:
        self.exif_orientation = exif_orientation

    def decode(self, sources: Sequence[Item], geometry: Geometry, start: int = 0) -> DecodedBatch:
        return DecodedBatch.collect([self._decode_one(item, geometry) for item in sources])

    def _decode_one(self, item: Item, geometry: Geometry) -> np.ndarray | BadImageError:
        name = Path(item.key if item.offset or item.size >= 0 else item.path)
        if item.fault is not None:
            return BadImageError(name, 0, item.fault)
        try:
            with open(item.path, "rb") as file:
                file.seek(item.offset)
                data = file.read(item.size)
            if item.size >= 0 and len(data) != item.size:
                return BadImageError(name, 0, f"expected {item.size} bytes of it in {item.path}, found {len(data)}")
            return decode_pixels(data, geometry, name=name, exact=True, exif_orientation=self.exif_orientation)
        except BadImageError as error:
            return error
        except OSError as error:
            return BadImageError(name, 0, str(error))


def stamp_of(status: os.stat_result) -> str:
    """Size in bytes and time of change in nanoseconds of a file."""
    return f"{status.st_size}-{status.st_mtime_ns}"


def check_keys(items: Iterable[Item], where: str) -> None:
    """Raise ValueError for a key that occurs twice or is not UTF-8."""
    seen: set[str] = set()
    for item in items:
        try:
            item.key.encode()
        except UnicodeEncodeError as error:
            raise IosrFastError(f"expected names in UTF-8 in {where}, got {item.key!r}; rename it") from error
        if item.key in seen:
            raise IosrFastError(f"expected each image once in {where}, got {item.key} more than once; remove one")
        seen.add(item.key)


def check_carried(names: Iterable[str], own: Iterable[str]) -> None:
    """Raise ValueError if a carried column has the name of one of a part's `own` columns."""
    if taken := sorted(set(names) & set(own)):
        raise IosrFastError(
            f"expected --keep-columns without {list(own)}, which are a part's own columns, got {taken}; rename them in "
            "the input"
        )
