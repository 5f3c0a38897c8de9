"""Atomic writes of files, and the folder of caches."""

from __future__ import annotations

import atexit
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from iosr_fast.utils.temporaries import claimed, remove_leftovers

_temporary: dict[str, Path] = {}  # by the cache folder that each one replaces in this process
log = logging.getLogger(__name__)


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

    Where nothing can be made, the place is in a temporary folder of this process, with a warning.
    """
    place = cache_folder().joinpath(*names)
    if place.exists() and names:
        return place
    try:
        folder = place.parent if names else place
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return place
    except OSError as error:
        return _temporary_cache(str(cache_folder()), error).joinpath(*names)


def _temporary_cache(place: str, reason: OSError) -> Path:
    if place not in _temporary:
        folder = tempfile.mkdtemp(prefix="iosr-fast-cache-")
        log.warning(
            "the cache %r can't be written (%s): engines are built in %r, and again by each process; set "
            "IOSR_FAST_CACHE to a folder that can be written",
            place,
            reason,
            folder,
        )
        atexit.register(_remove_own, folder, os.getpid())
        _temporary[place] = Path(folder)
    return _temporary[place]


def _remove_own(folder: str, process: int) -> None:
    if os.getpid() == process:  # a forked process uses it, too
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def new_file(target: str | Path) -> Iterator[Path]:
    """A temporary file beside `target` that replaces it when the block succeeds, and is removed when it fails.

    The bytes reach the disk before the name does. Everyone who can read the folder can read the file. Leftovers of
    killed writers of `target` are removed first. A link stays one: the file that it points to is replaced.
    """
    target = Path(os.path.realpath(target))
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
        sync_file(temporary, mode)
        os.replace(temporary, target)
        sync_folder(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_file(path: Path, mode: int = 0o644) -> None:
    """Flush a file to the disk, with this mode."""
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
