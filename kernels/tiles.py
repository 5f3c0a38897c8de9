"""Device code that the kernels share: the position of a tile, its dot products, its affinities, its affine terms."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

# Triton decides when a kernel is defined whether its interpreter runs it.
INTERPRETED = tl.constexpr(knobs.runtime.interpret)
# Between the high and the low part of a number in float16, which has 11 significant bits (cuda_layout.split_rows).
PART = tl.constexpr(2.0**-11)
# A query's low digit counts 1 / 256 of its high digit (digits_kernel).
DIGIT = tl.constexpr(256.0)


@triton.jit
def place(tile, n_query_blocks, n_columns):
    """(query block, column) of a tile. A band of 16 query blocks visits every column before the next band starts, so
    that concurrent programs share both queries and keys in the L2 cache."""
    per_band = 16 * n_columns
    first = (tile // per_band) * 16
    height = tl.minimum(n_query_blocks - first, 16)
    within = tile % per_band
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
def fused_multiply_add(x, y, z):
    """x * y + z, rounded once."""
    if INTERPRETED:  # which rounds twice in Triton 3.6
        return (x.to(tl.float64) * y + z).to(tl.float32)
    return tl.fma(x, y, z)


@triton.jit
def load_rows(source, first_row, rows, channel, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr):
    """Channels `channel` to channel + BLOCK_D of rows, 0 past WIDTH.

    With TMA, source is a tensor descriptor and the rows are those from first_row on, 0 past the array; otherwise source
    is a pointer and `rows` are numbers within the array."""
    if TMA:
        tile = source.load([first_row, channel])
    else:
        channels = channel + tl.arange(0, BLOCK_D)
        at = source + rows[:, None].to(tl.int64) * WIDTH + channels[None, :]
        tile = tl.load(at) if WIDTH % BLOCK_D == 0 else tl.load(at, mask=(channels < WIDTH)[None, :], other=0)
    return tile


@triton.jit
def multiply(left, right, total, SWAP: tl.constexpr):
    """total + left @ right', or its transpose with SWAP, which puts the many rows on the right on the tensor cores'
    longer side. float32 takes three TF32 products (Ootomo and Yokota, 2022), which keep its accuracy."""
    left, right = operand(left), operand(right)
    if SWAP:
        left, right = right, left
    return tl.dot(left, tl.trans(right), total, input_precision="tf32x3", out_dtype=total.dtype)


@triton.jit
def zeros(n_left: tl.constexpr, n_right: tl.constexpr, dtype: tl.constexpr, SWAP: tl.constexpr):
    """The `total` with which a sum of multiply() begins."""
    total = tl.zeros((n_right, n_left), dtype=dtype) if SWAP else tl.zeros((n_left, n_right), dtype=dtype)
    return total


@triton.jit
def dot_products(
    query,
    keys,
    first_query,
    query_rows,
    first_key,
    key_rows,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SWAP: tl.constexpr,
    TMA: tl.constexpr,
):
    """<query[i], key[j]> in float32 for two blocks of rows (load_rows). Queries are rounded to the keys' type; int8
    keys are converted to the queries'."""
    dots = zeros(query_rows.shape[0], key_rows.shape[0], tl.float32, SWAP)
    for channel in range(0, WIDTH, BLOCK_D):
        left = load_rows(query, first_query, query_rows, channel, WIDTH, BLOCK_D, TMA)
        right = load_rows(keys, first_key, key_rows, channel, WIDTH, BLOCK_D, TMA)
        if right.dtype == tl.int8:
            right = right.to(left.dtype)
        else:
            left = left.to(right.dtype)
        dots = multiply(left, right, dots, SWAP)
    if SWAP:
        dots = tl.trans(dots)
    return dots


@triton.jit
def digit_products(
    digits,
    scales,
    keys,
    first_query,
    query_rows,
    first_key,
    key_rows,
    n_queries,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SWAP: tl.constexpr,
    TMA: tl.constexpr,
):
    """<query[i], key[j]> for int8 keys, and queries of two int8 digits (digits_kernel): exact integer products on
    tensor cores, without a conversion of keys."""
    high_total = zeros(query_rows.shape[0], key_rows.shape[0], tl.int32, SWAP)
    low_total = zeros(query_rows.shape[0], key_rows.shape[0], tl.int32, SWAP)
    for channel in range(0, WIDTH, BLOCK_D):
        key = load_rows(keys, first_key, key_rows, channel, WIDTH, BLOCK_D, TMA)
        high = load_rows(digits, first_query, query_rows, channel, WIDTH, BLOCK_D, TMA)
        low = load_rows(digits, n_queries + first_query, n_queries + query_rows, channel, WIDTH, BLOCK_D, TMA)
        high_total = multiply(high, key, high_total, SWAP)
        low_total = multiply(low, key, low_total, SWAP)
    dots = fused_multiply_add(high_total.to(tl.float32), DIGIT, low_total.to(tl.float32))
    if SWAP:
        dots = tl.trans(dots)
    return dots * tl.load(scales + query_rows)[:, None]


