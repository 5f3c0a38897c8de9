"""Which images a folder holds, in an order that depends on their names alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from iosr_fast.preprocess import IMAGE_SUFFIXES


def list_images(folder: str | Path) -> list[str]:
    """Paths of the images in a folder and in all below it, sorted name by name.

    Told by their suffix; what begins with a dot is left out, links are followed. Raises FileNotFoundError without the
    folder.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"expected a folder of images, found no folder {folder}")
    found = [path for path, _ in walk(folder) if os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES]
    return sorted(found, key=lambda path: path.split(os.sep))


def walk(folder: str | Path) -> Iterator[tuple[str, os.stat_result]]:
    """Every file below `folder` with its status. Hidden ones are left out; a link to a folder above is not followed."""
    pending = [(str(folder), frozenset[tuple[int, int]]())]
    while pending:
        place, above = pending.pop()
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in above:
            continue
        above |= {(status.st_dev, status.st_ino)}
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    pending.append((entry.path, above))
                elif entry.is_file():
                    yield entry.path, entry.stat()
