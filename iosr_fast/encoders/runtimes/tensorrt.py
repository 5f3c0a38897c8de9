"""TensorRT (data-centre and other GPUs) and TensorRT-RTX (GeForce and RTX), which share one Python API.

Networks are strongly typed: the ONNX graph determines the precision, no FP16 flag is set, and TensorRT 10 and 11 share
one path.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Array
from iosr_fast.encoders.runtimes import plans
from iosr_fast.encoders.runtimes.batched import BatchedEncoder, powers_of_two
from iosr_fast.encoders.runtimes.cuda_graphs import Recorder
from iosr_fast.encoders.runtimes.upload import Upload
from iosr_fast.exceptions import IosrFastError, UnavailableError
from iosr_fast.utils import machine
from iosr_fast.utils.files import new_file
from iosr_fast.utils.require import require

EXTRAS = {"tensorrt": "gpu", "tensorrt_rtx": "tensorrt-rtx"}
log = logging.getLogger(__name__)


def target(runtime: str) -> plans.Target:
    """The target of plans that are built here: installed version and GPU. Raises ImportError without the module."""
    return plans.Target(runtime, _load(runtime).__version__, machine.this_gpu())


def build_plan(onnx_path: Path, module_name: str, max_batch: int) -> tuple[bytes, dict[str, Any]]:
    """Compile an ONNX file with the dynamic input "pixels" (batch, S, S, 3) into a plan for 1 to `max_batch` pictures.

    TensorRT-RTX needs no GPU for this and completes the plan at run time; TensorRT needs the GPU that will run the
    plan. Returns the plan and its facts: max_batch, build_seconds, bytes and profile. Raises RuntimeError with the
    message of the parser or the builder.
    """
    started = time.perf_counter()
    data = _build(_load(module_name), module_name, onnx_path, max_batch)
    seconds = round(time.perf_counter() - started, 2)
    facts = {"max_batch": max_batch, "build_seconds": seconds, "bytes": len(data)}
    return data, {**facts, "profile": _profile(max_batch)}


def _profile(max_batch: int) -> dict[str, int]:
    """Batches of a plan; optimised for max_batch, because throughput matters at large batches."""
    return {"min": 1, "opt": max_batch, "max": max_batch}


def _build(trt: Any, module_name: str, onnx_path: Path, max_batch: int) -> bytes:
    logger = _forwarding_logger(trt)
    builder = trt.Builder(logger)
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # the only mode of TensorRT 11
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_path)):
        reported = (parser.get_error(i) for i in range(parser.num_errors))
        errors = "; ".join(f"{error.node_operator()} {error.node_name()}: {error.desc()}" for error in reported)
        raise UnavailableError(f"{module_name} {trt.__version__} can't parse {onnx_path.name}: {errors}")
    if network.num_inputs != 1 or network.get_input(0).name != "pixels" or network.get_input(0).shape[0] != -1:
        raise UnavailableError(f"expected one input 'pixels' with a dynamic batch in {onnx_path.name}")
    picture = tuple(network.get_input(0).shape)[1:]
    shapes = builder.create_optimization_profile()
    shapes.set_shape("pixels", *((batch, *picture) for batch in _profile(max_batch).values()))
    config = builder.create_builder_config()
    config.add_optimization_profile(shapes)
    if hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)  # fp32 graphs multiply in fp32, as their check expects
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise UnavailableError(
            f"{module_name} {trt.__version__} built no plan: {'; '.join(logger.errors) or 'no reason given'}"
        )
    return bytes(plan)


class TensorRTEncoder(BatchedEncoder):
    """Executes the plan that fits this machine on the current CUDA device, with PyTorch's tensors as buffers.

    If the engine has no such plan, one is built from its encoder.onnx in the user's cache (plans.open_plan). Batches
    are padded to one of `buckets` (None: powers of two); each bucket has an execution context and, after `warm`, a CUDA
    graph. Contexts share their working memory, so threads take turns, on one stream. The kernels that TensorRT-RTX
    compiles for this GPU are cached too. None of this has been run on a GPU yet.
    """

    def __init__(
        self, folder: Path, manifest: dict[str, Any], runtime: str, buckets: Iterable[int] | None = None
    ) -> None:
        super().__init__(manifest, runtime, powers_of_two(manifest["max_batch"]) if buckets is None else buckets)
        torch = require("torch", "gpu")
        plan_target = target(runtime)
        if plan_target.gpu is None:
            raise UnavailableError(
                f"a plan of {runtime} needs an NVIDIA GPU, and PyTorch {torch.__version__} sees none; "
                "open the engine with runtime='onnxruntime', or install PyTorch with CUDA"
            )
        build = partial(build_plan, module_name=runtime, max_batch=self.max_batch)
        plan = plans.open_plan(folder, manifest, plan_target, build)
        self._trt, self._torch = _load(runtime), torch
        self._kernels_file, self._kernels_saved = plan_target.kernels_file(self.fingerprint), False
        self._logger = _forwarding_logger(self._trt)
        self._trt_runtime = self._trt.Runtime(self._logger)
        self._engine = self._trt_runtime.deserialize_cuda_engine(plan.data)
        if self._engine is None:
            raise RuntimeError(
                f"{plan_target} can't load {plan.path}: {'; '.join(self._logger.errors)}; remove that file if it is in "
                "the cache, else build the engine again on this machine, or open it with runtime='onnxruntime'"
            )
        self._kernels, self._config = self._load_kernels()
        shape = (self.max_batch, self.image_size, self.image_size, 3)
        self._pixels = torch.zeros(shape, dtype=torch.uint8, device="cuda")
        self._upload = Upload(self._pixels)
        self._results = [torch.empty((self.max_batch, self.width), device="cuda") for _ in self.outputs]
        self._memory = torch.empty(max(1, self._engine.device_memory_size_v2), dtype=torch.uint8, device="cuda")
        self._contexts: dict[int, Any] = {}
        self._replay: dict[int, Callable[[], Any]] = {}
        # The buffers were allocated on the current stream, which may still be writing them.
        torch.cuda.current_stream().synchronize()
        self._stream = torch.cuda.Stream()
        self._recorder = Recorder(self._stream)
        self._lock = threading.Lock()

    def warm(self, sizes: Iterable[int] | None = None) -> None:
        super().warm(sizes)
        self._save_kernels()

    def _run(self, pixels: np.ndarray, size: int) -> tuple[Array, ...]:
        n, torch = len(pixels), self._torch
        caller = torch.cuda.current_stream(self._stream.device)
        with self._lock, torch.cuda.stream(self._stream):
            self._upload(pixels)  # later rows hold older pictures; their outputs are cut off
            self._replay[size]() if size in self._replay else self._launch(size)
            copies = [result[:n].clone() for result in self._results]  # the next run overwrites the results
        caller.wait_stream(self._stream)
        for copy in copies:
            copy.record_stream(caller)
        if not self._kernels_saved and not self._kernels_file.exists():
            self._save_kernels()
        return tuple(copies)

    def _prepare(self, size: int) -> None:
        with self._lock, self._torch.cuda.stream(self._stream):
            if size in self._replay:
                return
            try:
                self._replay[size] = self._recorder.record(partial(self._launch, size))
            except RuntimeError as error:
                log.warning("batches of %d run without a CUDA graph, which can't be recorded: %s", size, error)

    def _launch(self, size: int) -> None:
        """Launch on the current stream; the first launch of a size creates its context."""
        if size not in self._contexts:
            self._contexts[size] = self._new_context(size)
        if not self._contexts[size].execute_async_v3(self._torch.cuda.current_stream().cuda_stream):
            raise RuntimeError(f"{self.runtime} failed on {size} pictures: {'; '.join(self._logger.errors)}")

    def _new_context(self, size: int) -> Any:
        """A context for one shape: a graph depends on its context, which must not change after recording."""
        managed = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(managed if self._config is None else self._config)
        if context is None:
            raise RuntimeError(f"{self.runtime} can't prepare the plan: {'; '.join(self._logger.errors)}")
        context.set_device_memory(self._memory.data_ptr(), self._memory.numel())
        for name, buffer in zip(("pixels", *self.outputs), (self._pixels, *self._results), strict=True):
            context.set_tensor_address(name, buffer.data_ptr())
        if not context.set_input_shape("pixels", (size, *self._pixels.shape[1:])):
            raise RuntimeError(f"{self.runtime} refuses batches of {size}: {'; '.join(self._logger.errors)}")
        return context

    def _load_kernels(self) -> tuple[Any, Any]:
        """The kernels that TensorRT-RTX compiled in earlier runs on this GPU, and a configuration of contexts that use
        them; (None, None) for TensorRT, which has neither."""
        if not hasattr(self._trt, "IRuntimeCache"):
            return None, None
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        # A graph would keep the general kernels that run until those for a shape are compiled.
        eager = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.dynamic_shapes_kernel_specialization_strategy = eager
        kernels = config.create_runtime_cache()
        if self._kernels_file.is_file() and not kernels.deserialize(self._kernels_file.read_bytes()):
            log.warning("%s can't be read; its kernels are compiled again", self._kernels_file)
        config.set_runtime_cache(kernels)
        return kernels, config

    def _save_kernels(self) -> None:
        self._kernels_saved = True  # one attempt per process
        if self._kernels is None:
            return
        try:
            self._kernels_file.parent.mkdir(parents=True, exist_ok=True)
            with new_file(self._kernels_file) as temporary:
                temporary.write_bytes(self._kernels.serialize())
        except OSError as error:
            log.info("compiled kernels are not saved for the next start: %s", error)


def _load(module_name: str) -> Any:
    if module_name not in EXTRAS:
        raise IosrFastError(f"expected one of {sorted(EXTRAS)}, got {module_name!r}")
    return require(module_name, EXTRAS[module_name])


def _forwarding_logger(trt: Any) -> Any:
    """A logger of TensorRT that forwards to Python's logging; `errors` collects error messages for exceptions."""
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
