"""Checks of the output path of a command, made before its work."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from iosr_fast.exceptions import IosrFastError


def check_new_file(out: Path, suffixes: Sequence[str] = ()) -> None:
    """Raise ValueError for another suffix than these, OSError if `out` is a folder or can't be written."""
    if suffixes and out.suffix not in suffixes:
        raise IosrFastError(f"expected the name of the file to end in {' or '.join(suffixes)}, got {out}")
    if out.is_dir():
        raise IsADirectoryError(f"expected a file to write, got the folder {out}; add a name to it")
    if out.exists() and not out.is_file():
        raise FileExistsError(f"expected a file to write, got {out}, which is a device or a pipe; give another name")
    parent = Path(os.path.realpath(out)).parent
    if not parent.is_dir():
        raise FileNotFoundError(f"expected a folder to write {out} to, found none; create it first")
    check_writable(parent, out)


def is_utf8(path: str) -> bool:
    """Whether a text file in UTF-8 can hold a file name."""
    return path.isascii() or path.encode("utf-8", "replace").decode() == path


def check_utf8(paths: Iterable[str]) -> None:
    """Raise IosrFastError for a file name that a text file in UTF-8 can't hold."""
    for path in paths:
        if not is_utf8(path):
            raise IosrFastError(f"expected file names in UTF-8, got {path!r}; rename it")


def check_writable(folder: Path, out: Path) -> None:
    """Raise OSError unless `out` can be created in `folder`."""
    if not folder.is_dir():
        raise NotADirectoryError(f"expected a folder to write {out} to, got the file {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"expected a folder to write {out} to, got {folder}, which can't be written to")
