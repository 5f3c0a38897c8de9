"""The score for pictures of unknown classes (methods.unknown) as nodes, in float32."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from iosr_fast.export.one_file.logits import add_logits, largest, odds_of_largest, product
from iosr_fast.export.one_file.nodes import Nodes, axes
from iosr_fast.methods.models.model import Model, TextModel, join_terms
from iosr_fast.methods.ood_scores import BackgroundModel, DensityModel, NearestKeyModel
from iosr_fast.methods.unknown import Unknown


def add_unknown(nodes: Nodes, unknown: Unknown, embeddings: Mapping[str, str]) -> str:
    """Unknown.score (B,) of `embeddings`, which are names of "plain" and "adapted" (B, D)."""
    scorer = unknown.scorer
    columns = _columns(nodes, scorer.models, embeddings)
    if scorer.unknown_keys is not None:
        nearest = largest(nodes, product(nodes, embeddings[scorer.unknown_which], scorer.unknown_keys))
        columns.append(nodes.add("Neg", nearest))
    score = nodes.constant(np.float32(-unknown.bias))
    for column, weight in zip(columns, unknown.weights.tolist(), strict=True):
        if weight:
            score = nodes.add("Sub", score, nodes.add("Mul", column, weight))
    return score


def _columns(nodes: Nodes, models: list[Model], embeddings: Mapping[str, str]) -> list[str]:
    """Each score (B,) of OodScores, in its order."""
    columns: list[str] = []
    for model in models:
        match model:
            case TextModel():
                logits = _logits(nodes, model, embeddings)
                columns += [largest(nodes, logits), odds_of_largest(nodes, logits, model.support.n_classes)]
            case BackgroundModel():  # after DensityModel, whose last column is "mahalanobis"
                background = largest(nodes, _densities(nodes, model, embeddings))
                columns.append(nodes.add("Sub", columns[-1], background))
            case DensityModel():
                logits = _densities(nodes, model, embeddings)
                columns += [odds_of_largest(nodes, logits, model.support.n_classes), largest(nodes, logits)]
            case NearestKeyModel():
                columns.append(largest(nodes, product(nodes, embeddings[model.which], model.fields()["keys"])))
            case _:
                columns.append(largest(nodes, _logits(nodes, model, embeddings)))
    return columns


def _logits(nodes: Nodes, model: Model, embeddings: Mapping[str, str]) -> str:
    return add_logits(nodes, join_terms(model.support.n_classes, [(1.0, model.fields())]), embeddings)


def _densities(nodes: Nodes, model: DensityModel, embeddings: Mapping[str, str]) -> str:
    """(B, C) G(x) - x' P x / 2. With y = x - m, m the mean of all images, the terms are small enough for float32:

    <y, linear - P m> + bias + <m, linear> - m' P m / 2 - |L' y|^2 / 2,  P = L L'
    """
    fitted = model.fitted
    mean = model.moments.joined.means[0]
    moved = nodes.add("Sub", embeddings[model.which], mean.astype(np.float32))
    bias = fitted.bias + fitted.linear @ mean - mean @ fitted.precision @ mean / 2
    classes = nodes.add("Add", product(nodes, moved, fitted.linear - fitted.precision @ mean), bias.astype(np.float32))
    rows = product(nodes, moved, np.linalg.cholesky(fitted.precision).T)
    squares = nodes.add("ReduceSumSquare", rows, axes(1), keepdims=1)
    return nodes.add("Sub", classes, nodes.add("Mul", squares, 0.5))
