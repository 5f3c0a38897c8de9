"""CUDA graphs: a fixed sequence of launches, recorded once for each batch size and then launched as one.

At small batches the launches of a network's many kernels take longer than the kernels; a graph is one launch. A graph
reads and writes the memory that it was recorded with, so inputs are copied in and outputs copied out.
Not yet run on a GPU: tests/encoders/test_cuda_graphs.py covers everything but the recording, and has tests for a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from iosr_fast.utils.require import require


class Recorder:
    """Records functions on one stream of one device. Their graphs share a memory pool, so replays take turns.

    `device`: None for the device of `stream`, or without one the current device. Threads with another current device
    may use it.
    """

    def __init__(self, stream: Any = None, device: Any = None) -> None:
        torch = require("torch", "gpu")
        self._torch = torch
        device = stream.device if device is None and stream is not None else device
        self._device: Any = torch.cuda.current_device() if device is None else device
        with torch.cuda.device(self._device):
            self._stream = torch.cuda.Stream() if stream is None else stream
            self._pool = torch.cuda.graph_pool_handle()
            self._done = torch.cuda.Event()
        self._lock = threading.Lock()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Exclusive access to the graphs' memory, for copying in, replaying and copying out.

        The work is launched on the caller's current stream of the device, which may differ from turn to turn.
        """
        with self._lock, self._torch.cuda.device(self._device):
            stream = self._torch.cuda.current_stream()
            stream.wait_event(self._done)
            try:
                yield
            finally:
                self._done.record(stream)

    def record(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """A function that repeats the launches of `run` and returns the outputs of the recorded run.

        `run` launches on the current stream. It is called twice: first for work that happens only once and may wait
        for the device, then for the record. Raises RuntimeError if a launch can't be recorded.
        """
        torch = self._torch
        # PyTorch leaves the recording's stream current if the recording fails; here the caller's becomes current again.
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.current_stream()):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                run()
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the GPU while this one records.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                outputs = run()

        def replay() -> Any:
            graph.replay()
            return outputs

        return replay
