"""The sums of affinities by PyTorch's own operations: where no kernel can run, and the baseline for kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from iosr_fast.scoring.half_products import has_half_products, query_type, sums_of_products

if TYPE_CHECKING:
    from torch import Tensor

    from iosr_fast.scoring.device_plan import DevicePlan

# Elements: an affinity tile of 16 MB, 8 MB of keys or values made float32, 4 MB of class sums.
_TILE = 1 << 22
_ROWS = 1 << 21
_SUMS = 1 << 20


@torch.no_grad()
def affinity_sums(plan: DevicePlan, queries: Tensor, logits: Tensor) -> str:
    """The backend (backends/__init__.py) as one GEMM a tile of keys and queries, an exponential in place, and a segment
    sum or, with values, another GEMM.

    Equals the papers' affinity @ onehot without a one-hot matrix, in 32 MB of temporaries for any number of keys.
    queries are float32, float16 or bfloat16. On a GPU, keys of a half type, and int8 keys, take a half GEMM with
    float32 sums, for which queries are rounded to the keys' type (float16 for int8). All else is float32, converted
    tile by tile. Sums have a fixed order. Nothing waits for the device, so that CUDA graphs can record it.

    Returns "torch/cpu" or "torch/cuda".
    """
    # A half result would lose the precision of float32 sums.
    dtype = query_type(plan) if has_half_products(queries.device) else torch.float32
    rows = 1024 if plan.values is not None else min(1024, max(1, _SUMS // plan.n_classes))
    for first in range(0, len(queries), rows):
        block = slice(first, first + rows)
        _add_block(plan, queries[block].to(dtype), logits[block])
    return f"torch/{queries.device.type}"


def _add_block(plan: DevicePlan, queries: Tensor, logits: Tensor) -> None:
    assert plan.keys is not None
    n_keys = len(plan.keys)
    step = min(n_keys, _TILE // len(queries))
    if plan.keys.dtype != queries.dtype:
        step = min(step, _ROWS // plan.width)
    if plan.values is not None and plan.values.dtype != torch.float32:
        step = min(step, _ROWS // plan.n_classes)
    step = max(1, step)
    for begin in range(0, n_keys, step):
        end = min(begin + step, n_keys)
        affinity = _cosines(plan, begin, end, queries).sub_(1.0).mul_(plan.beta).exp_()
        if plan.weights is not None:
            affinity.mul_(plan.weights[begin:end, None])
        if plan.values is not None:
            # Not addmm: on a CPU it rounds each product of the sum to the precision of the logits.
            logits.add_(torch.mm(affinity.T, plan.values[begin:end].float()), alpha=plan.alpha)
            continue
        classes, lengths = _segments(plan, begin, end)
        sums = torch.segment_reduce(affinity, "sum", lengths=lengths, axis=0, unsafe=True)
        logits[:, classes].add_(sums.T, alpha=plan.alpha)


def _cosines(plan: DevicePlan, begin: int, end: int, queries: Tensor) -> Tensor:
    """<key, query> for keys begin to end: (end - begin, B) float32."""
    assert plan.keys is not None
    keys = plan.keys[begin:end].to(queries.dtype)
    dots = sums_of_products(keys, queries.T)
    return dots if plan.key_scales is None else dots.mul_(plan.key_scales[begin:end, None])


def _segments(plan: DevicePlan, begin: int, end: int) -> tuple[slice, Tensor]:
    """The classes that may have keys from begin to end, and the number of these keys of each."""
    offsets = plan.offsets  # on the host, so that nothing waits for the device
    assert offsets is not None and plan.class_offsets is not None
    classes = slice(int(offsets.searchsorted(begin, "right")) - 1, int(offsets.searchsorted(end, "left")))
    return classes, plan.class_offsets[classes.start : classes.stop + 1].clamp(begin, end).diff().long()
