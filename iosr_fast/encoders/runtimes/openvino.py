"""OpenVINO on the CPU: the same encoder.onnx, in bf16 too where the processor has it."""

from __future__ import annotations

import functools
import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.encoders.runtimes.batched import BatchedEncoder
from iosr_fast.encoders.runtimes.onnxruntime import FILE
from iosr_fast.encoders.runtimes.signal_stack import kept_signal_stack
from iosr_fast.utils.require import require

log = logging.getLogger(__name__)


@functools.cache
def openvino_core() -> Any:
    """OpenVINO's Core, one in a process as OpenVINO advises, with its CPU plugin loaded.

    The plugin is loaded here and never released, so that the signal stack of the thread stays as it was. Raises
    ImportError with the pip command where OpenVINO is missing.
    """
    with kept_signal_stack():
        core = require("openvino", "openvino").Core()
        core.get_property("CPU", "FULL_DEVICE_NAME")  # a Core loads a plugin when it is first asked of it
    return core


class OpenVINOEncoder(BatchedEncoder):
    """Executes encoder.onnx; `threads` of one stream (None: one a core). Safe to share: callers take turns.

    An engine of precision "bf16" has weights in fp32, and OpenVINO computes products in bf16 where the processor can
    (AVX512_BF16 or AMX), else in fp32, with a warning. It is not always faster: on an Intel Xeon with AVX512_BF16 and
    without AMX ViT-B/16 took 1.8 times as long as in fp32, on an AMD EPYC 0.53 times (tools/benchmark.py precision).
    For any other engine bf16 is switched off, which OpenVINO would take by itself.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], threads: int | None = None) -> None:
        super().__init__(manifest, "openvino")
        core = openvino_core()
        bf16 = manifest["precision"] == "bf16"
        if bf16 and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            log.warning("this processor has no bf16 instructions: the engine in %s is computed in fp32", folder)
            bf16 = False
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32"}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = str(threads)
        try:
            self._compiled = core.compile_model(str(folder / FILE), "CPU", options)
            self._request = self._compiled.create_infer_request()
        except RuntimeError as error:
            raise RuntimeError(f"OpenVINO can't load {FILE} in {folder}: {error}; build the engine again") from error
        self.computes_in = "bf16" if bf16 else "fp32"
        self._lock = threading.Lock()

    def _run(self, pixels: np.ndarray, size: int) -> tuple[np.ndarray, ...]:
        with self._lock:
            found = self._request.infer({"pixels": pixels})
            return tuple(np.array(found[name]) for name in self.outputs)  # the request's own memory is written again
