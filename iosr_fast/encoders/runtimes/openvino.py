"""OpenVINO on the CPU: the same encoder.onnx, also in bf16 if the processor supports it."""

from __future__ import annotations

import functools
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from iosr_fast.encoders.engine_folder import ONNX_FILE, PLAIN_FILE
from iosr_fast.encoders.runtimes.batched import BatchedEncoder
from iosr_fast.exceptions import UnavailableError
from iosr_fast.utils.require import require

log = logging.getLogger(__name__)


@functools.cache
def openvino_core() -> Any:
    """OpenVINO's Core, one per process as OpenVINO advises, with its CPU plugin loaded and never released.

    Raises ImportError with the pip command if OpenVINO is missing.
    """
    openvino: Any = require("openvino", "cpu")

    def load() -> Any:
        core = openvino.Core()
        core.get_property("CPU", "FULL_DEVICE_NAME")  # loads the CPU plugin
        # OpenVINO 2026.4 hangs if two threads read the data of their first tensors at the same time: read one here.
        openvino.Tensor(openvino.Type.f32, [1]).data  # noqa: B018
        return core

    # The CPU plugin replaces the signal stack of the thread that loads it, so that a signal may end the process after
    # another plugin has been released (seen with 2026.4): load it in a thread that ends.
    with ThreadPoolExecutor(1) as loader:
        return loader.submit(load).result()


class OpenVINOEncoder(BatchedEncoder):
    """Executes encoder.onnx, or plain.onnx without `adapted`, in `runs` streams, which share the weights.

    `threads` of one stream (None: an even share of the cores). Threads may share it; at most `runs` execute at once.

    An engine of precision "bf16" has fp32 weights. OpenVINO multiplies them in bf16 if the processor has AVX512_BF16 or
    AMX, and otherwise in fp32, with a warning. bf16 can be slower than fp32, so it is off for every other engine,
    although OpenVINO's default would turn it on.
    """

    parallel = True

    def __init__(
        self, folder: Path, manifest: dict[str, Any], threads: int | None = None, runs: int = 1, adapted: bool = True
    ) -> None:
        super().__init__(manifest, "openvino", adapted)
        self.threads, self.runs = threads, runs
        file = folder / (ONNX_FILE if adapted else PLAIN_FILE)
        self._compiled = compile_graph(file, threads, runs, manifest["precision"] == "bf16")
        self._idle: SimpleQueue[Any] = SimpleQueue()  # one request a stream
        for _ in range(runs):
            self._idle.put(self._compiled.create_infer_request())

    def _run(self, pixels: np.ndarray) -> tuple[np.ndarray, ...]:
        request = self._idle.get()
        try:
            outputs = request.infer({"pixels": pixels})
            return tuple(outputs[name] for name in self.outputs)  # copies, as infer() makes them
        finally:
            self._idle.put(request)


def compile_graph(file: Path, threads: int | None = None, runs: int = 1, bf16: bool = False) -> Any:
    """The CompiledModel of an ONNX file on the CPU with `runs` streams, each of `threads`; `bf16` where it can."""
    core = openvino_core()
    if bf16 and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        log.warning("this processor has no bf16 instructions: the engine computes in fp32")
        bf16 = False
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32"}
    options["NUM_STREAMS"] = str(runs)
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = str(threads * runs)
    try:
        return core.compile_model(str(file), "CPU", options)
    except RuntimeError as error:
        raise UnavailableError(
            f"OpenVINO can't load {file.name} in {file.parent}: {error}; build the engine again"
        ) from error
