"""Scoring in float64 NumPy, written like the formula: the truth that every implementation is tested against."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from iosr_fast.precision import key_rows

if TYPE_CHECKING:
    from iosr_fast.encoder import Embeddings
    from iosr_fast.scoring import ScoringPlan


def score_reference(plan: ScoringPlan, embeddings: Embeddings) -> np.ndarray:
    """Execute a plan with the full (B, N) affinity and the (N, C) one-hot matrix of the papers.

    logits = tau * plain @ text'
           + alpha * (weights * exp(-beta * (1 - query @ keys'))) @ onehot
           + feature @ linear' + bias

    The cache term is Tip-Adapter's (Zhang et al., ECCV 2022, eq. 5-6), with a weight per key. Keys of another precision
    than float32 are taken as what they stand for, key_scales[j] * keys[j] where they are int8. Returns (B, C) float64.
    """

    def rows(which: str) -> np.ndarray:
        return np.asarray(embeddings.plain if which == "plain" else embeddings.adapted, dtype=np.float64)

    logits = np.zeros((len(embeddings), plan.n_classes))
    if plan.text is not None:
        logits += plan.tau * rows("plain") @ plan.text.T.astype(np.float64)
    if plan.keys is not None and plan.class_offsets is not None:
        query = rows(plan.query)
        if plan.query_transform is not None:
            query = query @ plan.query_transform.T.astype(np.float64)
        cosine = query @ _keys(plan).T
        affinity = np.exp(-plan.beta * (1.0 - cosine))
        if plan.weights is not None:
            affinity *= plan.weights.astype(np.float64)
        labels = np.repeat(np.arange(plan.n_classes), np.diff(plan.class_offsets))
        onehot = np.eye(plan.n_classes)[labels]
        logits += plan.alpha * affinity @ onehot
    if plan.linear is not None:
        logits += rows(plan.feature) @ plan.linear.T.astype(np.float64)
    if plan.bias is not None:
        logits += plan.bias.astype(np.float64)
    return logits


def _keys(plan: ScoringPlan) -> np.ndarray:
    assert plan.keys is not None
    if plan.key_scales is not None:  # in float64 the product of code and scale is exact
        return plan.keys.astype(np.float64) * plan.key_scales[:, None].astype(np.float64)
    return key_rows(plan.keys, None, slice(None)).astype(np.float64)
