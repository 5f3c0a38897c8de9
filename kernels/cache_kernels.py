"""The kernels of cache_score (affine terms, aligned classes, ragged classes, merge of split classes) and dense_values.

Kernels of the cache term add alpha times a class's sum to logits that the affine kernel has written. Two programs sum
the same class only if it is split, and the pieces of a split class are added in order, so results don't depend on
timing. Numbers that change from call to call aren't specialised, so that a new batch size compiles nothing.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads annotations as its own types, so kernels have only those.
from __future__ import annotations

import triton
import triton.language as tl

from iosr_fast.kernels.tiles import affinities, dot_products, operand, place, query_rows


@triton.jit(do_not_specialize=["n_queries"])
def affine_kernel(
    plain,
    text,
    feature,
    linear,
    bias,
    logits,
    n_queries,
    n_classes,
    tau,
    WIDTH: tl.constexpr,
    HAS_TEXT: tl.constexpr,
    HAS_LINEAR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SWAP: tl.constexpr,
):
    """logits = tau * plain @ text' + feature @ linear' + bias, for a tile of queries and classes."""
    block, column = place(tl.cdiv(n_queries, BLOCK_B), tl.cdiv(n_classes, BLOCK_N))
    rows, read = query_rows(block, n_queries, BLOCK_B)
    classes = column * BLOCK_N + tl.arange(0, BLOCK_N)
    clamped = tl.minimum(classes, n_classes - 1)
    value = tl.zeros((BLOCK_B, BLOCK_N), dtype=tl.float32)
    if HAS_TEXT:
        value = tau * dot_products(plain, text, read, clamped, WIDTH, BLOCK_D, SWAP)
    if HAS_LINEAR:
        value += dot_products(feature, linear, read, clamped, WIDTH, BLOCK_D, SWAP)
    if HAS_BIAS:
        value += tl.load(bias + clamped)[None, :]
    at = logits + rows[:, None].to(tl.int64) * n_classes + classes[None, :]
    tl.store(at, value, mask=(rows < n_queries)[:, None] & (classes < n_classes)[None, :])


@triton.jit(do_not_specialize=["n_queries"])
def aligned_kernel(
    query,
    keys,
    key_scales,
    class_offsets,
    weights,
    logits,
    n_queries,
    n_classes,
    scale,
    alpha,
    WIDTH: tl.constexpr,
    SHOTS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SWAP: tl.constexpr,
):
    """Sums BLOCK_N // SHOTS whole classes of SHOTS keys each; if SHOTS is BLOCK_N, one class in as many tiles as it
    needs. Keys are read in place: missing shots of a class read key 0 and add 0."""
    GROUP: tl.constexpr = BLOCK_N // SHOTS
    block, column = place(tl.cdiv(n_queries, BLOCK_B), tl.cdiv(n_classes, GROUP))
    rows, read = query_rows(block, n_queries, BLOCK_B)
    slot = tl.arange(0, BLOCK_N)
    classes = column * GROUP + tl.arange(0, GROUP)
    if GROUP == 1:
        begin = tl.load(class_offsets + column)
        end = tl.load(class_offsets + column + 1)
        total = tl.zeros((BLOCK_B,), dtype=tl.float32)
        for first in range(begin, end, BLOCK_N):
            inside = first + slot < end
            key_rows = tl.where(inside, first + slot, 0)
            dots = dot_products(query, keys, read, key_rows, WIDTH, BLOCK_D, SWAP)
            affinity = affinities(dots, key_rows, inside, weights, key_scales, scale, HAS_WEIGHTS, HAS_SCALES)
            total += tl.sum(affinity, axis=1)
        sums = total[:, None]
    else:
        owner = column * GROUP + slot // SHOTS
        begin = tl.load(class_offsets + tl.minimum(owner, n_classes - 1))
        end = tl.load(class_offsets + tl.minimum(owner, n_classes - 1) + 1)
        key_rows = begin + slot % SHOTS
        inside = (owner < n_classes) & (key_rows < end)
        key_rows = tl.where(inside, key_rows, 0)
        dots = dot_products(query, keys, read, key_rows, WIDTH, BLOCK_D, SWAP)
        affinity = affinities(dots, key_rows, inside, weights, key_scales, scale, HAS_WEIGHTS, HAS_SCALES)
        sums = tl.sum(tl.reshape(affinity, (BLOCK_B, GROUP, SHOTS)), axis=2)
    at = logits + rows[:, None].to(tl.int64) * n_classes + classes[None, :]
    mask = (rows < n_queries)[:, None] & (classes < n_classes)[None, :]
    tl.store(at, tl.load(at, mask=mask, other=0.0) + alpha * sums, mask=mask)


@triton.jit(do_not_specialize=["n_queries", "n_items"])
def ragged_kernel(
    query,
    keys,
    key_scales,
    class_offsets,
    weights,
    logits,
    items,
    partial,
    n_queries,
    n_classes,
    n_items,
    scale,
    alpha,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SWAP: tl.constexpr,
):
    """Sums one work item (layout.py): up to BLOCK_C whole classes, or with SPLIT a piece of one class, whose sum goes
    to row `slot` of partial (n_slots, B).

    A tile's keys are summed by class as affinity @ member, where member (BLOCK_N, BLOCK_C) has zeros and ones, computed
    from the class offsets in registers. Three bfloat16 parts represent the affinity's 24 bits exactly."""
    block, column = place(tl.cdiv(n_queries, BLOCK_B), n_items)
    rows, read = query_rows(block, n_queries, BLOCK_B)
    item = items + column * 5
    first_key = tl.load(item)
    end_key = tl.load(item + 1)
    first_class = tl.load(item + 2)
    own = tl.arange(0, BLOCK_C)
    classes = first_class + own
    has = own < tl.load(item + 3)
    begin = tl.load(class_offsets + classes, mask=has, other=0)
    end = tl.load(class_offsets + classes + 1, mask=has, other=0)
    sums = tl.zeros((BLOCK_B, BLOCK_C), dtype=tl.float32)
    for first in range(first_key, end_key, BLOCK_N):
        key_rows = first + tl.arange(0, BLOCK_N)
        inside = key_rows < end_key
        key_rows = tl.where(inside, key_rows, first_key)
        dots = dot_products(query, keys, read, key_rows, WIDTH, BLOCK_D, SWAP)
        rest = affinities(dots, key_rows, inside, weights, key_scales, scale, HAS_WEIGHTS, HAS_SCALES)
        member = (key_rows[:, None] >= begin[None, :]) & (key_rows[:, None] < end[None, :])
        member = operand(tl.where(member, 1.0, 0.0).to(tl.bfloat16))
        for _ in tl.static_range(3):
            part = rest.to(tl.bfloat16)
            rest -= part.to(tl.float32)
            sums = tl.dot(operand(part), member, sums)
    slot = tl.load(item + 4)
    if SPLIT:
        # A piece's class is the only one of its item; its sum is the first column.
        at = partial + slot.to(tl.int64) * n_queries + rows
        sum_of_piece = tl.sum(tl.where((own == 0)[None, :], sums, 0.0), axis=1)
        tl.store(at, sum_of_piece, mask=rows < tl.where(slot >= 0, n_queries, 0))
    at = logits + rows[:, None].to(tl.int64) * n_classes + classes[None, :]
    whole = own < tl.where(slot < 0, tl.load(item + 3), 0)
    mask = (rows < n_queries)[:, None] & whole[None, :]
    tl.store(at, tl.load(at, mask=mask, other=0.0) + alpha * sums, mask=mask)


