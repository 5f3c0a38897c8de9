"""The cache term of 1 to 16 queries in one launch of csrc/cuda, on NVIDIA GPUs of compute capability 8.0 and newer."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from iosr_fast.exceptions import IosrFastError
from iosr_fast.scoring.dispatch import FEW_QUERIES
from iosr_fast.scoring.half_products import padded, query_type

if TYPE_CHECKING:
    from torch import Tensor

    from iosr_fast.scoring.device_plan import DevicePlan

_FORMATS = (torch.float32, torch.float16, torch.bfloat16, torch.int8)  # in the order of Format in few_queries.h


@functools.cache
def _module() -> Any:
    return importlib.import_module("iosr_fast._C_cuda")


def affinity_sums(plan: DevicePlan, queries: Tensor, logits: Tensor) -> str:
    """The backend (backends/__init__.py) in one launch, for at most 16 queries, float32, float16 or bfloat16.

    Queries are rounded to the keys' half type, as Triton rounds those of batches. Products and sums are float32, in a
    fixed order. The plan's device is the current one, as score() makes it. A plan's first call binds it and waits for
    that; later ones don't wait, and CUDA graphs can record them. Calls on several streams at once don't meet: sums that
    span blocks (2 * B numbers a tile of up to 64 keys; with values at most two (B, C) matrices a multiprocessor) lie in
    memory of PyTorch's allocator, which reuses it in the order of the stream and gives a recorded graph its own.

    Returns "cuda/few". Raises IosrFastError for more queries, RuntimeError with CUDA's message if a launch fails.
    """
    if not 1 <= len(queries) <= FEW_QUERIES:
        raise IosrFastError(
            f"expected 1 to {FEW_QUERIES} queries, got {len(queries)}; the backends triton and torch take more"
        )
    stream, bound = _stream(plan.device), plan.cached("cuda", lambda: _bind(plan)).plan
    rows = queries.to(query_type(plan)).float().contiguous()
    workspace = torch.empty(bound.workspace_size(len(rows)), dtype=torch.float32, device=plan.device)
    bound.add_affinity_sums(rows.data_ptr(), len(rows), logits.data_ptr(), workspace.data_ptr(), stream)
    return "cuda/few"


@dataclass(frozen=True)
class _Bound:
    """A BoundPlan of _C_cuda, and the tensors whose addresses it holds."""

    plan: Any
    tensors: dict[str, Tensor | None]


def _bind(plan: DevicePlan) -> _Bound:
    assert plan.keys is not None
    device, keys = plan.device.index or 0, padded(plan.keys)
    values = None if plan.values is None else plan.cached("values", lambda: padded(plan.values))
    tile_classes = None
    if plan.offsets is not None:
        firsts = np.append(np.arange(0, len(keys), _module().tile_keys(device, len(keys))), len(keys) - 1)
        table = np.searchsorted(plan.offsets, firsts, side="right") - 1  # empty classes own no key
        tile_classes = torch.from_numpy(table.astype(np.int32)).to(plan.device)
    tensors = {name: getattr(plan, name) for name in ("key_scales", "weights", "class_offsets")}
    tensors |= {"keys": keys, "values": values, "tile_classes": tile_classes}
    bound = _module().BoundPlan(
        device=device,
        format=_FORMATS.index(keys.dtype),
        n_keys=len(keys),
        n_classes=plan.n_classes,
        width=plan.keys.shape[1],
        key_vectors=keys.shape[1] * keys.element_size() // 16,
        value_stride=0 if values is None else values.shape[1],
        half_values=values is not None and values.dtype == torch.float16,
        alpha=plan.alpha,
        beta=plan.beta,
        **{name: 0 if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()},
    )
    if plan.device.type == "cuda":  # the next call may come on another stream
        torch.cuda.current_stream(plan.device).synchronize()
    return _Bound(bound, tensors)


def _stream(device: torch.device) -> int:
    """The handle of the device's current stream."""
    return torch.cuda.current_stream(device).cuda_stream
