"""Images in, embeddings or predictions out, in order: decoding overlaps encoding, and few images are in memory at once.

There are two ways to use a CPU. If several threads may execute one encoder at once (`Encoder.parallel`), each of
`callers` threads decodes and encodes whole batches with few cores, so no core waits at a barrier for another.
Otherwise, and on a GPU, one caller encodes with all cores, and threads decode ahead of it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, TypeAlias, TypeVar
from weakref import WeakKeyDictionary

import numpy as np

from iosr_fast.encoders.encoder import Embeddings, Encoder
from iosr_fast.encoders.rows import Rows, decode_rows
from iosr_fast.exceptions import BadImageError
from iosr_fast.head.support_images import SupportSettings
from iosr_fast.images.crop import Sharing, path_of
from iosr_fast.images.preprocess import Decode, DecodedBatch, as_image_list, decode_batch
from iosr_fast.utils.machine import split_cores, usable_threads
from iosr_fast.utils.numbers import check_integer
from iosr_fast.utils.ordered import map_ordered

Errors: TypeAlias = list[BadImageError | None]
_MAX_CALLERS = 8  # each has a batch and its activations in memory; with more cores, sessions get more threads
_MIN_BATCHES = 4  # per caller; opening another session isn't worth it for fewer
_MIN_BATCH = 4  # images in the smaller batches at the end
_OVERFLOW = "its embedding is not finite, or zeros, as where an encoder overflows: use one of more bits, like fp32"
_Batch: TypeAlias = tuple[int, Sequence[Any]]  # the position of its first source, and its sources
_R = TypeVar("_R")
_several_runs: WeakKeyDictionary[Encoder, Encoder] = WeakKeyDictionary()  # an encoder -> the one opened for its folders


@dataclass(frozen=True)
class ReadOptions:
    """How images are read: `batch` are encoded at a time (None: 16 on a CPU, up to 64 on a GPU), by an engine of this
    `runtime`, with so many `threads` on a CPU (None: all). With `skip_bad` unreadable images are reported, else the
    first one is raised."""

    batch: int | None = None
    runtime: str = "auto"
    threads: int | None = None
    skip_bad: bool = False


@dataclass(frozen=True)
class Stage:
    """An encoder with `callers` threads that decode and encode, or one caller and `decode_threads` ahead of it."""

    encoder: Encoder
    callers: int
    decode_threads: int


def batches_of(sources: Sequence[Any], batch: int, callers: int, start: int = 0, later: int = 0) -> Iterator[_Batch]:
    """Runs of `sources`, behind which a run has `later` ones, each with the position of its first one, counted from
    `start`: `batch` of them, and near the end of the run half of a caller's even share of the rest, so that several
    callers finish together (guided self-scheduling: Polychronopoulos and Kuck, 1987).

    A size depends only on what remains, so a resumed run has the same remaining batches.
    """
    done = 0
    while left := len(sources) - done:
        share = batch if callers == 1 else max(_MIN_BATCH, ceil((left + later) / (2 * callers)))
        size = min(batch, share, left)
        yield start + done, sources[done : done + size]
        done += size


def _usable(embeddings: Embeddings) -> np.ndarray:
    """(B,) whether the rows are finite, and not zeros."""
    both = embeddings.to_numpy()
    parts = [part for part in (both.plain, both.adapted) if part is not None]
    usable: np.ndarray = np.logical_and.reduce([np.isfinite(part).all(1) & part.any(1) for part in parts])
    return usable


class Reader:
    """Reads images for an encoder, whose folder is `engine`, by the orientation and the margin of `settings`."""

    def __init__(self, encoder: Encoder, engine: Path, settings: SupportSettings, options: ReadOptions) -> None:
        self.encoder, self.engine, self.settings, self.options = encoder, engine, settings, options
        pictures = partial(decode_batch, exif_orientation=settings.exif_orientation)
        self.decode: Decode = decode_rows if isinstance(encoder, Rows) else pictures
        most = 16 if encoder.buckets is None else min(64, encoder.max_batch)
        self.batch = most if options.batch is None else check_integer("batch", options.batch, 1)

    def listed(self, images: Any) -> Sequence[Any]:
        """One image or many as a sequence, or rows of embeddings with their keys."""
        return self.encoder.keyed(images) if isinstance(self.encoder, Rows) else as_image_list(images)

    def stage(self, images: int) -> Stage:
        """How the cores are used for a number of images.

        For many batches it opens the engine again for several runs at once with few threads each, unless the encoder is
        so, and keeps it for the next call as long as the encoder is in use. Raises ValueError for threads below 1.
        """
        from iosr_fast.encoders.runtimes import open_engine

        encoder, threads = self.encoder, self.options.threads
        threads = usable_threads() if threads is None else check_integer("threads", threads, 1)
        most = min(threads, _MAX_CALLERS)
        callers, few = split_cores(threads, most, most)
        if encoder.parallel and callers > 1 and images >= _MIN_BATCHES * callers * self.batch:
            if (encoder.threads, encoder.runs) != (few, callers):
                several = _several_runs.get(encoder)
                if several is None or (several.threads, several.runs) != (few, callers):
                    # The folder may have been replaced since the encoder was opened from it.
                    source, name, adapted = encoder.source or self.engine, encoder.runtime, encoder.adapted
                    several = open_engine(source, name, verify=False, threads=few, runs=callers, adapted=adapted)
                    _several_runs[encoder] = several
                encoder = several
            return Stage(encoder, callers, 0)
        if encoder.buckets is None:  # on a CPU, where the encoder needs most cores
            threads = max(1, threads // 4)
        return Stage(encoder, 1, threads)

    def read_batches(
        self, stage: Stage, batches: Iterable[_Batch], use: Callable[[Embeddings], _R]
    ) -> Generator[tuple[Errors, _R | None], None, None]:
        """For each batch, in order: the sources' errors, and `use` of the embeddings of the readable ones (None if
        there are none). Raises BadImageError for the first unreadable image unless `skip_bad`; one without a usable
        embedding is unreadable, too.

        A batch is encoded together, without its unreadable images; parts share their picture across batches. Pixels of
        at most `callers` batches are in memory or, with one caller, of `decode_threads` + 2. When the generator ends,
        also by close(), its threads have ended.
        """
        if not isinstance(self.encoder, Rows):
            share = Sharing(self.settings.margin)
            batches = ((start, [*share(sources)]) for start, sources in batches)

        def pixels_of(batch: _Batch) -> tuple[_Batch, DecodedBatch]:
            return batch, self.decode(batch[1], stage.encoder.geometry, batch[0])

        def encode(read: tuple[_Batch, DecodedBatch]) -> tuple[Errors, _R | None]:
            (start, sources), (errors, pixels) = read
            if pixels is None:
                return errors, None
            embeddings = stage.encoder.encode_on_device(pixels)
            if not (usable := _usable(embeddings)).all():
                readable = np.flatnonzero([error is None for error in errors])
                for i in readable[~usable].tolist():
                    errors[i] = BadImageError(path_of(sources[i]), start + i, _OVERFLOW)
                embeddings = embeddings[usable]
            return errors, use(embeddings) if usable.any() else None

        if stage.callers > 1:
            ahead: Any = map_ordered(batches, lambda one: encode(pixels_of(one)), stage.callers, 2 * stage.callers)
        else:
            ahead = map_ordered(batches, pixels_of, stage.decode_threads, stage.decode_threads + 2)
        with closing(ahead):
            # `map` frees the pixels before the consumer runs.
            for errors, result in ahead if stage.callers > 1 else map(encode, ahead):
                if not self.options.skip_bad and (unread := [error for error in errors if error is not None]):
                    raise unread[0]
                yield errors, result

    def read(
        self,
        sources: Sequence[Any],
        use: Callable[[Embeddings], _R],
        advance: Callable[[int], None] = lambda images: None,
    ) -> tuple[list[int], list[BadImageError], list[_R]]:
        """The positions of the readable sources, the errors of the others, and `use` of the embeddings of each batch of
        readable ones; as `read_batches`."""
        stage, errors, results = self.stage(len(sources)), Errors(), list[_R]()
        batches = batches_of(sources, self.batch, stage.callers)
        with closing(self.read_batches(stage, batches, use)) as read:
            for unread, result in read:
                errors += unread
                results += [] if result is None else [result]
                advance(len(unread))
        readable = [position for position, error in enumerate(errors) if error is None]
        return readable, [error for error in errors if error is not None], results

    def embed(
        self, sources: Sequence[Any], advance: Callable[[int], None] = lambda images: None
    ) -> tuple[list[int], list[BadImageError], Embeddings | None]:
        """As `read`, with the embeddings of all readable sources; None if there are none."""
        readable, errors, parts = self.read(sources, Embeddings.to_numpy, advance)
        return readable, errors, Embeddings.concatenate(parts) if parts else None
