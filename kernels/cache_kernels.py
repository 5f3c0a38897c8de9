"""The kernels of cache_score (affine terms, class sums, merge of split classes, digits) and dense_values.

Two programs sum the same class only if it is in pieces, which are added in order, so results don't depend on timing.
Numbers that change from call to call aren't specialised, so that a new batch size compiles nothing.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads annotations as its own types, so kernels have only those.
from __future__ import annotations

import triton
import triton.language as tl

from iosr_fast.kernels.tiles import (
    DIGIT,
    affine_terms,
    affinities,
    digit_products,
    dot_products,
    low_part,
    operand,
    place,
    query_rows,
)


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
    text_scale,
    linear_scale,
    WIDTH: tl.constexpr,
    PITCH: tl.constexpr,
    QUERY_PARTS: tl.constexpr,
    HAS_TEXT: tl.constexpr,
    HAS_LINEAR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SWAP: tl.constexpr,
):
    """logits = tau * plain @ text' + feature @ linear' + bias, for a tile of queries and classes.

    text_scale is tau times the scale of text's parts."""
    block, column = place(tl.program_id(0), tl.cdiv(n_queries, BLOCK_B), tl.cdiv(n_classes, BLOCK_N))
    rows, read = query_rows(block, n_queries, BLOCK_B)
    classes = column * BLOCK_N + tl.arange(0, BLOCK_N)
    clamped = tl.minimum(classes, n_classes - 1)
    value = affine_terms(
        plain,
        text,
        feature,
        linear,
        bias,
        read,
        clamped,
        text_scale,
        linear_scale,
        WIDTH,
        PITCH,
        QUERY_PARTS,
        HAS_TEXT,
        HAS_LINEAR,
        HAS_BIAS,
        BLOCK_D,
        SWAP,
    )
    at = logits + rows[:, None].to(tl.int64) * n_classes + classes[None, :]
    tl.store(at, value, mask=(rows < n_queries)[:, None] & (classes < n_classes)[None, :])


