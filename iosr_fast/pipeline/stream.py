"""Images in, predictions out, in order: pictures are decoded while others are encoded, and few are held at a time.

There are two ways to use a CPU. Where the runtime lets several threads run one session at once (ONNX Runtime), each of
`callers` threads decodes a batch of its own and encodes it in a session of one thread (of more, where there are more
than 8 cores): nobody waits at a barrier for a thread that something else has taken the core of. Elsewhere, and on a
GPU, one caller encodes with all there is, and threads decode ahead of it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sized
from contextlib import closing
from dataclasses import dataclass
from itertools import islice, repeat
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from iosr_fast.encoders.encoder import Encoder
from iosr_fast.images.decode import Decoder
from iosr_fast.images.preprocess import BadImageError
from iosr_fast.state.predictions import Prediction, predict
from iosr_fast.utils.machine import usable_threads
from iosr_fast.utils.ordered import map_ordered

if TYPE_CHECKING:
    from iosr_fast.state.state import State

Answer: TypeAlias = Prediction | BadImageError
_CALLERS = 8  # at most: each holds a batch and all that is computed of it; beyond, sessions get more threads
_WORTH = 4  # batches a caller
_LEAST = 4  # images in a batch, where the last ones are made smaller
_PARALLEL = frozenset({"onnxruntime"})  # runtimes of which several threads may run one session at once


@dataclass(frozen=True)
class Stage:
    """An encoder and who calls it: `callers` threads that decode too, or one, with `decode_threads` before it."""

    encoder: Encoder
    callers: int
    decode_threads: int

    def held(self) -> int:
        """Batches of pixels that exist at once, at most: one in each thread, and between them one more that is ready
        and one that is encoded."""
        return self.callers if self.callers > 1 else self.decode_threads + 2


def stage_of(
    encoder: Encoder, engine: str | Path, decoder: Decoder, images: int, batch: int, threads: int | None
) -> Stage:
    """How to use `threads` cores (None: all) for so many images.

    Opens the engine again, with few threads, where several callers gain by it and it has not so few already; for a
    few batches it isn't worth the wait. Raises ValueError for threads below 1.
    """
    from iosr_fast.encoders.runtimes import open_engine

    if threads is not None and threads < 1:
        raise ValueError(f"expected threads of at least 1, got {threads}")
    threads = usable_threads() if threads is None else threads
    callers = min(threads, _CALLERS)
    if encoder.runtime in _PARALLEL and callers > 1 and images >= _WORTH * callers * batch:
        if encoder.threads != threads // callers:
            # The folder may have been replaced since the encoder was opened from it.
            encoder = open_engine(encoder.source or engine, encoder.runtime, verify=False, threads=threads // callers)
        return Stage(encoder, callers, 0)
    if encoder.buckets is None:  # on a CPU, of which the encoder needs most
        threads = max(1, threads // 4)
    return Stage(encoder, 1, threads if decoder.threads is None else min(threads, decoder.threads))


def choose_batch(encoder: Encoder, batch: int | None) -> int:
    """How many images to encode at a time, where that is left open: 16 on a CPU, which a core does as fast as 8 or 32
    and holds less, and up to 64 on a GPU. Raises ValueError below 1."""
    if batch is None:
        return 16 if encoder.buckets is None else min(64, encoder.max_batch)
    if batch < 1:
        raise ValueError(f"expected a batch of at least 1 image, got {batch}")
    return batch


def classify(
    state: State, stage: Stage, decoder: Decoder, sources: Iterable[Any], batch: int, top: int = 1
) -> Generator[list[Answer], None, None]:
    """For each batch of sources, in order, the Prediction of each, or why it can't be read.

    What is encoded together is a batch less what is unreadable. Batches are of `batch` sources; where several callers
    share sources of a known number, the last are smaller (`batch_sizes`). At most stage.held() batches of pixels exist
    at once. The generator's end, by close() too, ends its threads.
    """

    def decode(given: tuple[int, list[Any]]) -> list[np.ndarray | BadImageError]:
        start, batch_of_sources = given
        return decoder.decode(batch_of_sources, stage.encoder.image_size, start)

    def answer(decoded: list[np.ndarray | BadImageError]) -> list[Answer]:
        good = [pixels for pixels in decoded if not isinstance(pixels, BadImageError)]
        made = iter(predict(state, stage.encoder.encode(np.stack(good)), top) if good else ())
        return [told if isinstance(told, BadImageError) else next(made) for told in decoded]

    batches = _batches(sources, batch, stage.callers)
    if stage.callers > 1:
        yield from map_ordered(batches, lambda given: answer(decode(given)), stage.callers, 2 * stage.callers)
        return
    with closing(map_ordered(batches, decode, stage.decode_threads, stage.decode_threads + 2)) as pixels:
        for decoded in pixels:
            answered = answer(decoded)
            del decoded  # or it would wait here while the next are decoded
            yield answered


def batch_sizes(images: int, batch: int, callers: int) -> Iterator[int]:
    """How many images each batch takes: `batch`, and near the end half of a caller's even share of what is left, so
    that several callers finish together (guided self-scheduling: Polychronopoulos and Kuck, 1987).

    Sizes depend on what is left alone, so a run that is gone on with at a batch's end has the same ones to come.
    """
    while images:
        share = batch if callers == 1 else max(_LEAST, ceil(images / (2 * callers)))
        size = min(batch, share, images)
        yield size
        images -= size


def _batches(sources: Iterable[Any], batch: int, callers: int) -> Iterator[tuple[int, list[Any]]]:
    """Runs of sources, each with the number of its first."""
    sizes = batch_sizes(len(sources), batch, callers) if isinstance(sources, Sized) else repeat(batch)
    left, start = iter(sources), 0
    for size in sizes:
        taken = list(islice(left, size))
        if not taken:
            return
        yield start, taken
        start += len(taken)
