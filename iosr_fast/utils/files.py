"""Atomic writes of files and folders, and the folder of caches."""

from __future__ import annotations

import ctypes
import errno
import functools
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from iosr_fast.utils.temporaries import MANIFEST, claimed, remove, remove_leftovers

_NAME_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)  # errors of rename when the target name exists
_RECOVER_ATTEMPTS = 3
_RENAME_PAUSE_S = 0.05  # much longer than a running writer needs from one rename to the next
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Linux: fcntl.h and stdio.h
log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """The folder of rebuildable files: engines, and plans compiled for this GPU. It may be deleted at any time.

    IOSR_FAST_CACHE, else iosr_fast in XDG_CACHE_HOME, else ~/.cache/iosr_fast. It need not exist yet.
    """
    chosen = os.environ.get("IOSR_FAST_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "iosr_fast"


@contextmanager
def new_file(target: str | Path) -> Iterator[Path]:
    """A temporary file beside `target` that replaces it when the block succeeds, and is removed when it fails.

    The bytes reach the disk before the name does. Everyone who can read the folder can read the file. Leftovers of
    killed writers of `target` are removed first.
    """
    target = Path(target)
    remove_leftovers(target.parent, of=re.escape(target.name))
    with claimed(target) as claim, replacing(target, claim.with_name(f"{claim.name}.tmp"), 0o644) as temporary:
        yield temporary


@contextmanager
def replacing(target: Path, temporary: Path, mode: int) -> Iterator[Path]:
    """The new file `temporary`, which replaces `target` with this `mode` when the block succeeds, and is removed
    otherwise.

    The bytes are on the disk before the name is, and the name is there before this returns.
    """
    try:
        temporary.touch(0o600, exist_ok=False)
        yield temporary
        _sync_file(temporary, mode)
        os.replace(temporary, target)
        sync_folder(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """A temporary folder beside `target` that replaces it when the block succeeds; a failure leaves `target` alone.

    Where Linux can exchange two names, `target` is the old folder or the new one at every moment. Elsewhere there are
    two renames, and `recover` repairs a kill between them. An existing `target` is replaced only if it is empty or has
    a manifest; FileExistsError protects other files. Leftovers of killed writers are removed. Concurrent writers of
    one target don't disturb each other: the last one's folder stays.
    """
    path = Path(os.path.abspath(target))
    if not _replaceable(path):
        raise FileExistsError(f"{target} exists and holds files that iosr_fast did not write; choose another place")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, of=re.escape(path.name))
    with claimed(path) as temporary:
        try:
            temporary.mkdir(0o755)
            temporary.chmod(0o755)  # independent of the umask
            yield temporary
            _sync_tree(temporary)
            superseded = _set_aside(path)
            superseded += _rename_to(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            remove(temporary)
            recover(path)  # an interrupt may have come between two renames
            raise
        for old in superseded:
            remove(old.parent)  # `path` is complete, so none of them is the only copy


def _replaceable(target: Path) -> bool:
    """Whether `target` is missing, an empty folder or a folder with a manifest."""
    while os.path.lexists(target):
        before = folder_identity(target)
        try:
            names = os.listdir(target)
        except OSError:
            names = None
        if names == [] or (names and MANIFEST in names):
            return True
        if before is None and not os.path.islink(target):
            continue  # another writer is renaming it
        if before == folder_identity(target):
            return False
    return True


def folder_identity(folder: Path) -> tuple[int, int, int] | None:
    """Distinguishes a folder from another one that replaces it; None where there is none."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_ctime_ns


def _rename_to(source: Path, target: Path) -> list[Path]:
    """Rename `source` to `target`; returns the folders set aside for it, where names can't be exchanged."""
    aside_paths: list[Path] = []
    while True:  # concurrent writers rename, so the name comes and goes
        try:
            os.rename(source, target)  # works if the name is free or an empty folder
            return aside_paths
        except OSError as error:
            if error.errno not in _NAME_TAKEN and not os.path.lexists(target):
                raise
        if exchange(source, target):
            remove(source)
            return aside_paths
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        try:
            os.rename(target, aside / "old")
        except FileNotFoundError:
            aside.rmdir()
        except OSError:
            aside.rmdir()
            raise
        else:
            aside_paths.append(aside / "old")


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
        if not _set_aside(folder):
            continue
        time.sleep(_RENAME_PAUSE_S)
        aside_paths = _set_aside(folder)
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


def _set_aside(folder: Path) -> list[Path]:
    """Complete folders that killed writers of `folder` set aside, oldest first."""
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.old\.[a-z0-9_]{{8}}")
    aged = []
    for aside in folder.parent.iterdir() if folder.parent.is_dir() else ():
        if pattern.fullmatch(aside.name):
            with suppress(OSError):  # another process may remove it
                aged.append(((aside / "old" / MANIFEST).stat().st_mtime_ns, aside / "old"))
    return [path for _, path in sorted(aged)]


def _sync_tree(folder: Path) -> None:
    """Flush a folder's content to the disk before the rename, so that a power cut leaves no half folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            _sync_file(path)
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder)


def _sync_file(path: Path, mode: int = 0o644) -> None:
    path.chmod(mode)  # tempfile and safetensors create files that only the owner can read
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    if os.name == "posix":  # elsewhere a folder can't be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
