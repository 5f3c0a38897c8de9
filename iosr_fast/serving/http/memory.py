"""What the C library does with memory that is freed, set for a server that takes the same amounts again and again."""

from __future__ import annotations

import ctypes

# mallopt's parameters and values, of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_KEPT = 128 << 20  # bytes of free memory at the top of the heap before any goes back
_MAPPED = 32 << 20  # the largest that glibc allows
_ARENAS = 2


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory for the next request; False where the C library is another.

    By default each batch's buffers go back to the kernel and are fetched again, page by page; where that is slow, as it
    can be in virtual machines, the event loop stands still for tens of milliseconds with it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    values = {_TRIM_THRESHOLD: _KEPT, _MMAP_THRESHOLD: _MAPPED, _ARENA_MAX: _ARENAS}
    return all([mallopt(name, value) == 1 for name, value in values.items()])
