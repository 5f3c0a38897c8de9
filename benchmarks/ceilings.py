"""What the machine reaches at best, as candidates of the same case: a matrix product, and reading memory.

Their best turn is the ceiling of the other rows' rates. A ceiling taken before or after is one of other minutes, which
on a shared machine differ by a tenth.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np

from benchmarks.devices import Device
from benchmarks.harness import Candidate
from iosr_fast.encoders.runtimes.openvino import openvino_core

GEMM, MEMORY = "ceiling-gemm", "ceiling-memory"
SIZE, GPU_SIZE = 2048, 8192
MEMORY_BYTES, GPU_COPY_BYTES = 512e6, 2**30  # more than every cache holds
TRIALS = 3
TOLERANCE = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.2}  # of the largest value
# Keys in int8 are multiplied in float16.
GPU_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "float16"}


def gemm(threads: int, size: int = SIZE) -> Candidate:
    """The float32 product of two square matrices, one of them constant as weights are, by the library that is fastest.

    Neither PyTorch nor OpenVINO is fastest on every processor: on one with AVX-512, OpenVINO took 1 / 1.9 of the time.
    """
    left, weight = np.random.default_rng(0).standard_normal((2, size, size), dtype=np.float32)
    chosen: list[str] = []

    def prepare() -> Callable[[], Any]:
        calls = {"torch": _torch_gemm(left, weight), "openvino": openvino_gemm(left, weight, threads)}
        seconds = {name: _best_s(call) for name, call in calls.items() if call is not None}
        chosen.append(min(seconds, key=lambda name: seconds[name]))
        return calls[chosen[0]]  # type: ignore[return-value]

    def check(product: Any) -> dict[str, Any]:
        verify(np.asarray(product), left[:1], weight, "float32")
        return {"library": chosen[0]}

    return Candidate(prepare, check, work=2e-9 * size**3, ceiling=GEMM)


def gpu_gemm(device: Device, precision: str, size: int = GPU_SIZE) -> Candidate:
    """torch.mm of two random square matrices (zeros draw less power); float32 without TF32, PyTorch's default."""
    import torch

    name = GPU_DTYPES[precision]

    def prepare() -> Callable[[], Any]:
        left, right = (torch.randn(size, size, device=device.name).to(getattr(torch, name)) for _ in range(2))
        out = torch.empty_like(left)
        few[:] = [left[:1].float().cpu().numpy(), right.float().cpu().numpy()]
        return lambda: torch.mm(left, right, out=out)

    def check(product: Any) -> dict[str, Any]:
        verify(product.float().cpu().numpy(), *few, name)
        return {}

    few: list[Any] = []
    return Candidate(prepare, check, 2e-9 * size**3, precision, GEMM)


def verify(product: np.ndarray, row: np.ndarray, weight: np.ndarray, dtype: str) -> None:
    """Raise ArithmeticError unless the first row of `product` is `row` times `weight`."""
    truth = row.astype(np.float64) @ weight
    error = float(np.abs(product.reshape(-1, weight.shape[1])[:1] - truth).max() / np.abs(truth).max())
    if not error <= TOLERANCE[dtype]:
        raise ArithmeticError(f"the product is off by {error:.2g} of its largest value")


def memory(device: Device, threads: int) -> Candidate:
    """GB/s: on a CPU of a float32 sum, every byte counted once; on a GPU of a copy, read and written bytes counted."""
    import torch

    if device.is_gpu:
        source = torch.zeros(GPU_COPY_BYTES, dtype=torch.uint8, device=device.name)
        target = torch.empty_like(source)
        return Candidate(lambda: lambda: target.copy_(source), work=2e-9 * GPU_COPY_BYTES, ceiling=MEMORY)
    data = torch.ones(int(MEMORY_BYTES / 4))
    return Candidate(lambda: data.sum, work=MEMORY_BYTES / 1e9, ceiling=MEMORY)


def _torch_gemm(left: np.ndarray, weight: np.ndarray) -> Callable[[], Any]:
    import torch

    left_torch, weight_torch, out = torch.from_numpy(left), torch.from_numpy(weight), torch.empty(left.shape)
    return lambda: torch.mm(left_torch, weight_torch, out=out)


def openvino_gemm(left: np.ndarray, weight: np.ndarray, threads: int) -> Callable[[], Any] | None:
    if find_spec("openvino") is None or find_spec("onnx") is None:
        return None
    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    core = openvino_core()
    compiled = core.compile_model(core.read_model(io.BytesIO(_product(weight))), "CPU", options)
    request = compiled.create_infer_request()
    return lambda: request.infer([left], share_inputs=True)[0]


def _product(weight: np.ndarray) -> bytes:
    """An ONNX graph of one product with constant `weight`."""
    from onnx import TensorProto, helper, numpy_helper

    size = weight.shape[0]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [size, size]) for name in ("x", "y"))
    node = helper.make_node("MatMul", ["x", "weight"], ["y"])
    graph = helper.make_graph([node], "product", [x], [y], [numpy_helper.from_array(weight, "weight")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def _best_s(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(1 + TRIALS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times[1:])
