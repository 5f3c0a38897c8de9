"""Scoring with PyTorch's own operations: the fallback on GPUs, and the baseline for kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from iosr_fast.scoring.fields import EMBEDDINGS

if TYPE_CHECKING:
    from iosr_fast.scoring.device_plan import DevicePlan

# Elements: an affinity tile of 16 MB, 8 MB of keys made float32, 4 MB of class sums.
_TILE = 1 << 22
_KEY_TILE = 1 << 21
_SUMS = 1 << 20
_HALVES = (torch.float16, torch.bfloat16)


@torch.no_grad()
def score_torch(plan: DevicePlan, plain: torch.Tensor, adapted: torch.Tensor | None) -> tuple[torch.Tensor, str]:
    """ScoringPlan's formula: per tile of keys and queries one GEMM, an exponential in place and a segment sum (with
    dense values another GEMM).

    Equals the papers' affinity @ onehot without a one-hot matrix, in 32 MB of temporaries for any number of keys.
    plain, adapted: (B, D) float32, float16 or bfloat16 on plan.device, of unit norm. On a GPU, queries and keys of one
    half precision (or int8 keys) take a half GEMM with float32 sums; everything else is float32, and keys of another
    precision are converted tile by tile. Sums have a fixed order. Nothing waits for the device, so that CUDA graphs can
    record it.

    Returns logits (B, C) float32, and "torch/cpu" or "torch/cuda".
    """
    if plan.text is not None:
        logits = torch.mm(plain.float(), plan.text.T).mul_(plan.tau)
    else:
        logits = torch.zeros(len(plain), plan.n_classes, device=plain.device)
    if plan.keys is not None:
        add_cache_term(plan, plain, adapted, logits)
    if plan.linear is not None:
        add_linear_term(plan, plain, adapted, logits)
    if plan.bias is not None:
        logits += plan.bias
    return logits, f"torch/{plain.device.type}"


def add_cache_term(plan: DevicePlan, plain: torch.Tensor, adapted: torch.Tensor | None, logits: torch.Tensor) -> None:
    """logits (B, C) += the cache term of score_torch."""
    step = 1024 if plan.values is not None else min(1024, _SUMS // plan.n_classes)
    for block in _blocks(len(plain), step):
        query = plan.query_rows(plain[block], None if adapted is None else adapted[block])
        _add_tiles(plan, query, logits[block])


def add_linear_term(plan: DevicePlan, plain: torch.Tensor, adapted: torch.Tensor | None, logits: torch.Tensor) -> None:
    """logits (B, C) += feature @ linear', in float32; in blocks of queries if a feature is more than an embedding."""
    assert plan.linear is not None
    for block in _blocks(len(plain), len(plain) if plan.feature in EMBEDDINGS else _SUMS // plan.linear.shape[1]):
        feature = plan.feature_rows(plain[block], None if adapted is None else adapted[block])
        logits[block].addmm_(feature.float(), plan.linear.T)


def _blocks(n_queries: int, step: int) -> Iterator[slice]:
    step = max(1, step)
    for first in range(0, n_queries, step):
        yield slice(first, first + step)


def _add_tiles(plan: DevicePlan, query: torch.Tensor, logits: torch.Tensor) -> None:
    assert plan.keys is not None
    half = _multiply_in_half(plan.keys, query)
    query = query if half else query.float()
    n_keys = len(plan.keys)
    step = min(n_keys, max(1, _TILE // len(query)))
    if plan.keys.dtype != (query.dtype if half else torch.float32):
        step = min(step, max(1, _KEY_TILE // plan.width))
    for begin in range(0, n_keys, step):
        end = min(begin + step, n_keys)
        affinity = _cosines(plan, begin, end, query, half)
        affinity.sub_(1.0).mul_(plan.beta).exp_()
        if plan.weights is not None:
            affinity.mul_(plan.weights[begin:end, None])
        if plan.values is not None:
            logits.addmm_(affinity.T, plan.values[begin:end], alpha=plan.alpha)
            continue
        classes, lengths = _segments(plan, begin, end)
        sums = torch.segment_reduce(affinity, "sum", lengths=lengths, axis=0, unsafe=True)
        logits[:, classes].add_(sums.T, alpha=plan.alpha)


def _multiply_in_half(keys: torch.Tensor, query: torch.Tensor) -> bool:
    # A half result would lose the precision of float32 sums. The CPU's mm has no float32 result for half operands, nor
    # has a GPU's before PyTorch 2.8.
    widens = query.is_cuda and "dtype" in torch.ops.aten.mm.overloads()
    return widens and query.dtype in _HALVES and keys.dtype in (query.dtype, torch.int8)


def _cosines(plan: DevicePlan, begin: int, end: int, query: torch.Tensor, half: bool) -> torch.Tensor:
    """<key, query> for keys begin to end: (end - begin, B) float32."""
    assert plan.keys is not None
    keys = plan.keys[begin:end]
    scales = None if plan.key_scales is None else plan.key_scales[begin:end, None]
    if half:
        dots = torch.mm(keys.to(query.dtype), query.T, out_dtype=torch.float32)
        return dots if scales is None else dots.mul_(scales)
    values = keys.float()
    return torch.mm(values if scales is None else values.mul_(scales), query.T)


def _segments(plan: DevicePlan, begin: int, end: int) -> tuple[slice, torch.Tensor]:
    """The classes that may have keys from begin to end, and the number of these keys of each."""
    offsets = plan.class_offsets
    assert offsets is not None
    classes = slice(0, plan.n_classes)
    if not offsets.is_cuda:  # on a GPU this would wait for the device
        ends = offsets.numpy()
        classes = slice(int(ends.searchsorted(begin, "right")) - 1, int(ends.searchsorted(end, "left")))
    return classes, offsets[classes.start : classes.stop + 1].clamp(begin, end).diff().long()
