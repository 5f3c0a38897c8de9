"""WebDataset shards: the position of each sample's image in its tar file, so that a chunk reads only its own bytes.

Only the tar headers are read, so shards must be uncompressed tar files on a file system.
"""

from __future__ import annotations

import glob
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from iosr_fast.exceptions import IosrFastError
from iosr_fast.images.listing import IMAGE_SUFFIXES, walk
from iosr_fast.pipeline.source import Item, Source, check_keys, stamp_of
from iosr_fast.utils.tar_shards import expand_braces, read_members

READERS = 8  # shards indexed at a time: reading headers waits for the disk
_FIELDS = frozenset(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)


def shard_source(location: str, field: str | None = None) -> Source:
    """Every sample of a folder, glob or brace pattern of .tar shards, in stored order.

    Keys are "shard#sample", with the shard's path relative to the common folder. `field` names the member with the
    image ("jpg"), needed if samples have several. A sample without an image is an item with a fault. Raises
    FileNotFoundError for a missing shard, ValueError for a damaged or compressed one and for an ambiguous sample.
    """
    shards = find_shards(location)
    top = (
        Path(os.path.abspath(location))
        if Path(location).is_dir()
        else Path(os.path.commonpath([path.parent for path in shards]))
    )
    names = [path.relative_to(top).as_posix() for path in shards]
    with ThreadPoolExecutor(READERS) as pool:
        indexed = list(pool.map(lambda path, name: index_shard(path, name, field), shards, names))
    items: list[Item] = []
    starts: list[int] = []
    for samples in indexed:
        starts.append(len(items))
        items += samples
    if not items:
        raise IosrFastError(f"expected samples in the shards of {location}, found none in {len(shards)} shards")
    check_keys(items, location)
    return Source({"kind": "webdataset", "path": str(top), "field": field}, items, tuple(starts))


def find_shards(location: str) -> list[Path]:
    """The .tar files of a folder (and below), of a glob, or of a brace pattern like "train-{000..127}.tar", sorted."""
    if "://" in location or location.startswith("pipe:"):
        raise IosrFastError(
            f"expected shards on a file system, got {location}; mount the store or download the shards first"
        )
    if Path(location).is_dir():
        paths = [Path(path) for path, _ in walk(location, {".tar"})]
    elif Path(location).is_file():
        paths = [Path(location)]
    else:
        paths = []
        for pattern in expand_braces(location):
            matches = [Path(path) for path in glob.glob(pattern, recursive=True)]
            if not matches:
                raise FileNotFoundError(f"expected shards at {pattern} (of {location}), found none")
            paths += matches
    if not paths:
        raise FileNotFoundError(f"expected shards ending in .tar in {location}, found none")
    # Links are not resolved: their targets may have other names.
    return sorted({Path(os.path.abspath(path)) for path in paths})


def index_shard(path: Path, name: str, field: str | None = None) -> list[Item]:
    """The samples of one shard as items with the image's position in the file. Reads headers only."""
    stamp = stamp_of(path.stat())
    try:
        with tarfile.open(path, "r:") as tar:
            samples = list(read_members(tar, lambda member: (member.offset_data, member.size)))
            _check_end(tar)
    except tarfile.ReadError as error:
        raise IosrFastError(
            f"expected a whole, uncompressed tar file at {path}: {error}; download or create it again"
        ) from error
    except ValueError as error:
        raise IosrFastError(f"expected every member once in the shard {path}: {error.args[0]}") from error
    return [_item(sample, path, name, stamp, field) for sample in samples]


def _check_end(tar: tarfile.TarFile) -> None:
    """Raise ReadError unless a block of zeros ends the archive. tarfile treats any invalid header as the end."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"it is truncated or damaged at byte {tar.offset}")


def _item(sample: dict[str, Any], path: Path, name: str, stamp: str, field: str | None) -> Item:
    key = f"{name}#{sample['__key__']}"
    field = None if field is None else field.lower().removeprefix(".")
    images = [field] if field in sample else [] if field is not None else sorted(_FIELDS & set(sample))
    if len(images) > 1:
        raise IosrFastError(f"expected one image a sample, got {images} in {key}; choose one with --image-field")
    if not images:
        members = sorted(name for name in sample if not name.startswith("__"))
        missing = f"no {field}" if field is not None else "no image"
        return Item(key, str(path), stamp, fault=f"the sample has {missing} among {members}")
    offset, size = sample[images[0]]
    return Item(key, str(path), f"{stamp}-{offset}-{size}", offset, size)
