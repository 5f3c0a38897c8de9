"""What this machine reaches at best, measured in the run that is compared with it, at the threads it is compared at."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import numpy as np

from iosr_fast.info import usable_threads

WARMUP = 2


def gemm_ceiling_flops(threads: int, size: int = 2048, repeats: int = 7) -> float:
    """FLOP/s of the best of a few float32 GEMMs of (size, size), by whichever library is fastest here.

    No one library is on every processor: on one with AVX-512, oneDNN's kernels in OpenVINO have done 1.8 times what
    PyTorch's MKL does. One factor is constant, as weights are. NumPy's BLAS takes its threads from OMP_NUM_THREADS or
    the machine, so NumPy takes part only where it would use no more than `threads`.
    """
    left, weight = np.random.default_rng(0).standard_normal((2, size, size), dtype=np.float32)
    with torch_threads(threads):
        found = [call for make in _GEMMS for call in make(left, weight, threads)]
        return 2.0 * size**3 / min(_best_s(call, repeats) for call in found)


def _torch_gemm(left: np.ndarray, weight: np.ndarray, threads: int) -> Iterator[Callable[[], object]]:
    import torch

    left_torch, weight_torch, out = torch.from_numpy(left), torch.from_numpy(weight), torch.empty(left.shape)
    yield lambda: torch.mm(left_torch, weight_torch, out=out)


def _numpy_gemm(left: np.ndarray, weight: np.ndarray, threads: int) -> Iterator[Callable[[], object]]:
    if threads >= usable_threads():
        out = np.empty_like(left)
        yield lambda: np.matmul(left, weight, out=out)


def _onnxruntime_gemm(left: np.ndarray, weight: np.ndarray, threads: int) -> Iterator[Callable[[], object]]:
    if find_spec("onnxruntime") is None or find_spec("onnx") is None:
        return
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(_product(weight), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input("x", left)
    binding.bind_ortvalue_output("y", ort.OrtValue.ortvalue_from_shape_and_type(left.shape, np.float32))
    yield lambda: session.run_with_iobinding(binding)


def _openvino_gemm(left: np.ndarray, weight: np.ndarray, threads: int) -> Iterator[Callable[[], object]]:
    if find_spec("openvino") is None or find_spec("onnx") is None:
        return
    import openvino

    options = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(io.BytesIO(_product(weight))), "CPU", options)
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(left, shared_memory=True))
    yield request.infer


def _product(weight: np.ndarray) -> bytes:
    """ONNX of y = x @ weight."""
    from onnx import TensorProto, helper, numpy_helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, list(weight.shape)) for name in "xy")
    node = helper.make_node("MatMul", ["x", "weight"], ["y"])
    graph = helper.make_graph([node], "product", [x], [y], [numpy_helper.from_array(weight, "weight")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


_GEMMS = (_torch_gemm, _numpy_gemm, _onnxruntime_gemm, _openvino_gemm)


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
