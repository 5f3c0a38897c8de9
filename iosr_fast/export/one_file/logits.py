"""From embeddings to the logits of a ScoringPlan, in float32, as scoring.lower and a backend compute them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from iosr_fast.export.one_file.nodes import Nodes, axes
from iosr_fast.scoring.fields import EMBEDDINGS
from iosr_fast.scoring.key_precision import key_rows
from iosr_fast.scoring.plan import ScoringPlan

_TINY = 1e-12  # the least norm of reducers.reduce_rows


def add_logits(nodes: Nodes, plan: ScoringPlan, embeddings: Mapping[str, str]) -> str:
    """The logits (B, C) of `embeddings`: the names of "plain" and "adapted" (B, D), as far as the plan reads them."""
    terms = []
    if plan.text is not None:
        terms.append(nodes.add("Mul", product(nodes, embeddings["plain"], plan.text), plan.tau))
    if plan.keys is not None:
        terms.append(_cache_term(nodes, plan, embeddings))
    if plan.linear is not None:
        terms.append(product(nodes, _feature(nodes, plan, embeddings), plan.linear))
    if plan.bias is not None:
        terms.append(nodes.constant(plan.bias))
    logits = terms[0]
    for term in terms[1:]:
        logits = nodes.add("Add", logits, term)
    return logits


def _cache_term(nodes: Nodes, plan: ScoringPlan, embeddings: Mapping[str, str]) -> str:
    """(B, C). Narrow keys and values are stored as the float32 numbers that they stand for."""
    assert plan.keys is not None
    queries = _reduced(nodes, plan, embeddings[plan.query])
    if plan.query_transform is not None:
        queries = product(nodes, queries, plan.query_transform)
    cosines = product(nodes, queries, key_rows(plan.keys, plan.key_scales, slice(None)))
    affinities = nodes.add("Exp", nodes.add("Mul", nodes.add("Sub", cosines, 1.0), plan.beta))
    weights = plan.alpha * np.float64(1.0 if plan.weights is None else plan.weights)
    affinities = nodes.add("Mul", affinities, weights.astype(np.float32))
    if plan.values is not None:
        return nodes.add("MatMul", affinities, plan.values.astype(np.float32))
    assert plan.class_offsets is not None
    labels = np.repeat(np.arange(plan.n_classes), np.diff(plan.class_offsets))
    is_label = nodes.add("Equal", labels[:, None], np.arange(plan.n_classes))  # runtimes compute it once, at loading
    return nodes.add("MatMul", affinities, nodes.cast(is_label, np.float32))


def _feature(nodes: Nodes, plan: ScoringPlan, embeddings: Mapping[str, str]) -> str:
    """What the linear term reads: lower.feature_rows."""
    if plan.feature == "both":
        return nodes.add("Concat", *(_reduced(nodes, plan, embeddings[name]) for name in EMBEDDINGS), axis=1)
    if plan.feature != "text-distribution":
        return _reduced(nodes, plan, embeddings[plan.feature])
    assert plan.text is not None
    cosines = product(nodes, embeddings["plain"], plan.text)
    log_shares = nodes.add("LogSoftmax", nodes.add("Div", cosines, plan.temperature), axis=1)
    shares = nodes.add("Exp", log_shares)
    relative = nodes.add("Add", log_shares, math.log(plan.n_classes))
    negentropy = nodes.add("ReduceSum", nodes.add("Mul", shares, relative), axes(1), keepdims=1)
    return nodes.add("Concat", shares, negentropy, axis=1)


def _reduced(nodes: Nodes, plan: ScoringPlan, rows: str) -> str:
    """reducers.reduce_rows."""
    if plan.reducer is None:
        return rows
    if plan.reducer_shift is not None:
        rows = nodes.add("Sub", rows, plan.reducer_shift)
    projection = plan.reducer_projection
    if projection is not None:
        rows = nodes.add("Mul", rows, projection) if projection.ndim == 1 else product(nodes, rows, projection)
    norms = nodes.add("ReduceL2", rows, axes(1), keepdims=1)
    return nodes.add("Div", rows, nodes.add("Max", norms, _TINY))


def product(nodes: Nodes, rows: str, matrix: np.ndarray) -> str:
    """rows @ matrix', float32, of rows (B, K) and a constant matrix (C, K)."""
    return nodes.add("MatMul", rows, np.ascontiguousarray(matrix.T, np.float32))


def largest(nodes: Nodes, scores: str) -> str:
    """(B,) of scores (B, C)."""
    return nodes.add("ReduceMax", scores, axes(1), keepdims=0)


def odds_of_largest(nodes: Nodes, logits: str, n_classes: int) -> str:
    """conformal.log_odds_of_largest of logits (B, C): (B,)."""
    top = nodes.add("Unsqueeze", nodes.add("ArgMax", logits, axis=1, keepdims=0), axes(1))
    is_top = nodes.add("Equal", top, np.arange(n_classes))
    others = nodes.add("Where", is_top, -1e30, logits)
    return nodes.add("Sub", largest(nodes, logits), nodes.add("ReduceLogSumExp", others, axes(1), keepdims=0))
