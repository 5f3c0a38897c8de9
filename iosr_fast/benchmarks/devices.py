"""Where a bench runs and how it is timed there: on the CPU by the clock, on a GPU by events between CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from iosr_fast.benchmarks import harness
from iosr_fast.exceptions import IosrFastError
from iosr_fast.utils.provenance import cpu_description

DEVICES = ("cpu", "cuda", "rehearsal")
FLUSH_BYTES = 2**28  # read before each timed call on a GPU: five times the L2 cache of an H100
GPU_WARMUP = 3

Call = Callable[..., Any]


@dataclass(frozen=True)
class Device:
    """`name`: "cpu", "cuda", or "rehearsal", which runs the code for GPUs with tensors on the CPU and times nothing of
    interest."""

    name: str = "cpu"

    def __post_init__(self) -> None:
        if self.name not in DEVICES:
            raise IosrFastError(f"expected a device out of {', '.join(DEVICES)}, got {self.name!r}")

    @property
    def is_gpu(self) -> bool:
        return self.name != "cpu"

    @property
    def torch(self) -> str:
        """The device of tensors."""
        return "cuda" if self.name == "cuda" else "cpu"

    @property
    def description(self) -> str:
        if self.name != "cuda":
            return cpu_description()
        import torch

        return str(torch.cuda.get_device_name())

    def synchronize(self) -> None:
        if self.name == "cuda":
            import torch

            torch.cuda.synchronize()

    def compile(self, function: Call) -> Call:
        """torch.compile for the shapes that come, each compiled apart; code that would stay eager is an error."""
        import torch

        options: dict[str, Any] = {"backend": "eager"} if self.name == "rehearsal" else {}
        compiled: Call = torch.compile(function, fullgraph=True, dynamic=False, **options)
        return compiled

    def record(self, call: Call) -> tuple[Call, str]:
        """`call` as it is timed, and how it is launched: on a GPU as a "graph", or from the "stream" where a graph
        can't be recorded; on a CPU by "call"."""
        if self.name != "cuda":
            return call, "call"
        import torch

        from iosr_fast.encoders.runtimes.cuda_graphs import Recorder

        with torch.inference_mode():
            for _ in range(GPU_WARMUP):  # compiles, and does what is done once only
                call()
            try:
                return Recorder().record(call), "graph"
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError as error:
                print(f"no CUDA graph: {str(error).splitlines()[0]}")
                return call, "stream"

    def measure(self, calls: Mapping[str, Call], repeats: int) -> dict[str, list[float]]:
        """Milliseconds a call, `repeats` a candidate, in turns.

        On a GPU each call is between two events, after a read of other memory, which leaves nothing of the call in the
        L2 cache, and no writes for it to wait for. All is queued before anything is waited for. So a launch, which the
        host prepares while the GPU reads, isn't timed.
        """
        if self.name != "cuda":
            return harness.measure(calls, repeats)
        import torch

        flush = torch.zeros(FLUSH_BYTES // 4, device="cuda")
        events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in calls}
        with torch.inference_mode():
            for call in calls.values():
                call()
            for _ in range(repeats):
                for name, call in calls.items():
                    flush.sum()
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    start.record()
                    call()
                    end.record()
                    events[name].append((start, end))
            torch.cuda.synchronize()
        return {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()}
