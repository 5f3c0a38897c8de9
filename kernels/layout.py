"""The distribution of a plan's keys over programs: tables of a few integers per tile. Keys are never copied or padded.

A table takes 20 bytes per work item. It is computed once per plan and tile shape and cached with the plan's offsets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from iosr_fast.scoring.device_plan import cached, is_recording

if TYPE_CHECKING:
    from torch import Tensor

    from iosr_fast.scoring.device_plan import DevicePlan


@dataclass(frozen=True)
class Aligned:
    """Classes as `shots` keys each, block_n // shots of them per tile.

    `tiles` is the number of tiles of block_n keys of the whole plan, `longest` that of the longest program.
    """

    shots: int
    tiles: int
    longest: int


@dataclass(frozen=True)
class Items:
    """Work items: table (M, 5) int32 of first key, end key, first class, number of classes, slot.

    An item has whole classes, at least one with keys, and slot -1; or a piece of one class and the row of partial sums
    that it fills. cut (K, 3) int32 lists the classes in pieces: class, first slot, end slot.
    """

    table: np.ndarray
    cut: np.ndarray
    n_slots: int
    tiles: int
    longest: int


def align(offsets: np.ndarray, block_n: int) -> Aligned:
    """Distribute whole classes over tiles of block_n keys, with the largest class rounded up to a power of two."""
    counts = np.diff(offsets)
    shots = 1 << int(counts.max() - 1).bit_length()
    if shots < block_n:
        return Aligned(shots, -(-len(counts) // (block_n // shots)), 1)
    per_class = -(-counts // block_n)
    return Aligned(block_n, int(per_class.sum()), int(per_class.max()))


def cut_items(offsets: np.ndarray, block_n: int, block_c: int, piece: int | None = None) -> Items:
    """Runs of at most block_c classes and block_n keys; a class of more than block_n keys is an item of its own.

    With `piece`, larger classes are split into pieces of that number of keys. Classes without keys are left out, except
    between two others of a run.
    """
    table: list[list[int]] = []
    cut: list[tuple[int, int, int]] = []
    n_slots = 0
    run: list[int] | None = None
    for label in np.flatnonzero(np.diff(offsets)).tolist():
        begin, end = int(offsets[label]), int(offsets[label + 1])
        if piece is not None and end - begin > piece:
            run = None
            firsts = range(begin, end, piece)
            for slot, first in enumerate(firsts, n_slots):
                table.append([first, min(first + piece, end), label, 1, slot])
            cut.append((label, n_slots, n_slots + len(firsts)))
            n_slots += len(firsts)
        elif run is not None and end - run[0] <= block_n and label - run[2] < block_c:
            run[1], run[3] = end, label - run[2] + 1
        else:
            run = [begin, end, label, 1, -1]
            table.append(run)
    rows = np.asarray(table, dtype=np.int32).reshape(-1, 5)
    per_item = -(-(rows[:, 1].astype(np.int64) - rows[:, 0]) // block_n)
    cut_rows = np.asarray(cut, dtype=np.int32).reshape(-1, 3)
    return Items(rows, cut_rows, n_slots, int(per_item.sum()), int(per_item.max()))


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


def aligned(plan: DevicePlan, block_n: int) -> Aligned:
    """align() of a plan, cached."""
    assert plan.class_offsets is not None
    return cached(plan.class_offsets, ("aligned", block_n), lambda: align(class_offsets(plan), block_n))


def items(plan: DevicePlan, block_n: int, block_c: int, piece: int | None = None) -> Items:
    """cut_items() of a plan, cached."""
    assert plan.class_offsets is not None
    key = ("items", block_n, block_c, piece)
    return cached(plan.class_offsets, key, lambda: cut_items(class_offsets(plan), block_n, block_c, piece))


def tables(plan: DevicePlan, block_n: int, block_c: int, piece: int | None = None) -> tuple[Tensor, Tensor]:
    """The tables of items() on the plan's device, cached. Raises RuntimeError if a CUDA graph is recorded before."""
    assert plan.class_offsets is not None
    work = items(plan, block_n, block_c, piece)

    def move() -> tuple[Tensor, Tensor]:
        import torch

        _refuse_recording(plan)
        return torch.from_numpy(work.table).to(plan.device), torch.from_numpy(work.cut).to(plan.device)

    return cached(plan.class_offsets, ("tables", block_n, block_c, piece), move)
