"""Locks of files, and files that replace others, for the log and the runner of folders until they need neither."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from iosr_fast.utils.files import sync_folder

log = logging.getLogger(__name__)


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


@contextmanager
def replacing(target: Path, temporary: Path, mode: int) -> Iterator[Path]:
    """The new file `temporary`, which replaces `target` with this `mode` when the block succeeds."""
    try:
        temporary.touch(0o600, exist_ok=False)
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
        sync_folder(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
