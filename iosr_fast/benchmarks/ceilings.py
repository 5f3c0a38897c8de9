"""What a device reaches at best, measured in the run that is compared with it, with the threads of that run."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import numpy as np

from iosr_fast.benchmarks import harness
from iosr_fast.benchmarks.devices import Device
from iosr_fast.benchmarks.harness import torch_threads
from iosr_fast.encoders.runtimes.openvino import openvino_core
from iosr_fast.utils.machine import usable_threads

WARMUP = 2
GEMMS_A_TURN = 8  # a quarter of a second on two cores: as long as what it is compared with
GPU_SIZE, GPU_COPY_BYTES = 8192, 2**30
# Keys in int8 are multiplied in float16.
GPU_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "float16"}


@dataclass
class Ceilings:
    """FLOP/s of products and bytes/s of memory on one device, each measured when it is first asked for."""

    device: Device
    threads: int
    _gemms: dict[str, float] = field(default_factory=dict)

    def gemm_flops(self, precision: str = "fp32") -> float:
        """On a CPU the float32 product of its fastest library; on a GPU torch.mm of square matrices in `precision`."""
        on_gpu = self.device.is_gpu
        dtype = GPU_DTYPES[precision if on_gpu else "fp32"]
        if dtype not in self._gemms:
            self._gemms[dtype] = gpu_gemm_flops(self.device, dtype) if on_gpu else gemm_ceiling_flops(self.threads)
        return self._gemms[dtype]

    @cached_property
    def bytes_per_s(self) -> float:
        """On a CPU of a sum, every byte counted once; on a GPU of a copy, read and written bytes counted."""
        return gpu_copy_bandwidth(self.device) if self.device.is_gpu else memory_bandwidth(self.threads)


@dataclass(frozen=True)
class Gemm:
    """A float32 product of `flops` a call, by the library that is fastest here.

    `operands` are referenced because a library may read them in place without a reference of its own.
    """

    library: str
    flops: float
    call: Callable[[], object]
    operands: tuple[np.ndarray, ...] = ()


def best_gemm(threads: int, size: int = 2048, repeats: int = 7) -> Gemm:
    """The product of two (size, size) matrices, one of them constant, as weights are.

    No library is fastest on every processor: on one with AVX-512, OpenVINO's kernels took 1 / 1.9 of the time of
    NumPy's and PyTorch's. NumPy's BLAS takes its threads from OMP_NUM_THREADS or the machine, so NumPy takes part only
    where it would use no more than `threads`.
    """
    left, weight = np.random.default_rng(0).standard_normal((2, size, size), dtype=np.float32)
    with torch_threads(threads):
        calls = {name: call for name, make in _GEMMS.items() if (call := make(left, weight, threads)) is not None}
        seconds = {name: _best_s(call, repeats) for name, call in calls.items()}
    library = min(seconds, key=lambda name: seconds[name])
    return Gemm(library, 2.0 * size**3, calls[library], (left, weight))


def gemm_ceiling_flops(threads: int, size: int = 2048, repeats: int = 7) -> float:
    """FLOP/s of the best of a few calls of best_gemm."""
    gemm = best_gemm(threads, size, repeats)
    with torch_threads(threads):
        return gemm.flops / _best_s(gemm.call, repeats)


def measure_beside_gemm(
    candidates: Mapping[str, Callable[[], object]], repeats: int, threads: int
) -> tuple[dict[str, list[float]], float, str]:
    """As harness.measure, with a turn of a GEMM in every round: milliseconds a call, the FLOP/s of its best turn, its
    library.

    A ceiling taken before or after is one of other minutes, which on a shared machine differ by a tenth. The best turn
    counts, because a ceiling is what the machine can do.
    """
    gemm = best_gemm(threads)
    runtimes_ms = harness.measure({**candidates, "": lambda: [gemm.call() for _ in range(GEMMS_A_TURN)]}, repeats)
    return runtimes_ms, GEMMS_A_TURN * gemm.flops / min(runtimes_ms.pop("")) * 1e3, gemm.library


def _torch_gemm(left: np.ndarray, weight: np.ndarray, threads: int) -> Callable[[], object] | None:
    import torch

    left_torch, weight_torch, out = torch.from_numpy(left), torch.from_numpy(weight), torch.empty(left.shape)
    return lambda: torch.mm(left_torch, weight_torch, out=out)


def _numpy_gemm(left: np.ndarray, weight: np.ndarray, threads: int) -> Callable[[], object] | None:
    if threads < usable_threads():
        return None
    out = np.empty_like(left)
    return lambda: np.matmul(left, weight, out=out)


def _onnxruntime_gemm(left: np.ndarray, weight: np.ndarray, threads: int) -> Callable[[], object] | None:
    if find_spec("onnxruntime") is None or find_spec("onnx") is None:
        return None
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(_product(weight), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input("x", left)
    binding.bind_ortvalue_output("y", ort.OrtValue.ortvalue_from_shape_and_type(left.shape, np.float32))
    return lambda: session.run_with_iobinding(binding)


def _openvino_gemm(left: np.ndarray, weight: np.ndarray, threads: int) -> Callable[[], object] | None:
    if find_spec("openvino") is None or find_spec("onnx") is None:
        return None
    import openvino

    options = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    core = openvino_core()
    compiled = core.compile_model(core.read_model(io.BytesIO(_product(weight))), "CPU", options)
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(left))
    return request.infer


def _product(weight: np.ndarray) -> bytes:
    """ONNX of y = x @ weight."""
    from onnx import TensorProto, helper, numpy_helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, list(weight.shape)) for name in "xy")
    node = helper.make_node("MatMul", ["x", "weight"], ["y"])
    graph = helper.make_graph([node], "product", [x], [y], [numpy_helper.from_array(weight, "weight")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


_GEMMS = {"torch": _torch_gemm, "numpy": _numpy_gemm, "onnxruntime": _onnxruntime_gemm, "openvino": _openvino_gemm}


def memory_bandwidth(threads: int, megabytes: int = 512, repeats: int = 5) -> float:
    """Bytes/s at which memory is read: the best of a few float32 sums over `megabytes`, which exceed every cache."""
    import torch

    data = torch.ones(megabytes * 250_000)
    with torch_threads(threads):
        return data.numel() * 4 / _best_s(data.sum, repeats)


def _best_s(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(WARMUP + repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times[WARMUP:])


def gpu_gemm_flops(device: Device, dtype: str, repeats: int = 20) -> float:
    """FLOP/s of torch.mm of two random square matrices (zeros draw less power). float32 products are float32's, not
    TF32's."""
    import torch

    size = GPU_SIZE if device.name == "cuda" else 64
    left, right = (torch.randn(size, size, device=device.torch).to(getattr(torch, dtype)) for _ in range(2))
    out = torch.empty_like(left)
    with exact_products():
        return 2.0 * size**3 / _best_gpu_s(device, lambda: torch.mm(left, right, out=out), repeats)


def gpu_copy_bandwidth(device: Device, repeats: int = 20) -> float:
    import torch

    source = torch.zeros(GPU_COPY_BYTES if device.name == "cuda" else 2**16, dtype=torch.uint8, device=device.torch)
    target = torch.empty_like(source)
    return 2.0 * source.numel() / _best_gpu_s(device, lambda: target.copy_(source), repeats)


def _best_gpu_s(device: Device, call: Callable[[], Any], repeats: int) -> float:
    recorded, _ = device.record(call)
    return min(device.measure({"": recorded}, repeats if device.name == "cuda" else 1)[""]) / 1e3


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """float32 products and convolutions without TF32 for the length of a with block."""
    import torch

    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
