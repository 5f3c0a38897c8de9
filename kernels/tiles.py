"""Device code that the kernels share: the position of a program's tile, its dot products, its affinities."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

# Triton decides when a kernel is defined whether its interpreter runs it.
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def place(n_query_blocks, n_columns):
    """(query block, column) of this program. A band of 16 query blocks visits every column before the next band starts,
    so that concurrent programs share both queries and keys in the L2 cache."""
    pid = tl.program_id(0)
    per_band = 16 * n_columns
    first = (pid // per_band) * 16
    height = tl.minimum(n_query_blocks - first, 16)
    within = pid % per_band
    return first + within % height, within // height


@triton.jit
def query_rows(block, n_queries, BLOCK_B: tl.constexpr):
    """Row numbers of a block of queries, and the same numbers clamped to the array: rows past the end read the last row
    and are never stored, so that the loads of the inner loop need no mask."""
    rows = block * BLOCK_B + tl.arange(0, BLOCK_B)
    return rows, tl.minimum(rows, n_queries - 1)


@triton.jit
def operand(x):
    """x as a factor of tl.dot. The interpreter would multiply the integers that store bfloat16, so there x becomes
    float32, which has the same products."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        x = x.to(tl.float32)
    return x


@triton.jit
def dot_products(
    left,
    right,
    left_rows,
    right_rows,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SWAP: tl.constexpr,
):
    """<left[left_rows[i]], right[right_rows[j]]> in float32. int8 rows are converted in registers; float32 rows take
    three TF32 products (Ootomo and Yokota, 2022), which keep float32's accuracy on tensor cores.

    SWAP computes the transpose, so that the many rows on the right fill the tensor cores' longer side."""
    channels = tl.arange(0, BLOCK_D)
    left_at = left + left_rows[:, None].to(tl.int64) * WIDTH + channels[None, :]
    right_at = right + right_rows[:, None].to(tl.int64) * WIDTH + channels[None, :]
    if SWAP:
        dots = tl.zeros((right_rows.shape[0], left_rows.shape[0]), dtype=tl.float32)
    else:
        dots = tl.zeros((left_rows.shape[0], right_rows.shape[0]), dtype=tl.float32)
    for first in range(0, WIDTH, BLOCK_D):
        if WIDTH % BLOCK_D == 0:
            a = tl.load(left_at + first)
            b = tl.load(right_at + first)
        else:
            inside = (first + channels < WIDTH)[None, :]
            a = tl.load(left_at + first, mask=inside, other=0)
            b = tl.load(right_at + first, mask=inside, other=0)
        b = operand(b.to(a.dtype))
        a = operand(a)
        if SWAP:
            dots = tl.dot(b, tl.trans(a), dots, input_precision="tf32x3")
        else:
            dots = tl.dot(a, tl.trans(b), dots, input_precision="tf32x3")
    if SWAP:
        dots = tl.trans(dots)
    return dots


@triton.jit
def affinities(dots, rows, inside, weights, key_scales, scale, HAS_WEIGHTS: tl.constexpr, HAS_SCALES: tl.constexpr):
    """weights[j] * exp2(scale * (cosine - 1)), and 0 for keys outside.

    1 is subtracted before scaling: the difference is exact near 1, where the affinity is largest."""
    if HAS_SCALES:
        dots = dots * tl.load(key_scales + rows)[None, :]
    affinity = tl.exp2((dots - 1.0) * scale)
    if HAS_WEIGHTS:
        return affinity * tl.load(weights + rows, mask=inside, other=0.0)[None, :]
    return tl.where(inside[None, :], affinity, 0.0)
