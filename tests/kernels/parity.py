"""The Triton kernel against the float64 reference, in Triton's interpreter.

Triton decides when a kernel is defined whether its interpreter runs it, so one process has either the interpreter or
the compiler. test_triton.py runs this file by pytest with TRITON_INTERPRET=1; the name keeps it out of the main run.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from iosr_fast.kernels import affinity_sums as kernels
from iosr_fast.scoring.device_plan import device_plan
from iosr_fast.scoring.key_precision import PRECISIONS
from iosr_fast.scoring.plan import ScoringPlan
from tests.conftest import EXTENDED, random_embeddings, random_plan
from tests.scoring.numerics import assert_close_to_truth
from tests.scoring.sums import KINDS, SHAPES, assert_right, make_plan, random_queries


def assert_triton(plan: ScoringPlan, queries: torch.Tensor, device: str = "cpu") -> torch.Tensor:
    path = "triton/classes" if plan.values is None else "triton/values"
    halves = {"half_queries": True, "half_affinities": True}
    return assert_right(kernels.affinity_sums, path, plan, queries, device=device, **halves)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keys", PRECISIONS)
def test_odd_shapes(keys: str, kind: str, rng: np.random.Generator) -> None:
    for counts, batch, width in SHAPES:
        plan = make_plan(rng, counts, width, keys, kind, weighted=batch % 2 == 1, beta=1.0 + batch % 7)
        assert_triton(plan, random_queries(rng, batch, width))


@pytest.mark.parametrize("name", EXTENDED)
def test_whole_plans(name: str, rng: np.random.Generator) -> None:
    plan = random_plan(rng, [3, 0, 20], 33, **EXTENDED[name])
    path = "no-keys" if plan.keys is None else "classes" if plan.values is None else "values"
    assert_close_to_truth(f"triton/{path}", plan, random_embeddings(rng, 5, 33))


@pytest.mark.parametrize("kind", KINDS)
def test_keys_in_pieces_and_queries_in_blocks(
    kind: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several programs share columns; the memory of their sums is bounded, and none of it is read unwritten."""
    plan = make_plan(rng, [700, 0, 3, 40, *[0] * 16, 5, *[0] * 15], 16, "fp16", kind)
    queries = random_queries(rng, 21, 16)
    monkeypatch.setattr(torch, "empty", lambda size, **options: torch.full(size, torch.nan, **options))
    monkeypatch.setattr(kernels, "gpu", lambda device: (64, 90))
    assert_triton(plan, queries)
    monkeypatch.setattr(kernels, "PARTIAL_BYTES", 4 * 36 * 8 * 2)
    monkeypatch.setattr(kernels, "AFFINITY_BYTES", 1)
    monkeypatch.setattr(kernels, "BLOCK", 8)
    assert_triton(plan, queries)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_sharpness_at_their_ends(kind: str, rng: np.random.Generator) -> None:
    """float16 holds neither large weights nor affinities of keys that are far away."""
    for alpha, beta, weight in ((1.7, 0.0, 1.0), (-0.5, 20.0, 1e5), (1e4, 5.5, 1e-3), (0.0, 5.5, 1.0)):
        plan = make_plan(rng, [40, 0, 29, 1], 64, "fp16", kind, alpha=alpha, beta=beta)
        assert plan.weights is not None
        plan = replace(plan, weights=np.float32(weight) * plan.weights)
        assert_triton(plan, random_queries(rng, 5, 64))


@pytest.mark.parametrize("kind", KINDS)
def test_equal_calls_give_equal_bits_whatever_type_queries_have(kind: str, rng: np.random.Generator) -> None:
    plan = make_plan(rng, [140, 3, 0, 9], 32, "fp16", kind)
    for dtype in (torch.float16, torch.bfloat16):
        queries = random_queries(rng, 7, 32, dtype)
        first, again, wide = (assert_triton(plan, rows) for rows in (queries, queries, queries.float()))
        assert torch.equal(first, again) and torch.equal(first, wide)


