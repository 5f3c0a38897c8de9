"""Compute chunks of images in this process, and write each as a part file."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from iosr_fast.files.parts import Done, part_name
from iosr_fast.files.reader import Reader
from iosr_fast.files.source import Chunk
from iosr_fast.files.stream import batch_sizes, batches_of
from iosr_fast.files.work import Work
from iosr_fast.sealed.files import new_file
from iosr_fast.sealed.manifest import sha256


def run_chunks(
    work: Work,
    reader: Reader,
    chunks: Sequence[Chunk],
    images: int,
    folder: Path,
    advance: Callable[[int], None] = lambda images: None,
) -> Generator[Done, None, None]:
    """Compute the parts of some chunks of a run of so many `images`, in order in this process; yield each one when its
    file is written. Raises BadImageError for the first unreadable image unless the reader skips it.

    Batches end where a chunk does, so a part depends on its chunk alone.
    """
    stage = reader.stage(images)
    digests = {}

    def batches() -> Iterator[tuple[int, Sequence[Any]]]:
        for chunk in chunks:
            digests[chunk.number] = chunk.digest()  # before an image of it is read
            count = len(chunk.paths)
            sizes = batch_sizes(count, reader.batch, stage.callers, images - chunk.start - count)
            yield from batches_of(chunk.paths, sizes, chunk.start)

    with closing(reader.read_batches(stage, batches(), work.use)) as read:
        for chunk in chunks:
            started, results, reasons = time.perf_counter(), list[Any](), list[str | None]()
            while len(reasons) < len(chunk.paths):
                errors, result = next(read)
                reasons += [None if error is None else error.reason for error in errors]
                if result is not None:
                    results.append(result)
                advance(len(errors))
            path = folder / part_name(chunk.number, work.suffix)
            with new_file(path) as temporary:
                rejected, accepted = work.write(temporary, chunk.keys, results, reasons)
            unread = sum(reason is not None for reason in reasons)
            seconds = round(time.perf_counter() - started, 3)
            counted, writer = (len(reasons), unread, rejected, seconds), (os.getpid(), socket.gethostname())
            yield Done(path.name, sha256(path), digests.pop(chunk.number), *counted, *writer, accepted)
