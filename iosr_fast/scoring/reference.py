"""Scoring in float64 NumPy, written like the formula: the reference for tests of every implementation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from iosr_fast.scoring.key_precision import key_rows

if TYPE_CHECKING:
    from iosr_fast.encoders.encoder import Embeddings
    from iosr_fast.scoring.plan import ScoringPlan


def score_reference(plan: ScoringPlan, embeddings: Embeddings) -> np.ndarray:
    """Execute a plan with the full (B, N) affinity and the (N, C) one-hot matrix of the papers.

    logits = tau * plain @ text'
           + alpha * (weights * exp(-beta * (1 - query @ keys'))) @ onehot
           + feature @ linear' + bias

    The cache term is Tip-Adapter's (Zhang et al., ECCV 2022, eq. 5-6), with a weight per key. Keys of other precisions
    are converted exactly, int8 to key_scales[j] * keys[j]. Dense values replace the one-hot matrix. Returns (B, C)
    float64.
    """

    def rows(which: str) -> np.ndarray:
        return np.asarray(embeddings.plain if which == "plain" else embeddings.adapted, dtype=np.float64)

    def reduced(embedding: np.ndarray) -> np.ndarray:
        reducer = plan.reducer
        if reducer is None:
            return embedding
        if reducer.shift is not None:
            embedding = embedding - reducer.shift.astype(np.float64)
        if reducer.projection is not None:
            projection = reducer.projection.astype(np.float64)
            embedding = embedding @ (np.diag(projection) if projection.ndim == 1 else projection).T
        # A row that is mapped to zero stays zero.
        unit: np.ndarray = embedding / np.maximum(np.linalg.norm(embedding, axis=1, keepdims=True), 1e-12)
        return unit

    logits = np.zeros((len(embeddings), plan.n_classes))
    if plan.text is not None:
        logits += plan.tau * rows("plain") @ plan.text.T.astype(np.float64)
    if plan.keys is not None:
        query = reduced(rows(plan.query))
        if plan.query_transform is not None:
            query = query @ plan.query_transform.T.astype(np.float64)
        cosine = query @ _keys(plan).T
        affinity = np.exp(-plan.beta * (1.0 - cosine))
        if plan.weights is not None:
            affinity *= plan.weights.astype(np.float64)
        if plan.values is not None:
            logits += plan.alpha * affinity @ plan.values.astype(np.float64)
        elif plan.class_offsets is not None:
            labels = np.repeat(np.arange(plan.n_classes), np.diff(plan.class_offsets))
            onehot = np.eye(plan.n_classes)[labels]
            logits += plan.alpha * affinity @ onehot
    if plan.linear is not None:
        if plan.feature == "text-distribution" and plan.text is not None:
            share = softmax(rows("plain") @ plan.text.T.astype(np.float64) / plan.temperature)
            negentropy = share * np.log(plan.n_classes * np.maximum(share, 1e-300))
            feature = np.concatenate([share, negentropy.sum(1, keepdims=True)], axis=1)
        elif plan.feature == "both":
            feature = np.concatenate([reduced(rows("plain")), reduced(rows("adapted"))], axis=1)
        else:
            feature = reduced(rows(plan.feature))
        logits += feature @ plan.linear.T.astype(np.float64)
    if plan.bias is not None:
        logits += plan.bias.astype(np.float64)
    return logits


def _keys(plan: ScoringPlan) -> np.ndarray:
    assert plan.keys is not None
    if plan.key_scales is not None:  # in float64 the product of code and scale is exact
        return plan.keys.astype(np.float64) * plan.key_scales[:, None].astype(np.float64)
    return key_rows(plan.keys, None, slice(None)).astype(np.float64)


def softmax(scores: np.ndarray) -> np.ndarray:
    """exp(scores) over its sum along the last axis, (B, C) of the dtype of `scores`.

    >>> softmax(np.log([[1.0, 3.0]]))
    array([[0.25, 0.75]])
    """
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    shares: np.ndarray = powers / powers.sum(-1, keepdims=True)
    return shares
