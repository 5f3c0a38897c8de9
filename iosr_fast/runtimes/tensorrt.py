"""TensorRT (data-centre and other GPUs) and TensorRT-RTX (GeForce and RTX), which share one Python API.

Networks are strongly typed: precision stands in the ONNX graph, no FP16 flag is set, and TensorRT 10 and 11 take one
path.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast._require import require
from iosr_fast.runtimes.batched import BatchedEncoder

FILE = "encoder.plan"
EXTRAS = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}
log = logging.getLogger(__name__)


def build_plan(onnx_path: Path, plan_path: Path, module_name: str, max_batch: int) -> dict[str, Any]:
    """Compile an ONNX file with the dynamic input "pixels" (batch, S, S, 3) into a plan for 1 to `max_batch` pictures.

    TensorRT-RTX needs no GPU for this and compiles for the one it meets at run time; TensorRT needs the GPU that the
    plan will run on. Returns module, version, seconds, bytes and profile. Raises RuntimeError with the parser's or the
    builder's own words where one of them refuses.
    """
    trt = _load(module_name)
    started = time.perf_counter()
    logger = _forwarding_logger(trt)
    builder = trt.Builder(logger)
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # TensorRT 11: always so
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_path)):
        found = [parser.get_error(i) for i in range(parser.num_errors)]
        errors = "; ".join(f"{error.node_operator()} {error.node_name()}: {error.desc()}" for error in found)
        raise RuntimeError(f"{module_name} {trt.__version__} can't parse {onnx_path.name}: {errors}")
    if network.num_inputs != 1 or network.get_input(0).name != "pixels" or network.get_input(0).shape[0] != -1:
        raise RuntimeError(f"expected one input 'pixels' with a dynamic batch in {onnx_path.name}")
    picture = tuple(network.get_input(0).shape)[1:]
    # Tuned at max_batch: whoever asks for large batches asks for throughput.
    profile = {"min": 1, "opt": max_batch, "max": max_batch}
    shapes = builder.create_optimization_profile()
    shapes.set_shape("pixels", *((batch, *picture) for batch in profile.values()))
    config = builder.create_builder_config()
    config.add_optimization_profile(shapes)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError(
            f"{module_name} {trt.__version__} built no plan: {'; '.join(logger.errors) or 'no reason given'}"
        )
    plan_path.write_bytes(plan)
    return {
        "module": module_name,
        "version": trt.__version__,
        "build_seconds": round(time.perf_counter() - started, 2),
        "bytes": plan_path.stat().st_size,
        "profile": profile,
    }


class TensorRTEncoder(BatchedEncoder):
    """Executes encoder.plan on the current CUDA device, on a stream of its own, with PyTorch's tensors as buffers.

    Calls from several threads take turns. What TensorRT-RTX compiles for this GPU at first use is kept beside the plan,
    in a file named after the GPU and the version.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        super().__init__(manifest, manifest["runtime"])
        torch = require("torch", "train")
        if not torch.cuda.is_available():
            raise RuntimeError(
                f"a plan of {self.runtime} needs an NVIDIA GPU, and PyTorch {torch.__version__} sees none; "
                "open the engine with runtime='onnxruntime', or install PyTorch with CUDA"
            )
        self._trt, self._torch = _load(self.runtime), torch
        self._logger = _forwarding_logger(self._trt)
        self._trt_runtime = self._trt.Runtime(self._logger)
        self._engine = self._trt_runtime.deserialize_cuda_engine((folder / FILE).read_bytes())
        gpu, version = torch.cuda.get_device_name(), self._trt.__version__
        if self._engine is None:
            raise RuntimeError(
                f"{self.runtime} {version} can't load {FILE} in {folder} on {gpu} (built with "
                f"{manifest['versions'].get(self.runtime)} on {manifest['device']}): {'; '.join(self._logger.errors)}; "
                "build the engine again on this machine, or open it with runtime='onnxruntime'"
            )
        self._cache: Any = None
        self._cache_file = folder / f"encoder-{re.sub(r'[^A-Za-z0-9]+', '-', gpu)}-{version}.cache"
        self._context = self._new_context()
        if self._context is None:
            raise RuntimeError(f"{self.runtime} can't prepare the plan on {gpu}: {'; '.join(self._logger.errors)}")
        shape = (self.max_batch, self.image_size, self.image_size, 3)
        self._pinned = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        self._pixels = torch.empty(shape, dtype=torch.uint8, device="cuda")
        self._results = [torch.empty((self.max_batch, self.width), device="cuda") for _ in self.outputs]
        for name, buffer in zip(("pixels", *self.outputs), (self._pixels, *self._results), strict=True):
            self._context.set_tensor_address(name, buffer.data_ptr())
        # The buffers were allocated on the current stream; nothing is in flight on them once that one is done.
        torch.cuda.current_stream().synchronize()
        self._stream = torch.cuda.Stream()
        self._lock = threading.Lock()

    def _new_context(self) -> Any:
        """An execution context, in TensorRT-RTX with the kernels that an earlier run compiled on this GPU."""
        if not hasattr(self._trt, "IRuntimeCache"):
            return self._engine.create_execution_context()
        config = self._engine.create_runtime_config()
        self._cache = config.create_runtime_cache()
        if self._cache_file.is_file() and not self._cache.deserialize(self._cache_file.read_bytes()):
            log.warning("%s can't be read and is not used: the kernels are compiled again", self._cache_file)
        config.set_runtime_cache(self._cache)
        return self._engine.create_execution_context(config)

    def _run(self, pixels: np.ndarray) -> tuple[np.ndarray, ...]:
        n, torch = len(pixels), self._torch
        with self._lock, torch.cuda.stream(self._stream):
            self._pinned[:n].numpy()[...] = pixels
            self._pixels[:n].copy_(self._pinned[:n], non_blocking=True)
            ready = self._context.set_input_shape("pixels", pixels.shape)
            if not ready or not self._context.execute_async_v3(self._stream.cuda_stream):
                raise RuntimeError(f"{self.runtime} failed on {n} pictures: {'; '.join(self._logger.errors)}")
            results = tuple(result[:n].cpu().numpy() for result in self._results)  # waits for the stream
            self._keep_cache()
        return results

    def _keep_cache(self) -> None:
        """Written once and then left alone: a classifier that was saved with the engine has its hash."""
        if self._cache is None:
            return
        cache, self._cache = self._cache, None
        if self._cache_file.exists():
            return
        try:
            temporary = self._cache_file.with_suffix(".tmp")
            temporary.write_bytes(cache.serialize())
            temporary.replace(self._cache_file)
        except OSError as error:
            log.info("compiled kernels are not kept for the next start: %s", error)


def _load(module_name: str) -> Any:
    if module_name not in EXTRAS:
        raise ValueError(f"expected one of {sorted(EXTRAS)}, got {module_name!r}")
    return require(module_name, EXTRAS[module_name])


def _forwarding_logger(trt: Any) -> Any:
    """TensorRT's log in Python's logging; `errors` holds the messages of errors, to be raised with."""
    severity = trt.ILogger.Severity
    levels = {
        severity.INTERNAL_ERROR: logging.ERROR,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.WARNING,
        severity.INFO: logging.INFO,
        severity.VERBOSE: logging.DEBUG,
    }

    class ForwardingLogger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(severity, logging.INFO)
            if level == logging.ERROR:
                self.errors.append(message)
            log.log(level, "%s", message)

    return ForwardingLogger()
