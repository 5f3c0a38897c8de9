"""Runs of an encoder on a GPU: page-locked uploads and, for batch sizes that were recorded, one CUDA graph a run.

At small batches the launches of a network's many kernels take longer than the kernels; a graph is one launch. It reads
and writes the memory that it was recorded with, so pictures are copied in and embeddings copied out.
Not yet run on a GPU: tests/encoders/test_gpu.py covers everything but CUDA itself, and has tests for a GPU.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from iosr_fast.utils.require import require

log = logging.getLogger(__name__)


class GpuRuns:
    """Calls `launch(pixels)` for pixels (size, S, S, 3) on the GPU that is current at construction, for a few `buckets`
    as sizes.

    All runs share one stream, because they share the input, the encoder's working memory and the memory of the graphs.
    Threads take turns to launch; none waits for the GPU. `shape`: that of the largest batch. What `launch` returns, a
    sequence of tensors with a row for each picture, is overwritten by the next run, so each run returns copies.
    """

    def __init__(self, launch: Callable[[Any], Any], shape: tuple[int, ...]) -> None:
        self._launch, self._lock = launch, threading.Lock()
        # Every batch fills at least half of its bucket.
        self.buckets = tuple(sorted({1 << power for power in range(shape[0].bit_length())} | {shape[0]}))
        self._torch = torch = require("torch", "gpu")
        self._device = torch.device("cuda", torch.cuda.current_device())  # threads may have another current device
        self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self._stream.wait_stream(torch.cuda.current_stream())  # it may still be writing the encoder's weights
        with torch.cuda.stream(self._stream):
            self._pixels = torch.zeros(shape, dtype=torch.uint8, device=self._device)
        self._graphs: dict[int, Callable[[], Any]] = {}

    def run(self, pixels: np.ndarray) -> tuple[Any, ...]:
        """The outputs for uint8 `pixels` (n, S, S, 3), padded to a bucket: tensors with n rows, ready on the caller's
        current stream."""
        torch, n, size = self._torch, len(pixels), self._size(len(pixels))
        caller = torch.cuda.current_stream(self._device)
        # PyTorch keeps page-locked memory for later runs, and hands it out again after its upload.
        pinned = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=True)
        pinned.numpy()[:] = pixels
        with self._lock, torch.no_grad(), torch.cuda.stream(self._stream):
            # Later rows hold older pictures; their outputs are cut off.
            self._pixels[:n].copy_(pinned, non_blocking=True)
            outputs = self._graphs[size]() if size in self._graphs else self._launch(self._pixels[:size])
            copies = tuple(output[:n].clone() for output in outputs)
        caller.wait_stream(self._stream)
        for copy in copies:
            copy.record_stream(caller)
        return copies

    def record(self, pictures: int) -> None:
        """Record the launches for so many pictures, once. Where they can't be recorded, runs go on without a graph."""
        torch, size = self._torch, self._size(pictures)
        with self._lock, torch.no_grad():
            if size in self._graphs:
                return
            try:
                launch = partial(self._launch, self._pixels[:size])
                self._graphs[size] = record_graph(launch, self._stream, self._pool)
            except RuntimeError as error:
                log.warning("batches of %d run without a CUDA graph, which can't be recorded: %s", size, error)

    def _size(self, pictures: int) -> int:
        return next(size for size in self.buckets if size >= pictures)


def record_graph(run: Callable[[], Any], stream: Any, pool: Any = None) -> Callable[[], Any]:
    """A function that repeats the launches of `run` on the current stream and returns the outputs of the recorded run.

    `run` launches on the current stream, which is `stream` here. It is called twice: first for work that happens only
    once and may wait for the device, then for the record. Graphs of one `pool` share memory, so their replays must not
    overlap. Raises RuntimeError if a launch can't be recorded.
    """
    torch = require("torch", "gpu")
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    # PyTorch leaves the recording's stream current if the recording fails; this block restores the caller's.
    with torch.cuda.stream(stream):
        run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU while this one records.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            outputs = run()

    def replay() -> Any:
        graph.replay()
        return outputs

    return replay
