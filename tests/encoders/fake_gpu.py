"""CUDA as PyTorch shows it, on the CPU: what the GPU runtimes do is tested without a GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch


class Stream:
    """A stream whose work is done when it is launched; `waited` are the streams that it was made to wait for."""

    cuda_stream = 7

    def __init__(self, device: Any = None) -> None:
        self.device, self.waited = device, list[Stream]()

    def wait_stream(self, other: Stream) -> None:
        self.waited.append(other)

    def synchronize(self) -> None:
        pass


class FakeGpu:
    """A GPU whose launches run at once. While a graph records, launches are kept; a replay repeats them, after it has
    spoilt the outputs of all graphs, whose memory is shared. `refuses`: a launch that can't be recorded."""

    def __init__(self) -> None:
        self.current = self.caller = Stream(("cuda", 1))
        self.recording: list[tuple[Callable[[], Any], Any]] | None = None
        self.records: list[list[tuple[Callable[[], Any], Any]]] = []
        self.replays, self.refuses, self.device = 0, False, 1
        self.sizes: list[int] = []  # of the batches that were launched
        self.asked: set[Any] = set()  # devices whose current stream was asked for
        self.results_kept_for: list[Any] = []
        self.pinned = threading.Semaphore(0)  # one for each piece of page-locked memory

    def launch(self, run: Callable[[], Any]) -> Any:
        """Call `run`, which returns output tensors, as work on the GPU."""
        assert self.current is not self.caller, "all runs are on the encoder's own stream"
        outputs = run()
        self.sizes.append(len(outputs[0]))
        if self.recording is not None:
            if self.refuses:
                raise RuntimeError("an operation waits for the device")
            self.recording.append((run, outputs))
        return outputs

    def current_stream(self, device: Any = None) -> Stream:
        self.asked.add(device)
        return self.current

    @contextmanager
    def stream(self, chosen: Stream) -> Iterator[None]:
        before, self.current = self.current, chosen
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: Any, pool: Any, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert self.current is stream and capture_error_mode == "thread_local"
        record: list[tuple[Callable[[], Any], Any]] = []
        self.recording = record
        try:
            yield
        finally:
            self.recording = None
        self.records.append(record)

        def replay() -> None:
            self.replays += 1
            for _, outputs in (each for one in self.records for each in one):
                for output in outputs:
                    output.fill_(float("nan"))
            for run, outputs in record:
                for output, again in zip(outputs, run(), strict=True):
                    output.copy_(again)

        graph.replay = replay

    @property
    def torch(self) -> Any:
        """The part of torch that the GPU runtimes use."""

        def on_cpu(make: Callable[..., Any]) -> Callable[..., Any]:
            def made(shape: Any, dtype: Any = torch.float32, device: Any = None, pin_memory: bool = False) -> Any:
                if pin_memory:
                    self.pinned.release()
                return make(shape, dtype=dtype)

            return made

        cuda = SimpleNamespace(
            current_device=lambda: self.device,
            is_available=lambda: True,
            Stream=Stream,
            stream=self.stream,
            current_stream=self.current_stream,
            CUDAGraph=SimpleNamespace,
            graph=self.graph,
            graph_pool_handle=lambda: None,
        )
        device = lambda kind, index: (kind, index)  # noqa: E731
        names = {name: getattr(torch, name) for name in ("uint8", "int64", "bool", "float32", "no_grad", "__version__")}
        return SimpleNamespace(**names, cuda=cuda, device=device, zeros=on_cpu(torch.zeros), empty=on_cpu(torch.zeros))
