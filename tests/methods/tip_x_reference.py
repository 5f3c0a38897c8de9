"""Tip-X as the papers' public code computes it, in float64: divergences one by one, ranges of the batch."""

from __future__ import annotations

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods.support_set import SupportSet
from iosr_fast.scoring.reference import softmax


def tip_x_literal(
    support: SupportSet,
    queries: Embeddings,
    divergence_range: tuple[float, float],
    cosine_range: tuple[float, float],
    *,
    which: str = "plain",
    alpha: float,
    beta: float,
    gamma: float,
    temperature: float = 0.5,
) -> np.ndarray:
    """Tip-X (Udandarao et al., ICCV 2023, equations 5 to 7) as its code computes it: every divergence, one by one.

    logits = tau * plain @ text' + alpha * exp(-beta * (1 - cosines)) @ onehot - gamma * scale(divergences) @ onehot

    where scale takes divergence_range (least, most) to cosine_range, and a class counts as one of mean size
    (support_set.class_weights). Returns (B, C) float64.
    """
    cosines, divergences = _tip_x_pairs(support, queries, which, temperature)
    (least, most), (low, high) = divergence_range, cosine_range
    scaled = (divergences - least) / (most - least) * (high - low) + low
    assert support.text is not None
    zero_shot = support.tau * np.asarray(queries.plain, np.float64) @ support.text.T.astype(np.float64)
    onehot = np.eye(support.n_classes)[support.labels] * (support.counts.mean() / np.maximum(support.counts, 1))
    logits: np.ndarray = zero_shot + alpha * np.exp(-beta * (1.0 - cosines)) @ onehot - gamma * scaled @ onehot
    return logits


def tip_x_batch(
    support: SupportSet,
    queries: Embeddings,
    *,
    which: str = "plain",
    alpha: float,
    beta: float,
    gamma: float,
    temperature: float = 0.5,
) -> np.ndarray:
    """Tip-X with both ranges those of this very batch, as in the public code: a label depends on its batch.

    For parity with the papers' code only; methods/tip_x.py freezes the ranges. Every image has its divergences, also
    those of the last incomplete hundred, which the public code leaves at zero.
    """
    ranges = [(float(pairs.min()), float(pairs.max())) for pairs in _tip_x_pairs(support, queries, which, temperature)]
    return tip_x_literal(
        support,
        queries,
        ranges[1],
        ranges[0],
        which=which,
        alpha=alpha,
        beta=beta,
        gamma=gamma,
        temperature=temperature,
    )


def _tip_x_pairs(
    support: SupportSet, queries: Embeddings, which: str, temperature: float
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and KL(s[b] || S[j]) of queries and keys, (B, N) float64 each; a query's (N, C) terms at a time."""
    assert support.text is not None
    text = support.text.astype(np.float64)
    keys, query = (np.asarray(getattr(e, which), np.float64) for e in (support.embeddings, queries))
    key_shares, query_shares = (
        softmax(np.asarray(e.plain, np.float64) @ text.T / temperature) for e in (support.embeddings, queries)
    )
    divergences = np.stack([(s * (np.log(s) - np.log(key_shares))).sum(1) for s in query_shares])
    return query @ keys.T, divergences
