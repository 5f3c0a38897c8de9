"""affinity_sums on an NVIDIA GPU, for batches: Triton kernels for the affinities, cuBLAS for keys with values.

    logits[b, c] += alpha * sum over keys j: weights[j] * exp(-beta * (1 - <queries[b], keys[j]>)) * values[j, c]

where a key of a plan with classes has 1 for its class and 0 for all others. There, a tile of queries and keys takes
two products, with the exponential between them in registers, as in FlashAttention (Dao et al., 2022): the (B, N)
affinity is never in memory. It needs no running maximum, because the exponent is never positive. With values, the
affinities of a chunk of keys are written to memory that fits into the L2 cache, and one matrix product multiplies them
by the values: each cosine is computed once, whatever the number of classes. csrc/cuda scores few queries
(scoring.dispatch).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton import knobs

from iosr_fast.scoring.half_products import padded, query_type, sums_of_products

if TYPE_CHECKING:
    from torch import Tensor

    from iosr_fast.scoring.device_plan import DevicePlan

PARTIAL_BYTES = 64 * 2**20  # of class sums
AFFINITY_BYTES = 16 * 2**20  # of a chunk: less than half of the L2 cache of an A100 or H100, which values share
BLOCK = 4096  # queries that are scored at once with values
# The exponent of 2 that multiplies affinities, which may become float16: they are at most 1, and float16 loses bits
# below 2**-14 and everything below 2**-25.
LIFT = 10
# Triton decides when a kernel is defined whether its interpreter runs it.
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def operand(x):  # type: ignore[no-untyped-def]
    """x as a factor of tl.dot. The interpreter would multiply the integers that store bfloat16; float32 has the same
    products."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        x = x.to(tl.float32)
    return x


