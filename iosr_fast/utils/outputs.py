"""Checks of the output path of a command, made before its work."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from iosr_fast.exceptions import IosrFastError
from iosr_fast.utils.manifest import MANIFEST


def check_new_file(out: Path, suffixes: Sequence[str] = ()) -> None:
    """Raise ValueError for another suffix than these, OSError if `out` is a folder or can't be written."""
    if suffixes and out.suffix not in suffixes:
        raise IosrFastError(f"expected the name of the file to end in {' or '.join(suffixes)}, got {out}")
    if out.is_dir():
        raise IsADirectoryError(f"expected a file to write, got the folder {out}; add a name to it")
    parent = out.absolute().parent
    if not parent.is_dir():
        raise FileNotFoundError(f"expected a folder to write {out} to, found none; create it first")
    _check_writable(parent, out)


def check_utf8(paths: Iterable[str]) -> None:
    """Raise IosrFastError for a file name that a text file in UTF-8 can't hold."""
    for path in paths:
        if not path.isascii() and path.encode("utf-8", "replace").decode() != path:
            raise IosrFastError(f"expected file names in UTF-8, got {path!r}; rename it")


def check_new_folder(out: Path, kind: str | None = None) -> None:
    """Raise OSError if `files.new_folder` could not write `out`, or would replace anything but a `kind` of iosr_fast.

    An empty folder and a folder with the manifest of a `kind` may be replaced; a missing one may be created with its
    parents. Without a `kind` nothing is replaced.
    """
    if os.path.lexists(out) and not out.is_dir():
        raise NotADirectoryError(f"expected a folder to write, got the file {out}; choose another place")
    if out.is_dir() and any(out.iterdir()):
        existing = _kind_of(out)
        if kind is None or existing != kind:
            content = "files that iosr_fast did not write" if existing is None else f"a folder of kind {existing!r}"
            raise FileExistsError(f"{out} exists and holds {content}; choose another place, or remove it")
    _check_writable(next(folder for folder in out.absolute().parents if os.path.lexists(folder)), out)


def _kind_of(folder: Path) -> str | None:
    """The kind in a folder's manifest; None without a manifest of iosr_fast."""
    try:
        return str(json.loads((folder / MANIFEST).read_bytes())["kind"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check_writable(folder: Path, out: Path) -> None:
    if not folder.is_dir():
        raise NotADirectoryError(f"expected a folder to write {out} to, got the file {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"expected a folder to write {out} to, got {folder}, which can't be written to")
