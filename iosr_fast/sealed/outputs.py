"""Checks of the output path of a command, made before its work, and the one rule for files that it may replace."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from iosr_fast.exceptions import IosrFastError

PAGE_MARK = '<meta name="generator" content="iosr_fast">'
# How a page, figures in JSON and the metadata of an ONNX file say, near an end of the file, that iosr_fast wrote it.
_MARKS = PAGE_MARK.encode(), b'"iosr_fast": "', b"\n\x09iosr_fast\x12"
_ENDS = 1 << 20  # bytes


def check_new_file(out: Path, suffixes: Sequence[str] = ()) -> None:
    """Raise ValueError for another suffix than these, OSError if `out` is a folder, can't be written, or is a file that
    is not replaced: one that has content and does not say that iosr_fast wrote it."""
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
    if out.exists() and not _is_replaceable(out):
        raise FileExistsError(
            f"{out} exists already, and does not say that iosr_fast wrote it; remove it or choose another name"
        )


def _is_replaceable(file: Path) -> bool:
    with file.open("rb") as opened:
        start = opened.read(_ENDS)
        opened.seek(max(0, file.stat().st_size - _ENDS))
        ends = start, opened.read()
    return not start or any(mark in end for mark in _MARKS for end in ends)


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