@pytest.mark.parametrize("kind", KINDS)
def test_a_recording_takes_only_what_was_scored_before(
    kind: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A larger batch has another tile, which compiles a kernel; a slice of queries has none of its own."""
    parts = device_plan(make_plan(rng, [3, 0, 5], 33, "fp16", kind), "cpu")
    rows, logits = random_queries(rng, 40, 33, torch.float16), torch.zeros(40, 3)
    kernels.affinity_sums(parts, rows[:3], logits[:3])
    monkeypatch.setattr(kernels, "is_recorded", lambda device: True)
    kernels.affinity_sums(parts, rows[1:5], logits[:4])
    with pytest.raises(RuntimeError, match="scored with Triton once before"):
        kernels.affinity_sums(parts, rows, logits)


@pytest.mark.parametrize("counts", [*(counts for counts, *_ in SHAPES), [16] * 1000, [9000, 1, 0, 5] * 9], ids=str)
@pytest.mark.parametrize(("tile", "blocks", "most"), [((64, 16), 1, 99), ((128, 128), 2, 3), ((16, 16), 40, 1)])
def test_items_hold_every_key_of_a_class_once(counts: list[int], tile: tuple[int, int], blocks: int, most: int) -> None:
    block_n, block_c = tile
    offsets = np.concatenate([[0], np.cumsum(counts)])
    cut = kernels.Tile(16, block_n, 64, block_c, 4)
    pairs, pieces = np.zeros((sum(counts), len(counts)), int), set()
    for first, end, column, piece in kernels.cut_items(offsets, cut, blocks, 132, most).tolist():
        assert first < end and (first - offsets[column]) % block_n == 0 == column % block_c and piece < most
        pieces.add((column, piece))
        pairs[first:end, column : column + block_c] += 1
    own = np.repeat(np.arange(len(counts)), counts)
    assert (pairs[np.arange(sum(counts)), own] == 1).all() and pairs.max() == 1


def test_programs_of_a_large_class_and_of_many_small_ones_end_in_one_round() -> None:
    tile = kernels.Tile(128, 128, 64, 16, 8)
    for counts, blocks in (([1_000_000], 1), ([16] * 1000, 2), ([8] * 500 + [5000], 1)):
        offsets = np.concatenate([[0], np.cumsum(counts)])
        items = kernels.cut_items(offsets, tile, blocks, 132, 1000)
        assert 0.5 * 132 < blocks * len(items) <= 132
        lengths = (items[:, 1] - items[:, 0]) / 128
        assert blocks * np.ceil(lengths).sum() / 132 > 0.5 * np.ceil(lengths.max())


NO_ACCESS = 0


def guarded(tensor: Any, at_end: bool) -> Any:
    """A copy of the tensor directly before (at_end) or behind a page without access, which ends a process that reads or
    writes there."""
    if not isinstance(tensor, torch.Tensor):
        return tensor
    size = tensor.numel() * tensor.element_size()
    inside = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, inside + 2 * mmap.PAGESIZE)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (begin, begin + mmap.PAGESIZE + inside):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), NO_ACCESS) == 0
    offset = mmap.PAGESIZE + (inside - size if at_end else 0)
    copy = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=offset).view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_no_access_beyond_a_tensor(
    kind: str, at_end: bool, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = []

    class Guarded:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            def launch(*arguments: Any, **options: Any) -> None:
                copies = [guarded(argument, at_end) for argument in arguments]
                self.kernel[grid](*copies, **options)
                output = max(i for i, argument in enumerate(arguments) if isinstance(argument, torch.Tensor))
                arguments[output].copy_(copies[output])
                launches.append(grid)

            return launch

    for name in ("class_sums_kernel", "affinities_kernel"):
        monkeypatch.setattr(kernels, name, Guarded(getattr(kernels, name)))
    for (counts, batch, width), keys in itertools.product(SHAPES[1:4], ("fp16", "int8")):
        assert_triton(make_plan(rng, counts, width, keys, kind), random_queries(rng, batch, width))
    assert len(launches) == 6
