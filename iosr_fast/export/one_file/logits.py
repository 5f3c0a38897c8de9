"""From embeddings to the logits of a ScoringPlan, in float32, as scoring.lower and a backend compute them, and to the
nodes of a tree that a promise answers with (methods.tree)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from iosr_fast.export.one_file.value import Value
from iosr_fast.methods.tree import Tree
from iosr_fast.scoring.fields import EMBEDDINGS
from iosr_fast.scoring.key_precision import key_rows
from iosr_fast.scoring.plan import ScoringPlan


def logits_of(plan: ScoringPlan, embeddings: Mapping[str, Value]) -> Value:
    """The logits (B, C) of "plain" and "adapted" `embeddings` (B, D), as far as the plan reads them."""
    terms: list[Value] = []
    if plan.text is not None:
        terms.append((embeddings["plain"] @ plan.text.T) * plan.tau)
    if plan.keys is not None:
        terms.append(_cache_term(plan, embeddings))
    if plan.linear is not None:
        terms.append(_feature(plan, embeddings) @ plan.linear.T)
    logits = sum(terms[1:], terms[0])
    return logits if plan.bias is None else logits + plan.bias


def _cache_term(plan: ScoringPlan, embeddings: Mapping[str, Value]) -> Value:
    """(B, C). Narrow keys and values are stored as the float32 numbers that they stand for."""
    assert plan.keys is not None
    queries = _reduced(plan, embeddings[plan.query])
    if plan.query_transform is not None:
        queries = queries @ plan.query_transform.T
    cosines = queries @ key_rows(plan.keys, plan.key_scales, slice(None)).T
    affinities = ((cosines - 1) * plan.beta).op("Exp") * plan.alpha
    if plan.weights is not None:
        affinities = affinities * plan.weights
    if plan.values is not None:
        return affinities @ plan.values
    assert plan.class_offsets is not None
    labels = affinities.constant(np.repeat(np.arange(plan.n_classes), np.diff(plan.class_offsets))[:, None])
    return affinities @ labels.op("Equal", np.arange(plan.n_classes)).cast(np.float32)  # (N, C), computed at loading


def _feature(plan: ScoringPlan, embeddings: Mapping[str, Value]) -> Value:
    """What the linear term reads: lower.feature_rows."""
    if plan.feature == "both":
        plain, adapted = (_reduced(plan, embeddings[name]) for name in EMBEDDINGS)
        return plain.op("Concat", adapted, axis=1)
    if plan.feature != "text-distribution":
        return _reduced(plan, embeddings[plan.feature])
    assert plan.text is not None
    log_shares = (embeddings["plain"] @ plan.text.T / plan.temperature).op("LogSoftmax", axis=1)
    shares = log_shares.op("Exp")
    negentropy = (shares * (log_shares + math.log(plan.n_classes))).op("ReduceSum", [1])
    return shares.op("Concat", negentropy, axis=1)


def _reduced(plan: ScoringPlan, rows: Value) -> Value:
    """reducers.reduce_rows."""
    shift, projection = plan.reducer_shift, plan.reducer_projection
    if shift is not None:
        rows = rows - shift
    if projection is not None:
        rows = rows * projection if projection.ndim == 1 else rows @ projection.T
    return rows if plan.reducer is None else rows / rows.op("ReduceL2", [1]).op("Max", 1e-12)


def largest(scores: Value) -> Value:
    """(B,) of scores (B, C)."""
    return scores.op("ReduceMax", [1], keepdims=0)


def odds_of_largest(logits: Value, n_classes: int) -> Value:
    """log_loss.log_odds_of_largest of logits (B, C): (B,). The second largest is subtracted first: TensorRT 10 and
    OpenVINO before 2026 compute ReduceLogSumExp as its name says, which overflows from 89 on."""
    is_top = logits.op("ArgMax", axis=1).op("Equal", np.arange(n_classes))
    others = is_top.op("Where", -1e30, logits)
    second = others.op("ReduceMax", [1])
    return largest(logits - second) - (others - second).op("ReduceLogSumExp", [1], keepdims=0)


def answer(logits: Value, probabilities: Value, node: Value, tree: Tree, least_odds: float) -> tuple[Value, Value]:
    """Tree.answer of logits (B, C), their softmax, and the class with the largest, `node` (B,): the finest node that
    reaches `least_odds`, and whether one does, (B,) each."""
    n_classes = len(tree.paths)
    accepted = odds_of_largest(logits, n_classes) >= least_odds
    inner = np.arange(n_classes, n_classes + len(tree.inner))
    # (C, M) of zeros and ones, computed at loading
    below = [logits.constant(ids[:, None]).op("Equal", inner).cast(np.float32) for ids in tree.levels[1:]]
    masses = probabilities.op("Concat", probabilities @ sum(below[1:], below[0]), axis=1)
    for of_class in tree.levels[1:]:
        at_level = logits.constant(np.isin(np.arange(n_classes + len(inner)), of_class))
        best = at_level.op("Where", masses, -1).op("ArgMax", axis=1)
        reached = _odds(logits, best.op("Equal", of_class)) >= least_odds
        node = accepted.op("Where", node, reached.op("Where", best.op("Squeeze", [1]), node))
        accepted = accepted.op("Or", reached)
    return node, accepted


def _odds(logits: Value, inside: Value) -> Value:
    """log m - log(1 - m), (B,), of the mass m of the classes `inside` (B, C) a node. Sums of logits: those of
    probabilities are 0 beyond a difference of 103."""
    parts = inside.op("Where", logits, -1e30), inside.op("Where", -1e30, logits)
    tops = [part.op("ReduceMax", [1]) for part in parts]
    sums = [(part - top).op("ReduceLogSumExp", [1], keepdims=0) for part, top in zip(parts, tops, strict=True)]
    return (tops[0] - tops[1]).op("Squeeze", [1]) + (sums[0] - sums[1])
