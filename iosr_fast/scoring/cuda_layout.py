"""Plans and queries in the layout that csrc/cuda reads: padded rows, parts in half precision, the class of each key."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from iosr_fast.scoring.device_plan import cached, is_recording

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from iosr_fast.scoring.device_plan import DevicePlan

PART_SCALE_UP = 2.0**11  # between two parts in float16, which has 11 significant bits
_COPY = 16  # bytes that a kernel copies at once; rows are padded to a multiple of it
_STAGE = 32  # channels of half queries in a pipeline stage; parts of queries are padded to a multiple of it


def query_parts(query: Tensor, key_dtype: torch.dtype) -> tuple[Tensor, int, float]:
    """Queries in the precision of the keys: rows, parts in a row, scale between two parts.

    query = part 2 + scale * (part 1 + scale * part 0). float32 takes two parts of float16, the lower one multiplied by
    2**11 so that it isn't subnormal, or three of bfloat16, which has 8 significant bits and float32's range. With int8
    and float16 keys bfloat16 queries become float16: a channel of a unit row loses at most 2**-25.
    """
    import torch

    if key_dtype == torch.float32:
        return padded(query.float()), 1, 1.0
    half = torch.bfloat16 if key_dtype == torch.bfloat16 else torch.float16
    if half == torch.float16:
        n_parts, up = (2 if query.dtype == torch.float32 else 1), PART_SCALE_UP
    else:
        n_parts, up = {torch.float32: 3, torch.float16: 2, torch.bfloat16: 1}[query.dtype], 1.0
    if n_parts == 1:
        return padded(query.to(half)), 1, 1.0
    return _parts(query.float(), half, n_parts, up), n_parts, 1.0 / up


def split_rows(rows: Tensor) -> tuple[Tensor, float] | None:
    """(parts, scale) with rows = scale * (part 1 + part 0 / 2**11): float16 parts side by side, and the power of two
    that brings them into float16's range. None while a graph is recorded, because reading the largest value waits."""
    import torch

    if is_recording(rows.device):
        return None
    scale = 2.0 ** max(-100, math.frexp(float(rows.abs().max()))[1])
    return _parts(rows / scale, torch.float16, 2, PART_SCALE_UP), scale


def _parts(rows: Tensor, half: torch.dtype, n_parts: int, up: float) -> Tensor:
    """Parts with rows = last part + (second to last + ...) / up, side by side, each padded to whole pipeline stages."""
    import torch

    left = torch.nn.functional.pad(rows, (0, -rows.shape[1] % _STAGE))
    parts: list[Tensor] = []
    for _ in range(n_parts):
        parts.insert(0, left.to(half))
        left = (left - parts[0].float()) * up
    return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class ClassLayout:
    """The class of each key (N,) int32; whether a class has keys in several chunks, and whether one has none."""

    key_class: Tensor
    has_spanning: bool
    has_empty: bool


def class_layout(plan: DevicePlan, chunk: int) -> ClassLayout:
    """The layout of a plan's classes in chunks of keys, cached with its offsets."""
    offsets, keys = plan.class_offsets, plan.keys
    assert offsets is not None and keys is not None

    def compute() -> ClassLayout:
        import torch

        classes = torch.arange(plan.n_classes, dtype=torch.int32, device=offsets.device)
        counts = offsets.diff()
        key_class = torch.repeat_interleave(classes, counts, output_size=len(keys))
        if is_recording(plan.device):
            return ClassLayout(key_class, True, True)  # reading the actual values would wait
        spanning = (counts > 0) & (offsets[:-1] // chunk != (offsets[1:] - 1) // chunk)
        has_spanning, has_empty = torch.stack([spanning.any(), (counts == 0).any()]).tolist()
        return ClassLayout(key_class, has_spanning, has_empty)

    return cached(offsets, ("classes", chunk), compute)


def padded(rows: Tensor) -> Tensor:
    """Contiguous rows that begin and end at multiples of 16 bytes; the tensor itself if its rows do."""
    import torch

    missing = -rows.shape[1] % (_COPY // rows.element_size())
    if missing:
        return torch.nn.functional.pad(rows, (0, missing))
    rows = rows.contiguous()
    return rows if rows.data_ptr() % _COPY == 0 else rows.clone()