@triton.jit
def low_part(x, high):
    """What float16 leaves of x, as a float16 number that counts PART."""
    return ((x - high.to(tl.float32)) * (1.0 / PART)).to(tl.float16)


@triton.jit
def split_products(
    query,
    parts,
    rows,
    classes,
    WIDTH: tl.constexpr,
    PITCH: tl.constexpr,
    QUERY_PARTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SWAP: tl.constexpr,
):
    """<query[rows[i]], matrix[classes[j]]> with float32's accuracy from float16 products, where matrix = high + low *
    PART, and parts has low and high side by side, PITCH / 2 channels each.

    float16 queries are exact; with QUERY_PARTS 2 high and low lie side by side (parts_kernel). A few float32 queries
    are split here."""
    channels = tl.arange(0, BLOCK_D)
    query_at = query + rows[:, None].to(tl.int64) * (QUERY_PARTS * WIDTH) + channels[None, :]
    low_at = parts + classes[:, None].to(tl.int64) * PITCH + channels[None, :]
    high_total = zeros(rows.shape[0], classes.shape[0], tl.float32, SWAP)
    low_total = zeros(rows.shape[0], classes.shape[0], tl.float32, SWAP)
    for first in range(0, WIDTH, BLOCK_D):
        inside = (first + channels < WIDTH)[None, :]
        q = tl.load(query_at + first, mask=inside, other=0)
        low = tl.load(low_at + first, mask=inside, other=0)
        high = tl.load(low_at + PITCH // 2 + first, mask=inside, other=0)
        q_high = q.to(tl.float16)
        high_total = multiply(q_high, high, high_total, SWAP)
        low_total = multiply(q_high, low, low_total, SWAP)
        if QUERY_PARTS == 2:
            low_total = multiply(tl.load(query_at + WIDTH + first, mask=inside, other=0), high, low_total, SWAP)
        elif q.dtype != tl.float16:
            low_total = multiply(low_part(q, q_high), high, low_total, SWAP)
    total = fused_multiply_add(low_total, PART, high_total)
    if SWAP:
        total = tl.trans(total)
    return total


@triton.jit
def affine_terms(
    plain,
    text,
    feature,
    linear,
    bias,
    rows,
    classes,
    text_scale,
    linear_scale,
    WIDTH: tl.constexpr,
    PITCH: tl.constexpr,
    QUERY_PARTS: tl.constexpr,
    HAS_TEXT: tl.constexpr,
    HAS_LINEAR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SWAP: tl.constexpr,
):
    """text_scale * plain @ text' + linear_scale * feature @ linear' + bias for rows and classes within the arrays."""
    value = tl.zeros((rows.shape[0], classes.shape[0]), dtype=tl.float32)
    if HAS_TEXT:
        value = text_scale * split_products(plain, text, rows, classes, WIDTH, PITCH, QUERY_PARTS, BLOCK_D, SWAP)
    if HAS_LINEAR:
        value += linear_scale * split_products(feature, linear, rows, classes, WIDTH, PITCH, QUERY_PARTS, BLOCK_D, SWAP)
    if HAS_BIAS:
        value += tl.load(bias + classes)[None, :]
    return value


@triton.jit
def affinities(dots, key_rows, weights, key_scales, scale, HAS_WEIGHTS: tl.constexpr, HAS_SCALES: tl.constexpr):
    """weights[j] * exp2(scale * (cosine - 1)), by one fused multiply-add: its result is the exponent, rounded once."""
    if HAS_SCALES:
        exponents = fused_multiply_add(dots, (scale * tl.load(key_scales + key_rows))[None, :], -scale)
    else:
        exponents = fused_multiply_add(dots, scale, -scale)
    affinity = tl.exp2(exponents)
    if HAS_WEIGHTS:
        affinity = affinity * tl.load(weights + key_rows)[None, :]
    return affinity
