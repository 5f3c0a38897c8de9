"""Files that are written whole or not at all, the temporary folders of all writers, and the folder of caches.

A writer of `name` works in a folder `.name.<token>.tmp` beside it, which it locks while it runs. The operating system
releases the lock when the process ends: an unlocked one is a leftover of a killed writer.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import logging
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from iosr_fast.exceptions import IosrFastError

_TEMPORARY = re.compile(r"\.(.+)\.[a-z0-9_]{8}\.tmp")  # tempfile's 8 characters
_OLD_S = 3600.0  # age of a leftover on systems that can't lock folders
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OLD = "old"  # in a temporary folder: what `folders.new_folder` replaces where names can't be exchanged
_temporary_caches: dict[str, Path] = {}  # by the cache folder that each one replaces in this process
log = logging.getLogger(__name__)


def open_regular(path: str, flags: int, directory: int | None = None) -> int:
    """An opener (`open`) of regular files alone: to open a pipe would wait for its other end. Only their owner can read
    new ones. With `directory`, the descriptor of its folder, the file is opened below that. Raises IosrFastError."""
    name = path if directory is None else os.path.basename(path)
    descriptor = os.open(name, flags | os.O_NONBLOCK, 0o600, dir_fd=directory)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise IosrFastError(f"expected a regular file at {path}, got a folder, a pipe or a device: remove it")
    return descriptor


def cache_folder() -> Path:
    """The folder of rebuildable files: engines, and plans compiled for this GPU. It may be deleted at any time.

    IOSR_FAST_CACHE, else iosr_fast in XDG_CACHE_HOME, else ~/.cache/iosr_fast. It need not exist yet, and need not be
    writable (`in_cache`).
    """
    chosen = os.environ.get("IOSR_FAST_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path(os.path.expanduser("~")) / ".cache") / "iosr_fast"


def in_cache(*names: str) -> Path:
    """The place of these names in the cache: a file or folder that is there, or one that can be made.

    What killed writers left beside a place that is not there is removed. Where nothing can be made, the place is in a
    temporary folder of this process, with a warning.
    """
    place = cache_folder().joinpath(*names)
    if place.exists() and names:
        return place
    try:
        folder = place.parent if names else place
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        with tempfile.TemporaryFile(dir=folder):
            return place
    except OSError as error:
        return _temporary_cache(str(cache_folder()), error).joinpath(*names)


def _temporary_cache(place: str, reason: OSError) -> Path:
    if place not in _temporary_caches:
        folder = tempfile.mkdtemp(prefix="iosr-fast-cache-")
        log.warning(
            "the cache %r can't be written (%s): engines are built in %r, and again by each process; set "
            "IOSR_FAST_CACHE to a folder that can be written",
            place,
            reason,
            folder,
        )
        atexit.register(remove_own, folder, os.getpid())
        _temporary_caches[place] = Path(folder)
    return _temporary_caches[place]


def remove_own(folder: str | Path, process: int) -> None:
    """Remove a folder, if this is `process`, which made it, and not a fork, which uses it too."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def room_for(target: Path) -> Iterator[None]:
    """Any error of the block that says that the disk is full, also one of a library, becomes an OSError that names
    `target` and the room that is left."""
    try:
        yield
    except Exception as error:
        code = next((code for code in DISK_FULL if os.strerror(code) in str(error)), None)
        if code is None:
            raise
        free = f"{shutil.disk_usage(target.parent).free / 1e6:,.0f} MB are free there, a quota or limit may leave less"
        raise OSError(code, f"{os.strerror(code)} for {target}: {free}; make room, or choose another place") from error


@contextmanager
def new_file(target: str | Path) -> Iterator[Path]:
    """A temporary file that replaces `target` when the block succeeds, and is removed when it fails.

    The bytes reach the disk before the name does. Everyone who can read the folder can read the file. Leftovers of
    killed writers of `target` are removed first. A link stays one: the file that it points to is replaced.
    """
    target = Path(os.path.realpath(target))
    with room_for(target), temporary_folder(target) as folder:
        temporary = folder / target.name
        temporary.touch()
        yield temporary
        sync_file(temporary)
        os.replace(temporary, target)
        sync_folder(target.parent)


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside `target` for its writer, which removes it at the end, and not in a fork.

    Those of killed writers are removed first.
    """
    process = os.getpid()
    remove_leftovers(target.parent, of=re.escape(target.name))
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        with suppress(FileNotFoundError, BlockingIOError):  # another writer takes it for a leftover until it is locked
            lock = lock_folder(folder)
            if folder.exists():
                break
            unlock(lock)
    try:
        yield folder
    finally:
        remove_own(folder, process)
        unlock(lock)


def remove_leftovers(folder: Path, of: str = ".+") -> None:
    """Remove the temporary folders in `folder` that no running writer has locked; where folders can't be locked, those
    older than an hour.

    `of` is a regular expression of target names, which protects other hidden files in a user's folder. One that has the
    only copy of its target stays.
    """
    with suppress(OSError):  # no folder, or none that may be listed
        for entry in sorted(os.listdir(folder)):
            name, path = _TEMPORARY.fullmatch(entry), folder / entry
            if name is None or not re.fullmatch(of, name[1]):
                continue
            if (path / OLD).exists() and not os.path.lexists(folder / name[1]):
                continue
            with suppress(OSError):  # locked, or removed by another process
                lock = lock_folder(path)
                if lock is not None or time.time() - path.lstat().st_mtime > _OLD_S:
                    shutil.rmtree(path, ignore_errors=True)
                unlock(lock)


def lock_folder(folder: Path) -> int | None:
    """A descriptor that locks `folder`; None where folders can't be locked. Raises BlockingIOError if it is locked."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor


def unlock(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Flush a file to the disk; everyone who can read its folder can read it."""
    path.chmod(0o644)  # tempfile and safetensors create files that only the owner can read
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
