"""Resource limits of a decoder process, which also ends with its parent. Limits that a system lacks are skipped."""

from __future__ import annotations

import ctypes
import math
import os
import resource
import signal
import sys
import time

_SET_DEATH_SIGNAL, _SET_NO_NEW_PRIVILEGES = 1, 38  # of Linux's prctl.h
_MAX_FILES = 16  # open at a time
_SLACK_BYTES = 128 << 20  # besides the pictures: tables and library buffers
# For the decoded, converted, resized and copied picture; the largest observed is 20 (WebP).
_BYTES_PER_PIXEL = 32
_PAGE = resource.getpagesize()
_STATM = "/proc/self/statm"  # its first number is the pages in use
_statm = os.open(_STATM, os.O_RDONLY) if os.path.exists(_STATM) else None
_HEAP_PIXELS = 4_000_000  # larger pictures are rare enough to return memory after each


def confine(parent: int) -> None:
    """Make this process, permanently, end with its parent, gain no privileges, write no file, dump no core, and ignore
    signals of terminals and service managers (the parent decides when to end)."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        prctl = ctypes.CDLL(None).prctl
        prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        prctl(_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    if os.getppid() != parent:  # the parent died before the death signal was set
        sys.exit(1)
    for kind, value in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_NOFILE, _MAX_FILES)):
        resource.setrlimit(kind, (value, value))


def limit(work_pixels: int, other_bytes: int, cpu_s: float) -> None:
    """For one image, limit memory to the current use plus pictures of `work_pixels` and `other_bytes`, and CPU time to
    the current use plus `cpu_s`, in whole seconds. More memory is refused; more CPU time kills the process."""
    if _statm is not None:
        used = int(os.pread(_statm, 32, 0).split()[0]) * _PAGE
        _lower(resource.RLIMIT_AS, used + _SLACK_BYTES + other_bytes + _BYTES_PER_PIXEL * work_pixels)
    _lower(resource.RLIMIT_CPU, math.ceil(time.process_time() + cpu_s))


def give_back(work_pixels: int) -> None:
    """Return freed memory to the system after a large picture; the C library may keep some tens of megabytes."""
    if work_pixels > _HEAP_PIXELS and sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)


def _lower(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