@triton.jit
def parts_kernel(query, parts, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Two float16 parts of a float32 query, side by side: query = high + low * PART. parts is (B, 2 D)."""
    row = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, BLOCK_D)
    inside = channels < WIDTH
    q = tl.load(query + row * WIDTH + channels, mask=inside, other=0.0)
    at = parts + row * (2 * WIDTH) + channels
    high = q.to(tl.float16)
    tl.store(at, high, mask=inside)
    tl.store(at + WIDTH, low_part(q, high), mask=inside)


@triton.jit(do_not_specialize=["n_queries"])
def digits_kernel(query, digits, scales, n_queries, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Two int8 digits of a query: query = scale * (256 * high + low). digits (2 B, D) has the rows of high digits, then
    those of low ones."""
    row = tl.program_id(0)
    channels = tl.arange(0, BLOCK_D)
    inside = channels < WIDTH
    q = tl.load(query + row.to(tl.int64) * WIDTH + channels, mask=inside, other=0.0).to(tl.float32)
    # The largest number that the digits hold is 127 * 256 + 127. A row of zeros has digits of zero.
    step = tl.maximum(tl.max(tl.abs(q), axis=0), 1e-30) * (1.0 / 32639.0)
    code = tl.floor(q / step + 0.5)
    high = tl.floor((code + 0.5 * DIGIT) * (1.0 / DIGIT))
    at = digits + row.to(tl.int64) * WIDTH + channels
    tl.store(at, high.to(tl.int8), mask=inside)
    tl.store(at + n_queries.to(tl.int64) * WIDTH, (code - DIGIT * high).to(tl.int8), mask=inside)
    tl.store(scales + row, step)


@triton.jit(do_not_specialize=["n_queries", "n_keys", "n_items"])
def cache_kernel(
    query,
    query_scales,
    keys,
    key_scales,
    weights,
    class_offsets,
    items,
    partial,
    plain,
    text,
    feature,
    linear,
    bias,
    logits,
    n_queries,
    n_keys,
    n_classes,
    n_items,
    scale,
    alpha,
    text_scale,
    linear_scale,
    WIDTH: tl.constexpr,
    PITCH: tl.constexpr,
    QUERY_PARTS: tl.constexpr,
    SHOTS: tl.constexpr,
    SPLIT: tl.constexpr,
    FEW: tl.constexpr,
    TMA: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_TEXT: tl.constexpr,
    HAS_LINEAR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """logits += alpha * sums of affinities by class; with FEW, which is for few queries, logits = affine terms + that.

    A tile is BLOCK_B queries and an item of at most BLOCK_N keys. With TMA a program takes several tiles in turn, and
    loads the next one while it sums the last. With SHOTS, an item is BLOCK_N // SHOTS classes of SHOTS keys.
    Otherwise it is a row of `items` (layout.py): up to BLOCK_C whole classes, or with SPLIT a piece of one class, whose
    sum goes to row `slot` of partial (n_slots, B).

    The keys of such an item are summed by class as affinity @ member, where member (BLOCK_N, BLOCK_C) has zeros and
    ones, computed from the class offsets in registers. Three bfloat16 parts represent the affinity's 24 bits exactly.
    """
    n_blocks = tl.cdiv(n_queries, BLOCK_B)
    own = tl.arange(0, BLOCK_C)
    for tile in tl.range(tl.program_id(0), n_blocks * n_items, tl.num_programs(0), flatten=TMA):
        block, column = place(tile, n_blocks, n_items)
        rows, read = query_rows(block, n_queries, BLOCK_B)
        first_key = column * BLOCK_N if SHOTS > 0 else tl.load(items + column * 5)
        slots = first_key + tl.arange(0, BLOCK_N)
        key_rows = tl.minimum(slots, n_keys - 1)
        if HAS_SCALES:
            dots = digit_products(
                query,
                query_scales,
                keys,
                block * BLOCK_B,
                read,
                first_key,
                key_rows,
                n_queries,
                WIDTH,
                BLOCK_D,
                FEW,
                TMA,
            )
        else:
            dots = dot_products(query, keys, block * BLOCK_B, read, first_key, key_rows, WIDTH, BLOCK_D, FEW, TMA)
        rest = affinities(dots, key_rows, weights, key_scales, scale, HAS_WEIGHTS, HAS_SCALES)
        if SHOTS > 0:
            sums = tl.sum(tl.reshape(rest, (BLOCK_B, BLOCK_C, SHOTS)), axis=2)
            classes = column * BLOCK_C + own
            has = classes < n_classes
            whole = has
        else:
            item = items + column * 5
            end_key = tl.load(item + 1)
            classes = tl.load(item + 2) + own
            n_own = tl.load(item + 3)
            has = own < n_own
            slot = tl.load(item + 4)
            class_begin = tl.load(class_offsets + classes, mask=has, other=-1)
            class_end = tl.load(class_offsets + classes + 1, mask=has, other=-1)
            # A piece's keys are fewer than its class's.
            begin = tl.maximum(class_begin, first_key)
            end = tl.minimum(class_end, end_key)
            member = (slots[:, None] >= begin[None, :]) & (slots[:, None] < end[None, :])
            member = operand(tl.where(member, 1.0, 0.0).to(tl.bfloat16))
            sums = tl.zeros((BLOCK_B, BLOCK_C), dtype=tl.float32)
            for _ in tl.static_range(3):
                part = rest.to(tl.bfloat16)
                rest -= part.to(tl.float32)
                sums = tl.dot(operand(part), member, sums)
            whole = has
            if SPLIT:
                # The class of a piece is the only one of its item, its sum the first column. Of a class's pieces, only
                # the first writes logits, without a sum, and only if nothing else has written them.
                at = partial + slot.to(tl.int64) * n_queries + rows
                sum_of_piece = tl.sum(tl.where((own == 0)[None, :], sums, 0.0), axis=1)
                tl.store(at, sum_of_piece, mask=rows < tl.where(slot >= 0, n_queries, 0))
                sums = tl.where(slot < 0, sums, 0.0)
                whole = has & (begin == class_begin) if FEW else own < tl.where(slot < 0, n_own, 0)
        at = logits + rows[:, None].to(tl.int64) * n_classes + classes[None, :]
        mask = (rows < n_queries)[:, None] & whole[None, :]
        if FEW:
            value = affine_terms(
                plain,
                text,
                feature,
                linear,
                bias,
                read,
                tl.minimum(classes, n_classes - 1),
                text_scale,
                linear_scale,
                WIDTH,
                PITCH,
                QUERY_PARTS,
                HAS_TEXT,
                HAS_LINEAR,
                HAS_BIAS,
                BLOCK_D if BLOCK_D < 64 else 64,
                True,
            )
        else:
            value = tl.load(at, mask=mask, other=0.0)
        tl.store(at, value + alpha * sums, mask=mask)


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
    block, column = place(tl.program_id(0), tl.cdiv(n_queries, BLOCK_B), n_stretches * tl.cdiv(n_values, BLOCK_V))
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
        dots = dot_products(query, keys, 0, read, 0, key_rows, WIDTH, BLOCK_D, SWAP, False)
        affinity = affinities(dots, key_rows, weights, key_scales, scale, HAS_WEIGHTS, HAS_SCALES)
        affinity = tl.where(inside[None, :], affinity, 0.0)
        value = tl.load(values + key_rows[:, None].to(tl.int64) * n_values + clamped[None, :])
        total = tl.dot(affinity.to(value.dtype), value, total, input_precision="tf32x3")
    at = out + (part.to(tl.int64) * n_queries + rows[:, None]) * n_values + columns[None, :]
    tl.store(at, total, mask=(rows < n_queries)[:, None] & (columns < n_values)[None, :])
