"""A folder of uploads, which are other people's pictures, and of tables about them."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from contextlib import suppress
from pathlib import Path

from iosr_fast.exceptions import IosrFastError
from iosr_fast.images.limits import image_kind
from iosr_fast.sealed.files import lock_folder
from iosr_fast.utils.csv_text import read_rows

_PICTURE = re.compile(r"[0-9a-f]{32}\.(?:png|jpeg|webp|image)")


def picture_name(image: bytes) -> str:
    """The name of a picture's file: 32 hexadecimal digits of the SHA-256 of its bytes, and its kind.

    >>> picture_name(b"GIF89a")
    '610f5ae4d76e332636a17bd357fd6ce9.image'
    """
    return f"{hashlib.sha256(image).hexdigest()[:32]}.{image_kind(image).lower() or 'image'}"


def is_picture_name(name: str) -> bool:
    return _PICTURE.fullmatch(name) is not None


class KeptFolder:
    """The files of one server. All are opened below the folder's descriptor, never through a link, and only their owner
    can read them. Nothing but pictures is removed: a name in a table that others may edit must have the pattern of
    `picture_name`.

    Raises IosrFastError where another server has the folder, and OSError where it can't be made.
    """

    def __init__(self, path: Path) -> None:
        path.mkdir(0o700, parents=True, exist_ok=True)
        try:
            lock = lock_folder(path)
        except BlockingIOError as error:
            raise IosrFastError(f"another server collects into {path}: choose another folder") from error
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW) if lock is None else lock

    def has(self, name: str) -> bool:
        """Whether `name` is that of a picture in the folder."""
        with suppress(FileNotFoundError):
            status = os.stat(name, dir_fd=self._descriptor, follow_symlinks=False) if is_picture_name(name) else None
            return status is not None and stat.S_ISREG(status.st_mode)
        return False

    def remove(self, name: str) -> None:
        """Remove a picture, if `name` is that of one."""
        if self.has(name):
            os.unlink(name, dir_fd=self._descriptor)

    def write(self, name: str, content: bytes) -> None:
        """Write a file whole or not at all; it replaces a file, or a link itself, of this name."""
        temporary = f".{name}.tmp"
        try:
            with open(temporary, "wb", opener=self._open) as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, name, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)
            os.fsync(self._descriptor)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=self._descriptor)

    def append(self, name: str, lines: str, first: str = "") -> None:
        """Add lines to the end of a file, after a line end where somebody left it out; after `first` if it is empty."""
        with open(name, "a+b", opener=self._open) as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            before = first if not end else "" if file.read(1) == b"\n" else "\n"
            file.write(f"{before}{lines}".encode())
            file.flush()
            os.fsync(file.fileno())

    def read_lines(self, name: str) -> list[str]:
        """The lines of a text; none of one that is not there."""
        try:
            with open(name, encoding="utf-8", opener=self._open) as file:
                return file.readlines()
        except FileNotFoundError:
            return []

    def read_rows(self, name: str) -> tuple[list[str], list[dict[str, str]]]:
        """The columns and rows of a table (csv_text.read_rows); of one that is not there none."""
        try:
            return read_rows(self._path / name, opener=self._open)
        except FileNotFoundError:
            return [], []

    def close(self) -> None:
        os.close(self._descriptor)

    def _open(self, path: str, flags: int) -> int:
        return os.open(Path(path).name, flags | os.O_NOFOLLOW, 0o600, dir_fd=self._descriptor)
