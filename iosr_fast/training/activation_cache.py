"""The outputs of the frozen stem, computed once for each view of each picture and cached in a memory-mapped file.

A row counts as cached only if its checksum is right: rows damaged by a kill, a full disk or a failing machine are
computed again. All processes of a machine share the file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from iosr_fast.exceptions import IosrFastError

logger = logging.getLogger(__name__)

_FILLED = np.uint64(1 << 32)  # above the 32 bits of the CRC, of which 0 is a valid one


class ActivationCache:
    """float16 rows of `shape` = (2, tokens, width), the stem's two outputs, for `count` pictures in `views` views each.

    `key` (JSON values) has all that the outputs depend on; its hash names the file in `folder`. The file holds a mark
    for each row (0, or _FILLED + the CRC-32 of the row's bytes), then the rows. Its space is reserved at once: a disk
    without room raises OSError before any work.
    """

    def __init__(
        self, folder: Path, key: Mapping[str, Any], count: int, views: int, shape: tuple[int, int, int]
    ) -> None:
        slots = count * views
        facts = json.dumps([dict(key), count, views, shape], sort_keys=True)
        self.path = folder / f"{hashlib.sha256(facts.encode()).hexdigest()[:32]}.activations"
        self.views = views
        _reserve(self.path, 8 * slots + 2 * slots * math.prod(shape))
        self._marks = np.memmap(self.path, np.uint64, "r+", 0, (slots,))
        self._rows = np.memmap(self.path, np.float16, "r+", 8 * slots, (slots, *shape))
        self._verified = np.zeros(slots, bool)  # a row's checksum is computed once in each process

    def contains(self, rows: torch.Tensor, view: int) -> bool:
        """Whether all rows (B,) are cached in this view; `read` then succeeds unless it finds damage."""
        return bool(self._marks[self._slots(rows, view)].all())

    def read(self, rows: torch.Tensor, view: int) -> torch.Tensor | None:
        """(2, B, tokens, width) float16 on the CPU, or None if any row is missing or damaged."""
        slots = self._slots(rows, view)
        if not self.contains(rows, view):
            return None
        cached = self._rows[slots]
        new = np.flatnonzero(~self._verified[slots])
        damaged = slots[[i for i in new if _mark(cached[i]) != self._marks[slots[i]]]]
        if len(damaged):
            logger.warning("%s: %d rows are damaged and are computed again", self.path, len(damaged))
            self._marks[damaged] = 0
            return None
        self._verified[slots] = True
        return torch.from_numpy(cached).transpose(0, 1)

    def write(self, rows: torch.Tensor, view: int, outputs: torch.Tensor) -> torch.Tensor:
        """Round the outputs (2, B, tokens, width) to float16 and store them; returns them as `read` does.

        Raises ValueError for numbers beyond float16, which ends at 65,504.
        """
        rounded = outputs.detach().half().cpu().transpose(0, 1).contiguous()
        if not bool(rounded.isfinite().all()):
            raise IosrFastError(
                f"expected outputs of the stem that are finite in float16, got up to {float(outputs.abs().max()):g}; "
                "train without cached views"
            )
        slots = self._slots(rows, view)
        self._marks[slots] = 0  # first, so that neither a kill nor another process takes half a row for a whole one
        self._rows[slots] = rounded.numpy()
        self._marks[slots] = [_mark(row) for row in rounded.numpy()]
        return rounded.transpose(0, 1)

    def _slots(self, rows: torch.Tensor, view: int) -> np.ndarray:
        row: np.ndarray = rows.cpu().numpy()
        return row * self.views + view


def _mark(row: np.ndarray) -> np.uint64:
    return _FILLED | np.uint64(zlib.crc32(row.data))


def _reserve(path: Path, size: int) -> None:
    """Extend the file to `size` bytes of zeros, with its disk space reserved; what it holds already stays.

    Without reserved space a full disk would end the process at a write to the map (SIGBUS). Several processes may do
    this at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        present = os.fstat(file.fileno()).st_size
    free = shutil.disk_usage(path.parent).free
    try:
        if size - present > free:
            raise OSError("the disk has no room")
        with path.open("r+b") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
    except OSError as error:
        if not present:
            path.unlink(missing_ok=True)
        raise OSError(
            f"can't cache the frozen stem's outputs: {size / 1e9:,.3f} GB needed in {path.parent}, "
            f"{free / 1e9:,.3f} GB free ({error}); cache fewer views, or none"
        ) from error
