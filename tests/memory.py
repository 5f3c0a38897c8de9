"""Memory that a call takes."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path


def extra_memory_mb(run: Callable[[], object]) -> float | None:
    """MB by which one call raises the peak of the process's resident memory; None outside Linux."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")

    def kilobytes(field: str) -> int:
        return int(next(line for line in status.read_text().splitlines() if line.startswith(field)).split()[1])

    try:
        gc.collect()
        # Otherwise memory that the allocator retained from an earlier call would not be counted again.
        ctypes.CDLL(None).malloc_trim(0)
        before = kilobytes("VmRSS")
        reset.write_text("5")  # resets the peak, VmHWM, to the current size
        run()
        return max(0, kilobytes("VmHWM") - before) * 1024 / 1e6
    except (OSError, AttributeError, StopIteration):  # not Linux, or not glibc
        return None
