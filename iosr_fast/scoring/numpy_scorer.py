"""Scoring with NumPy: float32, and the float64 reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from iosr_fast.scoring.fields import EMBEDDINGS
from iosr_fast.scoring.precision import key_rows
from iosr_fast.scoring.reducers import Product, blas_product

if TYPE_CHECKING:
    from iosr_fast.encoders.encoder import Embeddings
    from iosr_fast.scoring.plan import ScoringPlan

# A tile of affinities takes 16 MB.
_KEYS_PER_TILE = 4096
_QUERIES_PER_TILE = 1024


def _reduced_rows(plan: ScoringPlan, embeddings: Embeddings, which: str, product: Product) -> np.ndarray:
    rows = embeddings.plain if which == "plain" else embeddings.adapted
    assert isinstance(rows, np.ndarray)  # guaranteed by scoring_inputs()
    return rows if plan.reducer is None else plan.reducer(rows, product)


def query_rows(plan: ScoringPlan, embeddings: Embeddings, product: Product = blas_product) -> np.ndarray:
    """The queries (B, D) float32 of the cache term, after the plan's reducer and before its query_transform."""
    return _reduced_rows(plan, embeddings, plan.query, product)


def feature_rows(plan: ScoringPlan, embeddings: Embeddings, product: Product = blas_product) -> np.ndarray:
    """The features of the linear term: (B, D) float32, (B, 2 D) for both embeddings, (B, C + 1) for the distribution
    over texts."""
    if plan.feature == "text-distribution":
        assert plan.text is not None
        return text_distribution(product(embeddings.plain, plan.text), plan.temperature)
    if plan.feature == "both":
        return np.concatenate([_reduced_rows(plan, embeddings, which, product) for which in EMBEDDINGS], axis=1)
    return _reduced_rows(plan, embeddings, plan.feature, product)


def text_distribution(cosines: np.ndarray, temperature: float) -> np.ndarray:
    """[s, H], (B, C + 1): s = softmax(cosines / temperature) and H = sum of s * log(C s). cosines (B, C).

    >>> text_distribution(np.array([[0.2, 0.2]]), temperature=0.5)
    array([[0.5, 0.5, 0. ]])
    """
    exponents = cosines / cosines.dtype.type(temperature)
    exponents -= exponents.max(1, keepdims=True)
    powers = np.exp(exponents)
    sums = powers.sum(1, keepdims=True)
    shares = powers / sums
    means = sums / cosines.dtype.type(cosines.shape[1])
    negentropy = (shares * (exponents - np.log(means))).sum(1, keepdims=True)
    return np.concatenate([shares, negentropy], axis=1)


def score_numpy(plan: ScoringPlan, embeddings: Embeddings) -> tuple[np.ndarray, str]:
    """float32 NumPy: per tile of keys one GEMM, one exponential and one segment sum, in bounded memory.

    Keys of another precision are converted to float32 tile by tile.
    """
    logits = np.zeros((len(embeddings), plan.n_classes), dtype=np.float32)
    if plan.text is not None:
        np.matmul(embeddings.plain, plan.text.T, out=logits)
        logits *= np.float32(plan.tau)
    if plan.keys is not None:
        query = query_rows(plan, embeddings)
        query = query if plan.query_transform is None else query @ plan.query_transform.T
        for first in range(0, len(logits), _QUERIES_PER_TILE):
            block = slice(first, first + _QUERIES_PER_TILE)
            _add_cache_term(plan, query[block], logits[block])
    if plan.linear is not None:
        logits += feature_rows(plan, embeddings) @ plan.linear.T
    if plan.bias is not None:
        logits += plan.bias
    return logits, "numpy"


def _add_cache_term(plan: ScoringPlan, query: np.ndarray, logits: np.ndarray) -> None:
    assert plan.keys is not None
    offsets = plan.class_offsets
    for begin in range(0, len(plan.keys), _KEYS_PER_TILE):
        end = min(begin + _KEYS_PER_TILE, len(plan.keys))
        affinity = key_rows(plan.keys, plan.key_scales, slice(begin, end)) @ query.T
        affinity -= np.float32(1.0)
        affinity *= np.float32(plan.beta)
        np.exp(affinity, out=affinity)
        if plan.weights is not None:
            affinity *= plan.weights[begin:end, None]
        if plan.values is not None:
            logits += np.float32(plan.alpha) * (affinity.T @ plan.values[begin:end])
            continue
        assert offsets is not None
        # reduceat gives a[i] for an empty segment rather than 0, so classes without keys in this tile are left out.
        starts = np.clip(offsets[:-1], begin, end)
        classes = np.flatnonzero(np.clip(offsets[1:], begin, end) > starts)
        sums = np.add.reduceat(affinity, starts[classes] - begin, axis=0)
        logits[:, classes] += np.float32(plan.alpha) * sums.T


def score_reference(plan: ScoringPlan, embeddings: Embeddings) -> tuple[np.ndarray, str]:
    """reference.score_reference, rounded to float32."""
    from iosr_fast.scoring import reference

    return reference.score_reference(plan, embeddings).astype(np.float32), "reference"
