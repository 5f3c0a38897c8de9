"""The distribution of a plan's keys over programs: tables of a few integers per tile. Keys are never copied or padded.

A table takes 20 bytes per work item. It is computed once per plan and tile shape and cached with the plan's offsets.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from iosr_fast.scoring.device_plan import cached, is_recording

if TYPE_CHECKING:
    from torch import Tensor

    from iosr_fast.scoring.device_plan import DevicePlan


@dataclass(frozen=True)
class Items:
    """Work items: table (M, 5) int32 of first key, end key, first class, number of classes, slot.

    An item has whole classes and slot -1; or a piece of one class and the row of partial sums that it fills. A tile
    holds each item's keys. cut (K, 3) int32 lists the classes in pieces: class, first slot, end slot.
    """

    table: np.ndarray
    cut: np.ndarray
    n_slots: int


def shots_of(offsets: np.ndarray, block_n: int) -> int:
    """The keys of each class, if they are as many for all, a power of two and at most block_n; else 0."""
    counts = np.diff(offsets)
    shots = int(counts[0])
    alike = (counts == shots).all() and 0 < shots <= block_n and shots & (shots - 1) == 0
    return shots if alike else 0


def block_classes(n_keys: int, n_classes: int, block_n: int) -> int:
    """block_c of cut_items(): the classes that a tile of keys holds on average, a power of two of at least 16."""
    average = max(1, block_n * n_classes // n_keys)
    return min(block_n, max(16, 1 << (average - 1).bit_length()))


def cut_items(offsets: np.ndarray, block_n: int, block_c: int) -> Items:
    """Runs of at most block_c classes and block_n keys, and larger classes in pieces of block_n keys. Every class is in
    one run or in pieces, also one without keys."""
    table: list[list[int]] = []
    cut: list[tuple[int, int, int]] = []
    n_slots = 0
    run: list[int] | None = None
    ends = offsets.tolist()
    for label, (begin, end) in enumerate(itertools.pairwise(ends)):
        if end - begin > block_n:
            run = None
            firsts = range(begin, end, block_n)
            table += [[first, min(first + block_n, end), label, 1, slot] for slot, first in enumerate(firsts, n_slots)]
            cut.append((label, n_slots, n_slots + len(firsts)))
            n_slots += len(firsts)
        elif run is not None and end - run[0] <= block_n and label - run[2] < block_c:
            run[1], run[3] = end, label - run[2] + 1
        else:
            run = [begin, end, label, 1, -1]
            table.append(run)
    return Items(np.asarray(table, np.int32).reshape(-1, 5), np.asarray(cut, np.int32).reshape(-1, 3), n_slots)


def class_offsets(plan: DevicePlan) -> np.ndarray:
    """The plan's class offsets on the host, (C + 1,) int64.

    Raises RuntimeError if a CUDA graph is recorded before they were read once, because reading them must wait.
    """
    offsets = plan.class_offsets
    assert offsets is not None

    def read() -> np.ndarray:
        _refuse_recording(plan)
        return offsets.cpu().numpy().astype(np.int64)

    return cached(offsets, "host", read)


def _refuse_recording(plan: DevicePlan) -> None:
    if is_recording(plan.device):
        raise RuntimeError(
            "expected a batch of this size to be scored with Triton once before a CUDA graph records it, because the "
            "first scoring reads class offsets and uploads a table; score it once outside of the recording"
        )


def shots(plan: DevicePlan, block_n: int) -> int:
    """shots_of() a plan, cached."""
    assert plan.class_offsets is not None
    return cached(plan.class_offsets, ("shots", block_n), lambda: shots_of(class_offsets(plan), block_n))


def items(plan: DevicePlan, block_n: int, block_c: int) -> tuple[Items, Tensor, Tensor]:
    """cut_items() of a plan, and its table and its cut classes on the plan's device, cached.

    Raises RuntimeError if a CUDA graph is recorded before they were computed once.
    """
    assert plan.class_offsets is not None

    def compute() -> tuple[Items, Tensor, Tensor]:
        import torch

        _refuse_recording(plan)
        work = cut_items(class_offsets(plan), block_n, block_c)
        return work, torch.from_numpy(work.table).to(plan.device), torch.from_numpy(work.cut).to(plan.device)

    return cached(plan.class_offsets, ("items", block_n, block_c), compute)
