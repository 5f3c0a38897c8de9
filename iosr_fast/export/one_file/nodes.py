"""The nodes of a tree that a promise answers with (methods.tree) in a graph, in float32."""

from __future__ import annotations

import numpy as np

from iosr_fast.export.one_file.logits import odds_of_largest
from iosr_fast.export.one_file.value import Value
from iosr_fast.methods.tree import Tree


def answer(logits: Value, probabilities: Value, node: Value, tree: Tree, least_odds: float) -> tuple[Value, Value]:
    """Levels.answer of logits (B, C), their softmax, and the class with the largest, `node` (B,): the finest node that
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
