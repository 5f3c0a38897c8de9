"""Shards of WebDataset (https://github.com/webdataset/webdataset): names by braces, and members grouped into samples.

In a shard, the files of one sample are adjacent and share a path up to the first dot of the file's name, the key; what
follows is the extension, in lower case.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterator
from typing import Any

from iosr_fast.exceptions import IosrFastError

_META = re.compile(r"__[^/]*__($|/)")  # members about the shard
_NAME = re.compile(r"((?:.*/|)[^.]+)\.([^/]*)")


def expand_braces(pattern: str) -> list[str]:
    """The names that a pattern means in bash: {000..127} counts, with leading zeros if it has some, and {a,b} lists.

    >>> expand_braces("train-{08..10}.tar")
    ['train-08.tar', 'train-09.tar', 'train-10.tar']
    >>> expand_braces("{train,test}.tar")
    ['train.tar', 'test.tar']
    """
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if braces is None:
        return [pattern]
    if count := re.fullmatch(r"(\d+)\.\.(\d+)", braces[1]):
        first, last = count.groups()
        width = len(first) if first.startswith("0") else 0
        words = [f"{number:0{width}}" for number in range(int(first), int(last) + 1)]
    else:
        words = braces[1].split(",") if "," in braces[1] else []
    if not words:
        raise IosrFastError(f"expected braces as in {{000..127}} or {{a,b}}, got {braces[0]} in {pattern}")
    rest = [expand_braces(pattern[: braces.start()] + word + pattern[braces.end() :]) for word in words]
    return [name for names in rest for name in names]


def read_members(tar: tarfile.TarFile, read: Callable[[tarfile.TarInfo], Any]) -> Iterator[dict[str, Any]]:
    """The samples of a shard in their order, as {"__key__": key, extension: read(member), ...}.

    Raises IosrFastError for a file that occurs twice in a sample, and what tarfile raises for a damaged shard.
    """
    sample: dict[str, Any] = {}
    for member in tar:
        name = _NAME.fullmatch(member.name)
        if name is None or not member.isreg() or _META.match(member.name):
            continue
        key, extension = name[1], name[2].lower()
        if sample.get("__key__") != key:
            if sample:
                yield sample
            sample = {"__key__": key}
        if extension in sample:
            raise IosrFastError(f"{member.name} occurs twice in the sample {key}")
        sample[extension] = read(member)
    if sample:
        yield sample
