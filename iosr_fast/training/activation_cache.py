"""The activations of the frozen stem, computed once for each view of each picture and cached in a memory-mapped file.

A row is written when it is first computed, and read afterwards by this process, the next run, or another process on the
same machine. A row counts as cached only if its checksum is right: rows damaged by a kill or a disk are recomputed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import mmap
import os
import re
import shutil
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from iosr_fast.exceptions import IosrFastError

logger = logging.getLogger(__name__)

FORMAT = 1
DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
_PAGE = 4096
_FILLED = np.uint64(1 << 32)  # above the 32 bits of the CRC, of which 0 is a valid one
_OURS = re.compile(r"[0-9a-f]{32}\.activations(\.json)?(\.tmp)?")


class ActivationCache:
    """A memory-mapped file of the stem's outputs for `count` pictures in `views` views each.

    `key` (JSON values) has all that the outputs depend on: fingerprints of the CLIP and of the pictures, first adapted
    block, size, augmentation, seed. Its hash, with the sizes and the dtype, names the file `folder/<hash>.activations`;
    the header beside it has all of them. A file without its header, or of another size, is replaced. `shapes` are those
    of one row's parts, without the batch: ((tokens, width), (tokens, width)). `dtype` is float16 or bfloat16.

    The whole file is allocated at once, so a full disk raises OSError before any work.
    """

    def __init__(
        self,
        folder: Path,
        key: Mapping[str, Any],
        count: int,
        views: int,
        shapes: Sequence[tuple[int, ...]],
        dtype: torch.dtype = torch.float16,
    ) -> None:
        self._starts, size = _layout(count, views, shapes)
        self.shapes = tuple(tuple(shape) for shape in shapes)
        self.views, self.dtype, self.bytes = views, dtype, size
        header = _header(key, count, views, self.shapes, DTYPES[dtype], size)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{hashlib.sha256(header.encode()).hexdigest()[:32]}.activations"
        self._header_path = _header_of(self.path)
        with _folder_lock(folder):
            if not self._exists(header):
                self._allocate(header)
            self._file = self.path.open("r+b")
            _lock(self._file.fileno(), shared=True)  # `prune` leaves files in use alone
        mapped = np.frombuffer(mmap.mmap(self._file.fileno(), size), np.uint8)
        slots = count * views
        self._marks = mapped[: 8 * slots].view(np.uint64)  # for each row 0, or _FILLED | CRC-32 of its bytes
        self._parts = [
            torch.from_numpy(mapped[start : start + 2 * slots * math.prod(shape)]).view(dtype).view(slots, *shape)
            for start, shape in zip(self._starts, self.shapes, strict=True)
        ]
        self._verified = np.zeros(slots, np.uint64)  # the marks under which this process has verified a row

    def contains(self, rows: torch.Tensor, view: int) -> bool:
        """Whether all rows (B,) are marked as cached in this view; `read` then succeeds unless it finds damage."""
        return bool(self._marks[self._slots(rows, view)].all())

    def read(self, rows: torch.Tensor, view: int) -> tuple[torch.Tensor, ...] | None:
        """All parts of the rows, (B, *shape) in `dtype` on the CPU, or None if any row is missing or damaged.

        `rows` (B,) are integers. A row's checksum is verified at its first read in this process.
        """
        slots = self._slots(rows, view)
        marks = self._marks[slots]
        if not marks.all():
            return None
        parts = tuple(_gather(part, slots) for part in self._parts)
        if not np.array_equal(marks, self._marks[slots]):
            return None  # another process wrote one of them in between
        unverified = np.flatnonzero(self._verified[slots] != marks)
        damaged = [i for i in unverified.tolist() if _mark(part[i] for part in parts) != marks[i]]
        if damaged:
            logger.warning("%s: %d rows are damaged and are computed again", self.path, len(damaged))
            self._marks[slots[damaged]] = 0
            return None
        self._verified[slots[unverified]] = marks[unverified]
        return parts

    def write(self, rows: torch.Tensor, view: int, parts: Sequence[torch.Tensor]) -> None:
        """Store the parts (B, *shape), of any floating dtype and device, rounded to `dtype`.

        Raises ValueError for other shapes, or numbers that are not finite in `dtype` (float16 ends at 65,504).
        """
        slots = self._slots(rows, view)
        expected = [(len(slots), *shape) for shape in self.shapes]
        if [tuple(part.shape) for part in parts] != expected:
            raise IosrFastError(f"expected parts of shapes {expected}, got {[tuple(part.shape) for part in parts]}")
        if not len(slots):
            return
        extremes = torch.stack([end.float() for part in parts for end in part.detach().aminmax()])
        largest = float(extremes.abs().max())  # NaN propagates
        if not largest <= torch.finfo(self.dtype).max:
            raise IosrFastError(
                f"expected outputs of the stem that are finite in {DTYPES[self.dtype]}, got up to {largest:g}; cache "
                "them in bfloat16, or check the CLIP"
            )
        rounded = [part.detach().to(self.dtype).cpu().contiguous() for part in parts]
        for i, slot in enumerate(slots.tolist()):
            self._marks[slot] = 0  # first, so that neither a kill nor a reader in another process sees half a row
            for start, cached, part in zip(self._starts, self._parts, rounded, strict=True):
                row = part[i].view(torch.int16).numpy()
                if not hasattr(os, "pwrite"):
                    cached[slot] = part[i]
                # Not through the map, where each fresh page faults, which is much slower.
                elif os.pwrite(self._file.fileno(), row.data, start + slot * row.nbytes) != row.nbytes:
                    raise OSError(errno.EIO, f"{self.path} can't be written completely; check the disk")
            self._marks[slot] = _mark(part[i] for part in rounded)

    def close(self) -> None:
        """Release the file, which stays for the next run. Safe to call twice."""
        if not self._file.closed:
            self._parts.clear()
            self._marks = self._verified = np.zeros(0, np.uint64)  # releases the last references to the map
            self._file.close()

    def _exists(self, header: str) -> bool:
        try:
            return self._header_path.read_bytes() == header.encode() and self.path.stat().st_size == self.bytes
        except FileNotFoundError:
            return False

    def _allocate(self, header: str) -> None:
        temporary = self.path.with_name(self.path.name + ".tmp")
        for stale in (self._header_path, self.path, temporary):
            stale.unlink(missing_ok=True)
        try:
            _reserve(temporary, self.bytes)
            os.replace(temporary, self.path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        # Last: where there is a header, the file is whole.
        written = self._header_path.with_name(self._header_path.name + ".tmp")
        written.write_bytes(header.encode())
        os.replace(written, self._header_path)

    def _slots(self, rows: torch.Tensor, view: int) -> np.ndarray:
        row: np.ndarray = rows.cpu().numpy()
        return row * self.views + view


def prune(folder: Path) -> list[Path]:
    """Remove cache files that no process has open, and leftovers of killed processes; returns the removed cache files.

    Files that `ActivationCache` did not write stay.
    """
    removed: list[Path] = []
    if not folder.is_dir():
        return removed
    with _folder_lock(folder):
        ours = [path for path in folder.iterdir() if _OURS.fullmatch(path.name)]
        removed = [path for path in ours if path.suffix == ".activations" and _remove_unused(path)]
        for path in ours:  # under the lock no process creates one
            if path.suffix == ".tmp" or (path.suffix == ".json" and not path.with_suffix("").exists()):
                path.unlink(missing_ok=True)
    return removed


def _remove_unused(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            _lock(file.fileno(), shared=False)
            _header_of(path).unlink(missing_ok=True)
            path.unlink()
    except (BlockingIOError, PermissionError):  # PermissionError: Windows, where a map is the lock
        return False
    return True


def _layout(count: int, views: int, shapes: Sequence[tuple[int, ...]]) -> tuple[list[int], int]:
    """The start of each part (on a page, after the marks), and the end of the last one."""
    starts, end = [], 8 * count * views
    for shape in shapes:
        starts.append(-(-end // _PAGE) * _PAGE)
        end = starts[-1] + 2 * count * views * math.prod(shape)
    return starts, end


def _header(key: Mapping[str, Any], count: int, views: int, shapes: Any, dtype: str, size: int) -> str:
    facts = {"count": count, "views": views, "shapes": shapes, "dtype": dtype, "bytes": size}
    header = {"format": FORMAT, "byteorder": sys.byteorder, **facts, "key": dict(key)}
    return json.dumps(header, sort_keys=True, indent=1) + "\n"


def _header_of(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _gather(part: torch.Tensor, slots: np.ndarray) -> torch.Tensor:
    # NumPy's allocator requests huge pages, which make the page faults of a new batch cheap.
    out = torch.from_numpy(np.empty((len(slots), *part.shape[1:]), np.int16)).view(part.dtype)
    return torch.index_select(part, 0, torch.from_numpy(slots), out=out)


def _mark(row: Iterable[torch.Tensor]) -> np.uint64:
    """The mark of one filled row, from its contiguous parts."""
    crc = 0
    for part in row:
        crc = zlib.crc32(part.view(torch.int16).numpy().data, crc)
    return _FILLED | np.uint64(crc)


def _reserve(path: Path, size: int) -> None:
    """Create a file of `size` zero bytes with its disk space reserved. Raises OSError if the disk has no room."""
    free = shutil.disk_usage(path.parent).free
    try:
        if size > free:  # without filling the disk up first
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with path.open("wb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except (AttributeError, OSError) as error:
                if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
                _write_zeros(file.fileno(), size)  # the file system can't reserve: slower, as safe
    except OSError as error:
        raise OSError(
            error.errno,
            f"can't cache the frozen stem's outputs: {size / 1e9:,.3f} GB needed in {path.parent}, "
            f"{free / 1e9:,.3f} GB free ({error.strerror}); cache fewer views (0 computes them each time), or choose "
            "another folder",
        ) from error


def _write_zeros(file: int, size: int) -> None:
    zeros = memoryview(bytes(1 << 22))
    while size > 0:
        size -= os.write(file, zeros[:size])


@contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    """A lock for creating and removing files; a killed process releases it."""
    with (folder / ".activations.lock").open("ab") as file:
        _lock(file.fileno(), shared=False, wait=True)
        yield


def _lock(file: int, shared: bool, wait: bool = False) -> None:
    """flock, where the system has it. Raises BlockingIOError if the lock is held and `wait` is False."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK):
            raise
