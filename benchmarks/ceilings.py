"""What the machine reaches at best, as candidates of the same case: a matrix product, reading memory, and on a GPU a
graph of one kernel that does nothing.

Their best turn is the ceiling of the other rows' rates. A ceiling taken before or after is one of other minutes, which
on a shared machine differ by a tenth.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from benchmarks.devices import Call, Device
from benchmarks.harness import Candidate, ready
from iosr_fast.encoders.runtimes.openvino import openvino_core

GEMM, MEMORY, LAUNCH = "ceiling-gemm", "ceiling-memory", "ceiling-launch"
SIZE, GPU_SIZE = 2048, 8192
MEMORY_BYTES, GPU_COPY_BYTES = 512e6, 2**30  # more than every cache holds
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.2}  # of the largest value


def gemm(device: Device, threads: int, precision: str = "fp32", size: int | None = None) -> Candidate:
    """The product of two random square matrices (zeros draw less power); float32 on a GPU without TF32.

    On a CPU by the faster of PyTorch and OpenVINO, the second with one matrix constant as weights are: on one with
    AVX-512, OpenVINO took 1 / 1.9 of the time, on others PyTorch is faster.
    """
    size = size or (GPU_SIZE if device.is_gpu else SIZE)
    left, weight = torch.randn(2, size, size, device=device.name).to(DTYPES[precision])
    chosen: list[str] = []

    def prepare() -> Call:
        out = torch.empty_like(left)
        calls: dict[str, Call] = {"torch": lambda: torch.mm(left, weight, out=out)}
        if not device.is_gpu and find_spec("openvino") is not None:
            calls["openvino"] = _openvino_product(left, weight, threads)
        chosen[:] = [device.fastest(calls)]
        return calls[chosen[0]]

    def check(product: Any) -> dict[str, Any]:
        verify(torch.as_tensor(product), left, weight, TOLERANCE[precision])
        return {"library": chosen[0]}

    return Candidate(prepare, check, 2e-9 * size**3, precision, GEMM)


def verify(product: torch.Tensor, left: torch.Tensor, weight: torch.Tensor, tolerance: float) -> None:
    """Raise ArithmeticError unless the first row of `product` is that of `left` times `weight`."""
    truth = left[:1].double() @ weight.double()
    error = float((product[:1] - truth).abs().max() / truth.abs().max())
    if not error <= tolerance:
        raise ArithmeticError(f"the product is off by {error:.2g} of its largest value")


def launch(device: Device) -> Candidate:
    """The least time of any graph: one kernel on one number."""
    number = torch.zeros(1, device=device.name)
    return Candidate(ready(number.zero_))


def memory(device: Device) -> Candidate:
    """GB/s: on a CPU of a float32 sum, every byte counted once; on a GPU of a copy, read and written bytes counted."""
    if device.is_gpu:
        source = torch.zeros(GPU_COPY_BYTES, dtype=torch.uint8, device=device.name)
        target = torch.empty_like(source)
        return Candidate(ready(lambda: target.copy_(source)), work=2e-9 * GPU_COPY_BYTES, ceiling=MEMORY)
    data = torch.ones(int(MEMORY_BYTES / 4))
    return Candidate(ready(data.sum), work=MEMORY_BYTES / 1e9, ceiling=MEMORY)


def _openvino_product(left: torch.Tensor, weight: torch.Tensor, threads: int) -> Call:
    import openvino
    from openvino import opset13

    rows = opset13.parameter(list(left.shape), np.float32)
    model = openvino.Model([opset13.matmul(rows, opset13.constant(weight.numpy()), False, False)], [rows])
    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    request = openvino_core().compile_model(model, "CPU", options).create_infer_request()
    return lambda: request.infer([left.numpy()], share_inputs=True)[0]
