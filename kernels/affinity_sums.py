"""affinity_sums on an NVIDIA GPU: one Triton kernel for classes and for values.

    logits[b, c] += alpha * sum over keys j: weights[j] * exp(-beta * (1 - <queries[b], keys[j]>)) * values[j, c]

with values[j, c] = 1 for the class c of key j and 0 for all others if the plan has classes. A tile of queries and keys
takes two products, with the exponential between them in registers, as in FlashAttention (Dao et al., 2022): the (B, N)
affinity is never in memory. It needs no running maximum, because the exponent is never positive.
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

if TYPE_CHECKING:
    from torch import Tensor

    from iosr_fast.scoring.device_plan import DevicePlan

PARTIAL_BYTES = 64 * 2**20
# The exponent of 2 that multiplies affinities which become float16: they are at most 1, and float16 loses bits below
# 2**-14 and everything below 2**-25.
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


# Numbers that change from call to call are not specialised: another batch or class compiles nothing but a new tile.
@triton.jit(do_not_specialize=["n_queries", "n_keys", "n_items", "n_groups"])
def affinity_sums_kernel(  # type: ignore[no-untyped-def]
    queries,
    keys,
    key_scales,
    weights,
    largest_weight,
    class_offsets,
    values,
    items,
    sums,
    n_queries,
    n_keys,
    n_items,
    n_groups,
    scale,
    shift,
    alpha,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """sums[piece] = alpha * affinity @ values for BLOCK_B queries and an item; sums is (pieces, B, C).

    An item is a row (first key, end key, first column, piece) of `items`: BLOCK_C columns of values or as many classes,
    and their keys, or a piece of these of a multiple of BLOCK_N keys. A class's column of a tile of values is 1 in the
    rows of its keys. The affinity is weights * exp2(scale * dot + shift). There are n_groups * GROUP columns, so that
    the compiler knows how many one vector load takes. Arguments that are None are left out; keys have either
    class_offsets or values.

    Each accumulator has a single tl.dot in the loop that updates it: up to Triton 3.8 two in one step are miscompiled
    for compute capability 10 (triton issue 10821). "tf32x3" makes three of one, hence product_precision().
    """
    # Programs that run at once share up to 16 blocks of queries and few items, which then stay in the L2 cache.
    program = tl.program_id(0)
    n_blocks = tl.cdiv(n_queries, BLOCK_B)
    block, item = tl.swizzle2d(program // n_items, program % n_items, n_blocks, n_items, 16)
    first_key = tl.load(items + 4 * item)
    end_key = tl.load(items + 4 * item + 1)
    columns = tl.multiple_of(tl.load(items + 4 * item + 2), BLOCK_C) + tl.arange(0, BLOCK_C)
    piece = tl.load(items + 4 * item + 3).to(tl.int64)
    n_columns = n_groups * GROUP
    inside = columns < n_columns
    if values is None:
        begins = tl.load(class_offsets + columns, mask=inside, other=0)
        ends = tl.load(class_offsets + columns + 1, mask=inside, other=0)
    # Rows beyond the last read the last one, so that loads in the inner loop need no mask.
    rows = block * BLOCK_B + tl.arange(0, BLOCK_B)
    channels = tl.arange(0, BLOCK_D)
    query_at = queries + tl.minimum(rows, n_queries - 1).to(tl.int64)[:, None] * WIDTH + channels[None, :]
    total = tl.zeros((BLOCK_B, BLOCK_C), dtype=tl.float32)
    for first in range(first_key, end_key, BLOCK_N):
        slots = first + tl.arange(0, BLOCK_N)
        key_rows = tl.minimum(slots, n_keys - 1)
        key_at = keys + key_rows.to(tl.int64)[:, None] * WIDTH + channels[None, :]
        if values is not None:  # loaded before they are needed, as the first product takes a while
            value_at = values + slots.to(tl.int64)[:, None] * n_columns + columns[None, :]
            tile = tl.load(value_at, mask=(slots < n_keys)[:, None] & inside[None, :], other=0.0)
        dots = tl.zeros((BLOCK_B, BLOCK_N), dtype=tl.float32)
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
        if values is not None:
            total = tl.dot(affinity.to(tile.dtype), tile, total, input_precision=PRECISION)
        else:
            member = (slots[:, None] >= begins[None, :]) & (slots[:, None] < ends[None, :])
            member = operand(tl.where(member, 1.0, 0.0).to(tl.bfloat16))
            # Three bfloat16 parts hold the 24 bits of a float32. Stages of this loop would only cost registers.
            for _ in tl.range(3, num_stages=1):
                part = affinity.to(tl.bfloat16)
                affinity -= part.to(tl.float32)
                total = tl.dot(operand(part), member, total)
    if weights is not None:
        alpha *= tl.load(largest_weight)
    at = sums + (piece * n_queries + rows[:, None]) * n_columns + columns[None, :]
    tl.store(at, alpha * total, mask=(rows < n_queries)[:, None] & inside[None, :])


@dataclass(frozen=True)
class Tile:
    """A tile's queries, keys, channels and columns, and the compiler's options."""

    block_b: int
    block_n: int
    block_d: int
    block_c: int
    num_warps: int
    num_stages: int = 3

    def options(self) -> dict[str, Any]:
        """The kernel's keyword arguments."""
        sizes = {name: getattr(self, name.lower()) for name in ("BLOCK_B", "BLOCK_N", "BLOCK_D", "BLOCK_C")}
        # The exponent is one multiply-add, whatever the compiler's default.
        return sizes | {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


def tile_of(
    batch: int, n_keys: int, n_columns: int, keys: torch.dtype, values: torch.dtype | None, capability: int
) -> Tile:
    """The tile for `batch` queries, by the types of keys and values (None: classes), on a GPU of compute capability
    capability / 10.

    Registers are the bound: a thread holds block_b * (block_n + block_c) / 256 sums, and where tensor cores read
    registers (all but 9.0 and 10.x) the factors too, those of float32 in several parts. So more columns mean fewer keys
    or queries. More columns than block_c compute the affinities again. Two warp groups of 9.0 would split 32 keys, and
    multiply by 16 at a time.
    """
    wide = capability // 10 in (9, 10)
    single, precise = keys == torch.float32, torch.float32 in (keys, values)
    # Fewer than 128 tiles of 128 by 128 would leave multiprocessors idle.
    tall = batch * n_keys >= 128**3
    block_n, block_c = 64, 128
    if values is None:
        tall &= wide or not single
        block_c = min(block_n, block_n * n_columns // n_keys)  # fewer than a tile's keys would leave rows empty
    elif precise:
        tall &= wide
        block_n = 32
    else:
        block_c = 256 if n_columns > 128 else 128
        tall &= wide or block_c == 128
        block_n = 128 if tall and wide and block_c == 128 else 64
    block_b = min(128 if tall else 64, max(16, triton.next_power_of_2(batch)))
    block_c = max(16, triton.next_power_of_2(min(block_c, n_columns)))
    # 128 bytes of a key, but of int8 keys 64, where a tile of more queries has no registers for their conversion.
    block_d = 32 if single else 128 if keys == torch.int8 and block_b == 16 else 64
    few = block_b == 16 or (capability // 10 == 9 and block_b <= 64 and block_n == 32)
    return Tile(block_b, block_n, block_d, block_c, 4 if few else 8)


@functools.cache
def gpu(device: torch.device) -> tuple[int, int]:
    """A GPU's multiprocessors and 10 times its compute capability; the interpreter's, to cut keys in few pieces."""
    if device.type != "cuda":
        return 4, 90
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, 10 * properties.major + properties.minor


def product_precision(capability: int) -> str:
    """How float32 factors are multiplied: in three TF32 products, which keep float32's accuracy; or, where Triton would
    miscompile their sum (affinity_sums_kernel), without tensor cores."""
    version = tuple(int(number) for number in triton.__version__.split(".")[:2])
    return "ieee" if capability // 10 == 10 and version < (3, 9) else "tf32x3"


def cut_items(offsets: np.ndarray | None, n_keys: int, n_columns: int, block_c: int, stretch: int) -> np.ndarray:
    """The kernel's items, (n, 4) int32: for each block of columns its keys, in pieces of at most `stretch`.

    A block of columns has all keys (offsets None, for values) or those of its classes (offsets (C + 1,))."""
    items = []
    for column in range(0, n_columns, block_c):
        begin, end = 0, n_keys
        if offsets is not None:
            begin, end = int(offsets[column]), int(offsets[min(column + block_c, n_columns)])
        for piece, first in enumerate(range(begin, end, stretch)):
            items.append((first, min(first + stretch, end), column, piece))
    return np.asarray(items, np.int32)


def affinity_sums(plan: DevicePlan, queries: Tensor, logits: Tensor) -> str:
    """The sums of the module's formula, added to logits in place (scoring.backends says what a backend is given).

    Queries are rounded to the keys' half type, float16 for int8 keys; affinities to the type of `values`, and not at
    all for classes; sums are float32. If blocks of queries and columns are too few for the GPU, several programs share
    a block, and their sums, at most 64 MB, are added in order. Equal calls give equal bits; nothing waits for the
    device. Raises RuntimeError if a CUDA graph is recorded before a call with this plan and batch.

    Returns "triton/classes" or "triton/values".
    """
    with torch.cuda.device_of(logits):
        rows = max(1, PARTIAL_BYTES // (4 * plan.n_classes))
        for first in range(0, len(queries), rows):
            _add_sums(plan, queries[first : first + rows], logits[first : first + rows])
    return "triton/classes" if plan.values is None else "triton/values"


def _add_sums(plan: DevicePlan, queries: Tensor, logits: Tensor) -> None:
    keys, values = plan.keys, plan.values
    assert keys is not None
    (batch, n_columns), n_keys = logits.shape, len(keys)
    processors, capability = gpu(plan.device)
    tile = tile_of(batch, n_keys, n_columns, keys.dtype, None if values is None else values.dtype, capability)
    blocks, n_tiles = triton.cdiv(batch, tile.block_b), triton.cdiv(n_keys, tile.block_n)
    # Tiles for each program, so that as many programs run at once as fit, and those that may be summed in memory.
    programs = processors * min(4, 128 // tile.block_b)
    n_chunks = 1 if values is None else triton.cdiv(n_columns, tile.block_c)
    most_pieces = max(1, PARTIAL_BYTES // (4 * logits.numel()))
    stretch = tile.block_n * max(triton.cdiv(n_tiles * n_chunks * blocks, programs), triton.cdiv(n_tiles, most_pieces))

    # Queries whose address 16 doesn't divide, such as a slice, have a kernel of their own.
    rows = queries.to(torch.float16 if keys.dtype == torch.int8 else keys.dtype)
    is_aligned = rows.data_ptr() % 16 == 0

    def items() -> tuple[Tensor, int]:
        _refuse_recording(plan.device)
        table = cut_items(plan.offsets, n_keys, n_columns, tile.block_c, stretch)
        return torch.from_numpy(table).to(plan.device), int(table[:, 3].max()) + 1

    # By all that the kernel is compiled for, so that the first call that needs a compiler is refused in a recording.
    table, n_pieces = plan.cached(f"triton/{tile}/{stretch}/{is_aligned}", items)
    shares, largest = plan.cached("triton/weights", lambda: _weights(plan))
    # Classes without keys, and those with fewer pieces than others, have sums of zero that no program writes.
    allocate = torch.zeros if values is None else torch.empty
    sums = allocate((n_pieces, batch, n_columns), dtype=torch.float32, device=plan.device)
    lift = LIFT if values is not None and values.dtype == torch.float16 else 0
    scale = plan.beta * math.log2(math.e)
    group = math.gcd(n_columns, 16)
    affinity_sums_kernel[blocks * len(table),](
        rows,
        keys,
        plan.key_scales,
        shares,
        largest,
        plan.class_offsets,
        values,
        table,
        sums,
        batch,
        n_keys,
        len(table),
        n_columns // group,
        scale,
        lift - scale,
        plan.alpha * 2.0**-lift,
        WIDTH=plan.width,
        GROUP=group,
        PRECISION=product_precision(capability),
        **tile.options(),
    )
    logits += sums[0] if n_pieces == 1 else sums.sum(dim=0)


def _weights(plan: DevicePlan) -> tuple[Tensor | None, Tensor | None]:
    """The weights over their largest size, and this size: affinities times large weights would overflow float16."""
    if plan.weights is None:
        return None, None
    _refuse_recording(plan.device)
    largest = plan.weights.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    shares = plan.weights / largest
    if plan.device.type == "cuda":  # the next call may come on another stream, which doesn't wait for this one
        torch.cuda.current_stream(plan.device).synchronize()
    return shares, largest


def is_recorded(device: torch.device) -> bool:
    """Whether a CUDA graph records what is launched on the device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _refuse_recording(device: torch.device) -> None:
    if is_recorded(device):
        raise RuntimeError(
            "expected a batch of this size to be scored with Triton once before a CUDA graph records it, because the "
            "first scoring compiles a kernel and uploads a table; score it once outside of the recording"
        )
