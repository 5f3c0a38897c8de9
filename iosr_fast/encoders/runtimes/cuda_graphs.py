"""CUDA graphs: a fixed sequence of launches, recorded once for each batch size and then launched as one.

At small batches the launches of a network's many kernels take longer than the kernels; a graph's launch is one. A graph
reads and writes the memory it was recorded with, so inputs are copied in and outputs copied out.
Not yet run on a GPU: tests/encoders/test_cuda_graphs.py tests everything but the recording, and has tests for a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from iosr_fast.utils.require import require


class Recorder:
    """Records functions on one stream, and lets their graphs be replayed in turns: they share one pool of memory."""

    def __init__(self, stream: Any = None) -> None:
        torch = require("torch", "train")
        self._torch = torch
        self._stream = torch.cuda.Stream() if stream is None else stream
        self._pool = torch.cuda.graph_pool_handle()
        self._lock, self._done = threading.Lock(), torch.cuda.Event()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Around copying in, replaying and copying out: no other turn writes to that memory meanwhile.

        Turns are on the caller's current stream, which may be another one each time.
        """
        with self._lock:
            stream = self._torch.cuda.current_stream()
            stream.wait_event(self._done)
            try:
                yield
            finally:
                self._done.record(stream)

    def record(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """A function that launches again what `run` launches now, and returns what it returned when it was recorded.

        `run` launches on the current stream. It is called twice: first as it is, for all that is done once only and
        would wait for the device, then for the record. Raises RuntimeError where a launch can't be recorded.
        """
        torch = self._torch
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the GPU while this one records.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            outputs = run()

        def replay() -> Any:
            graph.replay()
            return outputs

        return replay
