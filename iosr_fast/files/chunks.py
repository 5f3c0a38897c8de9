"""Compute chunks of images in this process, and write each as a part file."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.files.embedding_files import Part
from iosr_fast.files.part_folder import Done
from iosr_fast.files.plan import Opened, Plan
from iosr_fast.files.source import Chunk
from iosr_fast.files.stream import Stage, encode_batches
from iosr_fast.images.decode import CpuDecoder


def run_chunks(
    plan: Plan,
    chunks: Sequence[Chunk],
    out: Path,
    opened: Opened,
    threads: int,
    skip_bad: bool,
    advance: Callable[[int], None] = lambda images: None,
) -> Generator[Done, None, None]:
    """Compute the parts of `chunks` in order in this process; yield each one when its file is written.

    Batches don't cross chunks, so a part depends on its chunk alone. Raises BadImageError for the first unreadable
    image, unless `skip_bad`; parts that are already written stay.
    """
    encoder, write = opened
    batches = (
        (start, [item.path for item in chunk.items[start : start + plan.batch]])
        for chunk in chunks
        for start in range(0, len(chunk.items), plan.batch)
    )
    stage = Stage(encoder, 1, threads)
    results = encode_batches(
        stage, CpuDecoder(exact=True, exif_orientation=plan.exif_orientation), batches, Embeddings.to_numpy
    )
    try:
        for chunk in chunks:
            started, count = time.perf_counter(), len(chunk.items)
            names = ("plain", "adapted")[: 1 + plan.adapted]
            arrays = {name: np.full((count, plan.width), np.nan, plan.dtype) for name in names}
            reasons: list[str | None] = []
            while len(reasons) < count:
                errors, embeddings = next(results)
                for error in errors:
                    if error is not None and not skip_bad:
                        raise error
                readable = [len(reasons) + i for i, error in enumerate(errors) if error is None]
                reasons += [None if error is None else error.reason for error in errors]
                for name, array in arrays.items() if embeddings is not None else ():
                    array[readable] = getattr(embeddings, name)
                advance(len(errors))
            rows = Embeddings(arrays["plain"], arrays.get("adapted"))
            keys = [item.key for item in chunk.items]
            name = plan.part_name(chunk.number)
            write(out / name, Part(keys, rows, reasons, plan.part_facts(chunk)))
            seconds = round(time.perf_counter() - started, 3)
            unreadable = sum(reason is not None for reason in reasons)
            yield Done(name, count, unreadable, seconds, os.getpid(), socket.gethostname())
    finally:
        results.close()
