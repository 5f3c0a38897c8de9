"""Folders written whole or not at all, and the one rule for what they may replace."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path, PurePosixPath

from iosr_fast.exceptions import IosrFastError
from iosr_fast.sealed.files import OLD, room_for, sync_file, sync_folder, temporary_folder
from iosr_fast.sealed.manifest import MANIFEST
from iosr_fast.sealed.outputs import check_writable
from iosr_fast.sealed.verified_folder import open_below, read_below
from iosr_fast.utils.text import abbreviate

_NAME_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)  # errors of rename when the target name exists
_AT_FDCWD, _EXCHANGE = -100, 2  # fcntl.h and stdio.h


@contextmanager
def new_folder(target: str | Path, kind: str | None = None) -> Iterator[Path]:
    """A temporary folder that replaces `target` when the block succeeds; a failure leaves `target` alone.

    What may be replaced is what `check_new_folder` allows, at the beginning and again before the rename. A link stays
    one: the folder that it points to is replaced. Where the system can exchange two names, `target` is the old folder
    or the new one at every moment. Elsewhere there are two renames, and a kill between them leaves the old folder in
    the temporary one (`.name.<token>.tmp/old`), which nothing removes. Leftovers of other killed writers are removed.
    Concurrent writers of one target don't disturb each other: the last one's folder stays.
    """
    path = Path(os.path.realpath(target))
    _refuse_replacing(path, kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    with room_for(path), temporary_folder(path) as temporary:
        made = temporary / "new"
        made.mkdir()
        made.chmod(0o755)  # independent of the umask
        yield made
        _sync_tree(made)
        _rename(made, path, kind)
        sync_folder(path.parent)


def check_new_folder(out: Path, kind: str | None = None) -> None:
    """Raise OSError if `new_folder` could not write `out`, naming what is in the way.

    A missing folder is created with its parents. Replaced are an empty folder, and a `kind` of iosr_fast (None: none)
    of this schema, whose files are all as its manifest says, and which holds nothing else.
    """
    path = Path(os.path.realpath(out))
    _refuse_replacing(path, kind)
    check_writable(next(folder for folder in path.parents if os.path.lexists(folder)), out)


def _refuse_replacing(folder: Path, kind: str | None) -> None:
    if not os.path.lexists(folder):
        return
    try:
        read_below(folder, lambda directory: _check_replaceable(directory, folder, kind))
    except FileNotFoundError:  # another writer has just renamed it
        return
    except (IosrFastError, OSError) as error:
        reason = f"it can't be listed as a folder ({error.strerror})" if isinstance(error, OSError) else error
        raise FileExistsError(
            f"{folder} exists and is not replaced: {reason}; choose another place, or remove it"
        ) from error


def _check_replaceable(directory: int, folder: Path, kind: str | None) -> None:
    """Raise IosrFastError for what must not be deleted in the folder with this descriptor."""
    if not (names := sorted(os.listdir(directory))):
        return
    if kind is None:
        raise IosrFastError(f"it is not empty but holds {abbreviate(names)}")
    if MANIFEST not in names:
        raise IosrFastError(f"it holds files that iosr_fast did not write, {abbreviate(names)}")
    try:
        held = open_below(directory, folder, kind)
        held.check()
    except (ValueError, OSError) as error:
        raise IosrFastError(f"it is no complete {kind} of iosr_fast ({error})") from error
    ours = {PurePosixPath(name) for name in (MANIFEST, *held.files)}
    ours |= {parent for path in ours for parent in path.parents}
    walked = os.fwalk(dir_fd=directory)
    present = {PurePosixPath(top, name) for top, *names, _ in walked for name in chain(*names)}
    if others := sorted(map(str, present - ours)):
        raise IosrFastError(f"it holds other files than those of the {kind}, {abbreviate(others)}")


def _rename(made: Path, target: Path, kind: str | None) -> None:
    """Rename `made` to `target`; what was there stays in the temporary folder."""
    old = made.with_name(OLD)
    try:
        while True:  # concurrent writers rename, so the name comes and goes
            try:
                os.rename(made, target)  # works if the name is free or an empty folder
                return
            except OSError as error:
                if error.errno not in _NAME_TAKEN and not os.path.lexists(target):
                    raise
            _refuse_replacing(target, kind)  # files may have come while the folder was written
            if exchange(made, target):
                return
            shutil.rmtree(old, ignore_errors=True)  # another writer's folder has taken its place
            with suppress(FileNotFoundError):
                os.rename(target, old)
    except BaseException:
        if old.exists() and not os.path.lexists(target):
            os.rename(old, target)
        raise


def exchange(one: Path, other: Path) -> bool:
    """Swap two names of one file system atomically.

    Returns False, with nothing changed, where that is impossible: other systems than Linux, an old C library, a file
    system without support, a missing name.
    """
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    places = _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other)
    return renameat2 is not None and renameat2(*places, ctypes.c_uint(_EXCHANGE)) == 0


def _sync_tree(folder: Path) -> None:
    """Flush a folder's content to the disk before the rename, so that a power cut leaves no half folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync_file(path)
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder)
