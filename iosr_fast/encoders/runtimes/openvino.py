"""OpenVINO on the CPU: the same encoder.onnx, also in bf16 if the processor supports it."""

from __future__ import annotations

import ctypes
import functools
import importlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from iosr_fast.encoders.runtimes.batched import BatchedEncoder
from iosr_fast.encoders.runtimes.onnxruntime import FILE, PLAIN_FILE
from iosr_fast.exceptions import UnavailableError
from iosr_fast.utils.require import require

log = logging.getLogger(__name__)


_CONVERTER = "openvino.tools.ovc"


def import_openvino() -> Any:
    """OpenVINO without its model converter, which takes two thirds of the time of the import and is not used here.

    `openvino.convert_model` imports the converter when it is first used. Raises ImportError with the pip command.
    """
    if "openvino" in sys.modules:
        return sys.modules["openvino"]
    sys.modules[_CONVERTER] = None  # type: ignore[assignment]
    try:
        openvino: Any = require("openvino", "cpu")
    finally:
        del sys.modules[_CONVERTER]

    def missing_attribute(name: str) -> Any:
        if name != "convert_model":
            raise AttributeError(f"module 'openvino' has no attribute {name!r}")
        return importlib.import_module(_CONVERTER).convert_model

    openvino.__getattr__ = missing_attribute
    return openvino


@functools.cache
def openvino_core() -> Any:
    """OpenVINO's Core, one per process as OpenVINO advises, with its CPU plugin loaded and never released.

    Raises ImportError with the pip command if OpenVINO is missing.
    """
    openvino = import_openvino()
    with restored_signal_stack():
        core = openvino.Core()
        core.get_property("CPU", "FULL_DEVICE_NAME")  # loads the CPU plugin
    # OpenVINO 2026.4 hangs if two threads read the data of their first tensors at the same time: read one here.
    openvino.Tensor(openvino.Type.f32, [1]).data  # noqa: B018
    return core


class OpenVINOEncoder(BatchedEncoder):
    """Executes encoder.onnx, or plain.onnx without `adapted`, in `runs` streams, which share the weights.

    `threads` of one stream (None: an even share of the cores). Threads may share it; at most `runs` execute at once.

    An engine of precision "bf16" has fp32 weights. OpenVINO multiplies them in bf16 if the processor has AVX512_BF16 or
    AMX, and otherwise in fp32, with a warning. bf16 can be slower than fp32, so it is off for every other engine,
    although OpenVINO's default would turn it on.
    """

    parallel = True

    def __init__(
        self,
        folder: Path,
        manifest: dict[str, Any],
        threads: int | None = None,
        runs: int = 1,
        adapted: bool = True,
    ) -> None:
        super().__init__(manifest, "openvino", adapted=adapted)
        file = FILE if adapted else PLAIN_FILE
        core = openvino_core()
        bf16 = manifest["precision"] == "bf16"
        if bf16 and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            log.warning("this processor has no bf16 instructions: the engine in %s computes in fp32", folder)
            bf16 = False
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32"}
        options["NUM_STREAMS"] = str(runs)
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = str(threads * runs)
        try:
            self._compiled = core.compile_model(str(folder / file), "CPU", options)
            self._idle: SimpleQueue[Any] = SimpleQueue()  # one request a stream
            for _ in range(runs):
                self._idle.put(self._compiled.create_infer_request())
        except RuntimeError as error:
            raise UnavailableError(
                f"OpenVINO can't load {file} in {folder}: {error}; build the engine again"
            ) from error
        self.computes_in = "bf16" if bf16 else "fp32"
        self.threads, self.runs = threads, runs

    def _run(self, pixels: np.ndarray, size: int) -> tuple[np.ndarray, ...]:
        request = self._idle.get()
        try:
            outputs = request.infer({"pixels": pixels})
            return tuple(np.array(outputs[name]) for name in self.outputs)  # copies: the request reuses its memory
        finally:
            self._idle.put(request)


class _Stack(ctypes.Structure):
    _fields_ = (("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def signal_stack() -> tuple[int, int, int]:
    """(address, flags, bytes) of the calling thread's signal stack. Linux only."""
    stack = _Stack()
    _libc().sigaltstack(None, ctypes.byref(stack))
    return stack.sp or 0, stack.flags, stack.size


@contextmanager
def restored_signal_stack() -> Iterator[None]:
    """Restore the calling thread's signal stack at the end of the block. Does nothing off Linux.

    OpenVINO 2026.4 replaces the signal stack when a Core loads its CPU plugin, and restores the previous one when the
    plugin is released. If two plugins are released in the order in which they were loaded, the second one restores the
    stack of the first, which no longer exists, and the next signal ends the process.
    """
    if not sys.platform.startswith("linux"):
        yield
        return
    before = signal_stack()
    try:
        yield
    finally:
        if signal_stack() != before:
            _libc().sigaltstack(ctypes.byref(_Stack(*before)), None)