@triton.jit
def affinity_tile(  # type: ignore[no-untyped-def]
    queries,
    keys,
    key_scales,
    weights,
    rows,
    slots,
    n_queries,
    n_keys,
    scale,
    shift,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """weights * exp2(scale * <queries[rows], keys[slots]> + shift), float32 (rows, slots); arguments that are None are
    left out. Rows and slots beyond the last read the last one, so that loads in the loop need no mask."""
    channels = tl.arange(0, BLOCK_D)
    key_rows = tl.minimum(slots, n_keys - 1)
    query_at = queries + tl.minimum(rows, n_queries - 1).to(tl.int64)[:, None] * WIDTH + channels[None, :]
    key_at = keys + key_rows.to(tl.int64)[:, None] * WIDTH + channels[None, :]
    dots = tl.zeros((rows.shape[0], slots.shape[0]), dtype=tl.float32)
    for channel in range(0, WIDTH, BLOCK_D):
        if WIDTH % BLOCK_D == 0:
            query = tl.load(query_at + channel)
            key = tl.load(key_at + channel)
        else:
            read = (channel + channels < WIDTH)[None, :]
            query = tl.load(query_at + channel, mask=read, other=0.0)
            key = tl.load(key_at + channel, mask=read, other=0)
        key = key.to(query.dtype)  # int8 codes are exact in float16
        dots = tl.dot(operand(query), tl.trans(operand(key)), dots, input_precision=PRECISION)
    if key_scales is not None:
        dots *= tl.load(key_scales + key_rows)[None, :]
    affinity = tl.exp2(dots * scale + shift)
    if weights is not None:
        affinity *= tl.load(weights + key_rows)[None, :]
    return affinity


# Numbers that change from call to call are not specialised: another batch or class compiles nothing but a new tile.
@triton.jit(do_not_specialize=["n_queries", "n_keys", "n_tiles", "first_key", "stride"])
def affinities_kernel(  # type: ignore[no-untyped-def]
    queries,
    keys,
    key_scales,
    weights,
    affinities,
    n_queries,
    n_keys,
    n_tiles,
    first_key,
    stride,
    scale,
    shift,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """affinities[b, j - first_key] = affinity_tile of BLOCK_B queries and BLOCK_N of the n_tiles * BLOCK_N keys from
    first_key on; rows of `affinities` are `stride` elements apart, a multiple of BLOCK_N."""
    # Programs that run at once share up to 16 blocks of queries and few tiles, which then stay in the L2 cache.
    program, n_blocks = tl.program_id(0), tl.cdiv(n_queries, BLOCK_B)
    block, tile = tl.swizzle2d(program // n_tiles, program % n_tiles, n_blocks, n_tiles, 16)
    rows = block * BLOCK_B + tl.arange(0, BLOCK_B)
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    slots = first_key + columns
    affinity = affinity_tile(
        queries, keys, key_scales, weights, rows, slots, n_queries, n_keys, scale, shift, WIDTH, PRECISION, BLOCK_D
    )
    at = (
        affinities + rows[:, None] * tl.multiple_of(stride, BLOCK_N) + columns[None, :]
    )  # of 16 MB or few rows: 32 bits
    tl.store(at, affinity.to(affinities.dtype.element_ty), mask=(rows < n_queries)[:, None])


@triton.jit(do_not_specialize=["n_queries", "n_keys", "n_items", "n_classes"])
def class_sums_kernel(  # type: ignore[no-untyped-def]
    queries,
    keys,
    key_scales,
    weights,
    class_offsets,
    items,
    sums,
    n_queries,
    n_keys,
    n_items,
    n_classes,
    scale,
    shift,
    alpha,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """sums[piece, b, c] = alpha * the affinities' sums over the keys of a class, for BLOCK_B queries and an item.

    An item is a row (first key, end key, first class, piece) of `items`: BLOCK_C classes and their keys, or a piece of
    these of a multiple of BLOCK_N keys. A class's column of a tile of members is 1 in the rows of its keys.

    Each accumulator has a single tl.dot in the loop that updates it: up to Triton 3.8 two in one step are miscompiled
    for compute capability 10 (triton issue 10821). "tf32x3" makes three of one, hence product_precision().
    """
    program, n_blocks = tl.program_id(0), tl.cdiv(n_queries, BLOCK_B)
    block, item = tl.swizzle2d(program // n_items, program % n_items, n_blocks, n_items, 16)
    first_key = tl.load(items + 4 * item)
    end_key = tl.load(items + 4 * item + 1)
    classes = tl.load(items + 4 * item + 2) + tl.arange(0, BLOCK_C)
    piece = tl.load(items + 4 * item + 3).to(tl.int64)
    inside = classes < n_classes
    begins = tl.load(class_offsets + classes, mask=inside, other=0)
    ends = tl.load(class_offsets + classes + 1, mask=inside, other=0)
    rows = block * BLOCK_B + tl.arange(0, BLOCK_B)
    total = tl.zeros((BLOCK_B, BLOCK_C), dtype=tl.float32)
    for first in range(first_key, end_key, BLOCK_N):
        slots = first + tl.arange(0, BLOCK_N)
        affinity = affinity_tile(
            queries, keys, key_scales, weights, rows, slots, n_queries, n_keys, scale, shift, WIDTH, PRECISION, BLOCK_D
        )
        member = tl.where((slots[:, None] >= begins[None, :]) & (slots[:, None] < ends[None, :]), 1.0, 0.0)
        if queries.dtype.element_ty == tl.float32:
            # Three bfloat16 parts hold the 24 bits of a float32. Stages of this loop would only cost registers.
            for _ in tl.range(3, num_stages=1):
                part = affinity.to(tl.bfloat16)
                affinity -= part.to(tl.float32)
                total = tl.dot(operand(part), operand(member.to(tl.bfloat16)), total)
        else:
            total = tl.dot(affinity.to(tl.float16), member.to(tl.float16), total)
    at = sums + (piece * n_queries + rows[:, None]) * n_classes + classes[None, :]
    tl.store(at, alpha * total, mask=(rows < n_queries)[:, None] & inside[None, :])


@dataclass(frozen=True)
class Tile:
    """A tile's queries, keys, channels and classes (0 without), and the compiler's options."""

    block_b: int
    block_n: int
    block_d: int
    block_c: int
    num_warps: int
    num_stages: int = 3

    def options(self) -> dict[str, Any]:
        """The kernel's keyword arguments."""
        names = ("BLOCK_B", "BLOCK_N", "BLOCK_D", *(["BLOCK_C"] if self.block_c else []))
        sizes = {name: getattr(self, name.lower()) for name in names}
        # The exponent is one multiply-add, whatever the compiler's default.
        return sizes | {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


def tile_of(batch: int, n_keys: int, n_classes: int, keys: torch.dtype, capability: int) -> Tile:
    """The tile for `batch` queries and keys of a type, with so many classes (0: for affinities alone), on a GPU of
    compute capability capability / 10.

    Registers are the bound: a thread holds block_b * (block_n + block_c) / 256 sums, and where tensor cores read
    registers (all but 9.0 and 10.x) the factors too, those of float32 in several parts.
    """
    wide, single = capability // 10 in (9, 10), keys == torch.float32
    # Fewer than 128 tiles of 128 by 128 would leave multiprocessors idle.
    tall = batch * n_keys >= 128**3 and (wide or not single)
    # A tile of more classes than 64 has no registers for 128 keys.
    block_n = 128 if tall and not single and (wide or not n_classes) and n_keys >= 2 * n_classes else 64
    block_b = min(128 if tall else 64, max(16, triton.next_power_of_2(batch)))
    # More classes than those of a tile's keys would leave rows empty.
    block_c = n_classes and max(16, triton.next_power_of_2(min(block_n, block_n * n_classes // n_keys, n_classes)))
    # 128 bytes of a key, but of int8 keys 64, where a tile of more queries has no registers for their conversion.
    few, codes = block_b == 16, keys == torch.int8
    block_d = 32 if single else 128 if codes and few else 64
    return Tile(block_b, block_n, block_d, block_c, 4 if few and not codes else 8)


@functools.cache
def gpu(device: torch.device) -> tuple[int, int]:
    """A GPU's multiprocessors and 10 times its compute capability; the interpreter's, to cut keys in few pieces."""
    if device.type != "cuda":
        return 4, 90
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, 10 * properties.major + properties.minor


def product_precision(capability: int) -> str:
    """How float32 factors are multiplied: in three TF32 products, which keep float32's accuracy; or, where Triton would
    miscompile their sum (class_sums_kernel), without tensor cores."""
    version = tuple(int(number) for number in triton.__version__.split(".")[:2])
    return "ieee" if capability // 10 == 10 and version < (3, 9) else "tf32x3"


def cut_items(offsets: np.ndarray, tile: Tile, blocks: int, programs: int, most_pieces: int) -> np.ndarray:
    """The items of class_sums_kernel, (n, 4) int32, for so many blocks of queries: each block of classes has its keys,
    in at most `most_pieces` pieces.

    Of all lengths of a piece it takes the one whose programs, of which so many run at once, end first: by the rounds
    that they take, and the tiles of the longest, and one more for its start. offsets (C + 1,).
    """
    n_classes = len(offsets) - 1
    begins = np.arange(0, n_classes, tile.block_c)
    firsts, ends = offsets[begins], offsets[np.minimum(begins + tile.block_c, n_classes)]
    tiles = -(-(ends - firsts) // tile.block_n)
    lengths = np.unique(-(-tiles.max() // np.arange(1, min(programs, most_pieces) + 1)))
    rounds = -(-blocks * (-(-tiles // lengths[:, None])).sum(axis=1) // programs)
    stretch = tile.block_n * int(lengths[np.argmin(rounds * (lengths + 1))])
    items = [
        (first, min(first + stretch, end), column, piece)
        for column, begin, end in zip(begins.tolist(), firsts.tolist(), ends.tolist(), strict=True)
        for piece, first in enumerate(range(begin, end, stretch))
    ]
    return np.asarray(items, np.int32)


def affinity_sums(plan: DevicePlan, queries: Tensor, logits: Tensor) -> str:
    """The sums of the module's formula, added to logits in place (scoring.backends says what a backend is given).

    Queries are rounded to the keys' half type, float16 for int8 keys; affinities to the type of `values`, or for
    classes to float16 if keys have fewer than 32 bits; sums are float32. If blocks of queries and classes are too few
    for the GPU, several programs share a block, and their sums, at most 64 MB, are added in order. Equal calls give
    equal bits; nothing waits for the device. Raises RuntimeError if a CUDA graph is recorded before a call with this
    plan and batch.

    Returns "triton/classes" or "triton/values".
    """
    add = _add_class_sums if plan.values is None else _add_values
    step = max(1, PARTIAL_BYTES // (4 * plan.n_classes)) if plan.values is None else BLOCK
    with torch.cuda.device_of(logits):
        for first in range(0, len(queries), step):
            rows = queries[first : first + step].to(query_type(plan))
            # Addresses that 16 doesn't divide, such as a slice's, would have a kernel of their own.
            rows = rows if rows.data_ptr() % 16 == 0 else rows.clone()
            add(plan, rows, logits[first : first + step])
    return "triton/classes" if plan.values is None else "triton/values"


def _add_class_sums(plan: DevicePlan, rows: Tensor, logits: Tensor) -> None:
    assert plan.keys is not None and plan.offsets is not None
    (batch, n_classes), n_keys = logits.shape, len(plan.keys)
    processors, capability = gpu(plan.device)
    tile = tile_of(batch, n_keys, n_classes, plan.keys.dtype, capability)
    blocks = triton.cdiv(batch, tile.block_b)

    def items() -> tuple[Tensor, int]:
        refuse_recording(plan.device)
        most = max(1, PARTIAL_BYTES // (4 * blocks * tile.block_b * n_classes))
        table = cut_items(plan.offsets, tile, blocks, processors * min(4, 128 // tile.block_b), most)
        return torch.from_numpy(table).to(plan.device), int(table[:, 3].max()) + 1

    table, n_pieces = plan.cached(f"triton/{tile}/{blocks}", items)
    arguments, exponent, factor, constants = _arguments(plan, tile, capability)
    # Classes without keys, and those with fewer pieces than others, have sums of zero that no program writes.
    sums = torch.zeros((n_pieces, batch, n_classes), dtype=torch.float32, device=plan.device)
    sizes = batch, n_keys, len(table), n_classes
    class_sums_kernel[blocks * len(table),](
        rows, *arguments, plan.class_offsets, table, sums, *sizes, *exponent, factor, **constants
    )
    logits += sums[0] if n_pieces == 1 else sums.sum(dim=0)


def _add_values(plan: DevicePlan, rows: Tensor, logits: Tensor) -> None:
    assert plan.keys is not None and plan.values is not None
    batch, n_keys, dtype = len(rows), len(plan.keys), plan.values.dtype
    capability = gpu(plan.device)[1]
    tile = tile_of(batch, n_keys, 0, plan.keys.dtype, capability)
    values = plan.cached("values", lambda: padded(plan.values))
    plan.cached(f"triton/{tile}", lambda: refuse_recording(plan.device))
    arguments, exponent, factor, constants = _arguments(plan, tile, capability)
    chunk = tile.block_n * max(1, AFFINITY_BYTES // (dtype.itemsize * batch * tile.block_n))
    stride = tile.block_n * triton.cdiv(min(chunk, n_keys), tile.block_n)
    affinities = torch.empty((batch, stride), dtype=dtype, device=plan.device)
    for first in range(0, n_keys, chunk):
        end = min(first + chunk, n_keys)
        n_tiles = triton.cdiv(end - first, tile.block_n)
        sizes = batch, n_keys, n_tiles, first, stride
        grid = (triton.cdiv(batch, tile.block_b) * n_tiles,)
        affinities_kernel[grid](rows, *arguments, affinities, *sizes, *exponent, **constants)
        products = sums_of_products(affinities[:, : end - first], values[first:end])
        logits.add_(products[:, : plan.n_classes], alpha=factor)


def _arguments(plan: DevicePlan, tile: Tile, capability: int) -> tuple[Any, ...]:
    """What both kernels take: (keys, key_scales, weights), (scale, shift), the factor of the sums, and constants."""
    shares, largest = plan.cached("triton/weights", lambda: _weights(plan))
    scale = plan.beta * math.log2(math.e)
    constants = {"WIDTH": plan.width, "PRECISION": product_precision(capability), **tile.options()}
    return (
        (plan.keys, plan.key_scales, shares),
        (scale, LIFT - scale),
        plan.alpha * largest * 2.0**-LIFT,
        constants,
    )


def _weights(plan: DevicePlan) -> tuple[Tensor | None, float]:
    """The weights over their largest size, and this size: affinities times large weights would overflow float16."""
    if plan.weights is None:
        return None, 1.0
    refuse_recording(plan.device)
    largest = float(plan.weights.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
    shares = plan.weights / largest
    if plan.device.type == "cuda":  # the next call may come on another stream, which doesn't wait for this one
        torch.cuda.current_stream(plan.device).synchronize()
    return shares, largest


def is_recorded(device: torch.device) -> bool:
    """Whether a CUDA graph records what is launched on the device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_recording(device: torch.device) -> None:
    """Raise RuntimeError while a CUDA graph is recorded, for what happens once and may wait."""
    if is_recorded(device):
        raise RuntimeError(
            "expected a batch of this size to be scored with Triton once before a CUDA graph records it, because the "
            "first scoring compiles a kernel and uploads a table; score it once outside of the recording"
        )
