"""TensorRT (data-centre and other GPUs) and TensorRT-RTX (GeForce and RTX), which share one Python API.

Networks are strongly typed: the ONNX graph determines the precision, no FP16 flag is set, and TensorRT 10 and 11 share
one path.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.encoders.engine_folder import EXTRAS, Target, target, unavailable_reason
from iosr_fast.encoders.runtimes.batched import BatchedEncoder
from iosr_fast.encoders.runtimes.plan_cache import CachedFile, open_plan
from iosr_fast.exceptions import UnavailableError
from iosr_fast.utils.machine import this_gpu
from iosr_fast.utils.require import require

log = logging.getLogger(__name__)


def build_plan(onnx_path: Path, runtime: str, max_batch: int) -> bytes:
    """Compile an ONNX file with the dynamic input "pixels" (batch, S, S, 3) into a plan for 1 to `max_batch` pictures.

    TensorRT-RTX needs no GPU for this and completes the plan at run time; TensorRT needs the GPU that will run the
    plan. Raises RuntimeError with the message of the parser or the builder.
    """
    name = f"{runtime} {target(runtime).version}"
    trt: Any = require(runtime, EXTRAS[runtime])
    logger = _logger(trt)
    builder = trt.Builder(logger)
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # the only mode of TensorRT 11
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_path)):
        reported = (parser.get_error(i) for i in range(parser.num_errors))
        errors = "; ".join(f"{error.node_operator()} {error.node_name()}: {error.desc()}" for error in reported)
        raise UnavailableError(f"{name} can't parse {onnx_path.name}: {errors}")
    config = builder.create_builder_config()
    for profile in optimization_profiles(builder, tuple(network.get_input(0).shape)[1:], max_batch):
        config.add_optimization_profile(profile)
    if hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)  # fp32 graphs multiply in fp32, as their check expects
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise UnavailableError(f"{name} built no plan: {'; '.join(logger.errors) or 'no reason given'}")
    return bytes(plan)


def optimization_profiles(builder: Any, picture: tuple[int, ...], max_batch: int) -> list[Any]:
    """A profile for one picture, where latency matters, and one for batches, tuned for the largest, where throughput
    does: kernels that are fastest for 32 pictures are slow for one."""
    profiles = []
    for least, best, most in [(1, 1, 1), (2, max_batch, max_batch)][: min(max_batch, 2)]:
        profiles.append(builder.create_optimization_profile())
        profiles[-1].set_shape("pixels", (least, *picture), (best, *picture), (most, *picture))
    return profiles


class LoadedPlan:
    """Executes a plan with the input "pixels" on the current CUDA device, with PyTorch's tensors as buffers.

    Each batch size has an execution context, whose shape and profile never change, because a CUDA graph depends on
    them. Contexts share their working memory; GpuRuns runs one at a time.
    """

    def __init__(
        self, plan: bytes, file: Path, here: Target, outputs: Sequence[str], max_batch: int, fingerprint: str
    ) -> None:
        """`plan` is the content of `file`, `fingerprint` that of what the plan computes."""
        self._torch = torch = require("torch", "gpu")
        self._runtime = runtime = here.runtime
        self._outputs = tuple(outputs)
        trt: Any = require(runtime, EXTRAS[runtime])
        self._logger = _logger(trt)
        self._trt_runtime = trt.Runtime(self._logger)
        self._engine = self._trt_runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise UnavailableError(
                f"{here} can't load {file}: {'; '.join(self._logger.errors)}; remove that file if it is in the cache, "
                "else build the engine again on this machine, or open it with runtime='onnxruntime'"
            )
        self._kernels = KernelCache(trt, self._engine, here, fingerprint) if runtime == "tensorrt_rtx" else None
        managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._options = managed if self._kernels is None else self._kernels.options
        self._results = []
        for name in self._outputs:
            dtype = getattr(torch, np.dtype(trt.nptype(self._engine.get_tensor_dtype(name))).name)
            shape = (max_batch, *tuple(self._engine.get_tensor_shape(name))[1:])
            self._results.append(torch.empty(shape, dtype=dtype, device="cuda"))
        self._memory = torch.empty(max(1, self._engine.device_memory_size_v2), dtype=torch.uint8, device="cuda")
        self._contexts: dict[int, Any] = {}

    def launch(self, pixels: Any) -> list[Any]:
        """Launch on the current stream; the first launch of a size creates its context and compiles RTX's kernels."""
        size, stream = len(pixels), self._torch.cuda.current_stream().cuda_stream
        if first := size not in self._contexts:
            self._contexts[size] = self._new_context(pixels, stream)
        if not self._contexts[size].execute_async_v3(stream):
            raise RuntimeError(f"{self._runtime} failed on {size} pictures: {'; '.join(self._logger.errors)}")
        if first and self._kernels is not None:
            self._kernels.save()
        return self._results

    def _new_context(self, pixels: Any, stream: int) -> Any:
        context = self._engine.create_execution_context(self._options)
        if context is None:
            raise RuntimeError(f"{self._runtime} can't prepare the plan: {'; '.join(self._logger.errors)}")
        context.set_device_memory(self._memory.data_ptr(), self._memory.numel())
        # The first profile is for one picture, if there is a second; plans of version 0.2 have one for all.
        profile = min(len(pixels), self._engine.num_optimization_profiles) - 1
        accepted = context.set_optimization_profile_async(profile, stream)
        for name, buffer in zip(("pixels", *self._outputs), (pixels, *self._results), strict=True):
            accepted = accepted and context.set_tensor_address(name, buffer.data_ptr())
        if not (accepted and context.set_input_shape("pixels", tuple(pixels.shape))):
            raise RuntimeError(f"{self._runtime} refuses batches of {len(pixels)}: {'; '.join(self._logger.errors)}")
        return context


