"""Computing chunks in one process: threads decode ahead of the encoder, each chunk becomes one part file."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from iosr_fast.encoders.encoder import Embeddings, Encoder
from iosr_fast.images.preprocess import BadImageError
from iosr_fast.pipeline.embedding_files import Part, write_part
from iosr_fast.utils.ordered import map_ordered
from tools.embedding.items import Chunk, Item, load_pixels
from tools.embedding.plan import Done, Plan

AHEAD = 4  # batches decoded before they are asked for, at most
Pixels = np.ndarray | BadImageError
Write = Callable[[Path, Part], None]


def run_chunks(
    encoder: Encoder,
    plan: Plan,
    chunks: Sequence[Chunk],
    out: Path,
    threads: int,
    skip_bad: bool,
    advance: Callable[[int], None] = lambda images: None,
    write: Write | None = None,
) -> Iterator[Done]:
    """Compute the parts of `chunks` one after another and write them to `out`; yields each when its file is there.

    `write` makes the file of a chunk's embeddings, whole or not at all; None writes the embeddings themselves. Raises
    BadImageError for the first unreadable image, unless `skip_bad`. Parts written before stay.
    """
    items = chain.from_iterable(chunk.items for chunk in chunks)
    pixels = decode_ahead(items, plan.image_size, threads, plan.batch, plan.exif_orientation)
    try:
        for chunk in chunks:
            started = time.perf_counter()
            part = embed_chunk(encoder, plan, chunk, pixels, skip_bad, advance)
            name = plan.part_name(chunk.number)
            if write is None:
                write_part(out / name, part, plan.format)
            else:
                write(out / name, part)
            errors = sum(error is not None for error in part.errors)
            seconds = round(time.perf_counter() - started, 3)
            yield Done(name, len(part.keys), errors, seconds, os.getpid(), socket.gethostname())
    finally:
        pixels.close()


def decode_ahead(
    items: Iterable[Item], size: int, threads: int, batch: int, exif_orientation: bool = True
) -> Generator[Pixels, None, None]:
    """Pixels (size, size, 3) uint8 of each item in order, or why there are none; at most AHEAD batches wait decoded."""
    return map_ordered(items, lambda item: load_pixels(item, size, exif_orientation), threads, AHEAD * batch + 1)


def embed_chunk(
    encoder: Encoder,
    plan: Plan,
    chunk: Chunk,
    pixels: Iterator[Pixels],
    skip_bad: bool,
    advance: Callable[[int], None] = lambda images: None,
) -> Part:
    """One chunk's embeddings, from the next len(chunk.items) of `pixels`.

    A batch is `plan.batch` items of the chunk less the unreadable ones, so that what is encoded together depends on the
    chunk alone.
    """
    n = len(chunk.items)
    rows = {name: np.full((n, plan.width), np.nan, plan.dtype) for name in ("plain", "adapted")[: 1 + plan.adapted]}
    errors: list[str | None] = [None] * n
    for start in range(0, n, plan.batch):
        stop = min(start + plan.batch, n)
        taken, good = [], []
        for row in range(start, stop):
            got = next(pixels)
            if not isinstance(got, BadImageError):
                taken.append(row)
                good.append(got)
            elif skip_bad:
                errors[row] = got.reason
            else:
                raise got
        if good:
            embeddings = encoder.encode(np.stack(good))
            for name, array in rows.items():
                array[taken] = getattr(embeddings, name)
        advance(stop - start)
    return Part(
        [item.key for item in chunk.items],
        Embeddings(rows["plain"], rows.get("adapted")),
        errors,
        _columns(chunk),
        plan.part_facts(chunk),
    )


def _columns(chunk: Chunk) -> object:
    if not chunk.rows:
        return None
    import pyarrow as pa

    with pa.ipc.open_stream(chunk.rows) as reader:
        return reader.read_all()
