"""Pixels on their way into a GPU encoder's input, through page-locked memory: neither the copy nor the launches after
it wait."""

from __future__ import annotations

from typing import Any

import numpy as np

from iosr_fast.utils.require import require


class Upload:
    """Copies rows into the first rows of `target`, a uint8 tensor, on the current stream of its GPU.

    Not thread-safe; the caller holds the lock of `target`. On a CPU it copies directly. Not yet run on a GPU.
    """

    def __init__(self, target: Any) -> None:
        self._target = target
        self._torch = require("torch", "cpu")
        self._pinned: Any = None
        if target.is_cuda:
            self._pinned = self._torch.empty(target.shape, dtype=target.dtype, pin_memory=True)
            self._done = self._torch.cuda.Event()

    def __call__(self, rows: np.ndarray) -> None:
        """`rows` (n, ...) uint8, n at most the rows of `target`. Waits for the upload before it, which may still be
        reading the page-locked memory."""
        n = len(rows)
        if self._pinned is None:
            # PyTorch warns of read-only arrays.
            self._target[:n].copy_(self._torch.from_numpy(rows if rows.flags.writeable else rows.copy()))
            return
        self._done.synchronize()
        self._pinned.numpy()[:n] = rows
        self._target[:n].copy_(self._pinned[:n], non_blocking=True)
        self._done.record(self._torch.cuda.current_stream(self._target.device))