class TensorRTEncoder(BatchedEncoder):
    """Executes the plan of an engine that fits this machine; if there is none, one is built from its encoder.onnx in
    the user's cache (plan_cache)."""

    def __init__(self, folder: Path, manifest: dict[str, Any], runtime: str) -> None:
        super().__init__(manifest, runtime)
        if (reason := unavailable_reason(runtime)) is not None:
            raise UnavailableError(f"{runtime} can't run here: {reason}; open the engine with runtime='onnxruntime'")
        here = target(runtime)
        plan, file = open_plan(folder, manifest, here, partial(build_plan, runtime=runtime, max_batch=self.max_batch))
        self.use_gpu(LoadedPlan(plan, file, here, self.outputs, self.max_batch, self.fingerprint).launch)


class KernelCache:
    """The kernels that TensorRT-RTX compiles at run time for an engine on this GPU, kept in the user's cache; `options`
    of execution contexts that use and extend them."""

    def __init__(self, trt: Any, engine: Any, target: Target, fingerprint: str) -> None:
        self._file = CachedFile(target, "kernels", str(this_gpu()), fingerprint)
        self.options = engine.create_runtime_config()
        self.options.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        # A graph would keep the general kernels that run until those for a shape are compiled.
        eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        self.options.dynamic_shapes_kernel_specialization_strategy = eager
        self._kernels, self._stored = self.options.create_runtime_cache(), self._file.read()
        if self._stored is not None and not self._kernels.deserialize(self._stored):
            log.warning("%s can't be read; its kernels are compiled again", self._file.path)
        self.options.set_runtime_cache(self._kernels)

    def save(self) -> None:
        """Write the kernels if some were compiled since they were read or written."""
        if (kernels := bytes(self._kernels.serialize())) != self._stored:
            self._file.write(kernels)
            self._stored = kernels


def _logger(trt: Any) -> Any:
    """A logger of TensorRT that forwards to Python's logging; `errors` collects error messages for exceptions."""
    levels = (logging.ERROR, logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG)  # of trt.ILogger.Severity

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            level = levels[int(severity)]
            if level == logging.ERROR:
                self.errors.append(message)
            log.log(level, "%s", message)

    return Logger()
