"""Renames of whole folders: two names exchanged at once, or what a killed writer set aside put back."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import re
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from iosr_fast.utils.temporaries import MANIFEST

_RECOVER_ATTEMPTS = 3
_RENAME_PAUSE_S = 0.05  # much longer than a running writer needs from one rename to the next
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Linux: fcntl.h and stdio.h
log = logging.getLogger(__name__)


def folder_identity(folder: Path, follow_symlinks: bool = True) -> tuple[int, int, int] | None:
    """Distinguishes a folder from another one that replaces it; None where there is none."""
    try:
        status = folder.stat(follow_symlinks=follow_symlinks)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_ctime_ns


def exchange(one: Path, other: Path) -> bool:
    """Swap two names of one file system atomically, with Linux's renameat2.

    Returns False, with nothing changed, where that is impossible: other systems than Linux, an old C library, a file
    system without support, a missing name.
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


def recover(folder: str | Path) -> bool:
    """Restore a missing `folder` that a kill between two renames left set aside. Returns whether it exists now.

    Only systems where `new_folder` can't exchange names leave one: the old folder, complete, beside `folder`.
    """
    folder = Path(os.path.abspath(folder))
    for _ in range(_RECOVER_ATTEMPTS):  # a running writer may rename it meanwhile
        if os.path.lexists(folder):
            return True
        if not set_aside(folder):
            continue
        time.sleep(_RENAME_PAUSE_S)
        aside_paths = set_aside(folder)
        if not os.path.lexists(folder) and aside_paths:
            newest = aside_paths[-1]
            try:
                os.rename(newest, folder)
            except OSError as error:
                log.warning("%s is missing; its last state is %s and can't be renamed: %s", folder, newest, error)
                continue
            log.warning("%s was missing because a save was killed; the folder before that save is restored", folder)
            with suppress(OSError):
                newest.parent.rmdir()
    return os.path.lexists(folder)


def set_aside(folder: Path) -> list[Path]:
    """Complete folders that killed writers of `folder` set aside, oldest first."""
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.old\.[a-z0-9_]{{8}}")
    aged = []
    for aside in folder.parent.iterdir() if folder.parent.is_dir() else ():
        if pattern.fullmatch(aside.name):
            with suppress(OSError):  # another process may remove it
                aged.append(((aside / "old" / MANIFEST).stat().st_mtime_ns, aside / "old"))
    return [path for _, path in sorted(aged)]
