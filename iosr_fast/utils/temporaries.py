"""Files that replace others, for the log."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from iosr_fast.utils.files import sync_folder


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
