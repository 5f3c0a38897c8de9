"""An index of WebDataset shards, with their samples in order and labels. Shards are read once; the index is JSON.

A shard is a tar file in which the files of one sample are adjacent and share a name up to its first dot (its key):
an image (.jpg, .jpeg, .png or .webp) and a label, the first of .cls (an integer), .json (its "label" or "class",
an integer or a name) and .txt (a class name). Source of the format: https://github.com/webdataset/webdataset.
"""

from __future__ import annotations

import json
import lzma
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iosr_fast.exceptions import IosrFastError
from iosr_fast.utils.files import new_file
from iosr_fast.utils.tar_shards import expand_braces, read_members

INDEX = ".iosr_fast-shards.json"
FORMAT = 1
IMAGES = ("jpg", "jpeg", "png", "webp")
SUFFIXES = (".tar", ".tar.gz", ".tgz")
DAMAGE = (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError)


@dataclass(frozen=True)
class Shard:
    """One shard: size and time of change of its file, and key, image's extension and label of each sample in order."""

    path: Path
    bytes: int
    mtime_ns: int
    keys: list[str]
    images: list[str]
    labels: list[int] | list[str]


def find_shards(shards: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files of a local folder, of a path with braces ("train-{000..127}.tar"), or of a list of those.

    Raises FileNotFoundError for missing shards, ValueError for repeated ones.
    """
    patterns = [shards] if isinstance(shards, (str, Path)) else list(shards)
    if len(patterns) == 1 and Path(patterns[0]).is_dir():
        files = sorted(path for path in Path(patterns[0]).iterdir() if path.name.endswith(SUFFIXES))
        if not files:
            raise FileNotFoundError(f"expected shards ({', '.join(SUFFIXES)}) in {patterns[0]}, found none")
        return files
    paths = [Path(path) for pattern in patterns for path in expand_braces(str(pattern))]
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"{len(missing)} of {len(paths)} shards are missing: {', '.join(missing[:10])}")
    if len(set(paths)) != len(paths) or not paths:
        raise IosrFastError(f"expected shards, each once, got {len(paths)} of which {len(set(paths))} differ")
    return paths


def index_shards(paths: Sequence[Path], cache: Path | None) -> list[Shard]:
    """Read every shard that is new or changed since the index was written, and write the index to `cache` or, without
    it, beside the shards.

    Raises ValueError, naming shard and key, for a damaged shard or a sample without image or label, PermissionError if
    the index can't be written.
    """
    folder = (cache or Path(os.path.commonpath([path.absolute().parent for path in paths]))).absolute()
    index = folder / INDEX
    entries = _load_index(index)
    result: list[Shard] = []
    changed = False
    try:
        for path in paths:
            absolute = path.absolute()
            name = absolute.relative_to(folder).as_posix() if absolute.is_relative_to(folder) else str(absolute)
            stat = path.stat()
            facts = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
            entry = entries.get(name)
            if entry is None or any(entry[key] != value for key, value in facts.items()):
                if not changed:
                    _check_writable(folder)
                entry = facts | _read_entry(path)
                entries[name], changed = entry, True
            result.append(Shard(path, **entry))
    finally:  # an interrupted pass over many shards continues next time
        if changed:
            with new_file(index) as temporary:
                temporary.write_text(json.dumps({"format": FORMAT, "shards": entries}), encoding="utf-8")
    return result


def read_samples(path: Path) -> Iterator[dict[str, Any]]:
    """The samples of a shard from start to end, as {"__key__": key, extension: bytes, ...}.

    Raises ValueError, naming the shard and the last good key, for a damaged one.
    """
    key = None
    with path.open("rb") as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r|*") as tar:
                for sample in read_members(tar, lambda member: tar.extractfile(member).read()):  # type: ignore[union-attr]
                    key = sample["__key__"]
                    yield sample
        except (*DAMAGE, ValueError) as error:
            where = "at its start" if key is None else f"after key {key}"
            reason = error.args[0] if error.args else type(error).__name__
            raise IosrFastError(f"shard {path} is damaged {where} ({reason}); download or create it again") from error


def _read_entry(path: Path) -> dict[str, Any]:
    _check_end(path)  # first: a damaged header would show as samples without image or label
    keys, images, labels = [], [], []
    for sample in read_samples(path):
        where = f"key {sample['__key__']} of shard {path}"
        suffixes = [suffix for suffix in IMAGES if suffix in sample]
        if len(suffixes) != 1:
            have = ", ".join(sorted(name for name in sample if not name.startswith("__")))
            raise IosrFastError(
                f"expected one image ({', '.join(IMAGES)}) at {where}, found {len(suffixes)} among: {have}"
            )
        keys.append(sample["__key__"])
        images.append(suffixes[0])
        labels.append(_label(sample, where))
    if not keys:
        raise IosrFastError(f"shard {path} holds no samples; leave it out, or download or create it again")
    return {"keys": keys, "images": images, "labels": labels}


def _label(sample: dict[str, Any], where: str) -> int | str:
    try:
        if "cls" in sample:
            return int(sample["cls"].decode().strip())
        if "json" in sample:
            facts = json.loads(sample["json"])
            label = facts.get("label", facts.get("class")) if isinstance(facts, dict) else None
            if isinstance(label, (int, str)) and not isinstance(label, bool):
                return label
        if "txt" in sample and (name := sample["txt"].decode().strip()):
            return str(name)
    except ValueError as error:  # bad UTF-8 and bad JSON are ValueErrors too
        raise IosrFastError(f"the label at {where} can't be read: {error}") from error
    raise IosrFastError(
        f'expected a label at {where}: .cls with an integer, .json with "label" or "class", or .txt with a class name'
    )


def _check_end(path: Path) -> None:
    """Refuse a tar file that does not end in zeros: Python's tarfile silently takes a damaged header for the end.

    For a compressed file this also verifies the checksum, which tarfile skips when it reads a stream.
    """
    try:
        with tarfile.open(path, "r:*") as archive:
            archive.getmembers()
            file: Any = archive.fileobj  # the decompressed stream
            file.seek(archive.offset)
            sizes = [0 if any(block) else len(block) for block in iter(lambda: file.read(1 << 20), b"")]
    except DAMAGE as error:
        for _ in read_samples(path):  # its message names the last good key, if it finds the damage
            pass
        raise IosrFastError(f"shard {path} is damaged ({error}); download or create it again") from error
    if not sizes or 0 in sizes:
        raise IosrFastError(f"shard {path} is damaged: it does not end as a tar file does; download or create it again")


def _load_index(index: Path) -> dict[str, Any]:
    """The entries by shard; none if the file is missing, damaged or of another format, and is to be written again."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            return {}
        needed = {"bytes", "mtime_ns", "keys", "images", "labels"}
        return {name: entry for name, entry in content["shards"].items() if set(entry) == needed}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _check_writable(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"the index of the shards can't be written to {folder}; give another folder as cache=")
