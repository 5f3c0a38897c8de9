"""What this machine reaches at best, measured in the run that is compared with it, at the threads it is compared at."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import numpy as np

from iosr_fast.info import usable_threads

WARMUP = 2


def gemm_ceiling_flops(threads: int, size: int = 2048, repeats: int = 7) -> float:
    """FLOP/s of the best of a few float32 GEMMs, NumPy's or PyTorch's, whichever is faster here.

    NumPy's BLAS takes its threads from OMP_NUM_THREADS or the machine, so NumPy takes part only where it would use no
    more than `threads`.
    """
    import torch

    left = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
    left_torch, out_torch, out = torch.from_numpy(left), torch.empty(size, size), np.empty_like(left)
    calls: list[Callable[[], object]] = [lambda: torch.mm(left_torch, left_torch, out=out_torch)]
    if threads >= usable_threads():
        calls.append(lambda: np.matmul(left, left, out=out))
    with torch_threads(threads):
        return 2.0 * size**3 / min(_best_s(call, repeats) for call in calls)


def memory_bandwidth(threads: int, megabytes: int = 512, repeats: int = 5) -> float:
    """Bytes/s at which memory is read: the best of a few float32 sums over `megabytes`, which no cache holds.

    Every byte is counted once.
    """
    import torch

    data = torch.ones(megabytes * 250_000)
    with torch_threads(threads):
        return data.numel() * 4 / _best_s(data.sum, repeats)


def _best_s(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(WARMUP + repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times[WARMUP:])


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """PyTorch's thread count for the length of a with block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
