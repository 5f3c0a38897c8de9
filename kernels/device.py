"""Facts for launches: types of keys and queries, the GPU's name and size, the scale of the exponent."""

from __future__ import annotations

import functools
import math

import torch

from iosr_fast.scoring.cuda_layout import split_rows
from iosr_fast.scoring.device_plan import cached

WORKSPACE_BYTES = 64 * 2**20

PRECISION = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "int8"}
QUERY_DTYPE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.float16}


def exponent_scale(beta: float) -> float:
    """beta * log2(e): exp(-beta * (1 - x)) = exp2(scale * (x - 1))."""
    return beta * math.log2(math.e)


def pointer(tensor: torch.Tensor | None, unread: torch.Tensor) -> torch.Tensor:
    """The tensor; or `unread`, as an argument that the kernel doesn't read."""
    return unread if tensor is None else tensor


@functools.cache
def gpu_name(device: torch.device) -> str:
    """The GPU's name, as in launch_configs.json; "default" under the interpreter."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "default"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """The GPU's multiprocessors; 1 under the interpreter, which runs programs one after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def has_tensor_memory_accelerator(device: torch.device) -> bool:
    """Whether the GPU copies tiles by tensor descriptors (TMA) and has the shared memory for the tiles of these paths:
    compute capability 9.0 to 11.0. 12.0 has 99 KB a block, half of what they take."""
    return device.type == "cuda" and (9, 0) <= torch.cuda.get_device_capability(device) < (12, 0)


def float16_parts(rows: torch.Tensor) -> tuple[torch.Tensor, float]:
    """split_rows() of a plan's float32 rows, cached.

    Raises RuntimeError if a CUDA graph is recorded before the plan was scored once, because that must wait.
    """
    parts = cached(rows, "split", functools.partial(split_rows, rows))
    if parts is None:
        raise RuntimeError(
            "expected the plan to be scored with Triton once before a CUDA graph records it, because the first scoring "
            "reads the largest value of its texts; score it once outside of the recording"
        )
    return parts
