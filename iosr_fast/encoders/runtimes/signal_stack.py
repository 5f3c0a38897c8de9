"""The calling thread's signal stack, kept as it was.

OpenVINO 2026.4 puts a stack of its own in place of it (sigaltstack) where a Core loads its CPU plugin, and puts back
what it had found there when the plugin is released. Of two plugins that are released in the order in which they were
loaded, the second so puts back the first's, which is gone: the next signal, for which Python asks to be called on that
stack, ends the process.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class _Stack(ctypes.Structure):
    _fields_ = (("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def signal_stack() -> tuple[int, int, int]:
    """(address, flags, bytes) of the calling thread's. Linux only."""
    found = _Stack()
    _libc().sigaltstack(None, ctypes.byref(found))
    return found.sp or 0, found.flags, found.size


@contextmanager
def kept_signal_stack() -> Iterator[None]:
    """Within the block others may change it; at its end it is what it was. Nothing is done off Linux."""
    if not sys.platform.startswith("linux"):
        yield
        return
    before = signal_stack()
    try:
        yield
    finally:
        if signal_stack() != before:
            _libc().sigaltstack(ctypes.byref(_Stack(*before)), None)
