"""The images of a folder as the input of a run."""

from __future__ import annotations

from pathlib import Path

from iosr_fast.exceptions import IosrFastError
from iosr_fast.files.source import Item, Source, check_keys, stamp_of
from iosr_fast.images.listing import IMAGE_SUFFIXES, Skipped, walk


def folder_source(folder: Path) -> Source:
    """The images of a folder and all below it (images.listing); a warning reports what was skipped.

    Raises FileNotFoundError without the folder, IosrFastError for a file, for a folder without images, and for names
    that are not UTF-8.
    """
    folder = folder.resolve()
    if not folder.exists():
        raise FileNotFoundError(f"expected a folder of images at {folder}, found nothing")
    if not folder.is_dir():
        raise IosrFastError(f"expected a folder of images, got the file {folder}; give the folder it is in")
    skipped = Skipped()
    items = [
        Item(Path(path).relative_to(folder).as_posix(), path, stamp_of(status))
        for path, status in walk(folder, skipped=skipped)
    ]
    if not items:
        others = f"; skipped {skipped.summary()}" if skipped.total else ""
        raise IosrFastError(f"expected images ({', '.join(sorted(IMAGE_SUFFIXES))}) in {folder}, found none{others}")
    skipped.warn(folder, len(items))
    items.sort(key=lambda item: item.key)
    check_keys(items, str(folder))
    return Source({"kind": "folder", "path": str(folder)}, items)
