"""The cache term on the CPU, by the C++ kernels of csrc/scoring.

Its threads are IOSR_FAST_THREADS, or all that the process may use; the logits don't depend on their number.

After a product, PyTorch's OpenMP threads spin for milliseconds on the cores that these threads need. A process that
scores between products of PyTorch should set OMP_WAIT_POLICY=PASSIVE before it imports PyTorch: on two busy cores 64
queries and 1,600 keys with values then took 0.9 ms (median) in place of 2.7, alone 0.6. PyTorch's own small products
take up to twice as long on idle cores then; IOSR_FAST_THREADS=1 is the other way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from iosr_fast.scoring.plan import ScoringPlan


def affinity_sums(plan: ScoringPlan, queries: np.ndarray, logits: np.ndarray) -> str:
    """Add the cache term of `plan` for `queries` (B, D) to `logits` (B, C) in place; both are float32 and C-contiguous.

    Returns the path: "cpp/" and the instruction set, which IOSR_FAST_SIMD forces. Raises ValueError for a wrong dtype,
    shape or layout, RuntimeError if IOSR_FAST_SIMD or IOSR_FAST_THREADS is invalid here.
    """
    from iosr_fast import _C

    keys = (plan.keys, plan.key_scales, plan.weights, plan.class_offsets, plan.values)
    return f"cpp/{_C.affinity_sums(queries, *keys, plan.alpha, plan.beta, logits)}"
