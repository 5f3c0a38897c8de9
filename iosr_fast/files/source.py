"""The input of a run: a sorted list of images, cut into chunks. One chunk becomes one part file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from iosr_fast.exceptions import IosrFastError


@dataclass(frozen=True, slots=True)
class Item:
    """One image file. `key` names it in the output; `stamp`, its size and time of change, changes with its bytes."""

    key: str
    path: str
    stamp: str


@dataclass(frozen=True)
class Chunk:
    """Consecutive items."""

    number: int
    items: list[Item]

    def digest(self) -> str:
        """Changes with the keys and the images' stamps."""
        return hashlib.sha256(json.dumps([(item.key, item.stamp) for item in self.items]).encode()).hexdigest()


@dataclass(frozen=True)
class Source:
    """The images of a folder, sorted by key; `described` is its entry in the plan."""

    described: dict[str, Any]
    items: list[Item]

    def keys_digest(self) -> str:
        """SHA-256 over the keys, in order."""
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(item.key.encode() + b"\0")
        return digest.hexdigest()

    def cut(self, size: int) -> list[Chunk]:
        """Contiguous runs of at most `size` items."""
        starts = range(0, len(self.items), size)
        return [Chunk(number, self.items[start : start + size]) for number, start in enumerate(starts)]


def stamp_of(status: os.stat_result) -> str:
    """Size in bytes and time of change in nanoseconds of a file."""
    return f"{status.st_size}-{status.st_mtime_ns}"


def check_keys(items: Iterable[Item], where: str) -> None:
    """Raise ValueError for a key that occurs twice or is not UTF-8."""
    seen: set[str] = set()
    for item in items:
        try:
            item.key.encode()
        except UnicodeEncodeError as error:
            raise IosrFastError(f"expected names in UTF-8 in {where}, got {item.key!r}; rename it") from error
        if item.key in seen:
            raise IosrFastError(f"expected each image once in {where}, got {item.key} more than once; remove one")
        seen.add(item.key)
