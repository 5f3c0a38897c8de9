"""Temporary files beside their targets, and the removal of those that killed writers leave.

A writer of `name` locks `.name.<token>.lock.tmp` while it runs, and writes to `.name.<token>` or `.name.<token>.tmp`.
The operating system releases the lock when the process ends: a temporary with an unlocked lock file is a leftover,
whatever its age. Without a lock file (no flock on this system, or another version of iosr_fast) the age decides.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MANIFEST = "manifest.json"
_LOCK = ".lock.tmp"
_NAME = re.compile(rf"(?P<base>\..+\.[a-z0-9_]{{8}})(?P<kind>{re.escape(_LOCK)}|\.tmp|)")  # tempfile's 8 characters
_OLD_S = 3600.0  # age of a leftover without a lock file
log = logging.getLogger(__name__)


@contextmanager
def claimed(target: Path) -> Iterator[Path]:
    """A new name beside `target`, `.name.<token>`, that `remove_leftovers` leaves alone until the block ends."""
    while True:
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=_LOCK, dir=target.parent)
        lock = Path(name)
        locked = try_lock(descriptor)
        if locked is None:  # no locks on this file system: an unlocked lock file would mark its writer as killed
            os.close(descriptor)
            lock.unlink(missing_ok=True)
            break
        if locked and is_open_at(descriptor, lock):
            break
        os.close(descriptor)  # removed as a leftover before it was locked
    try:
        yield lock.with_name(lock.name.removesuffix(_LOCK))
    finally:
        if locked:
            with suppress(OSError):  # the next writer removes it
                lock.unlink()
            os.close(descriptor)


def remove_leftovers(folder: Path, of: str = ".+") -> None:
    """Remove temporary files and folders in `folder` that no running writer holds.

    Without a lock file they are removed when they are older than an hour. A folder that `files.new_folder` was about to
    replace stays: it may be the only copy. `of` is a regular expression of target names, which protects other hidden
    files in a user's folder.
    """
    groups: dict[str, dict[str, Path]] = {}
    with suppress(OSError):  # no folder, or none that may be listed
        for entry in os.scandir(folder):
            match = _NAME.fullmatch(entry.name) if entry.name.startswith(".") else None
            if match is not None:
                groups.setdefault(match["base"], {})[match["kind"]] = folder / entry.name
    for base, paths in groups.items():
        name, aside = base[1:].rsplit(".", 1)[0], False
        if _LOCK not in paths and name.endswith(".old"):
            name, aside = name.removesuffix(".old"), True
        if not re.fullmatch(of, name):
            continue
        with suppress(OSError):  # another process may have removed it, or renamed it into its place
            if _LOCK in paths:
                _remove_unlocked(paths.pop(_LOCK), paths.values())
            else:
                for path in paths.values():
                    if _is_old(path, aside):
                        remove(path)


def _remove_unlocked(lock: Path, paths: Iterable[Path]) -> None:
    """Remove `paths`, and the lock last, unless a running writer holds it."""
    descriptor = os.open(lock, os.O_RDWR)
    try:
        if try_lock(descriptor) and is_open_at(descriptor, lock):
            for path in (*paths, lock):
                remove(path)
    finally:
        os.close(descriptor)


def _is_old(path: Path, aside: bool) -> bool:
    only_copy = aside and ((path / "old" / MANIFEST).exists() or not path.is_dir())
    return not only_copy and time.time() - path.lstat().st_mtime > _OLD_S


def remove(path: Path) -> None:
    """Remove a folder, a file or a link; never raises."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file; False if another process holds the lock, None if files can't be locked here."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        log.debug("files can't be locked here: %s", error)
        return None
    return True


def is_open_at(descriptor: int, path: Path) -> bool:
    """Whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except OSError:
        return False
