"""Two names swapped in one step, which Linux can do and Python's os module does not offer."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import sys
from pathlib import Path
from typing import Any

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # fcntl.h and stdio.h of Linux
log = logging.getLogger(__name__)


def exchange(one: Path, other: Path) -> bool:
    """Swap what two names of one file system stand for: whoever opens either finds the one or the other, never nothing.

    Returns False, with nothing changed, where that can't be done: other systems than Linux, an old C library, a file
    system that does not know it, a name that is not there.
    """
    renameat2 = _renameat2()
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    log.debug("%s and %s can't be exchanged: %s", one, other, os.strerror(ctypes.get_errno()))
    return False


@functools.cache
def _renameat2() -> Any:
    """The C library's function, or None."""
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
        function.restype = ctypes.c_int
    return function
