"""The implementations that need NumPy arrays: float32 NumPy, the C++ kernel, and the float64 reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from iosr_fast.precision import key_rows

if TYPE_CHECKING:
    from iosr_fast.encoder import Embeddings
    from iosr_fast.scoring import ScoringPlan

# One tile of affinities of this shape is held at a time: 16 MB.
_KEYS_PER_TILE = 4096
_QUERIES_PER_TILE = 1024


def _rows(embeddings: Embeddings, which: str) -> np.ndarray:
    rows = embeddings.plain if which == "plain" else embeddings.adapted
    assert isinstance(rows, np.ndarray)  # score() has seen to it
    return rows


def query_rows(plan: ScoringPlan, embeddings: Embeddings) -> np.ndarray:
    """What meets the keys, (B, D) float32: the plan's query, transformed where it says so."""
    rows = _rows(embeddings, plan.query)
    return rows if plan.query_transform is None else rows @ plan.query_transform.T


def score_numpy(plan: ScoringPlan, embeddings: Embeddings) -> tuple[np.ndarray, str]:
    """float32 NumPy: one GEMM, one exponential and one segment sum a tile of keys, in bounded memory.

    Keys of another precision become float32 a tile at a time.
    """
    logits = np.zeros((len(embeddings), plan.n_classes), dtype=np.float32)
    if plan.text is not None:
        np.matmul(embeddings.plain, plan.text.T, out=logits)
        logits *= np.float32(plan.tau)
    if plan.keys is not None:
        query = query_rows(plan, embeddings)
        for first in range(0, len(logits), _QUERIES_PER_TILE):
            block = slice(first, first + _QUERIES_PER_TILE)
            _add_cache_term(plan, query[block], logits[block])
    if plan.linear is not None:
        logits += _rows(embeddings, plan.feature) @ plan.linear.T
    if plan.bias is not None:
        logits += plan.bias
    return logits, "numpy"


def _add_cache_term(plan: ScoringPlan, query: np.ndarray, logits: np.ndarray) -> None:
    assert plan.keys is not None and plan.class_offsets is not None
    offsets = plan.class_offsets
    for begin in range(0, len(plan.keys), _KEYS_PER_TILE):
        end = min(begin + _KEYS_PER_TILE, len(plan.keys))
        affinity = key_rows(plan.keys, plan.key_scales, slice(begin, end)) @ query.T
        affinity -= np.float32(1.0)
        affinity *= np.float32(plan.beta)
        np.exp(affinity, out=affinity)
        if plan.weights is not None:
            affinity *= plan.weights[begin:end, None]
        # reduceat gives a[i] for an empty segment rather than 0, so only classes with keys in this tile take part.
        starts = np.clip(offsets[:-1], begin, end)
        classes = np.flatnonzero(np.clip(offsets[1:], begin, end) > starts)
        sums = np.add.reduceat(affinity, starts[classes] - begin, axis=0)
        logits[:, classes] += np.float32(plan.alpha) * sums.T


def score_cpp(plan: ScoringPlan, embeddings: Embeddings) -> tuple[np.ndarray, str]:
    """The C++ kernel of csrc/scoring; IOSR_FAST_SIMD forces one of its instruction sets."""
    from iosr_fast import _C

    logits, path = _C.score(
        n_classes=plan.n_classes,
        plain=embeddings.plain,
        query=None if plan.keys is None else _rows(embeddings, plan.query),
        feature=None if plan.linear is None else _rows(embeddings, plan.feature),
        text=plan.text,
        tau=plan.tau,
        keys=plan.keys,
        class_offsets=plan.class_offsets,
        weights=plan.weights,
        alpha=plan.alpha,
        beta=plan.beta,
        linear=plan.linear,
        bias=plan.bias,
        key_scales=plan.key_scales,
        query_transform=plan.query_transform,
    )
    return logits, f"cpp/{path}"


def score_reference(plan: ScoringPlan, embeddings: Embeddings) -> tuple[np.ndarray, str]:
    """reference.py, rounded to float32 at the end."""
    from iosr_fast import reference

    return reference.score_reference(plan, embeddings).astype(np.float32), "reference"
