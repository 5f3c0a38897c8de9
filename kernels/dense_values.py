"""dense_values: sums of value rows weighted by affinities, for keys with a row of values in place of a class."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from iosr_fast.exceptions import IosrFastError
from iosr_fast.kernels.cache_kernels import dense_kernel
from iosr_fast.kernels.device import (
    PRECISION,
    QUERY_DTYPE,
    WORKSPACE_BYTES,
    exponent_scale,
    gpu_name,
    multiprocessors,
    pointer,
)
from iosr_fast.kernels.launch import Config, dense_config, load_of
from iosr_fast.scoring.device_plan import on_gpu

if TYPE_CHECKING:
    from torch import Tensor


def dense_values(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    beta: float,
    weights: Tensor | None = None,
    key_scales: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """out[b] = sum over keys j of weights[j] * exp(-beta * (1 - <query[b], keys[j]>)) * values[j]

    query       (B, D) float32, float16 or bfloat16, unit rows
    keys        (N, D) float32, float16, bfloat16 or int8, N >= 1, unit rows (int8: once multiplied by key_scales)
    values      (N, V) float16 or float32, V >= 1
    weights     (N,) float32; None means all ones
    key_scales  (N,) float32, with int8 keys only
    config      overrides the launch configuration, for tests and tuning

    Returns (B, V) float32 without forming the (B, N) affinity: two products per tile as in FlashAttention (Dao et al.,
    2022), without a running maximum, because the exponent is never positive. Queries are rounded to the keys' half type
    (float16 for int8), affinities to the values' type; sums are float32. Each block of block_v columns computes the
    affinities again. With few queries several programs share the keys, and their sums (at most 64 MB) are added in
    order. Raises ValueError if a shape, a dtype, a device or beta is wrong.
    """
    _check(query, keys, values, weights, key_scales, beta)
    precision = PRECISION[keys.dtype]
    n_queries, n_keys, n_values = len(query), len(keys), values.shape[1]
    if not n_queries:
        return torch.zeros((0, n_values), dtype=torch.float32, device=query.device)
    if config is None:
        wide = values.dtype == torch.float32
        config = dense_config(gpu_name(query.device), precision, load_of(n_queries), wide)
    blocks, chunks = -(-n_queries // config.block_b), -(-n_values // config.block_v)
    n_tiles = -(-n_keys // config.block_n)
    # Two programs per multiprocessor, if there are enough tiles and the workspace suffices.
    wanted = -(-2 * multiprocessors(query.device) // (blocks * chunks))
    wanted = min(wanted, n_tiles, WORKSPACE_BYTES // (4 * n_queries * n_values))
    stretch = -(-n_tiles // max(1, wanted)) * config.block_n
    n_stretches = -(-n_keys // stretch)
    with on_gpu(query.device):
        # Affinities times large weights would overflow float16; with weights of at most 1 they can't.
        largest = None if weights is None else weights.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        shares = None if weights is None or largest is None else weights / largest
        out = torch.empty((n_stretches, n_queries, n_values), dtype=torch.float32, device=query.device)
        dense_kernel[blocks * chunks * n_stretches,](
            query.to(QUERY_DTYPE[precision]).contiguous(),
            keys.contiguous(),
            pointer(key_scales, out),
            pointer(shares, out),
            values.contiguous(),
            out,
            n_queries,
            n_keys,
            n_values,
            n_stretches,
            stretch,
            exponent_scale(beta),
            WIDTH=keys.shape[1],
            HAS_WEIGHTS=weights is not None,
            HAS_SCALES=key_scales is not None,
            **config.meta("block_v"),
        )
        total = out[0] if n_stretches == 1 else out.sum(dim=0)
        return total if largest is None else total.mul_(largest)


def _check(
    query: Tensor, keys: Tensor, values: Tensor, weights: Tensor | None, key_scales: Tensor | None, beta: float
) -> None:
    if query.ndim != 2 or query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise IosrFastError(
            f"expected query (B, D) float32, float16 or bfloat16, got {tuple(query.shape)} {query.dtype}; "
            "convert it with query.float()"
        )
    width, device = query.shape[1], query.device
    if keys.ndim != 2 or keys.dtype not in PRECISION or keys.shape[1] != width or not len(keys):
        raise IosrFastError(
            f"expected keys (N, {width}) float32, float16, bfloat16 or int8 with N >= 1, "
            f"got {tuple(keys.shape)} {keys.dtype}; query and keys must come from the same encoder"
        )
    n_keys = len(keys)
    wanted_values = values.ndim == 2 and len(values) == n_keys and values.shape[1] >= 1
    if not wanted_values or values.dtype not in (torch.float16, torch.float32):
        raise IosrFastError(
            f"expected values ({n_keys}, V) float16 or float32 with V >= 1, got {tuple(values.shape)} {values.dtype}; "
            "give one row per key"
        )
    for name, array in (("weights", weights), ("key_scales", key_scales)):
        if array is not None and (array.shape != (n_keys,) or array.dtype != torch.float32):
            raise IosrFastError(f"expected {name} ({n_keys},) float32, got {tuple(array.shape)} {array.dtype}")
    if (keys.dtype == torch.int8) != (key_scales is not None):
        raise IosrFastError(
            f"expected key_scales with int8 keys and with no others, got {keys.dtype} keys "
            f"{'without' if key_scales is None else 'with'} key_scales"
        )
    for name, array in (("keys", keys), ("values", values), ("weights", weights), ("key_scales", key_scales)):
        if array is not None and array.device != device:
            raise IosrFastError(f"expected {name} on {device}, where query is, got {array.device}; move it with .to()")
    if not (0 <= beta < float("inf")):
        raise IosrFastError(f"expected beta finite and >= 0, got {beta}")
