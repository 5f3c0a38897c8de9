"""Where a bench runs and how a call is timed there: on the CPU by the clock, on a GPU by events around CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from iosr_fast.encoders.runtimes.gpu import record_graph
from iosr_fast.evaluation.provenance import cpu_description
from iosr_fast.exceptions import IosrFastError

FLUSH_BYTES = 2**28  # read before each timed call on a GPU: five times the L2 cache of an H100
GPU_WARMUP, GPU_CALLS = 3, 20

Call = Callable[[], Any]


@dataclass(frozen=True)
class Device:
    """`name` is "cpu" or "cuda"; PyTorch's tensors are there."""

    name: str = "cpu"

    def __post_init__(self) -> None:
        if self.is_gpu and not torch.cuda.is_available():
            raise IosrFastError("expected an NVIDIA GPU for --device cuda, and PyTorch sees none; use --device cpu")

    @property
    def is_gpu(self) -> bool:
        return self.name == "cuda"

    @cached_property
    def description(self) -> str:
        return str(torch.cuda.get_device_name()) if self.is_gpu else cpu_description()

    def synchronize(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()

    def record(self, call: Call) -> Call:
        """`call` as it is timed: on a GPU a CUDA graph. Raises RuntimeError where none can be recorded: a time with
        the host's launches in it is another figure."""
        if not self.is_gpu:
            return call
        with torch.inference_mode():
            for _ in range(GPU_WARMUP):  # compiles, and does what is done once only
                call()
            return record_graph(call, torch.cuda.Stream())

    def calls_in(self, seconds: float, call: Call) -> int:
        """How many calls fill `seconds`, at least 1; on a GPU, whose events are exact, at most GPU_CALLS."""
        start = time.perf_counter()
        call()
        self.synchronize()
        fill = max(1, int(seconds / max(time.perf_counter() - start, 1e-6)))
        return min(fill, GPU_CALLS) if self.is_gpu else fill

    def time_ms(self, call: Call, calls: int = 1) -> float:
        """Milliseconds a call, the mean of `calls` after an untimed one where there are several.

        On a GPU each call is between two events, after a read of other memory, which leaves nothing of the call in the
        L2 cache. The host prepares the launch while the GPU reads, so the launch isn't timed.
        """
        if not self.is_gpu:
            if calls > 1:
                call()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            return (time.perf_counter() - start) * 1e3 / calls
        with torch.inference_mode():
            pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
            for begin, end in pairs:
                self._flush.sum()
                begin.record()
                call()
                end.record()
        torch.cuda.synchronize()
        return sum(float(begin.elapsed_time(end)) for begin, end in pairs) / calls

    def fastest(self, calls: Mapping[str, Call]) -> str:
        """The name of the call with the least of three times."""
        return min(calls, key=lambda name: min(self.time_ms(calls[name], calls=2) for _ in range(3)))

    @cached_property
    def _flush(self) -> torch.Tensor:
        return torch.zeros(FLUSH_BYTES // 4, device="cuda")
