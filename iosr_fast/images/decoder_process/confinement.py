"""What a decoder process may use: little, and nothing once its parent is gone. What the system lacks is left out."""

from __future__ import annotations

import ctypes
import math
import os
import resource
import signal
import sys
import time

_SET_DEATH_SIGNAL, _SET_NO_NEW_PRIVILEGES = 1, 38  # of Linux's prctl.h
_FILES = 16  # open at a time
_SLACK_BYTES = 128 << 20  # beside the pictures: tables, what libraries hold
# Of a picture as the decoder holds it, converted, resized and copied; the most that was seen is 20 (WebP).
_BYTES_PER_PIXEL = 32
_PAGE = resource.getpagesize()
_STATM = "/proc/self/statm"  # whose first number is the pages that are held
_statm = os.open(_STATM, os.O_RDONLY) if os.path.exists(_STATM) else None
_HEAP_PIXELS = 4_000_000  # pictures above this are rare enough to give memory back after each


def confine(parent: int) -> None:
    """For good: ends with its parent, gains no rights, writes no file, leaves no core, hears no signal of a terminal
    or a service manager: its parent says when to end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        prctl = ctypes.CDLL(None).prctl
        prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        prctl(_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    if os.getppid() != parent:  # it died before it could be noticed
        sys.exit(1)
    for kind, most in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_NOFILE, _FILES)):
        resource.setrlimit(kind, (most, most))


def limit(work_pixels: int, other_bytes: int, cpu_s: float) -> None:
    """For one image: memory beyond what is held now, for pictures of `work_pixels` and `other_bytes`, and CPU seconds
    beyond those used, whole ones. More memory is refused, more seconds kill."""
    if _statm is not None:
        held = int(os.pread(_statm, 32, 0).split()[0]) * _PAGE
        _lower(resource.RLIMIT_AS, held + _SLACK_BYTES + other_bytes + _BYTES_PER_PIXEL * work_pixels)
    _lower(resource.RLIMIT_CPU, math.ceil(time.process_time() + cpu_s))


def give_back(work_pixels: int) -> None:
    """Return freed memory to the system after a large picture; the C library may keep some tens of megabytes."""
    if work_pixels > _HEAP_PIXELS and sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
        if trim is not None:
            trim(0)


def _lower(kind: int, most: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