@triton.jit(do_not_specialize=["n_queries"])
def merge_kernel(partial, cut, logits, n_queries, n_classes, alpha, BLOCK_B: tl.constexpr):
    """logits[:, c] += alpha * (sums of c's pieces, first to last), for each row (c, first slot, end slot) of cut."""
    entry = cut + tl.program_id(0) * 3
    rows = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = rows < n_queries
    first = tl.load(entry + 1)
    piece = partial + first.to(tl.int64) * n_queries + rows
    total = tl.zeros((BLOCK_B,), dtype=tl.float32)
    for _ in range(first, tl.load(entry + 2)):
        total += tl.load(piece, mask=inside, other=0.0)
        piece += n_queries
    at = logits + rows.to(tl.int64) * n_classes + tl.load(entry)
    tl.store(at, tl.load(at, mask=inside, other=0.0) + alpha * total, mask=inside)


@triton.jit(do_not_specialize=["n_queries", "n_keys", "n_stretches", "stretch"])
def dense_kernel(
    query,
    keys,
    key_scales,
    weights,
    values,
    out,
    n_queries,
    n_keys,
    n_values,
    n_stretches,
    stretch,
    scale,
    WIDTH: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SWAP: tl.constexpr,
):
    """out[s] = affinity @ values over the s-th stretch of keys, for BLOCK_B queries and BLOCK_V columns of values."""
    block, column = place(tl.cdiv(n_queries, BLOCK_B), n_stretches * tl.cdiv(n_values, BLOCK_V))
    rows, read = query_rows(block, n_queries, BLOCK_B)
    part = column % n_stretches
    columns = (column // n_stretches) * BLOCK_V + tl.arange(0, BLOCK_V)
    clamped = tl.minimum(columns, n_values - 1)
    total = tl.zeros((BLOCK_B, BLOCK_V), dtype=tl.float32)
    end = tl.minimum((part + 1) * stretch, n_keys)
    for first in range(part * stretch, end, BLOCK_N):
        key_rows = first + tl.arange(0, BLOCK_N)
        inside = key_rows < end
        key_rows = tl.where(inside, key_rows, first)
        dots = dot_products(query, keys, read, key_rows, WIDTH, BLOCK_D, SWAP)
        affinity = affinities(dots, key_rows, inside, weights, key_scales, scale, HAS_WEIGHTS, HAS_SCALES)
        value = tl.load(values + key_rows[:, None].to(tl.int64) * n_values + clamped[None, :])
        total = tl.dot(affinity.to(value.dtype), value, total, input_precision="tf32x3")
    at = out + (part.to(tl.int64) * n_queries + rows[:, None]) * n_values + columns[None, :]
    tl.store(at, total, mask=(rows < n_queries)[:, None] & (columns < n_values)[None, :])
