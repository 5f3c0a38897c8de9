"""What differs between a GPU and the CPU that tries the program: waiting, timing, graphs, compiling."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from iosr_fast.encoders.runtimes.cuda_graphs import Recorder
from tools.gpu.report import Report

Run = Callable[..., Any]


def name_of(device: str) -> str:
    from tools.bench.harness import cpu_description

    return torch.cuda.get_device_name() if device == "cuda" else cpu_description()


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def synced(run: Run, device: str) -> Run:
    """`run` without gradients, to its end on the device."""

    def call() -> Any:
        with torch.inference_mode():
            out = run()
        synchronise(device)
        return out

    return call


def times_ms(run: Run, repeats: int, device: str, warmup: int = 3) -> list[float]:
    """Milliseconds of each call as the device sees it: between CUDA events on a GPU, where launching isn't counted."""
    for _ in range(warmup):
        run()
    synchronise(device)
    if device != "cuda":
        taken = []
        for _ in range(repeats):
            started = time.perf_counter()
            run()
            taken.append((time.perf_counter() - started) * 1e3)
        return taken
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in marks:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in marks]


def make_recorder(device: str) -> Recorder | None:
    """None where there are no CUDA graphs."""
    return Recorder() if device == "cuda" else None


def recorded(run: Run, name: str, device: str, report: Report) -> Run | None:
    """`run` as a CUDA graph; None where there are none. What can't be recorded is noted as wrong."""
    recorder = make_recorder(device)
    if recorder is None:
        return None
    try:
        return recorder.record(run)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        report.fail(f"{name} can't be recorded as a CUDA graph: {str(error).splitlines()[0]}")
        return None


def compile_module(module: torch.nn.Module, mode: str) -> Run:
    """For the shapes that come, each a compilation of its own; whatever of it would stay eager is an error."""
    compiled: Run = torch.compile(module, mode=mode, fullgraph=True, dynamic=False)
    return compiled


def extra_of(names: Mapping[str, object], **same: Any) -> dict[str, dict[str, Any]]:
    """`extra` of harness.rows: what CUDA this is, and `same`, for every name."""
    return {name: {"cuda": torch.version.cuda, **same} for name in names}
