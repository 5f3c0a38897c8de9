"""Compute chunks of images in this process: the bytes of each part, and what they hold."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any, Self

from iosr_fast.files.source import Chunk
from iosr_fast.files.stream import Reader, batches_of
from iosr_fast.files.work import Counts, Work


@dataclass(frozen=True)
class Done:
    """A finished part: the SHA-256 of its `size` bytes, the digest of its images before they were read, what they are,
    and the process that made it."""

    part: str
    sha256: str
    size: int
    chunk: str
    counts: Counts
    pid: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def of_json(cls, line: str | bytes) -> Self:
        """Raises ValueError, TypeError or KeyError for anything else than `to_json` gave."""
        fields = json.loads(line)
        return cls(**{**fields, "counts": Counts(*fields["counts"])})


def run_chunks(
    work: Work,
    reader: Reader,
    chunks: Sequence[Chunk],
    images: int,
    advance: Callable[[int], None] = lambda images: None,
) -> Generator[tuple[Done, bytes], None, None]:
    """Compute the parts of some chunks of a run of so many `images`, in order in this process. Raises BadImageError
    for the first unreadable image unless the reader skips it.

    Batches end where a chunk does, so a part depends on its chunk alone.
    """
    stage = reader.stage(images)
    digests = {}

    def batches() -> Iterator[tuple[int, Sequence[Any]]]:
        for chunk in chunks:
            digests[chunk.number] = chunk.digest()  # before an image of it is read
            later = images - chunk.start - len(chunk.paths)
            yield from batches_of(chunk.paths, reader.batch, stage.callers, chunk.start, later)

    with closing(reader.read_batches(stage, batches(), work.use)) as read:
        for chunk in chunks:
            results, reasons = list[Any](), list[str | None]()
            while len(reasons) < len(chunk.paths):
                errors, result = next(read)
                reasons += [None if error is None else error.reason for error in errors]
                if result is not None:
                    results.append(result)
                advance(len(errors))
            content, *of_labels = work.encode(chunk.keys, results, reasons, chunk.number == 0)
            counts = Counts(len(reasons), sum(reason is not None for reason in reasons), *of_labels)
            of_content = hashlib.sha256(content).hexdigest(), len(content)
            yield Done(chunk.part(work.suffix), *of_content, digests.pop(chunk.number), counts, os.getpid()), content
