"""What this machine reaches at best, measured in the run that is compared with it, at the threads it is compared at."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np

from iosr_fast.encoders.runtimes.openvino import openvino_core
from iosr_fast.utils.machine import usable_threads

WARMUP = 2


@dataclass(frozen=True)
class Gemm:
    """A float32 product that does `flops` each time it is called, by the library that is fastest here.

    `operands` are held because a library may read them where they lie without holding them itself.
    """

    library: str
    flops: float
    call: Callable[[], object]
    operands: tuple[np.ndarray, ...] = ()


def best_gemm(threads: int, size: int = 2048, repeats: int = 7) -> Gemm:
    """The product of two (size, size) matrices, one of them constant, as weights are.

    No one library is on every processor: on one with AVX-512, OpenVINO's kernels have done 1.9 times what NumPy's and
    PyTorch's do. NumPy's BLAS takes its threads from OMP_NUM_THREADS or the machine, so NumPy takes part only where it
    would use no more than `threads`.
    """
    left, weight = np.random.default_rng(0).standard_normal((2, size, size), dtype=np.float32)
    with torch_threads(threads):
        found = {name: call for name, make in _GEMMS.items() if (call := make(left, weight, threads)) is not None}
        seconds = {name: _best_s(call, repeats) for name, call in found.items()}
    library = min(seconds, key=lambda name: seconds[name])
    return Gemm(library, 2.0 * size**3, found[library], (left, weight))


def gemm_ceiling_flops(threads: int, size: int = 2048, repeats: int = 7) -> float:
    """FLOP/s of the best of a few calls of best_gemm."""
    gemm = best_gemm(threads, size, repeats)
    with torch_threads(threads):
        return gemm.flops / _best_s(gemm.call, repeats)


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
    """Bytes/s at which memory is read: the best of a few float32 sums over `megabytes`, which no cache holds.

    Every byte is counted once.
    """
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


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """PyTorch's thread count for the length of a with block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
