"""Folders written whole or not at all, and the one rule for what they may replace."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from iosr_fast.utils.files import sync_file, sync_folder
from iosr_fast.utils.manifest import MANIFEST
from iosr_fast.utils.outputs import check_writable
from iosr_fast.utils.renames import exchange, folder_identity, recover, set_aside
from iosr_fast.utils.temporaries import claimed, remove, remove_leftovers
from iosr_fast.utils.text import abbreviate
from iosr_fast.utils.verified_folder import open_verified

_NAME_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)  # errors of rename when the target name exists


@contextmanager
def new_folder(target: str | Path, kind: str | None = None) -> Iterator[Path]:
    """A temporary folder beside `target` that replaces it when the block succeeds; a failure leaves `target` alone.

    What may be replaced is what `check_new_folder` allows, at the beginning and again before the rename. A link stays
    one: the folder that it points to is replaced. Where Linux can exchange two names, `target` is the old folder or the
    new one at every moment. Elsewhere there are two renames, and `recover` repairs a kill between them. Leftovers of
    killed writers are removed. Concurrent writers of one target don't disturb each other: the last one's folder stays.
    """
    path = Path(os.path.realpath(target))
    _refuse_replacing(path, kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, of=re.escape(path.name))
    with claimed(path) as temporary:
        try:
            temporary.mkdir(0o755)
            temporary.chmod(0o755)  # independent of the umask
            yield temporary
            _sync_tree(temporary)
            superseded = set_aside(path)
            superseded += _rename_to(temporary, path, kind)
            sync_folder(path.parent)
        except BaseException:
            remove(temporary)
            recover(path)  # an interrupt may have come between two renames
            raise
        for old in superseded:
            remove(old.parent)  # `path` is complete, so none of them is the only copy


def check_new_folder(out: Path, kind: str | None = None) -> None:
    """Raise OSError if `new_folder` could not write `out`, naming what is in the way.

    A missing folder is created with its parents. Replaced are an empty folder, and a `kind` of iosr_fast (None: none)
    of this schema, whose files are all as its manifest says, and which holds nothing else.
    """
    path = Path(os.path.realpath(out))
    _refuse_replacing(path, kind)
    check_writable(next(folder for folder in path.parents if os.path.lexists(folder)), out)


def _refuse_replacing(folder: Path, kind: str | None) -> None:
    while (before := folder_identity(folder, follow_symlinks=False)) is not None:
        reason = _in_the_way(folder, kind)
        if reason is None:
            return
        if folder_identity(folder, follow_symlinks=False) == before:
            raise FileExistsError(f"{folder} exists and is not replaced: {reason}; choose another place, or remove it")
        # Another writer replaced it meanwhile.


def _in_the_way(folder: Path, kind: str | None) -> str | None:
    """What in a folder must not be deleted, in words; None if nothing is."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        return f"it can't be listed as a folder ({error.strerror})"
    if not names:
        return None
    if kind is None:
        return f"it is not empty but holds {abbreviate(names)}"
    if MANIFEST not in names:
        return f"it holds files that iosr_fast did not write, {abbreviate(names)}"
    try:
        held = open_verified(folder, kind)
        held.check()
        present = list(folder.rglob("*"))
    except (ValueError, OSError) as error:
        return f"it is no complete {kind} of iosr_fast ({error})"
    ours = {folder / name for name in (MANIFEST, *held.files)}
    ours |= {parent for path in ours for parent in path.parents}
    others = sorted(str(path.relative_to(folder)) for path in present if path not in ours)
    return f"it holds other files than those of the {kind}, {abbreviate(others)}" if others else None


def _rename_to(source: Path, target: Path, kind: str | None) -> list[Path]:
    """Rename `source` to `target`; returns the folders set aside for it, where names can't be exchanged."""
    aside_paths: list[Path] = []
    while True:  # concurrent writers rename, so the name comes and goes
        try:
            os.rename(source, target)  # works if the name is free or an empty folder
            return aside_paths
        except OSError as error:
            if error.errno not in _NAME_TAKEN and not os.path.lexists(target):
                raise
        _refuse_replacing(target, kind)  # files may have come while the folder was written
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


def _sync_tree(folder: Path) -> None:
    """Flush a folder's content to the disk before the rename, so that a power cut leaves no half folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync_file(path)
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder)
