"""Device code that the kernels share: where a program's tile lies, its dot products, its affinities."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

# Whether the kernels defined below run in Triton's interpreter: that is decided here, when they are defined.
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def place(n_query_blocks, n_columns):
    """(query block, column) of this program. A band of 16 query blocks meets every column before the next band begins,
    so that programs which run at the same time share both their queries and their keys in the L2 cache."""
    pid = tl.program_id(0)
    per_band = 16 * n_columns
    first = (pid // per_band) * 16
    height = tl.minimum(n_query_blocks - first, 16)
    within = pid % per_band
    return first + within % height, within // height


@triton.jit
def query_rows(block, n_queries, BLOCK_B: tl.constexpr):
    """Row numbers of a block of queries, and the same numbers kept inside the array: rows past the end are computed on
    the last row's values and never stored, which spares every load of the inner loop a mask."""
    rows = block * BLOCK_B + tl.arange(0, BLOCK_B)
    return rows, tl.minimum(rows, n_queries - 1)


@triton.jit
def operand(x):
    """x as a factor of tl.dot. The interpreter multiplies bfloat16 as the integers that it stores them in, so there it
    takes them as float32, which has the same products."""
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
    three TF32 products each (Ootomo and Yokota, 2022), which keeps float32's accuracy on tensor cores.

    SWAP computes the transpose, so that the rows on the right, which are many, fill the tensor cores' longer side."""
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
    """weights[j] * exp2(scale * (cosine - 1)), and 0 for keys that aren't inside.

    One is taken off before scaling: the difference is exact near 1, where the affinity is largest."""
    if HAS_SCALES:
        dots = dots * tl.load(key_scales + rows)[None, :]
    affinity = tl.exp2((dots - 1.0) * scale)
    if HAS_WEIGHTS:
        return affinity * tl.load(weights + rows, mask=inside, other=0.0)[None, :]
    return tl.where(inside[None, :], affinity, 0.0)
